//! From a key to its cell.

use smallvec::SmallVec;

use super::{hash, salt};
use crate::arena::arena::{Arena, ROOT};
use crate::arena::cell::Kind;
use crate::arena::path_cache::AsOf;
use crate::arena::storage::Storage;
use crate::error::Result;
use crate::key::packing::{self, INLINE, Label, Packing};
use crate::key::{self, ByteRange, RangeLabel};

/// The answer to a lookup of a key in its directory.
pub(super) struct Located {
    pub(super) found: Option<u32>,
    /// The cell of the directory and the hash of the key in it, where they were needed anyway.
    pub(super) below: Option<(u32, u64)>,
}

/// See [`Arena::cut_by`].
pub(crate) type Cut<'a> = SmallVec<[(u32, &'a str); 2]>;

impl<S: Storage> Arena<S> {
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

    /// What cached directories must be as of.
    #[inline]
    pub(in crate::arena) fn now(&self) -> AsOf {
        let header = self.header();
        AsOf {
            seed: header.seed,
            freed: header.directories_freed,
        }
    }

    /// Hash and cell of a directory, where they are cached.
    #[inline]
    pub(super) fn cached_dir(&self, dirs: &str) -> Option<(u64, u32)> {
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

    /// Directories above a prefix with names below it, each with the rest of the prefix there. Of full chunk keys that is
    /// none, by the depths of directories.
    pub(crate) fn cut_by<'a>(&self, prefix: &'a str, of_absences: bool) -> Result<Cut<'a>> {
        let mut cut = Cut::new();
        for above in key::above_tails_below(prefix) {
            let rest = prefix.get(above.len()..).unwrap_or("");
            if let Some(dir) = self.find_dir(&above)?
                && rest.matches('/').count() < usize::from(self.get(dir)?.depth(of_absences)?)
            {
                cut.push((dir, rest));
            }
        }
        Ok(cut)
    }

    /// Whether a cell is, or is a range of, a key that such a prefix cuts off.
    pub(crate) fn is_cut_off(&self, mut i: u32, cut: &Cut) -> Result<bool> {
        let mut above = self.get(i)?.parent;
        if self.get(above)?.kind()? == Kind::Object {
            (i, above) = (above, self.get(above)?.parent);
        }
        let Some((_, rest)) = cut.iter().find(|(dir, _)| *dir == above) else {
            return Ok(false);
        };
        let mut tail = Vec::with_capacity(2 * INLINE);
        let is_known = self.get(i)?.packing()?.decode(self.label(i)?, &mut tail);
        Ok(is_known && key::is_below(tail, rest))
    }

    /// The cell of this kind of a key.
    #[inline]
    fn find_key(&self, key: &str, kind: Kind) -> Result<Option<u32>> {
        let (dirs, label) = packing::split(key);
        Ok(self.locate(dirs, &label, kind)?.found)
    }

    pub(super) fn locate(&self, dirs: &str, label: &Label, kind: Kind) -> Result<Located> {
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
    pub(super) fn find_child(
        &self,
        parent: u32,
        kind: Kind,
        label: &Label,
        hash: u64,
    ) -> Result<Option<u32>> {
        if let Label::Packed(word, len) = label {
            return self.find_packed(parent, kind, *word, *len, hash);
        }
        self.table_find(hash, |i| {
            let cell = self.get(i)?;
            Ok(cell.parent == parent && cell.kind()? == kind && self.label_is(i, label)?)
        })
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
}
