//! The sample itself: plain numbers in one block, on the heap or in a mapped file.

use std::mem::offset_of;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::change::{Change, Event, Step, WORDS, steps};
use super::known::{Known, UNKNOWN};
use super::marks::Marks;
use crate::key::{ODD, Part};

/// Keys that are sampled at most. When there is one more, the threshold is lowered by a quarter.
pub const KEYS: usize = 16 * 1024;
/// Sampled requests that are kept. When there is one more, keys are dropped as well, ...
pub const REQUESTS: usize = 128 * 1024;
/// ... as long as there are more than so many; then each request takes the place of the oldest.
const FEW_KEYS: u32 = 4096;
/// What a step takes of the ring at most: a change of size, and a request.
const STEP: u32 = WORDS as u32 + 1;
/// With so many there may be no room for one more step.
const FULL: u32 = REQUESTS as u32 - STEP + 1;
/// Keys and requests for which a file gets room at a time.
const MORE_KEYS: usize = 1024;
const MORE_REQUESTS: usize = 8192;
/// Places of the hash table: half of them stay free.
const PLACES: usize = 2 * KEYS;
/// Words of bits, one for each value of which ranges are known; few others share it.
const WHOLES: usize = 4 * KEYS / u64::BITS as usize;
/// Requests, sampled or not, after which a sample without room forgets its older half before it is
/// thinned out any more: what was asked for months ago says little about now.
const LONG: u64 = 1 << 26;

/// Number of the first request where earlier ones are forgotten, and the ring is not full.
const FORGOTTEN: u64 = 8192;

/// Bits of a request in the ring that number its key.
pub(super) const NUMBER: u16 = KEYS as u16 - 1;
const _: () = assert!(KEYS.is_power_of_two() && KEYS <= 1 << 14);
/// Flag of a request: what is cached was too old to serve it, or its key was being changed, so nothing was kept of it,
/// whatever the size of the cache.
pub const OUTDATED: u16 = 1 << 14;
/// Flag of a request: it was a hit.
pub const HIT: u16 = 1 << 15;
/// Both flags of a request: it was taken back.
pub(super) const RETRACTED: u16 = OUTDATED | HIT;
const MAGIC: u64 = u64::from_ne_bytes(*b"zsample\x07");

/// The sample: fewer than a million bytes, all of which may be anything at any time. A process that is
/// killed leaves it with one request too few, or without its check, upon which it is begun anew.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Sample {
    magic: u64,
    /// Of the hashes of [`super::part_of`].
    seed: u64,
    /// Keys with a hash up to this are sampled.
    threshold: u64,
    /// Of what stands before it; wrong while keys are dropped.
    check: u64,
    /// Requests, sampled or not, and the same inverted: both count.
    pub(super) requests: u64,
    pub(super) inverse: u64,
    /// Sampled requests up to now; each has this number as its place in the ring.
    pub(super) end: u64,
    /// Keys in `known`.
    pub(super) keys: u32,
    /// Requests in the ring, the last ones before `end`.
    len: u32,
    /// Keys and requests that there is room for: a file grows with its use.
    rooms: [u32; 2],
    /// When the sampled requests were made, as numbers of all requests.
    pub(super) marks: Marks,
    /// Numbers of keys plus one, by the low bits of their hashes.
    table: [u16; PLACES],
    /// Bits of values of which ranges are known, by the low bits of their hashes.
    wholes: [u64; WHOLES],
    pub(super) known: [Known; KEYS],
    /// Numbers of keys, with flags, in the order of the requests.
    ring: [u16; REQUESTS],
}

impl std::fmt::Debug for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Sample");
        shown.field("requests", &self.requests);
        shown.field("rate", &self.rate());
        shown.field("keys", &self.keys);
        shown.field("len", &self.len).finish_non_exhaustive()
    }
}

impl Sample {
    /// An empty sample on the heap.
    #[must_use]
    pub fn new(seed: u64) -> Box<Self> {
        // Zeroed memory takes none before it is used.
        let mut sample: Box<Sample> = bytemuck::allocation::zeroed_box();
        sample.reset(seed);
        sample.rooms = [KEYS as u32, REQUESTS as u32];
        sample
    }

    /// Bytes that are used of an empty one.
    pub const LEN: usize = offset_of!(Sample, known);

    /// A copy on the heap.
    #[must_use]
    pub fn copy(&self) -> Box<Self> {
        let mut copy: Box<Sample> = bytemuck::allocation::zeroed_box();
        bytemuck::bytes_of_mut(&mut *copy).copy_from_slice(bytemuck::bytes_of(self));
        copy
    }

