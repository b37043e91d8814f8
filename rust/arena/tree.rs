//! The tree of directories, keys and ranges that the cells form: from a key to its cell and back.
//!
//! Every directory is a cell, stored once for all keys below it. An entry is a child of its
//! directory; a range is a child of the `Object` cell of its key. So one key, one key with all its
//! ranges, and one prefix are each reached without looking at any other key.

use super::arena::{Arena, List, OVERFLOW, ROOT};
use super::cell::{Cell, Kind};
use super::path_cache::AsOf;
use super::storage::Storage;
use crate::error::{Error, Result};
use crate::key::packing::{self, INLINE, Label, Packing};
use crate::key::{self, ByteRange, RangeLabel};

pub(super) const CYCLE: Error = Error::Corrupt("tree: cycle");
pub(super) const EMPTY: Error = Error::Corrupt("tree: directory without children");

impl Kind {
    fn of(range: ByteRange) -> Kind {
        match range {
            ByteRange::Full => Kind::Value,
            ByteRange::Range { .. } => Kind::Range,
            ByteRange::Offset(_) => Kind::Offset,
            ByteRange::Suffix(_) => Kind::Suffix,
        }
    }
}

/// The answer to a lookup of a key in its directory.
struct Located {
    found: Option<u32>,
    /// The cell of the directory and the hash of the key in it, where they were needed anyway.
    below: Option<(u32, u64)>,
}

/// Slashes in the part of a key that its cell has as its name.
pub(super) fn tail_slashes(key: &str) -> u32 {
    key::split(key).1.matches('/').count() as u32
}

fn salt(kind: Kind, packing: Packing) -> u8 {
    kind as u8 | (packing as u8) << 4
}

