//! A whole fill of a cache directory: reserve, delete victims, write, commit.
//!
//! ```text
//! reserve ─▶ rejected
//!    │ ▲
//!    ▼ └──── advance ◀── delete the victims
//! granted ─▶ space on the volume? ─▶ write ─▶ commit ─▶ seal
//! ```
//!
//! The lock of the index is held for one step at a time, never over I/O. However a fill ends, its
//! reservation ends and its flight is closed. Where the index is busy, that is left as deferred
//! updates, which any thread can apply later.

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::cache_dir::{CacheDir, Mark};
use super::deferred::{Deferred, POISONED, apply, step};
use super::removal;
use super::value_file::WriteError;
use super::values::{NewValue, Written};
use crate::cache::{Cache, ClosedFlight, Peers, Placed, Reserve, Ticket, Victim};
use crate::error::{Error, Result};
use crate::key::ByteRange;
use crate::policy::Eviction;
use crate::shared::{Locked, StepError};

/// Values that are evicted at once where the volume runs out of inodes.
const FEWER_FILES: usize = 16;
/// Times that one fill frees space on the volume.
pub(super) const ROUNDS: u32 = 16;
/// Failed deletes that one fill tries again.
const RETRIES: usize = 4;
/// Segments whose files one fill removes.
const SEGMENTS: usize = 4;
/// Time that one fill waits for the lock of the index, in all.
const RETRY_TIME: Duration = Duration::from_secs(1);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(5);

const SINCE_EMPTIED: &str = "the index was emptied meanwhile";
const NEIGHBOURS: &str = "others share an index that this process does not use";
const NO_SPACE: &str = "no space on the volume";
const UNKNOWN: &str = "a valid value that the index does not know";

/// A value to be cached.
#[derive(Debug)]
pub struct Fill<D> {
    /// Its key.
    pub key: Box<str>,
    /// Which part of the key's value it is.
    pub range: ByteRange,
    /// Its bytes.
    pub data: D,
    /// Decides whether it may be cached.
    pub ticket: Ticket,
    /// Milliseconds on the clock of the index from which its age counts.
    pub fetched: u64,
    /// Milliseconds on the same clock at `since`.
    pub now: u64,
    /// When `now` was read.
    pub since: Instant,
    /// Bytes of the volume that stay free.
    pub min_free_space: Option<u64>,
}

impl<D> Fill<D> {
    /// Milliseconds on the clock of the index.
    pub(super) fn now(&self) -> u64 {
        let passed = self.since.elapsed().as_millis();
        self.now
            .saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }
}

/// Ends all reads of the source that have begun before a mark that was not seen yet.
fn note<S: Peers, T: Clone, P: Eviction>(
    cache: &mut Cache<S, T, P>,
    dir: &CacheDir,
    mark: Option<Mark>,
) {
    if dir.is_news(mark) {
        cache.invalidate_prefix("");
    }
}

/// Whether others share an index that this process does not use. It would not know of the file of a fill, and so not
/// remove it with what is below a prefix.
fn has_neighbours(mark: Option<Mark>) -> bool {
    mark.is_some_and(|mark| mark.neighbours.is_some())
}

/// Looks for a mark of others, who change the source and share no index with this process.
///
/// # Errors
///
/// Where the step cannot be taken now; the next commit looks again.
pub(super) fn look<T: Clone>(index: &Locked<T>, dir: &CacheDir) -> Result<(), StepError> {
    let mark = dir.mark();
    step!(index, |cache| {
        note(cache, dir, mark);
        Ok(())
    })
}

/// Where a reservation that was granted writes its bytes, in a pool.
fn placed_for<S: Peers, T: Clone, P: Eviction>(
    cache: &Cache<S, T, P>,
    answer: &Reserve,
) -> Result<Option<Placed>> {
    match answer {
        Reserve::Granted(id) => cache.placed_for(*id),
        _ => Ok(None),
    }
}

