//! Places: in which segment of a pool, and at which of its pages, the bytes of an entry are.
//!
//! Only storage with [`Storage::has_places`] has them: one word for each cell, in an array of their own, so
//! that an index of files takes no more room.

use super::arena::{Arena, End, List};
use super::cell::{Cell, Kind};
use super::racing::load_u64;
use super::storage::Storage;
use crate::checksum::crc32c;
use crate::error::{Error, Result};
use crate::key::ODD;

/// Bits of the number of a page in a place.
const PAGE_BITS: u32 = 24;
/// Bits of a place; the rest of its word are a check.
const PLACE_BITS: u32 = 52;
/// Bits of that check.
const CHECK_BITS: u32 = 12;
/// No value begins at this page of a segment, or after it.
pub const MAX_PAGES: u32 = 1 << PAGE_BITS;

/// A segment with less than one in so many of its pages in use is sparse.
const SPARSE: u64 = 4;

const NO_SEGMENT: Error = Error::Corrupt("place: of no segment");

/// The pages of one entry: the cell of their segment, and the first of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) segment: u32,
    pub(crate) page: u32,
}

/// Each bit of what it covers flips one bit of it; the cell tells the word from that of another one.
fn check_of(place: u64, cell: u32) -> u64 {
    let salt = u64::from(cell).wrapping_add(1).wrapping_mul(ODD) >> (64 - CHECK_BITS);
    let folded = (0..PLACE_BITS).step_by(CHECK_BITS as usize);
    folded.fold(salt, |check, from| check ^ place >> from) & ((1 << CHECK_BITS) - 1)
}

impl Place {
    /// The word of this place in the row of a cell; never 0.
    pub(crate) fn word(self, cell: u32) -> u64 {
        let place = u64::from(self.segment) << PAGE_BITS | u64::from(self.page);
        place | check_of(place, cell) << PLACE_BITS
    }

    fn of(word: u64, cell: u32) -> Result<Place> {
        let place = word & ((1 << PLACE_BITS) - 1);
        if word >> PLACE_BITS != check_of(place, cell) {
            return Err(Error::Corrupt("place: wrong check"));
        }
        Ok(Place {
            segment: (place >> PAGE_BITS) as u32,
            page: place as u32 & (MAX_PAGES - 1),
        })
    }
}

impl<S: Storage> Arena<S> {
    /// The word of an entry: equal words, and equal numbers of the segment, mean that the entry is the same, for no
    /// page of a segment is used twice. The cell of the segment is not enough: it may be another one's later. 0 means
    /// that it has none. Another process may change it meanwhile.
    #[inline]
    pub(crate) fn place_word(&self, i: u32) -> u64 {
        let word = self.storage.places().get(i as usize);
        word.map_or(0, load_u64)
    }

    /// Sets it.
    pub(crate) fn set_place_word(&mut self, i: u32, word: u64) -> Result<()> {
        let place = self.storage.places_mut().get_mut(i as usize);
        *place.ok_or(Error::Corrupt("place: out of range"))? = word;
        Ok(())
    }

    /// The place of an entry; `None` where it has none.
    pub(crate) fn place(&self, i: u32) -> Result<Option<Place>> {
        match self.place_word(i) {
            0 => Ok(None),
            word => Place::of(word, i).map(Some),
        }
    }

    /// Whether a word in the row of a cell names a place in the segment with this number. Another process may change
    /// that meanwhile.
    pub(crate) fn is_in_segment(&self, word: u64, cell: u32, number: u64) -> bool {
        let place = Place::of(word, cell);
        let segment = place.and_then(|place| self.get(place.segment));
        segment.is_ok_and(|segment| segment.hash_now() == number)
    }

    /// The cell of a segment.
    pub(crate) fn segment_cell(&self, i: u32) -> Result<&Cell> {
        let cell = self.get(i)?;
        if cell.kind()? == Kind::Segment && cell.is_sound_segment() {
            Ok(cell)
        } else {
            Err(NO_SEGMENT)
        }
    }

    /// The same, mutable.
    pub(crate) fn segment_cell_mut(&mut self, i: u32) -> Result<&mut Cell> {
        self.segment_cell(i)?;
        self.get_mut(i)
    }

    /// Makes the cell of a segment, the last of the list.
    pub(crate) fn add_segment(&mut self, number: u64, capacity: u32, owner: u32) -> Result<u32> {
        self.ensure(1)?;
        let i = self.alloc(Cell::segment(number, capacity, owner))?;
        self.link(List::Segments, i, End::Last)?;
        Ok(i)
    }

