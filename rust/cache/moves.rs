//! Moves: values in sparse segments of a pool go to another one, so that files are bounded by bytes.
//!
//! ```text
//! begin_move ─▶ copy, not valid ─▶ finish_move: the places change ─▶ delete the old one ─▶ seal the new one
//! ```
//!
//! The copy is counted by an entry of its own, a range of the same key that no reader can ask for. So a write of the key
//! deletes it as well, and after a death it is deleted like any other value that was not finished.

use super::cache::{Cache, Victim};
use super::peers::Peers;
use super::segments::{FEW, LOOKED_AT, Placed};
use crate::arena::{End, List, State};
use crate::error::Result;
use crate::key::ByteRange;
use crate::policy::Eviction;

/// The range of a copy.
const COPY: ByteRange = ByteRange::Range {
    start: u64::MAX,
    end: u64::MAX,
};

/// What a move needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeginMove {
    /// The value is not there any more, or is on its way already.
    Gone,
    /// So many bytes have to be evicted first.
    NeedsRoom(u64),
    /// Copy the bytes to this place, then [`Cache::finish_move`].
    To(Move),
}

/// A move in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Where the copy goes.
    pub to: Placed,
    entry: u32,
    /// The place of the value, and its segment: see [`Cache::is_still`].
    word: u64,
    from: u64,
    copy: u32,
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// A sparse segment with values that should be moved, if there are many of them.
    pub fn straggling_segment(&self) -> Result<Option<u64>> {
        let (mut at, mut found, mut last) = (self.arena.list(List::Segments)[0], 0, None);
        for _ in 0..LOOKED_AT {
            if at == 0 {
                break;
            }
            let cell = self.arena.segment_cell(at)?;
            if cell.is_sparse_segment() && !cell.is_spent_segment() {
                found += 1;
                last = Some(cell.segment_number());
            }
            at = self.arena.neighbour(at, End::Last)?;
        }
        Ok(last.filter(|_| found > FEW))
    }

    /// Begins to move the value at a place.
    pub fn begin_move(&mut self, key: &str, range: ByteRange, from: Placed) -> Result<BeginMove> {
        let Some((entry, word, placed)) = self.find_placed(key, range)? else {
            return Ok(BeginMove::Gone);
        };
        let is_there = (placed.segment, placed.page) == (from.segment, from.page);
        let has_copy = self.arena.find(key, COPY)?.is_some();
        if !is_there || has_copy || !self.is_complete() || self.is_changing(key) {
            return Ok(BeginMove::Gone);
        }
        let size = placed.size;
        let beside = self.segment_overhead(size);
        let cost = self.arena.header().cost(size).saturating_add(beside);
        let free = self.bound().saturating_sub(self.taken());
        if cost > free {
            return Ok(BeginMove::NeedsRoom(cost - free));
        }
        let (segment, _) = self.segment_with_room(size, beside)?;
        let Some(copy) = self.begin_writing(key, COPY, size)? else {
            return Ok(BeginMove::Gone);
        };
        self.append_entry(copy, segment)?;
        self.moving = self.moving.saturating_add(self.arena.header().cost(size));
        Ok(match self.placed(copy)? {
            Some(to) => BeginMove::To(Move {
                to,
                entry,
                word,
                from: from.segment,
                copy,
            }),
            None => BeginMove::Gone,
        })
    }

    /// The copy is written, or is not: then, and where the value is another one by now, it is to be deleted itself.
    /// Else what it is a copy of. The flag says which.
    pub fn finish_move(&mut self, moved: Move, is_written: bool) -> Result<(Vec<Victim>, bool)> {
        let Move {
            entry,
            word,
            from,
            copy,
            ..
        } = moved;
        let owner = self.arena.storage.own_slot() as u32 + 1;
        let is_own = self.arena.get(copy).is_ok_and(|cell| {
            cell.is_entry() && cell.state() == State::Filling && cell.earlier == owner
        });
        if !is_own {
            return Ok((Vec::new(), false));
        }
        let mut same = is_written && self.is_still(entry, word, from);
        if same && let (Some(old), Some(new)) = (self.arena.place(entry)?, self.arena.place(copy)?)
        {
            self.arena.set_place_word(entry, new.word(entry))?;
            self.arena.set_place_word(copy, old.word(copy))?;
        } else {
            same = false;
        }
        let cell = self.arena.get_mut(copy)?;
        let size = cell.size()?;
        cell.set_state(State::Deleting)?;
        let cost = self.arena.header().cost(size);
        self.change_writing(|bytes| bytes.saturating_sub(cost));
        self.moving = self.moving.saturating_sub(cost);
        let (key, range) = self.arena.name(copy)?;
        let victim = Victim {
            cell: copy,
            cache_key: range.cache_key(&key),
            placed: self.placed(copy)?,
        };
        Ok((vec![victim], same))
    }
}
