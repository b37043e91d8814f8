//! Files and folders of zcache's own, which belong to those who may use the folder that they are in, whatever the umask says.
//!
//! They are so before they have their names: no other process finds one that it may not use, also where this one
//! dies meanwhile. Only files on a file system that knows neither files without names, nor links, nor how to rename
//! without replacing are so a moment later.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, RawMode, RenameFlags, Stat, chmod, fchmod,
    fchown, fstat, linkat, mkdirat, openat, renameat, renameat_with, stat, unlinkat,
};
use rustix::io::{Errno, Result};

use super::unfinished::make_unfinished;

const SET_GID: RawMode = 0o2000;
const STICKY: RawMode = 0o1000;
const NEW: OFlags = OFlags::RDWR
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

const LIST: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Times that a folder is made again because another process took the unfinished one for left behind.
const TRIES: u32 = 8;

/// To make something in a folder, which need not be one to list.
const FOLDER: OFlags = {
    let flags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);
    #[cfg(target_os = "linux")]
    let flags = flags.union(OFlags::PATH);
    flags
};

/// Opens a file by a path without links: none may lead to a file elsewhere. Nor does a device block.
pub(super) fn open_plain(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    let mut flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if !flags.contains(OFlags::DIRECTORY) {
        flags |= OFlags::NONBLOCK;
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{ResolveFlags, openat2};
        match openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
            // Old kernels, and sandboxes that hide this call.
            Err(Errno::NOSYS | Errno::PERM) => {}
            opened => return opened,
        }
    }
    rustix::fs::open(path, flags, Mode::empty())
}

/// Opens the folder of an index, to work in it.
pub(super) fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    Ok(open_plain(path, OFlags::RDONLY | OFlags::DIRECTORY)?)
}

/// Opens a file, or makes it.
///
/// # Errors
///
/// Where the file system refuses, or something else is there.
pub fn open_own(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let (folder, name) = split(path)?;
    Ok(open_own_in(open_plain(folder, FOLDER)?, name, flags)?)
}

/// The same in a folder that is open.
///
/// # Errors
///
/// As [`open_own`].
pub fn open_own_in<Fd: AsFd>(folder: Fd, name: &Path, flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    loop {
        match openat(&folder, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => {}
            opened => return opened,
        }
        match make_file(&folder, name) {
            // Another process was first.
            Err(Errno::EXIST) => {}
            made => drop(made?),
        }
    }
}

/// Makes a file that is not there yet.
///
/// # Errors
///
/// As [`make_file`].
pub(super) fn make_file_at(path: &Path) -> io::Result<File> {
    let (folder, name) = split(path)?;
    Ok(make_file(open_plain(folder, FOLDER)?, name)?.into())
}

/// A path as a folder and the name in it.
fn split(path: &Path) -> Result<(&Path, &Path)> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    Ok((path.parent().ok_or(Errno::INVAL)?, Path::new(name)))
}

/// Makes a file that is not there yet, in a folder that is open.
///
/// # Errors
///
/// `EXIST` where the name is taken, and as the file system refuses.
pub fn make_file<Fd: AsFd>(folder: Fd, name: impl AsRef<Path>) -> Result<OwnedFd> {
    let (folder, name) = (folder.as_fd(), name.as_ref());
    let above = fstat(folder)?;
    let open = |file: &OwnedFd| open_to_users(file, &above, None, false);
    #[cfg(target_os = "linux")]
    {
        let make_unnamed = || {
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            let file = openat(folder, ".", flags, PRIVATE)?;
            open(&file)?;
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            linkat(CWD, path, folder, name, AtFlags::SYMLINK_FOLLOW)?;
            Ok(file)
        };
        match make_unnamed() {
            Ok(file) => return Ok(reopened(folder, name, file)),
            Err(Errno::EXIST) => return Err(Errno::EXIST),
            // Not on this file system; what else it refuses, it refuses again.
            Err(_) => {}
        }
    }
    let create = |name: &Path| openat(folder, name, NEW | OFlags::CREATE | OFlags::EXCL, PRIVATE);
    let (unfinished, file) = make_unfinished(folder, |name| create(Path::new(name)))?;
    let named = open(&file).and_then(|()| match rename_new(folder, &unfinished.text, name) {
        Err(error) if is_unknown(error) => {
            linkat(folder, &unfinished.text, folder, name, AtFlags::empty())?;
            unlinkat(folder, &unfinished.text, AtFlags::empty())
        }
        renamed => renamed,
    });
    if named.is_err() {
        // Else the next one with this name does.
        let _ = unlinkat(folder, &unfinished.text, AtFlags::empty());
    }
    match named {
        Err(error) if is_unknown(error) => {
            let file = create(name)?;
            open(&file)?;
            Ok(file)
        }
        named => named.map(|()| file),
    }
}

