//! The arena: one array of cells with checked access, allocation and intrusive lists.

use super::cell::{Cell, Kind, State};
use super::path_cache::PathCache;
use super::storage::{Header, Storage};
use crate::error::{Error, Result};

/// Cell numbers take 28 bits of a hash table slot; the other 4 are a tag of the hash.
pub const MAX_CELLS: usize = 1 << 28;

/// The directory above all others. It is never freed.
pub const ROOT: u32 = 1;

/// The bits of a link in a list of entries that are a cell number; the others are half of a note.
const LINK: u32 = MAX_CELLS as u32 - 1;
const LINK_BITS: u32 = LINK.count_ones();
const HALF: u32 = 32 - LINK_BITS;

/// The bit of a note that says that an entry is in the main list. The others are the eviction policy's.
pub const IN_MAIN: u8 = 1;

/// Cells by which the array grows at least: 56 KiB.
const GROWTH: usize = 1024;

/// The cells and everything in them. Every number that is read from a cell is checked before it is
/// used as an index, because a mapped file is not trusted.
#[derive(Debug)]
pub struct Arena<S> {
    /// The memory.
    pub storage: S,
    /// Directories that were found last. In a shared index only their hashes can be relied on.
    pub(crate) paths: PathCache,
}

/// One of the intrusive lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// `Live` entries in the order of their use, least recent first: all of them, unless the eviction
    /// policy has put some into `Main`.
    Recency,
    /// `Live` entries that the eviction policy protects, least recently used first.
    Main,
    /// `DeleteFailed` entries, next to retry first.
    DeleteFailed,
    /// `Filling` and `Deleting` entries.
    InProgress,
    /// Absences, least recently used first.
    Absences,
    /// Segments of a pool, those with files that can go first.
    Segments,
}

/// An end of a list, or the direction towards it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The least recent, or the next to go.
    First,
    /// The most recent, or the last to go.
    Last,
}

impl End {
    /// The other one.
    #[inline]
    pub(crate) fn other(self) -> End {
        match self {
            End::First => End::Last,
            End::Last => End::First,
        }
    }

    /// This one of the two.
    #[inline]
    pub(crate) fn of<T>(self, [first, last]: [T; 2]) -> T {
        match self {
            End::First => first,
            End::Last => last,
        }
    }
}

impl<S: Storage> Arena<S> {
    /// An arena over this memory, as it is.
    pub fn new(storage: S) -> Self {
        Arena {
            storage,
            paths: PathCache::default(),
        }
    }

    /// Forgets which directories were found last.
    pub(crate) fn forget_paths(&mut self) {
        self.paths = PathCache::default();
    }

    /// Cell `i`.
    #[inline]
    pub fn get(&self, i: u32) -> Result<&Cell> {
        self.storage
            .cells()
            .get(i as usize)
            .ok_or(Error::Corrupt("cell number out of range"))
    }

    /// Cell `i`, mutable.
    #[inline]
    pub fn get_mut(&mut self, i: u32) -> Result<&mut Cell> {
        let cell = self.storage.cells_mut().get_mut(i as usize);
        cell.ok_or(Error::Corrupt("cell number out of range"))
    }

    /// The header.
    #[inline]
    pub fn header(&self) -> &Header {
        self.storage.header()
    }

    /// The header, mutable.
    #[inline]
    pub fn header_mut(&mut self) -> &mut Header {
        self.storage.header_mut()
    }

    /// Makes sure that the next `count` allocations succeed.
    pub fn ensure(&mut self, count: usize) -> Result<()> {
        let header = self.header();
        let len = self.storage.cells().len();
        let untouched = len.saturating_sub(header.cells_used as usize);
        let available = header.free_count as usize + untouched;
        let Some(missing) = count.checked_sub(available).filter(|n| *n > 0) else {
            return Ok(());
        };
        let wanted = len.saturating_add(missing.max(GROWTH)).min(MAX_CELLS);
        if wanted.saturating_sub(len) < missing {
            return Err(Error::Full);
        }
        self.storage.grow_cells(wanted)
    }

    /// Takes a free cell; `ensure` must have made sure that there is one.
    pub fn alloc(&mut self, cell: Cell) -> Result<u32> {
        let Header {
            free,
            free_count,
            cells_used,
            ..
        } = *self.header();
        let i = if free != 0 {
            let cell = self.get(free)?;
            if cell.kind()? != Kind::Free || free_count == 0 {
                return Err(Error::Corrupt("free list: cell in use"));
            }
            let next = cell.older;
            let header = self.header_mut();
            header.free_count = free_count - 1;
            header.free = next;
            free
        } else {
            self.get(cells_used)?;
            self.header_mut().cells_used = cells_used.saturating_add(1);
            cells_used
        };
        *self.get_mut(i)? = cell;
        Ok(i)
    }

