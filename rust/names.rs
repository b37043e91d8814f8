//! Names: the tree of directories, keys and ranges that the cells form, and the way from a key to
//! its cell and back.
//!
//! Every directory is a cell, stored once for all keys below it. An entry is a child of its
//! directory, a range is a child of the `Object` cell of its key. So one key, one key with all its
//! ranges, and one prefix are each reached without looking at any other key.

use smallvec::SmallVec;

use crate::block::Block;
use crate::cell::{Cell, Kind};
use crate::cells::{COUNT, Cells, ROOT};
use crate::coding::{self, Coding, INLINE, Text};
use crate::error::{Fault, Res};
use crate::key::{self, Span, SpanText};

impl Span {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Span::Full => Kind::Value,
            Span::Range { .. } => Kind::Range,
            Span::Offset(_) => Kind::Offset,
            Span::Suffix(_) => Kind::Suffix,
        }
    }
}

/// Where a name was looked for.
struct Spot {
    found: Option<u32>,
    /// The cell that it is a child of, and its hash, where they are at hand and certain.
    below: Option<(u32, u64)>,
}

/// Bytes of a key that need no more memory while it is put together.
const USUAL: usize = 48;

fn salt(kind: Kind, coding: Coding) -> u8 {
    kind as u8 | (coding as u8) << 4
}

fn hash(text: &Text, seed: u64, kind: Kind) -> u64 {
    match text {
        Text::Packed(word, len) => {
            key::hash_word(*word, *len, seed, salt(kind, Coding::Coordinates))
        }
        _ => key::hash(text.bytes(), seed, salt(kind, text.coding())),
    }
}

impl<B: Block> Cells<B> {
    /// Makes the root.
    pub(crate) fn names_init(&mut self, seed: u64) -> Res<()> {
        self.header_mut().seed = seed;
        self.header_mut().used = ROOT;
        self.ensure(2)?;
        let mut cell = Cell::new(Kind::Dir);
        cell.size = seed;
        let root = self.alloc(cell)?;
        if root == ROOT {
            Ok(())
        } else {
            Err(Fault::Corrupt("a root that is not the first cell"))
        }
    }

    /// Hash of the name of a cell.
    pub(crate) fn hash_of(&self, i: u32) -> Res<u64> {
        let cell = self.get(i)?;
        match cell.kind()? {
            Kind::Dir | Kind::Object => Ok(cell.size),
            Kind::Free => Err(Fault::Corrupt("a nameless cell in the table")),
            kind => {
                let seed = self.get(cell.parent)?.size;
                let salt = salt(kind, cell.coding()?);
                Ok(match cell.inline_word() {
                    Some((word, len)) => key::hash_word(word, len, seed, salt),
                    None => key::hash(&self.text(i)?, seed, salt),
                })
            }
        }
    }

    /// Whether cell `i` is named by these directories, outermost first, below the root.
    fn is_dir(&self, mut i: u32, dirs: &str) -> Res<bool> {
        let mut rest = dirs;
        while let Some(path) = rest.strip_suffix('/') {
            let name = path
                .rfind('/')
                .map_or(path, |slash| path.get(slash + 1..).unwrap_or(""));
            let cell = self.get(i)?;
            if cell.kind()? != Kind::Dir || !self.text_is(i, &Text::Raw(name.as_bytes()))? {
                return Ok(false);
            }
            i = cell.parent;
            rest = path.get(..path.len() - name.len()).unwrap_or("");
        }
        Ok(i == ROOT)
    }

    fn dir_hash(&self, dirs: &str) -> u64 {
        if let Some((hash, _)) = self.memo.get(dirs, self.header().seed) {
            return hash;
        }
        key::directories(dirs).fold(self.header().seed, |seed, name| {
            hash(&Text::Raw(name.as_bytes()), seed, Kind::Dir)
        })
    }

