//! Sampled keys, and which of them each of some simulated caches holds.
//!
//! The simulations share the keys, so a request looks its key up once. All is in memory of a fixed size that is
//! not trusted: a wrong number in it is an error, and the learner begins anew.

use bytemuck::{Pod, Zeroable};

use super::entries::Entries;
use super::rule::{RULES, Ruled};
use super::table::Table;
use crate::arena::{List, PolicyState};
use crate::error::{Error, Result};

/// Simulations, one for each rule.
pub(super) const COUNT: usize = RULES.len();
/// Keys that there is room for; number 0 is none.
const KEYS: usize = 8192;
const SLOTS: usize = 2 * KEYS;
/// Words of the ghosts of a simulation: 4,096 of them.
const GHOSTS: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Key {
    hash: u64,
    size: u64,
    /// Simulations that hold it.
    holders: u32,
    /// Next free key, of one that is free.
    next: u32,
}

/// The links of a key in one simulation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Link {
    older: u16,
    newer: u16,
    note: u16,
    is_held: u16,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Head {
    state: PolicyState,
    bytes: u64,
    entries: u64,
    recency: [u32; 2],
    main: [u32; 2],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Free {
    /// First free key, or 0.
    first: u32,
    /// Keys that were ever used; those above are free as well.
    used: u32,
}

const HEAD: usize = size_of::<Head>() / 8;
const LINKS: usize = KEYS * size_of::<Link>() / 8;
const SIMULATION: usize = HEAD + LINKS + GHOSTS;
const ALL_KEYS: usize = KEYS * size_of::<Key>() / 8;

/// Words of the memory: 545 KiB.
pub(super) const WORDS: usize = 1 + ALL_KEYS + SLOTS / 2 + COUNT * SIMULATION;

const CORRUPT: Error = Error::Corrupt("learner: damaged");

/// The keys and the simulations.
#[derive(Debug)]
pub(super) struct Samples<'a> {
    free: &'a mut Free,
    keys: &'a mut [Key],
    table: Table<'a>,
    simulations: &'a mut [u64],
}

fn cast<T: Pod>(words: &mut [u64]) -> Result<&mut [T]> {
    bytemuck::try_cast_slice_mut(words).map_err(|_| CORRUPT)
}

impl<'a> Samples<'a> {
    /// What is in this memory; zeros are nothing.
    pub(super) fn of(words: &'a mut [u64]) -> Result<Self> {
        let (free, rest) = words.split_at_mut_checked(1).ok_or(CORRUPT)?;
        let (keys, rest) = rest.split_at_mut_checked(ALL_KEYS).ok_or(CORRUPT)?;
        let (table, rest) = rest.split_at_mut_checked(SLOTS / 2).ok_or(CORRUPT)?;
        let free = cast::<Free>(free)?.first_mut().ok_or(CORRUPT)?;
        free.used = free.used.max(1);
        Ok(Samples {
            free,
            keys: cast(keys)?,
            table: Table(cast(table)?),
            simulations: rest.get_mut(..COUNT * SIMULATION).ok_or(CORRUPT)?,
        })
    }

    fn slot_of(&self, hash: u64) -> Result<(usize, u32)> {
        self.table
            .find(hash, |i| Some(self.keys.get(i as usize)?.hash))
    }

    /// The number of a key, or 0.
    pub(super) fn find(&self, hash: u64) -> Result<u32> {
        Ok(self.slot_of(hash)?.1)
    }

    /// Whether there is no room for one more key.
    pub(super) fn is_full(&self) -> bool {
        self.free.first == 0 && self.free.used as usize >= KEYS
    }

    /// Adds a key that is not there, and that no simulation holds.
    pub(super) fn add(&mut self, hash: u64, size: u64) -> Result<u32> {
        let (at, there) = self.slot_of(hash)?;
        let i = match self.free.first {
            _ if there != 0 => return Err(CORRUPT),
            0 => self.free.used,
            first => first,
        };
        let key = self.keys.get_mut(i as usize).ok_or(CORRUPT)?;
        if self.free.first == 0 {
            self.free.used += 1;
        } else {
            self.free.first = key.next;
        }
        *key = Key {
            hash,
            size,
            ..Key::zeroed()
        };
        self.table.set(at, i)?;
        Ok(i)
    }

    /// Removes a key that no simulation holds.
    pub(super) fn remove_unheld(&mut self, i: u32) -> Result<()> {
        let key = *self.keys.get(i as usize).ok_or(CORRUPT)?;
        if key.holders != 0 {
            return Ok(());
        }
        let (at, found) = self.slot_of(key.hash)?;
        if found != i {
            return Err(CORRUPT);
        }
        let keys = &*self.keys;
        self.table
            .remove(at, |i| Some(keys.get(i as usize)?.hash))?;
        let next = self.free.first;
        *self.keys.get_mut(i as usize).ok_or(CORRUPT)? = Key {
            next,
            ..Key::zeroed()
        };
        self.free.first = i;
        Ok(())
    }

