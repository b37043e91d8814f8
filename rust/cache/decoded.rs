//! Decoded values: whether what a process has decoded from the bytes of a key may still be used.
//!
//! The index holds no decoded values. Their cache asks for a [`Decode`] before it reads the bytes, keeps
//! it with what it has decoded, and asks [`Cache::is_current`] before each use. A write, delete, prefix
//! delete or clear, also of another participant, changes the version of the key when it begins and when
//! it ends. So a decode that began before the end of a write is never used after it.

use super::cache::{BATCH, Cache, Freshness};
use super::changes::slots_of;
use super::peers::Peers;
use crate::arena::{Arena, Cell, State};
use crate::error::Result;
use crate::key::ByteRange;
use crate::policy::Eviction;

/// What a decode has to remember of its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decode {
    /// Version of the key.
    pub version: u64,
    /// When the oldest bytes that it may read were fetched, in milliseconds; 0 where values expire and that
    /// is not known, which is always stale.
    pub fetched: u64,
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// A decode of this key begins. `None` while the key is being changed: no one could say later whether
    /// its result may be used. Without a date where values expire, and it is not known how old the bytes
    /// will be: they are on their way from the source, or are very many ranges.
    pub fn begin_decode(&mut self, key: &str, fresh: Freshness) -> Result<Option<Decode>> {
        self.changes.start();
        if self.is_changing(key) {
            return Ok(None);
        }
        let version = self.version_of_decoded(key);
        // 0 is no time, whatever the clock says; see `link_by_time`.
        let mut fetched = fresh.now.max(1);
        if fresh.max_age.is_some() {
            let undated = Some(Decode {
                version,
                fetched: 0,
            });
            if self.flights.has(key) {
                return Ok(undated);
            }
            let entries = self.live_entries(key, BATCH + 1)?;
            if entries.len() > BATCH {
                return Ok(undated);
            }
            for i in entries {
                // What is stale is not read.
                let time = self.arena.get(i)?.time();
                if !fresh.is_stale(time) {
                    fetched = fetched.min(time);
                }
            }
        }
        Ok(Some(Decode { version, fetched }))
    }

    /// Whether what was decoded may be used now; `landed` is when its decode had ended. If so, its bytes
    /// count as used: the full value, or, with `touch_ranges`, ranges of the key up to a batch.
    pub fn is_current(
        &mut self,
        key: &str,
        decode: Decode,
        landed: u64,
        fresh: Freshness,
        touch_ranges: bool,
    ) -> Result<bool> {
        if !self.is_unchanged(key, decode, fresh)? {
            return Ok(false);
        }
        self.read_planned(key, None);
        let full = self.arena.find(key, ByteRange::Full)?;
        let Some(i) = full.filter(|i| self.is_live(*i)) else {
            if touch_ranges {
                for i in self.live_entries(key, BATCH)? {
                    self.policy.touch(&mut self.arena, i)?;
                }
            }
            return Ok(true);
        };
        self.policy.touch(&mut self.arena, i)?;
        // Else the cache would serve other bytes, which were read since.
        Ok(self.arena.get(i)?.time() <= landed.max(1))
    }

    /// The same without a use of its bytes: whether it is worth its room.
    pub fn stays_current(
        &self,
        key: &str,
        decode: Decode,
        landed: u64,
        fresh: Freshness,
    ) -> Result<bool> {
        if !self.is_unchanged(key, decode, fresh)? {
            return Ok(false);
        }
        let full = self.arena.find(key, ByteRange::Full)?;
        Ok(match full.filter(|i| self.is_live(*i)) {
            Some(i) => self.arena.get(i)?.time() <= landed.max(1),
            None => true,
        })
    }

    /// Whether the key has not been changed since a decode began, nor the bytes have expired.
    fn is_unchanged(&self, key: &str, decode: Decode, fresh: Freshness) -> Result<bool> {
        // The cache would say that there is nothing.
        if self.absences() != 0 && self.arena.find_absence(key)?.is_some() {
            return Ok(false);
        }
        Ok(decode.version == self.version_of_decoded(key) && !fresh.is_stale(decode.fetched))
    }

    fn version_of_decoded(&self, key: &str) -> u64 {
        if S::EXCLUSIVE {
            let counts = slots_of(key).map(|slot| self.changes.get(slot));
            return u64::from(counts.fold(0, u32::wrapping_add));
        }
        let [version, epoch] = self.version_by_all(key);
        u64::from(epoch) << 32 | u64::from(version)
    }

    fn live_entries(&self, key: &str, limit: usize) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        found.extend(self.arena.find(key, ByteRange::Full)?);
        found.retain(|i| self.is_live(*i));
        if let Some(object) = self.arena.find_object(key)? {
            let is_live = |arena: &Arena<S>, i| Ok(is_live(arena.get(i)?));
            found.extend(self.arena.entries_below(object, limit, is_live)?);
        }
        Ok(found)
    }

    fn is_live(&self, i: u32) -> bool {
        self.arena.get(i).is_ok_and(is_live)
    }
}

fn is_live(cell: &Cell) -> bool {
    cell.is_entry() && cell.state() == State::Live
}
