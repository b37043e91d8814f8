//! Removes values, and never another's file. What cannot be removed gets a tombstone.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::below::{At, Place, Root, leads_elsewhere, names_in, open_cached, open_folder};
use super::folders::{make_folders, prune};
use super::ownership::{Owner, holds, owner};
use crate::key::ByteRange;

/// Directory of the tombstones of values that are no longer valid but could not be deleted.
const DROPPED: &str = ".zcache/dropped";

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
    let root = match Root::open(root) {
        Ok(root) => root,
        Err(error) if leads_elsewhere(error) => return Ok(true),
        Err(error) => return removed(Err(error)),
    };
    let place = match root.find(name) {
        Ok(place) => place,
        Err(error) if leads_elsewhere(error) => return Ok(true),
        Err(error) => {
            let gone = removed(Err(error))?;
            prune(&root, name);
            return Ok(gone);
        }
    };
    let gone = remove(place.at())?;
    if gone {
        prune(&root, name);
    }
    // A folder is no value.
    Ok(gone || place.at().is_folder())
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
    let root = Root::open(root)?;
    let place = root.find(name)?;
    match known {
        Some((size, checksum)) if holds(place.at(), size, checksum)? => {
            place.at().unlink()?;
            prune(&root, name);
            Ok(())
        }
        _ => Err(Errno::EXIST.into()),
    }
}

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
    let digest = Sha256::digest(name.as_bytes());
    // The Python side derives the same name.
    let digest: String = digest.iter().take(16).map(|b| format!("{b:02x}")).collect();
    make_folders(root, Path::new(DROPPED))?;
    let name = Path::new(DROPPED).join(digest);
    let place = Place::find(root, &name)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let at = place.at();
    openat(at.folder, at.name, flags, Mode::from_raw_mode(0o666))?;
    Ok(())
}
