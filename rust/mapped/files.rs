//! Files of a mapped index: opened, mapped, made longer, and locked by who takes part.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use memmap2::MmapMut;
use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::PARTICIPANTS;

/// The descriptors whose locks a forked child would keep alive after its parent has died. Readable
/// without the lock of the index: a thread that has stayed with the parent may hold that.
#[derive(Debug, Default)]
pub struct Locks {
    fds: [AtomicI32; 2],
    left: AtomicBool,
}

impl Locks {
    /// Their numbers.
    #[must_use]
    pub fn fds(&self) -> [RawFd; 2] {
        self.fds.each_ref().map(|fd| fd.load(Ordering::Relaxed))
    }

    /// In a forked child, which has the descriptors and the mapping of its parent, but not its
    /// locks: from now on the lock is never free.
    pub fn leave(&self) {
        self.left.store(true, Ordering::Relaxed);
    }

    pub(super) fn are_left(&self) -> bool {
        self.left.load(Ordering::Relaxed)
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

pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        // Who may write to the directory must not lead us to a file elsewhere.
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(path)
}

#[allow(unsafe_code)]
pub(super) fn map(file: &File) -> io::Result<MmapMut> {
    // SAFETY: The file is changed by others while it is mapped, but only by holders of the same
    // lock, and this process looks into the mapping only while it holds that lock. Whoever ignores
    // the lock can change numbers, which are never trusted; one who truncates the file is found by
    // the check of its length at the beginning of each step.
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

/// Makes a file longer. The blocks are really taken from the file system: a hole that cannot be
/// filled later, on a full disk, would end the process with a signal.
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

fn place(root: &Path, n: usize) -> PathBuf {
    root.join(format!("p{n}"))
}

pub(super) fn take_place(root: &Path) -> Result<(usize, File), OpenError> {
    for n in 0..PARTICIPANTS {
        let file = open(&place(root, n))?;
        if file.try_lock().is_ok() {
            return Ok((n, file));
        }
    }
    Err(OpenError::Crowded)
}

pub(super) fn is_alive(root: &Path, n: usize) -> bool {
    // A place that cannot be asked about counts as taken, and so does one whose file somebody has removed:
    // whoever has it still works.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(place(root, n));
    file.map_or(true, |file| file.try_lock().is_err())
}
