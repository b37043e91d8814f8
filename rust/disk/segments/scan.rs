//! How an empty index of a pool is filled again: by the headers of the values in its segments.
//!
//! The map of a segment names the pages at which valid values begin, so of each value one page is read. What holds
//! blocks and is no valid value is given back: it would not be counted.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::calls::{is_elsewhere, is_unsupported, punch};
use super::files::{SegmentFiles, VALUES_AT, header_of};
use super::format::{HEADER, ValueHeader};
use super::runs::VALID;
use crate::cache::{Cache, FIRST_PAGE, MAP_AT, PAGE, Peers, Placed, Verify};
use crate::error::Result;
use crate::key::{self, ByteRange};
use crate::policy::Eviction;

/// A value that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundValue {
    /// Name in the cache store.
    pub name: String,
    /// Where it is.
    pub placed: Placed,
    /// CRC32C of the value.
    pub checksum: u32,
    /// Milliseconds since 1970 of its fetch.
    pub fetched: u64,
}

/// A segment with valid values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundSegment {
    /// Its number.
    pub number: u64,
    /// Pages in which values may begin.
    pub capacity: u32,
}

/// What a scan has found.
#[derive(Debug, Default)]
pub struct Found {
    /// Segments with valid values.
    pub segments: Vec<FoundSegment>,
    /// The newest value of each name, in the order of their fetch.
    pub values: Vec<FoundValue>,
}

impl Found {
    /// Adds the segments to an index; the values come afterwards.
    ///
    /// # Errors
    ///
    /// Where the index cannot grow.
    pub fn adopt_segments<S: Peers, T: Clone, P: Eviction>(
        &self,
        cache: &mut Cache<S, T, P>,
    ) -> Result<()> {
        if cache.begins_empty() {
            return Ok(());
        }
        let known = cache.segment_cells()?;
        for segment in &self.segments {
            // Another scan may have been faster.
            if !known.contains_key(&segment.number) {
                cache.adopt_segment(segment.number, segment.capacity)?;
            }
        }
        Ok(())
    }

    /// Adds a part of the values, as far as there are so many. Those that cannot be entries come back: their bytes have to be deleted.
    ///
    /// # Errors
    ///
    /// Where the index cannot grow.
    pub fn adopt_values<S: Peers, T: Clone, P: Eviction>(
        &self,
        cache: &mut Cache<S, T, P>,
        part: Range<usize>,
    ) -> Result<Vec<Placed>> {
        if cache.begins_empty() {
            // It was found damaged since the scan began.
            return Ok(Vec::new());
        }
        let checks = cache.limits().verify != Verify::Never;
        let cells = cache.segment_cells()?;
        let mut refused = Vec::new();
        let end = part.end.min(self.values.len());
        for value in self.values.get(part.start..end).unwrap_or_default() {
            let placed = value.placed;
            let checksum = checks.then_some(value.checksum);
            let adopted = match cells.get(&placed.segment) {
                Some(&cell) => cache.adopt_placed(
                    &value.name,
                    placed.size,
                    value.fetched,
                    checksum,
                    (cell, placed.page),
                )?,
                // The index was emptied meanwhile, and another scan fills it.
                None => true,
            };
            if !adopted {
                refused.push(placed);
            }
        }
        Ok(refused)
    }
}

/// Finds all valid values, the newest of each name, in the order of their fetch; and the segments that they are
/// in. With `cleans`, everything else in the segments is deleted.
///
/// # Errors
///
/// Where the folder cannot be listed. A segment that cannot be read is left out.
pub fn scan(files: &SegmentFiles, cleans: bool) -> io::Result<Found> {
    scan_listed(files, &files.list()?, cleans)
}

/// The same in the segments with these numbers. So a participant may list them first, and then make sure that no other one has
/// taken over: whatever is begun later is none of them.
///
/// # Errors
///
/// Where what is there cannot be deleted.
pub fn scan_listed(files: &SegmentFiles, numbers: &[u64], cleans: bool) -> io::Result<Found> {
    let mut segments = Vec::new();
    let mut values = Vec::new();
    for &number in numbers {
        match scan_segment(files, number) {
            Ok(Some((segment, found))) => {
                segments.push(segment);
                values.extend(found);
            }
            Ok(None) if cleans => files.remove(number)?,
            Err(error) if cleans && is_elsewhere(&error) => files.remove(number)?,
            _ => {}
        }
    }
    let values = newest(values);
    if cleans {
        give_back(files, &mut segments, in_use(places(&values)))?;
    } else {
        let in_use = in_use(places(&values));
        segments.retain(|segment| in_use.contains_key(&segment.number));
    }
    Ok(Found { segments, values })
}

