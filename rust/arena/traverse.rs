//! Traversal of the tree below a directory, and of a list. Each is bounded, because a damaged file
//! may hold cycles.

use super::arena::{Arena, End, List};
use super::cell::Kind;
use super::storage::Storage;
use super::tree::{CYCLE, Cut, EMPTY};
use crate::error::{Error, Result};

/// Cells that one step looks at, so that no step holds the lock for long.
pub(crate) const LOOKED_AT: u32 = 4096;

impl<S: Storage> Arena<S> {
    /// Up to `limit` entries below the directory or object `top`, in any state that `want` accepts.
    /// Takes time in proportion to what is found plus what `want` rejects.
    pub(crate) fn entries_below(
        &self,
        top: u32,
        limit: usize,
        mut want: impl FnMut(&Self, u32) -> Result<bool>,
    ) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        // Every cell is entered once and left once.
        let mut steps = 2 * self.storage.cells().len();
        let mut step = || {
            steps = steps.checked_sub(1).ok_or(CYCLE)?;
            Ok(())
        };
        let mut at = self.get(top)?.older;
        while at != 0 && found.len() < limit {
            step()?;
            let cell = self.get(at)?;
            match cell.kind()? {
                Kind::Dir | Kind::Object if cell.older != 0 => {
                    at = cell.older;
                    continue;
                }
                // One that holds absences only.
                Kind::Dir if cell.children(true)[0] != 0 => {}
                Kind::Dir | Kind::Object => return Err(EMPTY),
                _ if want(self, at)? => found.push(at),
                _ => {}
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

    /// Whether one of these directories has so many children that one step cannot look at all of them.
    pub(crate) fn is_of_many(&self, cut: &Cut, of_absences: bool) -> Result<bool> {
        let mut counts = cut.iter().map(|(dir, _)| self.get(*dir));
        counts.try_fold(false, |many, dir| {
            Ok(many || dir?.children(of_absences)[1] > LOOKED_AT)
        })
    }

    /// Children that a prefix cuts off of its directories, unless these are of many: values and objects, or absences.
    pub(crate) fn cut_off_in_few(&self, cut: &Cut, of_absences: bool) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        if self.is_of_many(cut, of_absences)? {
            return Ok(found);
        }
        for &(dir, _) in cut {
            for i in self.children_in(dir, of_absences)? {
                if self.get(i)?.kind()? != Kind::Dir && self.is_cut_off(i, cut)? {
                    found.push(i);
                }
            }
        }
        Ok(found)
    }

    /// Up to `limit` absences below the directory `top`. Takes time in proportion to what is found,
    /// and to the entries and directories below it.
    pub(crate) fn absences_below(&self, top: u32, limit: usize) -> Result<Vec<u32>> {
        let mut found = self.absences_in(top, limit)?;
        let mut dirs = vec![top];
        let mut steps = self.storage.cells().len();
        while let Some(dir) = dirs.pop() {
            let mut at = self.get(dir)?.older;
            while at != 0 && found.len() < limit {
                steps = steps.checked_sub(1).ok_or(CYCLE)?;
                let cell = self.get(at)?;
                if cell.kind()? == Kind::Dir {
                    let rest = limit - found.len();
                    found.extend(self.absences_in(at, rest)?);
                    dirs.push(at);
                }
                at = cell.right;
            }
        }
        Ok(found)
    }

    /// Up to `limit` absences in the directory `dir` itself.
    fn absences_in(&self, dir: u32, limit: usize) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        let mut steps = self.storage.cells().len();
        let [mut at, _] = self.get(dir)?.children(true);
        while at != 0 && found.len() < limit {
            steps = steps.checked_sub(1).ok_or(CYCLE)?;
            let cell = self.get(at)?;
            if cell.kind()? != Kind::Absent {
                return Err(Error::Corrupt("tree: an absence that is none"));
            }
            found.push(at);
            at = cell.right;
        }
        Ok(found)
    }

    /// All cells of a list from its first one; an error where there are more than cells.
    pub(crate) fn list_cells(&self, list: List) -> Result<Vec<u32>> {
        let mut cells = Vec::new();
        let mut at = self.list(list)[0];
        while at != 0 {
            if cells.len() > self.storage.cells().len() {
                return Err(Error::Corrupt("list: cycle"));
            }
            cells.push(at);
            at = self.neighbour(at, End::Last)?;
        }
        Ok(cells)
    }
}
