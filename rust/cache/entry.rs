//! Entries: their states, and the counters of their bytes.
//!
//! ```text
//!            granted            committed
//!   (none) ───────────▶ Filling ─────────▶ Live ─────┐ evicted, expired,
//!                          │ aborted,                │ overwritten, damaged
//!                          ▼ invalidated             ▼
//!   (none) ◀─────────── Deleting ◀───────────────────┘
//!            deleted       │ ▲
//!                   failed ▼ │ retried
//!                      DeleteFailed
//! ```
//!
//! `used_bytes` counts an entry in every state, because until its delete has returned its bytes may
//! still be there. It changes in [`Cache::begin_writing`] and [`Cache::release`] only;
//! `live_bytes` changes in [`Cache::make_live`] and [`Cache::begin_delete`] only.

use super::cache::Cache;
use super::peers::Peers;
use crate::arena::{End, Kind, List, OVERFLOW, State, TOO_LARGE};
use crate::error::{Error, Result};
use crate::key::ByteRange;
use crate::policy::Eviction;

const UNDERFLOW: Error = Error::Corrupt("counter underflow");

/// Milliseconds that a clock may seem to run backwards without having been set: threads read it
/// before they wait for the lock, so the readings arrive out of order. An entry from such a future
/// was fetched just now.
pub(super) const SKEW: u64 = 1000;

