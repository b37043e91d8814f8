//! A block in files that several processes map: the index of a cache directory.
//!
//! Three files, for each grows by itself: `head` (format, header, participants, versions, and the
//! table's directory at its end), `table` (slots) and `cells`. A fourth, `lock`, is locked around
//! each step, and one `p<n>` for each participant is locked as long as that participant lives. The
//! kernel releases both sorts of lock when their holder dies, however it dies.
//!
//! Nothing in the files is trusted. Whoever takes the lock checks the format, the lengths and the
//! mark that its holder sets while it works; the numbers inside are checked as they are used. What
//! does not fit means that the index is thrown away and rebuilt from a walk of the directory.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;
use rustix::fs::{FallocateFlags, fallocate};

use crate::cells::{Block, Cell, Header, MAX_CELLS, Participant};
use crate::error::{Fault, Res};
use crate::table::SEGMENT;

/// Participants (processes, or stores of one process) that may share a directory.
pub const PARTICIPANTS: usize = 64;
/// Versions of keys; two keys share one by chance.
const VERSIONS: usize = 16 * 1024;

const MAGIC: u64 = u64::from_ne_bytes(*b"zcache\r\n");
const FORMAT: u32 = 1;
/// Reads as another number where the byte order differs.
const BYTE_ORDER: u32 = 0x0102_0304;

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Head {
    magic: u64,
    format: u32,
    byte_order: u32,
    cell_size: u32,
    /// Participant (plus one) that works on the index now, or died while it did.
    dirty: u32,
    /// Participant (plus one) that rebuilds the index, or died while it did.
    rebuilding: u32,
    /// Changes with every prefix that is written or deleted.
    epoch: u32,
    /// Changes whenever the index is emptied.
    generation: u64,
    /// Elements in use: slots of the table, cells, entries of the table's directory.
    slots: u64,
    cells: u64,
    directory: u64,
    /// Tells one boot of the machine from the next.
    boot: [u64; 5],
    header: Header,
    participants: [Participant; PARTICIPANTS],
}

const HEAD: usize = 4096;
const DIRECTORY: usize = HEAD + VERSIONS * size_of::<u32>();
const _: () = assert!(size_of::<Head>() <= HEAD);

/// The mapped files, and the lock that guards them.
#[derive(Debug)]
pub struct Mapped {
    root: PathBuf,
    lock: File,
    files: [File; 3],
    maps: [MmapMut; 3],
    me: usize,
    bound: u64,
    generation: u64,
    /// Locked as long as this participant lives, and only read by the kernel.
    _alive: File,
}

/// Why a directory cannot be used, or not now.
#[derive(Debug)]
pub enum OpenError {
    /// The operating system says no.
    Io(io::Error),
    /// All places are taken by live participants.
    Crowded,
    /// The file system is one whose locks or mappings do not reach all its users.
    Unsuitable(&'static str),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        OpenError::Io(error)
    }
}

impl From<rustix::io::Errno> for OpenError {
    fn from(error: rustix::io::Errno) -> Self {
        OpenError::Io(error.into())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

#[allow(unsafe_code)]
fn map(file: &File) -> io::Result<MmapMut> {
    // SAFETY: The file is changed by others while it is mapped, but only by holders of the same
    // lock, and this process looks into the mapping only while it holds that lock. Whoever ignores
    // the lock can change numbers, which are never trusted; one who truncates the file is found by
    // the check of its length at the beginning of each step.
    unsafe { MmapMut::map_mut(file) }
}

/// Network and user-space file systems, by the numbers of `statfs(2)`.
fn unsuitable(kind: u64) -> Option<&'static str> {
    match kind {
        0x6969 => Some("NFS"),
        0x517b | 0xfe53_4d42 | 0xff53_4d42 => Some("SMB"),
        0x0bd0_0bd0 => Some("Lustre"),
        0x00c3_6400 => Some("Ceph"),
        0x0102_1997 => Some("9P"),
        0x6573_5546 => Some("FUSE"),
        0x5346_414f => Some("AFS"),
        0x4750_4653 => Some("GPFS"),
        _ => None,
    }
}

fn boot() -> [u64; 5] {
    let mut id = [0; 5];
    if let Ok(text) = std::fs::read("/proc/sys/kernel/random/boot_id") {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut id);
        for (to, from) in bytes.iter_mut().zip(text) {
            *to = from;
        }
    }
    id
}

