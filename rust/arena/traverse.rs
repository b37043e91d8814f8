//! Traversal of the tree below a directory, and of a list. Each is bounded, because a damaged file
//! may hold cycles.

use super::arena::{Arena, End, List};
use super::cell::Kind;
use super::storage::Storage;
use super::tree::{CYCLE, EMPTY};
use crate::error::{Error, Result};

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

    /// The same without the directories in `top`: its own values, and the ranges of its own keys.
    pub(crate) fn entries_in(
        &self,
        top: u32,
        limit: usize,
        mut want: impl FnMut(&Self, u32) -> Result<bool>,
    ) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        let mut steps = self.storage.cells().len();
        let mut at = self.get(top)?.older;
        while at != 0 && found.len() < limit {
            steps = steps.checked_sub(1).ok_or(CYCLE)?;
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

    /// Up to `limit` absences below the directory `top`. Takes time in proportion to what is found,
    /// and to the entries and directories below it.
    pub(crate) fn absences_below(&self, top: u32, limit: usize) -> Result<Vec<u32>> {
        let mut found = self.absences_in(top, limit, |_, _| Ok(true))?;
        let mut dirs = vec![top];
        let mut steps = self.storage.cells().len();
        while let Some(dir) = dirs.pop() {
            let mut at = self.get(dir)?.older;
            while at != 0 && found.len() < limit {
                steps = steps.checked_sub(1).ok_or(CYCLE)?;
                let cell = self.get(at)?;
                if cell.kind()? == Kind::Dir {
                    let rest = limit - found.len();
                    found.extend(self.absences_in(at, rest, |_, _| Ok(true))?);
                    dirs.push(at);
                }
                at = cell.right;
            }
        }
        Ok(found)
    }

    /// Up to `limit` absences in the directory `dir` itself that `want` accepts.
    pub(crate) fn absences_in(
        &self,
        dir: u32,
        limit: usize,
        mut want: impl FnMut(&Self, u32) -> Result<bool>,
    ) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        let mut steps = self.storage.cells().len();
        let [mut at, _] = self.get(dir)?.children(true);
        while at != 0 && found.len() < limit {
            steps = steps.checked_sub(1).ok_or(CYCLE)?;
            let cell = self.get(at)?;
            if cell.kind()? != Kind::Absent {
                return Err(Error::Corrupt("tree: an absence that is none"));
            }
            if want(self, at)? {
                found.push(at);
            }
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
