//! The byte ranges that a simulated cache holds, and which of them serve others.

use std::collections::{HashMap, HashSet};

use foldhash::fast::RandomState;

use crate::key::{Part, within};

/// The ranges of one value that are held.
#[derive(Debug, Default)]
struct OfValue {
    all: HashSet<u64, RandomState>,
    /// The widest of them, and the newest: of these alone an index knows what they serve
    /// (`rust/cache/lookup.rs`). 0 for none.
    hints: [u64; 2],
}

#[derive(Debug, Default)]
pub(super) struct Parts {
    /// What is held, and its bytes, by hash.
    held: HashMap<u64, (Part, u64), RandomState>,
    /// By the hash of the whole value.
    values: HashMap<u64, OfValue, RandomState>,
}

impl Parts {
    /// A range is held from now on.
    pub(super) fn insert(&mut self, part: Part, size: u64) {
        let of_value = self.values.entry(part.whole).or_default();
        of_value.all.insert(part.hash);
        let [widest, newest] = &mut of_value.hints;
        if self.held.get(widest).is_none_or(|(_, held)| *held < size) {
            *widest = part.hash;
        }
        *newest = part.hash;
        self.held.insert(part.hash, (part, size));
    }

    /// It is held no more; of no effect for a whole value.
    pub(super) fn remove(&mut self, hash: u64) {
        let Some((part, _)) = self.held.remove(&hash) else {
            return;
        };
        if let Some(of_value) = self.values.get_mut(&part.whole) {
            for hint in of_value.hints.iter_mut().filter(|hint| **hint == hash) {
                *hint = 0;
            }
            of_value.all.remove(&hash);
            if of_value.all.is_empty() {
                self.values.remove(&part.whole);
            }
        }
    }

    /// The hashes of all ranges of a value, in their order.
    pub(super) fn of_value(&self, whole: u64) -> Vec<u64> {
        let all = self.values.get(&whole).into_iter().flat_map(|v| &v.all);
        let mut hashes: Vec<u64> = all.copied().collect();
        hashes.sort_unstable();
        hashes
    }

    /// The hash of another range that serves this one.
    pub(super) fn around(&self, part: &Part) -> Option<u64> {
        let hints = &self.values.get(&part.whole)?.hints;
        let serves = |hint: &&u64| {
            let held = self.held.get(hint);
            held.is_some_and(|(held, size)| within(held.range, *size, part.range).is_some())
        };
        hints.iter().find(serves).copied()
    }
}
