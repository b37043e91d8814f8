//! Folders of a cache directory: made for a value, removed with the last one, and counted by their blocks.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Stat, statat, unlinkat};
use rustix::io::Errno;

/// Time between two looks whether another thread has changed its folder: about as long as that takes.
const PAUSE: Duration = Duration::from_micros(20);

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

fn blocks_of(path: &Path) -> rustix::io::Result<i64> {
    Ok(blocks(&statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?))
}

/// Makes a name in a folder, and counts by how much that has grown.
pub(super) fn change_in(
    folder: Option<&Path>,
    change: impl FnOnce() -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    let _one_at_a_time = OneAtATime::begin();
    let Some(Ok(before)) = folder.map(blocks_of) else {
        return change();
    };
    change()?;
    if let Some(Ok(after)) = folder.map(blocks_of) {
        count_folders(after.saturating_sub(before));
    }
    Ok(())
}

/// Removes a folder if it is empty, and counts that.
fn remove_folder(path: &Path) -> rustix::io::Result<()> {
    let before = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    // Two links, and one of each folder in it; some file systems always say 1.
    if before.st_nlink > 2 {
        // To try would wait for those who make or remove something in it.
        return Err(Errno::NOTEMPTY);
    }
    unlinkat(CWD, path, AtFlags::REMOVEDIR)?;
    count_folders(-blocks(&before));
    Ok(())
}

/// Permissions of a folder.
pub(super) fn mode_of(folder: &Path) -> io::Result<u32> {
    let status = statat(CWD, folder, AtFlags::empty())?;
    Ok(Mode::from_raw_mode(status.st_mode).bits() & 0o777)
}

/// Makes a folder and those above it, each with the permissions of the one that it is made in.
pub(super) fn make_folders(folder: &Path) -> io::Result<()> {
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
            Ok(()) => count_folders(blocks_of(path).unwrap_or(0)),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
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
pub(super) fn prune(root: &Path, name: &Path) {
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

/// Whether there is a symbolic link between `root` and `name`.
#[must_use]
pub fn leads_outside(root: &Path, name: &Path) -> bool {
    let above = name.ancestors().skip(1);
    above
        .filter(|above| !above.as_os_str().is_empty())
        .any(|above| root.join(above).is_symlink())
}
