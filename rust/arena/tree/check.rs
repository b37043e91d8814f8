//! Whether the tree is sound where a step relies on it: what is looked at is in proportion to that part.

use super::{CYCLE, hash};
use crate::arena::arena::{Arena, ROOT};
use crate::arena::cell::Kind;
use crate::arena::storage::Storage;
use crate::error::{Error, Result};
use crate::key;
use crate::key::packing;

impl<S: Storage> Arena<S> {
    /// Checks that damage hides nothing of a key that is about to be changed: what is not found is not there, and the ranges
    /// that are found are all that there are.
    pub(crate) fn check_whole(&self, key: &str) -> Result<()> {
        let (dirs, label) = packing::split(key);
        let above = self.dir_hash(dirs);
        for kind in [Kind::Value, Kind::Object, Kind::Absent] {
            match self.locate(dirs, &label, kind)?.found {
                Some(object) if kind == Kind::Object => drop(self.children_in(object, false)?),
                Some(_) => {}
                None => self.table_check(hash(&label, above, kind), None)?,
            }
        }
        Ok(())
    }

    /// Checks that damage hides nothing that is `unwanted` at or below a prefix: each name that may lead there is entered once or
    /// not at all, and what hangs from it is looked at. What the prefix cuts off of a directory is looked at if asked for.
    pub(crate) fn check_none_below(
        &self,
        prefix: &str,
        and_cut_off: bool,
        unwanted: impl Fn(&Self, u32) -> Result<bool>,
    ) -> Result<()> {
        if self.get(ROOT)?.kind()? != Kind::Dir {
            return Err(Error::Corrupt("tree: the root is no directory"));
        }
        if prefix.is_empty() {
            return self.check_none_in(ROOT, &unwanted);
        }
        let (dirs, label) = packing::split(prefix);
        let above = self.dir_hash(dirs);
        for kind in [Kind::Value, Kind::Object, Kind::Absent] {
            let found = self.locate(dirs, &label, kind)?.found;
            self.table_check(hash(&label, above, kind), found)?;
            if let Some(found) = found {
                self.check_none_in(found, &unwanted)?;
            }
        }
        let below = format!("{prefix}/");
        let found = self.find_dir(&below)?;
        self.table_check(self.dir_hash(&below), found)?;
        if let Some(found) = found {
            self.check_none_in(found, &unwanted)?;
        }
        self.check_cut_by(prefix)?;
        if !and_cut_off {
            return Ok(());
        }
        for of_absences in [false, true] {
            let cut = self.cut_by(prefix, of_absences)?;
            for i in self.cut_off_in_few(&cut, of_absences)? {
                self.check_none_in(i, &unwanted)?;
            }
        }
        Ok(())
    }

    /// Checks that damage hides none of the directories of [`Arena::cut_by`].
    pub(crate) fn check_cut_by(&self, prefix: &str) -> Result<()> {
        for above in key::above_tails_below(prefix) {
            self.table_check(self.dir_hash(&above), self.find_dir(&above)?)?;
        }
        Ok(())
    }

    /// Checks that nothing is unwanted of a cell and all below it.
    fn check_none_in(&self, top: u32, unwanted: impl Fn(&Self, u32) -> Result<bool>) -> Result<()> {
        let (mut todo, mut steps) = (vec![top], self.storage.cells().len());
        while let Some(i) = todo.pop() {
            steps = steps.checked_sub(1).ok_or(CYCLE)?;
            if matches!(self.get(i)?.kind()?, Kind::Dir | Kind::Object) {
                todo.extend(self.children(i)?);
            } else if unwanted(self, i)? {
                return Err(Error::Corrupt("tree: an entry that was not found"));
            }
        }
        Ok(())
    }

    /// All children of a directory or object, absences among them.
    fn children(&self, parent: u32) -> Result<Vec<u32>> {
        let mut all = self.children_in(parent, false)?;
        if self.get(parent)?.kind()? == Kind::Dir {
            all.extend(self.children_in(parent, true)?);
        }
        Ok(all)
    }

    /// The children of a directory or object that are absences, or those that are not: each its own, and as many as counted.
    pub(in crate::arena) fn children_in(&self, parent: u32, of_absences: bool) -> Result<Vec<u32>> {
        let foreign = Error::Corrupt("tree: a child of another parent");
        if !matches!(self.get(parent)?.kind()?, Kind::Dir | Kind::Object) {
            return Err(Error::Corrupt("tree: a parent that is no directory"));
        }
        let [mut at, counted] = self.get(parent)?.children(of_absences);
        let (mut before, mut found) = (0, Vec::new());
        while at != 0 {
            let cell = self.get(at)?;
            let is_child = match cell.kind()? {
                Kind::Absent => of_absences,
                Kind::Dir | Kind::Object => !of_absences,
                _ => cell.is_entry() && !of_absences,
            };
            if !is_child || cell.parent != parent || cell.left != before {
                return Err(foreign);
            }
            if found.len() >= counted as usize {
                return Err(Error::Corrupt("tree: more children than counted"));
            }
            found.push(at);
            (before, at) = (at, cell.right);
        }
        if found.len() == counted as usize {
            Ok(found)
        } else {
            Err(Error::Corrupt("tree: count of children"))
        }
    }
}
