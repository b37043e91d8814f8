//! Whole fills of a cache directory: reserve, delete victims, write, commit; several at once in a pool.
//!
//! ```text
//! reserve ─▶ rejected
//!    │ ▲
//!    ▼ └──── advance ◀── delete the victims
//! granted ─▶ space on the volume? ─▶ write ─▶ commit ─▶ seal
//! ```
//!
//! Each arrow is one step of the index, or one round of calls of the file system, for all fills of a batch. The lock
//! of the index is held for one step at a time, never over I/O. However a fill ends, its reservation ends and its
//! flight is closed. Where the index is busy, that is left as deferred updates, which any thread can apply later.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use super::cache_dir::{CacheDir, Leftover};
use super::deferred::{Deferred, POISONED, apply_all, step};
use super::fill::{Ending, Fill, Report};
use super::marks::has_neighbours;
use super::values::Written;
use crate::cache::{Cache, ClosedFlight, Peers, Placed, RejectReason, Reserve, Victim};
use crate::error::Result;
use crate::policy::Eviction;
use crate::shared::{Locked, StepError};

/// The part of the bound that the fills of one batch reserve at most, unless it is a single one.
const PART: u64 = 64;
/// Times that one batch frees space on the volume.
pub(super) const ROUNDS: u32 = 16;
/// Time that one batch waits for the lock of the index, in all.
const RETRY_TIME: Duration = Duration::from_secs(1);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(5);

pub(super) const SINCE_EMPTIED: &str = "the index was emptied meanwhile";
pub(super) const NEIGHBOURS: &str = "others share an index that this process does not use";
const PANICKED: &str = "a fill has panicked";

/// What the index says of one fill, and where that writes its bytes, in a pool.
pub(super) type Answer = (Reserve, Option<Placed>);

/// How far a fill has come.
pub(super) struct Progress {
    /// Its reservation, until that ends.
    pub(super) reservation: Option<u64>,
    /// Where it writes its bytes, in a pool.
    pub(super) placed: Option<Placed>,
    /// Whether none of the bytes that it has written are left.
    pub(super) gone: bool,
    /// Whether its flight is open.
    pub(super) flight_open: bool,
    pub(super) ending: Option<Ending>,
}

impl Progress {
    fn new() -> Self {
        Progress {
            reservation: None,
            placed: None,
            gone: true,
            flight_open: true,
            ending: None,
        }
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.ending.is_none()
    }
}

/// A value that is written, and not committed: the number of its fill in the batch, and its name.
pub(super) type NewlyWritten = (usize, String, Written);

/// What the index says of fills, by their numbers.
pub(super) type Answers = Vec<(usize, Answer)>;

/// A fill that waits for deletes: its number in the batch, its reservation, and what is to be deleted.
pub(super) type Waiting = (usize, u64, Vec<Victim>);

/// Fills that are done together, none of which is about the same value as another.
pub(super) struct Batch<'a, T, D> {
    index: &'a Locked<T>,
    pub(super) dir: &'a CacheDir,
    pub(super) fills: &'a [Fill<D>],
    pub(super) progress: Vec<Progress>,
    /// Time that is left to wait for the lock.
    retry_time: Duration,
    /// Whether there may be failed deletes.
    pub(super) failed_deletes: bool,
    /// Segments of a pool with files that can go; `None` before the index was asked.
    pub(super) spent: Option<Vec<(u32, u64)>>,
    /// One of them with values that should be moved.
    pub(super) straggling: Option<u64>,
    pub(super) delete_errors: Vec<io::Error>,
    /// Updates that could not be made yet.
    pub(super) deferred: Vec<Deferred>,
    /// In which sum of the folders what it makes and removes belongs.
    pub(super) folder_sum: Option<u64>,
    /// Flights that were closed; the caller drops their payloads.
    pub(super) closed: Vec<ClosedFlight<T>>,
}

