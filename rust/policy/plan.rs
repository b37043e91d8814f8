//! What will be read, in its order, as the program has said.
//!
//! What is needed last goes first, as Belady's optimal replacement has it ("A study of replacement algorithms
//! for a virtual-storage computer", 1966). A plan is a hint of one process, in its memory.

use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasher;

use foldhash::fast::RandomState;

use super::progress::{Course, Progress};

/// Keys of a plan at most.
pub const MAX_PLANNED: usize = 1_000_000;

/// The position of no use: later than all others.
pub const NEVER: u32 = u32::MAX;

/// Reads until a key is needed.
pub type Distance = i64;

/// What stands for the next use of a key of which the last one was at this position: later than all uses, the more so
/// the longer ago that was.
fn over(last: u32) -> u32 {
    NEVER - 1 - last
}

/// Whether this is the position of a use.
fn is_use(next: u32) -> bool {
    (next as usize) < MAX_PLANNED
}

/// The window is this part of all keys, and at most so many positions. A few are allowed to small plans.
const WINDOW_PART: usize = 16;
const WINDOW_MOST: usize = 4096;
const WINDOW_FEW: usize = 32;
const WINDOW_FEW_PART: usize = 4;

/// A plan is wrong if more than two thirds of the reads are elsewhere: each of them counts one, each other takes
/// two back, and so many are too many: an eighth of all keys, within these bounds.
const RIGHT: usize = 2;
const WRONG_PART: usize = 8;
const WRONG_FEW: usize = 32;
const WRONG_MOST: usize = 1024;

/// The uses of one key.
#[derive(Clone, Copy, Debug)]
struct Uses {
    /// Position of the next one, or what stands for it; see [`over`].
    next: u32,
    /// Position of the last one that was read, or [`NEVER`]. While the plan is made: the last one so far.
    last: u32,
}

/// The keys that will be read, and those entries that they have.
///
/// A read of a key with a next use that is not before the window behind the position of the plan, and not after the
/// one ahead of it, takes place there: threads overtake each other, and loaders leave out what others read. Uses
/// that the window has left behind are not waited for.
#[derive(Debug, Default)]
pub struct Plan {
    hasher: RandomState,
    /// What its keys begin with in the index, which is left out here. Other keys are not its business.
    folder: Box<str>,
    /// Number of each key, by its hash.
    numbers: HashMap<u64, u32, RandomState>,
    uses: Vec<Uses>,
    /// Number of the key at each position.
    order: Vec<u32>,
    /// Position of the next use of the key at each position, or [`NEVER`].
    following: Vec<u32>,
    /// The position after the last one that was read.
    at: u32,
    /// All uses before this position are over.
    tail: u32,
    wrong: usize,
    /// Reads of other keys after the end.
    after: usize,
    /// Entries of its keys, and the numbers of these.
    entries: HashMap<u32, u32, RandomState>,
    /// The same by their next use.
    by_use: BTreeSet<(u32, u32)>,
    progress: Progress,
}

impl Plan {
    /// Adds a key; false if there are as many as there may be.
    pub fn push(&mut self, key: &str) -> bool {
        if self.is_full() {
            return false;
        }
        let hash = self.hash(key);
        let (position, new) = (self.order.len() as u32, self.uses.len() as u32);
        let number = *self.numbers.entry(hash).or_insert(new);
        match self.uses.get_mut(number as usize) {
            Some(uses) => {
                if let Some(following) = self.following.get_mut(uses.last as usize) {
                    *following = position;
                }
                uses.last = position;
            }
            None => self.uses.push(Uses {
                next: position,
                last: position,
            }),
        }
        self.order.push(number);
        self.following.push(NEVER);
        true
    }

    /// Ends the making of the plan.
    pub fn finish(&mut self) {
        for uses in &mut self.uses {
            uses.last = NEVER;
        }
        self.uses.shrink_to_fit();
        self.order.shrink_to_fit();
        self.following.shrink_to_fit();
        self.numbers.shrink_to_fit();
    }

    /// Has it be about the keys of one source of a pool: those that begin so.
    #[must_use]
    pub fn within(self, folder: &str) -> Plan {
        Plan {
            folder: folder.into(),
            ..self
        }
    }

    /// What its keys begin with in the index: the folder of the source, "" where it is no pool.
    #[must_use]
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// Whether this is a key of its source.
    #[inline]
    #[must_use]
    pub fn covers(&self, key: &str) -> bool {
        key.starts_with(&*self.folder)
    }

