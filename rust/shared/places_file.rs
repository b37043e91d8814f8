//! The sixth file of the index of a pool: the places of its entries, a word for each cell.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::fstat;

use super::guard::Map;
use super::header::HEADER_LEN;
use super::lock_files::{
    create, extend, extend_ahead, is_hollow, open, open_existing, open_folder, remove, rename_over,
    unshare,
};
use crate::error::{Error, Result};

const NAME: &str = "places";
const NEW_NAME: &str = "places.new";

/// The file and its mapping.
#[derive(Debug)]
pub(super) struct PlacesFile {
    file: File,
    map: Map,
}

/// The file as it was found when it was opened.
#[derive(Debug)]
pub(super) struct OpenedPlaces {
    pub(super) file: PlacesFile,
    pub(super) is_empty: bool,
    /// Whether it was longer than what it held; see [`is_hollow`].
    pub(super) is_hollowed: bool,
}

impl PlacesFile {
    fn over(file: File) -> io::Result<Self> {
        let map = Map::new(&file)?;
        Ok(PlacesFile { file, map })
    }

    /// Opens it, or makes it.
    pub(super) fn open(root: &Path) -> io::Result<OpenedPlaces> {
        let file = open(&root.join(NAME))?;
        let is_hollowed = is_hollow(&file)?;
        if is_hollowed {
            file.set_len(0)?;
        }
        let mut is_empty = false;
        match file.metadata()?.len() {
            0 => {
                is_empty = true;
                extend(&file, 0, HEADER_LEN)?;
            }
            len => {
                unshare(&file, len);
                extend(&file, 0, len as usize)?;
            }
        }
        Ok(OpenedPlaces {
            file: Self::over(file)?,
            is_empty,
            is_hollowed,
        })
    }

    /// Opens the one that is there under its name now.
    pub(super) fn reopen(root: &Path) -> io::Result<Self> {
        Self::over(open_existing(&root.join(NAME))?)
    }

    /// Makes an empty one under a name of its own; see [`PlacesFile::publish`].
    pub(super) fn make(root: &Path) -> io::Result<Self> {
        let path: PathBuf = root.join(NEW_NAME);
        remove(&open_folder(root)?, NEW_NAME);
        let file = create(&path)?;
        extend(&file, 0, HEADER_LEN)?;
        Self::over(file)
    }

    /// Gives the one that was made its name.
    pub(super) fn publish(root: &Path) -> io::Result<()> {
        rename_over(&open_folder(root)?, NEW_NAME, NAME)
    }

    /// Removes the one that is there: a full volume has no room for another.
    pub(super) fn remove(root: &Path) {
        if let Ok(folder) = open_folder(root) {
            remove(&folder, NAME);
        }
    }

    /// Maps as much as is in use; where that is mapped, the file is only looked at if asked for.
    pub(super) fn remap(&mut self, cells: u64, looks: bool) -> Result<()> {
        let wanted = cells.saturating_mul(size_of::<u64>() as u64);
        if !looks && wanted <= self.map.len() as u64 {
            return Ok(());
        }
        let not_mapped = Error::Lost("index file: cannot be mapped");
        let status = fstat(&self.file).map_err(|_| not_mapped)?;
        if status.st_nlink == 0 {
            return Err(Error::Lost("index file: removed"));
        }
        let len = status.st_size as u64;
        if len < wanted {
            return Err(Error::Corrupt("index file: truncated"));
        }
        if len != self.map.len() as u64 {
            self.map = Map::new(&self.file).map_err(|_| not_mapped)?;
        }
        Ok(())
    }

    /// Has room for so many cells.
    pub(super) fn grow(&mut self, cells: usize) -> Result<()> {
        let (len, now) = (cells.saturating_mul(size_of::<u64>()), self.map.len());
        if len > now {
            extend_ahead(&self.file, now, len).map_err(|_| Error::Full)?;
            self.map = Map::new(&self.file).map_err(|_| Error::Full)?;
        }
        Ok(())
    }

    pub(super) fn has_faulted(&self) -> bool {
        self.map.has_faulted()
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn words(&self, cells: u64) -> &[u64] {
        let bytes = self
            .map
            .get(..(cells as usize).saturating_mul(size_of::<u64>()));
        bytemuck::try_cast_slice(bytes.unwrap_or_default()).unwrap_or_default()
    }

    pub(super) fn words_mut(&mut self, cells: u64) -> &mut [u64] {
        let len = (cells as usize).saturating_mul(size_of::<u64>());
        let bytes = self.map.get_mut(..len);
        bytemuck::try_cast_slice_mut(bytes.unwrap_or_default()).unwrap_or_default()
    }
}
