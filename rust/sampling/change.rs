//! What becomes of a value between its requests, as words among those of the requests.
//!
//! Each word has the flags of a request that was taken back, which is passed over. So what is left of a change of
//! which the beginning has been overwritten is harmless.

use super::known::{SIZE_BITS, UNKNOWN};
use super::sample::{NUMBER, RETRACTED};

/// Words of a change.
pub(super) const WORDS: usize = 5;
/// Flag of the first word of a change.
const FIRST: u16 = 1 << 13;
const BITS: u32 = 13;
const PAYLOAD: u16 = FIRST - 1;
const NUMBER_BITS: u32 = NUMBER.count_ones();
const _: () = assert!(NUMBER_BITS + SIZE_BITS + 2 <= u64::BITS && u64::BITS - 1 <= 5 * BITS);

/// What has happened to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Its size is another one from now on.
    Resized,
    /// The same, from the last request on that was no hit: that has brought it.
    Brought,
    /// What was cached of its key was dropped.
    Dropped,
    /// The same, and what was written takes its place.
    Filled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// Number of the key.
    pub(super) number: u16,
    pub(super) event: Event,
    /// The size until then.
    pub(super) before: u64,
}

/// A step of what a sample holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A request: the number of its key, and flags.
    Request(u16),
    Change(Change),
}

impl Step {
    /// Of its key.
    pub(super) fn number(self) -> u16 {
        match self {
            Step::Request(word) => word & NUMBER,
            Step::Change(change) => change.number,
        }
    }
}

impl Change {
    pub(super) fn words(self) -> [u16; WORDS] {
        let event = match self.event {
            Event::Resized => 0,
            Event::Brought => 1,
            Event::Dropped => 2,
            Event::Filled => 3,
        };
        let mut rest = u64::from(self.number & NUMBER)
            | self.before.min(UNKNOWN) << NUMBER_BITS
            | event << (NUMBER_BITS + SIZE_BITS);
        let mut flags = RETRACTED | FIRST;
        [(); WORDS].map(|()| {
            let word = flags | rest as u16 & PAYLOAD;
            (rest, flags) = (rest >> BITS, RETRACTED);
            word
        })
    }

    fn of_words(words: [u16; WORDS]) -> Option<Self> {
        let [first, others @ ..] = words;
        let is_other = |word: &u16| word & (RETRACTED | FIRST) == RETRACTED;
        if first & (RETRACTED | FIRST) != RETRACTED | FIRST || !others.iter().all(is_other) {
            return None;
        }
        let join = |rest: u64, word: &u16| rest << BITS | u64::from(word & PAYLOAD);
        let packed = words.iter().rev().fold(0, join);
        Some(Change {
            number: packed as u16 & NUMBER,
            event: match packed >> (NUMBER_BITS + SIZE_BITS) & 3 {
                0 => Event::Resized,
                1 => Event::Brought,
                2 => Event::Dropped,
                _ => Event::Filled,
            },
            before: packed >> NUMBER_BITS & UNKNOWN,
        })
    }
}

/// The steps in these words, each with the place of its first one. What is no step is passed over.
pub(super) fn steps(words: &[u16]) -> Vec<(usize, Step)> {
    let mut steps = Vec::with_capacity(words.len());
    let mut at = 0;
    while let Some(&word) = words.get(at) {
        if word & RETRACTED != RETRACTED {
            steps.push((at, Step::Request(word)));
        } else if let Some(first) = words.get(at..).and_then(<[u16]>::first_chunk)
            && let Some(change) = Change::of_words(*first)
        {
            steps.push((at, Step::Change(change)));
            at += WORDS - 1;
        }
        at += 1;
    }
    steps
}
