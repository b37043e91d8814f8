//! The entries of the keys of a plan, in the order in which they are needed.

use std::collections::{BTreeSet, HashMap};

use foldhash::fast::RandomState;

/// Entries by the next uses of their keys. A position is one of one key, so those that have the same are all of one key.
#[derive(Debug, Default)]
pub(super) struct PlannedEntries {
    /// The number of the key of each.
    numbers: HashMap<u32, u32, RandomState>,
    /// The next use of the key of each, and the entry.
    by_use: BTreeSet<(u32, u32)>,
}

impl PlannedEntries {
    /// The number of the key of an entry, where it is one of these.
    pub(super) fn number(&self, entry: u32) -> Option<u32> {
        self.numbers.get(&entry).copied()
    }

    /// Adds an entry of the key with this number, which is needed next at this position.
    pub(super) fn enter(&mut self, entry: u32, number: u32, next: u32) {
        self.numbers.insert(entry, number);
        self.by_use.insert((next, entry));
    }

    /// Takes out an entry of a key that is needed next at this position.
    pub(super) fn leave(&mut self, entry: u32, next: u32) {
        self.numbers.remove(&entry);
        self.by_use.remove(&(next, entry));
    }

    /// Takes out all of them.
    pub(super) fn leave_all(&mut self) {
        self.numbers.clear();
        self.by_use.clear();
    }

    /// Takes out all entries of the key that is needed next at this position.
    pub(super) fn leave_all_of(&mut self, next: u32) {
        while let Some(entry) = self.first_of(next) {
            self.leave(entry, next);
        }
    }

    /// The key that was needed next at one position is so at another one.
    pub(super) fn move_all(&mut self, from: u32, to: u32) {
        while let Some(entry) = self.first_of(from) {
            self.by_use.remove(&(from, entry));
            self.by_use.insert((to, entry));
        }
    }

    fn first_of(&self, next: u32) -> Option<u32> {
        let mut of_key = self.by_use.range((next, 0)..=(next, u32::MAX));
        of_key.next().map(|(_, entry)| *entry)
    }

    /// The first position at which one is needed.
    pub(super) fn nearest(&self) -> Option<u32> {
        self.by_use.first().map(|(next, _)| *next)
    }

    /// The position at which the last one is needed, and that one.
    pub(super) fn farthest(&self) -> Option<(u32, u32)> {
        self.by_use.last().copied()
    }

    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Bytes of memory, about.
    pub(super) fn memory(&self) -> usize {
        self.numbers.capacity() * (size_of::<(u32, u32)>() + 1)
            + self.by_use.len() * 2 * size_of::<(u32, u32)>()
    }

    /// Whether each is where the next use of its key says.
    pub(super) fn is_sound(&self, next_of: impl Fn(u32) -> u32) -> bool {
        let mut all = self.numbers.iter();
        self.numbers.len() == self.by_use.len()
            && all.all(|(entry, number)| self.by_use.contains(&(next_of(*number), *entry)))
    }
}