impl<'a, T: Clone, D: AsRef<[u8]>> Batch<'a, T, D> {
    /// A batch of as many of these fills, from the first on, as can be done at once.
    pub(super) fn new(index: &'a Locked<T>, dir: &'a CacheDir, fills: &'a [Fill<D>]) -> Self {
        Batch {
            index,
            dir,
            fills,
            progress: fills.iter().map(|_| Progress::new()).collect(),
            retry_time: RETRY_TIME,
            failed_deletes: true,
            spent: None,
            straggling: None,
            delete_errors: Vec::new(),
            deferred: Vec::new(),
            folder_sum: None,
            closed: Vec::new(),
        }
    }

    /// Runs it.
    pub(super) fn run(&mut self) {
        self.dir.values.take_folders();
        if self.dir.values.segments().is_none() {
            let sum = |index: &Locked<T>| step!(index, |cache| Ok(cache.folder_sum()));
            self.folder_sum = self.with_retries(sum).ok();
        }
        self.remove_left();
        if let Err(error) = self.fill() {
            match error {
                StepError::Busy => self.end_all(|| Ending::Busy),
                StepError::Failed(error) if error.is_fatal() => {
                    self.end_all(|| Ending::Corrupt(error));
                }
                // Nothing has changed.
                StepError::Failed(_) => self.reject_all(RejectReason::IndexFull.as_str()),
            }
        }
        self.end();
        if self.failed_deletes && self.deferred.is_empty() {
            self.retry_deletes();
        }
        if let Some(number) = self.straggling.take() {
            // What cannot be moved now is moved after another fill.
            let _ = self.move_stragglers(number);
            // Where they were.
            self.spent = None;
        }
        self.remove_segments();
    }

    /// Ends the reservations and closes the flights, wherever the fills have stopped.
    pub(super) fn end(&mut self) {
        for (one, fill) in self.progress.iter_mut().zip(self.fills) {
            if let Some(id) = one.reservation.take() {
                let gone = one.gone;
                self.deferred.push(Deferred::Release { id, gone });
            }
            if std::mem::take(&mut one.flight_open) {
                self.deferred.push(Deferred::Close {
                    key: fill.key.clone(),
                    ticket: fill.ticket,
                });
            }
        }
        self.apply_deferred();
    }

    /// Makes the updates that could not be made yet. What cannot be made now either is made later, in this order: a
    /// reservation ends after the deletes that it waits for.
    fn apply_deferred(&mut self) {
        let (mut deferred, mut closed) = (
            std::mem::take(&mut self.deferred),
            std::mem::take(&mut self.closed),
        );
        if !deferred.is_empty() {
            let _ = self.with_retries(|index| apply_all(index, &mut deferred, &mut closed));
        }
        (self.deferred, self.closed) = (deferred, closed);
    }

    /// The outcome of each fill that it has done. Deletes that have failed count as the first one's.
    pub(super) fn reports(&mut self) -> Vec<Report> {
        let mut delete_errors = std::mem::take(&mut self.delete_errors);
        let endings = self.progress.iter_mut().map(|one| one.ending.take());
        let report = |ending: Option<Ending>| Report {
            ending: ending.unwrap_or_else(|| Ending::Failed(io::Error::other(PANICKED))),
            delete_errors: std::mem::take(&mut delete_errors),
        };
        endings.map(report).collect()
    }

    /// Milliseconds on the clock of the index.
    pub(super) fn now(&self) -> u64 {
        self.fills.first().map_or(0, Fill::now)
    }

    /// Takes a step, and tries again while another process holds the lock and there is time left.
    pub(super) fn with_retries<R>(
        &mut self,
        mut step: impl FnMut(&Locked<T>) -> Result<R, StepError>,
    ) -> Result<R, StepError> {
        loop {
            let begun = Instant::now();
            match step(self.index) {
                Err(StepError::Busy) if !self.retry_time.is_zero() => {
                    thread::sleep(PAUSE);
                    self.retry_time = self.retry_time.saturating_sub(begun.elapsed());
                }
                done => return done,
            }
        }
    }

