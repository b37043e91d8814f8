//! The hash table that finds a cell by the hash of its path: open addressing with linear probing
//! in segments of 4,096 slots, and a directory of segments indexed by the high bits of the hash
//! (extendible hashing).
//!
//! A segment that is 80 % full splits in two. That moves some three thousand slots, however large
//! the index is, so growth never pauses. A removal shifts later slots of the run back into the
//! hole, so there are no tombstones to clean up.

use super::arena::Arena;
use super::storage::Storage;
use crate::error::{Error, Result};

/// Slots of a segment. The first two hold the number of used ones and the number of leading bits of
/// the hash that all its cells share.
pub(crate) const SEGMENT: usize = 4096;
const META: usize = 2;
const USABLE: usize = SEGMENT - META;
const SPLIT_AT: u32 = (USABLE / 5 * 4) as u32;

/// Slots of a run that are prefetched; most runs are shorter.
const RUN: usize = 16;

/// 2^18 segments hold more slots than there are cell numbers. A segment that would be deeper holds
/// thousands of equal hashes.
const MAX_DEPTH: u32 = 18;

const CELL_BITS: u32 = 28;
const CELL_MASK: u32 = (1 << CELL_BITS) - 1;

fn slot(hash: u64, cell: u32) -> u32 {
    ((hash >> 32) as u32) << CELL_BITS | cell
}

fn home(hash: u64) -> usize {
    META + (((hash & 0xffff_ffff) * USABLE as u64) >> 32) as usize
}

fn next(position: usize) -> usize {
    if position + 1 == SEGMENT {
        META
    } else {
        position + 1
    }
}

/// Slots from `from` forward to `to`.
fn distance(from: usize, to: usize) -> usize {
    if to >= from {
        to - from
    } else {
        to + USABLE - from
    }
}

impl<S: Storage> Arena<S> {
    /// Makes the first segment.
    pub(crate) fn table_init(&mut self) -> Result<()> {
        self.storage.grow_directory(1)?;
        self.storage.grow_slots(SEGMENT)?;
        self.header_mut().segments = 1;
        Ok(())
    }

    fn segment_of(&self, hash: u64) -> Result<usize> {
        let depth = self.header().depth;
        let at = if depth == 0 {
            0
        } else {
            (hash >> (64 - depth.min(63))) as usize
        };
        match self.storage.directory().get(at) {
            Some(segment) if *segment < self.header().segments => Ok(*segment as usize),
            _ => Err(Error::Corrupt("hash table: segment out of range")),
        }
    }

    pub(crate) fn segment(&self, number: usize) -> Result<&[u32; SEGMENT]> {
        let slots = self
            .storage
            .slots()
            .get(number * SEGMENT..(number + 1) * SEGMENT);
        slots
            .and_then(|s| s.try_into().ok())
            .ok_or(Error::Corrupt("hash table: segment out of range"))
    }

    fn segment_mut(&mut self, number: usize) -> Result<&mut [u32; SEGMENT]> {
        let slots = self
            .storage
            .slots_mut()
            .get_mut(number * SEGMENT..(number + 1) * SEGMENT);
        slots
            .and_then(|s| s.try_into().ok())
            .ok_or(Error::Corrupt("hash table: segment out of range"))
    }

    /// Reads the cells that a removal of this hash may have to move; see [`Arena::prefetch`]. The
    /// result is meaningless.
    pub(crate) fn table_prefetch(&self, hash: u64) -> Result<u32> {
        let segment = self.segment(self.segment_of(hash)?)?;
        let mut at = home(hash);
        let mut read = 0;
        for _ in 0..RUN {
            let found = segment.get(at).copied().unwrap_or(0);
            if found == 0 {
                break;
            }
            read ^= self.get(found & CELL_MASK)?.parent;
            at = next(at);
        }
        Ok(read)
    }

    /// The cell with this hash for which `is` holds.
    #[inline]
    pub(crate) fn table_find(
        &self,
        hash: u64,
        mut is: impl FnMut(u32) -> Result<bool>,
    ) -> Result<Option<u32>> {
        let segment = self.segment(self.segment_of(hash)?)?;
        let tag = slot(hash, 0);
        let mut at = home(hash);
        for _ in 0..USABLE {
            let found = segment.get(at).copied().unwrap_or(0);
            if found == 0 {
                return Ok(None);
            }
            if found & !CELL_MASK == tag && is(found & CELL_MASK)? {
                return Ok(Some(found & CELL_MASK));
            }
            at = next(at);
        }
        Err(Error::Corrupt("hash table: segment without a free slot"))
    }

