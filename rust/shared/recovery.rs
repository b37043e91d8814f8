//! What a participant does about an index that is damaged, removed, or left by the dead.

use std::time::Duration;

use super::index::{Opening, SharedIndex, StepError};
use super::index_file::{errno_of, refused};
use super::lock_files::{OpenError, has_former_participant};
use crate::arena::Storage;
use crate::cache::Flights;
use crate::error::{Error, Result};

/// Time that the lock of new files is waited for which take the place of removed ones: all threads of
/// this process wait as well.
const REOPEN_PATIENCE: Duration = Duration::from_millis(4);

impl<T: Clone> SharedIndex<T> {
    /// Empties an index that is damaged or left by its rebuild owner. True asks the caller to
    /// rebuild it, as after [`SharedIndex::open`]; false says that another participant does.
    ///
    /// # Errors
    /// [`StepError::Busy`] where another process holds the lock; else the index cannot be used.
    pub fn restart(&mut self, seed: u64) -> Result<bool, StepError> {
        if self.storage().are_removed() {
            return self.reopen(seed);
        }
        // One of the former format has made files of its own, and would not know of ours.
        if has_former_participant(self.storage().root()).unwrap_or(false) {
            return Err(StepError::Busy);
        }
        self.lock(&mut |pause| std::thread::sleep(pause))?;
        let result = self.restart_locked(seed);
        self.end(result)
    }

    /// Comes back after a time in which this participant did without the index. Whether it is to be
    /// rebuilt, as after [`SharedIndex::restart`]; and the flights, with payloads that the caller has to
    /// drop, also where it could not come back.
    pub fn rejoin(&mut self, seed: u64) -> (Result<bool, StepError>, Flights<T>) {
        let flights = self.cache.take_flights();
        (self.rejoin_without_flights(seed), flights)
    }

    fn rejoin_without_flights(&mut self, seed: u64) -> Result<bool, StepError> {
        let fresh = self.restart(seed)?;
        if !fresh {
            self.step(std::thread::sleep, |cache| {
                cache.rejoin()?;
                cache.arena.storage.register();
                cache.announce(&[]);
                Ok(())
            })?;
        }
        Ok(fresh)
    }

    /// Opens new files in the place of those that were removed.
    fn reopen(&mut self, seed: u64) -> Result<bool, StepError> {
        let root = self.storage().root().to_owned();
        let writes = self.cache.writes();
        let opening = Opening {
            unit: self.cache.unit(),
            patience: REOPEN_PATIENCE,
            policy: self.cache.wanted_policy(),
            uses_policy: self.storage().uses_policy,
            ages: self.storage().has_sources().then(|| self.cache.told_ages()),
            with_places: self.storage().has_places(),
            one_value_a_segment: self.cache.has_one_value_a_segment(),
            ..Opening::new(self.cache.limits(), seed)
        };
        self.cache.reset();
        let promised = self.cache.promised();
        let opened = Self::open_announcing(&root, &opening, &writes, promised);
        let (other, fresh) = opened.map_err(|error| match error {
            OpenError::Busy => StepError::Busy,
            OpenError::Io(error) => refused(error).into(),
            OpenError::Crowded | OpenError::Unsuitable(_) => Error::Full.into(),
        })?;
        self.storage().replace(other.cache.arena.storage);
        self.cache.follow_policy();
        Ok(fresh)
    }

    fn restart_locked(&mut self, seed: u64) -> Result<bool> {
        self.storage().look_at_files();
        // Another participant may have been faster.
        match self.begin() {
            Ok(()) if !self.storage().is_rebuild_abandoned() => return Ok(false),
            Err(Error::Corrupt(_)) => self.storage().set_damaged(true),
            _ => {}
        }
        // The maps may reach beyond the files now; they are not looked into before the next step.
        let reset = self.storage().reset();
        reset.map_err(|error| Error::Unusable("index file: cannot be emptied", errno_of(error)))?;
        self.cache.reset();
        self.storage().register();
        let writes = self.cache.writes();
        self.cache.announce(&writes);
        self.cache.init(seed)?;
        self.cache.follow_policy();
        Ok(true)
    }

    /// Takes over from participants that have died. Returns their slots, and whether the rebuild was
    /// abandoned, so that [`SharedIndex::restart`] is due.
    ///
    /// # Errors
    /// [`StepError::Failed`] where a file was removed by which participants find each other.
    pub fn reap(&mut self) -> Result<(Vec<usize>, bool), StepError> {
        if self.storage().are_removed() {
            return Err(Error::Lost("index file: removed").into());
        }
        self.step(std::thread::sleep, |cache| {
            let dead = cache.arena.storage.dead();
            cache.reclaim_dead(&dead)?;
            // A file system that refuses that makes no difference now.
            let _ = cache.arena.storage.keep_young();
            Ok((dead, cache.arena.storage.is_rebuild_abandoned()))
        })
    }
}