    /// What comes next: whether the next request may be taken, or the bytes that it needs, which are to be
    /// given by [`Sample::give_room`].
    #[must_use]
    pub fn needs(&self) -> Option<Range<usize>> {
        let [known, ring] = self.rooms;
        if self.keys >= known && known < KEYS as u32 {
            let next = (known as usize + MORE_KEYS).min(KEYS);
            let at = |n| offset_of!(Sample, known) + n * size_of::<Known>();
            return Some(at(known as usize)..at(next));
        }
        if self.len.saturating_add(STEP) > ring && ring < REQUESTS as u32 {
            let next = (ring as usize + MORE_REQUESTS).min(REQUESTS);
            let at = |n| offset_of!(Sample, ring) + n * size_of::<u16>();
            return Some(at(ring as usize)..at(next));
        }
        None
    }

    /// The bytes are there that it needs.
    pub fn give_room(&mut self, bytes: &Range<usize>) {
        let [known, ring] = &mut self.rooms;
        if bytes.start < offset_of!(Sample, ring) {
            *known = ((bytes.end - offset_of!(Sample, known)) / size_of::<Known>()) as u32;
        } else {
            *ring = ((bytes.end - offset_of!(Sample, ring)) / size_of::<u16>()) as u32;
        }
    }

    /// Parts that are in use of one that is sound, for those who have to see that they are there.
    #[must_use]
    pub fn parts(&self) -> [Range<usize>; 3] {
        let [known, ring] = self.rooms.map(|room| room as usize);
        let (first, second) = (offset_of!(Sample, known), offset_of!(Sample, ring));
        [
            0..Self::LEN,
            first..first + known.min(KEYS) * size_of::<Known>(),
            second..second + ring.min(REQUESTS) * size_of::<u16>(),
        ]
    }

    /// Begins anew, whatever is there.
    pub fn begin(&mut self, seed: u64) {
        self.check = 0;
        self.table.fill(0);
        self.wholes.fill(0);
        self.rooms = [0, 0];
        self.reset(seed);
    }

    fn reset(&mut self, seed: u64) {
        self.magic = MAGIC;
        self.seed = seed;
        self.threshold = u64::MAX;
        (self.requests, self.inverse) = (0, !0);
        (self.end, self.keys, self.len) = (0, 0, 0);
        self.check = self.checksum();
    }

