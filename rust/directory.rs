//! The index of a cache directory, and the lock around each of its steps.
//!
//! A step takes the lock, looks whether the files can be used, sets the mark, works, takes the mark
//! away and gives the lock back. Whoever finds the mark set knows that its owner died in the middle
//! of a step: the index is emptied and filled again from a walk of the directory. The walk holds
//! no lock; until it is complete the index refuses new values, for it does not know yet what is
//! there.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::block::Block;
use crate::cache::{Cache, Limits};
use crate::error::{Fault, Res};
use crate::mapped::{Locks, Mapped, OpenError};

/// Times that a step looks for the lock, and only lets others run in between: a step takes less time
/// than the shortest sleep.
const YIELDS: u32 = 16;

/// Times that it looks again, with pauses, before it says that it is busy. A step takes
/// microseconds, so whoever does not get the lock within a millisecond waits for one that is stopped.
const TRIES: u32 = 40;
const PAUSE: Duration = Duration::from_micros(25);

/// An index in a directory.
#[derive(Debug)]
pub struct Directory<T> {
    cache: Cache<Mapped, T>,
}

/// Why a step could not be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepError {
    /// Somebody else has the lock, for longer than a step takes.
    Busy,
    /// The index cannot be used; see [`Directory::restart`].
    Fault(Fault),
}

impl From<Fault> for StepError {
    fn from(fault: Fault) -> Self {
        StepError::Fault(fault)
    }
}

impl<T: Clone> Directory<T> {
    /// Opens the index below `root`, a directory that exists. Waits for the lock.
    ///
    /// The flag says that the index is new: the caller walks the directory, gives what it finds to
    /// `adopt`, and then calls [`Directory::complete`].
    pub fn open(root: &Path, limits: Limits, seed: u64) -> Result<(Self, bool), OpenError> {
        Self::open_and(root, limits, seed, |_cache| {})
    }

    /// The same, and `then` before others can take a step.
    fn open_and(
        root: &Path,
        limits: Limits,
        seed: u64,
        then: impl FnOnce(&mut Cache<Mapped, T>),
    ) -> Result<(Self, bool), OpenError> {
        let (block, fresh) = Mapped::open(root, limits.max_size)?;
        let mut directory = Directory {
            cache: Cache::over(block, limits),
        };
        let sound = match directory.prepare(fresh, seed) {
            Ok(()) => true,
            // What looked right at first was not.
            Err(_) if !fresh => {
                directory.block().reset()?;
                if directory.prepare(true, seed).is_err() {
                    return Err(rustix::io::Errno::NOSPC.into());
                }
                false
            }
            Err(_) => return Err(rustix::io::Errno::NOSPC.into()),
        };
        then(&mut directory.cache);
        directory.block().end(true);
        Ok((directory, fresh || !sound))
    }

    fn prepare(&mut self, fresh: bool, seed: u64) -> Res<()> {
        if fresh {
            self.block().register();
            return self.cache.init(seed);
        }
        let mut dead = self.block().dead();
        // Whoever had this place before is dead too.
        dead.push(self.place());
        self.cache.bury(&dead)?;
        self.block().register();
        Ok(())
    }

    fn block(&mut self) -> &mut Mapped {
        &mut self.cache.cells.block
    }

    /// Takes one step. `relax` is called while somebody else has the lock.
    pub fn step<R>(
        &mut self,
        mut relax: impl FnMut(Duration),
        work: impl FnOnce(&mut Cache<Mapped, T>) -> Res<R>,
    ) -> Result<R, StepError> {
        self.lock(&mut relax)?;
        let result = self.begin().and_then(|()| work(&mut self.cache));
        self.block().end(!matches!(result, Err(Fault::Corrupt(_))));
        Ok(result?)
    }