    /// Checks that nothing else with this hash than what was `found` is hidden by damage: a slot that was emptied or changed, a
    /// segment that is another one's, or a cell with another name than the one that it was entered by.
    pub(crate) fn table_check(&self, hash: u64, found: Option<u32>) -> Result<()> {
        let number = self.segment_of(hash)?;
        let segment = self.segment(number)?;
        let used = segment.iter().skip(META).filter(|slot| **slot != 0);
        let [counted, shared, ..] = *segment;
        if used.clone().count() != counted as usize {
            return Err(Error::Corrupt("hash table: count of a segment"));
        }
        self.check_segment_of(hash, number as u32, shared, used.copied().next())?;
        let is_filled = |at: usize| segment.get(at).is_some_and(|slot| *slot != 0);
        let mut at = home(hash);
        while let Some(&filled @ 1..) = segment.get(at) {
            let cell = filled & CELL_MASK;
            let of_cell = self.hash_of(cell)?;
            let is_of_segment = (of_cell ^ hash).leading_zeros() >= shared;
            let mut before = home(of_cell);
            while before != at && is_filled(before) {
                before = next(before);
            }
            if slot(of_cell, cell) != filled || !is_of_segment || before != at {
                return Err(Error::Corrupt("hash table: a cell in another's slot"));
            }
            if of_cell == hash && found != Some(cell) {
                return Err(Error::Corrupt("hash table: a cell that has lost its name"));
            }
            at = next(at);
            if at == home(hash) {
                return Err(Error::Corrupt("hash table: segment without a free slot"));
            }
        }
        Ok(())
    }

    /// Checks that the segment that a hash leads to is its own, by a slot in use; or, where it is empty, by who leads there.
    fn check_segment_of(
        &self,
        hash: u64,
        number: u32,
        shared: u32,
        used: Option<u32>,
    ) -> Result<()> {
        let is_own = match used {
            Some(slot) => (self.hash_of(slot & CELL_MASK)? ^ hash).leading_zeros() >= shared,
            None => {
                let pointers = self.pointers()?.iter().filter(|to| **to == number);
                Some(pointers.count()) == self.pointers_to(shared)
            }
        };
        if is_own {
            Ok(())
        } else {
            Err(Error::Corrupt("hash table: pointers to a segment"))
        }
    }

    /// The directory of segments.
    pub(super) fn pointers(&self) -> Result<&[u32]> {
        let len = 1usize.checked_shl(self.header().depth);
        len.and_then(|len| self.storage.directory().get(..len))
            .ok_or(Error::Corrupt("hash table: directory too short"))
    }

    /// How many of these lead to a segment of hashes with so many leading bits in common.
    pub(super) fn pointers_to(&self, shared: u32) -> Option<usize> {
        1usize.checked_shl(self.header().depth.checked_sub(shared)?)
    }

    /// Inserts a cell that is not in the table yet.
    pub(crate) fn table_insert(&mut self, hash: u64, cell: u32) -> Result<()> {
        loop {
            let number = self.segment_of(hash)?;
            let segment = self.segment_mut(number)?;
            if segment[0] < SPLIT_AT {
                segment[0] = segment[0].saturating_add(1);
                return put(segment, hash, cell);
            }
            self.split(hash, number)?;
        }
    }

    /// Removes a cell.
    pub(crate) fn table_remove(&mut self, hash: u64, cell: u32) -> Result<()> {
        let number = self.segment_of(hash)?;
        let wanted = slot(hash, cell);
        let segment = self.segment(number)?;
        let mut hole = home(hash);
        let mut steps = 0;
        while segment.get(hole).copied() != Some(wanted) {
            hole = next(hole);
            steps += 1;
            if steps > USABLE {
                return Err(Error::Corrupt("hash table: cell not found"));
            }
        }
        let mut at = hole;
        for _ in 0..USABLE {
            at = next(at);
            let moved = self.segment(number)?.get(at).copied().unwrap_or(0);
            if moved == 0 {
                let segment = self.segment_mut(number)?;
                if let Some(slot) = segment.get_mut(hole) {
                    *slot = 0;
                }
                segment[0] = segment[0].saturating_sub(1);
                return Ok(());
            }
            // A cell that is probed for through the hole moves into it.
            let from = home(self.hash_of(moved & CELL_MASK)?);
            if distance(from, at) >= distance(hole, at) {
                if let Some(slot) = self.segment_mut(number)?.get_mut(hole) {
                    *slot = moved;
                }
                hole = at;
            }
        }
        Err(Error::Corrupt("hash table: segment without a free slot"))
    }

