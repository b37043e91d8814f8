//! What is cached: entries, and the keys of which there are some.

use super::cache::{BATCH, Cache, Freshness};
use super::lookup::can_serve;
use super::peers::Peers;
use crate::arena::{Arena, Kind, LOOKED_AT, ROOT, State};
use crate::error::Result;
use crate::key::{self, ByteRange, is_below};
use crate::policy::Eviction;

/// Where a walk over all keys goes on: cells from the first number up to the second. An entry stays in
/// its cell, so a walk meets each key that stays, whatever else changes meanwhile.
pub type Cursor = (u32, u32);

/// Where a drain goes on: in a walk, and the seed of the index that it is over. In another one it begins anew.
pub type Rest = (Cursor, u64);

/// Where a drain begins; see [`Cache::drain_prefix`].
pub const START: Rest = ((0, 0), 0);

/// An entry as the index lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Of the value.
    pub key: String,
    /// What it holds.
    pub range: ByteRange,
    /// Bytes of it.
    pub size: u64,
    /// Only a live one can be served.
    pub state: State,
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Bytes of all entries that can be served.
    #[must_use]
    pub fn live_bytes(&self) -> u64 {
        self.arena.header().live_bytes
    }

    /// Whether there is an entry of this name, of whatever state.
    pub fn is_listed(&self, cache_key: &str) -> Result<bool> {
        let Some((key, range)) = ByteRange::parse(cache_key) else {
            return Ok(false);
        };
        Ok(self.arena.find(key, range)?.is_some())
    }

    /// Entries in every state with their bytes, for tests and tools.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let all = self
            .arena
            .entries_below(ROOT, usize::MAX, |_, _| Ok(true))?;
        let mut entries = Vec::with_capacity(all.len());
        for i in all {
            entries.push(self.entry(i)?);
        }
        Ok(entries)
    }

    fn entry(&self, i: u32) -> Result<Entry> {
        let (key, range) = self.arena.name(i)?;
        let cell = self.arena.get(i)?;
        Ok(Entry {
            key,
            range,
            size: cell.size()?,
            state: cell.state(),
        })
    }

    /// Keys and ranges in the order of the eviction policy, next victim first.
    pub fn recency(&self) -> Result<Vec<(String, ByteRange)>> {
        let order = self.policy.order(&self.arena)?;
        order.into_iter().map(|i| self.arena.name(i)).collect()
    }

    /// The beginning of a walk over what is cached now.
    #[must_use]
    pub fn first_keys(&self) -> Cursor {
        (ROOT, self.arena.header().cells_used)
    }

    /// Keys at or below a prefix ("" is everything) of which some entry can be served, each once, and
    /// where to go on; `None` at the end. `fresh` gives what may be served of a key.
    pub fn next_keys(
        &self,
        prefix: &str,
        (from, end): Cursor,
        fresh: impl Fn(&str) -> Freshness,
    ) -> Result<(Vec<String>, Option<Cursor>)> {
        let prefix = prefix.trim_end_matches('/');
        let mut keys = Vec::new();
        if from == ROOT
            && let Some(few) = self.few_below(prefix)?
        {
            for at in few {
                keys.extend(self.key_at(at, prefix, &fresh)?);
            }
            return Ok((keys, None));
        }
        // The index may have been emptied meanwhile.
        let end = end.min(self.arena.header().cells_used);
        let stop = end.min(from.saturating_add(LOOKED_AT));
        let mut at = from.max(ROOT);
        while at < stop && keys.len() < BATCH {
            keys.extend(self.key_at(at, prefix, &fresh)?);
            at += 1;
        }
        Ok((keys, (at < end).then_some((at, end))))
    }

    /// The key that a cell stands for, if it is at or below a prefix and can be served.
    fn key_at(
        &self,
        at: u32,
        prefix: &str,
        fresh: impl Fn(&str) -> Freshness,
    ) -> Result<Option<String>> {
        if !matches!(self.arena.get(at)?.kind()?, Kind::Value | Kind::Object) {
            return Ok(None);
        }
        let key = self.arena.name(at)?.0;
        let is_key = is_below(&key, prefix) && self.stands_for(&key, at, fresh(&key))?;
        Ok(is_key.then_some(key))
    }

    /// Cells among which are those of all keys at or below a prefix, if one step can look at them all.
    fn few_below(&self, prefix: &str) -> Result<Option<Vec<u32>>> {
        let mut cells = Vec::new();
        // And whether keys in the directories below belong to it.
        let mut dirs = Vec::new();
        if prefix.is_empty() {
            dirs.push((ROOT, true));
        } else {
            cells.extend(self.arena.find(prefix, ByteRange::Full)?);
            cells.extend(self.arena.find_object(prefix)?);
            let dir = self.arena.find_dir(&format!("{prefix}/"))?;
            dirs.extend(dir.map(|dir| (dir, true)));
            for above in key::above_tails_below(prefix) {
                dirs.extend(self.arena.find_dir(&above)?.map(|dir| (dir, false)));
            }
        }
        let mut steps = 0;
        while let Some((dir, is_below)) = dirs.pop() {
            let [mut at, _] = self.arena.get(dir)?.children(false);
            while at != 0 {
                if steps == BATCH {
                    return Ok(None);
                }
                steps += 1;
                let cell = self.arena.get(at)?;
                match cell.kind()? {
                    Kind::Dir if is_below => dirs.push((at, true)),
                    Kind::Value | Kind::Object => cells.push(at),
                    _ => {}
                }
                at = cell.right;
            }
        }
        cells.sort_unstable();
        cells.dedup();
        Ok(Some(cells))
    }

    /// Entries that can be served, a batch; and where to go on.
    pub fn next_live(&self, (from, end): Cursor) -> Result<(Vec<Entry>, Option<Cursor>)> {
        let end = end.min(self.arena.header().cells_used);
        let stop = end.min(from.saturating_add(BATCH as u32));
        let mut found = Vec::new();
        for at in from.max(ROOT)..stop {
            let cell = self.arena.get(at)?;
            if cell.is_entry() && cell.state() == State::Live {
                found.push(self.entry(at)?);
            }
        }
        Ok((found, (stop < end).then_some((stop, end))))
    }

    /// The walk that a drain goes on with; `None` where it begins.
    pub(super) fn walk_of(&self, (cursor, seed): Rest) -> Option<Cursor> {
        (cursor != START.0 && seed == self.arena.header().seed).then_some(cursor)
    }

    /// Where a drain begins to walk over all keys.
    pub(super) fn walk(&self) -> Rest {
        (self.first_keys(), self.arena.header().seed)
    }

    /// Cells that are wanted of those that a prefix cuts off of a directory of many, a batch; and where to go on.
    pub(super) fn next_cut_off(
        &self,
        prefix: &str,
        (from, end): Cursor,
        of_absences: bool,
        is_wanted: impl Fn(&Arena<S>, u32) -> Result<bool>,
    ) -> Result<(Vec<u32>, Option<Rest>)> {
        let mut found = Vec::new();
        if self.finds_by_index_alone() {
            self.arena.check_cut_by(prefix)?;
        }
        let cut = self.arena.cut_by(prefix, of_absences)?;
        if cut.is_empty() {
            return Ok((found, None));
        }
        let end = end.min(self.arena.header().cells_used);
        let stop = end.min(from.saturating_add(LOOKED_AT));
        let mut at = from.max(ROOT);
        while at < stop && found.len() < BATCH {
            if is_wanted(&self.arena, at)? && self.arena.is_cut_off(at, &cut)? {
                found.push(at);
            }
            at += 1;
        }
        let seed = self.arena.header().seed;
        Ok((found, (at < end).then_some(((at, end), seed))))
    }

    /// Whether a cell stands for its key: that of the full value, or else that of the ranges.
    fn stands_for(&self, key: &str, i: u32, fresh: Freshness) -> Result<bool> {
        let cell = self.arena.get(i)?;
        if cell.kind()? == Kind::Value {
            return Ok(can_serve(cell, fresh));
        }
        if let Some(value) = self.arena.find(key, ByteRange::Full)?
            && can_serve(self.arena.get(value)?, fresh)
        {
            return Ok(false);
        }
        let found = self
            .arena
            .entries_below(i, 1, |arena, range| Ok(can_serve(arena.get(range)?, fresh)))?;
        Ok(!found.is_empty())
    }
}
