//! A cache of keys without values, under one policy.

use super::entries::Entries;
use super::keys::{Keys, words_for};
use super::kind::{Policy, PolicyKind};
use super::parts::Parts;
use super::policy::{Eviction, Newcomer};
use crate::error::Result;
use crate::key::{ByteRange, Part, is_agreed};

/// Nodes that a simulation begins with.
const FIRST: usize = 64;

/// Says which requests a cache of this size would have served. It is the code of the real policies, over keys
/// of 33 to 66 bytes each.
#[derive(Debug)]
pub struct Simulation {
    policy: Policy,
    capacity: u64,
    slices_like_python: bool,
    nodes: usize,
    words: Vec<u64>,
    history: Vec<u64>,
    parts: Parts,
}

impl Simulation {
    /// An empty cache of so many bytes.
    #[must_use]
    pub fn new(policy: PolicyKind, capacity_bytes: u64) -> Self {
        Simulation {
            policy: Policy::of(policy),
            capacity: capacity_bytes,
            slices_like_python: false,
            nodes: FIRST,
            words: vec![0; words_for(FIRST)],
            history: Vec::new(),
            parts: Parts::default(),
        }
    }

    /// The same, of a source that slices as Python does, or one of which that is not known: see
    /// [`Asked`](crate::key::Asked).
    #[must_use]
    pub fn of_source(mut self, slices_like_python: bool) -> Self {
        self.slices_like_python = slices_like_python;
        self
    }

    /// Reads a key, given by a hash of 64 good bits, with a value of so many bytes. Whether it was there; if
    /// not, it comes in as far as the policy lets it.
    pub fn access(&mut self, key: u64, size: u64) -> bool {
        self.access_part(Part::of_whole(key), size, size)
    }

    /// Reads a value or a byte range of one, which has `len` bytes and takes `size`. The whole value serves
    /// its ranges, and a range others, as in an index; what is not served comes in as it was asked for.
    pub fn access_part(&mut self, part: Part, len: u64, size: u64) -> bool {
        // Only memory that is damaged gives an error, and this is no one else's.
        self.try_access(part, len, size).unwrap_or(false)
    }

    /// Reads what is too old to be served, if it is held: another value takes its place. Whether it was there.
    pub fn refresh_part(&mut self, part: Part, len: u64, size: u64) -> bool {
        self.try_refresh(part, len, size).unwrap_or(false)
    }

    /// A write drops a value and its ranges, and what is written comes in, if that is cached.
    pub fn write(&mut self, key: u64, written: Option<u64>) {
        // As above: there is no error.
        let _ = self.try_write(key, written);
    }

    fn try_access(&mut self, part: Part, len: u64, size: u64) -> Result<bool> {
        let Some(entry) = self.serving(&part, len)? else {
            self.fill(part, len, size, false)?;
            return Ok(false);
        };
        let mut keys = Keys::of(&mut self.words, self.nodes, &mut self.history)?;
        if keys.hash(entry)? == part.hash && keys.size(entry)? != size {
            // Another value is there by now.
            self.drop_key(part.hash)?;
            self.fill(part, len, size, false)?;
        } else {
            self.policy.touch(&mut keys, entry)?;
        }
        Ok(true)
    }

    fn try_refresh(&mut self, part: Part, len: u64, size: u64) -> Result<bool> {
        if !self.drop_key(part.hash)? {
            return self.try_access(part, len, size);
        }
        self.fill(part, len, size, true)?;
        Ok(true)
    }

    fn try_write(&mut self, key: u64, written: Option<u64>) -> Result<()> {
        self.drop_key(key)?;
        for range in self.parts.of_value(key) {
            self.drop_key(range)?;
        }
        match written {
            Some(size) => self.fill(Part::of_whole(key), size, size, false),
            None => Ok(()),
        }
    }

    /// The entry that serves a request.
    fn serving(&mut self, part: &Part, len: u64) -> Result<Option<u32>> {
        let keys = Keys::of(&mut self.words, self.nodes, &mut self.history)?;
        let is_range = part.range != ByteRange::Full;
        let mut found = None;
        if self.slices_like_python || is_agreed(part.range, len) {
            found = keys.find(part.whole)?;
        }
        if is_range && found.is_none() {
            found = match keys.find(part.hash)? {
                None => match self.parts.around(part) {
                    Some(other) => keys.find(other)?,
                    None => None,
                },
                own => own,
            };
        }
        Ok(found)
    }

    /// Drops an entry; whether it was there.
    fn drop_key(&mut self, key: u64) -> Result<bool> {
        let mut keys = Keys::of(&mut self.words, self.nodes, &mut self.history)?;
        let Some(entry) = keys.find(key)? else {
            return Ok(false);
        };
        self.policy.remove(&mut keys, entry)?;
        self.parts.remove(key);
        keys.free(entry)?;
        Ok(true)
    }

    /// A value or a range that is not held comes in, as far as the policy lets it.
    fn fill(&mut self, part: Part, len: u64, size: u64, is_admitted: bool) -> Result<()> {
        if size > self.capacity || self.capacity == 0 {
            return Ok(());
        }
        let key = part.hash;
        let mut keys = Keys::of(&mut self.words, self.nodes, &mut self.history)?;
        let wanted = keys.totals().1.saturating_add(size);
        let newcomer = Newcomer {
            hash: key,
            size,
            room: wanted.saturating_sub(self.capacity),
            is_alone: true,
        };
        if !has_room(&keys, size, self.capacity)
            && !is_admitted
            && !self.policy.admits(&mut keys, newcomer)?
        {
            return self.policy.turn_away(&mut keys, newcomer);
        }
        while !has_room(&keys, size, self.capacity) {
            let Some(victim) = self.policy.victim(&mut keys)? else {
                return Ok(());
            };
            self.policy.remove(&mut keys, victim)?;
            self.parts.remove(keys.hash(victim)?);
            keys.free(victim)?;
        }
        if keys.is_full() {
            self.grow()?;
            keys = Keys::of(&mut self.words, self.nodes, &mut self.history)?;
        }
        let entry = keys.make(key, size)?;
        self.policy.insert(&mut keys, entry)?;
        if part.range != ByteRange::Full {
            self.parts.insert(part, len);
        }
        Ok(())
    }

    /// Bytes that it holds.
    #[must_use]
    pub fn bytes(&mut self) -> u64 {
        let keys = Keys::of(&mut self.words, self.nodes, &mut self.history);
        keys.map_or(0, |keys| keys.totals().1)
    }

    fn grow(&mut self) -> Result<()> {
        let nodes = self.nodes * 2;
        let mut words = vec![0; words_for(nodes)];
        let mut none = Vec::new();
        let old = Keys::of(&mut self.words, self.nodes, &mut self.history)?;
        let mut new = Keys::of(&mut words, nodes, &mut none)?;
        old.copy_to(&mut new)?;
        (self.nodes, self.words) = (nodes, words);
        Ok(())
    }

    /// Recomputes everything; for tests.
    ///
    /// # Errors
    /// What is wrong.
    pub fn validate(&mut self) -> Result<()> {
        let keys = Keys::of(&mut self.words, self.nodes, &mut self.history)?;
        keys.validate()?;
        self.policy.validate(&keys)
    }
}

/// Whether a value may come in: a bound of so many bytes is one of so many entries as well, for those without
/// bytes are not free.
fn has_room(keys: &Keys<'_>, size: u64, capacity: u64) -> bool {
    let (entries, bytes) = keys.totals();
    let is_crowded = size == 0 && entries >= capacity;
    !is_crowded && bytes.saturating_add(size) <= capacity
}