    /// Hash and cell of a directory, where they are at hand and certain.
    #[inline]
    fn known_dir(&self, dirs: &str) -> Option<(u64, u32)> {
        if B::EXCLUSIVE {
            self.memo.get(dirs, self.header().seed)
        } else {
            None
        }
    }

    /// The directory with this path (empty, or with a trailing slash).
    pub(crate) fn find_dir(&self, dirs: &str) -> Res<Option<u32>> {
        if dirs.is_empty() {
            return Ok(Some(ROOT));
        }
        self.table_find(self.dir_hash(dirs), |i| self.is_dir(i, dirs))
    }

    /// The child of kind `kind` of directory `dirs` with this tail.
    #[inline]
    fn find_named(&self, key: &str, kind: Kind) -> Res<Option<u32>> {
        let (dirs, text) = coding::cut(key);
        Ok(self.look_for(dirs, &text, kind)?.found)
    }

    fn look_for(&self, dirs: &str, text: &Text, kind: Kind) -> Res<Spot> {
        if let Some((above, dir)) = self.known_dir(dirs) {
            let hash = hash(text, above, kind);
            let found = self.find_child(dir, kind, text, hash)?;
            let below = Some((dir, hash));
            return Ok(Spot { found, below });
        }
        let above = self.dir_hash(dirs);
        let found = self.table_find(hash(text, above, kind), |i| {
            let cell = self.get(i)?;
            Ok(cell.kind()? == kind && self.text_is(i, text)? && self.is_dir(cell.parent, dirs)?)
        })?;
        if let Some(i) = found {
            let dir = self.get(i)?.parent;
            self.memo.put(dirs, self.header().seed, above, dir);
        }
        let below = None;
        Ok(Spot { found, below })
    }

    /// The `Object` cell of a key.
    pub(crate) fn find_object(&self, key: &str) -> Res<Option<u32>> {
        self.find_named(key, Kind::Object)
    }

    /// The child of object `object` that is this range.
    pub(crate) fn find_range(&self, object: u32, span: Span) -> Res<Option<u32>> {
        let text = SpanText::new(span);
        let text = Text::Raw(text.bytes());
        let hash = self.hash_below(object, span.kind(), &text)?;
        self.find_child(object, span.kind(), &text, hash)
    }

    fn hash_below(&self, parent: u32, kind: Kind, text: &Text) -> Res<u64> {
        Ok(hash(text, self.get(parent)?.size, kind))
    }

    #[inline]
    fn find_packed(
        &self,
        parent: u32,
        kind: Kind,
        word: [u8; INLINE],
        len: u8,
        hash: u64,
    ) -> Res<Option<u32>> {
        self.table_find(hash, |i| {
            let cell = self.get(i)?;
            let is = cell.parent == parent && cell.is_packed(word, len);
            Ok(is && cell.kind()? == kind)
        })
    }

    #[inline]
    fn find_child(&self, parent: u32, kind: Kind, text: &Text, hash: u64) -> Res<Option<u32>> {
        if let Text::Packed(word, len) = text {
            return self.find_packed(parent, kind, *word, *len, hash);
        }
        self.table_find(hash, |i| {
            let cell = self.get(i)?;
            Ok(cell.parent == parent && cell.kind()? == kind && self.text_is(i, text)?)
        })
    }

    /// The value of a chunk whose directory is at hand, if it is there; `None` says nothing.
    #[inline]
    pub(crate) fn find_chunk(&self, key: &str) -> Option<Option<u32>> {
        let (dirs, word, len) = coding::cut_packed(key)?;
        let (above, dir) = self.known_dir(dirs)?;
        let hash = key::hash_word(word, len, above, salt(Kind::Value, Coding::Coordinates));
        self.find_packed(dir, Kind::Value, word, len, hash).ok()
    }

    /// The entry of a key and span, in any state.
    #[inline]
    pub(crate) fn find(&self, key: &str, span: Span) -> Res<Option<u32>> {
        if span == Span::Full {
            return self.find_named(key, Kind::Value);
        }
        match self.find_object(key)? {
            Some(object) => self.find_range(object, span),
            None => Ok(None),
        }
    }

