//! The index of a cache directory, and the lock around each of its steps.
//!
//! A step takes the lock, checks the files, sets the dirty mark, works, clears the mark and releases
//! the lock. A mark that is set when the lock is taken means that its owner died in the middle of a
//! step: the index is emptied and rebuilt from a scan of the directory. The scan holds no lock;
//! until it is complete the index rejects new values, because it does not know yet what is there.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::lock_files::{Locks, OpenError};
use super::mapped::Mapped;
use crate::cache::{Cache, Limits, Peers};
use crate::error::{Error, Result};

/// Times that a step tries the lock and only yields in between: a step takes less time than the
/// shortest sleep.
const YIELDS: u32 = 16;

/// Times that it tries again, with pauses, before it is busy. A step takes microseconds, so a lock
/// that is not free within a millisecond is held by a process that is stopped.
const RETRIES: u32 = 40;
const PAUSE: Duration = Duration::from_micros(25);

/// An index in a directory.
#[derive(Debug)]
pub struct SharedIndex<T> {
    cache: Cache<Mapped, T>,
}

/// Why a step could not be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepError {
    /// Another process holds the lock, for longer than a step takes.
    Busy,
    /// The index cannot be used; see [`SharedIndex::restart`].
    Failed(Error),
}

impl From<Error> for StepError {
    fn from(error: Error) -> Self {
        StepError::Failed(error)
    }
}

impl<T: Clone> SharedIndex<T> {
    /// Opens the index below `root`, a directory that exists. Waits for the lock.
    ///
    /// The flag says that the index is new: the caller scans the directory, passes what it finds to
    /// [`Cache::adopt`], and then calls [`SharedIndex::complete`].
    pub fn open(root: &Path, limits: Limits, seed: u64) -> Result<(Self, bool), OpenError> {
        Self::open_announcing(root, limits, seed, &[])
    }

    /// The same; `writes` are announced before others can take a step.
    fn open_announcing(
        root: &Path,
        limits: Limits,
        seed: u64,
        writes: &[u64],
    ) -> Result<(Self, bool), OpenError> {
        let (storage, mut fresh) = Mapped::open(root, limits.max_size)?;
        let mut index = SharedIndex {
            cache: Cache::over(storage, limits),
        };
        if index.prepare(fresh, seed).is_err() {
            let full = || OpenError::from(rustix::io::Errno::NOSPC);
            if fresh {
                return Err(full());
            }
            // The header is right, but what it leads to is damaged.
            index.storage().reset()?;
            fresh = true;
            index.prepare(true, seed).map_err(|_| full())?;
        }
        index.cache.announce(writes);
        index.storage().end(true);
        Ok((index, fresh))
    }

    fn prepare(&mut self, fresh: bool, seed: u64) -> Result<()> {
        if fresh {
            self.storage().register();
            return self.cache.init(seed);
        }
        let mut dead = self.storage().dead();
        // The previous owner of this slot is dead too.
        dead.push(self.own_slot());
        self.cache.reclaim_dead(&dead)?;
        self.storage().register();
        Ok(())
    }

    fn storage(&mut self) -> &mut Mapped {
        &mut self.cache.arena.storage
    }

    /// Takes one step. `relax` is called while another process holds the lock.
    pub fn step<R>(
        &mut self,
        mut relax: impl FnMut(Duration),
        work: impl FnOnce(&mut Cache<Mapped, T>) -> Result<R>,
    ) -> Result<R, StepError> {
        self.lock(&mut relax)?;
        let result = self.begin().and_then(|()| work(&mut self.cache));
        self.end(result)
    }

    fn lock(&mut self, relax: &mut impl FnMut(Duration)) -> Result<(), StepError> {
        for attempt in 0..YIELDS + RETRIES {
            match self.storage().try_lock() {
                Ok(true) => return Ok(()),
                Ok(false) if attempt < YIELDS => std::thread::yield_now(),
                Ok(false) => relax(PAUSE),
                Err(_) => return Err(Error::Corrupt("lock: not available").into()),
            }
        }
        Err(StepError::Busy)
    }

