//! A cache directory and the space on its volume.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::statvfs;

use super::below::At;
use super::ownership::SourceDigest;
use super::segments::SegmentFiles;
use super::value_file::discard;
use super::values::Values;
use crate::shared::{Neighbours, neighbours, new_generation};

/// Bytes of a volume that stay free by default, ...
const FREE_SPACE: u64 = 1 << 30;
/// ... or the part of a small volume: one byte in so many.
const FREE_PART: u64 = 20;
/// Files that can still be made on the volume, unless it takes few, ...
const FREE_FILES: u64 = 1000;
/// ... and then one in so many.
const FREE_FILES_PART: u64 = 50;
/// Files and folders that one fill may make.
const FILES_PER_FILL: u64 = 8;
/// With this many bytes more than must stay free, the volume is not asked again ...
const AMPLE: u64 = 1 << 30;
/// ... for this long: asking takes as long as writing, and no disk is filled in that time.
const AMPLE_FOR: Duration = Duration::from_millis(50);

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

impl Space {
    /// Bytes of the volume that stay free by default.
    #[must_use]
    pub fn min_free(&self) -> u64 {
        FREE_SPACE.min(self.total / FREE_PART)
    }
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

/// Files that a batch of fills makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NewFiles {
    /// None: a pool appends to segments that are there.
    None,
    /// Segments of a pool.
    Segments,
    /// One for each value, and its folders.
    Values,
}

/// What a volume lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Missing {
    /// Bytes to free.
    pub bytes: u64,
    /// Inodes to free.
    pub inodes: u64,
}

/// Where the files of a cache directory are.
#[derive(Debug)]
pub struct CacheDir {
    pub(super) root: PathBuf,
    tmp: PathBuf,
    pub(super) values: Values,
    pub(super) source: SourceDigest,
    opened: Instant,
    /// In the names of its unfinished files: two processes may have one number, in containers say.
    own: u64,
    /// Milliseconds after `opened` until which the volume has ample space.
    ample_until: AtomicU64,
    /// The lock file of an index that this process does not use.
    marked: Option<PathBuf>,
    seen: Mutex<Option<Mark>>,
    /// Unfinished files that could not be removed.
    left: Mutex<Vec<Leftover>>,
}

/// An unfinished file that could not be removed. Its reservation has not ended, so its bytes are counted.
#[derive(Debug)]
pub(super) struct Leftover {
    pub(super) unfinished: PathBuf,
    pub(super) reservation: u64,
    /// Whether nothing is left of the value but this.
    pub(super) gone: bool,
}

/// What others change, who share no index with this process, as they change the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// The time of the lock file, of those who share no index at all; `None` where there is none.
    time: Option<(i64, i64)>,
    /// Those who share one.
    pub(super) neighbours: Option<Neighbours>,
}

impl CacheDir {
    /// A cache directory, and the directory of its unfinished files.
    #[must_use]
    pub fn new(root: PathBuf, tmp: PathBuf) -> Self {
        CacheDir {
            root,
            tmp,
            values: Values::Files,
            source: SourceDigest::default(),
            opened: Instant::now(),
            own: new_generation(),
            ample_until: AtomicU64::new(0),
            marked: None,
            seen: Mutex::new(None),
            left: Mutex::new(Vec::new()),
        }
    }

    /// The same for a process with an index of its own; this is the lock file of the one that others may share.
    #[must_use]
    pub fn marked_by(self, file: PathBuf) -> Self {
        let seen = Mutex::new(Some(mark_of(&file)));
        CacheDir {
            marked: Some(file),
            seen,
            ..self
        }
    }

    /// The same, with values in the segments of a pool.
    #[must_use]
    pub fn with_segments(self, files: Arc<SegmentFiles>) -> Self {
        CacheDir {
            values: Values::Segments(files),
            ..self
        }
    }

    /// The mark of now; `None` for who shares the index.
    pub(super) fn mark(&self) -> Option<Mark> {
        self.marked.as_deref().map(mark_of)
    }

    /// Whether a mark is not the one that was seen last; from now on it is.
    pub(super) fn is_news(&self, mark: Option<Mark>) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *seen, mark) != mark
    }

    /// The same, with values recorded as those of this source.
    #[must_use]
    pub fn of(self, source: SourceDigest) -> Self {
        CacheDir { source, ..self }
    }

    /// A name that no other file has, of the participant with this slot.
    #[must_use]
    pub fn unfinished(&self, slot: Option<usize>) -> PathBuf {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        // A forked child has the rest of its parent.
        let (process, own) = (std::process::id(), self.own);
        self.tmp.join(match slot {
            Some(slot) => format!("s{slot}-{process}-{own:016x}-{number}"),
            None => format!("own-{process}-{own:016x}-{number}"),
        })
    }

    /// Notes an unfinished file that could not be removed.
    pub(super) fn note_left(&self, leftover: Leftover) {
        self.left().push(leftover);
    }

    /// Removes unfinished files that could not be removed before; those that are gone now.
    pub(super) fn remove_left(&self) -> Vec<Leftover> {
        // Not under its lock, for that is I/O.
        let left = std::mem::take(&mut *self.left());
        let (gone, left) =
            (left.into_iter()).partition(|one| discard(&self.root, &one.unfinished).is_ok());
        self.left().extend::<Vec<_>>(left);
        gone
    }

    fn left(&self) -> MutexGuard<'_, Vec<Leftover>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ample_space(&self) -> bool {
        let until = self.ample_until.load(Ordering::Relaxed);
        self.opened.elapsed() < Duration::from_millis(until)
    }

    fn note_ample_space(&self) {
        let until = (self.opened.elapsed() + AMPLE_FOR).as_millis();
        let until = u64::try_from(until).unwrap_or(0);
        self.ample_until.store(until, Ordering::Relaxed);
    }

    /// What to free on the volume before `size` more bytes are written, so that the minimum stays free.
    pub(super) fn missing_space(
        &self,
        size: u64,
        min_free: Option<u64>,
        files: NewFiles,
    ) -> io::Result<Option<Missing>> {
        if self.has_ample_space() {
            return Ok(None);
        }
        let space = space(&self.root)?;
        let min_free = min_free.unwrap_or_else(|| space.min_free());
        let needed = min_free.saturating_add(size);
        let bytes = needed.saturating_sub(space.free);
        let inodes = space.files.map_or(0, |(free, total)| {
            let needed = match files {
                NewFiles::None => 0,
                NewFiles::Segments => FILES_PER_FILL,
                NewFiles::Values => FREE_FILES.min(total / FREE_FILES_PART).max(FILES_PER_FILL),
            };
            needed.saturating_sub(free)
        });
        if bytes == 0 && inodes == 0 {
            let many_files = space.files.is_none_or(|(free, _)| free > 10 * FREE_FILES);
            if space.free - needed > AMPLE && many_files {
                self.note_ample_space();
            }
            return Ok(None);
        }
        Ok(Some(Missing { bytes, inodes }))
    }
}

fn mark_of(file: &Path) -> Mark {
    // Opened: a network file system asks its server then.
    let found = At::from(file).open().and_then(rustix::fs::fstat);
    Mark {
        time: found
            .ok()
            .map(|status| (status.st_mtime, status.st_mtime_nsec as i64)),
        neighbours: file.parent().and_then(neighbours),
    }
}
