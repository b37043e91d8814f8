//! Removes values, and never another's file. What cannot be removed gets a tombstone.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fstat};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::below::{At, Place, Root, leads_elsewhere, names_in, open_cached, open_folder};
use super::folders::{change_in, make_folders, prune};
use super::ownership::{MILLI, Owner, holds, modified, owner, set_modified};
use crate::key::ByteRange;
use crate::shared::open_own_in;

/// Directory of the tombstones of values that are no longer valid but could not be deleted.
const DROPPED: &str = ".zcache/dropped";

/// Directory of the marks of values that were not there when they should have been removed.
const MISSING: &str = ".zcache/missing";

/// Hexadecimal digits of a mark. So there are at most 4,096, each an inode, and for one value in so many a
/// rebuild loses one that another's mark stands for as well.
const MARK_DIGITS: usize = 3;

/// Directory of the files of ranges.
const RANGES: &str = ".zcache/ranges";

/// Removes a file if zcache wrote it. Returns whether there is no file now.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove<'a>(file: impl Into<At<'a>>) -> io::Result<bool> {
    removed(remove_owned(file.into(), &[Owner::Ours, Owner::Pending]))
}

/// Removes a file if zcache wrote it and never sealed it. Returns whether there is no file now.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove_pending<'a>(file: impl Into<At<'a>>) -> io::Result<bool> {
    removed(remove_owned(file.into(), &[Owner::Pending]))
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

fn remove_owned(file: At<'_>, owners: &[Owner]) -> rustix::io::Result<bool> {
    if !owners.contains(&owner(file)?) {
        return Ok(false);
    }
    file.unlink()?;
    Ok(true)
}

/// What was at the name of a value that is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Was {
    /// The value. It is gone.
    Value,
    /// No file. Where there should have been one, others have moved or removed it.
    Nothing,
    /// A file that is not ours, as far as its times tell. It stays.
    Foreign,
}

/// Removes what there may be of a value of this name in a cache directory, and the folders above it that are empty
/// then: not those of others that were empty before. A file that zcache did not write stays, and is no error.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove_below(root: &Path, name: &Path) -> io::Result<()> {
    remove_named(root, name, false).map(drop)
}

/// Removes a value that the index lists, so that the folders above it were made or filled for it: they go if they are
/// empty, also where others have moved the value away. Says what was there.
///
/// # Errors
///
/// Where the file system refuses.
pub fn remove_value(root: &Path, name: &Path) -> io::Result<Was> {
    remove_named(root, name, true)
}

fn remove_named(root: &Path, name: &Path, is_listed: bool) -> io::Result<Was> {
    let root = match Root::open(root) {
        Ok(root) => root,
        Err(error) => return nothing(error),
    };
    let place = match root.find(name) {
        Ok(place) => place,
        Err(error) => {
            if is_listed && !leads_elsewhere(error) {
                prune(&root, name);
            }
            return nothing(error);
        }
    };
    let was = match remove_owned(place.at(), &[Owner::Ours, Owner::Pending]) {
        Ok(true) => Was::Value,
        // A folder is no value.
        Ok(false) if place.at().is_folder() => return Ok(Was::Nothing),
        Ok(false) => return Ok(Was::Foreign),
        Err(error) => nothing(error)?,
    };
    if is_listed || was == Was::Value {
        prune(&root, name);
    }
    Ok(was)
}

/// That nothing is there, if an error says so.
fn nothing(error: Errno) -> io::Result<Was> {
    if leads_elsewhere(error) {
        return Ok(Was::Nothing);
    }
    removed(Err(error)).map(|_| Was::Nothing)
}

/// Removes a value that the index knows by its size and its CRC32C, whatever its times say. Says what was there.
///
/// # Errors
///
/// Where the file system refuses; `EEXIST` where another file is in its place, which stays.
pub fn remove_known(root: &Path, name: &Path, known: Option<(u64, u32)>) -> io::Result<Was> {
    let was = remove_value(root, name)?;
    if was != Was::Foreign {
        return Ok(was);
    }
    let root = Root::open(root)?;
    let place = root.find(name)?;
    match known {
        Some((size, checksum)) if holds(place.at(), size, checksum)? => {
            place.at().unlink()?;
            prune(&root, name);
            Ok(Was::Value)
        }
        _ => Err(Errno::EXIST.into()),
    }
}

/// The name of the directory of a key's ranges, and what their file names begin with.
fn ranges_of(key: &str) -> (PathBuf, String) {
    match key.rsplit_once('/') {
        Some((above, tail)) => (Path::new(RANGES).join(above), format!("{tail}@")),
        // To join nothing would add a slash.
        None => (PathBuf::from(RANGES), format!("{key}@")),
    }
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
    let found = match open_folder(root, &ranges).and_then(|folder| Ok(names_in(folder)?)) {
        Ok(found) => found,
        Err(error) => {
            let elsewhere = Errno::from_io_error(&error).is_some_and(leads_elsewhere);
            if !elsewhere && !is_absence(&error) {
                failed.push((format!("{RANGES}/{key}@0-"), error));
            }
            return failed;
        }
    };
    for name in found {
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

/// Writes a tombstone for a value that is no longer valid but could not be deleted.
///
/// # Errors
///
/// Where the file system refuses.
pub fn write_tombstone(root: &Path, name: &str) -> io::Result<()> {
    write_note(root, DROPPED, &digest(name)).map(drop)
}

/// Notes that the index has dropped a value of which no file was there to be removed. Others may have moved it away, and
/// may move it back: a rebuild takes in none of its name that was fetched by now, in milliseconds since 1970.
///
/// # Errors
///
/// Where the file system refuses.
pub fn mark_missing(root: &Path, name: &str, now: u64) -> io::Result<()> {
    let digest = digest(name);
    let file = write_note(root, MISSING, digest.get(..MARK_DIGITS).unwrap_or(&digest))?;
    let nanos = i64::try_from(now).unwrap_or(0).saturating_mul(MILLI);
    let status = fstat(&file)?;
    // One that was made just now has the time of the system, and it is another clock that counts.
    if modified(&status) < nanos || modified(&status) % MILLI != 0 {
        set_modified(&file, nanos)?;
    }
    Ok(())
}

/// Names a value in the notes about it. The Python side derives the same.
fn digest(name: &str) -> String {
    let digest = Sha256::digest(name.as_bytes());
    digest.iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// An empty file in a folder of the directory.
fn write_note(root: &Path, folder: &str, name: &str) -> io::Result<OwnedFd> {
    make_folders(root, Path::new(folder), &mut 0)?;
    let name = Path::new(folder).join(name);
    let place = Place::find(root, &name)?;
    let mut file = None;
    change_in(place.at(), |at| {
        file = Some(open_own_in(at.folder, at.name, OFlags::WRONLY)?);
        Ok(())
    })?;
    file.ok_or_else(|| Errno::NOENT.into())
}
