//! The threads that do the fills of one cache directory.
//!
//! Each queue has threads of its own, so that a disk that hangs stops no other cache. They start when
//! there is work, end when there has been none for a while, and need no interpreter: bytes and payloads
//! that only an attached thread may drop are kept until such a thread calls.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::state::{Glimpse, Leftovers, State};
use crate::cache::ClosedFlight;
use crate::disk::batch::Batch;
use crate::disk::cache_dir::CacheDir;
use crate::disk::deferred::{Deferred, apply_all};
use crate::disk::fill::{Fill, Report};
use crate::shared::Locked;

/// Time that a thread waits for more values, so that they are written at once, unless a caller waits for them.
const GATHER: Duration = Duration::from_millis(1);
/// Time without work after which the owner is notified.
const QUIET: Duration = Duration::from_millis(50);
/// Pause between two tries to make deferred updates.
const AGAIN: Duration = Duration::from_millis(250);
/// Time without work after which a thread ends.
const LINGER: Duration = Duration::from_secs(5);

/// Bytes of the values of one batch, unless it is a single one: others wait while they are written.
const LARGE: u64 = 2 << 20;

/// Called by a thread of the queue, without any lock, when there is no work left or a fill has failed.
pub type OnIdle<T, D> = Box<dyn Fn(Leftovers<T, D>) + Send + Sync>;

/// What the owner of a queue shares with its threads.
pub(super) struct Shared<T, D> {
    pub(super) dir: CacheDir,
    threads: usize,
    on_idle: OnIdle<T, D>,
    state: Mutex<State<T, D>>,
    pub(super) glimpse: Glimpse,
    /// There is work, or the queue is closing.
    pub(super) work: Condvar,
    /// There is enough work for a batch, or a caller waits for what there is.
    pub(super) enough: Condvar,
    /// A fill has ended.
    pub(super) ended: Condvar,
    /// After a fork: everything belongs to the parent.
    pub(super) abandoned: AtomicBool,
}

/// Fills that a thread has taken, and their numbers.
struct Jobs<D> {
    numbers: Vec<u64>,
    fills: Vec<Fill<D>>,
}

