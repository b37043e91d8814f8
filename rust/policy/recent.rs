//! When keys were read last that are in no plan, whether they are cached or not.

use std::collections::HashMap;
use std::hash::BuildHasher;

use foldhash::fast::RandomState;

/// Keys of a generation: as many as there are entries, within these bounds.
const FEW: u64 = 1024;
const MOST: u64 = 7 << 14;

/// First reads after which what is known of second ones counts half.
const HALVE_AFTER: u32 = 1024;

/// Of a key that was read once.
const UNKNOWN: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Reads {
    last: u32,
    /// From the one before, or [`UNKNOWN`].
    interval: u32,
}

/// The last reads of keys, by a clock of reads: those of the present generation and of the one before, so that what
/// was not read for that long is forgotten.
#[derive(Debug, Default)]
pub struct Recent {
    hasher: RandomState,
    present: HashMap<u64, Reads, RandomState>,
    before: HashMap<u64, Reads, RandomState>,
    now: u32,
    /// First reads, and second ones with the sum of their intervals.
    first: u32,
    second: u32,
    waited: u64,
}

impl Recent {
    /// Moves the clock on.
    pub fn pass(&mut self, reads: u32) {
        self.now = self.now.wrapping_add(reads);
    }

    /// A key is read, where there are so many entries. Several reads at one time are one.
    pub fn read(&mut self, key: &str, entries: u64) {
        let hash = self.hasher.hash_one(key);
        let reads = match self.known(hash) {
            Some(reads) if reads.last == self.now => return,
            Some(reads) => {
                let interval = self.now.wrapping_sub(reads.last);
                if reads.interval == UNKNOWN {
                    self.second += 1;
                    self.waited += u64::from(interval);
                }
                interval
            }
            None => {
                self.first += 1;
                UNKNOWN
            }
        };
        if self.first > HALVE_AFTER {
            (self.first, self.second) = (self.first / 2, self.second / 2);
            self.waited /= 2;
        }
        if self.present.len() as u64 >= entries.clamp(FEW, MOST) {
            self.before = std::mem::take(&mut self.present);
        }
        let reads = Reads {
            last: self.now,
            interval: reads,
        };
        self.present.insert(hash, reads);
    }

    fn known(&self, hash: u64) -> Option<Reads> {
        let found = self.present.get(&hash);
        found.or_else(|| self.before.get(&hash)).copied()
    }

    /// Reads since the last one of a key, if that is known.
    #[must_use]
    pub fn age(&self, key: &str) -> Option<u32> {
        let reads = self.known(self.hasher.hash_one(key))?;
        Some(self.now.wrapping_sub(reads.last))
    }

    /// The age of a key that is being read: before this read. One that is read for the first time is taken for one
    /// of those before it: for each that was read again they have waited so long.
    #[must_use]
    pub fn age_before(&self, key: &str) -> Option<u32> {
        let reads = self.known(self.hasher.hash_one(key));
        match reads.filter(|reads| reads.interval != UNKNOWN) {
            Some(reads) => {
                let age = self.now.wrapping_sub(reads.last);
                Some(age.saturating_add(reads.interval))
            }
            None => self.age_of_new(),
        }
    }

    fn age_of_new(&self) -> Option<u32> {
        let second = u64::from(self.second);
        let mean = self.waited.checked_div(second)?;
        let of_each = mean.saturating_mul(u64::from(self.first)) / second;
        u32::try_from(of_each).ok()
    }

    /// Bytes of memory, about.
    #[must_use]
    pub fn memory(&self) -> usize {
        let keys = self.present.capacity() + self.before.capacity();
        keys * (size_of::<(u64, Reads)>() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_is_that_of_the_last_read_and_before_it_of_the_one_before() {
        let mut recent = Recent::default();
        assert_eq!([recent.age("a"), recent.age_before("a")], [None, None]);
        recent.pass(10);
        recent.read("a", 0);
        recent.read("a", 0);
        assert_eq!([recent.age("a"), recent.age_before("a")], [Some(0), None]);
        recent.pass(5);
        assert_eq!(recent.age("a"), Some(5));
        recent.read("a", 0);
        assert_eq!(
            [recent.age("a"), recent.age_before("a")],
            [Some(0), Some(5)]
        );
        recent.pass(2);
        assert_eq!(
            [recent.age("a"), recent.age_before("a")],
            [Some(2), Some(7)]
        );
    }

    #[test]
    fn new_key_is_taken_for_one_of_those_before_it() {
        let mut recent = Recent::default();
        for key in 0..10 {
            recent.read(&key.to_string(), 0);
        }
        assert_eq!(recent.age_before("new"), None);
        recent.pass(6);
        for key in 0..5 {
            recent.read(&key.to_string(), 0);
        }
        // Half of them were read again, after six reads.
        assert_eq!(recent.age_before("new"), Some(12));
    }

    #[test]
    fn keys_that_were_not_read_for_long_are_forgotten() {
        let mut recent = Recent::default();
        for key in 0..10_000_u64 {
            recent.read("often", 0);
            recent.pass(1);
            recent.read(&key.to_string(), 0);
        }
        assert_eq!(recent.age("often"), Some(1));
        assert_eq!(recent.age("9999"), Some(0));
        assert_eq!(recent.age("1"), None);
        assert!(recent.memory() < 4 * FEW as usize * 17);
    }
}
