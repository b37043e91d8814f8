//! Names below a cache directory, found without links and mounts: neither may lead to files elsewhere,
//! no matter who else may write to the directory, at whatever moment.
//!
//! Each operation opens the folder that holds its file, below one descriptor of the directory (`openat2`),
//! and works in that. Where the kernel or a sandbox knows no such call, the path is looked at for links first.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, open, openat, statat, unlinkat,
};
use rustix::io::{Errno, Result};

/// Times that a name is looked up again because folders were moved meanwhile.
#[cfg(target_os = "linux")]
const TRIES: u32 = 16;

/// A name in a folder that is open, or a path.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    pub(super) folder: BorrowedFd<'a>,
    pub(super) name: &'a Path,
}

impl<'a> From<&'a Path> for At<'a> {
    fn from(name: &'a Path) -> Self {
        At { folder: CWD, name }
    }
}

impl<'a> From<&'a PathBuf> for At<'a> {
    fn from(name: &'a PathBuf) -> Self {
        name.as_path().into()
    }
}

impl At<'_> {
    /// Its status, of a link itself.
    pub(super) fn status(self) -> Result<Stat> {
        statat(self.folder, self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Whether it is a folder.
    pub(super) fn is_folder(self) -> bool {
        self.status()
            .is_ok_and(|status| is(&status, FileType::Directory))
    }

    /// Opens what is there to read, without following a link; a pipe does not block.
    pub(super) fn open(self) -> Result<OwnedFd> {
        openat(self.folder, self.name, READ, Mode::empty())
    }

    /// Makes a file that is not there yet, and opens it to write.
    pub(super) fn create(self, mode: Mode) -> Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        openat(self.folder, self.name, flags, mode)
    }

    /// Removes the file.
    pub(super) fn unlink(self) -> Result<()> {
        unlinkat(self.folder, self.name, AtFlags::empty())
    }

    /// Permissions of the folder that it is in.
    pub(super) fn mode_of_folder(self) -> Result<u32> {
        let above = self
            .name
            .parent()
            .filter(|above| !above.as_os_str().is_empty());
        let status = statat(
            self.folder,
            above.unwrap_or(Path::new(".")),
            AtFlags::empty(),
        )?;
        Ok(Mode::from_raw_mode(status.st_mode).bits() & 0o777)
    }
}

const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK);

/// To list a folder, ...
const LIST: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// ... and only to look up names in it.
pub(super) const FOLDER: OFlags = {
    let flags = OFlags::DIRECTORY
        .union(OFlags::NOFOLLOW)
        .union(OFlags::CLOEXEC);
    #[cfg(target_os = "linux")]
    let flags = flags.union(OFlags::PATH);
    flags
};

/// Whether a status is that of such a file.
pub(super) fn is(status: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(status.st_mode) == kind
}

/// A cache directory that is open.
#[derive(Debug)]
pub(super) struct Root<'a> {
    top: Arc<OwnedFd>,
    path: &'a Path,
}

/// A folder of a cache directory that is open, and the name of a file in it.
#[derive(Debug)]
pub(super) struct Place<'n> {
    folder: Arc<OwnedFd>,
    name: &'n Path,
}

impl<'a> Root<'a> {
    pub(super) fn open(path: &'a Path) -> Result<Self> {
        // The path of the directory itself is the user's own, links and all.
        let top = open(path, FOLDER.difference(OFlags::NOFOLLOW), Mode::empty())?;
        let top = Arc::new(top);
        Ok(Root { top, path })
    }

    /// Where the file of this name is.
    ///
    /// # Errors
    ///
    /// `ELOOP` or `EXDEV` where a link or a mount is in between; see [`leads_elsewhere`].
    pub(super) fn find<'n>(&self, name: &'n Path) -> Result<Place<'n>> {
        let above = name.parent().unwrap_or(Path::new(""));
        let folder = if above.as_os_str().is_empty() {
            Arc::clone(&self.top)
        } else {
            Arc::new(self.open_below(above, FOLDER)?)
        };
        Ok(Place {
            folder,
            name: Path::new(name.file_name().ok_or(Errno::INVAL)?),
        })
    }

    /// Opens what is below it.
    ///
    /// # Errors
    ///
    /// As [`Root::find`].
    pub(super) fn open_below(&self, name: &Path, flags: OFlags) -> Result<OwnedFd> {
        if name.as_os_str().is_empty() {
            return openat(&self.top, ".", flags, Mode::empty());
        }
        match beneath(self.top.as_fd(), name, flags) {
            Err(error) if is_unknown(error) => {}
            opened => return opened,
        }
        let mut parts = name.components();
        let is_plain = parts.all(|part| matches!(part, Component::Normal(_)));
        if !is_plain || leads_outside(self.path, name) {
            return Err(Errno::LOOP);
        }
        openat(&self.top, name, flags, Mode::empty())
    }
}

