//! The end of a batch of fills: values become entries, or are removed.

use std::io;
use std::thread;

use super::batch::{Batch, NEIGHBOURS, NewlyWritten, SINCE_EMPTIED};
use super::deferred::{POISONED, step};
use super::fill::Ending;
use super::marks::{has_neighbours, note};
use crate::cache::Placed;
use crate::error::Result;
use crate::shared::{Locked, StepError};

/// Segments without values that one batch removes.
pub(super) const SEGMENTS: usize = 64;

const OVERTAKEN: &str = "overtaken by a write";

impl<T: Clone, D: AsRef<[u8]>> Batch<'_, T, D> {
    /// Commits what is written; what the index does not take is removed again.
    pub(super) fn commit(&mut self, written: &[NewlyWritten]) -> Result<(), StepError> {
        if written.is_empty() {
            return Ok(());
        }
        let (dir, fills) = (self.dir, self.fills);
        let known: Vec<_> = (written.iter())
            .filter_map(|(number, _, made)| {
                let one = self.progress.get(*number)?;
                Some((*number, one.reservation?, made.checksum()))
            })
            .collect();
        // After the file has its name: a later change of the source removes it by that.
        let mark = dir.mark();
        if has_neighbours(mark) {
            self.remove_uncommitted(written);
            self.reject_all(NEIGHBOURS);
            return Ok(());
        }
        let done = self.with_retries(|index| {
            step!(index, |cache| {
                note(cache, dir, mark);
                let mut done = Vec::with_capacity(known.len());
                for &(number, id, checksum) in &known {
                    let Some(fill) = fills.get(number) else {
                        continue;
                    };
                    let (checksum, now) = (Some(checksum), fill.now());
                    done.push(cache.commit_fetched(id, checksum, fill.fetched, now)?);
                }
                let (generation, failed) = (cache.generation(), cache.has_failed_deletes());
                let spent = cache.spent_segments(SEGMENTS)?;
                Ok((done, generation, failed, spent, cache.straggling_segment()?))
            })
        });
        let (done, generation, failed_deletes, spent, straggling) = match done {
            Ok(done) => done,
            Err(error) => {
                self.remove_uncommitted(written);
                return Err(error);
            }
        };
        (self.spent, self.straggling) = (Some(spent), straggling);
        let (mut valid, mut victims, mut lost) = (Vec::new(), Vec::new(), Vec::new());
        for (made, done) in written.iter().zip(done) {
            let number = made.0;
            let Some(done) = done else {
                // The index does not list these bytes, but counts them as granted.
                lost.push(made.clone());
                self.reject_one(number, SINCE_EMPTIED);
                continue;
            };
            if let Some(one) = self.progress.get_mut(number) {
                (one.reservation, one.flight_open) = (None, false);
                one.ending = Some(if done.victims.is_empty() {
                    Ending::Filled
                } else {
                    Ending::Rejected(OVERTAKEN)
                });
            }
            self.closed.extend(done.flight);
            if done.victims.is_empty() {
                valid.push((&*made.1, &made.2));
            }
            victims.extend(done.victims);
        }
        self.failed_deletes = failed_deletes || !victims.is_empty();
        if !victims.is_empty() {
            // They may have been the last of their segments.
            self.spent = None;
        }
        dir.values.seal(&dir.root, &valid);
        self.remove_uncommitted(&lost);
        self.drop_files(&victims, generation)
    }

    /// Removes values that have no entry, unless others have taken their places.
    fn remove_uncommitted(&mut self, written: &[NewlyWritten]) {
        for (number, name, made) in written {
            let removed = self.dir.values.remove_written(&self.dir.root, name, made);
            let removed = match removed {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed,
            };
            self.note_removed(*number, name, made.placed(), removed);
        }
        self.count_folders();
    }

    /// Notes whether the bytes of a fill that was not committed are gone.
    pub(super) fn note_removed(
        &mut self,
        number: usize,
        name: &str,
        placed: Option<Placed>,
        removed: io::Result<()>,
    ) {
        if let Err(error) = removed {
            if let Some(one) = self.progress.get_mut(number) {
                one.gone = false;
            }
            self.delete_errors.push(error);
            self.write_tombstone(name, placed);
        }
    }
}
