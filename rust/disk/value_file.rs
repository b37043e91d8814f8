//! Files of values: written under an unfinished name, published pending, and sealed once they are
//! committed. Whether zcache wrote a file, and whether it is valid, shows in its modification time.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, XattrFlags,
    fsetxattr, fstat, futimens, lgetxattr, linkat, open, renameat, renameat_with, statat, statvfs,
    unlinkat,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::key::ByteRange;

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
const TRIES: u32 = 64;

/// Folders that stay when they are empty.
const STAY: &str = ".zcache";

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

/// Digest of the name of a source, recorded with each of its values; zeros where it is unknown.
pub type SourceDigest = [u8; 8];

/// What is recorded beside a value, in an attribute that goes with it where copies lose its times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Bytes of the value.
    pub size: u64,
    /// CRC32C of the value.
    pub checksum: u32,
    /// Whether the value is valid: it was committed.
    pub sealed: bool,
    /// Milliseconds since 1970 of its fetch.
    pub fetched: u64,
    /// The source of the value.
    pub source: SourceDigest,
}

/// Bytes of a [`Record`], and of one that earlier versions wrote: size and checksum only.
const RECORD: usize = 28;
const SHORT_RECORD: usize = 12;

impl Record {
    fn to_bytes(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        // The fetch time takes 48 bits, as in the index, so that 8 bits are free.
        let when = self.fetched << 8 | u64::from(self.sealed);
        let parts: [&[u8]; 4] = [
            &self.size.to_le_bytes(),
            &self.checksum.to_le_bytes(),
            &when.to_le_bytes(),
            &self.source,
        ];
        for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Record> {
        let (size, rest) = bytes.split_first_chunk()?;
        let (checksum, rest) = rest.split_first_chunk()?;
        let short = Record {
            size: u64::from_le_bytes(*size),
            checksum: u32::from_le_bytes(*checksum),
            sealed: false,
            fetched: 0,
            source: [0; 8],
        };
        if rest.is_empty() {
            return Some(short);
        }
        let (when, rest) = rest.split_first_chunk()?;
        let when = u64::from_le_bytes(*when);
        Some(Record {
            sealed: when & 1 != 0,
            fetched: when >> 8,
            source: rest.try_into().ok()?,
            ..short
        })
    }
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

fn write_record(file: impl AsFd, record: Record) -> rustix::io::Result<()> {
    fsetxattr(file, ATTRIBUTE, &record.to_bytes(), XattrFlags::empty())
}

/// What is recorded beside a value, if anything is.
#[must_use]
pub fn record_of(path: &Path) -> Option<Record> {
    let mut bytes = [0u8; RECORD + 1];
    let count = lgetxattr(path, ATTRIBUTE, &mut bytes[..]).ok()?;
    (count == RECORD || count == SHORT_RECORD)
        .then(|| Record::parse(bytes.get(..count)?))
        .flatten()
}

/// Length and CRC32C that a file should have, where they are recorded.
#[must_use]
pub fn recorded(path: &Path) -> Option<(u64, u32)> {
    record_of(path).map(|record| (record.size, record.checksum))
}

/// What an ordinary user may still put on a volume, and what it holds in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that are free.
    pub free: u64,
    /// Bytes of the volume.
    pub total: u64,
    /// Files that may still be made, and all that there may be; `None` where that has no limit.
    pub files: Option<(u64, u64)>,
}

/// How much room there is on the volume of a path.
///
/// # Errors
///
/// Where the file system does not tell.
pub fn space(path: &Path) -> io::Result<Space> {
    let volume = statvfs(path)?;
    let unit = volume.f_frsize;
    Ok(Space {
        free: volume.f_bavail.saturating_mul(unit),
        total: volume.f_blocks.saturating_mul(unit),
        // Some have none of their own, and say that there are 0.
        files: (volume.f_files != 0).then_some((volume.f_favail, volume.f_files)),
    })
}

/// Whether there is a symbolic link between `root` and `name`.
#[must_use]
pub fn leads_outside(root: &Path, name: &Path) -> bool {
    let above = name.ancestors().skip(1);
    above
        .filter(|above| !above.as_os_str().is_empty())
        .any(|above| root.join(above).is_symlink())
}

thread_local! {
    /// Bytes by which the folders have grown that this thread has changed; see [`take_folders`].
    static FOLDERS: std::cell::Cell<i64> = const { std::cell::Cell::new(0) };
}

/// The process in which a thread changes a folder, else 0: one change at a time, so that no growth is
/// counted twice. No mutex, for a forked child would never get one that a thread of its parent holds.
static CHANGING: AtomicU32 = AtomicU32::new(0);

/// Keeps other threads of this process from changing a folder.
struct OneAtATime;

impl OneAtATime {
    fn begin() -> Self {
        let own = std::process::id();
        loop {
            let held = CHANGING.load(Ordering::Relaxed);
            let (new, old) = (Ordering::Acquire, Ordering::Relaxed);
            // What another process held was copied by a fork.
            if held != own && CHANGING.compare_exchange(held, own, new, old).is_ok() {
                return OneAtATime;
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for OneAtATime {
    fn drop(&mut self) {
        CHANGING.store(0, Ordering::Release);
    }
}

/// Bytes by which folders have grown (below 0: shrunk) in what this thread did since it last asked.
pub fn take_folders() -> i64 {
    FOLDERS.take()
}

fn count_folders(bytes: i64) {
    FOLDERS.set(FOLDERS.get().saturating_add(bytes));
}

/// Bytes of blocks.
fn blocks(path: &Path) -> rustix::io::Result<i64> {
    let status = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(status.st_blocks.saturating_mul(512))
}

/// Makes a name in a folder, and counts by how much that has grown.
fn change_in(
    folder: Option<&Path>,
    change: impl FnOnce() -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    let _one_at_a_time = OneAtATime::begin();
    let Some(Ok(before)) = folder.map(blocks) else {
        return change();
    };
    change()?;
    if let Some(Ok(after)) = folder.map(blocks) {
        count_folders(after.saturating_sub(before));
    }
    Ok(())
}

/// Removes a folder if it is empty, and counts that.
fn remove_folder(path: &Path) -> rustix::io::Result<()> {
    let before = blocks(path)?;
    unlinkat(CWD, path, AtFlags::REMOVEDIR)?;
    count_folders(-before);
    Ok(())
}

/// Permissions of a folder.
fn mode_of(folder: &Path) -> io::Result<u32> {
    let status = statat(CWD, folder, AtFlags::empty())?;
    Ok(Mode::from_raw_mode(status.st_mode).bits() & 0o777)
}

/// Makes a folder and those above it, each with the permissions of the one that it is made in.
fn make_folders(folder: &Path) -> io::Result<()> {
    let mut missing = Vec::new();
    let mut above = folder;
    let mode = loop {
        match mode_of(above) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                missing.push(above);
                above = above.parent().ok_or(error)?;
            }
            mode => break mode?,
        }
    };
    for path in missing.into_iter().rev() {
        let mode = Mode::from_raw_mode(mode | 0o700);
        match change_in(path.parent(), || rustix::fs::mkdir(path, mode)) {
            Ok(()) => count_folders(blocks(path).unwrap_or(0)),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
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

/// Removes a folder that holds nothing but empty folders. Whether it is gone.
#[must_use]
pub fn remove_empty(path: &Path) -> bool {
    let is_folder = |status: Stat| FileType::from_raw_mode(status.st_mode) == FileType::Directory;
    if !statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_folder) {
        return false;
    }
    let Ok(entries) = std::fs::read_dir(path) else {
        return false;
    };
    let mut all_gone = true;
    for entry in entries {
        all_gone &= entry.is_ok_and(|entry| remove_empty(&entry.path()));
    }
    all_gone && remove_folder(path).is_ok()
}

/// Removes the folders above a name that are empty.
fn prune(root: &Path, name: &Path) {
    for above in name.ancestors().skip(1) {
        if above.as_os_str().is_empty() || above == Path::new(STAY) {
            return;
        }
        match remove_folder(&root.join(above)) {
            Ok(()) | Err(Errno::NOENT) => {}
            // It holds something, or that cannot be known.
            Err(_) => return,
        }
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
    if leads_outside(root, &Path::new(DROPPED).join(&digest)) {
        return Err(Errno::LOOP.into());
    }
    let path = root.join(DROPPED);
    make_folders(&path)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    open(path.join(digest), flags, Mode::from_raw_mode(0o666))?;
    Ok(())
}

/// Removes the value of this name from a cache directory, and the folders above it that are empty
/// then. A file that zcache did not write stays, and is no error.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove_below(root: &Path, name: &Path) -> io::Result<()> {
    remove_value(root, name).map(drop)
}

/// The same; false where a file is there that is not ours, and stays.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove_value(root: &Path, name: &Path) -> io::Result<bool> {
    if leads_outside(root, name) {
        return Ok(true);
    }
    let path = root.join(name);
    let gone = remove(&path)?;
    if gone {
        prune(root, name);
    }
    // A folder is no value.
    Ok(gone || path.is_dir())
}

/// Removes a value that the index knows by its size and its CRC32C, whatever its times say.
///
/// # Errors
///
/// Where the file system refuses; `EEXIST` where another file is in its place, which stays.
pub fn remove_known(root: &Path, name: &Path, known: Option<(u64, u32)>) -> io::Result<()> {
    if remove_value(root, name)? {
        return Ok(());
    }
    let path = root.join(name);
    match known {
        Some((size, checksum)) if holds(&path, size, checksum)? => {
            unlinkat(CWD, &path, AtFlags::empty())?;
            prune(root, name);
            Ok(())
        }
        _ => Err(Errno::EXIST.into()),
    }
}

/// Directory of the files of ranges.
const RANGES: &str = ".zcache/ranges";

/// The name of the directory of a key's ranges, and what their file names begin with.
fn ranges_of(key: &str) -> (PathBuf, String) {
    let (above, tail) = key.rsplit_once('/').unwrap_or(("", key));
    (Path::new(RANGES).join(above), format!("{tail}@"))
}

/// Removes what is stored of a key, its ranges included, whether or not an index lists it. Returns
/// what could not be removed.
#[must_use]
pub fn remove_key(root: &Path, key: &str) -> Vec<(String, io::Error)> {
    let mut failed = Vec::new();
    if let Err(error) = remove_below(root, Path::new(key)) {
        failed.push((key.to_owned(), error));
    }
    let (ranges, prefix) = ranges_of(key);
    let found = match std::fs::read_dir(root.join(&ranges)) {
        Ok(found) => found,
        Err(error) => {
            if !is_absence(&error) {
                failed.push((format!("{RANGES}/{key}@0-"), error));
            }
            return failed;
        }
    };
    for entry in found {
        let Ok(entry) = entry else { break };
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with(&prefix)) else {
            continue;
        };
        let name = format!("{}/{name}", ranges.display());
        let is_range = ByteRange::parse(&name).is_some_and(|(of, _)| of == key);
        if is_range && let Err(error) = remove_below(root, Path::new(&name)) {
            failed.push((name, error));
        }
    }
    failed
}

/// Whether nothing can be stored of a key, as far as that is known without waiting for a disk.
#[must_use]
pub fn is_absent(root: &Path, key: &str) -> bool {
    let absent = |path: &Path| open_cached(path).is_err_and(|error| is_absence(&error));
    absent(&root.join(key)) && absent(&root.join(ranges_of(key).0))
}

/// Whether an error says that there is no such file.
fn is_absence(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
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

/// Removes a file if zcache wrote it and never sealed it. Returns whether there is no file now.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove_pending(path: &Path) -> io::Result<bool> {
    removed(remove_owned(path, &[Owner::Pending]))
}

/// Removes a file if zcache wrote it. Returns whether there is no file now.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove(path: &Path) -> io::Result<bool> {
    removed(remove_owned(path, &[Owner::Ours, Owner::Pending]))
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

/// Who wrote a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A value of ours.
    Ours,
    /// One that was never said to be valid.
    Pending,
    /// Not ours, as far as it can be told without the index.
    Foreign,
}

/// Who wrote a file: by its time, or, where that was changed, by the record beside it.
///
/// # Errors
///
/// Where there is none, or the file system refuses.
pub fn owner(path: &Path) -> rustix::io::Result<Owner> {
    let status = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        return Ok(Owner::Foreign);
    }
    Ok(match modified(&status).rem_euclid(MILLI) {
        SIGNATURE => Owner::Ours,
        PENDING => Owner::Pending,
        _ => match record_of(path) {
            Some(record) if record.size == status.st_size as u64 => {
                if record.sealed {
                    Owner::Ours
                } else {
                    Owner::Pending
                }
            }
            _ => Owner::Foreign,
        },
    })
}

fn remove_owned(path: &Path, owners: &[Owner]) -> rustix::io::Result<bool> {
    if !owners.contains(&owner(path)?) {
        return Ok(false);
    }
    unlinkat(CWD, path, AtFlags::empty())?;
    Ok(true)
}

/// Whether a regular file has this size and this CRC32C.
///
/// # Errors
///
/// Where it cannot be read.
pub fn holds(path: &Path, size: u64, checksum: u32) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = open(path, flags, Mode::empty())?;
    let status = fstat(&file)?;
    let regular = FileType::from_raw_mode(status.st_mode) == FileType::RegularFile;
    if !regular || status.st_size as u64 != size {
        return Ok(false);
    }
    let (mut found, mut seen) = (0, 0u64);
    let mut part = vec![0; 1 << 16];
    while seen < size {
        let count = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut part[..]))?;
        if count == 0 {
            return Ok(false);
        }
        found = crc32c::crc32c_append(found, part.get(..count).unwrap_or_default());
        seen += count as u64;
    }
    Ok(seen == size && found == checksum)
}

/// Says that a file is a value of ours, fetched at this time in milliseconds, as after a copy that has
/// lost what said so.
///
/// # Errors
///
/// Where the file system refuses.
pub fn sign(path: &Path, fetched: u64) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = open(path, flags, Mode::empty())?;
    let milli = i64::try_from(fetched).unwrap_or(0);
    set_modified(&file, milli.saturating_mul(MILLI).saturating_add(SIGNATURE))
}
