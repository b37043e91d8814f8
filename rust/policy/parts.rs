//! The byte ranges that a simulated cache holds, and which of them serve others.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::key::{Part, within};

/// Of each value the widest of the ranges that are held, and the newest: of these alone an index knows
/// what they serve (`rust/cache/lookup.rs`). 0 for none.
type Hints = [u64; 2];

#[derive(Debug, Default)]
pub(super) struct Parts {
    /// What is held, and its bytes, by hash.
    held: HashMap<u64, (Part, u64), RandomState>,
    /// By the hash of the whole value.
    hints: HashMap<u64, Hints, RandomState>,
}

impl Parts {
    /// A range is held from now on.
    pub(super) fn insert(&mut self, part: Part, size: u64) {
        let [widest, newest] = self.hints.entry(part.whole).or_default();
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
        if let Some(hints) = self.hints.get_mut(&part.whole) {
            for hint in hints.iter_mut().filter(|hint| **hint == hash) {
                *hint = 0;
            }
            if *hints == [0, 0] {
                self.hints.remove(&part.whole);
            }
        }
    }

    /// The hash of another range that serves this one.
    pub(super) fn around(&self, part: &Part) -> Option<u64> {
        let hints = self.hints.get(&part.whole)?;
        let serves = |hint: &&u64| {
            let held = self.held.get(hint);
            held.is_some_and(|(held, size)| within(held.range, *size, part.range).is_some())
        };
        hints.iter().find(serves).copied()
    }
}
