//! What is done with several values at once: those that stand one behind the other are written, marked as valid and
//! deleted by one call of the file system.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::calls::{lengthen, punch, write_slices};
use super::files::SegmentFiles;
use super::format::{HEADER, ValueHeader};
use super::opened::For;
use crate::cache::{PAGE, Placed};
use crate::checksum::crc32c;

/// The byte in the map of a segment that says that a value is valid.
pub(super) const VALID: u8 = 1;

/// What stands between a value and the next page.
const PADDING: [u8; PAGE as usize] = [0; PAGE as usize];

/// A value that is to be written where the index has given it room.
#[derive(Clone, Copy, Debug)]
pub struct ValueToWrite<'a> {
    /// Its place.
    pub placed: Placed,
    /// Its name in the cache store.
    pub name: &'a str,
    /// Its bytes.
    pub data: &'a [u8],
    /// Milliseconds since 1970 of its fetch.
    pub fetched: u64,
}

impl ValueToWrite<'_> {
    fn header(&self) -> io::Result<(u32, [u8; HEADER])> {
        let header = ValueHeader {
            placed: self.placed,
            checksum: crc32c(self.data),
            fetched: self.fetched,
            name: self.name.to_owned(),
        };
        let bytes = header.to_bytes().ok_or(Errno::NAMETOOLONG)?;
        Ok((header.checksum, bytes))
    }
}

/// Parts of a list of places in which each begins where the one before it ends.
fn runs(places: &[Placed]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut last: Option<Placed> = None;
    for (n, placed) in places.iter().enumerate() {
        let is_next = |last: Placed| {
            last.segment == placed.segment && last.start() + last.length() == placed.start()
        };
        match runs.last_mut() {
            Some(run) if last.is_some_and(is_next) => run.end = n + 1,
            _ => runs.push(n..n + 1),
        }
        last = Some(*placed);
    }
    runs
}

impl SegmentFiles {
    /// Writes a value; it is not valid before [`SegmentFiles::seal`]. Returns its CRC32C.
    ///
    /// # Errors
    ///
    /// Where the file system refuses; what was written by then stays, until it is deleted.
    pub fn write(&self, value: &ValueToWrite<'_>) -> io::Result<u32> {
        let (checksum, header) = value.header()?;
        self.write_run(&[(value, &header)])?;
        Ok(checksum)
    }

    /// The same for several values.
    pub fn write_all(&self, values: &[ValueToWrite<'_>]) -> Vec<io::Result<u32>> {
        let headers: Vec<_> = values.iter().map(ValueToWrite::header).collect();
        let places: Vec<Placed> = values.iter().map(|value| value.placed).collect();
        let mut outcome = Vec::with_capacity(values.len());
        for run in runs(&places) {
            let of_run = || values.iter().zip(&headers).take(run.end).skip(run.start);
            let sound = || of_run().filter_map(|(value, made)| Some((value, made.as_ref().ok()?)));
            let parts: Vec<_> = sound()
                .map(|(value, (_, header))| (value, header))
                .collect();
            let are_written = parts.len() == run.len() && self.write_run(&parts).is_ok();
            for (value, made) in of_run() {
                outcome.push(match made {
                    Ok((checksum, _)) if are_written => Ok(*checksum),
                    // Each alone: which of them could not be?
                    _ => self.write(value),
                });
            }
        }
        outcome
    }

    /// Writes values that stand one behind the other in one segment.
    fn write_run(&self, values: &[(&ValueToWrite<'_>, &[u8; HEADER])]) -> io::Result<()> {
        let (Some((first, _)), Some((last, _))) = (values.first(), values.last()) else {
            return Ok(());
        };
        let mut slices = Vec::with_capacity(3 * values.len());
        for (n, (value, header)) in values.iter().enumerate() {
            slices.push(IoSlice::new(&header[..]));
            slices.push(IoSlice::new(value.data));
            let filled = (HEADER + value.data.len()) % PAGE as usize;
            if n + 1 < values.len() && filled != 0 {
                slices.push(IoSlice::new(PADDING.get(filled..).unwrap_or_default()));
            }
        }
        let Placed {
            segment, capacity, ..
        } = first.placed;
        let file = self.file(segment, For::Append { capacity })?;
        let end = last.placed.start() + last.placed.length();
        lengthen(&file, capacity, end, &self.lengthening);
        write_slices(&file, first.placed.start(), &mut slices)
    }

    /// Marks a value as valid: a rebuild takes it in.
    ///
    /// # Errors
    ///
    /// Where the file system refuses.
    pub fn seal(&self, placed: Placed) -> io::Result<()> {
        let file = self.file(placed.segment, For::Change)?;
        file.write_all_at(&[VALID], placed.map_at())
    }

    /// The same for several values. A rebuild ignores those for which that fails.
    pub fn seal_all(&self, places: &[Placed]) {
        for run in runs(places) {
            let places = places.get(run).unwrap_or_default();
            let (Some(first), Some(last)) = (places.first(), places.last()) else {
                continue;
            };
            let Ok(file) = self.file(first.segment, For::Change) else {
                continue;
            };
            // No other value begins in a page between them.
            let at = |placed: &Placed| (placed.map_at() - first.map_at()) as usize;
            let mut map = vec![0; at(last) + 1];
            for placed in places {
                map.get_mut(at(placed))
                    .into_iter()
                    .for_each(|byte| *byte = VALID);
            }
            let _ = file.write_all_at(&map, first.map_at());
        }
    }

    /// Deletes several values, in whatever order they are; see [`SegmentFiles::delete`].
    pub fn delete_all(&self, places: &[Placed]) -> Vec<io::Result<()>> {
        let mut order: Vec<(Placed, usize)> = places.iter().copied().zip(0..).collect();
        order.sort_unstable_by_key(|(placed, _)| (placed.segment, placed.page));
        let sorted: Vec<Placed> = order.iter().map(|(placed, _)| *placed).collect();
        let mut outcome: Vec<io::Result<()>> = places.iter().map(|_| Ok(())).collect();
        for run in runs(&sorted) {
            let numbered = order.get(run).unwrap_or_default();
            if self.punch_run(numbered).unwrap_or(false) {
                continue;
            }
            // Each alone: which of them could not be?
            for (placed, number) in numbered {
                if let Some(outcome) = outcome.get_mut(*number) {
                    *outcome = self.delete(*placed);
                }
            }
        }
        outcome
    }

    /// Makes one hole of values that stand one behind the other; whether there is one.
    fn punch_run(&self, places: &[(Placed, usize)]) -> io::Result<bool> {
        let [(first, _), .., (last, _)] = places else {
            return Ok(false);
        };
        if !self.has_holes() {
            return Ok(false);
        }
        let file = self.file(first.segment, For::Change)?;
        let length = last.start() + last.length() - first.start();
        punch(&file, first.start(), length)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(segment: u64, page: u32, pages: u64) -> Placed {
        Placed {
            segment,
            page,
            size: pages * PAGE - HEADER as u64,
            capacity: 100,
        }
    }

    #[test]
    fn runs_are_of_one_segment_and_without_gaps() {
        let places = [
            placed(1, 70, 2),
            placed(1, 72, 1),
            placed(1, 74, 1),
            placed(2, 75, 3),
            placed(2, 78, 1),
        ];
        assert_eq!(runs(&places), [0..2, 2..3, 3..5]);
        assert_eq!(runs(&[]), []);
    }
}
