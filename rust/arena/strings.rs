//! The string arena: labels that do not fit into their cells.
//!
//! A string is 1 to 64 words (256 bytes), without any header: its position and length are in its
//! cell. A freed string goes to the free list of its size, linked through its first word. Free
//! strings are not joined, and split only when memory runs out, because evicted names mostly make
//! room for names of the same length. Word 0 is never used, so 0 means "none".

use super::arena::Arena;
use super::cell::{Cell, STORED};
use super::storage::{STRING_SIZES, Storage};
use crate::error::{Error, Result};
use crate::key::MAX_LABEL;
use crate::key::packing::Label;

const WORD: usize = size_of::<u32>();
const _: () = assert!(MAX_LABEL.div_ceil(WORD) == STRING_SIZES);

/// Words by which the arena grows at least: 16 KiB.
const GROWTH: usize = 4096;

const OUT_OF_RANGE: Error = Error::Corrupt("string out of range");

impl Cell {
    fn inline_label(&self) -> Result<&[u8]> {
        let label = self.label.get(..usize::from(self.label_len()));
        label.ok_or(Error::Corrupt("label longer than its cell"))
    }

    /// Position and words of the string of this cell, if it has one.
    pub(super) fn string(&self) -> Result<Option<(u32, usize)>> {
        if self.label_len() != STORED {
            return Ok(None);
        }
        let (at, len) = self.string_bytes()?;
        Ok(Some((at, len.div_ceil(WORD))))
    }

    fn string_bytes(&self) -> Result<(u32, usize)> {
        let [a, b, c, d, e, f, g, h] = self.label;
        let at = u32::from_le_bytes([a, b, c, d]);
        let len = u32::from_le_bytes([e, f, g, h]) as usize;
        if len == 0 || len > MAX_LABEL {
            return Err(Error::Corrupt("string of invalid length"));
        }
        Ok((at, len))
    }
}

impl<S: Storage> Arena<S> {
    /// The label of a cell as it is stored.
    pub(crate) fn label(&self, i: u32) -> Result<&[u8]> {
        let cell = self.get(i)?;
        if cell.label_len() != STORED {
            return cell.inline_label();
        }
        let (at, len) = cell.string_bytes()?;
        let words = self.words(at, len.div_ceil(WORD))?;
        bytemuck::cast_slice(words).get(..len).ok_or(OUT_OF_RANGE)
    }

    /// Whether this is the label of a cell.
    #[inline]
    pub(crate) fn label_is(&self, i: u32, label: &Label) -> Result<bool> {
        let cell = self.get(i)?;
        match label {
            Label::Packed(word, len) => Ok(cell.is_packed(*word, *len)),
            Label::Raw(bytes) => Ok(cell.is_in(label.packing()) && self.label(i)? == *bytes),
        }
    }

    /// Stores the label of a new cell.
    pub(super) fn set_label(&mut self, cell: &mut Cell, label: &Label) -> Result<()> {
        let (packing, bytes) = (label.packing(), label.bytes());
        if let Some(inline) = cell.label.get_mut(..bytes.len()) {
            inline.copy_from_slice(bytes);
            cell.set_label_len(packing, bytes.len() as u8);
            return Ok(());
        }
        if bytes.len() > MAX_LABEL {
            return Err(Error::Full);
        }
        let words = bytes.len().div_ceil(WORD);
        let at = self.take_string(words)?;
        let string = self.words_mut(at, words)?;
        string.fill(0);
        let string: &mut [u8] = bytemuck::cast_slice_mut(string);
        let string = string.get_mut(..bytes.len()).ok_or(OUT_OF_RANGE)?;
        string.copy_from_slice(bytes);
        cell.set_label_len(packing, STORED);
        let [a, b, c, d] = at.to_le_bytes();
        let [e, f, g, h] = (bytes.len() as u32).to_le_bytes();
        cell.label = [a, b, c, d, e, f, g, h];
        Ok(())
    }

    /// Frees a cell and its string.
    pub(super) fn free_with_label(&mut self, i: u32) -> Result<()> {
        if let Some((at, words)) = self.get(i)?.string()? {
            self.free_string(at, words)?;
        }
        self.free(i)
    }

    fn range(&self, at: u32, words: usize) -> Result<std::ops::Range<usize>> {
        let start = at as usize;
        let end = start.saturating_add(words);
        if at == 0 || end > self.header().strings_used as usize {
            return Err(OUT_OF_RANGE);
        }
        Ok(start..end)
    }

    fn words(&self, at: u32, words: usize) -> Result<&[u32]> {
        let range = self.range(at, words)?;
        self.storage.strings().get(range).ok_or(OUT_OF_RANGE)
    }

    fn words_mut(&mut self, at: u32, words: usize) -> Result<&mut [u32]> {
        let range = self.range(at, words)?;
        self.storage
            .strings_mut()
            .get_mut(range)
            .ok_or(OUT_OF_RANGE)
    }

    /// A string of so many words: a freed one, else a new one, else a part of a longer one.
    fn take_string(&mut self, words: usize) -> Result<u32> {
        if let Some(at) = self.take_freed(words)? {
            return Ok(at);
        }
        let refusal = match self.take_new(words) {
            Err(error) if !error.is_fatal() => error,
            taken => return taken,
        };
        for longer in words + 1..=STRING_SIZES {
            if let Some(at) = self.take_freed(longer)? {
                self.free_string(at.saturating_add(words as u32), longer - words)?;
                return Ok(at);
            }
        }
        Err(refusal)
    }

    fn take_new(&mut self, words: usize) -> Result<u32> {
        let len = self.storage.strings().len();
        let at = self.header().strings_used.max(1);
        let end = at.checked_add(words as u32).ok_or(Error::Full)?;
        if at as usize > len.max(1) {
            return Err(Error::Corrupt("more strings used than there are"));
        }
        if end as usize > len {
            let wanted = len.saturating_add(GROWTH).min(u32::MAX as usize);
            self.storage.grow_strings(wanted.max(end as usize))?;
        }
        self.header_mut().strings_used = end;
        Ok(at)
    }

    fn take_freed(&mut self, words: usize) -> Result<Option<u32>> {
        let at = *self.free_list(words)?;
        if at == 0 {
            return Ok(None);
        }
        let next = self.words(at, words)?.first().copied();
        *self.free_list(words)? = next.unwrap_or(0);
        Ok(Some(at))
    }

    fn free_string(&mut self, at: u32, words: usize) -> Result<()> {
        let next = *self.free_list(words)?;
        if let Some(link) = self.words_mut(at, words)?.first_mut() {
            *link = next;
        }
        *self.free_list(words)? = at;
        Ok(())
    }

    /// The first free string of so many words.
    fn free_list(&mut self, words: usize) -> Result<&mut u32> {
        let lists = &mut self.storage.header_mut().free_strings;
        let list = lists.get_mut(words.wrapping_sub(1));
        list.ok_or(Error::Corrupt("string of invalid length"))
    }

    /// Free strings of so many words, in the order of their list.
    pub(super) fn free_strings(&self, words: usize) -> Result<Vec<u32>> {
        let lists = &self.header().free_strings;
        let mut at = lists.get(words.wrapping_sub(1)).copied().unwrap_or(0);
        let mut strings = Vec::new();
        while at != 0 {
            if strings.len() * words > self.storage.strings().len() {
                return Err(Error::Corrupt("free strings: cycle"));
            }
            strings.push(at);
            at = self.words(at, words)?.first().copied().unwrap_or(0);
        }
        Ok(strings)
    }
}
