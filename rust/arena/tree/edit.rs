//! Cells come into the tree with the directories above them, and go with those that this empties.

use super::find::Located;
use crate::arena::arena::{Arena, End, OVERFLOW, ROOT};
use crate::arena::cell::{Cell, Kind};
use crate::arena::storage::Storage;
use crate::error::{Error, Result};
use crate::key::packing::{self, Label};
use crate::key::{self, ByteRange, RangeLabel};

impl<S: Storage> Arena<S> {
    /// Makes the root.
    pub(crate) fn tree_init(&mut self, seed: u64) -> Result<()> {
        self.header_mut().seed = seed;
        self.header_mut().cells_used = ROOT;
        self.ensure(2)?;
        let mut cell = Cell::new(Kind::Dir);
        cell.set_hash(seed);
        let root = self.alloc(cell)?;
        if root == ROOT {
            Ok(())
        } else {
            Err(Error::Corrupt("tree: the root is not the first cell"))
        }
    }

    /// Makes the cell of an absence, with its directories; `None` where it exists.
    pub(crate) fn insert_absence(&mut self, key: &str) -> Result<Option<u32>> {
        self.insert_as(Kind::Absent, key, ByteRange::Full)
    }

    /// Makes the cell of an entry, with its directories; `None` where it exists.
    pub(crate) fn insert(&mut self, key: &str, range: ByteRange) -> Result<Option<u32>> {
        self.insert_as(Kind::of(range), key, range)
    }

    fn insert_as(&mut self, kind: Kind, key: &str, range: ByteRange) -> Result<Option<u32>> {
        let (dirs, label) = packing::split(key);
        if range == ByteRange::Full {
            let Located { found, below } = self.locate(dirs, &label, kind)?;
            if found.is_some() {
                return Ok(None);
            }
            if let Some((dir, hash)) = below {
                self.ensure(1)?;
                return self.add_child(dir, kind, &label, hash).map(Some);
            }
        } else if self.find(key, range)?.is_some() {
            return Ok(None);
        }
        // All cells first, so that what follows cannot run out of them half way.
        self.ensure(dirs.bytes().filter(|c| *c == b'/').count() + 2)?;
        let mut at = ROOT;
        let made = self.insert_below(&mut at, kind, dirs, &label, range);
        if made.is_err() {
            // Strings or hash table cannot grow: remove the directories that were made in vain.
            self.prune(at)?;
        }
        made.map(Some)
    }

    /// Makes the cells of a key from the root down; `at` is the deepest one that exists.
    fn insert_below(
        &mut self,
        at: &mut u32,
        kind: Kind,
        dirs: &str,
        label: &Label,
        range: ByteRange,
    ) -> Result<u32> {
        if let Some((_, dir)) = self.cached_dir(dirs) {
            *at = dir;
        } else {
            for name in key::directories(dirs) {
                *at = self.find_or_add_child(*at, Kind::Dir, &Label::Raw(name.as_bytes()))?;
            }
            let hash = self.get(*at)?.hash();
            self.paths.put(dirs, self.now(), hash, *at);
        }
        let numbers = RangeLabel::new(range);
        let mut label = *label;
        if range != ByteRange::Full {
            *at = self.find_or_add_child(*at, Kind::Object, &label)?;
            label = Label::Raw(numbers.bytes());
        }
        let hash = self.hash_below(*at, kind, &label)?;
        self.add_child(*at, kind, &label, hash)
    }

    fn find_or_add_child(&mut self, parent: u32, kind: Kind, label: &Label) -> Result<u32> {
        let hash = self.hash_below(parent, kind, label)?;
        match self.find_child(parent, kind, label, hash)? {
            Some(child) => Ok(child),
            None => self.add_child(parent, kind, label, hash),
        }
    }