    fn split(&mut self, hash: u64, number: usize) -> Result<()> {
        let shared = self.segment(number)?[1];
        let depth = self.header().depth;
        if shared > depth || depth > MAX_DEPTH {
            return Err(Error::Corrupt(
                "hash table: segment deeper than its directory",
            ));
        }
        if shared == MAX_DEPTH {
            return Err(Error::Full);
        }
        let mut cells = Vec::with_capacity(SPLIT_AT as usize);
        for &found in self
            .segment(number)?
            .iter()
            .skip(META)
            .filter(|slot| **slot != 0)
        {
            let cell = found & CELL_MASK;
            let of_cell = self.hash_of(cell)?;
            if slot(of_cell, cell) != found {
                // It would be found again that was not, perhaps by the write that had to remove it.
                return Err(Error::Corrupt("hash table: a cell in another's slot"));
            }
            cells.push((of_cell, cell));
        }
        if cells.len() != self.segment(number)?[0] as usize {
            return Err(Error::Corrupt("hash table: count of a segment"));
        }
        let fresh = self.header().segments as usize;
        if fresh * SEGMENT > self.storage.slots().len() {
            return Err(Error::Corrupt("hash table: more segments than slots"));
        }
        self.storage.grow_slots((fresh + 1) * SEGMENT)?;
        if shared == depth {
            self.double_directory()?;
        }
        let depth = self.header().depth;
        let run = 1usize << (depth - shared);
        let first = ((hash >> (64 - depth)) as usize) & !(run - 1);
        let upper = self
            .storage
            .directory_mut()
            .get_mut(first + run / 2..first + run);
        upper
            .ok_or(Error::Corrupt("hash table: directory too short"))?
            .fill(fresh as u32);
        self.header_mut().segments = fresh as u32 + 1;
        *self.segment_mut(number)? = [0; SEGMENT];
        *self.segment_mut(fresh)? = [0; SEGMENT];
        self.segment_mut(number)?[1] = shared + 1;
        self.segment_mut(fresh)?[1] = shared + 1;
        for (hash, cell) in cells {
            let is_upper = hash >> (63 - shared) & 1 == 1;
            let segment = self.segment_mut(if is_upper { fresh } else { number })?;
            segment[0] = segment[0].saturating_add(1);
            put(segment, hash, cell)?;
        }
        Ok(())
    }

    fn double_directory(&mut self) -> Result<()> {
        let len = 1usize << self.header().depth;
        self.storage.grow_directory(len * 2)?;
        let directory = self.storage.directory_mut();
        for at in (0..len * 2).rev() {
            let segment = directory.get(at / 2).copied().unwrap_or(0);
            if let Some(entry) = directory.get_mut(at) {
                *entry = segment;
            }
        }
        let header = self.header_mut();
        header.depth = header.depth.saturating_add(1);
        Ok(())
    }
}

fn put(segment: &mut [u32; SEGMENT], hash: u64, cell: u32) -> Result<()> {
    let mut at = home(hash);
    for _ in 0..USABLE {
        match segment.get_mut(at) {
            Some(free @ 0) => {
                *free = slot(hash, cell);
                return Ok(());
            }
            _ => at = next(at),
        }
    }
    Err(Error::Corrupt("hash table: segment without a free slot"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Heap;
    use crate::key::ByteRange::Full;

    #[test]
    fn table_check_finds_a_pointer_to_the_segment_of_others() {
        let mut arena = Arena::new(Heap::default());
        arena.table_init().unwrap();
        arena.tree_init(7).unwrap();
        for n in 0..30_000 {
            arena.insert(&format!("a/c/{n}"), Full).unwrap();
        }
        let found = arena.find("a/c/5", Full).unwrap();
        let hash = arena.hash_of_name("a/c/5", Full);
        assert!(found.is_some());
        arena.table_check(hash, found).unwrap();
        assert!(arena.table_check(hash, None).is_err());
        let at = (hash >> (64 - arena.header().depth)) as usize;
        let right = arena.pointers().unwrap()[at];
        let segments = arena.header().segments;
        assert!(segments > 8);
        for is_empty in [false, true] {
            for other in (0..segments).filter(|other| *other != right) {
                if is_empty {
                    let segment = arena.segment_mut(other as usize).unwrap();
                    let shared = segment[1];
                    *segment = [0; SEGMENT];
                    segment[1] = shared;
                }
                arena.storage.directory_mut()[at] = other;
                assert!(arena.table_check(hash, None).is_err(), "{is_empty} {other}");
            }
            arena.storage.directory_mut()[at] = right;
            arena.table_check(hash, found).unwrap();
        }
    }
}
