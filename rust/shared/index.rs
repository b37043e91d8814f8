//! The index of a cache directory, and the lock around each of its steps.
//!
//! A step takes the lock, checks the files, sets the dirty mark, works, clears the mark and releases
//! the lock. A mark that is set when the lock is taken means that its owner died in the middle of a
//! step: the index is emptied and rebuilt from a scan of the directory. The scan holds no lock;
//! until it is complete the index rejects new values, because it does not know yet what is there.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::former::{Former, FormerValue};
use super::index_file::{FAULTED, REMOVED};
use super::lock_files::{Locks, OpenError};
use super::mapped::Mapped;
use super::step::DIED;
use crate::cache::{Cache, Limits, Peers, Slot, Tally, ToldAges};
use crate::error::{Error, Result};
use crate::policy::{Minimise, PolicyKind};

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
    pub(super) cache: Cache<Mapped, T>,
    /// What an index of an earlier boot has listed.
    former: Former,
}

/// How an index is opened.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// The bounds of this participant.
    pub limits: Limits,
    /// Of all hashes, if the index is new.
    pub seed: u64,
    /// Bytes of a block of the file system.
    pub unit: u64,
    /// Time that the lock is waited for.
    pub patience: Duration,
    /// In force until a participant asks for one, unless one has; see [`Cache::set_policy`].
    pub policy: (PolicyKind, Minimise),
    /// See [`Cache::use_policy`].
    pub uses_policy: bool,
    /// The sources of a pool that this participant has open; `None` where that is not said yet, and where all is of one source.
    pub ages: Option<ToldAges>,
    /// Whether the index is that of a pool, with values in segments.
    pub with_places: bool,
    /// See [`Cache::set_one_value_a_segment`].
    pub one_value_a_segment: bool,
}

impl Opening {
    /// Of an index of files that are counted in bytes, as soon as the lock is free.
    #[must_use]
    pub fn new(limits: Limits, seed: u64) -> Self {
        Opening {
            limits,
            seed,
            unit: 1,
            patience: Duration::MAX,
            policy: Default::default(),
            uses_policy: false,
            ages: None,
            with_places: false,
            one_value_a_segment: false,
        }
    }
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
    /// Opens the index below `root`, a directory that exists.
    ///
    /// The flag says that the index is new: the caller scans the directory, passes what it finds to
    /// [`Cache::adopt`], and then calls [`SharedIndex::complete`].
    ///
    /// # Errors
    /// [`OpenError::Busy`] where the lock was not free in time.
    pub fn open(root: &Path, opening: &Opening) -> Result<(Self, bool), OpenError> {
        Self::open_announcing(root, opening, &[], 0)
    }

    /// The same; `writes` are announced before others can take a step, and bytes that are promised.
    pub(super) fn open_announcing(
        root: &Path,
        opening: &Opening,
        writes: &[Slot],
        promised: u64,
    ) -> Result<(Self, bool), OpenError> {
        let Opening {
            limits,
            patience,
            with_places,
            ..
        } = *opening;
        let (storage, fresh) = Mapped::open(root, limits.max_size, patience, with_places)?;
        let mut index = SharedIndex {
            cache: Cache::over(storage, limits),
            former: Former::default(),
        };
        index
            .cache
            .set_one_value_a_segment(opening.one_value_a_segment);
        let begun = index.begin_announcing(fresh, opening, writes, promised);
        // Also of one that could not be opened.
        let outcome = begun.as_ref().map(drop).map_err(|_| DIED);
        let is_own = index.storage().end(outcome);
        let fresh = begun?;
        if !is_own {
            return Err(OpenError::Busy);
        }
        Ok((index, fresh))
    }

    /// Sees to it that the index can be used, with the lock of its files held; whether it is new.
    fn begin_announcing(
        &mut self,
        mut fresh: bool,
        opening: &Opening,
        writes: &[Slot],
        promised: u64,
    ) -> Result<bool, OpenError> {
        let Opening { seed, unit, .. } = *opening;
        let (kind, minimise) = opening.policy;
        self.cache.choose_policy(kind, minimise);
        self.storage().uses_policy = opening.uses_policy;
        self.storage().ages = opening.ages.unwrap_or(self.cache.told_ages());
        if self.storage().outdated {
            // What is damaged is no evidence.
            self.former = Former::of(&self.cache).unwrap_or_default();
            self.storage().reset()?;
        }
        if !self.cache.expect_unit(unit) && !fresh {
            // It counts in another way.
            self.storage().reset()?;
            fresh = true;
        }
        if let Err(error) = self.prepare(fresh, seed) {
            let refusal = |error| match error {
                Error::Refused(errno) => OpenError::from(errno),
                _ => OpenError::from(Errno::NOSPC),
            };
            if fresh {
                return Err(refusal(error));
            }
            if matches!(error, Error::Corrupt(_)) {
                // The header is right, but what it leads to is damaged.
                self.storage().set_damaged(true);
            }
            self.storage().reset()?;
            fresh = true;
            self.prepare(true, seed).map_err(refusal)?;
        }
        self.cache.offer_policy(kind, minimise);
        self.cache.announce(writes);
        self.cache.tell_promised(promised);
        self.cache.tell_absences();
        Ok(fresh)
    }

