//! Files of values: written under an unfinished name, published pending, and sealed once they are
//! committed.

use std::io;
use std::path::Path;

use rustix::fs::{
    AtFlags, Dev, FileType, Mode, RenameFlags, Stat, fstat, ftruncate, linkat, renameat,
    renameat_with,
};
use rustix::io::Errno;

use super::below::{At, Place, Root, is, open_value};
use super::folders::{change_in, make_folders, prune, prune_to, remove_empty_at};
use super::ownership::{
    MILLI, Owner, PENDING, Record, SIGNATURE, SourceDigest, modified, owner, set_modified,
    write_record,
};
use super::removal::remove_pending;
use crate::checksum::crc32c;
use crate::shared::make_folder_in;

/// Times that the directory of a new name is made again while other processes remove empty ones.
const TRIES: u32 = 64;
/// Bytes from which on XFS is told the size of a value before it is written.
const LARGE: usize = 1 << 20;

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
    fn at(self, place: At<'_>) -> WrittenFile {
        match place.status() {
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
pub fn create<'a>(
    at: impl Into<At<'a>>,
    data: &[u8],
    nanos: i64,
    source: SourceDigest,
) -> io::Result<WrittenFile> {
    let at = at.into();
    // Others may read a value where they may read the folder.
    let file = at.create(Mode::from_raw_mode(at.mode_of_folder()? & 0o666))?;
    if data.len() > LARGE {
        // Else XFS allocates more than is written, until the file is closed. What it refuses it tells the write.
        let _ = ftruncate(&file, data.len() as u64);
    }
    let mut rest = data;
    while !rest.is_empty() {
        match rustix::io::write(&file, rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut made = WrittenFile {
        checksum: crc32c(data),
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

/// Gives an unfinished file a name in a cache directory that is free, and makes the folders above it.
///
/// # Errors
///
/// Where the name is taken, or the file system refuses; the unfinished name is then still there.
pub fn publish<'a>(root: &Path, unfinished: impl Into<At<'a>>, name: &Path) -> io::Result<()> {
    publish_below(&Root::open(root)?, root, unfinished.into(), name).map(drop)
}

fn publish_below<'n>(
    root: &Root<'_>,
    path: &Path,
    unfinished: At<'_>,
    name: &'n Path,
) -> io::Result<Place<'n>> {
    let mut there = usize::MAX;
    let published = publish_in_folders(root, path, unfinished, name, &mut there);
    if published.is_err() {
        // What was made for it, and not what others have put there.
        prune_to(root, name, there);
    }
    published
}

/// The same; tells which folders there were before.
fn publish_in_folders<'n>(
    root: &Root<'_>,
    path: &Path,
    unfinished: At<'_>,
    name: &'n Path,
    there: &mut usize,
) -> io::Result<Place<'n>> {
    let mut tries = 0;
    loop {
        let published = root.find(name).and_then(|place| {
            change_in(place.at(), |at| give_name(unfinished, at))?;
            Ok(place)
        });
        match published {
            Err(Errno::NOENT) if tries < TRIES => tries += 1,
            published => return Ok(published?),
        }
        match name
            .parent()
            .map(|folder| make_folders(path, folder, there))
        {
            // Another process has removed one that was empty, while this made the next.
            Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
}

/// Gives an unfinished file another name that is free, instead of its own.
///
/// Never both: a file with two names gives no room back where one of them is removed.
fn give_name(unfinished: At<'_>, at: At<'_>) -> rustix::io::Result<()> {
    let (from, to) = (unfinished, at);
    match renameat_with(
        from.folder,
        from.name,
        to.folder,
        to.name,
        RenameFlags::NOREPLACE,
    ) {
        // Not here.
        Err(Errno::PERM | Errno::NOSYS | Errno::INVAL | Errno::NOTSUP) => {}
        moved => return moved,
    }
    match linkat(from.folder, from.name, to.folder, to.name, AtFlags::empty()) {
        // No links either, or not to this file: an empty file takes the name, and is replaced.
        Err(Errno::PERM | Errno::NOTSUP | Errno::MLINK | Errno::NOSYS) => {
            let empty = to.create(Mode::from_raw_mode(0o600))?;
            // Where it can neither be replaced nor removed now, it is known as pending, and removed later.
            let signed = from
                .status()
                .and_then(|status| set_modified(&empty, modified(&status)));
            let moved = signed.and_then(|()| renameat(from.folder, from.name, to.folder, to.name));
            if moved.is_err() {
                let _ = to.unlink();
            }
            moved
        }
        linked => {
            linked?;
            let removed = remove_unfinished(from);
            if removed.is_err() {
                let _ = to.unlink();
            }
            removed
        }
    }
}

/// Removes an unfinished file, if it is there.
fn remove_unfinished(file: At<'_>) -> rustix::io::Result<()> {
    match file.unlink() {
        // A volume that is only read refuses before it looks.
        Err(_) if matches!(file.status(), Err(Errno::NOENT)) => Ok(()),
        removed => removed,
    }
}

/// Removes what there may be of a value under its unfinished name.
///
/// # Errors
///
/// Where the file system refuses: then its bytes are there still.
pub fn discard(root: &Path, unfinished: &Path) -> io::Result<()> {
    let below = unfinished.strip_prefix(root).map_err(|_| Errno::XDEV)?;
    match Place::find(root, below) {
        // No folder of ours: nothing was written there.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(()),
        place => Ok(remove_unfinished(place?.at())?),
    }
}

/// Why a value could not be written.
#[derive(Debug)]
pub enum WriteError {
    /// There is a valid value that the index does not list: others have put it there, or the index is damaged.
    Unlisted,
    /// The index of a pool has given it no place.
    Unplaced,
    /// The file system refuses, or there is a file that zcache did not write. It stays as it is.
    Io(io::Error),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        WriteError::Io(error)
    }
}

impl From<Errno> for WriteError {
    fn from(error: Errno) -> Self {
        WriteError::Io(error.into())
    }
}

/// Writes the value of this name in a cache directory: under an unfinished name first, then published.
/// Makes missing directories, and replaces a value that was never sealed.
///
/// # Errors
///
/// See [`WriteError`]; `ELOOP` or `EXDEV` where a link or a mount leads out of the directory: no scan would
/// find the file there. What is left under the unfinished name is the caller's to [`discard`].
pub fn write_value(
    root: &Path,
    name: &Path,
    unfinished: &Path,
    data: &[u8],
    nanos: i64,
    source: SourceDigest,
) -> Result<WrittenFile, WriteError> {
    let value = Value {
        root: Root::open(root)?,
        path: root,
        name,
        unfinished: unfinished.strip_prefix(root).map_err(|_| Errno::XDEV)?,
        nanos,
        source,
    };
    match value.write(data) {
        Err(WriteError::Io(error)) if error.kind() == io::ErrorKind::NotADirectory => {
            // A value is in the way of a folder.
            if !value.clear_above()? {
                return Err(error.into());
            }
            value.write(data)
        }
        Err(WriteError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
            value.make_tmp()?;
            value.write(data)
        }
        written => written,
    }
}

/// A value on its way into a cache directory.
struct Value<'a> {
    root: Root<'a>,
    path: &'a Path,
    name: &'a Path,
    unfinished: &'a Path,
    nanos: i64,
    source: SourceDigest,
}

