//! What a batch of fills writes, and what makes way for it.

use std::io;
use std::path::{Path, PathBuf};
use std::slice;
use std::thread;

use super::batch::{Batch, NewlyWritten, ROUNDS};
use super::cache_dir::Leftover;
use super::deferred::{POISONED, step};
use super::fill::Ending;
use super::folders::files_below;
use super::ownership::is_ours;
use super::value_file::{WriteError, discard};
use super::values::{NewValue, Written};
use crate::cache::{BATCH, RejectReason};
use crate::error::{Error, Result};
use crate::shared::{Locked, StepError};

const UNPLACED: Error = Error::Corrupt("a value of a pool without a place");

impl<T: Clone, D: AsRef<[u8]>> Batch<'_, T, D> {
    /// Writes the values; their numbers, and the names of those that are written.
    pub(super) fn write(&mut self, slot: Option<usize>) -> Vec<NewlyWritten> {
        let mut numbers = Vec::with_capacity(self.fills.len());
        let mut names = Vec::with_capacity(self.fills.len());
        for (number, (one, fill)) in self.progress.iter().zip(self.fills).enumerate() {
            if one.is_under_way() {
                numbers.push((number, one.placed, fill));
                names.push(fill.range.cache_key(&fill.key));
            }
        }
        let values: Vec<NewValue<'_>> = (numbers.iter().zip(&names))
            .map(|(&(_, placed, fill), name)| NewValue {
                root: &self.dir.root,
                name,
                data: fill.data.as_ref(),
                fetched: fill.fetched,
                unfinished: match placed {
                    Some(_) => PathBuf::new(),
                    None => self.dir.unfinished(slot),
                },
                source: self.dir.source,
                placed,
            })
            .collect();
        let outcome = self.dir.values.write(&values);
        self.count_folders();
        let mut written = Vec::with_capacity(numbers.len());
        for ((&(number, ..), value), made) in numbers.iter().zip(&values).zip(outcome) {
            let made = match made {
                Err(WriteError::Io(error)) if error.kind() == io::ErrorKind::AlreadyExists => {
                    self.write_over_folder(number, value, error)
                }
                made => made.map_err(Ending::from),
            };
            match made {
                Ok(made) => written.push((number, value.name.to_owned(), made)),
                Err(ending) => {
                    let cleared = self.dir.values.clear(value);
                    self.note_removed(number, value.name, value.placed, cleared);
                    self.discard(number, value);
                    match ending {
                        Ending::Rejected(reason) => self.reject_one(number, reason),
                        ending => self.end_one(number, ending),
                    }
                }
            }
        }
        self.count_folders();
        written
    }

    /// Writes a value of which the name was taken once more, after outdated values have gone from a folder of that name: the
    /// source has one value now where it had several.
    fn write_over_folder(
        &mut self,
        number: usize,
        value: &NewValue<'_>,
        mut error: io::Error,
    ) -> Result<Written, Ending> {
        let (dir, failures) = (self.dir, self.delete_errors.len());
        let reservation = self.progress.get(number).and_then(|one| one.reservation);
        let Some(id) = reservation.filter(|_| value.placed.is_none()) else {
            return Err(Ending::Failed(error));
        };
        for _ in 0..ROUNDS {
            let below = files_below(value.root, Path::new(value.name), BATCH);
            let below: Vec<&str> = below.iter().filter_map(|name| name.to_str()).collect();
            let now = self.now();
            let (outdated, generation) = self.with_retries(|index| {
                step!(index, |cache| {
                    Ok((cache.drop_below(id, &below, now)?, cache.generation()))
                })
            })?;
            let Some(outdated) = outdated else {
                return Err(Ending::Rejected(RejectReason::PathConflict.as_str()));
            };
            if outdated.is_empty() {
                if below
                    .iter()
                    .any(|name| is_ours(value.root, Path::new(name)))
                {
                    return Err(Ending::Unlisted);
                }
                break;
            }
            self.drop_files(&outdated, generation)?;
            if self.delete_errors.len() > failures {
                break;
            }
            match dir.values.write(slice::from_ref(value)).pop() {
                Some(Err(WriteError::Io(again))) if again.kind() == error.kind() => error = again,
                Some(made) => return made.map_err(Ending::from),
                None => break,
            }
        }
        Err(Ending::Failed(error))
    }

    /// Removes what is left of a value under its unfinished name; where that fails, its room stays taken.
    fn discard(&mut self, number: usize, value: &NewValue<'_>) {
        if value.placed.is_some() {
            return;
        }
        if let Err(error) = discard(value.root, &value.unfinished)
            && let Some(one) = self.progress.get_mut(number)
            && let Some(reservation) = one.reservation.take()
        {
            self.delete_errors.push(error);
            self.dir.note_left(Leftover {
                unfinished: value.unfinished.clone(),
                reservation,
                gone: one.gone,
            });
        }
    }
}

impl From<WriteError> for Ending {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Unlisted => Ending::Unlisted,
            WriteError::Unplaced => Ending::Corrupt(UNPLACED),
            WriteError::Io(error) => Ending::Failed(error),
        }
    }
}

impl From<StepError> for Ending {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Busy => Ending::Busy,
            StepError::Failed(error) if error.is_fatal() => Ending::Corrupt(error),
            // Nothing has changed.
            StepError::Failed(_) => Ending::Rejected(RejectReason::IndexFull.as_str()),
        }
    }
}