    /// Ends those that are under way.
    pub(super) fn end_all(&mut self, ending: impl Fn() -> Ending) {
        for one in self.progress.iter_mut().filter(|one| one.is_under_way()) {
            one.ending = Some(ending());
        }
    }

    /// Leaves the values of those that are under way uncached.
    pub(super) fn reject_all(&mut self, reason: &'static str) {
        let numbers: Vec<usize> = (self.progress.iter().enumerate())
            .filter_map(|(number, one)| one.is_under_way().then_some(number))
            .collect();
        for number in numbers {
            self.reject_one(number, reason);
        }
    }

    /// Leaves a value uncached for a reason that the index does not know.
    pub(super) fn reject_one(&mut self, number: usize, reason: &'static str) {
        self.end_one(number, Ending::Rejected(reason));
        self.deferred.push(Deferred::Rejected(1));
    }

    pub(super) fn end_one(&mut self, number: usize, ending: Ending) {
        if let Some(one) = self.progress.get_mut(number) {
            one.ending = Some(ending);
        }
    }

    fn fill(&mut self) -> Result<(), StepError> {
        if has_neighbours(self.dir.mark()) {
            self.reject_all(NEIGHBOURS);
            return Ok(());
        }
        let (mut answers, mut generation, slot) = self.reserve()?;
        // The others are another batch.
        self.progress.truncate(answers.len());
        loop {
            let waiting = self.note_answers(answers);
            if waiting.is_empty() {
                break;
            }
            (answers, generation) = self.evict_for(waiting, generation)?;
        }
        self.make_space()?;
        let written = self.write(slot);
        self.commit(&written)
    }

    /// Asks for the bytes of the fills; those after the last answer have to wait.
    fn reserve(&mut self) -> Result<(Answers, u64, Option<usize>), StepError> {
        let fills = self.fills;
        self.with_retries(|index| {
            step!(index, |cache| {
                let most = cache.bound() / PART;
                let (mut answers, mut taken) = (Vec::with_capacity(fills.len()), 0u64);
                for (number, fill) in fills.iter().enumerate() {
                    let (now, size) = (fill.now(), fill.size());
                    taken = taken.saturating_add(cache.cost_of(&fill.key, fill.range, size));
                    if number > 0 && taken > most {
                        break;
                    }
                    let answer = cache.reserve(&fill.key, fill.range, size, fill.ticket, now);
                    answers.push((number, with_place(cache, answer)?));
                }
                Ok((answers, cache.generation(), cache.slot()))
            })
        })
    }

    /// Notes what the index has said; those that wait for deletes.
    fn note_answers(&mut self, answers: Answers) -> Vec<Waiting> {
        let mut waiting = Vec::new();
        for (number, (answer, placed)) in answers {
            let Some(one) = self.progress.get_mut(number) else {
                continue;
            };
            match answer {
                Reserve::Rejected(reason) => {
                    one.reservation = None;
                    one.ending = Some(Ending::Rejected(reason.as_str()));
                }
                Reserve::NeedsEviction(id, victims) => {
                    one.reservation = Some(id);
                    waiting.push((number, id, victims));
                }
                Reserve::Granted(id) => {
                    (one.reservation, one.placed) = (Some(id), placed);
                }
            }
        }
        waiting
    }

    /// Gives back the room of unfinished files that can be removed by now.
    fn remove_left(&mut self) {
        for Leftover {
            reservation: id,
            gone,
            ..
        } in self.dir.remove_left()
        {
            self.deferred.push(Deferred::Release { id, gone });
        }
        self.apply_deferred();
    }
}

/// The same with the place of what was granted; an index that cannot grow rejects.
pub(super) fn with_place<S: Peers, T: Clone, P: Eviction>(
    cache: &Cache<S, T, P>,
    answer: Result<Reserve>,
) -> Result<Answer> {
    let answer = match answer {
        Err(error) if !error.is_fatal() => cache.rejected(RejectReason::IndexFull),
        answer => answer?,
    };
    let placed = match answer {
        Reserve::Granted(id) => cache.placed_for(id)?,
        _ => None,
    };
    Ok((answer, placed))
}