    fn lock(&mut self, relax: &mut impl FnMut(Duration)) -> Result<(), StepError> {
        for attempt in 0..YIELDS + TRIES {
            match self.block().try_lock() {
                Ok(true) => return Ok(()),
                Ok(false) if attempt < YIELDS => std::thread::yield_now(),
                Ok(false) => relax(PAUSE),
                Err(_) => return Err(Fault::Corrupt("the lock of the index does not work").into()),
            }
        }
        Err(StepError::Busy)
    }

    fn begin(&mut self) -> Res<()> {
        if self.block().begin()? {
            self.cache.renew();
            self.block().register();
            self.cache.mark_writes();
        }
        Ok(())
    }

    /// Empties an index that cannot be used any more, or whose rebuilder has died. True asks the
    /// caller to fill it, as after [`Directory::open`]; false says that somebody else does.
    ///
    /// # Errors
    /// [`StepError::Busy`] where somebody else has the lock; else the index cannot be used at all.
    pub fn restart(&mut self, seed: u64) -> Result<bool, StepError> {
        if self.block().is_gone() {
            return self.reopen(seed);
        }
        self.lock(&mut |pause| std::thread::sleep(pause))?;
        let result = self.restart_locked(seed);
        self.block().end(!matches!(result, Err(Fault::Corrupt(_))));
        Ok(result?)
    }

    /// Opens the files anew that somebody has removed.
    fn reopen(&mut self, seed: u64) -> Result<bool, StepError> {
        let root = self.block().root().to_owned();
        let writes = self.cache.writes();
        let mark = |cache: &mut Cache<Mapped, T>| cache.mark_all(&writes);
        let opened = Directory::<T>::open_and(&root, self.cache.limits(), seed, mark);
        let (directory, fresh) = opened.map_err(|_| Fault::Full)?;
        self.cache.renew();
        self.block().replace(directory.cache.cells.block);
        Ok(fresh)
    }

    fn restart_locked(&mut self, seed: u64) -> Res<bool> {
        // Somebody else may have been faster.
        if self.begin().is_ok() && !self.block().is_left_empty() {
            return Ok(false);
        }
        // The maps may reach beyond the files now: until the next step nobody looks into them.
        let why = Fault::Corrupt("the index cannot be emptied");
        self.block().reset().map_err(|_| why)?;
        self.cache.renew();
        self.block().register();
        self.cache.mark_writes();
        self.cache.init(seed)?;
        Ok(true)
    }

    /// Takes over from participants that have died. Returns their places, and whether whoever was
    /// filling the index has died, now or before, so that [`Directory::restart`] is due.
    ///
    /// # Errors
    /// [`StepError::Fault`] where somebody has removed a file, by which others would tell who works here.
    pub fn reap(&mut self) -> Result<(Vec<usize>, bool), StepError> {
        if self.block().is_gone() {
            return Err(Fault::Corrupt("a file of the index was removed").into());
        }
        self.step(std::thread::sleep, |cache| {
            let dead = cache.cells.block.dead();
            cache.bury(&dead)?;
            Ok((dead, cache.cells.block.is_left_empty()))
        })
    }

    /// Whether there is no other live participant.
    pub fn alone(&mut self) -> Result<bool, StepError> {
        self.step(std::thread::sleep, |cache| {
            let block = &cache.cells.block;
            let live = block.participants().iter().filter(|p| p.live != 0).count();
            Ok(live == 1 + block.dead().len())
        })
    }

    /// Says that everything that is in the directory was adopted.
    pub fn complete(&mut self) -> Result<(), StepError> {
        self.step(std::thread::sleep, |cache| {
            cache.cells.block.complete();
            Ok(())
        })
    }

    /// See [`Locks`].
    #[must_use]
    pub fn locks(&self) -> Arc<Locks> {
        self.cache.cells.block.locks()
    }

    /// Where to wait for the lock without holding up anybody.
    pub fn waiter(&self) -> impl Fn() + Send + 'static {
        let path = self.cache.cells.block.lock_path();
        move || Mapped::wait(&path)
    }

    /// The place of this participant.
    #[must_use]
    pub fn place(&self) -> usize {
        self.cache.cells.block.me()
    }
}
