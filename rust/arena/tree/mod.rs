//! The tree of directories, keys and ranges that the cells form: from a key to its cell and back.
//!
//! Every directory is a cell, stored once for all keys below it. An entry is a child of its
//! directory; a range is a child of the `Object` cell of its key. So one key, one key with all its
//! ranges, and one prefix are each reached without looking at any other key.
//!
//! Here are the hashes by which that is done. `find` goes down, `edit` adds and removes, `check` looks for damage.

mod check;
mod edit;
mod find;

pub(crate) use self::find::Cut;

use super::arena::Arena;
use super::cell::Kind;
use super::storage::Storage;
use crate::error::{Error, Result};
use crate::key::packing::{self, Label, Packing};
use crate::key::{self, ByteRange, Part, RangeLabel};

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

/// Slashes in the part of a key that its cell has as its name.
pub(super) fn tail_slashes(key: &str) -> usize {
    key::split(key).1.matches('/').count()
}

impl<S: Storage> Arena<S> {
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

    /// Hash of the path of a directory, whether or not there is one.
    fn dir_hash(&self, dirs: &str) -> u64 {
        key::directories(dirs).fold(self.header().seed, |seed, name| {
            hash(&Label::Raw(name.as_bytes()), seed, Kind::Dir)
        })
    }

    fn hash_below(&self, parent: u32, kind: Kind, label: &Label) -> Result<u64> {
        Ok(hash(label, self.get(parent)?.hash(), kind))
    }

    /// Hash of a key and range, whether or not there is an entry.
    pub(crate) fn hash_of_name(&self, key: &str, range: ByteRange) -> u64 {
        self.part_of(key, range).hash
    }

    /// The same, with the hash of the whole value.
    pub(crate) fn part_of(&self, key: &str, range: ByteRange) -> Part {
        let (dirs, label) = packing::split(key);
        let above = self.dir_hash(dirs);
        let whole = hash(&label, above, Kind::Value);
        if range == ByteRange::Full {
            return Part::of_whole(whole);
        }
        let object = hash(&label, above, Kind::Object);
        let bounds = RangeLabel::new(range);
        Part {
            hash: hash(&Label::Raw(bounds.bytes()), object, Kind::of(range)),
            whole,
            range,
        }
    }
}
