//! What a policy would have made of a series of requests.

use std::collections::{BTreeMap, HashMap};

/// The policies that can be simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// Least recently used.
    Lru,
    /// Nothing is evicted.
    None,
    /// Whichever suits the work.
    Adaptive,
}

/// A cache without values.
#[derive(Debug)]
pub struct Simulation {
    policy: PolicyKind,
    capacity: u64,
    used: u64,
    clock: u64,
    entries: HashMap<u64, (u64, u64)>,
    order: BTreeMap<u64, u64>,
}

impl Simulation {
    /// An empty cache of so many bytes.
    #[must_use]
    pub fn new(policy: PolicyKind, capacity_bytes: u64) -> Self {
        Simulation {
            policy,
            capacity: capacity_bytes,
            used: 0,
            clock: 0,
            entries: HashMap::new(),
            order: BTreeMap::new(),
        }
    }

    /// Requests a key whose value has this size; whether that is a hit. A miss brings it in.
    pub fn access(&mut self, key: u64, size: u64) -> bool {
        self.clock += 1;
        if let Some((at, _)) = self.entries.get_mut(&key) {
            self.order.remove(at);
            *at = self.clock;
            self.order.insert(self.clock, key);
            return true;
        }
        if size > self.capacity
            || self.policy == PolicyKind::None && self.used + size > self.capacity
        {
            return false;
        }
        while self.used + size > self.capacity
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.used -= self.entries.remove(&oldest).map_or(0, |(_, size)| size);
        }
        self.used += size;
        self.entries.insert(key, (self.clock, size));
        self.order.insert(self.clock, key);
        false
    }
}
