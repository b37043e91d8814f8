//! Files and folders of zcache's own, which belong to those who may use the folder that they are in, whatever the umask says.
//!
//! They are so before they have their names: no other process finds one that it may not use, also where this one
//! dies meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RawMode, RenameFlags, fchmod, fchown, fstat, linkat,
    mkdirat, openat, renameat, renameat_with, stat, unlinkat,
};
use rustix::io::{Errno, Result};

use super::header::new_generation;

const SET_GID: RawMode = 0o2000;
const STICKY: RawMode = 0o1000;
const NEW: OFlags = OFlags::RDWR
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

/// To make something in a folder, which need not be one to list.
const FOLDER: OFlags = {
    let flags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);
    #[cfg(target_os = "linux")]
    let flags = flags.union(OFlags::PATH);
    flags
};

/// Opens a file by a path without links: none may lead to a file elsewhere. Nor does a device block.
pub(super) fn open_plain(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
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
    loop {
        match open_plain(path, flags) {
            Err(Errno::NOENT) => {}
            opened => return Ok(opened?),
        }
        match make_file_at(path) {
            // Another process was first.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
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
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let folder = open_folder(path.parent().ok_or(Errno::INVAL)?)?;
    Ok(make_file(folder, name)?.into())
}

/// Makes a file that is not there yet, in a folder that is open.
///
/// # Errors
///
/// `EXIST` where the name is taken, and as the file system refuses.
pub fn make_file<Fd: AsFd>(folder: Fd, name: impl AsRef<Path>) -> Result<OwnedFd> {
    let (folder, name) = (folder.as_fd(), name.as_ref());
    let mode = Mode::from_raw_mode(fstat(folder)?.st_mode & 0o666 | 0o600);
    #[cfg(target_os = "linux")]
    {
        let make_unnamed = || {
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            let file = openat(folder, ".", flags, mode)?;
            fchmod(&file, mode)?;
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            linkat(CWD, path, folder, name, AtFlags::SYMLINK_FOLLOW)
        };
        match make_unnamed() {
            // By its name: the system says of the other descriptor that its file was deleted.
            Ok(()) => return openat(folder, name, NEW, Mode::empty()),
            Err(Errno::EXIST) => return Err(Errno::EXIST),
            // Not on this file system; what else it refuses, it refuses again.
            Err(_) => {}
        }
    }
    let file = openat(folder, name, NEW | OFlags::CREATE | OFlags::EXCL, mode)?;
    let _ = fchmod(&file, mode);
    Ok(file)
}

/// Makes a folder, unless it is there: with these permissions, or with those of the folder above and for its group. What
/// all may do in a sticky one, where none may touch what is others', is only to read.
///
/// # Errors
///
/// `EXIST` where something else is there, and as the file system refuses.
pub fn make_folder(path: &Path, mode: Option<RawMode>) -> io::Result<()> {
    match stat(path) {
        Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Directory => return Ok(()),
        Ok(_) => return Err(Errno::EXIST.into()),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let above = path.parent().ok_or(Errno::INVAL)?;
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let above = openat(CWD, above, FOLDER, Mode::empty())?;
    let unfinished = format!(".zcache-{:016x}", new_generation());
    mkdirat(&above, &unfinished, Mode::RWXU)?;
    let renamed = open_to_users(&above, &unfinished, mode).and_then(|()| {
        match renameat_with(&above, &unfinished, &above, name, RenameFlags::NOREPLACE) {
            // Not on this file system: this replaces an empty folder at most, by its like.
            Err(Errno::PERM | Errno::NOSYS | Errno::INVAL | Errno::NOTSUP) => {
                renameat(&above, &unfinished, &above, name)
            }
            renamed => renamed,
        }
    });
    if renamed.is_err() {
        let _ = unlinkat(&above, &unfinished, AtFlags::REMOVEDIR);
    }
    match renamed {
        // Another process was first.
        Err(Errno::EXIST | Errno::NOTEMPTY) => Ok(()),
        renamed => Ok(renamed?),
    }
}

/// Says who may use a new folder, as far as this user may say so: some file systems know no permissions.
fn open_to_users(above: &OwnedFd, name: &str, mode: Option<RawMode>) -> Result<()> {
    let folder = openat(
        above,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let (found, above) = (fstat(&folder)?, fstat(above)?);
    let mut hands_on = found.st_mode & SET_GID;
    let mode = mode.unwrap_or_else(|| {
        let mut mode = above.st_mode & 0o777 | 0o700;
        if above.st_mode & STICKY != 0 {
            mode &= !0o002;
        }
        if found.st_gid == above.st_gid {
            return mode;
        }
        if fchown(&folder, None, Some(Gid::from_raw(above.st_gid))).is_ok() {
            hands_on = SET_GID;
            return mode;
        }
        // Those of its group are others to the folder above.
        mode & !0o070 | (mode & 0o007) << 3
    });
    if mode & 0o020 != 0 {
        // The group need not be the primary one of each who writes there.
        hands_on = SET_GID;
    }
    let _ = fchmod(&folder, Mode::from_raw_mode(mode | hands_on));
    Ok(())
}
