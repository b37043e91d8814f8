//! Names of what is not finished.

use std::os::fd::BorrowedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, statat, unlinkat};
use rustix::io::{Errno, Result};
use rustix::process::geteuid;

use super::header::new_generation;

/// A name for what is not finished, which one thread of this process has at a time.
///
/// There are few: what could not be removed from a folder is in the way of the next one, which removes it or makes nothing.
/// So a folder that takes names and does not let them be changed or removed does not fill up.
pub(super) struct UnfinishedName {
    pub(super) text: String,
    /// Its number, as a bit of `TAKEN`; 0 where all are taken.
    bit: u64,
}

/// Numbers of the names that threads have. A forked child never gets back those of its parent's threads.
static TAKEN: AtomicU64 = AtomicU64::new(0);

impl UnfinishedName {
    fn take() -> Self {
        static OWN: OnceLock<u64> = OnceLock::new();
        let free = |taken: u64| !taken & taken.wrapping_add(1);
        let (new, old) = (Ordering::Acquire, Ordering::Relaxed);
        let taken = TAKEN.fetch_update(new, old, |taken| {
            (free(taken) != 0).then_some(taken | free(taken))
        });
        let Ok(bit) = taken.map(free) else {
            return UnfinishedName {
                text: text_of(new_generation()),
                bit: 0,
            };
        };
        // A forked child has the rest of its parent.
        let own = OWN.get_or_init(new_generation) ^ u64::from(std::process::id()) << 24;
        UnfinishedName {
            text: text_of(own.wrapping_add(u64::from(bit.trailing_zeros()))),
            bit,
        }
    }
}

impl Drop for UnfinishedName {
    fn drop(&mut self) {
        TAKEN.fetch_and(!self.bit, Ordering::Release);
    }
}

fn text_of(number: u64) -> String {
    format!(".zcache-{number:016x}")
}

/// Makes something by a name that nothing has, and gives both.
pub(super) fn make_unfinished<T>(
    folder: BorrowedFd<'_>,
    make: impl Fn(&str) -> Result<T>,
) -> Result<(UnfinishedName, T)> {
    let mut name = UnfinishedName::take();
    loop {
        match make(&name.text) {
            Err(Errno::EXIST) => {}
            made => return Ok((name, made?)),
        }
        match remove_left(folder, &name.text) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) if error != Errno::NOTEMPTY && is_own(folder, &name.text) => {
                return Err(error);
            }
            // Who else may write here keeps this process from nothing.
            Err(_) => name.text = text_of(new_generation()),
        }
    }
}

/// Removes an empty folder, or a file, that could not be removed before.
fn remove_left(folder: BorrowedFd<'_>, name: &str) -> Result<()> {
    match unlinkat(folder, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTDIR) => unlinkat(folder, name, AtFlags::empty()),
        removed => removed,
    }
}

fn is_own(folder: BorrowedFd<'_>, name: &str) -> bool {
    statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|found| found.st_uid == geteuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::super::own::open_folder;
    use super::*;
    use std::fs;
    use std::os::fd::AsFd;

    use rustix::fs::{Mode, OFlags, mkdirat, openat};

    #[test]
    fn what_could_not_be_removed_is_removed_by_the_next_one() {
        let path = std::env::temp_dir().join(format!("zcache-left-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let above = open_folder(&path).unwrap();
        const NEW: OFlags = OFlags::CREATE.union(OFlags::EXCL);
        let mkdir = |name: &str| mkdirat(&above, name, Mode::RWXU);
        let create = |name: &str| openat(&above, name, NEW, Mode::RUSR | Mode::WUSR);
        for _ in 0..3 {
            drop(make_unfinished(above.as_fd(), mkdir).unwrap());
            assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
            drop(make_unfinished(above.as_fd(), create).unwrap());
            assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
        }
        let (held, ()) = make_unfinished(above.as_fd(), mkdir).unwrap();
        let (other, ()) = make_unfinished(above.as_fd(), mkdir).unwrap();
        assert_ne!(held.text, other.text, "another thread has that one");
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn unfinished_names_run_out_for_no_one() {
        let names: Vec<_> = (0..70).map(|_| UnfinishedName::take()).collect();
        let mut texts: Vec<_> = names.iter().map(|name| &name.text).collect();
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), 70);
    }
}
