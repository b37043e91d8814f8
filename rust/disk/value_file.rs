//! Files of values: written under an unfinished name, published pending, and sealed once they are
//! committed.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Mode, OFlags, RenameFlags, Stat, fstat, linkat, open, renameat,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use super::folders::{change_in, leads_outside, make_folders, mode_of, prune, remove_empty};
use super::ownership::{
    MILLI, Owner, PENDING, Record, SIGNATURE, SourceDigest, modified, owner, set_modified,
    write_record,
};
use super::removal::remove_pending;

/// Times that the directory of a new name is made again while other processes remove empty ones.
const TRIES: u32 = 64;

/// Opens a file to read, if that needs no I/O: `EAGAIN` where its name or its inode would have to
/// be read from a disk. `ENOSYS`, `EPERM` or `EINVAL` where the system cannot tell; `ESPIPE` where it
/// is no regular file.
pub fn open_cached(path: &Path) -> io::Result<OwnedFd> {
    #[cfg(target_os = "linux")]
    let opened = {
        use rustix::fs::{ResolveFlags, openat2};
        // A pipe in its place must not block, and a link may lead anywhere.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
        openat2(CWD, path, flags, Mode::empty(), ResolveFlags::CACHED).and_then(regular)
    };
    #[cfg(not(target_os = "linux"))]
    let opened = Err(Errno::NOSYS);
    Ok(opened?)
}

/// The same file, if it is a regular one.
#[cfg(target_os = "linux")]
fn regular(file: OwnedFd) -> rustix::io::Result<OwnedFd> {
    match FileType::from_raw_mode(fstat(&file)?.st_mode) {
        FileType::RegularFile => Ok(file),
        _ => Err(Errno::SPIPE),
    }
}

/// Opens what is there to read, without following a link; a pipe does not block.
pub(super) fn open_to_read(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    open(path, flags, Mode::empty())
}

/// A file that is written, and pending until it is sealed. It is closed: thousands of fills may be in
/// progress at once, and a process has few descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenFile {
    /// CRC32C of its contents.
    pub checksum: u32,
    device: Dev,
    inode: u64,
    nanos: i64,
    size: u64,
    source: SourceDigest,
}

impl WrittenFile {
    /// Whether this is its file, still pending.
    fn is(&self, status: &Stat) -> bool {
        (self.device, self.inode, self.nanos) == (status.st_dev, status.st_ino, modified(status))
    }

    /// The same under its own name: some file systems number files by their names.
    fn at(self, path: &Path) -> WrittenFile {
        match statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) if modified(&status) == self.nanos => WrittenFile {
                device: status.st_dev,
                inode: status.st_ino,
                ..self
            },
            _ => self,
        }
    }

    fn record(&self, sealed: bool) -> Record {
        Record {
            size: self.size,
            checksum: self.checksum,
            sealed,
            fetched: u64::try_from(self.nanos / MILLI).unwrap_or(0),
            source: self.source,
        }
    }
}

/// Writes a new file with this modification time, and records what it is where the file system has
/// extended attributes.
///
/// # Errors
///
/// Where the file is there already, or the file system refuses. What was written by then stays.
pub fn create(
    path: &Path,
    data: &[u8],
    nanos: i64,
    source: SourceDigest,
) -> io::Result<WrittenFile> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let folder = path.parent().unwrap_or(Path::new("."));
    // Others may read a value where they may read the folder.
    let mode = Mode::from_raw_mode(mode_of(folder)? & 0o666);
    let file = open(path, flags, mode)?;
    let mut rest = data;
    while !rest.is_empty() {
        match rustix::io::write(&file, rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut made = WrittenFile {
        checksum: crc32c::crc32c(data),
        device: 0,
        inode: 0,
        nanos,
        size: data.len() as u64,
        source,
    };
    // The record is optional.
    let _ = write_record(&file, made.record(false));
    set_modified(&file, nanos)?;
    let status = fstat(&file)?;
    if modified(&status) != nanos {
        // Without its signature the file could never be removed again.
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the file system does not keep times to the nanosecond",
        ));
    }
    (made.device, made.inode) = (status.st_dev, status.st_ino);
    Ok(made)
}