/// Entries that one step passes to find the position of an older one, so that no step holds the
/// lock for long.
const SEARCH: u32 = 1024;

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Makes an entry for bytes that are about to be written; `None` where there is one.
    pub(super) fn begin_writing(
        &mut self,
        key: &str,
        range: ByteRange,
        size: u64,
    ) -> Result<Option<u32>> {
        if size >= TOO_LARGE {
            return Err(Error::Full);
        }
        let header = self.arena.header();
        let used = header.used_bytes.checked_add(header.cost(size));
        let used = used.ok_or(Error::Full)?;
        let Some(i) = self.arena.insert(key, range)? else {
            return Ok(None);
        };
        let cell = self.arena.get_mut(i)?;
        cell.begin(size, State::Filling);
        self.link_in_progress(i)?;
        let header = self.arena.header_mut();
        header.used_bytes = used;
        header.entries = header.entries.checked_add(1).ok_or(OVERFLOW)?;
        let cost = header.cost(size);
        self.change_writing(|bytes| bytes.saturating_add(cost));
        Ok(Some(i))
    }

    /// The bytes of a `Filling` entry are complete and valid. Its age counts from `fetched`, which
    /// may be before `now`.
    pub(super) fn make_live(
        &mut self,
        i: u32,
        checksum: Option<u32>,
        fetched: u64,
        now: u64,
    ) -> Result<()> {
        self.arena.unlink(List::InProgress, i)?;
        let cell = self.arena.get_mut(i)?;
        cell.set_checksum(checksum);
        cell.set_state(State::Live)?;
        let (size, parent, kind) = (cell.size()?, cell.parent, cell.kind()?);
        let cost = self.arena.header().cost(size);
        self.change_writing(|bytes| bytes.saturating_sub(cost));
        let source = self.arena.source_of(i)?;
        self.undate_future(source, now)?;
        self.link_by_time(source, i, fetched.min(now))?;
        let header = self.arena.header_mut();
        header.live_bytes = header.live_bytes.checked_add(size).ok_or(OVERFLOW)?;
        header.live_entries = header.live_entries.checked_add(1).ok_or(OVERFLOW)?;
        // By what there is with it, as in a simulation.
        self.policy.insert(&mut self.arena, i)?;
        if kind != Kind::Value {
            let widest = self.arena.get(parent)?.earlier;
            let wider = widest == 0 || self.arena.get(widest)?.size()? < size;
            let object = self.arena.get_mut(parent)?;
            object.later = i;
            if wider {
                object.earlier = i;
            }
        }
        self.enter_plan(i)
    }

    /// Links an entry of a source by its fetch time. The time of one that was fetched before more than [`SEARCH`]
    /// others is dropped, so it counts as stale.
    pub(super) fn link_by_time(&mut self, source: u32, i: u32, fetched: u64) -> Result<()> {
        let fetched = fetched.max(1);
        let first = self.arena.earliest(source)?;
        let mut before = self.arena.latest(source)?;
        for _ in 0..SEARCH {
            let time = match before {
                0 => 0,
                _ => self.arena.get(before)?.time(),
            };
            if time > fetched {
                before = match before {
                    passed if passed == first => 0,
                    passed => self.arena.get(passed)?.earlier,
                };
                continue;
            }
            let cell = self.arena.get_mut(i)?;
            cell.set_time(fetched);
            // Unknown times are at the front, those that do not fit into a cell included.
            return match (before, cell.time()) {
                (0, _) | (_, 0) => self.arena.link_earliest(source, i),
                _ => self.arena.link_later(i, before),
            };
        }
        self.arena.get_mut(i)?.set_time(0);
        self.arena.link_earliest(source, i)
    }

    /// After the clock was set back, the age of entries of a source that were fetched "later" than now is
    /// unknown: they move to the front of its ring with time 0, which is stale under any maximum
    /// age. Each moves once, so a step costs no more than the entries that it concerns.
    pub(super) fn undate_future(&mut self, source: u32, now: u64) -> Result<()> {
        loop {
            let latest = self.arena.latest(source)?;
            if latest == 0 || self.arena.get(latest)?.time() <= now.saturating_add(SKEW) {
                return Ok(());
            }
            self.undate_of(source, latest)?;
        }
    }

    /// Marks the fetch time of a `Live` entry as unknown.
    pub(super) fn undate(&mut self, i: u32) -> Result<()> {
        let source = self.arena.source_of(i)?;
        self.undate_of(source, i)
    }

    fn undate_of(&mut self, source: u32, i: u32) -> Result<()> {
        self.arena.unlink_by_age(source, i)?;
        self.arena.get_mut(i)?.set_time(0);
        self.arena.link_earliest(source, i)
    }

    /// Notes that this participant is writing or deleting the bytes of an entry.
    fn link_in_progress(&mut self, i: u32) -> Result<()> {
        let owner = self.arena.storage.own_slot() as u32 + 1;
        self.arena.link(List::InProgress, i, End::Last)?;
        self.arena.get_mut(i)?.earlier = owner;
        Ok(())
    }

    /// A `Live` entry is no longer valid; the caller deletes its bytes. Returns their number.
    pub(super) fn begin_delete(&mut self, i: u32) -> Result<u64> {
        self.policy.remove(&mut self.arena, i)?;
        self.leave_plan(i);
        let source = self.arena.source_of(i)?;
        self.arena.unlink_by_age(source, i)?;
        let cell = self.arena.get_mut(i)?;
        cell.set_state(State::Deleting)?;
        let (size, parent, kind) = (cell.size()?, cell.parent, cell.kind()?);
        self.link_in_progress(i)?;
        if kind != Kind::Value {
            // The hints of an object name live children only.
            self.arena.get_mut(parent)?.forget_hint(i);
        }
        let header = self.arena.header_mut();
        header.live_bytes = header.live_bytes.checked_sub(size).ok_or(UNDERFLOW)?;
        header.live_entries = header.live_entries.checked_sub(1).ok_or(UNDERFLOW)?;
        Ok(size)
    }

    /// A failed delete is tried once more. Returns the number of its bytes.
    pub(super) fn retry_delete(&mut self, i: u32) -> Result<u64> {
        self.arena.unlink(List::DeleteFailed, i)?;
        let cell = self.arena.get_mut(i)?;
        cell.set_state(State::Deleting)?;
        let size = cell.size()?;
        self.link_in_progress(i)?;
        Ok(size)
    }

    /// The bytes of an entry in progress could not be deleted.
    pub(super) fn delete_failed(&mut self, i: u32) -> Result<()> {
        let own = self.arena.storage.own_slot() as u32 + 1;
        let cell = self.arena.get(i)?;
        if cell.state() == State::Filling && cell.earlier == own {
            let cost = self.arena.header().cost(cell.size()?);
            self.change_writing(|bytes| bytes.saturating_sub(cost));
        }
        self.arena.unlink(List::InProgress, i)?;
        self.arena.get_mut(i)?.set_state(State::DeleteFailed)?;
        self.arena.link(List::DeleteFailed, i, End::Last)
    }

    /// The bytes of a `Deleting` entry are gone.
    pub(super) fn release(&mut self, i: u32) -> Result<()> {
        let size = self.arena.get(i)?.size()?;
        self.arena.unlink(List::InProgress, i)?;
        self.unplace(i)?;
        self.arena.remove(i)?;
        let header = self.arena.header_mut();
        let cost = header.cost(size);
        header.used_bytes = header.used_bytes.checked_sub(cost).ok_or(UNDERFLOW)?;
        header.entries = header.entries.checked_sub(1).ok_or(UNDERFLOW)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Heap;
    use crate::cache::{Joined, Limits, Reserve};
    use crate::policy::{Minimise, Policy, PolicyKind, Simulation};

    type Memory = Cache<Heap, (), Policy>;

    /// Numbers that look random, the same each time.
    fn next(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    /// Reads a value, and fills it where it was not there, as far as there is room. Whether it was there.
    fn read(cache: &mut Memory, key: &str, size: u64) -> bool {
        if cache.lookup(key, ByteRange::Full, 1).unwrap().is_some() {
            return true;
        }
        let joined = cache.join(key, ByteRange::Full, (), 1, false).unwrap();
        let Joined::Lead(ticket) = joined else {
            panic!("{joined:?}");
        };
        let mut answer = cache.reserve(key, ByteRange::Full, size, ticket, 1);
        while let Ok(Reserve::NeedsEviction(id, _)) = answer {
            answer = cache.all_evicted(id, 1);
        }
        match answer.unwrap() {
            Reserve::Granted(id) => drop(cache.commit(id, None, 1).unwrap()),
            _ => drop(cache.complete_flight(key, ticket)),
        }
        false
    }

    #[test]
    fn cache_of_any_policy_serves_what_its_simulation_does() {
        let mut state = 0x5EED;
        for (keys, percent) in [(30, 50), (200, 10), (200, 90), (1000, 30)] {
            let sizes: Vec<u64> = (0..keys).map(|_| 1 << (next(&mut state) % 9)).collect();
            let capacity = sizes.iter().sum::<u64>() * percent / 100;
            for kind in PolicyKind::ALL {
                let limits = Limits::bounded(capacity);
                let mut cache = Memory::new(Heap::default(), limits, 1).unwrap();
                cache.set_policy(kind, Minimise::Requests);
                let mut simulation = Simulation::new(kind, capacity);
                for n in 0..12 * keys {
                    // Epochs of draws: some keys twice, some not at all.
                    let at = (next(&mut state) % keys) as usize;
                    let (key, size) = (format!("c/{at}"), sizes[at]);
                    let hash = cache.arena.hash_of_name(&key, ByteRange::Full);
                    let served = read(&mut cache, &key, size);
                    assert_eq!(served, simulation.access(hash, size), "{kind:?} {keys} {n}");
                }
                cache.validate().unwrap();
            }
        }
    }
}
