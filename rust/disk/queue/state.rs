//! What is known of the fills of a queue, and what of it is seen without the lock.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use foldhash::fast::RandomState;

use crate::cache::ClosedFlight;
use crate::disk::deferred::Deferred;
use crate::disk::fill::{Fill, Report};
use crate::shared::Locked;

/// What a fill leaves behind, for an attached thread to drop.
#[derive(Debug)]
pub struct Leftovers<T, D> {
    pub(super) data: Vec<D>,
    pub(super) flights: Vec<ClosedFlight<T>>,
}

impl<T, D> Default for Leftovers<T, D> {
    fn default() -> Self {
        Leftovers {
            data: Vec::new(),
            flights: Vec::new(),
        }
    }
}

/// What the owner of a queue and its threads share, below their lock.
pub(super) struct State<T, D> {
    /// Only while there is work: an idle thread would keep an index open that no store uses any more.
    pub(super) index: Option<Arc<Locked<T>>>,
    pub(super) next: u64,
    pub(super) jobs: VecDeque<(u64, Fill<D>)>,
    /// The names of the fills that threads have taken. Those of one name are done one after the other, as they came:
    /// the index refuses a value of which another one is being written.
    pub(super) under_way: HashSet<u64, RandomState>,
    /// Threads, and those of them that wait for work.
    pub(super) live: usize,
    pub(super) idle: usize,
    /// Whether a thread has found work, and waits for more.
    pub(super) gathering: bool,
    /// Callers that wait until something has ended.
    pub(super) waiting: usize,
    pub(super) closing: bool,
    /// Whether there was work since the owner was notified.
    pub(super) worked: bool,
    /// Whether a thread is notifying the owner, and whether it has to do so once more.
    pub(super) calling: bool,
    pub(super) again: bool,
    /// Fills that have not ended, and their bytes.
    pub(super) pending: usize,
    pub(super) pending_size: u64,
    /// Fills that have ended, since the beginning.
    pub(super) completed: u64,
    /// Whether there is anything to collect.
    pub(super) due: bool,
    pub(super) results: Vec<(u64, Report)>,
    pub(super) deferred: Vec<Deferred>,
    pub(super) leftovers: Leftovers<T, D>,
}

impl<T, D> State<T, D> {
    pub(super) fn new() -> Self {
        State {
            index: None,
            next: 0,
            jobs: VecDeque::new(),
            under_way: HashSet::default(),
            live: 0,
            idle: 0,
            gathering: false,
            waiting: 0,
            closing: false,
            worked: false,
            calling: false,
            again: false,
            pending: 0,
            pending_size: 0,
            completed: 0,
            due: false,
            results: Vec::new(),
            deferred: Vec::new(),
            leftovers: Leftovers::default(),
        }
    }

    /// The place of the first fill that waits for no other one, from this place on.
    pub(super) fn next_from(&self, place: usize) -> Option<usize> {
        let mut rest = self.jobs.iter().skip(place);
        let found = rest.position(|(_, fill)| !self.under_way.contains(&fill.name()));
        Some(place + found?)
    }

    /// Whether there is a fill for a thread to take.
    pub(super) fn has_work(&self) -> bool {
        !self.gathering && self.next_from(0).is_some()
    }
}

/// What is seen of the state without its lock: as it was when it was last changed.
#[derive(Default)]
pub(super) struct Glimpse {
    due: AtomicBool,
    has_deferred: AtomicBool,
    pending: AtomicUsize,
    pending_size: AtomicU64,
    completed: AtomicU64,
}

impl Glimpse {
    /// To be called by the holder of the lock.
    pub(super) fn store<T, D>(&self, state: &State<T, D>) {
        // First: who finds nothing pending collects all that there was.
        self.due.store(state.due, Ordering::Release);
        let has_deferred = !state.deferred.is_empty();
        self.has_deferred.store(has_deferred, Ordering::Release);
        self.pending.store(state.pending, Ordering::Release);
        self.pending_size
            .store(state.pending_size, Ordering::Release);
        self.completed.store(state.completed, Ordering::Release);
    }

    pub(super) fn is_due(&self) -> bool {
        self.due.load(Ordering::Acquire)
    }

    pub(super) fn has_deferred(&self) -> bool {
        self.has_deferred.load(Ordering::Acquire)
    }

    pub(super) fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }

    pub(super) fn pending_size(&self) -> u64 {
        self.pending_size.load(Ordering::Acquire)
    }

    pub(super) fn completed(&self) -> u64 {
        self.completed.load(Ordering::Acquire)
    }
}
