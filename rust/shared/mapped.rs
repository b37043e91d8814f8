//! Storage in files that several processes map: the index of a cache directory.
//!
//! Four files, because each grows by itself: `head` (format, header, participants, versions, and
//! the hash table's directory at its end), `table` (slots), `cells` and `texts` (strings). A fifth,
//! `lock`, is locked around each step, and one `p<n>` for each participant is locked as long as that
//! participant lives. The kernel releases both kinds of lock when their holder dies.
//!
//! Nothing in the files is trusted. Each step checks the format, the lengths, the checksum of the
//! header and the dirty mark; the numbers inside are checked as they are used. What does not fit
//! means that the index is discarded and rebuilt from a scan of the directory.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use memmap2::MmapMut;
use rustix::fs::fstat;

use super::header::{CHECKED, DIRECTORY_AT, FileHeader, HEADER_LEN, boot};
use super::lock_files::{Locks, OpenError, extend, is_alive, map, open, take_slot, unsuitable};
use crate::arena::{Cell, Header, Storage};
use crate::error::{Error, Result};

/// The mapped files, and the lock that guards them.
#[derive(Debug)]
pub struct Mapped {
    pub(super) root: PathBuf,
    lock: File,
    pub(super) files: [File; FILES.len()],
    pub(super) maps: [MmapMut; FILES.len()],
    pub(super) own_slot: usize,
    pub(super) bound: u64,
    pub(super) generation: u64,
    /// Locked as long as this participant lives; only the kernel looks at it.
    alive: File,
    locks: Arc<Locks>,
}

const FILES: [&str; 4] = ["head", "table", "cells", "texts"];
pub(super) const HEAD: usize = 0;
const TABLE: usize = 1;
const CELLS: usize = 2;
const STRINGS: usize = 3;

impl Mapped {
    /// Opens the files below `root`, a directory that exists, waits for the lock and takes a slot,
    /// but does not register yet. The lock is held when this returns.
    ///
    /// The flag says that the index is new and empty; the caller rebuilds it.
    pub fn open(root: &Path, bound: u64) -> Result<(Self, bool), OpenError> {
        #[cfg(target_os = "linux")]
        if let Some(name) = unsuitable(u64::try_from(rustix::fs::statfs(root)?.f_type).unwrap_or(0))
        {
            return Err(OpenError::Unsuitable(name));
        }
        let lock = open(&root.join("lock"))?;
        lock.lock()?;
        let [head, table, cells, strings] = FILES.map(|name| open(&root.join(name)));
        let files = [head?, table?, cells?, strings?];
        if files[HEAD].metadata()?.len() < DIRECTORY_AT as u64 {
            extend(&files[HEAD], 0, DIRECTORY_AT)?;
        }
        let mut emptied = false;
        for file in &files {
            match file.metadata()?.len() as usize {
                // An empty file cannot be mapped.
                0 => {
                    emptied = true;
                    extend(file, 0, HEADER_LEN)?;
                }
                // A copy of the directory may have holes.
                len => extend(file, 0, len)?,
            }
        }
        let (own_slot, alive) = take_slot(root)?;
        let [head, table, cells, strings] = files.each_ref().map(map);
        let maps = [head?, table?, cells?, strings?];
        let mut mapped = Mapped {
            root: root.to_owned(),
            lock,
            files,
            maps,
            own_slot,
            bound,
            generation: 0,
            alive,
            locks: Arc::default(),
        };
        mapped.locks.set([&mapped.lock, &mapped.alive]);
        let owner = mapped.rebuild_owner();
        let header = mapped.file_header();
        let sound = !emptied
            && header.is_plausible()
            && header.dirty == 0
            && header.check == mapped.checksum()
            && header.boot == boot()
            // A rebuild goes on unless its owner has died; the owner with our slot has.
            && owner.is_none_or(|n| n != own_slot && is_alive(root, n))
            && mapped.remap(None).is_ok();
        if !sound {
            mapped.reset()?;
        }
        mapped.file_header_mut().dirty = own_slot as u32 + 1;
        Ok((mapped, !sound))
    }