/// Makes a folder, unless it is there: with these permissions, or as one of [`make_folder_in`].
///
/// # Errors
///
/// `EXIST` where something else is there, and as the file system refuses.
pub fn make_folder(path: &Path, mode: Option<RawMode>, group_writes: bool) -> io::Result<()> {
    if is_there(path)? {
        return Ok(());
    }
    let (above, name) = split(path)?;
    let above = openat(CWD, above, FOLDER, Mode::empty())?;
    match make_in(above.as_fd(), name, mode, group_writes) {
        // Another process was first.
        Err(Errno::EXIST) if is_there(path)? => Ok(()),
        made => Ok(made?),
    }
}

fn is_there(path: &Path) -> Result<bool> {
    match stat(path) {
        Ok(found) if is_folder(&found) => Ok(true),
        Ok(_) => Err(Errno::EXIST),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_folder(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Directory
}

/// Makes a folder that is not there yet, in a folder that is open: with the permissions of that and for its group. In a
/// sticky one, where none may touch what is others', only its owner may write into it.
///
/// # Errors
///
/// `EXIST` where the name is taken, and as the file system refuses.
pub fn make_folder_in<Fd: AsFd>(above: Fd, name: &Path) -> Result<()> {
    make_in(above.as_fd(), name, None, false)
}

fn make_in(
    above: BorrowedFd<'_>,
    name: &Path,
    mode: Option<RawMode>,
    group_writes: bool,
) -> Result<()> {
    for _ in 1..TRIES {
        match try_make_in(above, name, mode, group_writes) {
            Err(Errno::NOENT) => {}
            made => return made,
        }
    }
    try_make_in(above, name, mode, group_writes)
}

fn try_make_in(
    above: BorrowedFd<'_>,
    name: &Path,
    mode: Option<RawMode>,
    group_writes: bool,
) -> Result<()> {
    let status = fstat(above)?;
    let (unfinished, ()) = make_unfinished(above, |name| mkdirat(above, name, Mode::RWXU))?;
    let renamed = open_made(above, &unfinished.text)
        .and_then(|made| open_to_users(&made, &status, mode, group_writes))
        .and_then(|()| match rename_new(above, &unfinished.text, name) {
            // This replaces an empty folder at most, by its like.
            Err(error) if is_unknown(error) => renameat(above, &unfinished.text, above, name),
            renamed => renamed,
        });
    if renamed.is_err() {
        // Else the next one with this name does.
        let _ = unlinkat(above, &unfinished.text, AtFlags::REMOVEDIR);
    }
    match renamed {
        Err(Errno::NOTEMPTY) => Err(Errno::EXIST),
        renamed => renamed,
    }
}

/// A file that was made without a name, opened by the one that it has: the system says of the first descriptor that its file
/// was deleted. By now it may have been, or another one may have its name.
#[cfg(target_os = "linux")]
fn reopened(folder: BorrowedFd<'_>, name: &Path, file: OwnedFd) -> OwnedFd {
    let identity = |file: &OwnedFd| fstat(file).map(|found| (found.st_dev, found.st_ino));
    let opened = openat(folder, name, NEW, Mode::empty());
    opened
        .ok()
        .filter(|opened| identity(opened) == identity(&file))
        .unwrap_or(file)
}

/// Opens a folder that was just made. Who may write above may have put another one in its place: what is in it is not ours
/// to open to others.
fn open_made(above: BorrowedFd<'_>, name: &str) -> Result<OwnedFd> {
    let made = openat(above, name, FOLDER | OFlags::NOFOLLOW, Mode::empty())?;
    let mode = fstat(&made)?.st_mode & 0o7777;
    // A umask can close it to its owner as well.
    if mode & 0o700 != 0o700 {
        let path = format!("/proc/self/fd/{}", made.as_raw_fd());
        let _ = chmod(path, Mode::from_raw_mode(mode | 0o700));
    }
    let made = openat(&made, ".", LIST, Mode::empty())?;
    for entry in Dir::read_from(&made)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Err(Errno::EXIST);
        }
    }
    Ok(made)
}