    /// Frees a cell.
    pub fn free(&mut self, i: u32) -> Result<()> {
        let next = self.header().free;
        let mut cell = Cell::new(Kind::Free);
        cell.older = next;
        *self.get_mut(i)? = cell;
        let header = self.header_mut();
        header.free = i;
        header.free_count = header.free_count.checked_add(1).ok_or(OVERFLOW)?;
        Ok(())
    }

    fn ends(&mut self, list: List) -> &mut [u32; 2] {
        let header = self.storage.header_mut();
        match list {
            List::Recency => &mut header.recency,
            List::Main => &mut header.main,
            List::DeleteFailed => &mut header.delete_failed,
            List::InProgress => &mut header.in_progress,
            List::Absences => &mut header.absence_order,
            List::Segments => &mut header.value_segments,
        }
    }

    /// First and last cell of a list, or zeros.
    #[must_use]
    pub fn list(&self, list: List) -> [u32; 2] {
        match list {
            List::Recency => self.header().recency,
            List::Main => self.header().main,
            List::DeleteFailed => self.header().delete_failed,
            List::InProgress => self.header().in_progress,
            List::Absences => self.header().absence_order,
            List::Segments => self.header().value_segments,
        }
    }

    /// First or last cell of a list. An error where the cell does not belong there: a caller that
    /// drains a list relies on each cell being another one.
    pub fn end(&self, list: List, end: End) -> Result<Option<u32>> {
        let i = end.of(self.list(list));
        if i == 0 {
            return Ok(None);
        }
        if list.holds(self.get(i)?) {
            Ok(Some(i))
        } else {
            Err(WRONG_STATE)
        }
    }

    /// The neighbour of `i` towards the first or the last cell.
    pub fn neighbour(&self, i: u32, towards: End) -> Result<u32> {
        let cell = self.get(i)?;
        Ok(match towards {
            End::First => cell.older & LINK,
            End::Last => cell.newer & LINK,
        })
    }

    fn set_neighbour(&mut self, i: u32, towards: End, to: u32) -> Result<()> {
        let cell = self.get_mut(i)?;
        match towards {
            End::First => cell.older = cell.older & !LINK | to & LINK,
            End::Last => cell.newer = cell.newer & !LINK | to & LINK,
        }
        Ok(())
    }

    /// What the eviction policy notes of an entry. A wrong note is harmless, so nothing checks it.
    #[inline]
    pub fn note(&self, i: u32) -> Result<u8> {
        let cell = self.get(i)?;
        Ok((cell.older >> LINK_BITS << HALF | cell.newer >> LINK_BITS) as u8)
    }

    /// Sets the same.
    #[inline]
    pub fn set_note(&mut self, i: u32, note: u8) -> Result<()> {
        let note = u32::from(note);
        let cell = self.get_mut(i)?;
        cell.older = cell.older & LINK | note >> HALF << LINK_BITS;
        cell.newer = cell.newer & LINK | note << LINK_BITS;
        Ok(())
    }

    /// Links a cell at one end of `list`. It must not be in a list that uses the same links.
    pub fn link(&mut self, list: List, i: u32, end: End) -> Result<()> {
        let beside = std::mem::replace(end.of(self.ends(list).each_mut()), i);
        self.set_neighbour(i, end, 0)?;
        self.set_neighbour(i, end.other(), beside)?;
        if beside == 0 {
            *end.other().of(self.ends(list).each_mut()) = i;
            Ok(())
        } else {
            self.set_neighbour(beside, end, i)
        }
    }

    /// Unlinks a cell from `list`.
    pub fn unlink(&mut self, list: List, i: u32) -> Result<()> {
        let before = self.neighbour(i, End::First)?;
        let after = self.neighbour(i, End::Last)?;
        if before == 0 {
            self.ends(list)[0] = after;
        } else {
            self.set_neighbour(before, End::Last, after)?;
        }
        if after == 0 {
            self.ends(list)[1] = before;
        } else {
            self.set_neighbour(after, End::First, before)?;
        }
        Ok(())
    }
}

impl List {
    /// Whether such a cell belongs to the list.
    pub(crate) fn holds(self, cell: &Cell) -> bool {
        let state = cell.state();
        let is_in_state = match self {
            List::Recency | List::Main => state == State::Live,
            List::DeleteFailed => state == State::DeleteFailed,
            List::InProgress => matches!(state, State::Filling | State::Deleting),
            List::Absences => return matches!(cell.kind(), Ok(Kind::Absent)),
            List::Segments => return matches!(cell.kind(), Ok(Kind::Segment)),
        };
        cell.is_entry() && is_in_state
    }
}

pub(crate) const WRONG_STATE: Error = Error::Corrupt("list: entry in the wrong state");

/// A counter beyond its type; only a damaged index gets there.
pub(crate) const OVERFLOW: Error = Error::Corrupt("counter overflow");
