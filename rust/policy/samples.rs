//! Sampled keys, and which of them each of some simulated caches holds.
//!
//! The simulations share the keys, so a request looks its key up once. All is in memory of a fixed size that is
//! not trusted: a wrong number in it is an error, and the learner begins anew.

use bytemuck::{Pod, Zeroable};

use super::entries::Entries;
use super::rule::{RULES, Ruled};
use super::simulated::{CORRUPT, Head, Key, Link, Simulated};
use super::table::Table;
use crate::arena::List;
use crate::error::Result;

/// Simulations, one for each rule.
pub(super) const COUNT: usize = RULES.len();
/// Keys that there is room for; number 0 is none.
const KEYS: usize = 8192;
const SLOTS: usize = 2 * KEYS;
/// Words of the ghosts of a simulation: 4,096 of them.
const GHOSTS: usize = 1024;

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
        let head = cast::<Head>(head)?.first_mut().ok_or(CORRUPT)?;
        if head.entries > KEYS as u64 {
            return Err(CORRUPT);
        }
        let simulated = Simulated {
            head,
            links: cast(links)?,
            ghosts,
            keys: &mut *self.keys,
        };
        Ok((
            Ruled {
                rule,
                renews: false,
                ghosts_at: 0,
            },
            simulated,
        ))
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
