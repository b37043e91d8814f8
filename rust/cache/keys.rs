//! The keys of which something is cached, a batch at a time.

use super::cache::{BATCH, Cache, Freshness};
use super::lookup::can_serve;
use super::peers::Peers;
use crate::arena::{Kind, ROOT, State};
use crate::error::Result;
use crate::key::{ByteRange, is_below};
use crate::policy::Eviction;

/// Cells that one step looks at, so that no step holds the lock for long.
const LOOKED_AT: u32 = 4 * BATCH as u32;

/// Where a walk over all keys goes on: cells from the first number up to the second. An entry stays in
/// its cell, so a walk meets each key that stays, whatever else changes meanwhile.
pub type Cursor = (u32, u32);

/// An entry that can be served: its key, whether it is the full value, and its bytes.
pub type LiveEntry = (String, bool, u64);

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
        // The index may have been emptied meanwhile.
        let end = end.min(self.arena.header().cells_used);
        let stop = end.min(from.saturating_add(LOOKED_AT));
        let mut keys = Vec::new();
        let mut at = from.max(ROOT);
        while at < stop && keys.len() < BATCH {
            if matches!(self.arena.get(at)?.kind()?, Kind::Value | Kind::Object) {
                let key = self.arena.name(at)?.0;
                if is_below(&key, prefix) && self.stands_for(&key, at, fresh(&key))? {
                    keys.push(key);
                }
            }
            at += 1;
        }
        Ok((keys, (at < end).then_some((at, end))))
    }

    /// Entries that can be served, a batch: key, whether it is the full value, and bytes; and where to go on.
    pub fn next_live(&self, (from, end): Cursor) -> Result<(Vec<LiveEntry>, Option<Cursor>)> {
        let end = end.min(self.arena.header().cells_used);
        let stop = end.min(from.saturating_add(BATCH as u32));
        let mut found = Vec::new();
        for at in from.max(ROOT)..stop {
            let cell = self.arena.get(at)?;
            if cell.is_entry() && cell.state() == State::Live {
                let size = cell.size()?;
                let (key, range) = self.arena.name(at)?;
                found.push((key, range == ByteRange::Full, size));
            }
        }
        Ok((found, (stop < end).then_some((stop, end))))
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
