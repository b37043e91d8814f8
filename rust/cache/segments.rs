//! Segments: files of a pool that hold the bytes of many entries; where each entry is.
//!
//! A granted reservation gets pages at the end of the participant's own segment, or a segment of its own where it
//! is too large for that. No page is given out twice: what is deleted becomes a hole, and a segment without
//! entries to which no participant appends goes as a whole.

use std::sync::atomic::{Ordering, fence};

use super::cache::{Cache, Victim};
use super::peers::Peers;
use super::reserve::Reservation;
use crate::arena::{Cell, End, List, Place, State};
use crate::error::{Error, Result};
use crate::key::{self, ByteRange};
use crate::policy::Eviction;

/// Bytes of a page of a segment: each value begins with one.
pub const PAGE: u64 = 4096;
/// Bytes before each value: its header.
pub const VALUE_HEADER: u32 = 512;
/// Bytes of the longest name that a header has room for.
pub const MAX_NAME: usize = 448;
/// Pages before the first value of a segment.
pub const FIRST_PAGE: u32 = 65;
/// Bytes before the map of a segment, which has one for each page from [`FIRST_PAGE`] on.
pub const MAP_AT: u64 = 64;

/// Pages for values of a segment at least, at most, and the part of the bound that they are.
const LEAST: u64 = 16;
const MOST: u64 = (FIRST_PAGE as u64 - 1) * PAGE;
const PARTS: u64 = 16;
/// Segments at the front of the list that one step looks at.
pub(super) const LOOKED_AT: usize = 64;
/// Sparse segments that there may be.
pub(super) const FEW: usize = 8;
/// Extents that a file system notes in one block, at least: ext4 has room for 340 and XFS for 251, and both leave blocks
/// half empty where holes come in no order.
const EXTENTS: u32 = 120;

/// Where the bytes of an entry are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Number of the segment.
    pub segment: u64,
    /// Page of the file of the segment at which the header of the value begins.
    pub page: u32,
    /// Bytes of the value.
    pub size: u64,
    /// Pages of the segment in which values may begin; 1 where it has no other value, and never had.
    pub capacity: u32,
}

impl Placed {
    /// First byte of the header.
    #[must_use]
    pub fn start(self) -> u64 {
        u64::from(self.page) * PAGE
    }

    /// Bytes of header and value, in whole pages.
    #[must_use]
    pub fn length(self) -> u64 {
        pages_of(self.size).saturating_mul(PAGE)
    }

    /// Whether the segment has no other value, and never had.
    #[must_use]
    pub fn is_alone(self) -> bool {
        self.capacity == 1
    }

    /// The byte of the map of the segment that says whether the value is valid.
    #[must_use]
    pub fn map_at(self) -> u64 {
        MAP_AT + u64::from(self.page.saturating_sub(FIRST_PAGE))
    }
}

/// Pages that a value takes, with its header.
pub(super) fn pages_of(size: u64) -> u64 {
    size.saturating_add(u64::from(VALUE_HEADER)).div_ceil(PAGE)
}

/// Pages that a segment of this capacity takes beside its values: its header, the map, and what the file system
/// notes of its holes.
fn pages_beside(capacity: u32) -> u64 {
    let map = (MAP_AT + u64::from(capacity)).div_ceil(PAGE);
    map + u64::from(capacity / (2 * EXTENTS)) + 2
}