    fn add_child(&mut self, parent: u32, kind: Kind, label: &Label, hash: u64) -> Result<u32> {
        let is_absence = kind == Kind::Absent;
        let above = self.get(parent)?;
        let [first, count] = above.children(is_absence);
        let depth = match kind {
            Kind::Value | Kind::Object | Kind::Absent => {
                let slashes = u8::try_from(label.slashes()).unwrap_or(u8::MAX);
                Some(slashes.max(above.depth(is_absence)?))
            }
            _ => None,
        };
        let mut cell = Cell::new(kind);
        cell.parent = parent;
        cell.right = first;
        if matches!(kind, Kind::Dir | Kind::Object) {
            cell.set_hash(hash);
        }
        self.set_label(&mut cell, label)?;
        let i = self.alloc(cell)?;
        if let Err(error) = self.table_insert(hash, i) {
            self.free_with_label(i)?;
            return Err(error);
        }
        if first != 0 {
            self.get_mut(first)?.left = i;
        }
        let count = count.checked_add(1).ok_or(OVERFLOW)?;
        let above = self.get_mut(parent)?;
        above.set_children(is_absence, [i, count]);
        if let Some(depth) = depth {
            above.set_depth(is_absence, depth);
        }
        Ok(i)
    }

    /// Reads the cells and slots that change when an entry is deleted. Independent reads miss the
    /// processor's caches all at once, where each step of the deletion would wait for its own.
    pub(crate) fn prefetch(&self, i: u32) -> Result<()> {
        let cell = self.get(i)?;
        let [older, newer] = [End::First, End::Last].map(|end| self.neighbour(i, end));
        let lists = [older?, newer?, cell.earlier, cell.later];
        let mut read = 0;
        for beside in lists.into_iter().chain([cell.left, cell.right]) {
            // In an entry that is in no list these are other numbers.
            read ^= self.get(beside).map_or(0, |cell| cell.parent);
        }
        // Last, because its cells are known only once its slots are read.
        read ^= self.table_prefetch(self.hash_of(i)?)?;
        std::hint::black_box(read);
        Ok(())
    }

    /// Removes an entry from the tree and frees its cell; it must be in no list.
    pub(crate) fn remove(&mut self, i: u32) -> Result<()> {
        self.drop_validator(i)?;
        let parent = self.get(i)?.parent;
        self.remove_child(i)?;
        self.prune(parent)
    }

    fn remove_child(&mut self, i: u32) -> Result<()> {
        self.table_remove(self.hash_of(i)?, i)?;
        let cell = *self.get(i)?;
        let is_absence = cell.kind()? == Kind::Absent;
        let [mut first, count] = self.get(cell.parent)?.children(is_absence);
        if cell.left == 0 {
            first = cell.right;
        } else {
            self.get_mut(cell.left)?.right = cell.right;
        }
        if cell.right != 0 {
            self.get_mut(cell.right)?.left = cell.left;
        }
        if cell.kind()? == Kind::Dir {
            if S::EXCLUSIVE {
                self.paths.remove(i);
            } else {
                let freed = &mut self.header_mut().directories_freed;
                *freed = freed.wrapping_add(1);
            }
        }
        let above = self.get_mut(cell.parent)?;
        let count = count
            .checked_sub(1)
            .ok_or(Error::Corrupt("tree: more children than counted"))?;
        above.set_children(is_absence, [first, count]);
        if count == 0 {
            above.set_depth(is_absence, 0);
        }
        if above.kind()? == Kind::Object {
            above.forget_hint(i);
        }
        self.free_with_label(i)
    }

    /// Removes a directory or object without children, and those above it that this empties.
    fn prune(&mut self, mut i: u32) -> Result<()> {
        while i != ROOT {
            let cell = self.get(i)?;
            let kind = cell.kind()?;
            if !matches!(kind, Kind::Dir | Kind::Object) {
                return Err(Error::Corrupt("tree: a parent that is no directory"));
            }
            if cell.older != 0 || kind == Kind::Dir && cell.children(true)[0] != 0 {
                break;
            }
            let parent = cell.parent;
            self.remove_child(i)?;
            i = parent;
        }
        Ok(())
    }
}

impl Cell {
    /// Clears the hints of an object that name this child.
    pub(crate) fn forget_hint(&mut self, child: u32) {
        for hint in [&mut self.earlier, &mut self.later] {
            if *hint == child {
                *hint = 0;
            }
        }
    }
}
