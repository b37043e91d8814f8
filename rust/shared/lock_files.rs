//! Files of a mapped index: how they are opened, mapped, extended, and locked by participants.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, OFlags, Timespec, Timestamps, UTIME_NOW, fallocate, fstat,
    futimens, lstat, renameat, statat, unlinkat,
};
#[cfg(target_os = "linux")]
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

use super::header::{PARTICIPANTS, new_generation};
use super::own::{make_file_at, open_folder, open_plain};

/// Pause between two tries to take the lock while an index is opened: a few steps of others.
pub(super) const TRY_AGAIN: Duration = Duration::from_micros(100);

/// Bytes of a file from which on it grows in small parts.
const LARGE: usize = 1 << 22;

/// The descriptors that keep their locks alive in a forked child after its parent has died. Readable
/// without the lock of the index, which a thread of the parent may have held at the fork.
#[derive(Debug, Default)]
pub struct Locks {
    fds: [AtomicI32; 2],
    disabled: AtomicBool,
    held: AtomicBool,
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

    /// Whether this process has found that another one keeps the lock: then a step tries once, and does
    /// not wait for what will not be free.
    pub(crate) fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    pub(crate) fn set_held(&self, held: bool) {
        self.held.store(held, Ordering::Relaxed);
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
    /// Another process holds the lock, for longer than the caller waits.
    Busy,
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

/// Opens a file, or makes it; see [`make_way`].
pub(super) fn open(path: &Path) -> io::Result<File> {
    match open_or_create(path) {
        Err(error) if is_no_file(&error) => {
            make_way_at(path)?;
            open_or_create(path)
        }
        opened => opened,
    }
}

fn open_or_create(path: &Path) -> io::Result<File> {
    loop {
        match open_existing(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        match create(path) {
            // Another process was first.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return created,
        }
    }
}

/// Whether an error of opening says that there is something else than a file.
fn is_no_file(error: &io::Error) -> bool {
    let others = [Errno::ISDIR, Errno::LOOP, Errno::NODEV, Errno::NXIO];
    Errno::from_io_error(error).is_some_and(|errno| others.contains(&errno))
}

/// Removes what stands in the place of a file of zcache's own and is none: a link, which is not followed, a pipe, a folder.
/// One that holds something is moved aside.
///
/// # Errors
///
/// Where the file system refuses.
pub fn make_way<Fd: AsFd>(folder: Fd, name: impl AsRef<Path>) -> io::Result<()> {
    let (folder, name) = (folder.as_fd(), name.as_ref());
    let Ok(found) = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) else {
        return Ok(());
    };
    let removed = match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => match unlinkat(folder, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                let aside = format!("aside-{:016x}-{}", new_generation(), name.display());
                renameat(folder, name, folder, aside)
            }
            removed => removed,
        },
        _ => unlinkat(folder, name, AtFlags::empty()),
    };
    match removed {
        // Another participant was faster.
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The same by the path, in which no link is followed either.
///
/// # Errors
///
/// Where the file system refuses, or there is no such folder.
pub fn make_way_at(path: &Path) -> io::Result<()> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    make_way(open_folder(path.parent().ok_or(Errno::INVAL)?)?, name)
}

/// Gives a new file the name of one of the index, whatever is there.
pub(super) fn rename_over(folder: &OwnedFd, from: &str, to: &str) -> io::Result<()> {
    make_way(folder, to)?;
    Ok(renameat(folder, from, folder, to)?)
}

/// Removes a file of the index, or what stands in its place. Where that cannot be, nothing is made there either.
pub(super) fn remove(folder: &OwnedFd, name: &str) {
    let _ = make_way(folder, name);
    let _ = unlinkat(folder, name, AtFlags::empty());
}

pub(super) fn open_existing(path: &Path) -> io::Result<File> {
    require_regular(open_plain(path, OFlags::RDWR)?.into())
}

pub(super) fn open_to_read(path: &Path) -> io::Result<File> {
    require_regular(open_plain(path, OFlags::RDONLY)?.into())
}

fn require_regular(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(rustix::io::Errno::NODEV.into())
}

/// Makes a file that is not there yet.
pub(super) fn create(path: &Path) -> io::Result<File> {
    let file = make_file_at(path)?;
    keep_in_place(&file);
    Ok(file)
}

/// Whether a file is far longer than what it holds: no index of ours leaves so much unallocated.
pub(super) fn is_hollow(file: &File) -> io::Result<bool> {
    const MOST: u64 = 64 << 20;
    let status = fstat(file)?;
    let held = (status.st_blocks as u64).saturating_mul(512);
    Ok(status.st_size as u64 > held.saturating_add(MOST))
}

/// Where a file system would write each change to another place, has it write to the same: what is
/// allocated for a mapped file is used then, also on a full volume. Only as long as it is empty.
fn keep_in_place(file: &File) {
    #[cfg(target_os = "linux")]
    if let Ok(flags) = ioctl_getflags(file) {
        // Not all file systems know it, and those that write in place anyway need not.
        let _ = ioctl_setflags(file, flags | IFlags::NOCOW);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}

/// The lock file is locked as long as this lives.
///
/// It is unlocked, and not only closed: a child that is forked meanwhile has the same lock, and would keep it.
#[derive(Debug)]
pub(super) struct Opening(File);

impl Drop for Opening {
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

/// Opens the lock file and locks it, within `patience`, for as long as an index is opened. The file that is locked is
/// the one that others find.
///
/// Participants of the former format lock it for each step. Where one lives, the index is not ours to open.
pub(super) fn open_and_lock(path: &Path, patience: Duration) -> Result<(File, Opening), OpenError> {
    loop {
        let lock = open(path)?;
        let opening = Opening(lock.try_clone()?);
        lock_within(&lock, patience)?;
        // It may have been removed meanwhile, and others may lock another one.
        if is_at(&lock, path) {
            return Ok((lock, opening));
        }
    }
}

/// Whether no participant has a file locked, which need not be one that this user may write to. It is unlocked again: see
/// [`Opening`].
fn is_free(file: &File) -> bool {
    let is_free = file.try_lock().is_ok();
    if is_free {
        let _ = file.unlock();
    }
    is_free
}

/// Whether a file is the one of this name, and not by way of a link: others open none.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    match (fstat(file), lstat(path)) {
        (Ok(file), Ok(named)) => (file.st_dev, file.st_ino) == (named.st_dev, named.st_ino),
        _ => false,
    }
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

/// Gives a file blocks of its own where it shares them with a copy: to write to a shared one allocates
/// another, and on a full disk that would fail in the middle of a step.
pub(super) fn unshare(file: &File, len: u64) {
    #[cfg(target_os = "linux")]
    {
        // Most file systems share none, and do not know it.
        let _ = fallocate(file, FallocateFlags::UNSHARE_RANGE, 0, len);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, len);
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

/// Extends a file to so many bytes, or more: each time makes every participant map it anew, so it grows by a part of
/// itself. Of a large file that is a small part, for the blocks are taken at once.
pub(super) fn extend_ahead(file: &File, from: usize, to: usize) -> io::Result<()> {
    let part = if from < LARGE { 8 } else { 64 };
    extend(file, from, to.max(from + from / part)).or_else(|_| extend(file, from, to))
}

fn lock_within(lock: &File, patience: Duration) -> Result<(), OpenError> {
    let begun = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error.into()),
            Err(TryLockError::WouldBlock) if begun.elapsed() >= patience => {
                return Err(OpenError::Busy);
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(TRY_AGAIN),
        }
    }
}

pub(super) fn slot_file(root: &Path, n: usize) -> PathBuf {
    root.join(format!("s{n}"))
}

/// Whether a participant of the former format lives, which has no word for the lock: its slots are `p<n>`.
pub(super) fn has_former_participant(root: &Path) -> io::Result<bool> {
    for entry in std::fs::read_dir(root)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix('p'));
        if number.is_some_and(|number| number.parse::<u8>().is_ok())
            && open_to_read(&root.join(name)).is_ok_and(|file| !is_free(&file))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(super) fn take_slot(root: &Path) -> Result<(usize, File), OpenError> {
    for n in 0..PARTICIPANTS {
        match open(&slot_file(root, n)) {
            Ok(file) if file.try_lock().is_ok() => return Ok((n, file)),
            // Another user's, whether or not its participant lives.
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => {
                return Err(error.into());
            }
            _ => {}
        }
    }
    Err(OpenError::Crowded)
}

/// Whether the participant that has this slot lives, as far as its file tells: one without a file is found by none. If it
/// works, it sees that its file was removed, and comes back; if it has died, nothing else would ever tell.
pub(super) fn is_alive(root: &Path, n: usize) -> bool {
    match open_to_read(&slot_file(root, n)) {
        Ok(file) => !is_free(&file),
        Err(error) => error.kind() != io::ErrorKind::NotFound && !is_no_file(&error),
    }
}

/// Gives a file another modification time.
pub(super) fn touch(file: &File) -> io::Result<()> {
    let before = file.metadata()?.modified()?;
    // Another user's can be set to the time of now only, and that ticks slowly.
    for _ in 0..100 {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        };
        let times = Timestamps {
            last_access: now,
            last_modification: now,
        };
        file.set_modified(SystemTime::now())
            .or_else(|_| futimens(file, &times).map_err(io::Error::from))?;
        if file.metadata()?.modified()? != before {
            return Ok(());
        }
        std::thread::sleep(TRY_AGAIN);
    }
    Ok(())
}
