//! Directories for tests of files.

use std::fmt::Debug;
use std::fs;
use std::path::PathBuf;

use zcache::error::Error;
use zcache::shared::StepError;

/// A directory of its own, removed at the end.
pub(super) struct Place(pub(super) PathBuf);

impl Place {
    pub(super) fn new(name: &str) -> Place {
        let place =
            std::env::temp_dir().join(format!("zcache-files-{}-{name}", std::process::id()));
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

/// The index that a step was taken in cannot be used as it is.
pub(super) fn is_damaged<R: Debug>(answer: Result<R, StepError>) {
    let why = answer.expect_err("a step in a damaged index");
    assert!(
        matches!(
            why,
            StepError::Failed(Error::Corrupt(_) | Error::Lost(_) | Error::Unusable(..))
        ),
        "{why:?}"
    );
}