    /// Makes the cell of an entry, with its directories; `None` where it is there.
    pub(crate) fn insert(&mut self, key: &str, span: Span) -> Res<Option<u32>> {
        let (dirs, text) = coding::cut(key);
        if span == Span::Full {
            let Spot { found, below } = self.look_for(dirs, &text, Kind::Value)?;
            if found.is_some() {
                return Ok(None);
            }
            if let Some((dir, hash)) = below {
                self.ensure(1)?;
                return self.child(dir, Kind::Value, &text, hash).map(Some);
            }
        } else if self.find(key, span)?.is_some() {
            return Ok(None);
        }
        // All cells first: what follows cannot run out of them half way.
        self.ensure(dirs.bytes().filter(|c| *c == b'/').count() + 2)?;
        let mut at = ROOT;
        let made = self.insert_below(&mut at, dirs, &text, span);
        if made.is_err() {
            // The texts or the table cannot grow: the cells above the missing one lead to nothing.
            self.prune(at)?;
        }
        made.map(Some)
    }

    /// Makes the cells of a key from the root down; `at` is the deepest one that is there.
    fn insert_below(&mut self, at: &mut u32, dirs: &str, text: &Text, span: Span) -> Res<u32> {
        if let Some((_, dir)) = self.known_dir(dirs) {
            *at = dir;
        } else {
            for name in key::directories(dirs) {
                *at = self.child_of(*at, Kind::Dir, &Text::Raw(name.as_bytes()))?;
            }
            let hash = self.get(*at)?.size;
            self.memo.put(dirs, self.header().seed, hash, *at);
        }
        let range = SpanText::new(span);
        let mut text = text.clone();
        if span != Span::Full {
            *at = self.child_of(*at, Kind::Object, &text)?;
            text = Text::Raw(range.bytes());
        }
        let hash = self.hash_below(*at, span.kind(), &text)?;
        self.child(*at, span.kind(), &text, hash)
    }

    /// The child with this name, made where it is missing.
    fn child_of(&mut self, parent: u32, kind: Kind, text: &Text) -> Res<u32> {
        let hash = self.hash_below(parent, kind, text)?;
        match self.find_child(parent, kind, text, hash)? {
            Some(child) => Ok(child),
            None => self.child(parent, kind, text, hash),
        }
    }

    fn child(&mut self, parent: u32, kind: Kind, text: &Text, hash: u64) -> Res<u32> {
        let first = self.get(parent)?.older;
        let mut cell = Cell::new(kind);
        cell.parent = parent;
        cell.right = first;
        if matches!(kind, Kind::Dir | Kind::Object) {
            cell.size = hash;
        }
        self.set_text(&mut cell, text)?;
        let i = self.alloc(cell)?;
        if let Err(fault) = self.table_insert(hash, i) {
            self.free_with_text(i)?;
            return Err(fault);
        }
        if first != 0 {
            self.get_mut(first)?.left = i;
        }
        let above = self.get_mut(parent)?;
        above.older = i;
        above.newer = above.newer.checked_add(1).ok_or(COUNT)?;
        Ok(i)
    }

    /// Reads what has to change where an entry goes: reads that wait for nothing bring it near, all at
    /// once, where else one step after the other would wait for its own part.
    pub(crate) fn bring_near(&self, i: u32) -> Res<()> {
        let cell = self.get(i)?;
        let lists = [cell.older, cell.newer, cell.earlier, cell.later];
        let mut near = 0;
        for beside in lists.into_iter().chain([cell.left, cell.right]) {
            // Of an entry that is in no list these are other numbers.
            near ^= self.get(beside).map_or(0, |cell| cell.parent);
        }
        // Last, for its cells are known only once its slots are there.
        near ^= self.table_peek(self.hash_of(i)?)?;
        std::hint::black_box(near);
        Ok(())
    }