/// Moves a file to a name that is free.
fn move_to(unfinished: &Path, path: &Path) -> rustix::io::Result<()> {
    match renameat_with(CWD, unfinished, CWD, path, RenameFlags::NOREPLACE) {
        // Not here either: an empty file takes the name, and is replaced.
        Err(Errno::PERM | Errno::NOSYS | Errno::INVAL | Errno::NOTSUP) => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            open(path, flags, Mode::from_raw_mode(0o600))?;
            let moved = renameat(CWD, unfinished, CWD, path);
            if moved.is_err() {
                let _ = unlinkat(CWD, path, AtFlags::empty());
            }
            moved
        }
        moved => moved,
    }
}

/// Gives an unfinished file a name that is free, and makes the directories above it.
///
/// # Errors
///
/// Where the name is taken, or the file system refuses; the unfinished name is then still there.
pub fn publish(unfinished: &Path, path: &Path) -> io::Result<()> {
    let mut tries = 0;
    while let Err(error) = change_in(path.parent(), || name(unfinished, path)) {
        if error != Errno::NOENT || tries == TRIES {
            return Err(error.into());
        }
        tries += 1;
        match path.parent().map(make_folders) {
            // Somebody has removed one that was empty, while this made the next.
            Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Gives an unfinished file another name that is free, instead of its own.
fn name(unfinished: &Path, path: &Path) -> rustix::io::Result<()> {
    match linkat(CWD, unfinished, CWD, path, AtFlags::empty()) {
        // No links here, or not to this file.
        Err(Errno::PERM | Errno::NOTSUP | Errno::MLINK | Errno::NOSYS) => move_to(unfinished, path),
        linked => {
            linked?;
            // Where that fails, the clean-up of unfinished files removes it.
            let _ = unlinkat(CWD, unfinished, AtFlags::empty());
            Ok(())
        }
    }
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
    source: SourceDigest,
) -> Result<WrittenFile, WriteError> {
    let tmp = unfinished.strip_prefix(root);
    if leads_outside(root, name) || tmp.is_ok_and(|tmp| leads_outside(root, tmp)) {
        return Err(io::Error::from(Errno::LOOP).into());
    }
    let path = root.join(name);
    match write(unfinished, &path, data, nanos, source) {
        Err(WriteError::Io(error)) if error.kind() == io::ErrorKind::NotADirectory => {
            // A value is in the way of a folder.
            if !clear_above(root, name)? {
                return Err(error.into());
            }
            write(unfinished, &path, data, nanos, source)
        }
        Err(WriteError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
            // Only the directory of unfinished files is made anew. Where more is missing, the cache was
            // removed.
            if let Some(tmp) = unfinished.parent()
                && let Err(error) = std::fs::create_dir(tmp)
                && error.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(error.into());
            }
            write(unfinished, &path, data, nanos, source)
        }
        written => written,
    }
}

fn write(
    unfinished: &Path,
    path: &Path,
    data: &[u8],
    nanos: i64,
    source: SourceDigest,
) -> Result<WrittenFile, WriteError> {
    let made = create(unfinished, data, nanos, source)
        .map_err(WriteError::from)
        .and_then(|made| {
            publish_value(unfinished, path)?;
            Ok(made.at(path))
        });
    if made.is_err() {
        let _ = unlinkat(CWD, unfinished, AtFlags::empty());
    }
    made
}

fn publish_value(unfinished: &Path, path: &Path) -> Result<(), WriteError> {
    match publish(unfinished, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if !remove_pending(path)? && !remove_empty(path) {
                let ours = owner(path).map_err(io::Error::from)? != Owner::Foreign;
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

/// Removes values that were never valid from above a name. Whether there was one.
fn clear_above(root: &Path, name: &Path) -> Result<bool, WriteError> {
    for above in name.ancestors().skip(1) {
        let path = root.join(above);
        if above.as_os_str().is_empty() || !path.is_file() {
            continue;
        }
        if remove_pending(&path)? {
            return Ok(true);
        }
        return if owner(&path).map_err(io::Error::from)? == Owner::Ours {
            Err(WriteError::Unknown)
        } else {
            Ok(false)
        };
    }
    Ok(false)
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
        let _ = write_record(&file, made.record(true));
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
        prune(root, name);
    }
    Ok(())
}
