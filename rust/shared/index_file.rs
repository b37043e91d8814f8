//! One file of the index, and its mapping.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::fstat;
use rustix::io::Errno;

use super::guard::Map;
use super::lock_files::{
    create, extend, extend_ahead, is_hollow, open, open_existing, remove, rename_over, unshare,
};
use super::own::open_folder;
use crate::error::{Error, Result};

pub(super) const REMOVED: Error = Error::Lost("index file: removed");
/// A page that could not be had is as good as a damaged one.
pub(super) const FAULTED: Error =
    Error::Corrupt("index file: a page that cannot be read or written");

/// Bytes that a new file has beside those that it needs.
const ROOM: usize = 32 * 1024;

/// A file of the index.
#[derive(Debug)]
pub(super) struct IndexFile {
    name: &'static str,
    pub(super) file: File,
    pub(super) map: Map,
}

/// One as it was found when it was opened.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: IndexFile,
    pub(super) is_empty: bool,
    /// Whether it was longer than what it held; see [`is_hollow`].
    pub(super) is_hollowed: bool,
}

impl IndexFile {
    fn over(name: &'static str, file: File) -> io::Result<Self> {
        let map = Map::new(&file)?;
        Ok(IndexFile { name, file, map })
    }

    /// Opens the one of this name, or makes it; with `least` bytes at least.
    pub(super) fn open(root: &Path, name: &'static str, least: usize) -> io::Result<Opened> {
        let file = open(&root.join(name))?;
        let is_hollowed = is_hollow(&file)?;
        if is_hollowed {
            // To allocate all of it would fill the volume.
            file.set_len(0)?;
        }
        let len = file.metadata()?.len();
        if len != 0 {
            // A copy of the directory may have holes.
            unshare(&file, len);
        }
        // An empty file cannot be mapped.
        let wanted = if len == 0 { ROOM } else { len as usize };
        extend(&file, 0, wanted.max(least))?;
        Ok(Opened {
            file: Self::over(name, file)?,
            is_empty: len == 0,
            is_hollowed,
        })
    }

    /// Opens the one that is there under this name now.
    pub(super) fn reopen(root: &Path, name: &'static str) -> io::Result<Self> {
        Self::over(name, open_existing(&root.join(name))?)
    }

    /// Makes an empty one under a name of its own; see [`IndexFile::publish`].
    pub(super) fn make(root: &Path, name: &'static str, least: usize) -> io::Result<Self> {
        let new_name = new_name(name);
        // Left by a participant that has died.
        remove(&open_folder(root)?, &new_name);
        let file = create(&root.join(new_name))?;
        extend(&file, 0, ROOM + least)?;
        Self::over(name, file)
    }

    /// Gives the one that was made its name.
    pub(super) fn publish(&self, root: &Path) -> io::Result<()> {
        rename_over(&open_folder(root)?, &new_name(self.name), self.name)
    }

    /// Removes the one that has its name: a full volume has no room for another.
    pub(super) fn remove(&self, folder: &OwnedFd) {
        remove(folder, self.name);
    }

    /// Maps as much as is in use; where that is mapped, the file is only looked at if asked for.
    pub(super) fn remap(&mut self, wanted: u64, looks: bool) -> Result<()> {
        if !looks && wanted <= self.map.len() as u64 {
            return Ok(());
        }
        let status = fstat(&self.file).map_err(not_mapped)?;
        if status.st_nlink == 0 {
            return Err(REMOVED);
        }
        let len = status.st_size as u64;
        if len < wanted {
            return Err(Error::Corrupt("index file: truncated"));
        }
        if len != self.map.len() as u64 {
            self.map = Map::new(&self.file).map_err(not_mapped)?;
        }
        Ok(())
    }

    /// Has room for so many bytes.
    pub(super) fn grow(&mut self, len: usize) -> Result<()> {
        let now = self.map.len();
        if len > now {
            extend_ahead(&self.file, now, len).map_err(refused)?;
            self.map = Map::new(&self.file).map_err(refused)?;
        }
        Ok(())
    }

    /// Whether all that is mapped is in the file still: to read what was cut off is a fault.
    pub(super) fn is_whole(&self) -> bool {
        let mapped = self.map.len() as u64;
        fstat(&self.file).is_ok_and(|status| status.st_size as u64 >= mapped)
    }

    /// Numbers from a byte on; none where so many are not mapped.
    pub(super) fn slice<T: bytemuck::Pod>(&self, from: usize, len: u64) -> &[T] {
        let end = from.saturating_add((len as usize).saturating_mul(size_of::<T>()));
        let bytes = self.map.get(from..end);
        bytemuck::try_cast_slice(bytes.unwrap_or_default()).unwrap_or_default()
    }

    /// The same, mutable.
    pub(super) fn slice_mut<T: bytemuck::Pod>(&mut self, from: usize, len: u64) -> &mut [T] {
        let end = from.saturating_add((len as usize).saturating_mul(size_of::<T>()));
        let bytes = self.map.get_mut(from..end);
        bytemuck::try_cast_slice_mut(bytes.unwrap_or_default()).unwrap_or_default()
    }
}

/// A file that cannot grow, and what the operating system has said.
pub(super) fn refused(error: impl Into<io::Error>) -> Error {
    Error::Refused(errno_of(error))
}

/// A file that cannot be mapped, or looked at, any more.
pub(super) fn not_mapped(error: impl Into<io::Error>) -> Error {
    Error::Unusable("index file: cannot be mapped", errno_of(error))
}

/// What the operating system has said; the disk is at fault where it has not.
pub(super) fn errno_of(error: impl Into<io::Error>) -> Errno {
    Errno::from_io_error(&error.into()).unwrap_or(Errno::IO)
}

fn new_name(name: &str) -> String {
    format!("{name}.new")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_that_cannot_grow_tells_what_the_operating_system_says() {
        let path = std::env::temp_dir().join(format!("zcache-grow-{}", std::process::id()));
        std::fs::write(&path, [0; 4096]).unwrap();
        let mut options = File::options();
        let mapped = options.read(true).write(true).open(&path).unwrap();
        for (can_read, expected) in [(true, Errno::BADF), (false, Errno::ACCESS)] {
            // One can only be mapped, the other only be extended.
            let options = options.read(can_read).write(!can_read);
            let (file, map) = (options.open(&path).unwrap(), Map::new(&mapped).unwrap());
            let mut one = IndexFile {
                name: "cells",
                file,
                map,
            };
            assert_eq!(one.grow(8192), Err(Error::Refused(expected)));
            assert_eq!(one.map.len(), 4096);
            if !can_read {
                let error = one.remap(8192, true).unwrap_err();
                assert!(error.is_fatal());
                assert_eq!(
                    error,
                    Error::Unusable("index file: cannot be mapped", expected)
                );
                assert!(error.to_string().contains("Permission denied"), "{error}");
            }
            mapped.set_len(4096).unwrap();
        }
        std::fs::remove_file(path).unwrap();
    }
}
