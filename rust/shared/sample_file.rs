//! The sample of all requests of a directory, in a file beside the index.
//!
//! It is no part of the index: one that cannot be had, is damaged or was removed costs no one a read, and
//! one that is sound outlives a rebuild. The lock of the index guards it.

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::guard::Map;
use super::lock_files::{extend, is_hollow, open, open_existing, unshare};
use crate::sampling::Sample;

const NAME: &str = "sample";
const LEN: usize = size_of::<Sample>();

/// Requests that are passed over before a file that could not grow is tried again.
const AGAIN: u32 = 4096;

/// The file, if it could be had, and where it is: its mapping keeps it, also without a descriptor.
#[derive(Debug)]
pub(super) struct SampleFile {
    mapped: Option<(Map, [u64; 2])>,
    path: PathBuf,
    refused: u32,
}

impl SampleFile {
    /// Opens it, or begins a new one. The lock must be held.
    pub(super) fn open(folder: &Path, seed: u64) -> Self {
        let path = folder.join(NAME);
        let mut file = SampleFile {
            mapped: open_mapped(&path).ok(),
            path,
            refused: 0,
        };
        file.check(seed);
        file
    }

    fn sample(&mut self) -> Option<&mut Sample> {
        let (map, _) = self.mapped.as_mut()?;
        if map.has_faulted() {
            return None;
        }
        bytemuck::try_from_bytes_mut(map.get_mut(..LEN)?).ok()
    }

    /// The sample, to be read.
    pub(super) fn get(&mut self) -> Option<&mut Sample> {
        self.sample()
    }

    /// The sample, if it has room for one request more.
    #[inline]
    pub(super) fn get_with_room(&mut self) -> Option<&mut Sample> {
        while let Some(bytes) = self.sample()?.needs() {
            self.grow(bytes)?;
        }
        self.sample()
    }

    #[cold]
    fn grow(&mut self, bytes: Range<usize>) -> Option<()> {
        if self.refused > 0 {
            self.refused -= 1;
            return None;
        }
        let place = self.place();
        let file = open_existing(&self.path).ok().filter(|file| {
            let status = file.metadata();
            status.is_ok_and(|status| Some([status.dev(), status.ino()]) == place)
        });
        if file.is_none_or(|file| extend(&file, bytes.start, bytes.end).is_err()) {
            self.refused = AGAIN;
            return None;
        }
        self.sample()?.give_room(&bytes);
        Some(())
    }

    fn place(&self) -> Option<[u64; 2]> {
        self.mapped.as_ref().map(|(_, place)| *place)
    }

    /// Begins anew what cannot be believed.
    pub(super) fn check(&mut self, seed: u64) {
        if let Some(sample) = self.sample()
            && !sample.is_sound()
        {
            sample.begin(seed);
        }
    }

    /// Whether it is the one that others find, and all of it.
    pub(super) fn is_in_place(&self) -> bool {
        let found = std::fs::symlink_metadata(&self.path);
        self.mapped.as_ref().is_some_and(|(map, place)| {
            !map.has_faulted()
                && found.is_ok_and(|at| [at.dev(), at.ino()] == *place && at.len() >= LEN as u64)
        })
    }
}

fn open_mapped(path: &Path) -> io::Result<(Map, [u64; 2])> {
    let file = open(path)?;
    if is_hollow(&file)? || file.metadata()?.len() > LEN as u64 {
        file.set_len(0)?;
    }
    // Allocated before it is used, as all that is mapped.
    unshare(&file, LEN as u64);
    extend(&file, 0, Sample::LEN)?;
    file.set_len(LEN as u64)?;
    let map = Map::new(&file)?;
    if let Ok(sample) = bytemuck::try_from_bytes::<Sample>(map.get(..LEN).unwrap_or_default())
        && sample.is_sound()
    {
        // A copy of the directory may have holes.
        for part in sample.parts().iter().filter(|part| !part.is_empty()) {
            extend(&file, part.start, part.end)?;
        }
    }
    let status = file.metadata()?;
    Ok((map, [status.dev(), status.ino()]))
}
