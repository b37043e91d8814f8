//! Walks: what lies below a directory or in it, and along a list. Each is bounded, for what lies in a
//! file may lead in circles.

use crate::block::Block;
use crate::cell::Kind;
use crate::cells::{Cells, List};
use crate::error::{Fault, Res};

impl<B: Block> Cells<B> {
    /// Up to `limit` entries in the directory or object `top` and below, in any state that `want`
    /// accepts; work is proportional to what is found, plus what `want` refuses.
    pub(crate) fn entries_below(
        &self,
        top: u32,
        limit: usize,
        mut want: impl FnMut(&Self, u32) -> Res<bool>,
    ) -> Res<Vec<u32>> {
        let mut found = Vec::new();
        // Every cell is entered once and left once.
        let mut steps = 2 * self.block.cells().len();
        let mut step = || {
            steps = steps
                .checked_sub(1)
                .ok_or(Fault::Corrupt("a directory inside itself"))?;
            Ok(())
        };
        let mut at = self.get(top)?.older;
        while at != 0 && found.len() < limit {
            step()?;
            let cell = self.get(at)?;
            if matches!(cell.kind()?, Kind::Dir | Kind::Object) {
                if cell.older == 0 {
                    return Err(Fault::Corrupt("a directory without children"));
                }
                at = cell.older;
                continue;
            }
            if want(self, at)? {
                found.push(at);
            }
            let mut climb = at;
            loop {
                step()?;
                let cell = self.get(climb)?;
                if cell.right != 0 {
                    at = cell.right;
                    break;
                }
                climb = cell.parent;
                if climb == top || climb == 0 {
                    return Ok(found);
                }
            }
        }
        Ok(found)
    }

    /// The same without the directories in `top`: its own values, and ranges of its own keys.
    pub(crate) fn entries_in(
        &self,
        top: u32,
        limit: usize,
        mut want: impl FnMut(&Self, u32) -> Res<bool>,
    ) -> Res<Vec<u32>> {
        let mut found = Vec::new();
        let mut steps = self.block.cells().len();
        let mut at = self.get(top)?.older;
        while at != 0 && found.len() < limit {
            steps = steps
                .checked_sub(1)
                .ok_or(Fault::Corrupt("a directory inside itself"))?;
            let cell = self.get(at)?;
            match cell.kind()? {
                Kind::Dir => {}
                Kind::Object => {
                    found.extend(self.entries_below(at, limit - found.len(), &mut want)?);
                }
                _ if want(self, at)? => found.push(at),
                _ => {}
            }
            at = cell.right;
        }
        Ok(found)
    }

    /// Walks a list from its first cell; an error where it is longer than there are cells.
    pub(crate) fn walk(&self, list: List) -> Res<Vec<u32>> {
        let mut cells = Vec::new();
        let mut at = self.list(list)[0];
        while at != 0 {
            if cells.len() > self.block.cells().len() {
                return Err(Fault::Corrupt("a list that bites its tail"));
            }
            cells.push(at);
            at = self.neighbour(list, at, true)?;
        }
        Ok(cells)
    }
}
