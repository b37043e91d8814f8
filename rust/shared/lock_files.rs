//! Files of a mapped index: how they are opened, mapped, extended, and locked by participants.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use memmap2::MmapMut;
use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::header::PARTICIPANTS;

/// The descriptors that keep their locks alive in a forked child after its parent has died. Readable
/// without the lock of the index, which a thread of the parent may have held at the fork.
#[derive(Debug, Default)]
pub struct Locks {
    fds: [AtomicI32; 2],
    disabled: AtomicBool,
}

impl Locks {
    /// Their numbers.
    #[must_use]
    pub fn fds(&self) -> [RawFd; 2] {
        self.fds.each_ref().map(|fd| fd.load(Ordering::Relaxed))
    }

    /// In a forked child, which shares the descriptors and the mapping of its parent: from now on
    /// the lock is never free.
    pub fn disable(&self) {
        self.disabled.store(true, Ordering::Relaxed);
    }

    pub(crate) fn are_disabled(&self) -> bool {
        self.disabled.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, files: [&File; 2]) {
        for (fd, file) in self.fds.iter().zip(files) {
            fd.store(file.as_raw_fd(), Ordering::Relaxed);
        }
    }
}

/// Why a directory cannot be used, or not now.
#[derive(Debug)]
pub enum OpenError {
    /// The operating system refuses.
    Io(io::Error),
    /// All slots are taken by live participants.
    Crowded,
    /// Locks or mappings of this file system do not reach all its users.
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

pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        // A link must not lead to a file elsewhere.
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(path)
}

#[allow(unsafe_code)]
pub(super) fn map(file: &File) -> io::Result<MmapMut> {
    // SAFETY: The file is changed by others while it is mapped, but only by holders of the same
    // lock, and this process looks into the mapping only while it holds that lock. A process that
    // ignores the lock can change numbers, which are never trusted; a file that was truncated is
    // found by the check of its length at the beginning of each step.
    unsafe { MmapMut::map_mut(file) }
}

/// Network and user-space file systems, by the numbers of `statfs(2)`.
pub(super) fn unsuitable(kind: u64) -> Option<&'static str> {
    match kind {
        0x6969 => Some("NFS"),
        0x517b | 0xfe53_4d42 | 0xff53_4d42 => Some("SMB"),
        0x0bd0_0bd0 => Some("Lustre"),
        0x00c3_6400 => Some("Ceph"),
        0x0102_1997 => Some("9P"),
        0x6573_5546 => Some("FUSE"),
        0x5346_414f | 0x6b41_4653 => Some("AFS"),
        0x4750_4653 => Some("GPFS"),
        0x1983_0326 => Some("BeeGFS"),
        0x786f_4256 => Some("VirtualBox"),
        _ => None,
    }
}

/// Extends a file. Its blocks are allocated at once: a hole that cannot be filled later, on a full
/// disk, would kill the process with a signal.
pub(super) fn extend(file: &File, from: usize, to: usize) -> io::Result<()> {
    let (from, len) = (from as u64, (to - from) as u64);
    match fallocate(file, FallocateFlags::empty(), from, len) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
            let end = file.metadata()?.len();
            let zeros = vec![0; to.saturating_sub(end as usize)];
            file.write_all_at(&zeros, end)
        }
        Err(error) => Err(error.into()),
    }
}

fn slot_file(root: &Path, n: usize) -> PathBuf {
    root.join(format!("p{n}"))
}

pub(super) fn take_slot(root: &Path) -> Result<(usize, File), OpenError> {
    for n in 0..PARTICIPANTS {
        let file = open(&slot_file(root, n))?;
        if file.try_lock().is_ok() {
            return Ok((n, file));
        }
    }
    Err(OpenError::Crowded)
}

pub(super) fn is_alive(root: &Path, n: usize) -> bool {
    // A slot counts as taken where its file cannot be opened, or was removed while its owner works.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(slot_file(root, n));
    file.map_or(true, |file| file.try_lock().is_err())
}
