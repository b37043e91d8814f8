//! The moves that a batch of fills makes: values of sparse segments of a pool.

use std::thread;

use super::batch::{Batch, ROUNDS};
use super::deferred::{POISONED, step};
use super::segments::{self, FoundValue, SegmentFiles};
use crate::cache::{BeginMove, Move};
use crate::error::Result;
use crate::key::ByteRange;
use crate::shared::{Locked, StepError};

impl<T: Clone, D: AsRef<[u8]>> Batch<'_, T, D> {
    /// Moves the values of a sparse segment of a pool to the one to which this process appends.
    pub(super) fn move_stragglers(&mut self, number: u64) -> Result<(), StepError> {
        let Some(files) = self.dir.values.segments() else {
            return Ok(());
        };
        for value in segments::values_in(&files, number).unwrap_or_default() {
            if let Some((moved, generation)) = self.begin_move(&value)? {
                let is_written = files.copy(&value, moved.to).is_ok();
                self.finish_move(&files, moved, generation, is_written)?;
            }
        }
        Ok(())
    }

    /// Makes room for a copy of a value; `None` where it stays.
    fn begin_move(&mut self, value: &FoundValue) -> Result<Option<(Move, u64)>, StepError> {
        let Some((key, range)) = ByteRange::parse(&value.name) else {
            return Ok(None);
        };
        for _ in 0..ROUNDS {
            let (begun, generation) = self.with_retries(|index| {
                step!(index, |cache| {
                    let begun = cache.begin_move(key, range, value.placed)?;
                    Ok((begun, cache.generation()))
                })
            })?;
            let missing = match begun {
                BeginMove::To(moved) => return Ok(Some((moved, generation))),
                BeginMove::Gone => return Ok(None),
                BeginMove::NeedsRoom(bytes) => bytes,
            };
            let now = self.now();
            let victims =
                self.with_retries(|index| step!(index, |cache| cache.evict(missing, now)))?;
            if victims.is_empty() {
                return Ok(None);
            }
            self.drop_files(&victims, generation)?;
        }
        Ok(None)
    }

    fn finish_move(
        &mut self,
        files: &SegmentFiles,
        moved: Move,
        generation: u64,
        is_written: bool,
    ) -> Result<(), StepError> {
        let finished = self.with_retries(|index| {
            step!(index, |cache| {
                if cache.generation() == generation {
                    cache.finish_move(moved, is_written).map(Some)
                } else {
                    Ok(None)
                }
            })
        });
        if let Ok(Some((victims, is_moved))) = finished {
            self.drop_files(&victims, generation)?;
            if is_moved {
                // A rebuild ignores it where that fails.
                let _ = files.seal(moved.to);
            }
        } else {
            // It is not counted; where the index is only busy, it counts as being written still.
            let _ = files.delete(moved.to);
        }
        Ok(())
    }
}
