//! Files of values: written under an unfinished name, published pending, and sealed once they are
//! committed. Whether zcache wrote a file, and whether it is valid, shows in its modification time.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, XattrFlags,
    fsetxattr, fstat, futimens, getxattr, linkat, open, renameat_with, statat, statvfs, unlinkat,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

/// Nanoseconds below the millisecond of the modification time of each file that zcache wrote.
pub const SIGNATURE: i64 = 271_828;

/// The same as long as the value is not committed.
pub const PENDING: i64 = SIGNATURE + 1;

/// Nanoseconds of a millisecond.
pub const MILLI: i64 = 1_000_000;

/// Directory of the tombstones of values that are no longer valid but could not be deleted.
const DROPPED: &str = ".zcache/dropped";

/// The extended attribute with length and checksum of a value, on file systems that have them.
const ATTRIBUTE: &CStr = c"user.zcache";

const NANOS: i64 = 1_000_000_000;

/// Times that the directory of a new name is made again while other processes remove empty ones.
const TRIES: u32 = 8;

/// Opens a file to read, if that needs no I/O: `EAGAIN` where its name or its inode would have to
/// be read from a disk. `ENOSYS`, `EPERM` or `EINVAL` where the system cannot tell.
pub fn open_cached(path: &Path) -> io::Result<OwnedFd> {
    #[cfg(target_os = "linux")]
    let opened = {
        use rustix::fs::{ResolveFlags, openat2};
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        openat2(CWD, path, flags, Mode::empty(), ResolveFlags::CACHED)
    };
    #[cfg(not(target_os = "linux"))]
    let opened = Err(Errno::NOSYS);
    Ok(opened?)
}

fn set_modified(file: impl AsFd, nanos: i64) -> io::Result<()> {
    let time = Timespec {
        tv_sec: nanos.div_euclid(NANOS),
        tv_nsec: nanos.rem_euclid(NANOS),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(futimens(file, &times)?)
}

/// Nanoseconds since 1970 of a modification time.
fn modified(status: &Stat) -> i64 {
    status
        .st_mtime
        .saturating_mul(NANOS)
        .saturating_add(status.st_mtime_nsec as i64)
}

/// Bytes of the record beside a value: its length and its CRC32C.
const RECORD: usize = 12;

/// A file that is written, and pending until it is sealed. It is closed: thousands of fills may be in
/// progress at once, and a process has few descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenFile {
    /// CRC32C of its contents.
    pub checksum: u32,
    device: Dev,
    inode: u64,
    nanos: i64,
}

impl WrittenFile {
    /// Whether this is its file, still pending.
    fn is(&self, status: &Stat) -> bool {
        (self.device, self.inode, self.nanos) == (status.st_dev, status.st_ino, modified(status))
    }
}

/// Writes a new file with this modification time, and records length and CRC32C of its contents where
/// the file system has extended attributes.
///
/// # Errors
///
/// Where the file is there already, or the file system refuses. What was written by then stays.
pub fn create(path: &Path, data: &[u8], nanos: i64) -> io::Result<WrittenFile> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::from_raw_mode(0o666))?;
    let mut rest = data;
    while !rest.is_empty() {
        match rustix::io::write(&file, rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let checksum = crc32c::crc32c(data);
    let mut note = [0u8; RECORD];
    let (length, rest) = note.split_at_mut(8);
    length.copy_from_slice(&(data.len() as u64).to_le_bytes());
    rest.copy_from_slice(&checksum.to_le_bytes());
    // The record is optional.
    let _ = fsetxattr(&file, ATTRIBUTE, &note, XattrFlags::empty());
    set_modified(&file, nanos)?;
    let status = fstat(&file)?;
    if modified(&status) != nanos {
        // Without its signature the file could never be removed again.
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the file system does not keep times to the nanosecond",
        ));
    }
    Ok(WrittenFile {
        checksum,
        device: status.st_dev,
        inode: status.st_ino,
        nanos,
    })
}

/// Length and CRC32C that a file should have, where they are recorded.
#[must_use]
pub fn recorded(path: &Path) -> Option<(u64, u32)> {
    let mut note = [0u8; RECORD + 1];
    let count = getxattr(path, ATTRIBUTE, &mut note[..]).ok()?;
    let (length, rest) = note.get(..count)?.split_first_chunk()?;
    Some((
        u64::from_le_bytes(*length),
        u32::from_le_bytes(rest.try_into().ok()?),
    ))
}

/// Bytes that an ordinary user may still write to the volume of a path, and bytes of the volume.
///
/// # Errors
///
/// Where the file system does not tell.
pub fn space(path: &Path) -> io::Result<(u64, u64)> {
    let volume = statvfs(path)?;
    let unit = volume.f_frsize;
    Ok((
        volume.f_bavail.saturating_mul(unit),
        volume.f_blocks.saturating_mul(unit),
    ))
}

/// Whether there is a symbolic link between `root` and `name`.
#[must_use]
pub fn leads_outside(root: &Path, name: &Path) -> bool {
    let above = name.ancestors().skip(1);
    above
        .filter(|above| !above.as_os_str().is_empty())
        .any(|above| root.join(above).is_symlink())
}

/// Gives an unfinished file a name that is free, and makes the directories above it.
///
/// # Errors
///
/// Where the name is taken, or the file system refuses; the unfinished name is then still there.
pub fn publish(unfinished: &Path, path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match linkat(CWD, unfinished, CWD, path, AtFlags::empty()) {
            Err(Errno::NOENT) if tries < TRIES => {
                tries += 1;
                if let Some(directory) = path.parent()
                    && let Err(error) = std::fs::create_dir_all(directory)
                {
                    return Err(error);
                }
            }
            // No links here, or not to this file.
            Err(Errno::PERM | Errno::NOTSUP | Errno::MLINK | Errno::NOSYS) => {
                let flags = RenameFlags::NOREPLACE;
                return Ok(renameat_with(CWD, unfinished, CWD, path, flags)?);
            }
            Err(error) => return Err(error.into()),
            Ok(()) => break,
        }
    }
    // Where that fails, the clean-up of unfinished files removes it.
    let _ = unlinkat(CWD, unfinished, AtFlags::empty());
    Ok(())
}

