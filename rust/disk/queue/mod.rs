//! The fills of one cache directory, as their owner sees them: what it hands over, and what has become of it.

mod state;
mod worker;

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

pub use self::state::Leftovers;
pub use self::worker::OnIdle;
use self::worker::Shared;
use super::cache_dir::CacheDir;
use super::fill::{Fill, Report};
use super::marks::look;
use crate::shared::Locked;

/// A queue of fills. Those that are in it when it is dropped are still done.
pub struct Fills<T: Clone + Send + 'static, D: AsRef<[u8]> + Send + 'static> {
    index: Arc<Locked<T>>,
    shared: Arc<Shared<T, D>>,
}

impl<T: Clone + Send + 'static, D: AsRef<[u8]> + Send + 'static> Fills<T, D> {
    /// A queue without work. It uses up to this many threads.
    #[must_use]
    pub fn new(
        index: Arc<Locked<T>>,
        dir: CacheDir,
        threads: usize,
        on_idle: OnIdle<T, D>,
    ) -> Self {
        Fills {
            index,
            shared: Arc::new(Shared::new(dir, threads, on_idle)),
        }
    }

    /// Submits a value; the number is that of its report.
    ///
    /// # Errors
    ///
    /// Where no thread can be started, or after a fork. Nothing has changed then.
    pub fn submit(&self, fill: Fill<D>) -> io::Result<u64> {
        let shared = &self.shared;
        if shared.is_abandoned() {
            return Err(io::Error::other("the queue belongs to the parent process"));
        }
        let size = fill.size();
        let mut state = shared.state();
        let number = state.next;
        state.jobs.push_back((number, fill));
        let most = shared.dir.values.most_at_once();
        let at_hand = state.idle + usize::from(state.gathering);
        if state.jobs.len() > at_hand * most
            && let Err(error) = shared.start_thread(&mut state)
            // Else fewer threads will do.
            && state.live == 0
        {
            let job = state.jobs.pop_back();
            drop(state);
            drop(job);
            return Err(error);
        }
        state.index.get_or_insert_with(|| Arc::clone(&self.index));
        state.next += 1;
        state.pending += 1;
        state.pending_size += size;
        shared.glimpse.store(&state);
        let leftovers = std::mem::take(&mut state.leftovers);
        let is_enough = state.gathering && state.jobs.len() >= most;
        let wakes = !state.gathering && state.idle > 0;
        drop(state);
        if is_enough {
            shared.enough.notify_one();
        } else if wakes {
            shared.work.notify_one();
        }
        drop(leftovers);
        Ok(number)
    }

    /// What has ended since the last call. Never waits. To be called by an attached thread.
    pub fn collect(&self) -> Vec<(u64, Report)> {
        let shared = &self.shared;
        if shared.is_abandoned() || !shared.glimpse.is_due() {
            return Vec::new();
        }
        let mut state = shared.state();
        state.due = false;
        shared.glimpse.store(&state);
        let results = std::mem::take(&mut state.results);
        let leftovers = std::mem::take(&mut state.leftovers);
        drop(state);
        drop(leftovers);
        results
    }

    /// Whether there are deferred updates.
    #[must_use]
    pub fn has_deferred(&self) -> bool {
        !self.shared.is_abandoned() && self.shared.glimpse.has_deferred()
    }

    /// Tries to make the deferred updates. Waits for threads of this process only, never for another
    /// process; to be called by a thread that is not attached.
    pub fn apply_deferred(&self) {
        if self.has_deferred() {
            self.shared.apply_deferred();
        }
    }

    /// Looks for marks of others; see [`CacheDir::marked_by`]. To be called by a thread that is not attached.
    pub fn look(&self) {
        let shared = &self.shared;
        if !shared.is_abandoned() {
            // Where it cannot be noted now, the next commit looks again.
            let _ = look(&self.index, &shared.dir);
        }
    }

    /// Waits until more than this many have ended, and returns whether they have.
    pub fn wait(&self, completed: u64, timeout: Duration) -> bool {
        let shared = &self.shared;
        let begun = Instant::now();
        if shared.is_abandoned() {
            return false;
        }
        let mut state = shared.state();
        state.waiting += 1;
        if state.gathering {
            shared.enough.notify_one();
        }
        let has_ended = loop {
            if state.completed > completed {
                break true;
            }
            let left = timeout.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break false;
            }
            let woken = shared.ended.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.waiting -= 1;
        has_ended
    }

    /// Fills that have ended, since the beginning.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.shared.glimpse.completed()
    }

    /// Fills that have not ended.
    #[must_use]
    pub fn pending(&self) -> usize {
        if self.shared.is_abandoned() {
            return 0;
        }
        self.shared.glimpse.pending()
    }

    /// Bytes of the fills that have not ended.
    #[must_use]
    pub fn pending_size(&self) -> u64 {
        if self.shared.is_abandoned() {
            return 0;
        }
        self.shared.glimpse.pending_size()
    }

    /// Whether it was abandoned.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.shared.is_abandoned()
    }

    /// In a forked child: leaves everything to the parent. A thread of the parent may hold the lock, so
    /// what it guards is never dropped.
    pub fn abandon(&self) {
        if !self.shared.abandoned.swap(true, Ordering::AcqRel) {
            std::mem::forget(Arc::clone(&self.shared));
        }
    }
}

impl<T: Clone + Send + 'static, D: AsRef<[u8]> + Send + 'static> Drop for Fills<T, D> {
    fn drop(&mut self) {
        if !self.shared.is_abandoned() {
            self.shared.state().closing = true;
            self.shared.work.notify_all();
            self.shared.enough.notify_all();
        }
    }
}