const FILES: [&str; 3] = ["head", "table", "cells"];
const TABLE: usize = 1;
const CELLS: usize = 2;

impl Mapped {
    /// Opens the files below `root`, a directory that exists, waits for the lock and takes a place
    /// among the participants. The lock is held when this returns.
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
        let [head, table, cells] = FILES.map(|name| open(&root.join(name)));
        let files = [head?, table?, cells?];
        if files[0].metadata()?.len() < DIRECTORY as u64 {
            extend(&files[0], 0, DIRECTORY)?;
        }
        // An empty file cannot be mapped.
        for file in &files {
            if file.metadata()?.len() == 0 {
                extend(file, 0, HEAD)?;
            }
        }
        let (me, alive) = take_place(root)?;
        let [head, table, cells] = [map(&files[0])?, map(&files[1])?, map(&files[2])?];
        let maps = [head, table, cells];
        let mut mapped = Mapped {
            root: root.to_owned(),
            lock,
            files,
            maps,
            me,
            bound,
            generation: 0,
            _alive: alive,
        };
        let sound = mapped.head().looks_right()
            && mapped.head().dirty == 0
            && mapped.head().rebuilding == 0
            && mapped.head().boot == boot()
            && mapped.remap().is_ok();
        if !sound {
            mapped.reset()?;
        }
        mapped.head_mut().dirty = me as u32 + 1;
        mapped.register();
        Ok((mapped, !sound))
    }

    /// Empties the index for everybody. The lock must be held.
    ///
    /// Other participants see the new generation when they take the lock next, and register anew.
    pub fn reset(&mut self) -> io::Result<()> {
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
        let generation = fresh_number();
        *self.head_mut() = Head {
            magic: MAGIC,
            format: FORMAT,
            byte_order: BYTE_ORDER,
            cell_size: size_of::<Cell>() as u32,
            dirty: self.me as u32 + 1,
            rebuilding: self.me as u32 + 1,
            epoch: generation as u32,
            generation,
            boot: boot(),
            ..Head::zeroed()
        };
        Ok(())
    }

    /// Writes this participant into the list. The lock must be held.
    pub fn register(&mut self) {
        let (me, bound) = (self.me, self.bound);
        self.generation = self.head().generation;
        if let Some(participant) = self.head_mut().participants.get_mut(me) {
            *participant = Participant {
                live: 1,
                bound,
                ..Participant::zeroed()
            };
        }
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> io::Result<bool> {
        match self.lock.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Waits for the lock, in the place of a step that found it taken, and gives it back.
    pub fn wait(path: &Path) -> io::Result<()> {
        // Through a file of its own: the lock belongs to the open file, which others may use now.
        let file = open(path)?;
        file.lock()?;
        file.unlock()
    }

    /// The file that is locked around each step.
    #[must_use]
    pub fn lock_path(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Looks at the files after the lock was taken; an error means that they cannot be used.
    /// Returns whether somebody has emptied the index meanwhile.
    pub fn begin(&mut self) -> Res<bool> {
        let len = self.files[0].metadata().map_or(0, |meta| meta.len());
        if len < DIRECTORY as u64 {
            return Err(Fault::Corrupt("the head of the index is cut off"));
        }
        if len != self.maps[0].len() as u64 {
            self.maps[0] = map(&self.files[0]).map_err(|_| NO_MAP)?;
        }
        let head = self.head();
        if !head.looks_right() {
            return Err(Fault::Corrupt("the head of the index is not ours"));
        }
        if head.dirty != 0 {
            return Err(Fault::Corrupt("the last one at work has died"));
        }
        self.remap()?;
        let renewed = self.head().generation != self.generation;
        self.head_mut().dirty = self.me as u32 + 1;
        Ok(renewed)
    }

    /// Ends what `begin` has begun and gives the lock back. A step that failed leaves its mark.
    pub fn end(&mut self, sound: bool) {
        if sound {
            self.head_mut().dirty = 0;
        }
        // A lock that cannot be given back is given back by the kernel when the file is closed.
        let _ = self.lock.unlock();
    }

    /// Says that the index is complete.
    pub fn complete(&mut self) {
        self.head_mut().rebuilding = 0;
    }

    /// The participant that fills the index.
    #[must_use]
    pub fn rebuilder(&self) -> Option<usize> {
        (self.head().rebuilding as usize).checked_sub(1)
    }

    /// Participants that are in the list but not alive any more.
    #[must_use]
    pub fn dead(&self) -> Vec<usize> {
        let list = self.head().participants.iter().enumerate();
        let others = list.filter(|(n, participant)| *n != self.me && participant.live != 0);
        others
            .map(|(n, _)| n)
            .filter(|n| !is_alive(&self.root, *n))
            .collect()
    }

    /// Maps as much of the files as is in use.
    fn remap(&mut self) -> Res<()> {
        let head = *self.head();
        let wanted = [
            DIRECTORY as u64 + head.directory.saturating_mul(4),
            head.slots.saturating_mul(4),
            head.cells.saturating_mul(size_of::<Cell>() as u64),
        ];
        for ((file, map_of), wanted) in self.files.iter().zip(&mut self.maps).zip(wanted) {
            let len = file.metadata().map_or(0, |meta| meta.len());
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
            extend(file, map_of.len(), len).map_err(|_| Fault::Full)?;
            *map_of = map(file).map_err(|_| Fault::Full)?;
        }
        Ok(())
    }
}

const NO_MAP: Fault = Fault::Corrupt("a file of the index cannot be mapped");
static NO_HEAD: Head = Head {
    magic: 0,
    format: 0,
    byte_order: 0,
    cell_size: 0,
    dirty: 0,
    rebuilding: 0,
    epoch: 0,
    generation: 0,
    slots: 0,
    cells: 0,
    directory: 0,
    boot: [0; 5],
    header: Header::EMPTY,
    participants: [Participant::NONE; PARTICIPANTS],
};

impl Head {
    fn looks_right(&self) -> bool {
        self.magic == MAGIC
            && self.format == FORMAT
            && self.byte_order == BYTE_ORDER
            && self.cell_size == size_of::<Cell>() as u32
            && self.cells <= MAX_CELLS as u64
            && u64::from(self.header.used) <= self.cells
            && u64::from(self.header.segments).saturating_mul(SEGMENT as u64) <= self.slots
            && self.slots <= 1 << 32
            && self.directory <= 1 << 20
    }
}

/// Makes a file longer. The blocks are really taken from the file system: a hole that cannot be
/// filled later, on a full disk, would end the process with a signal.
fn extend(file: &File, from: usize, to: usize) -> io::Result<()> {
    let (from, len) = (from as u64, (to - from) as u64);
    match fallocate(file, FallocateFlags::empty(), from, len) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(to as u64),
        Err(error) => Err(error.into()),
    }
}

fn place(root: &Path, n: usize) -> PathBuf {
    root.join(format!("p{n}"))
}

fn take_place(root: &Path) -> Result<(usize, File), OpenError> {
    for n in 0..PARTICIPANTS {
        let file = open(&place(root, n))?;
        if file.try_lock().is_ok() {
            return Ok((n, file));
        }
    }
    Err(OpenError::Crowded)
}

fn is_alive(root: &Path, n: usize) -> bool {
    // A place that cannot be asked about counts as taken.
    open(&place(root, n)).is_ok_and(|file| file.try_lock().is_err())
}

/// A number that no earlier index of this directory has had.
fn fresh_number() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = since.map_or(1, |passed| passed.as_nanos() as u64);
    (nanos ^ u64::from(std::process::id()) << 44).max(1)
}

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
    fn version(&self, key: u64) -> [u32; 2] {
        let at = HEAD + (key as usize % VERSIONS) * 4;
        let bytes = self.maps[0].get(at..at + 4).and_then(|b| b.try_into().ok());
        [bytes.map_or(0, u32::from_ne_bytes), self.head().epoch]
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
    fn participants(&self) -> &[Participant] {
        &self.head().participants
    }
    fn participants_mut(&mut self) -> &mut [Participant] {
        &mut self.head_mut().participants
    }
    fn me(&self) -> usize {
        self.me
    }
    fn is_complete(&self) -> bool {
        self.head().rebuilding == 0
    }
}