impl Place<'_> {
    /// Where the file of this name is in a cache directory; see [`Root::find`].
    pub(super) fn find<'n>(root: &Path, name: &'n Path) -> Result<Place<'n>> {
        Root::open(root)?.find(name)
    }

    pub(super) fn at(&self) -> At<'_> {
        At {
            folder: self.folder.as_fd(),
            name: self.name,
        }
    }
}

/// Whether an error says that a link or a mount leads out of the directory.
pub(super) fn leads_elsewhere(error: Errno) -> bool {
    matches!(error, Errno::LOOP | Errno::XDEV)
}

/// Opens a folder of a cache directory to list it.
///
/// # Errors
///
/// `ELOOP` or `EXDEV` where a link or a mount is in between, and as the file system refuses.
pub fn open_folder(root: &Path, name: &Path) -> io::Result<OwnedFd> {
    Ok(Root::open(root)?.open_below(name, LIST)?)
}

/// Opens a file of a cache directory to read.
///
/// # Errors
///
/// As [`open_folder`].
pub fn open_value(root: &Path, name: &Path) -> io::Result<OwnedFd> {
    Ok(Root::open(root)?.open_below(name, READ)?)
}

/// Opens a folder in one that is open, to list it or not.
pub(super) fn open_in(folder: impl AsFd, name: &Path, lists: bool) -> Result<OwnedFd> {
    let flags = if lists { LIST } else { FOLDER };
    match beneath(folder.as_fd(), name, flags) {
        // One name leads nowhere else but by a link, which is not followed.
        Err(error) if is_unknown(error) => openat(folder, name, flags, Mode::empty()),
        opened => opened,
    }
}

/// Names in a folder that is open.
pub(super) fn names_in(folder: impl AsFd) -> Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_bytes().to_owned();
        if name != b"." && name != b".." {
            names.push(PathBuf::from(OsString::from_vec(name)));
        }
    }
    Ok(names)
}

/// Opens what is below a folder, without following a link or going into a mount.
#[cfg(target_os = "linux")]
fn beneath(folder: BorrowedFd<'_>, name: &Path, flags: OFlags) -> Result<OwnedFd> {
    use rustix::fs::{ResolveFlags, openat2};
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    for _ in 1..TRIES {
        match openat2(folder, name, flags, Mode::empty(), how) {
            Err(Errno::AGAIN) => {}
            opened => return opened,
        }
    }
    openat2(folder, name, flags, Mode::empty(), how)
}

#[cfg(not(target_os = "linux"))]
fn beneath(_: BorrowedFd<'_>, _: &Path, _: OFlags) -> Result<OwnedFd> {
    Err(Errno::NOSYS)
}

/// Whether an error says that the call is not known here, or that it could not be sure.
fn is_unknown(error: Errno) -> bool {
    matches!(error, Errno::NOSYS | Errno::PERM | Errno::AGAIN)
}

/// Whether there is a symbolic link between `root` and `name`.
#[must_use]
pub fn leads_outside(root: &Path, name: &Path) -> bool {
    let above = name.ancestors().skip(1);
    above
        .filter(|above| !above.as_os_str().is_empty())
        .any(|above| root.join(above).is_symlink())
}

/// Opens a file to read, if that needs no I/O: `EAGAIN` where its name or its inode would have to
/// be read from a disk. `ENOSYS`, `EPERM` or `EINVAL` where the system cannot tell; `ESPIPE` where it
/// is no regular file, `ELOOP` where there is a link in the path.
pub fn open_cached(path: &Path) -> io::Result<OwnedFd> {
    #[cfg(target_os = "linux")]
    let opened = {
        use rustix::fs::{ResolveFlags, openat2};
        let how = ResolveFlags::CACHED | ResolveFlags::NO_SYMLINKS;
        openat2(CWD, path, READ, Mode::empty(), how).and_then(regular)
    };
    #[cfg(not(target_os = "linux"))]
    let opened = Err(Errno::NOSYS);
    Ok(opened?)
}

/// The same file, if it is a regular one.
#[cfg(target_os = "linux")]
fn regular(file: OwnedFd) -> Result<OwnedFd> {
    if is(&fstat(&file)?, FileType::RegularFile) {
        Ok(file)
    } else {
        Err(Errno::SPIPE)
    }
}
