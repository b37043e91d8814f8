//! Directories for tests of files.

use std::fs;
use std::path::PathBuf;

/// A directory of its own, removed at the end.
pub(super) struct Place(pub(super) PathBuf);

impl Place {
    pub(super) fn new(name: &str) -> Place {
        // Each file of tests has a copy of this module, and all of them are one process.
        let module = module_path!().replace("::", "-");
        let own = format!("zcache-{module}-{}-{name}", std::process::id());
        let place = std::env::temp_dir().join(own);
        fs::create_dir_all(&place).unwrap();
        Place(place)
    }

    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