    /// Where it is told what has become of it.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Tells what has become of it.
    pub fn set_course(&self, course: Option<Course>) {
        self.progress.set(course);
    }

    /// The position after the last one that was read.
    #[must_use]
    pub fn position(&self) -> u32 {
        self.at
    }

    /// Whether there is no room for another key.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.order.len() >= MAX_PLANNED
    }

    /// Keys, each counted as often as it is read.
    #[must_use]
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether nothing is planned.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Bytes of memory, about.
    #[must_use]
    pub fn memory(&self) -> usize {
        let positions = self.order.capacity() + self.following.capacity();
        positions * size_of::<u32>()
            + self.uses.capacity() * size_of::<Uses>()
            + self.numbers.capacity() * (size_of::<(u64, u32)>() + 1)
            + self.entries.capacity() * (size_of::<(u32, u32)>() + 1)
            + self.by_use.len() * 2 * size_of::<(u32, u32)>()
    }

    fn hash(&self, key: &str) -> u64 {
        self.hasher.hash_one(key)
    }

    fn number(&self, key: &str) -> Option<u32> {
        let own = key.strip_prefix(&*self.folder)?;
        self.numbers.get(&self.hash(own)).copied()
    }

    fn uses_of(&self, number: u32) -> Uses {
        let none = Uses {
            next: NEVER,
            last: NEVER,
        };
        self.uses.get(number as usize).copied().unwrap_or(none)
    }

    fn window(&self) -> u32 {
        let keys = self.uses.len();
        let few = WINDOW_FEW.min(keys / WINDOW_FEW_PART);
        (keys / WINDOW_PART).clamp(few, WINDOW_MOST) as u32
    }

    /// Position of the next use of a key, or [`NEVER`].
    #[must_use]
    pub fn next_use(&self, key: &str) -> u32 {
        let next = self.number(key).map(|number| self.uses_of(number).next);
        next.filter(|next| is_use(*next)).unwrap_or(NEVER)
    }

    /// Reads until a key is needed; `None` for one that is not of the plan.
    #[must_use]
    pub fn need(&self, key: &str) -> Option<Distance> {
        let number = self.number(key)?;
        Some(self.distance(self.uses_of(number).next))
    }

    /// When what has no next use is needed is not known: not before the end of the plan, and not sooner than its
    /// last use lies back.
    fn distance(&self, next: u32) -> Distance {
        let [at, next, len] = [self.at, next, self.order.len() as u32].map(Distance::from);
        if next < len {
            return next - at;
        }
        let last = Distance::from(NEVER) - 1 - next;
        (len - at).max(at - last)
    }

    /// A key is read, which this entry has served.
    pub fn read(&mut self, key: &str, entry: Option<u32>) -> Course {
        let course = match self.number(key) {
            Some(number) if self.is_over(number) => {
                self.disown(key, number);
                self.read_elsewhere()
            }
            Some(number) => self.read_planned(number),
            None if self.covers(key) => self.read_elsewhere(),
            None => self.course(),
        };
        if let Some(entry) = entry {
            // One that another process has brought in was not known.
            self.enter(entry, key);
        }
        course
    }

    /// Whether this read of a key comes after its last use.
    fn is_over(&self, number: u32) -> bool {
        !is_use(self.uses_of(number).next) && !self.is_repeated(number)
    }

    /// Whether a key was read just now.
    fn is_repeated(&self, number: u32) -> bool {
        let last = self.uses_of(number).last;
        last != NEVER && self.at.saturating_sub(last) <= self.window().max(1)
    }

    /// Has a key be one of no plan: it is read when nothing is known of it any more.
    fn disown(&mut self, key: &str, number: u32) {
        let own = key.strip_prefix(&*self.folder).unwrap_or(key);
        self.numbers.remove(&self.hash(own));
        let next = self.uses_of(number).next;
        while let Some(&(_, entry)) = self.by_use.range((next, 0)..=(next, u32::MAX)).next() {
            self.leave(entry);
        }
    }

    fn read_planned(&mut self, number: u32) -> Course {
        let (Uses { next, .. }, window) = (self.uses_of(number), self.window());
        if next > self.at && self.is_repeated(number) {
            // Another range of the same value, for example.
            return self.course();
        }
        if next > self.at.saturating_add(window) {
            return self.read_elsewhere();
        }
        self.wrong = self.wrong.saturating_sub(RIGHT);
        self.pass(number, next);
        if let Some(uses) = self.uses.get_mut(number as usize) {
            uses.last = next;
        }
        if next >= self.at {
            self.at = next + 1;
            self.leave_behind(self.at.saturating_sub(window));
        }
        self.course()
    }

    fn read_elsewhere(&mut self) -> Course {
        if self.at as usize == self.len() {
            self.after += 1;
            return self.course();
        }
        self.wrong += 1;
        self.course()
    }

    fn course(&self) -> Course {
        let most = (self.uses.len() / WRONG_PART).clamp(WRONG_FEW, WRONG_MOST);
        let first = self.by_use.first();
        let has_use = first.is_some_and(|(next, _)| is_use(*next));
        let is_over = !has_use || self.after > self.window() as usize;
        if self.wrong > most {
            Course::Wrong
        } else if self.at as usize == self.len() && is_over {
            Course::Done
        } else {
            Course::Followed
        }
    }

    /// Does not wait for uses before this position.
    fn leave_behind(&mut self, tail: u32) {
        for position in self.tail..tail {
            let number = self.order.get(position as usize).copied().unwrap_or(NEVER);
            if self.uses_of(number).next == position {
                self.pass(number, position);
            }
        }
        self.tail = self.tail.max(tail);
    }

    /// A use of a key is over.
    fn pass(&mut self, number: u32, position: u32) {
        let following = self.following.get(position as usize).copied();
        let next = following.filter(|next| is_use(*next));
        let next = next.unwrap_or_else(|| over(position));
        if let Some(uses) = self.uses.get_mut(number as usize) {
            uses.next = next;
        }
        // A position is one of one key, so these are all its entries.
        let of_key = (position, 0)..=(position, u32::MAX);
        while let Some(&(_, entry)) = self.by_use.range(of_key.clone()).next() {
            self.by_use.remove(&(position, entry));
            self.by_use.insert((next, entry));
        }
    }

    /// An entry of a key is there; whether the key is one of the plan.
    pub fn enter(&mut self, entry: u32, key: &str) -> bool {
        let Some(number) = self.number(key) else {
            self.leave(entry);
            return false;
        };
        if self.entries.get(&entry) != Some(&number) {
            self.leave(entry);
            self.entries.insert(entry, number);
            self.by_use.insert((self.uses_of(number).next, entry));
        }
        true
    }

    /// An entry goes.
    pub fn leave(&mut self, entry: u32) {
        if let Some(number) = self.entries.remove(&entry) {
            let next = self.uses_of(number).next;
            self.by_use.remove(&(next, entry));
        }
    }

    /// All entries are gone.
    pub fn leave_all(&mut self) {
        self.entries.clear();
        self.by_use.clear();
    }

    /// Whether this is known to be an entry of one of its keys.
    #[must_use]
    pub fn has(&self, entry: u32) -> bool {
        self.entries.contains_key(&entry)
    }

    /// Entries of its keys.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.entries.len()
    }

    /// The entry that is needed last, and in how many reads.
    #[must_use]
    pub fn farthest(&self) -> Option<(Distance, u32)> {
        let (next, entry) = self.by_use.last().copied()?;
        Some((self.distance(next), entry))
    }

    /// Whether the entries agree with their order; for tests.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let mut entries = self.entries.iter();
        self.entries.len() == self.by_use.len()
            && entries.all(|(entry, number)| {
                let next = self.uses_of(*number).next;
                self.by_use.contains(&(next, *entry))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(keys: impl IntoIterator<Item = usize>) -> Plan {
        let mut plan = Plan::default();
        for key in keys {
            assert!(plan.push(&key.to_string()));
        }
        plan.finish();
        plan
    }

    fn read(plan: &mut Plan, key: usize) -> Course {
        let course = plan.read(&key.to_string(), None);
        assert!(plan.is_sound());
        course
    }

    #[test]
    fn plan_that_is_read_in_its_order_gives_the_next_use_of_each_key() {
        let mut plan = plan((0..100).chain((0..100).rev()));
        assert_eq!(plan.next_use("0"), 0);
        assert_eq!(read(&mut plan, 0), Course::Followed);
        assert_eq!([plan.next_use("0"), plan.next_use("x")], [199, NEVER]);
        for key in (1..100).chain((1..100).rev()) {
            assert_eq!(read(&mut plan, key), Course::Followed);
        }
        assert_eq!(read(&mut plan, 0), Course::Done);
    }

    #[test]
    fn plan_keeps_the_farthest_entry_last() {
        let mut plan = plan([1, 2, 3, 1, 2]);
        for (entry, key) in [(10, "1"), (11, "1"), (20, "2"), (30, "3"), (40, "4")] {
            assert_eq!(plan.enter(entry, key), key != "4");
        }
        assert_eq!(plan.farthest(), Some((2, 30)));
        read(&mut plan, 1);
        assert_eq!(plan.farthest(), Some((2, 11)));
        plan.leave(11);
        assert_eq!(plan.farthest(), Some((2, 10)));
        read(&mut plan, 2);
        // What has no next use is not needed before the end.
        read(&mut plan, 3);
        assert_eq!(plan.farthest(), Some((2, 30)));
        assert_eq!(
            ["1", "3", "4"].map(|key| plan.need(key)),
            [Some(0), Some(2), None]
        );
        assert_eq!(plan.entries(), 3);
    }

    #[test]
    fn what_is_over_is_needed_as_late_as_its_last_use_lies_back() {
        let mut plan = plan(0..6);
        for key in 0..5 {
            plan.enter(key, &key.to_string());
            read(&mut plan, key as usize);
        }
        assert_eq!(plan.need("0"), Some(5));
        assert_eq!(plan.need("4"), Some(1));
        assert_eq!(plan.farthest(), Some((5, 0)));
    }

    #[test]
    fn key_that_is_read_after_its_last_use_is_one_of_no_plan() {
        let mut plan = plan([1, 2, 3, 4, 5]);
        plan.enter(10, "1");
        plan.enter(11, "1");
        for key in 1..5 {
            read(&mut plan, key);
        }
        assert_eq!(plan.need("1"), Some(4));
        read(&mut plan, 1);
        assert_eq!([plan.need("1"), plan.need("2")], [None, Some(3)]);
        assert_eq!(plan.entries(), 0);
    }

    #[test]
    fn plan_of_which_reads_are_left_out_is_followed() {
        let mut plan = plan(0..1000);
        for key in (0..1000).step_by(8) {
            assert_eq!(read(&mut plan, key), Course::Followed);
        }
        // The window has left these behind.
        assert_eq!(plan.next_use("1"), NEVER);
    }

    #[test]
    fn plan_whose_reads_overtake_each_other_is_followed() {
        let mut plan = plan((0..10).flat_map(|_| 0..1000));
        for start in (0..10_000).step_by(16) {
            for key in (start..start + 16).rev() {
                assert_ne!(read(&mut plan, key % 1000), Course::Wrong);
            }
        }
        assert_eq!(plan.at, 10_000);
    }

    #[test]
    fn plan_with_repeated_reads_of_a_key_waits() {
        let mut plan = plan((0..2).flat_map(|_| 0..100));
        for key in 0..100 {
            for _ in 0..5 {
                assert_eq!(read(&mut plan, key), Course::Followed);
            }
            assert_eq!(plan.next_use(&key.to_string()), 100 + key as u32);
        }
    }

    #[test]
    fn plan_of_other_keys_or_another_order_is_wrong() {
        let mut other = plan(0..100);
        let courses: Vec<_> = (100..200).map(|key| read(&mut other, key)).collect();
        assert_eq!(courses.iter().position(|c| *c == Course::Wrong), Some(32));
        let mut reverse = plan((0..10).flat_map(|_| 0..100));
        let mut keys = (0..10).flat_map(|_| (0..100).rev());
        assert!(keys.any(|key| read(&mut reverse, key) == Course::Wrong));
    }

    #[test]
    fn plan_within_a_folder_leaves_other_keys_alone() {
        let mut plan = plan(0..100).within("a/");
        for key in 0..100 {
            assert_eq!(plan.read(&format!("b/{key}"), Some(key)), Course::Followed);
        }
        assert_eq!(
            [plan.entries(), plan.next_use("b/5") as usize],
            [0, NEVER as usize]
        );
        assert_eq!(plan.read("a/0", Some(1)), Course::Followed);
        assert!(plan.enter(2, "a/5") && !plan.enter(3, "5"));
        // What has no more uses is needed at its end.
        assert_eq!(plan.farthest(), Some((99, 1)));
        let elsewhere = (100..200).map(|key| plan.read(&format!("a/{key}"), None));
        assert!(elsewhere.into_iter().any(|course| course == Course::Wrong));
    }

    #[test]
    fn plan_takes_so_many_keys() {
        let mut plan = plan(0..MAX_PLANNED);
        assert!(!plan.push("x"));
        assert_eq!(plan.len(), MAX_PLANNED);
        assert!(plan.memory() < 64 << 20, "{}", plan.memory());
    }
}