    /// Empties the index for all participants. The lock must be held.
    ///
    /// The others see the new generation at their next step, and register again. What they are
    /// writing to the source meanwhile stays known.
    pub fn reset(&mut self) -> io::Result<()> {
        let others = self.living();
        for (n, file) in self.files.iter().enumerate() {
            let len = HEADER_LEN + if n == HEAD { DIRECTORY_AT } else { 0 };
            file.set_len(0)?;
            extend(file, 0, len)?;
        }
        for (map_of, file) in self.maps.iter_mut().zip(&self.files) {
            *map_of = map(file)?;
        }
        *self.file_header_mut() = FileHeader::fresh(self.own_slot);
        for (n, other) in others {
            self.file_header_mut().add_participant(n, other);
        }
        Ok(())
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> io::Result<bool> {
        if self.locks.are_disabled() {
            return Ok(false);
        }
        match self.lock.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Waits until the lock is free, after a step has found it taken. Returns early on a signal, and
    /// where the file is gone: the next step finds out.
    pub fn wait(path: &Path) {
        // Through a file of its own: the lock belongs to the open file, which others may use now.
        match File::open(path) {
            // Unlocked explicitly: a child that was forked meanwhile has the file open as well.
            Ok(file) if file.lock().is_ok() => drop(file.unlock()),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }

    /// Whether any of the files was removed, so that other participants would not find it.
    #[must_use]
    pub fn are_removed(&self) -> bool {
        let removed = |file| fstat(file).is_ok_and(|status| status.st_nlink == 0);
        removed(&self.lock) || removed(&self.alive) || self.files.iter().any(removed)
    }

    /// Continues with other files, opened by the same participant. The slot of the old ones is free
    /// from then on.
    pub fn replace(&mut self, mut other: Mapped) {
        other.locks = Arc::clone(&self.locks);
        other.locks.set([&other.lock, &other.alive]);
        *self = other;
    }

    /// See [`Locks`].
    #[must_use]
    pub fn locks(&self) -> Arc<Locks> {
        Arc::clone(&self.locks)
    }

    /// Directory of the files.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The file that is locked around each step.
    #[must_use]
    pub fn lock_path(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Checks the files after the lock was taken; an error means that they cannot be used. Returns
    /// whether the index was emptied, or this participant reclaimed, meanwhile.
    pub fn begin(&mut self) -> Result<bool> {
        let status = fstat(&self.files[HEAD]).map_err(|_| NOT_MAPPED)?;
        if status.st_nlink == 0 {
            return Err(REMOVED);
        }
        let len = status.st_size as u64;
        if len < DIRECTORY_AT as u64 {
            return Err(Error::Corrupt("header: truncated"));
        }
        if len != self.maps[HEAD].len() as u64 {
            self.maps[HEAD] = map(&self.files[HEAD]).map_err(|_| NOT_MAPPED)?;
        }
        let header = self.file_header();
        if !header.is_plausible() {
            return Err(Error::Corrupt("header: not of this format"));
        }
        if header.dirty != 0 {
            return Err(Error::Corrupt("dirty mark: a participant died in a step"));
        }
        if header.check != self.checksum() {
            return Err(Error::Corrupt("header: wrong checksum"));
        }
        self.remap(Some(len))?;
        let own_slot = self.own_slot;
        let header = self.file_header_mut();
        // A participant that was taken for dead is no longer in the list.
        let reclaimed = header
            .participants
            .get(own_slot)
            .is_none_or(|p| p.live == 0);
        header.dirty = own_slot as u32 + 1;
        Ok(reclaimed || self.file_header().generation != self.generation)
    }

    /// Ends what `begin` has begun and releases the lock. A step that failed leaves its dirty mark.
    pub fn end(&mut self, sound: bool) {
        if sound {
            let check = self.checksum();
            let header = self.file_header_mut();
            header.check = check;
            header.dirty = 0;
        }
        // A lock that cannot be released here is released when the file is closed.
        let _ = self.lock.unlock();
    }

    fn checksum(&self) -> u32 {
        crc32c::crc32c(self.maps[HEAD].get(CHECKED).unwrap_or_default())
    }

    /// Maps as much of the files as is in use. The length of the header file is passed where it is
    /// known: the system call is a good part of the cost of a step.
    fn remap(&mut self, head_len: Option<u64>) -> Result<()> {
        let header = self.file_header();
        let wanted = [
            DIRECTORY_AT as u64 + header.directory.saturating_mul(4),
            header.slots.saturating_mul(4),
            header.cells.saturating_mul(size_of::<Cell>() as u64),
            header.strings.saturating_mul(4),
        ];
        let known = [head_len, None, None, None];
        let parts = self.files.iter().zip(&mut self.maps).zip(wanted).zip(known);
        for (((file, map_of), wanted), known) in parts {
            let len = match known {
                Some(len) => len,
                None => {
                    let status = fstat(file).map_err(|_| NOT_MAPPED)?;
                    if status.st_nlink == 0 {
                        return Err(REMOVED);
                    }
                    status.st_size as u64
                }
            };
            if len < wanted {
                return Err(Error::Corrupt("index file: truncated"));
            }
            if len != map_of.len() as u64 {
                *map_of = map(file).map_err(|_| NOT_MAPPED)?;
            }
        }
        Ok(())
    }

    pub(super) fn file_header(&self) -> &FileHeader {
        let bytes = self.maps[HEAD].get(..size_of::<FileHeader>());
        bytemuck::try_from_bytes(bytes.unwrap_or_default())
            .unwrap_or_else(|_| FileHeader::missing())
    }

    #[allow(clippy::expect_used)]
    pub(super) fn file_header_mut(&mut self) -> &mut FileHeader {
        let bytes = self.maps[HEAD].get_mut(..size_of::<FileHeader>());
        // The file has `DIRECTORY_AT` bytes at least, or it would not have been mapped.
        bytemuck::try_from_bytes_mut(bytes.unwrap_or_default()).expect("a mapped header")
    }

    pub(super) fn slice<T: bytemuck::Pod>(&self, file: usize, from: usize, len: u64) -> &[T] {
        let end = from.saturating_add((len as usize).saturating_mul(size_of::<T>()));
        let bytes = self.maps.get(file).and_then(|map| map.get(from..end));
        bytemuck::try_cast_slice(bytes.unwrap_or_default()).unwrap_or_default()
    }

    pub(super) fn slice_mut<T: bytemuck::Pod>(
        &mut self,
        file: usize,
        from: usize,
        len: u64,
    ) -> &mut [T] {
        let end = from.saturating_add((len as usize).saturating_mul(size_of::<T>()));
        let bytes = self
            .maps
            .get_mut(file)
            .and_then(|map| map.get_mut(from..end));
        bytemuck::try_cast_slice_mut(bytes.unwrap_or_default()).unwrap_or_default()
    }

    fn grow(&mut self, which: usize, len: usize) -> Result<()> {
        let (Some(file), Some(map_of)) = (self.files.get(which), self.maps.get_mut(which)) else {
            return Err(Error::Full);
        };
        if len > map_of.len() {
            // Each growth makes every participant map the file anew, so it grows geometrically.
            let more = len.max(map_of.len() + map_of.len() / 8);
            extend(file, map_of.len(), more)
                .or_else(|_| extend(file, map_of.len(), len))
                .map_err(|_| Error::Full)?;
            *map_of = map(file).map_err(|_| Error::Full)?;
        }
        Ok(())
    }
}

const REMOVED: Error = Error::Corrupt("index file: removed");
const NOT_MAPPED: Error = Error::Corrupt("index file: cannot be mapped");

impl Storage for Mapped {
    fn header(&self) -> &Header {
        &self.file_header().header
    }
    fn header_mut(&mut self) -> &mut Header {
        &mut self.file_header_mut().header
    }
    fn cells(&self) -> &[Cell] {
        self.slice(CELLS, 0, self.file_header().cells)
    }
    fn cells_mut(&mut self) -> &mut [Cell] {
        self.slice_mut(CELLS, 0, self.file_header().cells)
    }
    fn slots(&self) -> &[u32] {
        self.slice(TABLE, 0, self.file_header().slots)
    }
    fn slots_mut(&mut self) -> &mut [u32] {
        self.slice_mut(TABLE, 0, self.file_header().slots)
    }
    fn directory(&self) -> &[u32] {
        self.slice(HEAD, DIRECTORY_AT, self.file_header().directory)
    }
    fn directory_mut(&mut self) -> &mut [u32] {
        self.slice_mut(HEAD, DIRECTORY_AT, self.file_header().directory)
    }
    fn strings(&self) -> &[u32] {
        self.slice(STRINGS, 0, self.file_header().strings)
    }
    fn strings_mut(&mut self) -> &mut [u32] {
        self.slice_mut(STRINGS, 0, self.file_header().strings)
    }
    fn grow_cells(&mut self, len: usize) -> Result<()> {
        self.grow(CELLS, len * size_of::<Cell>())?;
        self.file_header_mut().cells = len as u64;
        Ok(())
    }
    fn grow_slots(&mut self, len: usize) -> Result<()> {
        self.grow(TABLE, len * 4)?;
        self.file_header_mut().slots = len as u64;
        Ok(())
    }
    fn grow_directory(&mut self, len: usize) -> Result<()> {
        self.grow(HEAD, DIRECTORY_AT + len * 4)?;
        self.file_header_mut().directory = len as u64;
        Ok(())
    }
    fn grow_strings(&mut self, len: usize) -> Result<()> {
        self.grow(STRINGS, len * 4)?;
        self.file_header_mut().strings = len as u64;
        Ok(())
    }
}
