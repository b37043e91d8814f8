//! The fills of one cache directory, and the threads that do them.
//!
//! Each queue has threads of its own, so that a disk that hangs stops no other cache. They start when
//! there is work, end when there has been none for a while, and need no interpreter: bytes and payloads
//! that only an attached thread may drop are kept until such a thread calls.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::cache_dir::CacheDir;
use super::deferred::{Deferred, apply_all};
use super::fill::{Fill, Report};
use super::marks::look;
use crate::cache::ClosedFlight;
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

/// What a fill leaves behind, for an attached thread to drop.
#[derive(Debug)]
pub struct Leftovers<T, D> {
    data: Vec<D>,
    flights: Vec<ClosedFlight<T>>,
}

impl<T, D> Default for Leftovers<T, D> {
    fn default() -> Self {
        Leftovers {
            data: Vec::new(),
            flights: Vec::new(),
        }
    }
}

/// Called by a thread of the queue, without any lock, when there is no work left or a fill has failed.
pub type OnIdle<T, D> = Box<dyn Fn(Leftovers<T, D>) + Send + Sync>;

/// A queue of fills. Those that are in it when it is dropped are still done.
pub struct Fills<T: Clone + Send + 'static, D: AsRef<[u8]> + Send + 'static> {
    index: Arc<Locked<T>>,
    shared: Arc<Shared<T, D>>,
}

struct Shared<T, D> {
    dir: CacheDir,
    threads: usize,
    on_idle: OnIdle<T, D>,
    state: Mutex<State<T, D>>,
    /// There is work, or the queue is closing.
    work: Condvar,
    /// There is enough work for a batch, or a caller waits for what there is.
    enough: Condvar,
    /// A fill has ended.
    ended: Condvar,
    completed: AtomicU64,
    pending: AtomicUsize,
    pending_size: AtomicU64,
    /// Whether there is anything to collect.
    due: AtomicBool,
    /// Whether there are deferred updates.
    has_deferred: AtomicBool,
    /// After a fork: everything belongs to the parent.
    abandoned: AtomicBool,
}

/// Fills that a thread has taken, and their numbers.
struct Jobs<D> {
    numbers: Vec<u64>,
    fills: Vec<Fill<D>>,
}

struct State<T, D> {
    /// Only while there is work: an idle thread would keep an index open that no store uses any more.
    index: Option<Arc<Locked<T>>>,
    next: u64,
    jobs: VecDeque<(u64, Fill<D>)>,
    /// Threads, and those of them that wait for work.
    live: usize,
    idle: usize,
    /// Whether a thread has found work, and waits for more.
    gathering: bool,
    /// Callers that wait until something has ended.
    waiting: usize,
    closing: bool,
    /// Whether there was work since the owner was notified.
    worked: bool,
    /// Whether a thread is notifying the owner, and whether it has to do so once more.
    calling: bool,
    again: bool,
    results: Vec<(u64, Report)>,
    deferred: Vec<Deferred>,
    leftovers: Leftovers<T, D>,
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
        let state = State {
            index: None,
            next: 0,
            jobs: VecDeque::new(),
            live: 0,
            idle: 0,
            gathering: false,
            waiting: 0,
            closing: false,
            worked: false,
            calling: false,
            again: false,
            results: Vec::new(),
            deferred: Vec::new(),
            leftovers: Leftovers::default(),
        };
        let shared = Shared {
            dir,
            threads: threads.max(1),
            on_idle,
            state: Mutex::new(state),
            work: Condvar::new(),
            enough: Condvar::new(),
            ended: Condvar::new(),
            completed: AtomicU64::new(0),
            pending: AtomicUsize::new(0),
            pending_size: AtomicU64::new(0),
            due: AtomicBool::new(false),
            has_deferred: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        };
        Fills {
            index,
            shared: Arc::new(shared),
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
        let size = fill.data.as_ref().len() as u64;
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
        shared.pending.fetch_add(1, Ordering::Relaxed);
        shared.pending_size.fetch_add(size, Ordering::Relaxed);
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
        if shared.is_abandoned() || !shared.due.swap(false, Ordering::Acquire) {
            return Vec::new();
        }
        let mut state = shared.state();
        let results = std::mem::take(&mut state.results);
        let leftovers = std::mem::take(&mut state.leftovers);
        drop(state);
        drop(leftovers);
        results
    }