impl Value<'_> {
    fn write(&self, data: &[u8]) -> Result<WrittenFile, WriteError> {
        let unfinished = self.root.find(self.unfinished)?;
        let made = create(unfinished.at(), data, self.nanos, self.source)
            .map_err(WriteError::from)
            .and_then(|made| {
                let place = self.publish(unfinished.at())?;
                Ok(made.at(place.at()))
            });
        if made.is_err() {
            let _ = unfinished.at().unlink();
        }
        made
    }

    fn publish(&self, unfinished: At<'_>) -> Result<Place<'_>, WriteError> {
        let publish = || publish_below(&self.root, self.path, unfinished, self.name);
        match publish() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let place = self.root.find(self.name)?;
                if !remove_pending(place.at())? && !remove_empty_at(place.at()) {
                    let ours = owner(place.at())? != Owner::Foreign;
                    return Err(if ours {
                        WriteError::Unlisted
                    } else {
                        error.into()
                    });
                }
                Ok(publish()?)
            }
            published => Ok(published?),
        }
    }

    /// Makes the folder of unfinished files anew, and no more: where more is missing, the cache was removed.
    fn make_tmp(&self) -> Result<(), WriteError> {
        let tmp = self.unfinished.parent().unwrap_or(Path::new(""));
        let place = self.root.find(tmp)?;
        let at = place.at();
        match make_folder_in(at.folder, at.name) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes values that were never valid from above its name. Whether there was one.
    fn clear_above(&self) -> Result<bool, WriteError> {
        for above in self.name.ancestors().skip(1) {
            let Ok(place) = self.root.find(above) else {
                continue;
            };
            let is_file = |status: Stat| is(&status, FileType::RegularFile);
            if !place.at().status().is_ok_and(is_file) {
                continue;
            }
            if remove_pending(place.at())? {
                return Ok(true);
            }
            return if owner(place.at())? == Owner::Ours {
                Err(WriteError::Unlisted)
            } else {
                Ok(false)
            };
        }
        Ok(false)
    }
}

/// Marks the file of this name in a cache directory as valid, if it is still this one: it may be
/// evicted already, and another in its place.
///
/// # Errors
///
/// Where the file system refuses.
pub fn seal(root: &Path, name: &Path, made: &WrittenFile) -> io::Result<()> {
    let file = open_value(root, name)?;
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
    let root = Root::open(root)?;
    let place = root.find(name)?;
    if made.is(&place.at().status()?) {
        place.at().unlink()?;
        prune(&root, name);
    }
    Ok(())
}
