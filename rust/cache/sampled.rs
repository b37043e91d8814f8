//! The requests that are sampled, for those who ask how large the cache should be.
//!
//! A request is about the entry that serves it, or would: a range of a value that is cached as a whole is
//! one of the whole. What the source does not have is no request: one that finds that out is taken back.

use super::cache::{Cache, Freshness};
use super::peers::Peers;
use crate::arena::State;
use crate::key::{self, ByteRange};
use crate::policy::Eviction;
use crate::sampling::{self, HIT, OUTDATED, Sample};

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// The sample, which is begun with the first request.
    #[inline]
    fn sample_mut(&mut self) -> Option<&mut Sample> {
        if S::EXCLUSIVE {
            Some(self.own_sample.get_or_insert_with(|| Sample::new(0)))
        } else {
            self.arena.storage.sample()
        }
    }

    /// Hash of a request. In memory of one process it is that of the index, which knows it already; the
    /// one of a shared sample stays the same when the index is rebuilt.
    fn sampled_hash(&mut self, key: &str, range: ByteRange) -> Option<u64> {
        if S::EXCLUSIVE {
            return Some(self.arena.hash_of_name(key, range));
        }
        let seed = self.arena.storage.sample()?.seed();
        Some(sampling::hash(key, range, seed))
    }

    /// Takes a request into the sample, if its key is sampled: one that an entry of `size` bytes has
    /// served, or, with `None`, one for the source.
    #[inline]
    pub fn sample(
        &mut self,
        key: &str,
        range: ByteRange,
        size: Option<u64>,
        fresh: impl Into<Freshness>,
    ) {
        let Some(hash) = self.sampled_hash(key, range) else {
            return;
        };
        match size {
            Some(size) => self.sample_hit(hash, size),
            None if key::is_cacheable(key) => self.sample_miss(key, range, hash, fresh.into()),
            None => {}
        }
    }

    /// Nothing but a comparison is done for a key that is not sampled.
    #[inline]
    pub(super) fn sample_hit(&mut self, hash: u64, size: u64) {
        self.sample_served(hash, size, HIT);
    }

    #[inline]
    fn sample_served(&mut self, hash: u64, size: u64, flags: u16) {
        if let Some(sample) = self.sample_mut() {
            sample.count();
            if sample.has(hash) {
                sample.push(hash, Some(size), flags);
            }
        }
    }

    fn sample_miss(&mut self, key: &str, range: ByteRange, hash: u64, fresh: Freshness) {
        let is_sampled = self.sample_mut().is_some_and(|sample| {
            sample.count();
            sample.has(hash)
        });
        if is_sampled {
            self.push_miss(key, range, hash, fresh);
        }
    }

    #[cold]
    fn push_miss(&mut self, key: &str, range: ByteRange, hash: u64, fresh: Freshness) {
        let is_outdated = |i| {
            let cell = self.arena.get(i).ok()?;
            let is_live = cell.is_entry() && cell.state() == State::Live;
            Some(is_live && fresh.is_stale(cell.time()))
        };
        let found = self.arena.find(key, range).ok().flatten();
        let flags = match found.and_then(is_outdated) {
            Some(true) => OUTDATED,
            _ => 0,
        };
        if let Some(sample) = self.sample_mut() {
            sample.push(hash, None, flags);
        }
    }

    /// Takes back the last request of this key and range that was no hit: the source has no such
    /// key, or it is looked up once more.
    pub fn retract_sampled(&mut self, key: &str, range: ByteRange) {
        self.retract_last(key, range, false);
    }

    fn retract_last(&mut self, key: &str, range: ByteRange, is_hit: bool) {
        if S::EXCLUSIVE && self.own_sample.is_none() || !key::is_cacheable(key) {
            return;
        }
        if let Some(hash) = self.sampled_hash(key, range)
            && let Some(sample) = self.sample_mut()
        {
            sample.retract(hash, is_hit);
        }
    }

    /// The last request of this key and range that was no hit is one of another entry, or a hit after all: what was
    /// read for others has served it, an entry of `size` bytes.
    pub fn settle_sampled(
        &mut self,
        key: &str,
        range: ByteRange,
        entry: ByteRange,
        size: u64,
        is_hit: bool,
    ) {
        if !key::is_cacheable(key) {
            return;
        }
        self.retract_sampled(key, range);
        if let Some(hash) = self.sampled_hash(key, entry) {
            self.sample_served(hash, size, if is_hit { HIT } else { 0 });
        }
    }

    /// The last request of this key that the entry of this range has served was none: that could not be read, so
    /// it is one of `range` for the source.
    pub fn miss_sampled(&mut self, key: &str, range: ByteRange, entry: ByteRange) {
        self.retract_last(key, entry, true);
        self.sample(key, range, None, 0);
    }

    /// A value of this key is about to be cached, or would be.
    pub fn note_sampled_size(&mut self, key: &str, range: ByteRange, size: u64) {
        if S::EXCLUSIVE && self.own_sample.is_none() {
            return;
        }
        if let Some(hash) = self.sampled_hash(key, range)
            && let Some(sample) = self.sample_mut()
        {
            sample.note_size(hash, size);
        }
    }

    /// A copy of the sample, and the bytes of a block, of which an entry takes whole ones.
    #[must_use]
    pub fn sampled(&mut self) -> (Option<Box<Sample>>, u64) {
        let unit = self.arena.header().unit;
        let sample = if S::EXCLUSIVE {
            self.own_sample.as_deref_mut()
        } else {
            self.arena.storage.checked_sample()
        };
        (sample.map(|sample| sample.copy()), unit)
    }
}
