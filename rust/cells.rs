//! Cells: the one array that holds everything. Checked access, allocation, and lists.

use crate::block::{Block, Header};
use crate::cell::{Cell, Kind, State};
use crate::error::{Fault, Res};
use crate::memo::Memo;

/// Cell numbers are kept in 28 bits of a table slot; the other 4 are a tag of the hash.
pub const MAX_CELLS: usize = 1 << 28;

/// The directory above all others. It is never freed.
pub const ROOT: u32 = 1;

/// Cells by which a block grows at least: 56 KiB.
const GROWTH: usize = 1024;

/// Cells with checked access, allocation and lists. Every number read from a cell is checked
/// before it is used as an index, for a mapped file is not to be trusted.
#[derive(Debug)]
pub struct Cells<B> {
    /// The memory.
    pub block: B,
    /// Directories found last. Where others may change the block, only their hashes are of use.
    pub(crate) memo: Memo,
}

/// One of the intrusive lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// `Present` entries, least recently used first.
    Recency,
    /// `Present` entries, earliest fetch first.
    Time,
    /// `Orphan` entries, next to try first.
    Orphans,
    /// `Writing` and `Dropping` entries.
    Busy,
}

impl<B: Block> Cells<B> {
    /// Cell `i`.
    #[inline]
    pub fn get(&self, i: u32) -> Res<&Cell> {
        self.block
            .cells()
            .get(i as usize)
            .ok_or(Fault::Corrupt("a cell number out of range"))
    }

    /// Cell `i`, to change it.
    #[inline]
    pub fn get_mut(&mut self, i: u32) -> Res<&mut Cell> {
        let cell = self.block.cells_mut().get_mut(i as usize);
        cell.ok_or(Fault::Corrupt("a cell number out of range"))
    }

    /// The header.
    #[inline]
    pub fn header(&self) -> &Header {
        self.block.header()
    }

    /// The header, to change it.
    #[inline]
    pub fn header_mut(&mut self) -> &mut Header {
        self.block.header_mut()
    }

    /// Makes sure that the next `count` allocations succeed.
    pub fn ensure(&mut self, count: usize) -> Res<()> {
        let header = self.header();
        let have = header.free_count as usize
            + self
                .block
                .cells()
                .len()
                .saturating_sub(header.used as usize);
        let Some(missing) = count.checked_sub(have).filter(|n| *n > 0) else {
            return Ok(());
        };
        let len = self.block.cells().len();
        let wanted = len.saturating_add(missing.max(GROWTH)).min(MAX_CELLS);
        if wanted.saturating_sub(len) < missing {
            return Err(Fault::Full);
        }
        self.block.grow_cells(wanted)
    }

    /// Takes a free cell; `ensure` must have made room.
    pub fn alloc(&mut self, cell: Cell) -> Res<u32> {
        let Header {
            free,
            free_count,
            used,
            ..
        } = *self.header();
        let i = if free != 0 {
            let cell = self.get(free)?;
            if cell.kind()? != Kind::Free || free_count == 0 {
                return Err(Fault::Corrupt("a cell in use among the free ones"));
            }
            let next = cell.older;
            let header = self.header_mut();
            header.free_count = free_count - 1;
            header.free = next;
            free
        } else {
            let i = used;
            self.get(i)?;
            self.header_mut().used = i.saturating_add(1);
            i
        };
        *self.get_mut(i)? = cell;
        Ok(i)
    }

    /// Gives a cell back.
    pub fn free(&mut self, i: u32) -> Res<()> {
        let next = self.header().free;
        let mut cell = Cell::new(Kind::Free);
        cell.older = next;
        *self.get_mut(i)? = cell;
        let header = self.header_mut();
        header.free = i;
        header.free_count = header.free_count.checked_add(1).ok_or(COUNT)?;
        Ok(())
    }

    fn ends(&mut self, list: List) -> &mut [u32; 2] {
        let header = self.block.header_mut();
        match list {
            List::Recency => &mut header.recency,
            List::Time => &mut header.time,
            List::Orphans => &mut header.orphans,
            List::Busy => &mut header.busy,
        }
    }

    /// First and last cell of a list, or zeros.
    #[must_use]
    pub fn list(&self, list: List) -> [u32; 2] {
        match list {
            List::Recency => self.header().recency,
            List::Time => self.header().time,
            List::Orphans => self.header().orphans,
            List::Busy => self.header().busy,
        }
    }

    /// First or last cell of a list; an error where it is none of those that belong there, for
    /// whoever takes one away after the other relies on its being another one each time.
    pub fn end(&self, list: List, at_last: bool) -> Res<Option<u32>> {
        let [first, last] = self.list(list);
        let i = if at_last { last } else { first };
        if i == 0 {
            return Ok(None);
        }
        let cell = self.get(i)?;
        let state = cell.state();
        let belongs = match list {
            List::Recency | List::Time => state == State::Present,
            List::Orphans => state == State::Orphan,
            List::Busy => matches!(state, State::Writing | State::Dropping),
        };
        if cell.is_entry() && belongs {
            Ok(Some(i))
        } else {
            Err(Fault::Corrupt("a list with a stranger"))
        }
    }

    /// The neighbour of `i` towards the first (`false`) or the last (`true`) cell.
    pub fn neighbour(&self, list: List, i: u32, towards_last: bool) -> Res<u32> {
        let cell = self.get(i)?;
        Ok(match (list, towards_last) {
            (List::Time, false) => cell.earlier,
            (List::Time, true) => cell.later,
            (_, false) => cell.older,
            (_, true) => cell.newer,
        })
    }

    fn set_neighbour(&mut self, list: List, i: u32, towards_last: bool, to: u32) -> Res<()> {
        let cell = self.get_mut(i)?;
        match (list, towards_last) {
            (List::Time, false) => cell.earlier = to,
            (List::Time, true) => cell.later = to,
            (_, false) => cell.older = to,
            (_, true) => cell.newer = to,
        }
        Ok(())
    }

    /// Links a cell that is in no list of this sort at one end of `list`.
    pub fn link(&mut self, list: List, i: u32, at_last: bool) -> Res<()> {
        let end = usize::from(at_last);
        let beside = std::mem::replace(self.ends(list).get_mut(end).ok_or(ENDS)?, i);
        self.set_neighbour(list, i, at_last, 0)?;
        self.set_neighbour(list, i, !at_last, beside)?;
        if beside == 0 {
            *self.ends(list).get_mut(1 - end).ok_or(ENDS)? = i;
            Ok(())
        } else {
            self.set_neighbour(list, beside, at_last, i)
        }
    }

    /// Takes a cell out of `list`.
    pub fn unlink(&mut self, list: List, i: u32) -> Res<()> {
        let before = self.neighbour(list, i, false)?;
        let after = self.neighbour(list, i, true)?;
        if before == 0 {
            self.ends(list)[0] = after;
        } else {
            self.set_neighbour(list, before, true, after)?;
        }
        if after == 0 {
            self.ends(list)[1] = before;
        } else {
            self.set_neighbour(list, after, false, before)?;
        }
        Ok(())
    }
}

const ENDS: Fault = Fault::Corrupt("a list has two ends");

/// A count that has run over; only a damaged index gets there.
pub(crate) const COUNT: Fault = Fault::Corrupt("a count beyond all bounds");
