//! The sample of all requests of a directory, in a file beside the index.
//!
//! It is no part of the index: one that cannot be had, is damaged or was removed costs nobody a read, and
//! one that is sound outlives a rebuild. The lock of the index guards it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::guard::Map;
use super::lock_files::{extend, is_hollow, open, unshare};
use crate::sampling::Sample;

const NAME: &str = "sample";
const LEN: usize = size_of::<Sample>();

/// The file, if it could be had, and where it is: its mapping keeps it, also without a descriptor.
#[derive(Debug)]
pub(super) struct SampleFile(Option<(Map, [u64; 2])>);

impl SampleFile {
    /// Opens it, or begins a new one. The lock must be held.
    pub(super) fn open(folder: &Path, seed: u64) -> Self {
        let mut file = SampleFile(open_mapped(folder).ok());
        file.check(seed);
        file
    }

    /// The sample.
    #[inline]
    pub(super) fn get(&mut self) -> Option<&mut Sample> {
        let (map, _) = self.0.as_mut()?;
        if map.has_faulted() {
            return None;
        }
        bytemuck::try_from_bytes_mut(map.get_mut(..LEN)?).ok()
    }

    /// Begins anew what cannot be believed.
    pub(super) fn check(&mut self, seed: u64) {
        if let Some(sample) = self.get()
            && !sample.is_sound()
        {
            sample.begin(seed);
        }
    }

    /// Whether it is the one that others find, and all of it.
    pub(super) fn is_in_place(&self, folder: &Path) -> bool {
        self.0.as_ref().is_some_and(|(map, place)| {
            let found = std::fs::symlink_metadata(folder.join(NAME));
            !map.has_faulted()
                && found.is_ok_and(|at| [at.dev(), at.ino()] == *place && at.len() >= LEN as u64)
        })
    }
}

fn open_mapped(folder: &Path) -> io::Result<(Map, [u64; 2])> {
    let file = open(&folder.join(NAME))?;
    if is_hollow(&file)? || file.metadata()?.len() > LEN as u64 {
        file.set_len(0)?;
    }
    // Allocated at once, as all that is mapped.
    unshare(&file, LEN as u64);
    extend(&file, 0, LEN)?;
    let status = file.metadata()?;
    Ok((Map::new(&file)?, [status.dev(), status.ino()]))
}
