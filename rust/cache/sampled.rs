//! The requests that are sampled, for those who ask how large the cache should be.
//!
//! A request is about what it asks for, whatever has served it. What the source does not have is no request: one
//! that finds that out is taken back.

use super::cache::{Cache, Freshness};
use super::peers::Peers;
use crate::key::{self, Asked, ByteRange, Part};
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

    /// What a request asks for. In memory of one process its hashes are those of the index, which knows them
    /// already; those of a shared sample stay the same when the index is rebuilt.
    fn sampled_part(&mut self, key: &str, range: ByteRange) -> Option<Part> {
        if S::EXCLUSIVE {
            return Some(self.arena.part_of(key, range));
        }
        let seed = self.arena.storage.sample()?.seed();
        Some(sampling::part_of(key, range, seed))
    }

    /// Takes a request into the sample, if what it asks for is sampled: one that was served with `size` bytes,
    /// or, with `None`, one for the source.
    #[inline]
    pub fn sample(
        &mut self,
        key: &str,
        asked: impl Into<Asked>,
        size: Option<u64>,
        fresh: impl Into<Freshness>,
    ) {
        let asked = asked.into();
        let Some(part) = self.sampled_part(key, asked.range) else {
            return;
        };
        match size {
            Some(size) => self.sample_hit(&part, size),
            None if key::is_cacheable(key) => self.sample_miss(key, asked, &part, fresh.into()),
            None => {}
        }
    }

    /// Nothing but a comparison is done for a key that is not sampled.
    #[inline]
    pub(super) fn sample_hit(&mut self, part: &Part, size: u64) {
        self.sample_served(part, size, HIT);
    }

    #[inline]
    fn sample_served(&mut self, part: &Part, size: u64, flags: u16) {
        if let Some(sample) = self.sample_mut() {
            sample.count();
            if sample.has(part.hash) {
                sample.push(part, Some(size), flags);
            }
        }
    }

    fn sample_miss(&mut self, key: &str, asked: Asked, part: &Part, fresh: Freshness) {
        let is_sampled = self.sample_mut().is_some_and(|sample| {
            sample.count();
            sample.has(part.hash)
        });
        if is_sampled {
            self.push_miss(key, asked, part, fresh);
        }
    }

    #[cold]
    fn push_miss(&mut self, key: &str, asked: Asked, part: &Part, fresh: Freshness) {
        let any_age = Freshness {
            max_age: None,
            ..fresh
        };
        // It was missed, so what there is was too old; and nothing is kept of what is being changed.
        let is_outdated =
            self.is_changing(key) || matches!(self.peek(key, asked, any_age), Ok(Some(_)));
        let flags = if is_outdated { OUTDATED } else { 0 };
        if let Some(sample) = self.sample_mut() {
            sample.push(part, None, flags);
        }
    }

    /// Takes back the last request of this key and range that was no hit: it has brought nothing, or is
    /// looked up once more.
    pub fn retract_sampled(&mut self, key: &str, range: ByteRange) {
        self.retract_last(key, range, false);
    }

    /// The same, for the last one that was a hit, or none.
    fn retract_last(&mut self, key: &str, range: ByteRange, is_hit: bool) {
        if S::EXCLUSIVE && self.own_sample.is_none() || !key::is_cacheable(key) {
            return;
        }
        if let Some(part) = self.sampled_part(key, range)
            && let Some(sample) = self.sample_mut()
        {
            sample.retract(part.hash, is_hit);
        }
    }

    /// The last request of this key and range that was no hit was served with `size` bytes by what was read for
    /// others; it may be a hit after all.
    pub fn settle_sampled(&mut self, key: &str, range: ByteRange, size: u64, is_hit: bool) {
        if !key::is_cacheable(key) {
            return;
        }
        self.retract_sampled(key, range);
        let flags = match is_hit {
            true => HIT,
            false if self.is_changing(key) => OUTDATED,
            false => 0,
        };
        if let Some(part) = self.sampled_part(key, range) {
            self.sample_served(&part, size, flags);
        }
    }

    /// A request for the source that no lookup has sampled as one: the index did not answer it, or, where it
    /// `was_hit`, what the last one found could not be read.
    pub fn miss_sampled(&mut self, key: &str, range: ByteRange, was_hit: bool) {
        if !key::is_cacheable(key) {
            return;
        }
        if was_hit {
            self.retract_last(key, range, true);
        }
        if let Some(part) = self.sampled_part(key, range)
            && let Some(sample) = self.sample_mut()
        {
            sample.count();
            if sample.has(part.hash) {
                sample.push(&part, None, 0);
            }
        }
    }

    /// A value of this key is about to be cached, or would be.
    pub fn note_sampled_size(&mut self, key: &str, range: ByteRange, size: u64) {
        if S::EXCLUSIVE && self.own_sample.is_none() {
            return;
        }
        if let Some(part) = self.sampled_part(key, range)
            && let Some(sample) = self.sample_mut()
        {
            sample.note_size(&part, size);
        }
    }

    /// What was cached of this key was dropped.
    pub fn note_sampled_drop(&mut self, key: &str) {
        if S::EXCLUSIVE && self.own_sample.is_none() {
            return;
        }
        if let Some(part) = self.sampled_part(key, ByteRange::Full)
            && let Some(sample) = self.sample_mut()
        {
            sample.note_drop(&part);
        }
    }

    /// What a write of this key has written is about to be cached, or would be.
    pub fn note_sampled_fill(&mut self, key: &str, size: u64) {
        if key::is_cacheable(key)
            && let Some(part) = self.sampled_part(key, ByteRange::Full)
            && let Some(sample) = self.sample_mut()
        {
            sample.note_fill(&part, size);
        }
    }

    /// A copy of the sample; the bytes of a block, of which an entry takes whole ones; and those of folders or
    /// segments for each entry.
    #[must_use]
    pub fn sampled(&mut self) -> (Option<Box<Sample>>, [u64; 2]) {
        let header = self.arena.header();
        let beside = header.held_by_folders().checked_div(header.entries);
        let taken = [header.unit, beside.unwrap_or_default()];
        let sample = if S::EXCLUSIVE {
            self.own_sample.as_deref_mut()
        } else {
            self.arena.storage.checked_sample()
        };
        (sample.map(|sample| sample.copy()), taken)
    }
}
