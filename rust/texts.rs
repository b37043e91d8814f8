//! Texts: names that do not fit into their cells, in blocks of one to 32 words.
//!
//! A text of up to 128 bytes is one block of as many words as it needs, and nothing beside: where
//! it lies and how long it is stands in its cell. A longer one is a chain of blocks of 32 words that
//! each begin with the number of the next one; the last has no link and is as long as what is left.
//!
//! A block that is given back goes to the list of its size, and its first word is the number of
//! the next one there. Free blocks are not joined, and split only where memory gives out, for names
//! of one length mostly make room for others of the same: so of each size there are as many as were
//! in use at once. Word 0 is never used, so 0 means "none".

use std::borrow::Cow;

use crate::block::{Block, TEXT_SIZES};
use crate::cell::{Cell, LONG};
use crate::cells::Cells;
use crate::coding::Text;
use crate::error::{Fault, Res};

const WORD: usize = size_of::<u32>();

/// Bytes of text in the largest block, without a link and with one.
const WHOLE: usize = TEXT_SIZES * WORD;
const LINKED: usize = WHOLE - WORD;

/// Words by which a block of memory grows at least: 16 KiB.
const GROWTH: usize = 4096;

const STRAY: Fault = Fault::Corrupt("a text out of range");

/// A block of a text.
struct Piece<'a> {
    words: usize,
    text: &'a [u8],
    /// The block that the text goes on in.
    next: u32,
}

impl Cell {
    fn inline(&self) -> Res<&[u8]> {
        let text = self.text.get(..usize::from(self.text_len()));
        text.ok_or(Fault::Corrupt("a text longer than its cell"))
    }
}

