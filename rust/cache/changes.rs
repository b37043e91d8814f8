//! Changes of the source, counted in slots: whatever else has the slot of what is changed counts as changed too.
//!
//! Keys and prefixes have slots of their own. So a write of a key can stand for one of another key, and never for a
//! change of everything below a prefix.

use crate::key;

/// Names a counter of changes: the same in every process, whatever the seed of its index.
pub type Slot = u16;

const KEYS: u64 = 16 * 1024;
const PREFIXES: u64 = 16 * 1024;

/// Counters of changes, those of keys first.
pub const SLOTS: usize = (KEYS + PREFIXES) as usize;

/// Where the writes of a key count.
pub(super) fn slot_of_key(key: &str) -> Slot {
    (hash(key) % KEYS) as Slot
}

/// Where the changes of everything at and below a prefix count.
pub(super) fn slot_of_prefix(prefix: &str) -> Slot {
    (KEYS + hash(prefix) % PREFIXES) as Slot
}

/// Where all changes of a key count.
pub(super) fn slots_of(key: &str) -> impl Iterator<Item = Slot> {
    let prefixes = key::and_above(key).map(slot_of_prefix);
    std::iter::once(slot_of_key(key)).chain(prefixes)
}

fn hash(name: &str) -> u64 {
    key::hash(name.as_bytes(), 0, 0)
}

/// The counters, in memory of one process, once it has begun to count.
#[derive(Debug, Default)]
pub(crate) struct Changes(Box<[u32]>);

impl Changes {
    /// Begins to count.
    pub(crate) fn start(&mut self) {
        if self.0.is_empty() {
            self.0 = vec![0; SLOTS].into_boxed_slice();
        }
    }

    /// Counts a change.
    pub(crate) fn count(&mut self, slot: Slot) {
        if let Some(count) = self.0.get_mut(usize::from(slot)) {
            *count = count.wrapping_add(1);
        }
    }

    /// How many there were, modulo 2^32.
    pub(crate) fn get(&self, slot: Slot) -> u32 {
        self.0.get(usize::from(slot)).copied().unwrap_or(0)
    }
}