    /// Frees the cell of a segment.
    pub(crate) fn remove_segment(&mut self, i: u32) -> Result<()> {
        self.segment_cell(i)?;
        self.unlink(List::Segments, i)?;
        self.free(i)
    }

    /// Cells of all entries that have a place. Looks at each cell there is.
    pub(crate) fn placed_cells(&self) -> impl Iterator<Item = u32> {
        (1..self.header().cells_used).filter(|&i| self.place_word(i) != 0)
    }

    /// Recomputes the entries of each segment. Returns their bytes beside those of the entries.
    pub(super) fn validate_places(&self) -> Result<()> {
        let mut counts = std::collections::HashMap::<u32, u32>::new();
        for i in 1..self.header().cells_used {
            let is_entry = self.get(i)?.is_entry();
            match self.place(i)? {
                Some(place) if is_entry => *counts.entry(place.segment).or_default() += 1,
                Some(_) => return Err(Error::Corrupt("place: of a cell that is no entry")),
                None if is_entry && self.storage.has_places() => {
                    return Err(Error::Corrupt("place: missing"));
                }
                None => {}
            }
        }
        for i in self.list_cells(List::Segments)? {
            let cell = self.segment_cell(i)?;
            let held = counts.remove(&i).unwrap_or(0);
            if held != cell.segment_entries() {
                return Err(Error::Corrupt("segment: count of entries"));
            }
        }
        if counts.is_empty() {
            Ok(())
        } else {
            Err(NO_SEGMENT)
        }
    }
}

/// A segment: its number stands in the place of the size of an entry, with its CRC32C in that of the checksum.
impl Cell {
    fn segment(number: u64, capacity: u32, owner: u32) -> Cell {
        let mut cell = Cell::new(Kind::Segment);
        cell.set_hash(number);
        cell.set_checksum(Some(crc32c(&number.to_le_bytes())));
        (cell.earlier, cell.left) = (capacity, owner);
        cell
    }

    fn is_sound_segment(&self) -> bool {
        self.checksum() == Some(crc32c(&self.segment_number().to_le_bytes()))
    }

    /// Number of a segment, from which its file has its name.
    pub(crate) fn segment_number(&self) -> u64 {
        self.hash()
    }

    /// Pages in which values may begin.
    pub(crate) fn segment_capacity(&self) -> u32 {
        self.earlier
    }

    /// Participant (plus one) that appends to it; 0 where none does any more.
    pub(crate) fn segment_owner(&self) -> u32 {
        self.left
    }

    /// Pages that were given out.
    pub(crate) fn segment_end(&self) -> u32 {
        self.later
    }

    /// Entries with their bytes in it.
    pub(crate) fn segment_entries(&self) -> u32 {
        self.right
    }

    /// Whether its file can go.
    pub(crate) fn is_spent_segment(&self) -> bool {
        self.segment_owner() == 0 && self.segment_entries() == 0
    }

    /// Pages of those entries.
    pub(crate) fn segment_pages(&self) -> u64 {
        u64::from_le_bytes(self.label)
    }

    /// Whether it takes a file for few pages: less than a quarter of what it could hold.
    pub(crate) fn is_sparse_segment(&self) -> bool {
        let room = u64::from(self.segment_capacity());
        self.segment_owner() == 0 && room > 1 && self.segment_pages().saturating_mul(SPARSE) < room
    }

    /// Gives out pages, for one more entry. Returns the first of them.
    pub(crate) fn append_to_segment(&mut self, pages: u64) -> Result<u32> {
        let first = self.later;
        let end = u32::try_from(u64::from(first).saturating_add(pages));
        self.later = end.unwrap_or(u32::MAX);
        self.add_to_segment(pages)?;
        Ok(first)
    }

    /// Counts one entry more.
    pub(crate) fn add_to_segment(&mut self, pages: u64) -> Result<()> {
        self.right = self.right.checked_add(1).ok_or(super::arena::OVERFLOW)?;
        self.label = self.segment_pages().saturating_add(pages).to_le_bytes();
        Ok(())
    }

    /// Counts one entry fewer.
    pub(crate) fn take_from_segment(&mut self, pages: u64) -> Result<()> {
        let less = self.right.checked_sub(1);
        self.right = less.ok_or(Error::Corrupt("segment: fewer entries than none"))?;
        let rest = self.segment_pages().checked_sub(pages);
        let rest = rest.ok_or(Error::Corrupt("segment: fewer pages than none"))?;
        self.label = rest.to_le_bytes();
        Ok(())
    }

    /// No participant appends to it any more.
    pub(crate) fn close_segment(&mut self) {
        self.left = 0;
    }
}
