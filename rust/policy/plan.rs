//! What will be read, in its order, as the program has said.
//!
//! Of values of one size what is needed last goes first, as Belady's optimal replacement has it ("A study of
//! replacement algorithms for a virtual-storage computer", 1966). Others are compared by the room that they take
//! until then for what they cost, so of those that are about alike in that a plan tells what is needed last. A plan is a hint of one process, in its memory.

use std::collections::HashMap;
use std::hash::BuildHasher;

use foldhash::fast::RandomState;

use super::planned_entries::{Classes, PlannedEntries};
use super::progress::{Course, Progress};

/// Keys of a plan at most.
pub const MAX_PLANNED: usize = 1_000_000;

/// Keys that there is room for at first.
const FIRST_KEYS: usize = 4096;

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

/// The hash of a key, in halves: with its number it takes 12 bytes, and not 16.
type KeyHash = (u32, u32);

/// The uses of one key.
#[derive(Clone, Copy, Debug)]
struct Uses {
    /// Position of the next one, or what stands for it; see [`over`].
    next: u32,
    /// Position of the last one that was read, or [`NEVER`]. While the plan is made: the last one so far.
    last: u32,
    /// Those of its entries.
    classes: Classes,
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
    /// Number of each key.
    numbers: HashMap<KeyHash, u32, RandomState>,
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
    entries: PlannedEntries,
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
                classes: 0,
            }),
        }
        self.order.push(number);
        self.following.push(NEVER);
        true
    }

    /// Has room for keys to come, at least as many as so far, and says for how many: until there are as many as that, no
    /// [`Plan::push`] takes long.
    pub fn grow(&mut self) -> usize {
        let more = self.len().max(FIRST_KEYS).min(MAX_PLANNED - self.len());
        self.numbers.reserve(more);
        self.uses.reserve_exact(more);
        self.order.reserve_exact(more);
        self.following.reserve_exact(more);
        self.len() + more
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
            // An eighth of its places is always free.
            + self.numbers.capacity() * 8 / 7 * (size_of::<(KeyHash, u32)>() + 1)
            + self.entries.memory()
    }

    fn hash(&self, key: &str) -> KeyHash {
        let hash = self.hasher.hash_one(key);
        (hash as u32, (hash >> 32) as u32)
    }

    fn number(&self, key: &str) -> Option<u32> {
        let own = key.strip_prefix(&*self.folder)?;
        self.numbers.get(&self.hash(own)).copied()
    }

    fn uses_of(&self, number: u32) -> Uses {
        let none = Uses {
            next: NEVER,
            last: NEVER,
            classes: 0,
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

    /// A key is read, which this entry of this weight has served.
    pub fn read(&mut self, key: &str, entry: Option<(u32, u64)>) -> Course {
        let course = match self.number(key) {
            Some(number) if self.is_over(number) => {
                self.disown(key, number);
                self.read_elsewhere()
            }
            Some(number) => self.read_planned(number),
            None if self.covers(key) => self.read_elsewhere(),
            None => self.course(),
        };
        if let Some((entry, weight)) = entry {
            // One that another process has brought in was not known.
            self.enter(entry, key, weight);
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
        let Uses { next, classes, .. } = self.uses_of(number);
        self.entries.leave_all_of(next, classes);
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
        if self.wrong > most {
            Course::Wrong
        } else if self.at as usize == self.len() && self.is_read() {
            Course::Done
        } else {
            Course::Followed
        }
    }

    /// Whether nothing of it is waited for, at its end.
    fn is_read(&self) -> bool {
        let has_use = self.entries.nearest().is_some_and(is_use);
        !has_use || self.after > self.window() as usize
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
            uses.classes = self.entries.move_all(position, next, uses.classes);
        }
    }

    /// An entry of a key is there, which takes so much room for what it costs; whether the key is one of the plan.
    pub fn enter(&mut self, entry: u32, key: &str, weight: u64) -> bool {
        let Some(number) = self.number(key) else {
            self.leave(entry);
            return false;
        };
        if !self.entries.has(entry, number, weight) {
            self.leave(entry);
            if let Some(uses) = self.uses.get_mut(number as usize) {
                uses.classes |= self.entries.enter(entry, number, weight, uses.next);
            }
        }
        true
    }

    /// An entry goes.
    pub fn leave(&mut self, entry: u32) {
        if let Some(number) = self.entries.number(entry) {
            self.entries.leave(entry, self.uses_of(number).next);
        }
    }

    /// All entries are gone.
    pub fn leave_all(&mut self) {
        self.entries.leave_all();
    }

    /// Whether this is known to be an entry of one of its keys.
    #[must_use]
    pub fn has(&self, entry: u32) -> bool {
        self.entries.number(entry).is_some()
    }

    /// Entries of its keys.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.entries.len()
    }

    /// The classes of entries of about the same weight, those that there are; with or without that of those that
    /// take none.
    pub fn classes(&self, with_no_room: bool) -> impl Iterator<Item = u32> + use<> {
        self.entries.filled(with_no_room)
    }

    /// The entry of a class that is needed last, of those before this position and entry: its position, and in how many
    /// reads that is.
    #[must_use]
    pub fn last_of(&self, class: u32, before: (u32, u32)) -> Option<((u32, u32), Distance)> {
        let last = self.entries.last_of(class, before)?;
        Some((last, self.distance(last.0)))
    }

    /// Whether the entries agree with their order; for tests.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.entries.is_sound(|number| {
            let Uses { next, classes, .. } = self.uses_of(number);
            (next, classes)
        })
    }
}