fn rename_new(folder: BorrowedFd<'_>, from: &str, to: &Path) -> Result<()> {
    renameat_with(folder, from, folder, to, RenameFlags::NOREPLACE)
}

/// Whether a file system does not know what it was asked for.
fn is_unknown(error: Errno) -> bool {
    matches!(
        error,
        Errno::PERM | Errno::NOSYS | Errno::INVAL | Errno::NOTSUP
    )
}

/// Gives a file or folder that lacks any of them these permissions, or those of the folder above and its group, as far
/// as this user may say so: some file systems know no permissions.
fn open_to_users(
    made: &OwnedFd,
    above: &Stat,
    mode: Option<RawMode>,
    group_writes: bool,
) -> Result<()> {
    let found = fstat(made)?;
    let mut has = found.st_mode & 0o7777;
    let mut wanted = mode.unwrap_or_else(|| {
        let mode = above.st_mode & 0o777 | 0o700;
        let mode = match (above.st_mode & STICKY != 0, group_writes) {
            (false, _) => mode,
            (true, true) => mode & !0o002,
            (true, false) => mode & !0o022,
        };
        let group = Some(Gid::from_raw(above.st_gid));
        if found.st_gid == above.st_gid {
            return mode;
        }
        if fchown(made, None, group).is_ok() {
            has &= !0o070;
            return mode;
        }
        // Those of its group are others to the folder above.
        mode & !0o070 | (mode & 0o007) << 3
    });
    if !is_folder(&found) {
        wanted &= 0o666;
    } else if wanted & 0o070 != 0 {
        // The group need not be the primary one of each who writes there.
        wanted |= SET_GID;
    }
    wanted |= has & SET_GID;
    if wanted & !has != 0 {
        let _ = fchmod(made, Mode::from_raw_mode(wanted));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    fn folder(name: &str) -> (PathBuf, OwnedFd) {
        let path = std::env::temp_dir().join(format!("zcache-own-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let opened = open_folder(&path).unwrap();
        (path, opened)
    }

    #[test]
    fn unfinished_name_that_others_have_taken_keeps_no_one_from_making_a_folder() {
        let (path, above) = folder("kept-from");
        let mkdir = |name: &str| mkdirat(&above, name, Mode::RWXU);
        let (name, ()) = make_unfinished(above.as_fd(), mkdir).unwrap();
        let theirs = path.join(&name.text).join("theirs");
        drop(name);
        fs::write(&theirs, b"1").unwrap();
        make_folder_in(&above, Path::new("made")).unwrap();
        assert!(path.join("made").is_dir());
        assert_eq!(fs::read(&theirs).unwrap(), b"1");
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn folder_in_place_of_the_one_that_was_made_is_not_opened_to_others() {
        let (path, above) = folder("swapped");
        fs::create_dir(path.join("private")).unwrap();
        fs::write(path.join("private/key"), b"1").unwrap();
        for mode in [0o700, 0o500, 0] {
            fs::set_permissions(path.join("private"), Permissions::from_mode(mode)).unwrap();
            let opened = open_made(above.as_fd(), "private");
            assert_eq!(opened.unwrap_err(), Errno::EXIST);
        }
        fs::remove_dir_all(path).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn file_that_has_lost_its_name_is_still_its_makers() {
        let (path, above) = folder("taken");
        for other in [None, Some("another's")] {
            let made = make_file(&above, "name").unwrap();
            let inode = fstat(&made).unwrap().st_ino;
            let named = reopened(above.as_fd(), Path::new("name"), made);
            assert_eq!(fstat(&named).unwrap().st_ino, inode);
            fs::remove_file(path.join("name")).unwrap();
            if let Some(text) = other {
                fs::write(path.join("name"), text).unwrap();
            }
            let kept = reopened(above.as_fd(), Path::new("name"), named);
            assert_eq!(fstat(&kept).unwrap().st_ino, inode);
        }
        fs::remove_dir_all(path).unwrap();
    }
}
