//! Notes: a short text beside an entry, such as the validator of its bytes.
//!
//! A note is a cell of its own, whose label is the text. It is found through the hash table by the number of
//! its entry, which is its parent, so an entry without a note takes no more room and no more time: a bit says
//! that it has none.

use super::arena::Arena;
use super::cell::{Cell, Kind};
use super::storage::Storage;
use crate::error::{Error, Result};
use crate::key;
use crate::key::packing::{INLINE, Label};

const MISSING: Error = Error::Corrupt("note: missing");

impl<S: Storage> Arena<S> {
    /// Hash of the note of an entry.
    pub(super) fn note_hash(&self, entry: u32) -> u64 {
        let mut word = [0; INLINE];
        let number = entry.to_le_bytes();
        for (to, from) in word.iter_mut().zip(number) {
            *to = from;
        }
        let len = number.len() as u8;
        key::hash_word(word, len, self.header().seed, Kind::Note as u8)
    }

    pub(super) fn find_note(&self, entry: u32) -> Result<Option<u32>> {
        if !self.get(entry)?.has_note() {
            return Ok(None);
        }
        let found = self.table_find(self.note_hash(entry), |i| {
            let cell = self.get(i)?;
            Ok(cell.parent == entry && cell.kind()? == Kind::Note)
        })?;
        found.map(Some).ok_or(MISSING)
    }

    /// The note of an entry.
    pub(crate) fn note(&self, entry: u32) -> Result<Option<&[u8]>> {
        match self.find_note(entry)? {
            Some(note) => self.label(note).map(Some),
            None => Ok(None),
        }
    }

    /// Gives an entry a note, in the place of the one it has. [`Error::Full`] where the index cannot grow
    /// or the text is too long for a label; the entry then has none.
    pub(crate) fn set_note(&mut self, entry: u32, text: &[u8]) -> Result<()> {
        self.drop_note(entry)?;
        self.ensure(1)?;
        let mut cell = Cell::new(Kind::Note);
        cell.parent = entry;
        self.set_label(&mut cell, &Label::Raw(text))?;
        let note = self.alloc(cell)?;
        if let Err(error) = self.table_insert(self.note_hash(entry), note) {
            self.free_with_label(note)?;
            return Err(error);
        }
        self.get_mut(entry)?.set_note(true);
        Ok(())
    }

    /// Removes the note of an entry, if it has one.
    pub(super) fn drop_note(&mut self, entry: u32) -> Result<()> {
        let Some(note) = self.find_note(entry)? else {
            return Ok(());
        };
        self.table_remove(self.note_hash(entry), note)?;
        self.get_mut(entry)?.set_note(false);
        self.free_with_label(note)
    }
}