fn hash(label: &Label, seed: u64, kind: Kind) -> u64 {
    match label {
        Label::Packed(word, len) => {
            key::hash_word(*word, *len, seed, salt(kind, Packing::Coordinates))
        }
        Label::Raw(bytes) => key::hash(bytes, seed, salt(kind, Packing::Raw)),
    }
}

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

    /// Hash of the path of a cell.
    pub(crate) fn hash_of(&self, i: u32) -> Result<u64> {
        let cell = self.get(i)?;
        match cell.kind()? {
            Kind::Dir | Kind::Object => Ok(cell.hash()),
            Kind::Free => Err(Error::Corrupt("hash table: free cell")),
            Kind::Validator => Ok(self.validator_hash(cell.parent)),
            kind => {
                let seed = self.get(cell.parent)?.hash();
                let salt = salt(kind, cell.packing()?);
                Ok(match cell.inline_word() {
                    Some((word, len)) => key::hash_word(word, len, seed, salt),
                    None => key::hash(self.label(i)?, seed, salt),
                })
            }
        }
    }

    /// Whether cell `i` is the directory with this path.
    fn is_dir(&self, mut i: u32, dirs: &str) -> Result<bool> {
        let mut rest = dirs;
        while let Some(path) = rest.strip_suffix('/') {
            let name = path
                .rfind('/')
                .map_or(path, |slash| path.get(slash + 1..).unwrap_or(""));
            let cell = self.get(i)?;
            if cell.kind()? != Kind::Dir || !self.label_is(i, &Label::Raw(name.as_bytes()))? {
                return Ok(false);
            }
            i = cell.parent;
            rest = path.get(..path.len() - name.len()).unwrap_or("");
        }
        Ok(i == ROOT)
    }

    fn dir_hash(&self, dirs: &str) -> u64 {
        key::directories(dirs).fold(self.header().seed, |seed, name| {
            hash(&Label::Raw(name.as_bytes()), seed, Kind::Dir)
        })
    }

    /// What cached directories must be as of.
    #[inline]
    pub(super) fn now(&self) -> AsOf {
        let header = self.header();
        AsOf {
            seed: header.seed,
            freed: header.directories_freed,
        }
    }

    /// Hash and cell of a directory, where they are cached.
    #[inline]
    fn cached_dir(&self, dirs: &str) -> Option<(u64, u32)> {
        self.paths.get(dirs, self.now())
    }

    /// The directory with this path (empty, or with a trailing slash).
    pub(crate) fn find_dir(&self, dirs: &str) -> Result<Option<u32>> {
        if dirs.is_empty() {
            return Ok(Some(ROOT));
        }
        if let Some((_, dir)) = self.cached_dir(dirs) {
            return Ok(Some(dir));
        }
        self.table_find(self.dir_hash(dirs), |i| self.is_dir(i, dirs))
    }

    /// The cell of this kind of a key.
    #[inline]
    fn find_key(&self, key: &str, kind: Kind) -> Result<Option<u32>> {
        let (dirs, label) = packing::split(key);
        Ok(self.locate(dirs, &label, kind)?.found)
    }

    fn locate(&self, dirs: &str, label: &Label, kind: Kind) -> Result<Located> {
        if let Some((above, dir)) = self.cached_dir(dirs) {
            let hash = hash(label, above, kind);
            let found = self.find_child(dir, kind, label, hash)?;
            let below = Some((dir, hash));
            return Ok(Located { found, below });
        }
        let above = self.dir_hash(dirs);
        let found = self.table_find(hash(label, above, kind), |i| {
            let cell = self.get(i)?;
            Ok(cell.kind()? == kind
                && self.label_is(i, label)?
                && self.is_dir(cell.parent, dirs)?)
        })?;
        if let Some(i) = found {
            let dir = self.get(i)?.parent;
            self.paths.put(dirs, self.now(), above, dir);
        }
        let below = None;
        Ok(Located { found, below })
    }

    /// The `Object` cell of a key.
    pub(crate) fn find_object(&self, key: &str) -> Result<Option<u32>> {
        self.find_key(key, Kind::Object)
    }

    /// The child of object `object` that is this range.
    pub(crate) fn find_range(&self, object: u32, range: ByteRange) -> Result<Option<u32>> {
        let label = RangeLabel::new(range);
        let label = Label::Raw(label.bytes());
        let hash = self.hash_below(object, Kind::of(range), &label)?;
        self.find_child(object, Kind::of(range), &label, hash)
    }

    fn hash_below(&self, parent: u32, kind: Kind, label: &Label) -> Result<u64> {
        Ok(hash(label, self.get(parent)?.hash(), kind))
    }

    #[inline]
    fn find_packed(
        &self,
        parent: u32,
        kind: Kind,
        word: [u8; INLINE],
        len: u8,
        hash: u64,
    ) -> Result<Option<u32>> {
        self.table_find(hash, |i| {
            let cell = self.get(i)?;
            let is = cell.parent == parent && cell.is_packed(word, len);
            Ok(is && cell.kind()? == kind)
        })
    }

    #[inline]
    fn find_child(&self, parent: u32, kind: Kind, label: &Label, hash: u64) -> Result<Option<u32>> {
        if let Label::Packed(word, len) = label {
            return self.find_packed(parent, kind, *word, *len, hash);
        }
        self.table_find(hash, |i| {
            let cell = self.get(i)?;
            Ok(cell.parent == parent && cell.kind()? == kind && self.label_is(i, label)?)
        })
    }

    /// Hash of a key and range, whether or not there is an entry.
    pub(crate) fn hash_of_name(&self, key: &str, range: ByteRange) -> u64 {
        let (dirs, label) = packing::split(key);
        let above = self.dir_hash(dirs);
        if range == ByteRange::Full {
            return hash(&label, above, Kind::Value);
        }
        let object = hash(&label, above, Kind::Object);
        hash(
            &Label::Raw(RangeLabel::new(range).bytes()),
            object,
            Kind::of(range),
        )
    }

    /// The value of a chunk, or `Some(None)` where there is none. `None` where its directory is not
    /// cached, so that only [`Arena::find`] can tell. And its [`Arena::hash_of_name`].
    #[inline]
    pub(crate) fn find_chunk(&self, key: &str) -> Option<(Option<u32>, u64)> {
        let (dirs, word, len) = packing::split_packed(key)?;
        let (above, dir) = self.cached_dir(dirs)?;
        let hash = key::hash_word(word, len, above, salt(Kind::Value, Packing::Coordinates));
        let found = self.find_packed(dir, Kind::Value, word, len, hash).ok()?;
        Some((found, hash))
    }

    /// The entry of a key and range, in any state.
    #[inline]
    pub(crate) fn find(&self, key: &str, range: ByteRange) -> Result<Option<u32>> {
        if range == ByteRange::Full {
            return self.find_key(key, Kind::Value);
        }
        match self.find_object(key)? {
            Some(object) => self.find_range(object, range),
            None => Ok(None),
        }
    }

    /// The absence of a key.
    pub(crate) fn find_absence(&self, key: &str) -> Result<Option<u32>> {
        self.find_key(key, Kind::Absent)
    }

    /// Checks that damage hides nothing of a key that is about to be changed: what is not found is not there, and the ranges
    /// that are found are all that there are.
    pub(crate) fn check_whole(&self, key: &str) -> Result<()> {
        let (dirs, label) = packing::split(key);
        let above = self.dir_hash(dirs);
        for kind in [Kind::Value, Kind::Object, Kind::Absent] {
            match self.locate(dirs, &label, kind)?.found {
                Some(object) if kind == Kind::Object => drop(self.children_in(object, false)?),
                Some(_) => {}
                None => self.table_check_missing(hash(&label, above, kind))?,
            }
        }
        Ok(())
    }

    /// Checks that nothing that is `unwanted` is at or below a prefix, by the tree alone: what the hash table has lost
    /// is found as well, and a directory that has lost its name is damage. Looks at what lies beside each directory of the
    /// prefix.
    pub(crate) fn check_none_below(
        &self,
        prefix: &str,
        unwanted: impl Fn(&Self, u32) -> Result<bool>,
    ) -> Result<()> {
        if self.get(ROOT)?.kind()? != Kind::Dir {
            return Err(Error::Corrupt("tree: the root is no directory"));
        }
        let (own, label) = packing::split(prefix);
        let tails: Vec<String> = key::above_tails_below(prefix).collect();
        let (mut dir, mut path) = (ROOT, 0);
        while path < prefix.len() {
            let (above, rest) = prefix.split_at_checked(path).unwrap_or_default();
            let name = rest.split('/').next().unwrap_or(rest);
            let mut below = None;
            for child in self.children(dir)? {
                if self.get(child)?.kind()? == Kind::Dir {
                    let found = Label::Raw(self.label(child)?);
                    if self.hash_below(dir, Kind::Dir, &found)? != self.get(child)?.hash() {
                        return Err(Error::Corrupt("tree: a directory that has lost its name"));
                    }
                    if found.bytes() == name.as_bytes() {
                        below = Some(child);
                    }
                } else if above == own && self.label_is(child, &label)?
                    || tails.iter().any(|tails| tails == above)
                        && key::is_below(&self.name(child)?.0, prefix)
                {
                    self.check_none_in(child, &unwanted)?;
                }
            }
            let Some(found) = below else { return Ok(()) };
            (dir, path) = (found, path + name.len() + 1);
        }
        self.check_none_in(dir, &unwanted)
    }

    /// The same of a cell and all below it.
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
    pub(super) fn children_in(&self, parent: u32, of_absences: bool) -> Result<Vec<u32>> {
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

    /// Makes the cell of an absence, with its directories; `None` where it exists.
    pub(crate) fn insert_absence(&mut self, key: &str) -> Result<Option<u32>> {
        let made = self.insert_as(Kind::Absent, key, ByteRange::Full)?;
        if let Some(i) = made {
            let slashes = tail_slashes(key);
            let parent = self.get(i)?.parent;
            let dir = self.get_mut(parent)?;
            dir.set_absent_depth(dir.absent_depth().max(slashes));
        }
        Ok(made)
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
        let [first, count] = self.get(parent)?.children(is_absence);
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
        self.get_mut(parent)?.set_children(is_absence, [i, count]);
        Ok(i)
    }

    /// Reads the cells and slots that change when an entry is deleted. Independent reads miss the
    /// processor's caches all at once, where each step of the deletion would wait for its own.
    pub(crate) fn prefetch(&self, i: u32) -> Result<()> {
        let cell = self.get(i)?;
        let [older, newer] = [false, true].map(|last| self.neighbour(List::Recency, i, last));
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
        if is_absence && count == 0 {
            above.set_absent_depth(0);
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