    fn begin(&mut self) -> Result<()> {
        if self.storage().begin()? {
            self.cache.reset();
            self.storage().register();
            let writes = self.cache.writes();
            self.cache.announce(&writes);
        }
        Ok(())
    }

    fn end<R>(&mut self, result: Result<R>) -> Result<R, StepError> {
        let sound = !matches!(result, Err(Error::Corrupt(_)));
        self.storage().end(sound);
        Ok(result?)
    }

    /// Empties an index that is damaged or left by its rebuild owner. True asks the caller to
    /// rebuild it, as after [`SharedIndex::open`]; false says that another participant does.
    ///
    /// # Errors
    /// [`StepError::Busy`] where another process holds the lock; else the index cannot be used.
    pub fn restart(&mut self, seed: u64) -> Result<bool, StepError> {
        if self.storage().are_removed() {
            return self.reopen(seed);
        }
        self.lock(&mut |pause| std::thread::sleep(pause))?;
        let result = self.restart_locked(seed);
        self.end(result)
    }

    /// Opens new files in the place of those that were removed.
    fn reopen(&mut self, seed: u64) -> Result<bool, StepError> {
        let root = self.storage().root().to_owned();
        let writes = self.cache.writes();
        let opened = Self::open_announcing(&root, self.cache.limits(), seed, &writes);
        let (other, fresh) = opened.map_err(|_| Error::Full)?;
        self.cache.reset();
        self.storage().replace(other.cache.arena.storage);
        Ok(fresh)
    }

    fn restart_locked(&mut self, seed: u64) -> Result<bool> {
        // Another participant may have been faster.
        if self.begin().is_ok() && !self.storage().is_rebuild_abandoned() {
            return Ok(false);
        }
        // The maps may reach beyond the files now; they are not looked into before the next step.
        let reset = self.storage().reset();
        reset.map_err(|_| Error::Corrupt("index file: cannot be emptied"))?;
        self.cache.reset();
        self.storage().register();
        let writes = self.cache.writes();
        self.cache.announce(&writes);
        self.cache.init(seed)?;
        Ok(true)
    }

    /// Takes over from participants that have died. Returns their slots, and whether the rebuild was
    /// abandoned, so that [`SharedIndex::restart`] is due.
    ///
    /// # Errors
    /// [`StepError::Failed`] where a file was removed by which participants find each other.
    pub fn reap(&mut self) -> Result<(Vec<usize>, bool), StepError> {
        if self.storage().are_removed() {
            return Err(Error::Corrupt("index file: removed").into());
        }
        self.step(std::thread::sleep, |cache| {
            let dead = cache.arena.storage.dead();
            cache.reclaim_dead(&dead)?;
            Ok((dead, cache.arena.storage.is_rebuild_abandoned()))
        })
    }

    /// Whether there is no other live participant.
    pub fn alone(&mut self) -> Result<bool, StepError> {
        self.step(std::thread::sleep, |cache| {
            let storage = &cache.arena.storage;
            let live = storage.participants().iter().filter(|p| p.live != 0);
            Ok(live.count() == 1 + storage.dead().len())
        })
    }

    /// Everything that is in the directory was adopted.
    pub fn complete(&mut self) -> Result<(), StepError> {
        self.step(std::thread::sleep, |cache| {
            cache.arena.storage.complete();
            Ok(())
        })
    }

    /// See [`Locks`].
    #[must_use]
    pub fn locks(&self) -> Arc<Locks> {
        self.cache.arena.storage.locks()
    }

    /// A call that waits for the lock without using this index.
    pub fn waiter(&self) -> impl Fn() + Send + 'static {
        let path = self.cache.arena.storage.lock_path();
        move || Mapped::wait(&path)
    }

    /// The slot of this participant.
    #[must_use]
    pub fn own_slot(&self) -> usize {
        self.cache.arena.storage.own_slot()
    }
}