impl<T: Clone + Send + 'static, D: AsRef<[u8]> + Send + 'static> Shared<T, D> {
    /// Without work. It uses up to this many threads.
    pub(super) fn new(dir: CacheDir, threads: usize, on_idle: OnIdle<T, D>) -> Self {
        Shared {
            dir,
            threads: threads.max(1),
            on_idle,
            state: Mutex::new(State::new()),
            glimpse: Glimpse::default(),
            work: Condvar::new(),
            enough: Condvar::new(),
            ended: Condvar::new(),
            abandoned: AtomicBool::new(false),
        }
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State<T, D>> {
        // Nothing in here panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self) -> Option<Arc<Locked<T>>> {
        self.state().index.clone()
    }

    /// Starts another thread, unless there are as many as there may be.
    pub(super) fn start_thread(self: &Arc<Self>, state: &mut State<T, D>) -> io::Result<()> {
        if state.live < self.threads {
            let mine = Arc::clone(self);
            let thread = thread::Builder::new().name("zcache-fill".to_owned());
            thread.spawn(move || mine.work())?;
            state.live += 1;
        }
        Ok(())
    }

    /// The life of a thread.
    fn work(self: &Arc<Self>) {
        while let Some(jobs) = self.next_jobs() {
            self.apply_deferred();
            self.run(jobs);
        }
        self.apply_deferred();
    }

    fn next_jobs(self: &Arc<Self>) -> Option<Jobs<D>> {
        let mut state = self.state();
        loop {
            if state.has_work() {
                state = self.gather(state);
                let jobs = self.take_batch(&mut state);
                // What does not go with these waits for no disk that may hang.
                if state.has_work() {
                    if state.idle > 0 {
                        self.work.notify_one();
                    } else {
                        let _ = self.start_thread(&mut state);
                    }
                }
                return Some(jobs);
            }
            if state.closing {
                state.live -= 1;
                return None;
            }
            let quiet = state.worked && state.pending == 0;
            let has_deferred = !state.deferred.is_empty();
            let longest = match (quiet, has_deferred) {
                (true, _) => QUIET,
                (false, true) => AGAIN,
                (false, false) => LINGER,
            };
            state.idle += 1;
            let woken = self.work.wait_timeout(state, longest);
            let (again, waited) = woken.unwrap_or_else(PoisonError::into_inner);
            state = again;
            state.idle -= 1;
            if !waited.timed_out() || state.has_work() {
                continue;
            }
            if !quiet && !has_deferred {
                state.live -= 1;
                return None;
            }
            let tells = quiet && std::mem::take(&mut state.worked);
            drop(state);
            self.apply_deferred();
            if tells {
                self.call();
            }
            state = self.state();
        }
    }

    /// Waits for more work, where there is less than a batch.
    fn gather<'a>(&self, mut state: MutexGuard<'a, State<T, D>>) -> MutexGuard<'a, State<T, D>> {
        let most = self.dir.values.most_at_once();
        state.gathering = true;
        let begun = Instant::now();
        while state.jobs.len() < most && state.waiting == 0 && !state.closing {
            let left = GATHER.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break;
            }
            let woken = self.enough.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.gathering = false;
        state
    }

    /// Takes fills that can be done at once.
    fn take_batch(&self, state: &mut State<T, D>) -> Jobs<D> {
        let most = self.dir.values.most_at_once();
        let (mut numbers, mut fills) = (
            Vec::with_capacity(most),
            Vec::<Fill<D>>::with_capacity(most),
        );
        let (mut size, mut place) = (0u64, 0);
        while let Some(next) = state.next_from(place) {
            place = next;
            let Some((number, fill)) = state.jobs.get(place) else {
                break;
            };
            size = size.saturating_add(fill.size());
            let fits = fills.len() < most && size <= LARGE;
            let goes_with_all =
                |first: &Fill<D>| fits && first.min_free_space == fill.min_free_space;
            if !fills.first().is_none_or(goes_with_all) {
                break;
            }
            numbers.push(*number);
            state.under_way.insert(fill.name());
            fills.extend(state.jobs.remove(place).map(|(_, fill)| fill));
        }
        Jobs { numbers, fills }
    }

    fn run(&self, jobs: Jobs<D>) {
        let Jobs { numbers, mut fills } = jobs;
        let mut numbers = numbers.into_iter();
        while !fills.is_empty() {
            let Some(index) = self.index() else {
                return; // It is kept until these are done.
            };
            let mut batch = Batch::new(&index, &self.dir, &fills);
            // A panic would leave the fills unfinished forever.
            if catch_unwind(AssertUnwindSafe(|| batch.run())).is_err() {
                let _ = catch_unwind(AssertUnwindSafe(|| batch.end()));
            }
            let reports = batch.reports();
            let Batch {
                deferred, closed, ..
            } = batch;
            drop(index);
            let rest = fills.split_off(reports.len().clamp(1, fills.len()));
            self.note_done(numbers.by_ref().zip(reports), fills, deferred, closed);
            fills = rest;
        }
    }

    fn note_done(
        &self,
        reports: impl Iterator<Item = (u64, Report)>,
        fills: Vec<Fill<D>>,
        deferred: Vec<Deferred>,
        closed: Vec<ClosedFlight<T>>,
    ) {
        let size: u64 = fills.iter().map(Fill::size).sum();
        let count = fills.len();
        let mut urgent = false;
        let mut state = self.state();
        for fill in &fills {
            state.under_way.remove(&fill.name());
        }
        for (number, report) in reports.take(count) {
            urgent |= report.ending.is_urgent();
            state.results.push((number, report));
        }
        state.deferred.extend(deferred);
        state.leftovers.flights.extend(closed);
        let data = fills.into_iter().map(|fill| fill.data);
        state.leftovers.data.extend(data);
        state.worked = true;
        state.due = true;
        state.pending -= count;
        state.pending_size -= size;
        state.completed += count as u64;
        if state.pending == 0 && state.deferred.is_empty() {
            // And the index is not kept any more.
            state.index = None;
        }
        self.glimpse.store(&state);
        let is_awaited = state.waiting > 0;
        drop(state);
        if is_awaited {
            self.ended.notify_all();
        }
        if urgent {
            self.call();
        }
    }

    /// Notifies the owner from one thread at a time; other threads have it call once more.
    fn call(&self) {
        let mut state = self.state();
        if state.calling {
            state.again = true;
            return;
        }
        state.calling = true;
        loop {
            let leftovers = std::mem::take(&mut state.leftovers);
            let closing = state.closing;
            drop(state);
            if closing {
                drop(leftovers);
            } else {
                (self.on_idle)(leftovers);
            }
            state = self.state();
            if !std::mem::take(&mut state.again) {
                state.calling = false;
                return;
            }
        }
    }

    /// Tries to make the deferred updates.
    pub(super) fn apply_deferred(&self) {
        let mut state = self.state();
        if state.deferred.is_empty() {
            return;
        }
        let Some(index) = state.index.clone() else {
            return; // It is kept until these are made.
        };
        let mut rest = std::mem::take(&mut state.deferred);
        drop(state);
        let mut closed = Vec::new();
        let _ = apply_all(&index, &mut rest, &mut closed);
        let mut state = self.state();
        // Before updates that other threads have deferred meanwhile.
        rest.append(&mut state.deferred);
        state.deferred = rest;
        state.leftovers.flights.extend(closed);
        // Another thread may have found nothing deferred.
        let is_kept = !state.deferred.is_empty() || state.pending != 0;
        state.index = is_kept.then_some(index);
        self.glimpse.store(&state);
    }
}
