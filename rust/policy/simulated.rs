//! One simulated cache of sampled keys.

use bytemuck::{Pod, Zeroable};

use super::entries::Entries;
use crate::arena::{End, List, PolicyState};
use crate::error::{Error, Result};

/// What the learner's memory is found to be where its numbers cannot be.
pub(super) const CORRUPT: Error = Error::Corrupt("learner: damaged");

/// A sampled key, for all simulations.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Key {
    pub(super) hash: u64,
    pub(super) size: u64,
    /// Simulations that hold it.
    pub(super) holders: u32,
    /// Next free key, of one that is free.
    pub(super) next: u32,
}

/// The links of a key in one simulation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Link {
    pub(super) older: u16,
    pub(super) newer: u16,
    pub(super) note: u16,
    pub(super) is_held: u16,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Head {
    pub(super) state: PolicyState,
    pub(super) bytes: u64,
    pub(super) entries: u64,
    pub(super) recency: [u32; 2],
    pub(super) main: [u32; 2],
}

/// One simulated cache.
#[derive(Debug)]
pub(super) struct Simulated<'a> {
    pub(super) head: &'a mut Head,
    pub(super) links: &'a mut [Link],
    pub(super) ghosts: &'a mut [u64],
    pub(super) keys: &'a mut [Key],
}

impl Simulated<'_> {
    /// Whether it holds a key.
    pub(super) fn holds(&self, i: u32) -> Result<bool> {
        Ok(self.get(i)?.is_held != 0)
    }

    /// Takes hold of a key, which is in no list yet.
    pub(super) fn hold(&mut self, i: u32) -> Result<()> {
        let size = self.size(i)?;
        self.get_mut(i)?.is_held = 1;
        let key = self.keys.get_mut(i as usize).ok_or(CORRUPT)?;
        key.holders = key.holders.saturating_add(1);
        self.head.entries = self.head.entries.saturating_add(1);
        self.head.bytes = self.head.bytes.saturating_add(size);
        Ok(())
    }

    /// Lets a key go that is in no list any more. Whether no simulation holds it now.
    pub(super) fn release(&mut self, i: u32) -> Result<bool> {
        let size = self.size(i)?;
        *self.get_mut(i)? = Link::zeroed();
        self.head.entries = self.head.entries.saturating_sub(1);
        self.head.bytes = self.head.bytes.saturating_sub(size);
        let key = self.keys.get_mut(i as usize).ok_or(CORRUPT)?;
        key.holders = key.holders.checked_sub(1).ok_or(CORRUPT)?;
        Ok(key.holders == 0)
    }

    fn get(&self, i: u32) -> Result<&Link> {
        self.links.get(i as usize).ok_or(CORRUPT)
    }

    fn get_mut(&mut self, i: u32) -> Result<&mut Link> {
        self.links.get_mut(i as usize).ok_or(CORRUPT)
    }

    fn ends(&mut self, list: List) -> &mut [u32; 2] {
        match list {
            List::Main => &mut self.head.main,
            _ => &mut self.head.recency,
        }
    }

    fn set_neighbour(&mut self, i: u32, towards: End, to: u32) -> Result<()> {
        let to = to as u16;
        let link = self.get_mut(i)?;
        *towards.of([&mut link.older, &mut link.newer]) = to;
        Ok(())
    }

    pub(super) fn validate(&self, holders: &mut [u32]) -> Result<()> {
        let (mut entries, mut bytes, mut main_bytes) = (0, 0, 0);
        for list in [List::Recency, List::Main] {
            let mut before = 0;
            for i in self.all_of(list)? {
                let is_sound = self.list_of(i)? == list
                    && self.neighbour(i, End::First)? == before
                    && self.holds(i)?;
                if !is_sound {
                    return Err(CORRUPT);
                }
                (before, entries) = (i, entries + 1);
                bytes += self.size(i)?;
                main_bytes += if list == List::Main { self.size(i)? } else { 0 };
                *holders.get_mut(i as usize).ok_or(CORRUPT)? += 1;
            }
            if self.end(list, End::Last)?.unwrap_or(0) != before {
                return Err(CORRUPT);
            }
        }
        let counted = (
            self.head.entries,
            self.head.bytes,
            self.head.state.main_bytes,
        );
        if counted != (entries, bytes, main_bytes) {
            return Err(CORRUPT);
        }
        Ok(())
    }
}

impl Entries for Simulated<'_> {
    const EXCLUSIVE: bool = true;

    fn state(&self) -> &PolicyState {
        &self.head.state
    }
    fn state_mut(&mut self) -> &mut PolicyState {
        &mut self.head.state
    }
    fn totals(&self) -> (u64, u64) {
        (self.head.entries, self.head.bytes)
    }
    fn size(&self, entry: u32) -> Result<u64> {
        Ok(self.keys.get(entry as usize).ok_or(CORRUPT)?.size)
    }
    fn hash(&self, entry: u32) -> Result<u64> {
        Ok(self.keys.get(entry as usize).ok_or(CORRUPT)?.hash)
    }
    fn note(&self, entry: u32) -> Result<u8> {
        Ok(self.get(entry)?.note as u8)
    }
    fn set_note(&mut self, entry: u32, note: u8) -> Result<()> {
        self.get_mut(entry)?.note = u16::from(note);
        Ok(())
    }
    fn end(&self, list: List, end: End) -> Result<Option<u32>> {
        let i = end.of(match list {
            List::Main => self.head.main,
            _ => self.head.recency,
        });
        Ok((i != 0).then_some(i))
    }
    fn neighbour(&self, entry: u32, towards: End) -> Result<u32> {
        let link = self.get(entry)?;
        Ok(u32::from(towards.of([link.older, link.newer])))
    }
    fn link(&mut self, list: List, entry: u32, end: End) -> Result<()> {
        let beside = std::mem::replace(end.of(self.ends(list).each_mut()), entry);
        if beside == 0 {
            *end.other().of(self.ends(list).each_mut()) = entry;
        }
        self.set_neighbour(entry, end, 0)?;
        self.set_neighbour(entry, end.other(), beside)?;
        if beside != 0 {
            self.set_neighbour(beside, end, entry)?;
        }
        Ok(())
    }
    fn unlink(&mut self, list: List, entry: u32) -> Result<()> {
        let [older, newer] = [
            self.neighbour(entry, End::First)?,
            self.neighbour(entry, End::Last)?,
        ];
        match older {
            0 => self.ends(list)[0] = newer,
            _ => self.set_neighbour(older, End::Last, newer)?,
        }
        match newer {
            0 => self.ends(list)[1] = older,
            _ => self.set_neighbour(newer, End::First, older)?,
        }
        Ok(())
    }
    fn history(&self) -> &[u64] {
        self.ghosts
    }
    fn history_mut(&mut self) -> &mut [u64] {
        self.ghosts
    }
    fn grow_history(&mut self, _: usize) -> Result<()> {
        Err(Error::Full)
    }
}