    /// Whether it can be believed.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.magic == MAGIC
            && self.check == self.checksum()
            && self.keys as usize <= KEYS
            && self.len as usize <= REQUESTS
            && self.rooms[0] as usize <= KEYS
            && self.rooms[1] as usize <= REQUESTS
            && (self.keys <= self.rooms[0] && self.len <= self.rooms[1])
            && u64::from(self.len) <= self.end
    }

    fn checksum(&self) -> u64 {
        let words = [self.magic, self.seed, self.threshold];
        let mix = |sum: u64, word: u64| (sum ^ word).wrapping_mul(ODD).rotate_left(23);
        words.into_iter().fold(ODD, mix)
    }

    /// Of the hashes.
    #[inline]
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Part of all keys that is sampled.
    #[must_use]
    pub fn rate(&self) -> f64 {
        (self.threshold as f64 + 1.0) / (u64::MAX as f64)
    }

    /// Bytes that are in use.
    #[must_use]
    pub fn memory(&self) -> usize {
        let known = self.keys as usize * size_of::<Known>();
        size_of_val(&self.table)
            + size_of_val(&self.wholes)
            + known
            + self.len as usize * size_of::<u16>()
    }

    /// Whether the requests of a key are kept.
    #[inline]
    #[must_use]
    pub fn has(&self, hash: u64) -> bool {
        hash <= self.threshold
    }

    /// Counts a request, whether or not it is sampled.
    #[inline]
    pub fn count(&mut self) {
        self.requests = self.requests.wrapping_add(1);
        self.inverse = !self.requests;
    }

    /// Keeps a request of a key that is sampled.
    pub fn push(&mut self, part: &Part, size: Option<u64>, flags: u16) {
        let hash = part.hash;
        let Some(number) = self.find_with_room(hash).or_else(|| self.add(part)) else {
            return;
        };
        if let Some(known) = self.known.get_mut(usize::from(number)) {
            if known.first > self.end {
                known.first = self.end;
            }
            if size.is_none() {
                known.await_size();
            }
        }
        if let Some(size) = size {
            self.set_size(number, part, size);
        }
        self.put(
            number | flags & (OUTDATED | HIT),
            self.requests.wrapping_sub(1),
        );
    }

    /// Adds a word; so many requests, sampled or not, were made before it.
    fn put(&mut self, word: u16, made: u64) {
        if Marks::has(self.end) {
            self.marks.set(self.end, made);
        }
        if let Some(place) = self.ring.get_mut(self.end as usize % REQUESTS) {
            *place = word;
        }
        self.end = self.end.wrapping_add(1);
        self.len = self.len.saturating_add(1).min(REQUESTS as u32);
    }

    /// What was cached of this key was dropped, if it is sampled, and it or a range of it is known.
    pub fn note_drop(&mut self, whole: &Part) {
        if !self.has(whole.hash) {
            return;
        }
        let mut found = self.find_with_room(whole.hash);
        if found.is_none() && self.knows_ranges_of(whole.hash) {
            found = self.add(whole);
        }
        if let Some(number) = found {
            self.put_change(number, Event::Dropped, UNKNOWN);
        }
    }

    fn knows_ranges_of(&self, whole: u64) -> bool {
        let (at, bit) = bit_of(whole);
        let known = self.known.get(..self.keys as usize).unwrap_or_default();
        // Most writes of values that are not read end with the bit.
        self.wholes.get(at).is_some_and(|word| word & bit != 0)
            && known.iter().any(|known| known.whole == whole)
    }

    /// A write of so many bytes has taken the place of what was cached of this key, if it is sampled.
    pub fn note_fill(&mut self, part: &Part, size: u64) {
        if !self.has(part.hash) {
            return;
        }
        let Some(number) = self.find_with_room(part.hash).or_else(|| self.add(part)) else {
            return;
        };
        if let Some(known) = self.known.get_mut(usize::from(number)) {
            let before = known.size();
            known.first = known.first.min(self.end);
            known.set_size(part, size);
            self.put_change(number, Event::Filled, before);
        }
    }

    fn put_change(&mut self, number: u16, event: Event, before: u64) {
        let change = Change {
            number,
            event,
            before,
        };
        for word in change.words() {
            self.put(word, self.requests);
        }
    }

    /// Takes a request back that was counted, the last one of its key that was a hit, or none: it is about no value,
    /// is looked up once more, or could not be served.
    pub fn retract(&mut self, hash: u64, is_hit: bool) {
        self.requests = self.requests.saturating_sub(1);
        self.inverse = !self.requests;
        let Some(number) = self.find(hash).filter(|_| self.has(hash)) else {
            return;
        };
        let len = u64::from(self.len).min(REQUESTS as u64);
        for place in (self.end.saturating_sub(len)..self.end).rev() {
            if let Some(request) = self.ring.get_mut(place as usize % REQUESTS)
                && *request & NUMBER == number
                && *request & RETRACTED != RETRACTED
                && (*request & HIT != 0) == is_hit
            {
                *request = RETRACTED;
                if let Some(known) = self.known.get_mut(usize::from(number)) {
                    known.stop_awaiting();
                    if known.first == place {
                        known.first = u64::MAX;
                    }
                }
                return;
            }
        }
    }

    /// The number of the oldest request in the ring; 0 where none is forgotten.
    pub(super) fn start(&self) -> u64 {
        let start = self.end.saturating_sub(self.len.into());
        // A process that was killed may have numbered a request that it had not counted.
        let is_full = self.len >= REQUESTS as u32;
        if is_full || start >= FORGOTTEN {
            start
        } else {
            0
        }
    }

    /// Notes the size of a key, if it is sampled and was requested.
    pub fn note_size(&mut self, part: &Part, size: u64) {
        if self.has(part.hash)
            && let Some(number) = self.find_with_room(part.hash)
        {
            self.set_size(number, part, size);
        }
    }

    /// Notes a size, and the former one as an event where there is another one now.
    fn set_size(&mut self, number: u16, part: &Part, size: u64) {
        if let Some(known) = self.known.get_mut(usize::from(number))
            && !known.has(size)
        {
            let (before, is_awaited) = (known.size(), known.is_awaited());
            known.set_size(part, size);
            if before != UNKNOWN && before != size {
                let event = if is_awaited {
                    Event::Brought
                } else {
                    Event::Resized
                };
                self.put_change(number, event, before);
            }
        }
    }

    /// The same as `find`, where a step will be added.
    fn find_with_room(&mut self, hash: u64) -> Option<u16> {
        if self.len >= FULL && self.keys > FEW_KEYS {
            self.make_room();
        }
        self.find(hash)
    }

    fn find(&self, hash: u64) -> Option<u16> {
        let mut at = hash as usize % PLACES;
        for _ in 0..PLACES {
            let number = self.table.get(at)?.checked_sub(1)?;
            // A process that was killed may have entered a key that it had not counted.
            let is_counted = u32::from(number) < self.keys;
            if is_counted && self.known.get(usize::from(number))?.hash == hash {
                return Some(number & NUMBER);
            }
            at = (at + 1) % PLACES;
        }
        None
    }

    fn add(&mut self, part: &Part) -> Option<u16> {
        let hash = part.hash;
        if self.keys as usize >= KEYS {
            self.make_room();
        }
        if !self.has(hash) {
            return None;
        }
        let number = self.keys as usize;
        *self.known.get_mut(number)? = Known::new(part, self.end);
        self.keys += 1;
        self.enter(hash, part.whole, number as u16);
        Some(number as u16)
    }

    fn enter(&mut self, hash: u64, whole: u64, number: u16) {
        let (word, bit) = bit_of(whole);
        if hash != whole
            && let Some(word) = self.wholes.get_mut(word)
        {
            *word |= bit;
        }
        let mut at = hash as usize % PLACES;
        for _ in 0..PLACES {
            match self.table.get_mut(at) {
                Some(place) if *place == 0 => {
                    *place = number + 1;
                    return;
                }
                _ => at = (at + 1) % PLACES,
            }
        }
    }

    #[cold]
    fn make_room(&mut self) {
        self.check = 0;
        let few = (KEYS - KEYS / 8) as u32;
        if self.requests >= LONG {
            let gone = self.requests - self.requests / 2;
            self.requests -= gone;
            self.inverse = !self.requests;
            self.marks.shift(gone);
            self.len -= self.len / 2;
            self.keep(true);
        }
        while self.keys > few || self.keys > FEW_KEYS && self.len >= FULL {
            self.threshold -= self.threshold / 4;
            self.keep(false);
        }
        self.check = self.checksum();
    }

    /// Keeps the keys up to the threshold, those in the ring only if so asked, and their requests.
    fn keep(&mut self, requested: bool) {
        let before = self.keys.min(KEYS as u32);
        let start = self.start();
        let ring = self.in_order();
        let (marks, end) = (self.marks, self.end);
        let made_before = |number, requests| marks.made_before(number, end, requests);
        let mut is_requested = vec![!requested; KEYS];
        for (_, step) in &ring {
            if let Some(is) = is_requested.get_mut(usize::from(step.number())) {
                *is = true;
            }
        }
        // Numbers are counted anew.
        let mut renumbered = vec![None; KEYS];
        self.table.fill(0);
        self.wholes.fill(0);
        self.keys = 0;
        for (old, is_requested) in is_requested.into_iter().enumerate().take(before as usize) {
            let number = self.keys as u16;
            let Some(mut known) = self.known.get(old).copied() else {
                break;
            };
            if !is_requested || !known.is_sound() || !self.has(known.hash) {
                continue;
            }
            // Only where it is damaged. No two are equal, so a small threshold leaves few.
            if self.find(known.hash).is_some() {
                continue;
            }
            known.first = match known.first {
                first if first < start => 0,
                _ => u64::MAX,
            };
            if let Some(place) = self.known.get_mut(usize::from(number)) {
                *place = known;
                self.keys += 1;
                self.enter(known.hash, known.whole, number);
            }
            if let Some(new) = renumbered.get_mut(old) {
                *new = Some(number);
            }
        }
        self.end = if start > 0 { FORGOTTEN } else { 0 };
        self.len = 0;
        self.marks.set(self.end, made_before(start, self.requests));
        for (old, step) in ring {
            let new = renumbered.get(usize::from(step.number())).copied();
            let Some(number) = new.flatten() else {
                continue;
            };
            if let Some(known) = self.known.get_mut(usize::from(number)) {
                known.first = known.first.min(self.end);
            }
            let made = made_before(old, self.requests);
            match step {
                Step::Request(request) => self.put(number | request & !NUMBER, made),
                Step::Change(change) => {
                    for word in (Change { number, ..change }).words() {
                        self.put(word, made);
                    }
                }
            }
        }
    }

    /// Words in the ring.
    pub(super) fn held(&self) -> u32 {
        self.len.min(REQUESTS as u32)
    }

    /// The steps in the ring with their numbers, oldest first.
    pub(super) fn in_order(&self) -> Vec<(u64, Step)> {
        let start = self.end.saturating_sub(self.held().into());
        let places = (start..self.end).map(|n| self.ring.get(n as usize % REQUESTS));
        let words: Vec<u16> = places.flatten().copied().collect();
        let numbered = |(at, step)| (start.saturating_add(at as u64), step);
        steps(&words).into_iter().map(numbered).collect()
    }
}

/// The word of its bit, and that.
fn bit_of(whole: u64) -> (usize, u64) {
    let bit = whole as usize % (WHOLES * u64::BITS as usize);
    (bit / u64::BITS as usize, 1 << (bit % u64::BITS as usize))
}