    /// One simulation.
    pub(super) fn simulation(&mut self, n: usize) -> Result<(Ruled, Simulated<'_>)> {
        let rule = *RULES.get(n).ok_or(CORRUPT)?;
        let from = n * SIMULATION;
        let words = self.simulations.get_mut(from..from + SIMULATION);
        let (head, rest) = words.ok_or(CORRUPT)?.split_at_mut(HEAD);
        let (links, ghosts) = rest.split_at_mut(LINKS);
        let simulated = Simulated {
            head: cast::<Head>(head)?.first_mut().ok_or(CORRUPT)?,
            links: cast(links)?,
            ghosts,
            keys: &mut *self.keys,
        };
        Ok((Ruled { rule, ghosts_at: 0 }, simulated))
    }

    /// Has one simulation go on from the state of another one.
    pub(super) fn copy(&mut self, from: usize, to: usize) -> Result<()> {
        let at = from * SIMULATION;
        if at + SIMULATION > self.simulations.len() {
            return Err(CORRUPT);
        }
        self.simulations
            .copy_within(at..at + SIMULATION, to * SIMULATION);
        self.recount()
    }

    /// Removes the keys for which `keep` does not hold.
    pub(super) fn retain(&mut self, keep: impl Fn(u64) -> bool) -> Result<()> {
        for n in 0..COUNT {
            let (ruled, mut simulated) = self.simulation(n)?;
            for list in [List::Recency, List::Main] {
                for i in simulated.all_of(list)? {
                    if !keep(simulated.hash(i)?) {
                        ruled.remove(&mut simulated, i)?;
                        simulated.release(i)?;
                    }
                }
            }
        }
        self.recount()
    }

    /// Counts the holders of each key anew, and removes those that have none.
    fn recount(&mut self) -> Result<()> {
        let all: Vec<u32> = self.table.0.iter().copied().filter(|i| *i != 0).collect();
        for i in all {
            let mut holders = 0;
            for n in 0..COUNT {
                holders += u32::from(self.simulation(n)?.1.holds(i)?);
            }
            self.keys.get_mut(i as usize).ok_or(CORRUPT)?.holders = holders;
            self.remove_unheld(i)?;
        }
        Ok(())
    }

    /// Recomputes everything.
    pub(super) fn validate(&mut self) -> Result<()> {
        let mut holders = vec![0; KEYS];
        for n in 0..COUNT {
            let (_, simulated) = self.simulation(n)?;
            simulated.validate(&mut holders)?;
        }
        let counted = self.keys.iter().map(|key| key.holders);
        let held = holders.iter().filter(|count| **count != 0).count();
        if !counted.eq(holders.iter().copied()) || self.table.used() != held {
            return Err(CORRUPT);
        }
        Ok(())
    }
}

/// One simulated cache.
#[derive(Debug)]
pub(super) struct Simulated<'a> {
    head: &'a mut Head,
    links: &'a mut [Link],
    ghosts: &'a mut [u64],
    keys: &'a mut [Key],
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

    fn set_neighbour(&mut self, i: u32, towards_last: bool, to: u32) -> Result<()> {
        let to = to as u16;
        let link = self.get_mut(i)?;
        if towards_last {
            link.newer = to;
        } else {
            link.older = to;
        }
        Ok(())
    }

    fn validate(&self, holders: &mut [u32]) -> Result<()> {
        let (mut entries, mut bytes, mut main_bytes) = (0, 0, 0);
        for list in [List::Recency, List::Main] {
            let mut before = 0;
            for i in self.all_of(list)? {
                let is_sound = self.list_of(i)? == list
                    && self.neighbour(i, false)? == before
                    && self.holds(i)?;
                if !is_sound {
                    return Err(CORRUPT);
                }
                (before, entries) = (i, entries + 1);
                bytes += self.size(i)?;
                main_bytes += if list == List::Main { self.size(i)? } else { 0 };
                *holders.get_mut(i as usize).ok_or(CORRUPT)? += 1;
            }
            if self.end(list, true)?.unwrap_or(0) != before {
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
    fn end(&self, list: List, at_last: bool) -> Result<Option<u32>> {
        let [first, last] = match list {
            List::Main => self.head.main,
            _ => self.head.recency,
        };
        let i = if at_last { last } else { first };
        Ok((i != 0).then_some(i))
    }
    fn neighbour(&self, entry: u32, towards_last: bool) -> Result<u32> {
        let link = self.get(entry)?;
        Ok(u32::from(if towards_last {
            link.newer
        } else {
            link.older
        }))
    }
    fn link(&mut self, list: List, entry: u32, at_last: bool) -> Result<()> {
        let [first, last] = self.ends(list);
        let (end, other) = if at_last {
            (last, first)
        } else {
            (first, last)
        };
        let beside = std::mem::replace(end, entry);
        if beside == 0 {
            *other = entry;
        }
        self.set_neighbour(entry, at_last, 0)?;
        self.set_neighbour(entry, !at_last, beside)?;
        if beside != 0 {
            self.set_neighbour(beside, at_last, entry)?;
        }
        Ok(())
    }
    fn unlink(&mut self, list: List, entry: u32) -> Result<()> {
        let [older, newer] = [self.neighbour(entry, false)?, self.neighbour(entry, true)?];
        match older {
            0 => self.ends(list)[0] = newer,
            _ => self.set_neighbour(older, true, newer)?,
        }
        match newer {
            0 => self.ends(list)[1] = older,
            _ => self.set_neighbour(newer, false, older)?,
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