/// The segment to which this participant appends.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OpenSegment {
    cell: u32,
    number: u64,
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Gives each value a segment of its own, for a file system that cannot make holes.
    pub fn set_one_value_a_segment(&mut self, is_so: bool) {
        self.one_value_a_segment = is_so;
    }

    /// Whether each value has a segment of its own.
    pub(crate) fn has_one_value_a_segment(&self) -> bool {
        self.one_value_a_segment
    }

    /// Whether a value in it cannot be deleted on this file system: segments of several were made elsewhere.
    pub(crate) fn needs_holes(&self) -> Result<bool> {
        if self.one_value_a_segment {
            for i in self.arena.list_cells(List::Segments)? {
                if self.arena.segment_cell(i)?.segment_capacity() > 1 {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Pages for values of a segment that is made now.
    fn segment_capacity(&self) -> u32 {
        if self.one_value_a_segment {
            return 0;
        }
        (self.bound() / PAGE / PARTS).clamp(LEAST, MOST) as u32
    }

    /// Bytes beside its values that a segment may take which is made for a value of this size.
    pub(super) fn segment_overhead(&self, size: u64) -> u64 {
        if !self.arena.storage.has_places() {
            return 0;
        }
        let capacity = self.segment_capacity();
        let fits = pages_of(size) <= u64::from(capacity);
        self.bytes_beside(if fits { capacity } else { 1 })
    }

    pub(super) fn bytes_beside(&self, capacity: u32) -> u64 {
        match self.arena.header().unit {
            0 | 1 => 0,
            unit => pages_beside(capacity).saturating_mul(unit.max(PAGE)),
        }
    }

    /// Whether a file system takes this name of an entry and, in a pool, a header has room for it.
    pub(super) fn name_fits(&self, key: &str, range: ByteRange) -> bool {
        let longest = if self.arena.storage.has_places() {
            MAX_NAME
        } else {
            usize::MAX
        };
        if range == ByteRange::Full {
            return key.len() <= longest;
        }
        let name = range.cache_key(key);
        let last = name.rsplit('/').next().unwrap_or_default();
        name.len() <= longest && last.len() <= key::MAX_LABEL
    }

    /// The segment for a reservation that is granted now; `None` where values have files of their own.
    pub(super) fn segment_for(&mut self, reservation: &mut Reservation) -> Result<Option<u32>> {
        if !self.arena.storage.has_places() {
            return Ok(None);
        }
        let beside = reservation.cost - self.arena.header().cost(reservation.size);
        let (i, bytes) = self.segment_with_room(reservation.size, beside)?;
        self.use_reserved(reservation, bytes);
        Ok(Some(i))
    }

    /// The segment for a value of this size, and the bytes beside it, no more than `beside`, if it is a new one.
    pub(super) fn segment_with_room(&mut self, size: u64, beside: u64) -> Result<(u32, u64)> {
        let pages = pages_of(size);
        let capacity = self.segment_capacity();
        let is_shared = pages <= u64::from(capacity) && self.bytes_beside(capacity) <= beside;
        if is_shared && let Some(i) = self.own_segment(pages)? {
            return Ok((i, 0));
        }
        let number = self.new_segment_number();
        let i = if is_shared {
            self.close_own_segment()?;
            let owner = self.arena.storage.own_slot() as u32 + 1;
            let cell = self.arena.add_segment(number, capacity, owner)?;
            self.open_segment = OpenSegment { cell, number };
            cell
        } else {
            let i = self.arena.add_segment(number, 1, 0)?;
            self.sort_segment(i)?;
            i
        };
        let bytes = self.bytes_beside(if is_shared { capacity } else { 1 });
        self.count_folders(i64::try_from(bytes).unwrap_or(i64::MAX));
        Ok((i, bytes))
    }

    /// The segment to which this participant appends, if it has so many pages left.
    fn own_segment(&self, pages: u64) -> Result<Option<u32>> {
        let OpenSegment { cell: i, number } = self.open_segment;
        if i == 0 {
            return Ok(None);
        }
        let owner = self.arena.storage.own_slot() as u32 + 1;
        let Ok(cell) = self.arena.segment_cell(i) else {
            // Another participant has closed it, and its file is gone.
            return Ok(None);
        };
        let is_own = cell.segment_owner() == owner && cell.segment_number() == number;
        let end = u64::from(cell.segment_end()) + pages;
        Ok((is_own && end <= u64::from(cell.segment_capacity())).then_some(i))
    }

    /// A number that no other segment of the pool has, whichever index has made it.
    fn new_segment_number(&mut self) -> u64 {
        let [_, generation] = self.arena.storage.first_version();
        let header = self.arena.header_mut();
        header.value_segments_made = header.value_segments_made.wrapping_add(1);
        let made = u64::from(header.value_segments_made);
        let of_index = key::hash(&header.seed.to_le_bytes(), u64::from(generation), 0);
        of_index << 32 | made
    }

    fn close_own_segment(&mut self) -> Result<()> {
        let OpenSegment { cell, number } = std::mem::take(&mut self.open_segment);
        let is_own = |cell: &Cell| cell.segment_number() == number;
        if cell != 0 && self.arena.segment_cell(cell).is_ok_and(is_own) {
            self.close_segment(cell)?;
        }
        Ok(())
    }

    fn close_segment(&mut self, i: u32) -> Result<()> {
        self.arena.segment_cell_mut(i)?.close_segment();
        self.sort_segment(i)
    }

    /// Ends all appending to the segments of a participant that has died.
    pub(super) fn close_segments_of(&mut self, participant: usize) -> Result<()> {
        for i in self.arena.list_cells(List::Segments)? {
            if self.arena.segment_cell(i)?.segment_owner() as usize == participant + 1 {
                self.close_segment(i)?;
            }
        }
        Ok(())
    }

    /// Closes all segments without entries; a participant that appended to one opens another with its next value.
    pub fn close_empty_segments(&mut self) -> Result<()> {
        if self.one_value_a_segment {
            // None is open, and there are as many as values.
            return Ok(());
        }
        for i in self.arena.list_cells(List::Segments)? {
            let cell = self.arena.segment_cell(i)?;
            if cell.segment_owner() != 0 && cell.segment_entries() == 0 {
                self.close_segment(i)?;
            }
        }
        Ok(())
    }

    /// Puts a segment to the front if its file can go, or if it is sparse.
    pub(super) fn sort_segment(&mut self, i: u32) -> Result<()> {
        let cell = self.arena.segment_cell(i)?;
        if cell.is_spent_segment() || cell.is_sparse_segment() {
            self.arena.unlink(List::Segments, i)?;
            self.arena.link(List::Segments, i, End::First)?;
        }
        Ok(())
    }

    /// Gives an entry that is made now pages at the end of a segment.
    pub(super) fn append_entry(&mut self, i: u32, segment: u32) -> Result<()> {
        let pages = pages_of(self.arena.get(i)?.size()?);
        let cell = self.arena.segment_cell_mut(segment)?;
        let was_spent = cell.is_spent_segment();
        let page = cell.append_to_segment(pages)?;
        let place = Place { segment, page };
        self.arena.set_place_word(i, place.word(i))?;
        if was_spent {
            self.arena.unlink(List::Segments, segment)?;
            self.arena.link(List::Segments, segment, End::Last)?;
        }
        Ok(())
    }

    /// Takes an entry out of its segment.
    pub(super) fn unplace(&mut self, i: u32) -> Result<()> {
        let Some(place) = self.arena.place(i)? else {
            return Ok(());
        };
        let pages = pages_of(self.arena.get(i)?.size()?);
        let cell = self.arena.segment_cell_mut(place.segment)?;
        let was_sparse = cell.is_sparse_segment();
        cell.take_from_segment(pages)?;
        self.emptied |= cell.segment_entries() == 0;
        let is_news = !was_sparse || cell.is_spent_segment();
        self.arena.set_place_word(i, 0)?;
        if is_news {
            self.sort_segment(place.segment)?;
        }
        Ok(())
    }

    /// Where the bytes of an entry are; `None` where it has a file of its own.
    pub fn placed(&self, i: u32) -> Result<Option<Placed>> {
        let Some(Place { segment, page }) = self.arena.place(i)? else {
            if self.arena.storage.has_places() {
                return Err(Error::Corrupt("place: missing"));
            }
            return Ok(None);
        };
        let cell = self.arena.segment_cell(segment)?;
        let (segment, capacity) = (cell.segment_number(), cell.segment_capacity());
        let page = page.saturating_add(FIRST_PAGE);
        let size = self.arena.get(i)?.size()?;
        Ok(Some(Placed {
            segment,
            page,
            size,
            capacity,
        }))
    }

    /// The entry of exactly this range that can be served: its cell, what tells it from others, and its place.
    pub fn find_placed(&self, key: &str, range: ByteRange) -> Result<Option<(u32, u64, Placed)>> {
        let Some(i) = self.arena.find(key, range)? else {
            return Ok(None);
        };
        if self.arena.get(i)?.state() != State::Live {
            return Ok(None);
        }
        let placed = self.placed(i)?;
        Ok(placed.map(|placed| (i, self.place_word(i), placed)))
    }

    /// What tells an entry, with the number of its segment, from any other that may be in its cell later: see
    /// [`Cache::is_still`].
    #[must_use]
    pub fn place_word(&self, i: u32) -> u64 {
        self.arena.place_word(i)
    }

    /// Whether a cell has this place in this segment still, and its entry can be served: then the bytes that were
    /// read there are its own, for they are deleted later. Needs no lock of other processes.
    ///
    /// The order counts. The number of the segment tells that it was the same all the time, so the word tells that
    /// the entry was, and so its state is not that of a later one in its cell.
    #[must_use]
    pub fn is_still(&self, i: u32, word: u64, segment: u64) -> bool {
        let is_live = |state| state == State::Live;
        if !self.arena.storage.is_current()
            || !self
                .arena
                .get(i)
                .is_ok_and(|cell| is_live(cell.state_now()))
        {
            return false;
        }
        fence(Ordering::Acquire);
        if self.arena.place_word(i) != word {
            return false;
        }
        fence(Ordering::Acquire);
        self.arena.is_in_segment(word, i, segment)
    }

    /// Where a granted reservation writes its bytes.
    pub fn placed_for(&self, id: u64) -> Result<Option<Placed>> {
        match self.reservations.get(&id) {
            Some(reservation) if reservation.cell != 0 => self.placed(reservation.cell),
            _ => Ok(None),
        }
    }

    /// What others have in progress of a key, or of all keys below it, to be deleted before it is changed: they may
    /// stop before they do so themselves. Nothing is reported back of it.
    pub fn in_progress_below(&self, prefix: &str) -> Result<Vec<Victim>> {
        let prefix = prefix.trim_end_matches('/');
        let mut victims = Vec::new();
        for i in self.arena.list_cells(List::InProgress)? {
            let placed = self.placed(i)?;
            if self.arena.get(i)?.state() != State::Deleting || placed.is_none() {
                continue;
            }
            let (key, range) = self.arena.name(i)?;
            if key::is_below(&key, prefix) {
                victims.push(Victim {
                    cell: 0,
                    cache_key: range.cache_key(&key),
                    placed,
                });
            }
        }
        Ok(victims)
    }

    /// Each segment: its number, and the most bytes that its file takes on the disk.
    pub fn segment_sizes(&self) -> Result<Vec<(u64, u64)>> {
        let cells = self.arena.list_cells(List::Segments)?.into_iter();
        let size = |i| {
            let cell = self.arena.segment_cell(i)?;
            let bytes = cell.segment_pages().saturating_mul(PAGE);
            let bytes = bytes.saturating_add(self.bytes_beside(cell.segment_capacity()));
            Ok((cell.segment_number(), bytes))
        };
        cells.map(size).collect()
    }

    /// Where the bytes of all entries are that these segments have.
    pub fn placed_in(&self, segments: &[u64]) -> Result<Vec<Placed>> {
        let all = self.arena.placed_cells().map(|i| self.placed(i));
        let mut found = Vec::new();
        for placed in all {
            found.extend(placed?.filter(|placed| segments.contains(&placed.segment)));
        }
        Ok(found)
    }

    /// Whether a segment has lost its last entry by a step of this participant since this was asked last.
    pub fn take_emptied(&mut self) -> bool {
        std::mem::take(&mut self.emptied)
    }

    /// Segments with files that can go, as cell and number; to be reported to [`Cache::segment_removed`].
    pub fn spent_segments(&self, limit: usize) -> Result<Vec<(u32, u64)>> {
        let mut found = Vec::new();
        if !self.is_complete() {
            // The values of some are not taken in yet.
            return Ok(found);
        }
        let (mut at, mut left) = (self.arena.list(List::Segments)[0], LOOKED_AT);
        while at != 0 && left > 0 && found.len() < limit {
            let cell = self.arena.segment_cell(at)?;
            if cell.is_spent_segment() {
                found.push((at, cell.segment_number()));
            }
            left -= 1;
            at = self.arena.neighbour(at, End::Last)?;
        }
        Ok(found)
    }

    /// The file of a segment is gone.
    pub fn segment_removed(&mut self, i: u32, number: u64) -> Result<()> {
        let Ok(cell) = self.arena.segment_cell(i) else {
            // Another participant was faster.
            return Ok(());
        };
        if cell.segment_number() != number || !cell.is_spent_segment() {
            return Ok(());
        }
        let bytes = self.bytes_beside(cell.segment_capacity());
        self.arena.remove_segment(i)?;
        self.count_folders(-i64::try_from(bytes).unwrap_or(i64::MAX));
        Ok(())
    }
}