    fn prepare(&mut self, fresh: bool, seed: u64) -> Result<()> {
        if fresh {
            self.storage().register();
            return self.cache.init(seed);
        }
        let mut dead = self.storage().dead();
        // The previous owner of this slot is dead too.
        dead.push(self.own_slot());
        if self.storage().living().is_empty() && self.cache.needs_holes()? {
            return Err(Error::Lost("segments: of a place where holes can be made"));
        }
        self.cache.reclaim_dead(&dead)?;
        self.storage().register();
        Ok(())
    }

    pub(super) fn storage(&mut self) -> &mut Mapped {
        &mut self.cache.arena.storage
    }

    /// Takes one step. `relax` is called while another process holds the lock.
    pub fn step<R>(
        &mut self,
        mut relax: impl FnMut(Duration),
        work: impl FnOnce(&mut Cache<Mapped, T>) -> Result<R>,
    ) -> Result<R, StepError> {
        self.lock(&mut relax)?;
        let first = self.cache.next_reservation;
        let taken = AssertUnwindSafe(|| self.begin().and_then(|()| work(&mut self.cache)));
        let done = match catch_unwind(taken) {
            Ok(result) => self.end(result),
            Err(panic) => {
                // What it has left is damage. The others need not wait for the end of this process to make it anew.
                let _ = self.storage().end(Err(Error::Corrupt("a panic in a step")));
                resume_unwind(panic)
            }
        };
        if matches!(done, Err(StepError::Failed(error)) if error.is_fatal()) {
            self.cache.forget_reservations(first);
        }
        done
    }

    pub(super) fn lock(&mut self, relax: &mut impl FnMut(Duration)) -> Result<(), StepError> {
        // Once it is known that another process keeps it, waiting again costs only time.
        let was_held = self.storage().is_held();
        for attempt in 0..if was_held { 0 } else { YIELDS + RETRIES } {
            if self.storage().try_lock() {
                return Ok(());
            }
            if attempt < YIELDS {
                std::thread::yield_now();
            } else {
                relax(PAUSE);
            }
        }
        if self.storage().are_removed() {
            return Err(REMOVED.into());
        }
        let is_taken = self.storage().try_lock_or_take_over();
        self.storage().set_held(!is_taken);
        if is_taken {
            Ok(())
        } else {
            Err(StepError::Busy)
        }
    }

    pub(super) fn begin(&mut self) -> Result<()> {
        if self.storage().begin()? {
            self.cache.reset();
            self.storage().register();
            let writes = self.cache.writes();
            self.cache.announce(&writes);
        }
        self.cache.follow_policy();
        Ok(())
    }

    pub(super) fn end<R>(&mut self, result: Result<R>) -> Result<R, StepError> {
        let outcome = match &result {
            Err(error) if error.is_fatal() => Err(*error),
            _ => Ok(()),
        };
        if outcome.is_ok() && !self.storage().has_faulted() {
            self.cache.tell_absences();
        }
        if !self.storage().end(outcome) {
            return Err(Error::Lost("lock: taken over by another participant").into());
        }
        let result = result?;
        if self.storage().has_faulted() {
            return Err(FAULTED.into());
        }
        Ok(result)
    }

    /// Whether others who open the directory find this index now. A step alone looks only from time to time.
    pub fn is_in_place(&mut self) -> bool {
        !self.storage().are_removed()
    }

    /// Whether there is no other live participant.
    pub fn alone(&mut self) -> Result<bool, StepError> {
        self.step(std::thread::sleep, |cache| {
            let storage = &cache.arena.storage;
            let live = storage.participants().iter().filter(|p| p.live != 0);
            Ok(live.count() == 1 + storage.dead().len())
        })
    }

    /// What an index of an earlier boot has listed under this name in the cache store.
    #[must_use]
    pub fn formerly(&self, cache_key: &str) -> Option<FormerValue> {
        self.former.get(cache_key)
    }

    /// Everything that is in the directory was adopted. Comes to nothing where it had to be removed instead: see
    /// [`Cache::begins_empty`].
    pub fn complete(&mut self) -> Result<(), StepError> {
        self.complete_as(false)
    }

    /// Everything that was in the directory was removed.
    pub fn complete_empty(&mut self) -> Result<(), StepError> {
        self.complete_as(true)
    }

    fn complete_as(&mut self, is_emptied: bool) -> Result<(), StepError> {
        self.former = Former::default();
        self.step(std::thread::sleep, |cache| {
            cache.arena.storage.complete(is_emptied);
            Ok(())
        })
    }

    /// The cache, to be looked at without the lock of other processes: what it shows may change meanwhile.
    #[must_use]
    pub fn cache(&self) -> &Cache<Mapped, T> {
        &self.cache
    }

    /// The counters, to be read without the lock.
    #[must_use]
    pub fn tally(&self) -> Arc<Tally> {
        self.cache.tally()
    }

    /// See [`Locks`].
    #[must_use]
    pub fn locks(&self) -> Arc<Locks> {
        self.cache.arena.storage.locks()
    }

    /// A call that waits for the lock without using this index. Afterwards steps wait for it again.
    pub fn waiter(&self) -> impl Fn() + Send + 'static {
        let wait = self.cache.arena.storage.waiter();
        let locks = self.locks();
        move || {
            wait();
            locks.set_held(false);
        }
    }

    /// The slot of this participant.
    #[must_use]
    pub fn own_slot(&self) -> usize {
        self.cache.arena.storage.own_slot()
    }
}
