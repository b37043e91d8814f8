//! The entries of the keys of a plan: those of about the same weight, in the order in which they are needed.

use std::collections::{BTreeSet, HashMap};

use foldhash::fast::RandomState;

use super::plan::MAX_PLANNED;

/// Classes of weight, which is the room that an entry takes for each part of what its miss costs: none, one, two or
/// three, four to seven and so on. The last one has all that is more.
const CLASSES: u32 = 32;

/// The class of an entry is kept above the number of its key.
const CLASS_AT: u32 = 20;
const NUMBER: u32 = (1 << CLASS_AT) - 1;
const _: () = assert!(MAX_PLANNED <= NUMBER as usize);

/// A set of classes, a bit for each: those that entries of one key are in, and perhaps more.
pub(super) type Classes = u32;

fn class_of(weight: u64) -> u32 {
    (u64::BITS - weight.leading_zeros()).min(CLASSES - 1)
}

fn each(classes: Classes) -> impl Iterator<Item = u32> {
    (0..CLASSES).filter(move |class| classes >> class & 1 != 0)
}

/// Entries by the next uses of their keys. A position is one of one key, so those that have the same are all of one key.
#[derive(Debug, Default)]
pub(super) struct PlannedEntries {
    /// The number of the key of each, and its class.
    numbers: HashMap<u32, u32, RandomState>,
    /// Of each class: the next use of the key of each, and the entry.
    by_use: [ByUse; CLASSES as usize],
    /// The classes that have any.
    filled: Classes,
}

type ByUse = BTreeSet<(u32, u32)>;

impl PlannedEntries {
    fn by_use(&mut self, class: u32) -> Option<&mut ByUse> {
        self.by_use.get_mut(class as usize)
    }

    /// The number of the key of an entry, where it is one of these.
    pub(super) fn number(&self, entry: u32) -> Option<u32> {
        self.numbers.get(&entry).map(|known| known & NUMBER)
    }

    /// Whether this is an entry of the key with this number, and has about this weight.
    pub(super) fn has(&self, entry: u32, number: u32, weight: u64) -> bool {
        self.numbers.get(&entry) == Some(&(class_of(weight) << CLASS_AT | number))
    }

    /// Adds an entry of the key with this number, which has this weight and is needed next at this position.
    /// Returns its class.
    pub(super) fn enter(&mut self, entry: u32, number: u32, weight: u64, next: u32) -> Classes {
        let class = class_of(weight);
        self.numbers.insert(entry, class << CLASS_AT | number);
        if let Some(by_use) = self.by_use(class) {
            by_use.insert((next, entry));
        }
        self.filled |= 1 << class;
        1 << class
    }

    /// Takes out an entry of a key that is needed next at this position.
    pub(super) fn leave(&mut self, entry: u32, next: u32) {
        let Some(known) = self.numbers.remove(&entry) else {
            return;
        };
        let class = known >> CLASS_AT;
        if let Some(by_use) = self.by_use(class) {
            by_use.remove(&(next, entry));
            if by_use.is_empty() {
                self.filled &= !(1 << class);
            }
        }
    }

    /// Takes out all of them.
    pub(super) fn leave_all(&mut self) {
        self.numbers.clear();
        self.by_use.iter_mut().for_each(ByUse::clear);
        self.filled = 0;
    }

    /// Takes out all entries of the key that is needed next at this position.
    pub(super) fn leave_all_of(&mut self, next: u32, classes: Classes) {
        for class in each(classes) {
            while let Some(entry) = self.first_of(class, next) {
                self.leave(entry, next);
            }
        }
    }

    /// The key that was needed next at one position is so at another one. Returns the classes that its entries are in.
    pub(super) fn move_all(&mut self, from: u32, to: u32, classes: Classes) -> Classes {
        let mut found = 0;
        for class in each(classes) {
            while let Some(entry) = self.first_of(class, from) {
                found |= 1 << class;
                if let Some(by_use) = self.by_use(class) {
                    by_use.remove(&(from, entry));
                    by_use.insert((to, entry));
                }
            }
        }
        found
    }

    /// The classes that have any, with or without that of those that take no room.
    pub(super) fn filled(&self, with_no_room: bool) -> impl Iterator<Item = u32> + use<> {
        each(self.filled & !u32::from(!with_no_room))
    }

    fn first_of(&self, class: u32, next: u32) -> Option<u32> {
        let by_use = self.by_use.get(class as usize)?;
        let mut of_key = by_use.range((next, 0)..=(next, u32::MAX));
        of_key.next().map(|(_, entry)| *entry)
    }

    /// The first position at which one is needed.
    pub(super) fn nearest(&self) -> Option<u32> {
        let first = self.by_use.iter().filter_map(ByUse::first);
        first.map(|(next, _)| *next).min()
    }

    /// Of a class the last position before this one at which an entry is needed, and that one.
    pub(super) fn last_of(&self, class: u32, before: (u32, u32)) -> Option<(u32, u32)> {
        let by_use = self.by_use.get(class as usize)?;
        by_use.range(..before).next_back().copied()
    }

    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Bytes of memory, about.
    pub(super) fn memory(&self) -> usize {
        self.numbers.capacity() * (size_of::<(u32, u32)>() + 1)
            + self.len() * 2 * size_of::<(u32, u32)>()
    }

    /// Whether each is where the next use of its key says, in one of the classes of that.
    pub(super) fn is_sound(&self, of_key: impl Fn(u32) -> (u32, Classes)) -> bool {
        let count: usize = self.by_use.iter().map(ByUse::len).sum();
        let mut all = self.numbers.iter();
        let filled = (0..CLASSES)
            .zip(&self.by_use)
            .filter(|(_, all)| !all.is_empty());
        count == self.numbers.len()
            && self.filled == filled.map(|(class, _)| 1 << class).sum::<Classes>()
            && all.all(|(entry, known)| {
                let (class, (next, classes)) = (known >> CLASS_AT, of_key(known & NUMBER));
                let by_use = self.by_use.get(class as usize);
                classes >> class & 1 != 0 && by_use.is_some_and(|all| all.contains(&(next, *entry)))
            })
    }
}