    /// Whether there are deferred updates.
    #[must_use]
    pub fn has_deferred(&self) -> bool {
        !self.shared.is_abandoned() && self.shared.has_deferred.load(Ordering::Acquire)
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
            if self.completed() > completed {
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
        self.shared.completed.load(Ordering::Acquire)
    }

    /// Fills that have not ended.
    #[must_use]
    pub fn pending(&self) -> usize {
        if self.shared.is_abandoned() {
            return 0;
        }
        self.shared.pending.load(Ordering::Acquire)
    }

    /// Bytes of the fills that have not ended.
    #[must_use]
    pub fn pending_size(&self) -> u64 {
        if self.shared.is_abandoned() {
            return 0;
        }
        self.shared.pending_size.load(Ordering::Acquire)
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

impl<T: Clone + Send + 'static, D: AsRef<[u8]> + Send + 'static> Shared<T, D> {
    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State<T, D>> {
        // Nothing in here panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self) -> Option<Arc<Locked<T>>> {
        self.state().index.clone()
    }

    /// Starts another thread, unless there are as many as there may be.
    fn start_thread(self: &Arc<Self>, state: &mut State<T, D>) -> io::Result<()> {
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
            if !state.gathering && !state.jobs.is_empty() {
                state = self.gather(state);
                let jobs = self.take_batch(&mut state.jobs);
                // What does not go with these waits for no disk that may hang.
                if !state.jobs.is_empty() {
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
            let quiet = state.worked && self.pending.load(Ordering::Relaxed) == 0;
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
            if !waited.timed_out() || !state.gathering && !state.jobs.is_empty() {
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
    fn take_batch(&self, jobs: &mut VecDeque<(u64, Fill<D>)>) -> Jobs<D> {
        let most = self.dir.values.most_at_once();
        let (mut numbers, mut fills) = (
            Vec::with_capacity(most),
            Vec::<Fill<D>>::with_capacity(most),
        );
        let mut size = 0u64;
        while let Some((_, next)) = jobs.front() {
            size = size.saturating_add(next.size());
            let fits = fills.len() < most && size <= LARGE;
            let goes_with_all = fills.iter().all(|fill| fill.goes_with(next));
            if !(fills.is_empty() || fits && goes_with_all) {
                break;
            }
            let Some((number, fill)) = jobs.pop_front() else {
                break;
            };
            numbers.push(number);
            fills.push(fill);
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
        let size = fills.iter().map(Fill::size).sum();
        let count = fills.len();
        let mut urgent = false;
        let mut state = self.state();
        for (number, report) in reports.take(count) {
            urgent |= report.ending.is_urgent();
            state.results.push((number, report));
        }
        state.deferred.extend(deferred);
        self.has_deferred
            .store(!state.deferred.is_empty(), Ordering::Release);
        state.leftovers.flights.extend(closed);
        let data = fills.into_iter().map(|fill| fill.data);
        state.leftovers.data.extend(data);
        state.worked = true;
        // First: who finds nothing pending collects all that there was.
        self.due.store(true, Ordering::Release);
        if self.pending.load(Ordering::Relaxed) == count && state.deferred.is_empty() {
            // And the index is not kept any more.
            state.index = None;
        }
        self.pending.fetch_sub(count, Ordering::AcqRel);
        self.pending_size.fetch_sub(size, Ordering::AcqRel);
        self.completed.fetch_add(count as u64, Ordering::AcqRel);
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
    fn apply_deferred(&self) {
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
        let has_deferred = !state.deferred.is_empty();
        let is_kept = has_deferred || self.pending.load(Ordering::Relaxed) != 0;
        state.index = is_kept.then_some(index);
        self.has_deferred.store(has_deferred, Ordering::Release);
    }
}