/// How a fill has ended.
#[derive(Debug)]
pub enum Ending {
    /// The value is cached.
    Filled,
    /// The value stays uncached, for this reason.
    Rejected(&'static str),
    /// The file system refused to write it.
    Failed(io::Error),
    /// The index is damaged.
    Corrupt(&'static str),
    /// Another process has held the lock of the index all the time.
    Busy,
}

/// The outcome of a fill.
#[derive(Debug)]
pub struct Report {
    /// How it has ended.
    pub ending: Ending,
    /// Files that it has deleted.
    pub deleted: u64,
    /// Deletes that have failed; their bytes stay counted.
    pub delete_errors: Vec<io::Error>,
}

/// One fill in progress.
pub(super) struct Job<'a, T, D> {
    index: &'a Locked<T>,
    pub(super) dir: &'a CacheDir,
    pub(super) fill: &'a Fill<D>,
    /// Time that is left to wait for the lock.
    retry_time: Duration,
    /// Its reservation, until that ends.
    reservation: Option<u64>,
    /// Whether none of the bytes that it has written are left.
    gone: bool,
    /// Whether its flight is open.
    flight_open: bool,
    /// Whether there may be failed deletes.
    failed_deletes: bool,
    /// Segments of a pool whose files can go.
    spent: Vec<(u32, u64)>,
    /// One of them whose values should be moved.
    straggling: Option<u64>,
    deleted: u64,
    delete_errors: Vec<io::Error>,
    /// Updates that could not be made yet.
    pub(super) deferred: Vec<Deferred>,
    /// Flights that were closed; the caller drops their payloads.
    pub(super) closed: Vec<ClosedFlight<T>>,
}

impl<'a, T: Clone, D: AsRef<[u8]>> Job<'a, T, D> {
    pub(super) fn new(index: &'a Locked<T>, dir: &'a CacheDir, fill: &'a Fill<D>) -> Self {
        Job {
            index,
            dir,
            fill,
            retry_time: RETRY_TIME,
            reservation: None,
            gone: true,
            flight_open: true,
            failed_deletes: true,
            spent: Vec::new(),
            straggling: None,
            deleted: 0,
            delete_errors: Vec::new(),
            deferred: Vec::new(),
            closed: Vec::new(),
        }
    }

    /// Tells the index which folders were made or removed.
    fn count_folders(&mut self) {
        let bytes = self.dir.values.take_folders();
        if bytes == 0 {
            return;
        }
        let update = Deferred::Folders(bytes);
        if self
            .with_retries(|index| apply(index, &update, &mut Vec::new()))
            .is_err()
        {
            self.deferred.push(update);
        }
    }

    /// Runs the fill.
    pub(super) fn run(&mut self) -> Ending {
        self.dir.values.take_folders();
        let ending = self.fill().unwrap_or_else(|error| match error {
            StepError::Busy => Ending::Busy,
            StepError::Failed(Error::Corrupt(what)) => Ending::Corrupt(what),
            // Nothing has changed.
            StepError::Failed(Error::Full) => Ending::Rejected("index full"),
        });
        self.end();
        if self.failed_deletes && self.deferred.is_empty() {
            self.retry_deletes();
        }
        self.remove_segments();
        if let Some(number) = self.straggling.take() {
            // What cannot be moved now is moved after another fill.
            let _ = self.move_stragglers(number);
        }
        ending
    }

    /// Ends the reservation and closes the flight, wherever the fill has stopped.
    pub(super) fn end(&mut self) {
        if let Some(id) = self.reservation.take() {
            let gone = self.gone;
            self.deferred.push(Deferred::Release { id, gone });
        }
        if std::mem::take(&mut self.flight_open) {
            self.deferred.push(Deferred::Close {
                key: self.fill.key.clone(),
                ticket: self.fill.ticket,
            });
        }
        self.apply_deferred();
    }

    /// The outcome of the fill.
    pub(super) fn report(&mut self, ending: Ending) -> Report {
        Report {
            ending,
            deleted: self.deleted,
            delete_errors: std::mem::take(&mut self.delete_errors),
        }
    }

