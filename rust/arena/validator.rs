//! The validators of entries: texts that the source gave together with their bytes.
//!
//! A validator is a cell of its own, with the text as its label. It is found through the hash table by the number of
//! its entry, which is its parent, so an entry without one takes no more room and no more time: a bit says
//! that it has none.

use super::arena::Arena;
use super::cell::{Cell, Kind};
use super::storage::Storage;
use crate::error::{Error, Result};
use crate::key;
use crate::key::packing::{INLINE, Label};

const MISSING: Error = Error::Corrupt("validator: missing");

impl<S: Storage> Arena<S> {
    /// Hash of the validator of an entry.
    pub(super) fn validator_hash(&self, entry: u32) -> u64 {
        let mut word = [0; INLINE];
        let number = entry.to_le_bytes();
        for (to, from) in word.iter_mut().zip(number) {
            *to = from;
        }
        let len = number.len() as u8;
        key::hash_word(word, len, self.header().seed, Kind::Validator as u8)
    }

    pub(super) fn find_validator(&self, entry: u32) -> Result<Option<u32>> {
        if !self.get(entry)?.has_validator() {
            return Ok(None);
        }
        let found = self.table_find(self.validator_hash(entry), |i| {
            let cell = self.get(i)?;
            Ok(cell.parent == entry && cell.kind()? == Kind::Validator)
        })?;
        found.map(Some).ok_or(MISSING)
    }

    /// The validator of an entry.
    pub(crate) fn validator(&self, entry: u32) -> Result<Option<&[u8]>> {
        match self.find_validator(entry)? {
            Some(found) => self.label(found).map(Some),
            None => Ok(None),
        }
    }

    /// Gives an entry a validator, in the place of the one it has. An error that is not fatal where the index cannot grow
    /// or the text is too long for a label; the entry then has none.
    pub(crate) fn set_validator(&mut self, entry: u32, text: &[u8]) -> Result<()> {
        self.drop_validator(entry)?;
        self.ensure(1)?;
        let mut cell = Cell::new(Kind::Validator);
        cell.parent = entry;
        self.set_label(&mut cell, &Label::Raw(text))?;
        let found = self.alloc(cell)?;
        if let Err(error) = self.table_insert(self.validator_hash(entry), found) {
            self.free_with_label(found)?;
            return Err(error);
        }
        self.get_mut(entry)?.set_validator(true)
    }

    /// Removes the validator of an entry, if it has one.
    pub(super) fn drop_validator(&mut self, entry: u32) -> Result<()> {
        let Some(found) = self.find_validator(entry)? else {
            return Ok(());
        };
        self.table_remove(self.validator_hash(entry), found)?;
        self.get_mut(entry)?.set_validator(false)?;
        self.free_with_label(found)
    }
}