/// Why a value could not be written.
#[derive(Debug)]
pub enum WriteError {
    /// There is a valid value that the index does not list: it was emptied meanwhile, or is damaged.
    Unknown,
    /// The file system refuses, or there is a file that zcache did not write. It stays as it is.
    Io(io::Error),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        WriteError::Io(error)
    }
}

/// Writes the value of this name in a cache directory: under an unfinished name first, then published.
/// Makes missing directories, and replaces a value that was never sealed.
///
/// # Errors
///
/// See [`WriteError`]; `ELOOP` where a link leads out of the directory: no scan would find the file there.
/// The unfinished name is gone then.
pub fn write_value(
    root: &Path,
    name: &Path,
    unfinished: &Path,
    data: &[u8],
    nanos: i64,
) -> Result<WrittenFile, WriteError> {
    if leads_outside(root, name) {
        return Err(io::Error::from(Errno::LOOP).into());
    }
    let path = root.join(name);
    match write(unfinished, &path, data, nanos) {
        Err(WriteError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
            // Only the directory of unfinished files is made anew. Where more is missing, the cache was
            // removed.
            if let Some(tmp) = unfinished.parent()
                && let Err(error) = std::fs::create_dir(tmp)
                && error.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(error.into());
            }
            write(unfinished, &path, data, nanos)
        }
        written => written,
    }
}

fn write(
    unfinished: &Path,
    path: &Path,
    data: &[u8],
    nanos: i64,
) -> Result<WrittenFile, WriteError> {
    let made = create(unfinished, data, nanos)
        .map_err(WriteError::from)
        .and_then(|made| publish_value(unfinished, path).map(|()| made));
    if made.is_err() {
        let _ = unlinkat(CWD, unfinished, AtFlags::empty());
    }
    made
}

fn publish_value(unfinished: &Path, path: &Path) -> Result<(), WriteError> {
    match publish(unfinished, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if !remove_pending(path)? {
                let ours = has_signature(path, &[SIGNATURE, PENDING]).map_err(io::Error::from)?;
                return Err(if ours {
                    WriteError::Unknown
                } else {
                    error.into()
                });
            }
            Ok(publish(unfinished, path)?)
        }
        published => Ok(published?),
    }
}

/// Writes a tombstone for a value that is no longer valid but could not be deleted.
///
/// # Errors
///
/// Where the file system refuses.
pub fn write_tombstone(root: &Path, name: &str) -> io::Result<()> {
    let digest = Sha256::digest(name.as_bytes());
    // The Python side derives the same name.
    let digest: String = digest.iter().take(16).map(|b| format!("{b:02x}")).collect();
    let path = root.join(DROPPED);
    std::fs::create_dir_all(&path)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    open(path.join(digest), flags, Mode::from_raw_mode(0o666))?;
    Ok(())
}

/// Removes the value of this name from a cache directory. A file that zcache did not write stays, and
/// is no error.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove_below(root: &Path, name: &Path) -> io::Result<()> {
    if !leads_outside(root, name) {
        remove(&root.join(name))?;
    }
    Ok(())
}

/// Marks the file of this name in a cache directory as valid, if it is still this one: it may be
/// evicted already, and another in its place.
///
/// # Errors
///
/// Where the file system refuses.
pub fn seal(root: &Path, name: &Path, made: &WrittenFile) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = open(root.join(name), flags, Mode::empty())?;
    if made.is(&fstat(&file)?) {
        set_modified(&file, made.nanos - PENDING + SIGNATURE)?;
    }
    Ok(())
}

/// Removes the file of this name from a cache directory if it is still this one.
///
/// # Errors
///
/// Where the file system refuses, or there is none.
pub fn remove_made(root: &Path, name: &Path, made: &WrittenFile) -> io::Result<()> {
    let path = root.join(name);
    if made.is(&statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW)?) {
        unlinkat(CWD, &path, AtFlags::empty())?;
    }
    Ok(())
}

/// Removes a file if zcache wrote it and never sealed it. Returns whether there is no file now.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove_pending(path: &Path) -> io::Result<bool> {
    removed(remove_signed(path, &[PENDING]))
}

/// Removes a file if zcache wrote it. Returns whether there is no file now.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove(path: &Path) -> io::Result<bool> {
    removed(remove_signed(path, &[SIGNATURE, PENDING]))
}

fn removed(result: rustix::io::Result<bool>) -> io::Result<bool> {
    match result {
        // Nothing is there, or no file can have such a name.
        Err(
            Errno::NOENT
            | Errno::NOTDIR
            | Errno::NAMETOOLONG
            | Errno::INVAL
            | Errno::ILSEQ
            | Errno::LOOP,
        ) => Ok(true),
        removed => Ok(removed?),
    }
}

fn has_signature(path: &Path, signatures: &[i64]) -> rustix::io::Result<bool> {
    let status = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    let signature = modified(&status).rem_euclid(MILLI);
    let regular = FileType::from_raw_mode(status.st_mode) == FileType::RegularFile;
    Ok(regular && signatures.contains(&signature))
}

fn remove_signed(path: &Path, signatures: &[i64]) -> rustix::io::Result<bool> {
    if !has_signature(path, signatures)? {
        return Ok(false);
    }
    unlinkat(CWD, path, AtFlags::empty())?;
    Ok(true)
}