    fn apply_deferred(&mut self) {
        let mut closed = std::mem::take(&mut self.closed);
        let mut deferred = std::mem::take(&mut self.deferred).into_iter();
        while let Some(update) = deferred.next() {
            if self
                .with_retries(|index| apply(index, &update, &mut closed))
                .is_err()
            {
                // In their order: a reservation ends after the deletes that it waits for.
                self.deferred.push(update);
                self.deferred.extend(deferred);
                break;
            }
        }
        self.closed = closed;
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

    fn fill(&mut self) -> Result<Ending, StepError> {
        if has_neighbours(self.dir.mark()) {
            return Ok(Ending::Rejected(NEIGHBOURS));
        }
        let (fill, now) = (self.fill, self.fill.now());
        let size = fill.data.as_ref().len() as u64;
        let (mut answer, mut generation, slot, mut placed) = self.with_retries(|index| {
            step!(index, |cache| {
                let answer = cache.reserve(&fill.key, fill.range, size, fill.ticket, now)?;
                let placed = placed_for(cache, &answer)?;
                Ok((answer, cache.generation(), cache.slot(), placed))
            })
        })?;
        let id = loop {
            match answer {
                Reserve::Rejected(reason) => {
                    self.reservation = None;
                    return Ok(Ending::Rejected(reason.as_str()));
                }
                Reserve::NeedsEviction(id, victims) => {
                    self.reservation = Some(id);
                    let (dropped, failed) = self.delete(&victims, false);
                    let next = self.with_retries(|index| {
                        step!(index, |cache| {
                            if cache.is_reserved(id) {
                                let answer = cache.evictions_done(id, &dropped, &failed, now)?;
                                let placed = placed_for(cache, &answer)?;
                                Ok(Some((answer, cache.generation(), placed)))
                            } else {
                                Ok(None)
                            }
                        })
                    });
                    (answer, generation, placed) = match next {
                        Ok(Some(next)) => next,
                        Ok(None) => {
                            return Ok(Ending::Rejected(SINCE_EMPTIED));
                        }
                        Err(error) => {
                            self.deferred.push(Deferred::Deletes {
                                generation,
                                dropped,
                                failed,
                            });
                            return Err(error);
                        }
                    };
                }
                Reserve::Granted(id) => {
                    self.reservation = Some(id);
                    break id;
                }
            }
        };
        match self.has_space(size)? {
            Ok(true) => {}
            Ok(false) => return Ok(Ending::Rejected(NO_SPACE)),
            Err(error) => return Ok(Ending::Failed(error)),
        }
        let name = fill.range.cache_key(&fill.key);
        let value = NewValue {
            root: &self.dir.root,
            name: &name,
            data: fill.data.as_ref(),
            fetched: fill.fetched,
            unfinished: self.dir.unfinished(slot),
            source: self.dir.source,
            placed,
        };
        let written = self.dir.values.write(&value);
        self.count_folders();
        match written {
            Ok(made) => self.commit(id, &name, &made),
            Err(WriteError::Unknown) => Ok(self.not_written(&value, Ending::Corrupt(UNKNOWN))),
            Err(WriteError::Io(error)) => Ok(self.not_written(&value, Ending::Failed(error))),
        }
    }

    /// Whether the volume has space for the value; evicts where that helps.
    fn has_space(&mut self, size: u64) -> Result<io::Result<bool>, StepError> {
        let now = self.fill.now();
        for _ in 0..ROUNDS {
            let missing = match self.dir.missing_space(size, self.fill.min_free_space) {
                Ok(None) => return Ok(Ok(true)),
                Ok(Some(missing)) => missing,
                Err(error) => return Ok(Err(error)),
            };
            let (victims, generation) = self.with_retries(|index| {
                step!(index, |cache| {
                    let mut victims = cache.evict(missing.bytes, now)?;
                    while missing.inodes && victims.len() < FEWER_FILES {
                        let more = cache.evict(1, now)?;
                        if more.is_empty() {
                            break;
                        }
                        victims.extend(more);
                    }
                    Ok((victims, cache.generation()))
                })
            })?;
            if victims.is_empty() {
                break;
            }
            self.drop_files(&victims, generation)?;
        }
        Ok(Ok(false))
    }

    /// Removes what may be there under the name of a value that could not be written.
    fn not_written(&mut self, value: &NewValue<'_>, ending: Ending) -> Ending {
        match self.dir.values.clear(value) {
            Ok(()) => {}
            Err(error) => {
                self.gone = false;
                self.delete_errors.push(error);
                self.write_tombstone(value.name, value.placed);
            }
        }
        self.count_folders();
        ending
    }

    fn commit(&mut self, id: u64, name: &str, made: &Written) -> Result<Ending, StepError> {
        let (fill, dir) = (self.fill, self.dir);
        // After the file has its name: a later change of the source removes it by that.
        let mark = dir.mark();
        if has_neighbours(mark) {
            self.remove_uncommitted(name, made);
            return Ok(Ending::Rejected(NEIGHBOURS));
        }
        let done = self.with_retries(|index| {
            step!(index, |cache| {
                note(cache, dir, mark);
                let (checksum, now) = (Some(made.checksum()), fill.now());
                let done = cache.commit_fetched(id, checksum, fill.fetched, now)?;
                let (generation, failed) = (cache.generation(), cache.has_failed_deletes());
                let spent = cache.spent_segments(SEGMENTS)?;
                Ok((done, generation, failed, spent, cache.straggling_segment()?))
            })
        });
        let (done, generation, failed_deletes, spent, straggling) = match done {
            Ok(done) => done,
            Err(error) => {
                self.remove_uncommitted(name, made);
                return Err(error);
            }
        };
        let Some(done) = done else {
            // The index does not list these bytes, but counts them as granted.
            self.remove_uncommitted(name, made);
            return Ok(Ending::Rejected(SINCE_EMPTIED));
        };
        self.reservation = None;
        self.flight_open = false;
        self.closed.extend(done.flight);
        (self.spent, self.straggling) = (spent, straggling);
        if done.victims.is_empty() {
            self.failed_deletes = failed_deletes;
            self.dir.values.seal(&self.dir.root, name, made);
            return Ok(Ending::Filled);
        }
        self.drop_files(&done.victims, generation)?;
        Ok(Ending::Rejected("overtaken by a write"))
    }

    /// Removes a file that has no entry, unless another has taken its place.
    fn remove_uncommitted(&mut self, name: &str, made: &Written) {
        let removed = self.dir.values.remove_written(&self.dir.root, name, made);
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            self.gone = false;
            self.delete_errors.push(error);
            self.write_tombstone(name, made.placed());
        }
        self.count_folders();
    }

