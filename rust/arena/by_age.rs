//! `Live` entries by the time of their fetch: those of each source are a ring, earliest first, and the latest is followed
//! by the earliest.
//!
//! In a pool a source is a folder at the root; elsewhere all entries are of one source, which is the root. Each source has ages of its
//! own, and so its oldest entry is found whatever others lie between. The cell of the folder names the earliest.

use super::arena::{Arena, End, ROOT, WRONG_STATE};
use super::cell::{Cell, Kind, State};
use super::storage::Storage;
use super::tree::CYCLE;
use crate::error::Result;

impl<S: Storage> Arena<S> {
    /// The folder of the source of an entry.
    #[inline]
    pub(crate) fn source_of(&self, i: u32) -> Result<u32> {
        if !self.storage.has_sources() {
            return Ok(ROOT);
        }
        let mut at = i;
        for _ in 0..self.storage.cells().len() {
            let cell = self.get(at)?;
            match cell.parent {
                // A key without a folder is of no source.
                ROOT if cell.kind()? != Kind::Dir => return Ok(ROOT),
                ROOT => return Ok(at),
                above => at = above,
            }
        }
        Err(CYCLE)
    }

    /// The earliest entry of a source, or 0.
    pub(crate) fn earliest(&self, source: u32) -> Result<u32> {
        Ok(self.get(source)?.earliest())
    }

    /// The latest entry of a source, or 0.
    pub(crate) fn latest(&self, source: u32) -> Result<u32> {
        match self.earliest(source)? {
            0 => Ok(0),
            first => Ok(self.get(first)?.earlier),
        }
    }

    /// The earliest or the latest entry of a source. An error where the cell is none that can be served.
    pub(crate) fn oldest_or_newest(&self, source: u32, end: End) -> Result<Option<u32>> {
        let i = match end {
            End::First => self.earliest(source)?,
            End::Last => self.latest(source)?,
        };
        if i == 0 {
            return Ok(None);
        }
        if is_live(self.get(i)?) {
            Ok(Some(i))
        } else {
            Err(WRONG_STATE)
        }
    }

    /// Puts an entry before all others of its source.
    pub(crate) fn link_earliest(&mut self, source: u32, i: u32) -> Result<()> {
        match self.latest(source)? {
            0 => {
                let cell = self.get_mut(i)?;
                (cell.earlier, cell.later) = (i, i);
            }
            latest => self.link_later(i, latest)?,
        }
        self.get_mut(source)?.set_earliest(i);
        Ok(())
    }

    /// Puts an entry behind another one of its source.
    pub(crate) fn link_later(&mut self, i: u32, before: u32) -> Result<()> {
        let after = self.get(before)?.later;
        let cell = self.get_mut(i)?;
        (cell.earlier, cell.later) = (before, after);
        self.get_mut(before)?.later = i;
        self.get_mut(after)?.earlier = i;
        Ok(())
    }

    /// Takes an entry out of the ring of its source.
    pub(crate) fn unlink_by_age(&mut self, source: u32, i: u32) -> Result<()> {
        let Cell { earlier, later, .. } = *self.get(i)?;
        let is_first = self.earliest(source)? == i;
        let next = if later == i { 0 } else { later };
        self.get_mut(earlier)?.later = later;
        self.get_mut(later)?.earlier = earlier;
        if is_first {
            self.get_mut(source)?.set_earliest(next);
        }
        Ok(())
    }

    /// All entries of a source, earliest first; an error where there are more than cells.
    pub(super) fn ring(&self, source: u32) -> Result<Vec<u32>> {
        let first = self.earliest(source)?;
        let (mut at, mut ring) = (first, Vec::new());
        while at != 0 {
            if ring.len() > self.storage.cells().len() {
                return Err(CYCLE);
            }
            ring.push(at);
            at = self.get(at)?.later;
            if at == first {
                break;
            }
        }
        Ok(ring)
    }
}

/// Whether such a cell belongs to a ring.
pub(super) fn is_live(cell: &Cell) -> bool {
    cell.is_entry() && cell.state() == State::Live
}
