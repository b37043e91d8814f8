//! A block in files that several processes map: the index of a cache directory.
//!
//! Four files, for each grows by itself: `head` (format, header, participants, versions, and the
//! table's directory at its end), `table` (slots), `cells` and `texts`. A fifth, `lock`, is locked
//! around each step, and one `p<n>` for each participant is locked as long as that participant
//! lives. The kernel releases both sorts of lock when their holder dies, however it dies.
//!
//! Nothing in the files is trusted. Whoever takes the lock checks the format, the lengths, the
//! checksum of the header and the mark that its holder sets while it works; the numbers inside are
//! checked as they are used. What does not fit means that the index is thrown away and rebuilt from
//! a walk of the directory.

mod files;
mod head;
mod participants;

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use memmap2::MmapMut;
use rustix::fs::fstat;

pub use self::files::{Locks, OpenError};
use self::files::{extend, is_alive, map, open, take_place, unsuitable};
pub use self::head::PARTICIPANTS;
use self::head::{CHECKED, DIRECTORY, HEAD, Head, NO_HEAD, VERSIONS, boot};
use crate::block::{Block, Header, Participant, Version};
use crate::cell::Cell;
use crate::error::{Fault, Res};

/// The mapped files, and the lock that guards them.
#[derive(Debug)]
pub struct Mapped {
    root: PathBuf,
    lock: File,
    files: [File; FILES.len()],
    maps: [MmapMut; FILES.len()],
    me: usize,
    bound: u64,
    generation: u64,
    /// Locked as long as this participant lives, and only read by the kernel.
    alive: File,
    locks: Arc<Locks>,
}

const FILES: [&str; 4] = ["head", "table", "cells", "texts"];
const TABLE: usize = 1;
const CELLS: usize = 2;
const TEXTS: usize = 3;

impl Mapped {
    /// Opens the files below `root`, a directory that exists, waits for the lock and takes a place
    /// among the participants, but is not in their list yet. The lock is held when this returns.
    ///
    /// The flag says that the index is new and empty; the caller fills it.
    pub fn open(root: &Path, bound: u64) -> Result<(Self, bool), OpenError> {
        #[cfg(target_os = "linux")]
        if let Some(name) = unsuitable(u64::try_from(rustix::fs::statfs(root)?.f_type).unwrap_or(0))
        {
            return Err(OpenError::Unsuitable(name));
        }
        let lock = open(&root.join("lock"))?;
        lock.lock()?;
        let [head, table, cells, texts] = FILES.map(|name| open(&root.join(name)));
        let files = [head?, table?, cells?, texts?];
        if files[0].metadata()?.len() < DIRECTORY as u64 {
            extend(&files[0], 0, DIRECTORY)?;
        }
        // An empty file cannot be mapped.
        let mut emptied = false;
        for file in &files {
            match file.metadata()?.len() as usize {
                0 => {
                    emptied = true;
                    extend(file, 0, HEAD)?;
                }
                // A copy of the directory may have holes.
                len => extend(file, 0, len)?,
            }
        }
        let (me, alive) = take_place(root)?;
        let [head, table, cells, texts] = files.each_ref().map(map);
        let maps = [head?, table?, cells?, texts?];
        let mut mapped = Mapped {
            root: root.to_owned(),
            lock,
            files,
            maps,
            me,
            bound,
            generation: 0,
            alive,
            locks: Arc::default(),
        };
        mapped.locks.set([&mapped.lock, &mapped.alive]);
        let rebuilt = mapped.rebuilder();
        let sound = !emptied
            && mapped.head().looks_right()
            && mapped.head().dirty == 0
            && mapped.head().check == mapped.checksum()
            && mapped.head().boot == boot()
            // Whoever rebuilds it goes on with that, unless it has died; at our place it has.
            && rebuilt.is_none_or(|n| n != me && is_alive(root, n))
            && mapped.remap(None).is_ok();
        if !sound {
            mapped.reset()?;
        }
        mapped.head_mut().dirty = me as u32 + 1;
        Ok((mapped, !sound))
    }

