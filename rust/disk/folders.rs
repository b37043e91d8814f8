//! Folders of a cache directory: made for a value, removed with the last one, and counted by their blocks.
//!
//! **Who makes a folder counts it, and who removes it counts that**, each once, for the system lets one of all threads and
//! processes succeed in each. So the one who makes it counts it also where it is gone before it was looked at. By how much a
//! folder has grown two processes may both count, and one that dies has counted what it removed as still there; both
//! are too much, and a rebuild corrects them. The sum may be below 0 for a moment, where
//! the removal is told first: what was made and not told yet is covered by a reservation.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, Stat, fstat, mkdirat, unlinkat};
use rustix::io::Errno;

use super::below::{At, FOLDER, Place, Root, names_in, open_folder, open_in};
use crate::shared::make_folder_in;

/// Time between two looks whether another thread has changed its folder: about as long as that takes.
const PAUSE: Duration = Duration::from_micros(20);

/// Times that a folder is made again while others remove empty ones.
const TRIES: u32 = 64;

/// Folders that stay when they are empty.
const STAY: &str = ".zcache";

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
            // To yield instead would give all others who want the processor a turn before each look.
            std::thread::sleep(PAUSE);
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
fn blocks(status: &Stat) -> i64 {
    status.st_blocks.saturating_mul(512)
}

/// Makes a name in a folder, and counts by how much that has grown.
pub(super) fn change_in(
    at: At<'_>,
    change: impl FnOnce(At<'_>) -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    let _one_at_a_time = OneAtATime::begin();
    let before = fstat(at.folder)?;
    let changed = change(at);
    // Also where that failed: what it has made may have been removed again, but the folder has not shrunk.
    if let Ok(after) = fstat(at.folder) {
        count_folders(blocks(&after).saturating_sub(blocks(&before)));
    }
    changed
}

/// Removes a folder if it is empty, and counts that.
fn remove_folder(at: At<'_>) -> rustix::io::Result<()> {
    let before = at.status()?;
    // Two links, and one of each folder in it; some file systems always say 1.
    if before.st_nlink > 2 {
        // To try would wait for those who make or remove something in it.
        return Err(Errno::NOTEMPTY);
    }
    unlinkat(at.folder, at.name, AtFlags::REMOVEDIR)?;
    count_folders(-blocks(&before));
    Ok(())
}

/// Makes a folder of a cache directory and those above it, each with the permissions of the one that it is
/// made in; the umask takes some away where it is none of zcache's own. `there` becomes the number of those that were
/// there, where it made any that is higher up.
pub(super) fn make_folders(root: &Path, folder: &Path, there: &mut usize) -> io::Result<()> {
    let mut above = Root::open(root)?.open_below(Path::new(""), FOLDER)?;
    let is_own = folder.starts_with(STAY);
    for (n, part) in folder.iter().enumerate() {
        let at = At {
            folder: above.as_fd(),
            name: Path::new(part),
        };
        let (opened, is_new) = open_or_make(at, is_own);
        if is_new {
            *there = n.min(*there);
        }
        above = opened?;
    }
    Ok(())
}

/// Opens a folder, and makes it where there is none. And whether it was made.
fn open_or_make(at: At<'_>, is_own: bool) -> (rustix::io::Result<OwnedFd>, bool) {
    let mut made = 0i64;
    let mut opened = open_in(at.folder, at.name, false);
    for _ in 0..TRIES {
        if !matches!(opened, Err(Errno::NOENT)) {
            break;
        }
        match change_in(at, |at| {
            if is_own {
                return make_folder_in(at.folder, at.name);
            }
            let mode = Mode::from_raw_mode(at.mode_of_folder()? | 0o700);
            mkdirat(at.folder, at.name, mode)
        }) {
            Ok(()) => made += 1,
            Err(Errno::EXIST) => {}
            Err(error) => {
                opened = Err(error);
                break;
            }
        }
        opened = open_in(at.folder, at.name, false);
    }
    if made > 0 {
        // Those that are gone again were as empty as the last one. Where that is gone as well, so is the folder that
        // it was in, which was empty too.
        let status = opened.as_ref().map_or_else(|_| fstat(at.folder), fstat);
        count_folders(
            status
                .map_or(0, |status| blocks(&status))
                .saturating_mul(made),
        );
    }
    (opened, made > 0)
}

/// Removes a folder that holds nothing but empty folders. Whether it is gone.
pub(super) fn remove_empty_at(at: At<'_>) -> bool {
    if !at.is_folder() {
        return false;
    }
    let found = open_in(at.folder, at.name, true).and_then(|folder| {
        let names = names_in(&folder)?;
        Ok((folder, names))
    });
    let Ok((folder, names)) = found else {
        return false;
    };
    let mut all_gone = true;
    for name in &names {
        all_gone &= remove_empty_at(At {
            folder: folder.as_fd(),
            name,
        });
    }
    all_gone && remove_folder(at).is_ok()
}

/// Removes the folder of this name in a cache directory if it holds nothing but empty folders. Whether it is
/// gone.
#[must_use]
pub fn remove_empty(root: &Path, name: &Path) -> bool {
    Place::find(root, name).is_ok_and(|place| remove_empty_at(place.at()))
}

/// Names of the files below the folder of this name in a cache directory, up to so many; none where there is no folder.
pub(super) fn files_below(root: &Path, name: &Path, limit: usize) -> Vec<PathBuf> {
    let (mut found, mut left) = (Vec::new(), vec![name.to_owned()]);
    while let Some(path) = left.pop() {
        match open_folder(root, &path).and_then(|folder| Ok(names_in(folder)?)) {
            Ok(names) => left.extend(names.iter().map(|name| path.join(name))),
            // A file, or a folder that stays as it is.
            Err(_) if path != name && found.len() < limit => found.push(path),
            Err(_) => break,
        }
    }
    found
}

/// Removes the folders above a name that are empty.
pub(super) fn prune(root: &Root<'_>, name: &Path) {
    prune_to(root, name, 0);
}

/// The same without the first `kept` of them.
pub(super) fn prune_to(root: &Root<'_>, name: &Path, kept: usize) {
    for above in name.ancestors().skip(1) {
        if above.iter().count() <= kept || above == Path::new(STAY) {
            return;
        }
        let removed = root.find(above).and_then(|place| remove_folder(place.at()));
        match removed {
            // Gone, or no folder can have such a name.
            Ok(()) | Err(Errno::NOENT | Errno::NAMETOOLONG | Errno::INVAL | Errno::ILSEQ) => {}
            // It holds something, or that cannot be known.
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn folder_that_has_grown_in_a_change_that_failed_is_counted() {
        let path = std::env::temp_dir().join(format!("zcache-grown-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let root = Root::open(&path).unwrap();
        let place = root.find(Path::new("name")).unwrap();
        let size = || blocks(&fstat(place.at().folder).unwrap());
        let before = size();
        take_folders();
        let changed = change_in(place.at(), |_| {
            for n in 0..200 {
                fs::write(path.join(format!("{n:0200}")), b"").unwrap();
            }
            Err(Errno::IO)
        });
        assert_eq!(changed, Err(Errno::IO));
        assert_eq!(take_folders(), size() - before);
        fs::remove_dir_all(path).unwrap();
    }
}