    /// Takes the name of an entry away and frees its cell; it must be in no other list.
    pub(crate) fn remove(&mut self, i: u32) -> Res<()> {
        let parent = self.get(i)?.parent;
        self.remove_child(i)?;
        self.prune(parent)
    }

    fn remove_child(&mut self, i: u32) -> Res<()> {
        self.table_remove(self.hash_of(i)?, i)?;
        let cell = *self.get(i)?;
        if cell.left == 0 {
            self.get_mut(cell.parent)?.older = cell.right;
        } else {
            self.get_mut(cell.left)?.right = cell.right;
        }
        if cell.right != 0 {
            self.get_mut(cell.right)?.left = cell.left;
        }
        if cell.kind()? == Kind::Dir {
            self.memo.forget(i);
        }
        let above = self.get_mut(cell.parent)?;
        above.newer = above
            .newer
            .checked_sub(1)
            .ok_or(Fault::Corrupt("a child too many"))?;
        if above.kind()? == Kind::Object {
            if above.earlier == i {
                above.earlier = 0;
            }
            if above.later == i {
                above.later = 0;
            }
        }
        self.free_with_text(i)
    }

    /// Removes a directory or object without children, and those above it that this empties.
    fn prune(&mut self, mut i: u32) -> Res<()> {
        while i != ROOT {
            let cell = self.get(i)?;
            if !matches!(cell.kind()?, Kind::Dir | Kind::Object) {
                return Err(Fault::Corrupt("a parent that cannot have children"));
            }
            if cell.older != 0 {
                break;
            }
            let parent = cell.parent;
            self.remove_child(i)?;
            i = parent;
        }
        Ok(())
    }

    /// The key of a cell, and which bytes of it the cell holds.
    pub(crate) fn name(&self, i: u32) -> Res<(String, Span)> {
        let cell = *self.get(i)?;
        let mut span = Span::Full;
        let mut at = i;
        if !matches!(cell.kind()?, Kind::Value | Kind::Object | Kind::Dir) {
            span = span_of(cell.kind()?, &self.text(i)?)?;
            at = cell.parent;
        }
        let mut path = SmallVec::<[u32; 16]>::new();
        let mut key = Vec::with_capacity(USUAL);
        while at != ROOT {
            // Of a directory itself the path is its name and a slash.
            let is_above = B::EXCLUSIVE && !path.is_empty();
            if is_above && self.memo.append(at, self.header().seed, &mut key) {
                break;
            }
            path.push(at);
            at = self.get(at)?.parent;
            if path.len() > self.block.cells().len() {
                return Err(Fault::Corrupt("a directory inside itself"));
            }
        }
        while let Some(part) = path.pop() {
            let coding = self.get(part)?.coding()?;
            if !coding.decode(&self.text(part)?, &mut key) {
                return Err(Fault::Corrupt("a text of other characters"));
            }
            if !path.is_empty() {
                key.push(b'/');
            }
        }
        let key = String::from_utf8(key).map_err(|_| Fault::Corrupt("a key that is not UTF-8"))?;
        Ok((key, span))
    }
}

/// Decodes the text of a range's cell.
pub(crate) fn span_of(kind: Kind, mut text: &[u8]) -> Res<Span> {
    let mut number = || SpanText::read(&mut text).ok_or(Fault::Corrupt("a range without numbers"));
    Ok(match kind {
        Kind::Range => {
            let start = number()?;
            Span::Range {
                start,
                end: start.wrapping_add(number()?),
            }
        }
        Kind::Offset => Span::Offset(number()?),
        Kind::Suffix => Span::Suffix(number()?),
        _ => Span::Full,
    })
}

impl<B: Block> Cells<B> {
    /// The span of an entry, without its key.
    pub(crate) fn span(&self, i: u32) -> Res<Span> {
        span_of(self.get(i)?.kind()?, &self.text(i)?)
    }
}