/// The newest value of each name, by age.
fn newest(mut values: Vec<FoundValue>) -> Vec<FoundValue> {
    values.sort_unstable_by(|a, b| {
        let order = |value: &FoundValue| (value.fetched, value.placed.segment, value.placed.page);
        order(a).cmp(&order(b))
    });
    let mut last = HashMap::with_capacity(values.len());
    for (n, value) in values.iter().enumerate() {
        last.insert(value.name.as_str(), n);
    }
    let is_last: Vec<bool> = (values.iter().enumerate())
        .map(|(n, value)| last.get(value.name.as_str()) == Some(&n))
        .collect();
    let mut is_last = is_last.into_iter();
    values.retain(|_| is_last.next().unwrap_or(false));
    values
}

/// Gives back all that these segments hold beside the values at these places.
///
/// # Errors
///
/// Where the file system refuses.
pub fn keep_only(files: &SegmentFiles, numbers: &[u64], placed: &[Placed]) -> io::Result<()> {
    let capacities: HashMap<u64, u32> = placed.iter().map(|p| (p.segment, p.capacity)).collect();
    let segment = |&number| FoundSegment {
        number,
        capacity: capacities.get(&number).copied().unwrap_or(0),
    };
    let mut segments = numbers.iter().map(segment).collect();
    give_back(files, &mut segments, in_use(placed.iter().copied()))
}

fn places(values: &[FoundValue]) -> impl Iterator<Item = Placed> {
    values.iter().map(|value| value.placed)
}

/// First and last byte of each value that stays, by segment.
fn in_use(places: impl Iterator<Item = Placed>) -> HashMap<u64, Vec<(u64, u64)>> {
    let mut in_use = HashMap::<u64, Vec<(u64, u64)>>::new();
    for placed in places {
        let end = placed.start() + placed.length();
        let of_segment = in_use.entry(placed.segment).or_default();
        of_segment.push((placed.start(), end));
    }
    in_use
}

/// The values of a segment; `None` where it is none of ours.
fn scan_segment(
    files: &SegmentFiles,
    number: u64,
) -> io::Result<Option<(FoundSegment, Vec<FoundValue>)>> {
    let file = files.open_to_scan(number)?;
    let len = file.metadata()?.len();
    let Some(header) = header_of(&file)?.filter(|header| header.number == number) else {
        return Ok(None);
    };
    // No value begins behind the end of the file, and no map is longer than its pages.
    let pages = len.saturating_sub(VALUES_AT).div_ceil(PAGE);
    let mapped = pages
        .min(u64::from(header.capacity))
        .min(VALUES_AT - MAP_AT);
    let mut map = vec![0; usize::try_from(mapped).unwrap_or(0)];
    file.read_exact_at(&mut map, MAP_AT)?;
    let mut found = Vec::new();
    let mut free_from = VALUES_AT;
    let mut data_from = VALUES_AT;
    for (n, state) in (0u32..).zip(&map) {
        let at = VALUES_AT + u64::from(n) * PAGE;
        if *state != VALID || at < free_from || at + PAGE <= data_from {
            continue;
        }
        match value_at(&file, len, number, FIRST_PAGE + n)? {
            Some(mut value) => {
                value.placed.capacity = header.capacity;
                free_from = at + value.placed.length();
                found.push(value);
            }
            // A hole, perhaps a large one.
            None => data_from = next_data(&file, at)?.unwrap_or(len),
        }
    }
    let segment = FoundSegment {
        number,
        capacity: header.capacity,
    };
    if !files.has_holes() && header.capacity > 1 {
        // A copy from another file system: what is evicted here would stay.
        return Ok(None);
    }
    Ok(Some((segment, found)))
}