    /// Removes files of segments without values. What fails here is tried by the next fill.
    fn remove_segments(&mut self) {
        for (cell, number) in std::mem::take(&mut self.spent) {
            if self.dir.values.remove_segment(number).is_ok() {
                let _ = self.with_retries(|index| {
                    step!(index, |cache| cache.segment_removed(cell, number))
                });
            }
        }
    }

    fn retry_deletes(&mut self) {
        let found = self.with_retries(|index| {
            step!(index, |cache| Ok((
                cache.retry_failed(RETRIES)?,
                cache.generation()
            )))
        });
        // What fails here fails again in the next fill, which reports it.
        if let Ok((victims, generation)) = found {
            let _ = self.drop_files(&victims, generation);
        }
    }

    /// Deletes the files of entries that the index has dropped, and reports that.
    pub(super) fn drop_files(
        &mut self,
        victims: &[Victim],
        generation: u64,
    ) -> Result<(), StepError> {
        if victims.is_empty() {
            return Ok(());
        }
        let (dropped, failed) = self.delete(victims, true);
        let update = Deferred::Deletes {
            generation,
            dropped,
            failed,
        };
        let told = self.with_retries(|index| apply(index, &update, &mut Vec::new()));
        if told.is_err() {
            self.deferred.push(update);
        }
        told
    }

    /// Deletes files; returns the cells of those that are gone and of those that may not be. With
    /// `invalid`, a file that cannot be deleted gets a tombstone, so that a rebuild ignores it.
    fn delete(&mut self, victims: &[Victim], invalid: bool) -> (Vec<u32>, Vec<u32>) {
        let (mut dropped, mut failed) = (Vec::with_capacity(victims.len()), Vec::new());
        for victim in victims {
            match self.delete_one(victim) {
                Ok(()) => {
                    self.deleted += 1;
                    dropped.push(victim.cell);
                }
                Err(error) => {
                    self.delete_errors.push(error);
                    failed.push(victim.cell);
                    if invalid {
                        self.write_tombstone(&victim.cache_key, victim.placed);
                    }
                }
            }
        }
        self.count_folders();
        (dropped, failed)
    }

    fn delete_one(&mut self, victim: &Victim) -> io::Result<()> {
        let name = Path::new(&victim.cache_key);
        if self.dir.values.delete(&self.dir.root, victim)? {
            return Ok(());
        }
        // Its times were changed, or it is not ours: the index knows what it should hold.
        let known = self.with_retries(|index| {
            let cell = victim.cell;
            step!(index, |cache| Ok(cache.expected(cell)))
        });
        removal::remove_known(&self.dir.root, name, known.unwrap_or(None))
    }

    fn write_tombstone(&self, name: &str, placed: Option<Placed>) {
        self.dir
            .values
            .write_tombstone(&self.dir.root, name, placed);
    }
}