impl<B: Block> Cells<B> {
    /// The stored bytes of a cell's text, as they lie there unless they are a chain.
    pub(crate) fn text(&self, i: u32) -> Res<Cow<'_, [u8]>> {
        let cell = self.get(i)?;
        if cell.text_len() != LONG {
            return cell.inline().map(Cow::Borrowed);
        }
        let (mut at, len) = self.outside(cell)?;
        if len <= WHOLE {
            return Ok(Cow::Borrowed(self.piece(at, len)?.text));
        }
        let mut text = Vec::with_capacity(len);
        while text.len() < len {
            let piece = self.piece(at, len - text.len())?;
            text.extend_from_slice(piece.text);
            at = piece.next;
        }
        Ok(Cow::Owned(text))
    }

    /// Whether this is the text of a cell.
    #[inline]
    pub(crate) fn text_is(&self, i: u32, text: &Text) -> Res<bool> {
        let cell = self.get(i)?;
        if let Text::Packed(word, len) = text {
            return Ok(cell.is_packed(*word, *len));
        }
        if !cell.is_in(text.coding()) {
            return Ok(false);
        }
        let bytes = text.bytes();
        if cell.text_len() != LONG {
            return Ok(cell.inline()? == bytes);
        }
        Ok(self.outside(cell)?.1 == bytes.len() && *self.text(i)? == *bytes)
    }

    /// Stores the text of a new cell. Growth that fails leaves no block behind.
    pub(crate) fn set_text(&mut self, cell: &mut Cell, text: &Text) -> Res<()> {
        let (coding, text) = (text.coding(), text.bytes());
        if let Some(place) = cell.text.get_mut(..text.len()) {
            place.copy_from_slice(text);
            cell.set_text_len(coding, text.len() as u8);
            return Ok(());
        }
        let len = u32::try_from(text.len()).map_err(|_| Fault::Full)?;
        let links = text.len().saturating_sub(WHOLE).div_ceil(LINKED);
        let (front, last) = text.split_at(links * LINKED);
        // From its end, so that each block has somewhere to lead to.
        let (mut first, mut stored) = (0, 0);
        for part in std::iter::once(last).chain(front.chunks(LINKED).rev()) {
            match self.store(part, first) {
                Ok(at) => (first, stored) = (at, stored + part.len()),
                Err(fault) => {
                    self.drop_text(first, stored)?;
                    return Err(fault);
                }
            }
        }
        cell.set_text_len(coding, LONG);
        let [a, b, c, d] = first.to_le_bytes();
        let [e, f, g, h] = len.to_le_bytes();
        cell.text = [a, b, c, d, e, f, g, h];
        Ok(())
    }

    /// Gives a cell back, with its text.
    pub(crate) fn free_with_text(&mut self, i: u32) -> Res<()> {
        let cell = self.get(i)?;
        if cell.text_len() == LONG {
            let (at, len) = self.outside(cell)?;
            self.drop_text(at, len)?;
        }
        self.free(i)
    }

    /// Number and words of each block that a cell's text lies in.
    pub(crate) fn blocks_of_text(&self, cell: &Cell) -> Res<Vec<(u32, usize)>> {
        let mut blocks = Vec::new();
        if cell.text_len() != LONG {
            return Ok(blocks);
        }
        let (mut at, mut left) = self.outside(cell)?;
        while left > 0 {
            let piece = self.piece(at, left)?;
            blocks.push((at, piece.words));
            left -= piece.text.len();
            at = piece.next;
        }
        Ok(blocks)
    }

    /// First block and length of a text that does not lie in its cell.
    fn outside(&self, cell: &Cell) -> Res<(u32, usize)> {
        let [a, b, c, d, e, f, g, h] = cell.text;
        let at = u32::from_le_bytes([a, b, c, d]);
        let len = u32::from_le_bytes([e, f, g, h]) as usize;
        if len > self.block.texts().len().saturating_mul(WORD) {
            return Err(Fault::Corrupt("a text longer than the index"));
        }
        Ok((at, len))
    }

    fn drop_text(&mut self, mut at: u32, mut left: usize) -> Res<()> {
        while left > 0 {
            let piece = self.piece(at, left)?;
            let (words, next) = (piece.words, piece.next);
            left -= piece.text.len();
            self.give_back(at, words)?;
            at = next;
        }
        Ok(())
    }

    /// The first block of what is left of a text.
    fn piece(&self, at: u32, left: usize) -> Res<Piece<'_>> {
        let (link, len) = if left > WHOLE { (1, LINKED) } else { (0, left) };
        let words = link + len.div_ceil(WORD);
        let (link, text) = self.words(at, words)?.split_at(link);
        let text = bytemuck::cast_slice(text).get(..len).ok_or(STRAY)?;
        let next = link.first().copied().unwrap_or(0);
        Ok(Piece { words, text, next })
    }

    /// Puts a part of a text into a block of its own; `next` is where it goes on, or 0.
    fn store(&mut self, part: &[u8], next: u32) -> Res<u32> {
        let link = usize::from(next != 0);
        let at = self.take(link + part.len().div_ceil(WORD))?;
        let block = self.words_mut(at, link + part.len().div_ceil(WORD))?;
        block.fill(0);
        let (head, text) = block.split_at_mut(link);
        head.fill(next);
        let text: &mut [u8] = bytemuck::cast_slice_mut(text);
        text.get_mut(..part.len())
            .ok_or(STRAY)?
            .copy_from_slice(part);
        Ok(at)
    }

    fn range(&self, at: u32, words: usize) -> Res<std::ops::Range<usize>> {
        let start = at as usize;
        let end = start.saturating_add(words);
        if at == 0 || end > self.header().texts_used as usize {
            return Err(STRAY);
        }
        Ok(start..end)
    }

    fn words(&self, at: u32, words: usize) -> Res<&[u32]> {
        let range = self.range(at, words)?;
        self.block.texts().get(range).ok_or(STRAY)
    }

    fn words_mut(&mut self, at: u32, words: usize) -> Res<&mut [u32]> {
        let range = self.range(at, words)?;
        self.block.texts_mut().get_mut(range).ok_or(STRAY)
    }

    /// A block of so many words: one that was given back, else a new one.
    fn take(&mut self, words: usize) -> Res<u32> {
        if let Some(at) = self.take_free(words)? {
            return Ok(at);
        }
        let taken = self.take_new(words);
        if taken != Err(Fault::Full) {
            return taken;
        }
        for larger in words + 1..=TEXT_SIZES {
            if let Some(at) = self.take_free(larger)? {
                self.give_back(at.saturating_add(words as u32), larger - words)?;
                return Ok(at);
            }
        }
        Err(Fault::Full)
    }

    fn take_new(&mut self, words: usize) -> Res<u32> {
        let len = self.block.texts().len();
        let at = self.header().texts_used.max(1);
        let end = at.checked_add(words as u32).ok_or(Fault::Full)?;
        if at as usize > len.max(1) {
            return Err(Fault::Corrupt("more texts used than there are"));
        }
        if end as usize > len {
            let wanted = len.saturating_add(GROWTH).min(u32::MAX as usize);
            self.block.grow_texts(wanted.max(end as usize))?;
        }
        self.header_mut().texts_used = end;
        Ok(at)
    }

    fn take_free(&mut self, words: usize) -> Res<Option<u32>> {
        let at = *self.free_list(words)?;
        if at == 0 {
            return Ok(None);
        }
        let next = self.words(at, words)?.first().copied();
        *self.free_list(words)? = next.unwrap_or(0);
        Ok(Some(at))
    }

    fn give_back(&mut self, at: u32, words: usize) -> Res<()> {
        let next = *self.free_list(words)?;
        if let Some(link) = self.words_mut(at, words)?.first_mut() {
            *link = next;
        }
        *self.free_list(words)? = at;
        Ok(())
    }

    /// The first free block of so many words.
    fn free_list(&mut self, words: usize) -> Res<&mut u32> {
        let lists = &mut self.block.header_mut().free_texts;
        let list = lists.get_mut(words.wrapping_sub(1));
        list.ok_or(Fault::Corrupt("a text of no size"))
    }

    /// Free blocks of so many words, in the order of their list; an error where there are more than
    /// there is room for.
    pub(crate) fn free_blocks(&self, words: usize) -> Res<Vec<u32>> {
        let lists = &self.header().free_texts;
        let mut at = lists.get(words.wrapping_sub(1)).copied().unwrap_or(0);
        let mut blocks = Vec::new();
        while at != 0 {
            if blocks.len() * words > self.block.texts().len() {
                return Err(Fault::Corrupt("a list that bites its tail"));
            }
            blocks.push(at);
            at = self.words(at, words)?.first().copied().unwrap_or(0);
        }
        Ok(blocks)
    }
}