    /// Empties the index for everybody. The lock must be held.
    ///
    /// Other participants see the new generation when they take the lock next, and register anew.
    /// What they are changing in the source until then stays known.
    pub fn reset(&mut self) -> io::Result<()> {
        let others = self.living();
        for file in &self.files {
            file.set_len(0)?;
            extend(
                file,
                0,
                if std::ptr::eq(file, &self.files[0]) {
                    DIRECTORY + HEAD
                } else {
                    HEAD
                },
            )?;
        }
        for (map_of, file) in self.maps.iter_mut().zip(&self.files) {
            *map_of = map(file)?;
        }
        *self.head_mut() = Head::fresh(self.me);
        for (n, other) in others {
            self.head_mut().enter(n, other);
        }
        Ok(())
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> io::Result<bool> {
        if self.locks.are_left() {
            return Ok(false);
        }
        match self.lock.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Waits for the lock, in the place of a step that found it taken, and gives it back. Returns
    /// early on a signal, and where the file is gone: the next step then finds out more.
    pub fn wait(path: &Path) {
        // Through a file of its own: the lock belongs to the open file, which others may use now.
        match File::open(path) {
            // Given back by name: a child that was forked meanwhile has the file open as well.
            Ok(file) if file.lock().is_ok() => drop(file.unlock()),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }

    /// Whether somebody has removed the files, so that others would not find them.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let gone = |file| fstat(file).is_ok_and(|status| status.st_nlink == 0);
        gone(&self.lock) || gone(&self.alive) || self.files.iter().any(gone)
    }

    /// Goes on with other files, opened by the same participant. The place of the old ones is free
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

    /// Looks at the files after the lock was taken; an error means that they cannot be used.
    /// Returns whether somebody has emptied the index meanwhile.
    pub fn begin(&mut self) -> Res<bool> {
        let status = fstat(&self.files[0]).map_err(|_| NO_MAP)?;
        if status.st_nlink == 0 {
            return Err(GONE);
        }
        let len = status.st_size as u64;
        if len < DIRECTORY as u64 {
            return Err(Fault::Corrupt("the head is cut off"));
        }
        if len != self.maps[0].len() as u64 {
            self.maps[0] = map(&self.files[0]).map_err(|_| NO_MAP)?;
        }
        let head = self.head();
        if !head.looks_right() {
            return Err(Fault::Corrupt("the head is not ours"));
        }
        if head.dirty != 0 {
            return Err(Fault::Corrupt("the last one at work has died"));
        }
        if head.check != self.checksum() {
            return Err(Fault::Corrupt("the head is damaged"));
        }
        self.remap(Some(len))?;
        let me = self.me;
        let head = self.head_mut();
        // Whoever was taken for dead is not in the list any more.
        let buried = head.participants.get(me).is_none_or(|p| p.live == 0);
        head.dirty = me as u32 + 1;
        Ok(buried || self.head().generation != self.generation)
    }

    /// Ends what `begin` has begun and gives the lock back. A step that failed leaves its mark.
    pub fn end(&mut self, sound: bool) {
        if sound {
            let check = self.checksum();
            let head = self.head_mut();
            head.check = check;
            head.dirty = 0;
        }
        // A lock that cannot be given back is given back by the kernel when the file is closed.
        let _ = self.lock.unlock();
    }

    fn checksum(&self) -> u32 {
        crc32c::crc32c(self.maps[0].get(CHECKED).unwrap_or_default())
    }

    /// Maps as much of the files as is in use. The length of the head is given where it is known:
    /// asking is a good part of what a step costs.
    fn remap(&mut self, head_len: Option<u64>) -> Res<()> {
        let head = self.head();
        let wanted = [
            DIRECTORY as u64 + head.directory.saturating_mul(4),
            head.slots.saturating_mul(4),
            head.cells.saturating_mul(size_of::<Cell>() as u64),
            head.texts.saturating_mul(4),
        ];
        let known = [head_len, None, None, None];
        let parts = self.files.iter().zip(&mut self.maps).zip(wanted).zip(known);
        for (((file, map_of), wanted), known) in parts {
            let len = match known {
                Some(len) => len,
                None => {
                    let status = fstat(file).map_err(|_| NO_MAP)?;
                    if status.st_nlink == 0 {
                        return Err(GONE);
                    }
                    status.st_size as u64
                }
            };
            if len < wanted {
                return Err(Fault::Corrupt("a file of the index is cut off"));
            }
            if len != map_of.len() as u64 {
                *map_of = map(file).map_err(|_| NO_MAP)?;
            }
        }
        Ok(())
    }

    fn head(&self) -> &Head {
        let bytes = self.maps[0].get(..size_of::<Head>()).unwrap_or_default();
        bytemuck::try_from_bytes(bytes).unwrap_or(&NO_HEAD)
    }

    #[allow(clippy::expect_used)]
    fn head_mut(&mut self) -> &mut Head {
        let bytes = self.maps[0]
            .get_mut(..size_of::<Head>())
            .unwrap_or_default();
        // The file has `DIRECTORY` bytes at least, or it would not have been mapped.
        bytemuck::try_from_bytes_mut(bytes).expect("a head that is mapped")
    }

    fn grow(&mut self, which: usize, len: usize) -> Res<()> {
        let (Some(file), Some(map_of)) = (self.files.get(which), self.maps.get_mut(which)) else {
            return Err(Fault::Full);
        };
        if len > map_of.len() {
            // Each growth makes everybody map the file anew, so it grows by a part of itself.
            let more = len.max(map_of.len() + map_of.len() / 8);
            extend(file, map_of.len(), more)
                .or_else(|_| extend(file, map_of.len(), len))
                .map_err(|_| Fault::Full)?;
            *map_of = map(file).map_err(|_| Fault::Full)?;
        }
        Ok(())
    }
}

const GONE: Fault = Fault::Corrupt("a file of the index was removed");
const NO_MAP: Fault = Fault::Corrupt("a file of the index cannot be mapped");
impl Block for Mapped {
    fn header(&self) -> &Header {
        &self.head().header
    }
    fn header_mut(&mut self) -> &mut Header {
        &mut self.head_mut().header
    }
    fn cells(&self) -> &[Cell] {
        let len = self.head().cells as usize * size_of::<Cell>();
        let bytes = self.maps[CELLS].get(..len).unwrap_or_default();
        bytemuck::try_cast_slice(bytes).unwrap_or_default()
    }
    fn cells_mut(&mut self) -> &mut [Cell] {
        let len = self.head().cells as usize * size_of::<Cell>();
        let bytes = self.maps[CELLS].get_mut(..len).unwrap_or_default();
        bytemuck::try_cast_slice_mut(bytes).unwrap_or_default()
    }
    fn slots(&self) -> &[u32] {
        let len = self.head().slots as usize * 4;
        let bytes = self.maps[TABLE].get(..len).unwrap_or_default();
        bytemuck::try_cast_slice(bytes).unwrap_or_default()
    }
    fn slots_mut(&mut self) -> &mut [u32] {
        let len = self.head().slots as usize * 4;
        let bytes = self.maps[TABLE].get_mut(..len).unwrap_or_default();
        bytemuck::try_cast_slice_mut(bytes).unwrap_or_default()
    }
    fn directory(&self) -> &[u32] {
        let end = DIRECTORY + self.head().directory as usize * 4;
        let bytes = self.maps[0].get(DIRECTORY..end).unwrap_or_default();
        bytemuck::try_cast_slice(bytes).unwrap_or_default()
    }
    fn directory_mut(&mut self) -> &mut [u32] {
        let end = DIRECTORY + self.head().directory as usize * 4;
        let bytes = self.maps[0].get_mut(DIRECTORY..end).unwrap_or_default();
        bytemuck::try_cast_slice_mut(bytes).unwrap_or_default()
    }
    fn texts(&self) -> &[u32] {
        let len = self.head().texts as usize * 4;
        let bytes = self.maps[TEXTS].get(..len).unwrap_or_default();
        bytemuck::try_cast_slice(bytes).unwrap_or_default()
    }
    fn texts_mut(&mut self) -> &mut [u32] {
        let len = self.head().texts as usize * 4;
        let bytes = self.maps[TEXTS].get_mut(..len).unwrap_or_default();
        bytemuck::try_cast_slice_mut(bytes).unwrap_or_default()
    }
    fn grow_cells(&mut self, len: usize) -> Res<()> {
        self.grow(CELLS, len * size_of::<Cell>())?;
        self.head_mut().cells = len as u64;
        Ok(())
    }
    fn grow_slots(&mut self, len: usize) -> Res<()> {
        self.grow(TABLE, len * 4)?;
        self.head_mut().slots = len as u64;
        Ok(())
    }
    fn grow_directory(&mut self, len: usize) -> Res<()> {
        self.grow(0, DIRECTORY + len * 4)?;
        self.head_mut().directory = len as u64;
        Ok(())
    }
    fn grow_texts(&mut self, len: usize) -> Res<()> {
        self.grow(TEXTS, len * 4)?;
        self.head_mut().texts = len as u64;
        Ok(())
    }
    fn version(&self, key: u64) -> [u32; 2] {
        let at = HEAD + (key as usize % VERSIONS) * 4;
        let bytes = self.maps[0].get(at..at + 4).and_then(|b| b.try_into().ok());
        [bytes.map_or(0, u32::from_ne_bytes), self.head().epoch]
    }
    fn first_version(&self) -> Version {
        [0, self.head().generation as u32]
    }
    fn change_key(&mut self, key: u64) {
        let [version, _] = self.version(key);
        let at = HEAD + (key as usize % VERSIONS) * 4;
        if let Some(bytes) = self.maps[0].get_mut(at..at + 4) {
            bytes.copy_from_slice(&version.wrapping_add(1).to_ne_bytes());
        }
    }
    fn change_all(&mut self) {
        let head = self.head_mut();
        head.epoch = head.epoch.wrapping_add(1);
    }
    fn mark_write(&mut self, key: u64, begins: bool) {
        let me = self.me;
        self.head_mut().mark_write(me, key, begins);
    }
    fn has_writers(&self) -> bool {
        self.head().has_writers()
    }
    fn is_written(&self, key: u64) -> bool {
        self.head().is_written(self.me, key)
    }
    fn bury(&mut self, n: usize) -> Participant {
        self.head_mut().bury(n)
    }
    fn participants(&self) -> &[Participant] {
        self.head().taken()
    }
    fn participants_mut(&mut self) -> &mut [Participant] {
        let head = self.head_mut();
        let places = head.places as usize;
        head.participants.get_mut(..places).unwrap_or_default()
    }
    fn me(&self) -> usize {
        self.me
    }
    fn is_filled_here(&self) -> bool {
        self.is_rebuilder()
    }
    fn is_complete(&self) -> bool {
        self.head().rebuilding == 0
    }
}
