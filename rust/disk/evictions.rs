//! What a batch of fills deletes: victims, what failed to be deleted before, and segments without values.

use std::io;
use std::path::Path;
use std::thread;

use super::batch::{Answers, Batch, ROUNDS, SINCE_EMPTIED, Waiting, with_place};
use super::commit::SEGMENTS;
use super::deferred::{Deferred, POISONED, apply, apply_all, step};
use super::fill::{Ending, Fill, NO_SPACE_ON_VOLUME};
use super::removal::{self, Was};
use crate::cache::{Placed, Victim};
use crate::error::Result;
use crate::shared::{Locked, StepError};

/// Failed deletes that one batch tries again.
const RETRIES: usize = 4;
/// Values that are evicted at once where the volume runs out of inodes.
const FEWER_FILES: usize = 16;

impl<T: Clone, D: AsRef<[u8]>> Batch<'_, T, D> {
    /// Deletes what fills wait for, and asks for their bytes once more.
    pub(super) fn evict_for(
        &mut self,
        mut waiting: Vec<Waiting>,
        generation: u64,
    ) -> Result<(Answers, u64), StepError> {
        let victims: Vec<Victim> = (waiting.iter_mut())
            .flat_map(|(.., victims)| victims.iter().cloned())
            .collect();
        let mut are_gone = self.delete(&victims, false).into_iter();
        let mut reports = Vec::with_capacity(waiting.len());
        for (number, id, victims) in waiting {
            let is_gone = |_: &Victim| are_gone.next().unwrap_or(false);
            let (gone, failed) = cells(victims.into_iter().partition(is_gone));
            reports.push((number, id, gone, failed));
        }
        let fills = self.fills;
        let advanced = self.with_retries(|index| {
            step!(index, |cache| {
                let mut answers = Vec::with_capacity(reports.len());
                for (number, id, gone, failed) in &reports {
                    if cache.is_reserved(*id) {
                        let now = fills.get(*number).map_or(0, Fill::now);
                        let answer = cache.evictions_done(*id, gone, failed, now);
                        answers.push((*number, Some(with_place(cache, answer)?)));
                    } else {
                        answers.push((*number, None));
                    }
                }
                Ok((answers, cache.generation()))
            })
        });
        let (answers, generation) = advanced.inspect_err(|_| {
            for (_, _, dropped, failed) in std::mem::take(&mut reports) {
                self.deferred.push(Deferred::Deletes {
                    generation,
                    dropped,
                    failed,
                });
            }
        })?;
        let mut found = Vec::with_capacity(answers.len());
        for (number, answer) in answers {
            match answer {
                Some(answer) => found.push((number, answer)),
                None => self.reject_one(number, SINCE_EMPTIED),
            }
        }
        Ok((found, generation))
    }

    /// Evicts until the volume has space for the values; nothing where all that is cached would not be enough.
    pub(super) fn make_space(&mut self) -> Result<(), StepError> {
        let under_way = || self.progress.iter().zip(self.fills);
        let under_way = || under_way().filter(|(one, _)| one.is_under_way());
        let size = under_way().map(|(_, fill)| fill.size()).sum();
        let Some((_, first)) = under_way().next() else {
            return Ok(());
        };
        let (now, min_free_space) = (first.now(), first.min_free_space);
        let placed = self.progress.iter().filter(|one| one.is_under_way());
        let files = self
            .dir
            .values
            .new_files(placed.filter_map(|one| one.placed));
        for _ in 0..ROUNDS {
            let missing = match self.dir.missing_space(size, min_free_space, files) {
                Ok(None) => return Ok(()),
                Ok(Some(missing)) => missing,
                Err(error) => {
                    self.end_all(|| Ending::Failed(again(&error)));
                    return Ok(());
                }
            };
            let (victims, generation) = self.with_retries(|index| {
                step!(index, |cache| {
                    let mut victims = Vec::new();
                    // What others have filled the volume with stays: all that is cached would go for nothing.
                    if cache.can_free(missing.bytes, missing.inodes)? {
                        victims = cache.evict(missing.bytes, now)?;
                        while missing.inodes > 0 && victims.len() < FEWER_FILES {
                            let more = cache.evict(1, now)?;
                            if more.is_empty() {
                                break;
                            }
                            victims.extend(more);
                        }
                    }
                    Ok((victims, cache.generation()))
                })
            })?;
            if victims.is_empty() {
                break;
            }
            self.drop_files(&victims, generation)?;
        }
        self.reject_all(NO_SPACE_ON_VOLUME);
        Ok(())
    }

    /// Tells the index which folders were made or removed.
    pub(super) fn count_folders(&mut self) {
        let bytes = self.dir.values.take_folders();
        if bytes == 0 {
            return;
        }
        let sum = self.folder_sum;
        let update = Deferred::Folders { sum, bytes };
        if self
            .with_retries(|index| apply(index, &update, &mut Vec::new()))
            .is_err()
        {
            self.deferred.push(update);
        }
    }

    /// Removes files of segments without values. What fails here is tried by the next fill.
    pub(super) fn remove_segments(&mut self) {
        let mut spent = match self.spent.take() {
            None => self.find_spent(),
            Some(spent) => spent,
        };
        spent.retain(|(_, number)| self.dir.values.remove_segment(*number).is_ok());
        if !spent.is_empty() {
            let _ = self.with_retries(|index| {
                step!(index, |cache| {
                    for (cell, number) in &spent {
                        cache.segment_removed(*cell, *number)?;
                    }
                    Ok(())
                })
            });
        }
    }

    /// Segments that take room for nothing, after a batch that has added nothing: each of its fills may have left one.
    fn find_spent(&mut self) -> Vec<(u32, u64)> {
        if self.dir.values.segments().is_none() {
            return Vec::new();
        }
        let found = self.with_retries(|index| {
            step!(index, |cache| {
                // Those of participants that add nothing now.
                cache.close_empty_segments()?;
                cache.spent_segments(SEGMENTS)
            })
        });
        found.unwrap_or_default()
    }

    /// Tries again what could not be deleted before.
    pub(super) fn retry_deletes(&mut self) {
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

    /// Deletes the bytes of entries that the index has dropped, and reports that.
    pub(super) fn drop_files(
        &mut self,
        victims: &[Victim],
        generation: u64,
    ) -> Result<(), StepError> {
        if victims.is_empty() {
            return Ok(());
        }
        let are_gone = self.delete(victims, true);
        let (mut dropped, mut failed) = (Vec::with_capacity(victims.len()), Vec::new());
        for (victim, is_gone) in victims.iter().zip(are_gone) {
            let cells = if is_gone { &mut dropped } else { &mut failed };
            cells.push(victim.cell);
        }
        let mut updates = vec![Deferred::Deletes {
            generation,
            dropped,
            failed,
        }];
        let told = self.with_retries(|index| apply_all(index, &mut updates, &mut Vec::new()));
        self.deferred.append(&mut updates);
        told
    }

    /// Deletes the bytes of victims; whether those of each are gone. With `invalid`, no value of their names is valid,
    /// and what cannot be deleted gets a tombstone, so that a rebuild ignores it.
    pub(super) fn delete(&mut self, victims: &[Victim], invalid: bool) -> Vec<bool> {
        let outcome = self.dir.values.delete(&self.dir.root, victims);
        let mut are_gone = Vec::with_capacity(victims.len());
        for (victim, outcome) in victims.iter().zip(outcome) {
            let deleted = match outcome {
                Ok(Was::Foreign) => self.delete_known(victim),
                outcome => outcome,
            };
            if let Ok(Was::Nothing) = deleted {
                let until = if invalid {
                    self.now()
                } else {
                    self.before_it_is_replaced(victim)
                };
                // Best effort, as a tombstone is.
                let _ = removal::mark_missing(&self.dir.root, &victim.cache_key, until);
            }
            are_gone.push(deleted.is_ok());
            if let Err(error) = deleted {
                self.delete_errors.push(error);
                if invalid {
                    self.write_tombstone(&victim.cache_key, victim.placed);
                }
            }
        }
        // Before the victims stop counting: one without a file leaves room for its mark.
        self.count_folders();
        are_gone
    }

    /// Up to when what was fetched under the name of a victim is not valid: what a fill of this batch puts in its place
    /// was fetched later, and is.
    fn before_it_is_replaced(&self, victim: &Victim) -> u64 {
        let replaces = |fill: &&Fill<D>| fill.range.cache_key(&fill.key) == victim.cache_key;
        let fill = self.fills.iter().find(replaces);
        fill.map_or_else(|| self.now(), |fill| fill.fetched.saturating_sub(1))
    }

    /// Deletes a file of which the times were changed, or that is not ours: the index knows what it should hold.
    fn delete_known(&mut self, victim: &Victim) -> io::Result<Was> {
        let known = self.with_retries(|index| {
            let cell = victim.cell;
            step!(index, |cache| Ok(cache.expected(cell)))
        });
        let name = Path::new(&victim.cache_key);
        removal::remove_known(&self.dir.root, name, known.unwrap_or(None))
    }

    /// Has a rebuild ignore what could not be deleted.
    pub(super) fn write_tombstone(&self, name: &str, placed: Option<Placed>) {
        let values = &self.dir.values;
        values.write_tombstone(&self.dir.root, name, placed);
    }
}

/// The cells of both kinds of victims.
fn cells((gone, failed): (Vec<Victim>, Vec<Victim>)) -> (Vec<u32>, Vec<u32>) {
    let cells = |victims: Vec<Victim>| victims.into_iter().map(|victim| victim.cell).collect();
    (cells(gone), cells(failed))
}

/// The same error for another fill.
fn again(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => error.kind().into(),
    }
}