fn value_at(file: &File, len: u64, segment: u64, page: u32) -> io::Result<Option<FoundValue>> {
    let at = u64::from(page) * PAGE;
    if at + HEADER as u64 > len {
        return Ok(None);
    }
    let mut bytes = [0; HEADER];
    match file.read_exact_at(&mut bytes, at) {
        // It was emptied meanwhile.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let Some(header) = ValueHeader::parse(&bytes) else {
        return Ok(None);
    };
    let placed = header.placed;
    let end = (at + HEADER as u64).saturating_add(placed.size);
    let is_own = placed.segment == segment && placed.page == page && end <= len;
    Ok(is_own.then_some(FoundValue {
        name: header.name,
        placed,
        checksum: header.checksum,
        fetched: header.fetched,
    }))
}

/// First byte from `at` on that is in no hole; `None` where there is none.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NXIO) => Ok(None),
        // This file system does not tell.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}

/// Gives back the blocks of what no value has, and removes segments without values.
fn give_back(
    files: &SegmentFiles,
    segments: &mut Vec<FoundSegment>,
    mut in_use: HashMap<u64, Vec<(u64, u64)>>,
) -> io::Result<()> {
    let mut kept = Vec::with_capacity(segments.len());
    for segment in segments.drain(..) {
        let Some(mut parts) = in_use.remove(&segment.number) else {
            files.remove(segment.number)?;
            continue;
        };
        parts.sort_unstable();
        let file = files.open_to_scan(segment.number)?;
        let len = file.metadata()?.len();
        // What is after the last value reaches to the end of its last page.
        parts.push((len.div_ceil(PAGE).max(FIRST_PAGE.into()) * PAGE, 0));
        // The map has room for the largest capacity, which a copy of the file may have filled.
        let map_end = MAP_AT + u64::from(segment.capacity).div_ceil(PAGE) * PAGE;
        let mut free_from = map_end.min(VALUES_AT);
        for (start, end) in parts {
            if start > free_from && next_data(&file, free_from)?.is_some_and(|data| data < start) {
                match punch(&file, free_from, start - free_from) {
                    Err(error) if is_unsupported(&error) => {}
                    punched => punched?,
                }
            }
            free_from = end;
        }
        kept.push(segment);
    }
    *segments = kept;
    Ok(())
}

/// All values that there are, valid or not yet, by the headers alone.
///
/// # Errors
///
/// Where the file system refuses.
pub fn walk(files: &SegmentFiles) -> io::Result<Vec<FoundValue>> {
    let mut found = Vec::new();
    for number in files.list()? {
        found.extend(values_in(files, number)?);
    }
    Ok(found)
}

/// The same of one segment.
///
/// # Errors
///
/// Where the file system refuses.
pub fn values_in(files: &SegmentFiles, number: u64) -> io::Result<Vec<FoundValue>> {
    let file = match files.open_to_scan(number) {
        Err(error) if is_elsewhere(&error) => return Ok(Vec::new()),
        file => file?,
    };
    let len = file.metadata()?.len();
    let (mut found, mut at) = (Vec::new(), VALUES_AT);
    while at < len {
        let page = u32::try_from(at / PAGE).map_err(|_| Errno::OVERFLOW)?;
        files.note_walked();
        if let Some(value) = value_at(&file, len, number, page)? {
            at += value.placed.length();
            found.push(value);
        } else {
            at += PAGE;
            // The file may end within a page.
            at = at.max(next_data(&file, at)?.unwrap_or(len) / PAGE * PAGE);
        }
    }
    Ok(found)
}

/// Deletes all values at and below a prefix, valid or not yet, whether or not an index knows them, or `only_counts`
/// them. Returns their number. Every header is read, so this is for who cannot ask the index.
///
/// # Errors
///
/// Where the file system refuses.
pub fn delete_below(files: &SegmentFiles, prefix: &str, only_counts: bool) -> io::Result<usize> {
    let prefix = prefix.trim_end_matches('/');
    let is_below = |value: &FoundValue| {
        ByteRange::parse(&value.name).is_some_and(|(key, _)| key::is_below(key, prefix))
    };
    let mut count = 0;
    for number in files.list()? {
        let mut found = values_in(files, number)?;
        found.retain(|value| prefix.is_empty() || is_below(value));
        count += found.len();
        for value in found.iter().filter(|_| !only_counts) {
            // Without holes each value is alone in its segment.
            let capacity = u32::from(!files.has_holes());
            files.delete(Placed {
                capacity,
                ..value.placed
            })?;
            files.note_walked();
        }
    }
    Ok(count)
}
