//! What a sample holds, as a series of requests.

use super::change::{Event, Step};
use super::known::{Known, UNKNOWN};
use super::sample::{HIT, OUTDATED, Sample};
use crate::key::{Part, unpacked};

/// Flag in a [`Trace`] of what stands for the requests of a key before the first one in the ring.
pub const EARLIER: u16 = 2;
/// Flag in a [`Trace`] of what only fills a simulated cache, before the requests that count: where the
/// beginning is forgotten, these are first the keys that were requested then, in their order, and then the
/// earlier half of the requests that are left.
pub const FORMER: u16 = 1;

/// Flag in a [`Trace`] of what is no request: a write has dropped what was cached of a key, ...
pub const DROPPED: u16 = 4;
/// ... and what it has written took the place.
pub const FILLED: u16 = 8;

/// What a sample holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Requests, sampled or not, since the first one that counts.
    pub requests: u64,
    /// Part of all keys that is sampled.
    pub rate: f64,
    /// Whether there were requests before the first one.
    pub has_slid: bool,
    /// For each sampled request, oldest first, what it asks for,
    pub parts: Vec<Part>,
    /// its bytes then, or [`UNKNOWN`],
    pub sizes: Vec<u64>,
    /// and [`OUTDATED`], [`HIT`], [`EARLIER`] and [`FORMER`]; or [`DROPPED`], or [`FILLED`], between the requests.
    pub flags: Vec<u16>,
}

impl Trace {
    fn push(&mut self, known: &Known, size: u64, flags: u16) {
        self.parts.push(Part {
            hash: known.hash,
            whole: known.whole,
            range: unpacked(known.range, known.size()),
        });
        self.sizes.push(size);
        self.flags.push(flags);
    }
}

impl Sample {
    /// What it holds. What is damaged is left out.
    #[must_use]
    pub fn trace(&self) -> Trace {
        let start = self.start();
        let known = self.known.get(..self.keys as usize).unwrap_or_default();
        let mut trace = Trace {
            rate: self.rate(),
            has_slid: start > 0,
            ..Trace::default()
        };
        let steps = self.in_order();
        let (sizes, first_sizes) = sizes_of(known, &steps);
        for (known, size) in known.iter().zip(first_sizes) {
            if known.first < start && known.is_sound() {
                trace.push(known, size, EARLIER | FORMER);
            }
        }
        let counted_from = match start {
            0 => 0,
            start => start.saturating_add(u64::from(self.held()) / 2),
        };
        let mut counted = 0;
        for ((at, step), size) in steps.into_iter().zip(sizes) {
            let known = known.get(usize::from(step.number()));
            let Some(known) = known.filter(|known| known.is_sound()) else {
                continue;
            };
            let former = if at < counted_from { FORMER } else { 0 };
            let flags = match step {
                Step::Request(request) => request & (OUTDATED | HIT),
                Step::Change(change) => match change.event {
                    Event::Resized | Event::Brought => continue,
                    Event::Dropped => DROPPED,
                    Event::Filled => FILLED,
                },
            };
            trace.push(known, size, flags | former);
            counted += u64::from((flags & (DROPPED | FILLED) | former) == 0);
        }
        trace.requests = if self.requests == !self.inverse {
            self.requests_since(counted_from).max(counted)
        } else {
            (counted as f64 / trace.rate) as u64
        };
        trace
    }

    /// Requests, sampled or not, from a sampled one on.
    fn requests_since(&self, number: u64) -> u64 {
        match number {
            0 => self.requests,
            number => {
                let before = self.marks.made_before(number, self.end, self.requests);
                self.requests.wrapping_sub(before)
            }
        }
    }
}

/// The size at each of these steps, and that of each key before them. Changes say what was before, so that the
/// oldest steps may be forgotten.
fn sizes_of(known: &[Known], steps: &[(u64, Step)]) -> (Vec<u64>, Vec<u64>) {
    let mut sizes: Vec<u64> = known.iter().map(|known| known.size()).collect();
    // Of what the last request that was no hit has brought: the size before that.
    let mut before = vec![None; sizes.len()];
    let mut found = vec![UNKNOWN; steps.len()];
    for ((_, step), found) in steps.iter().zip(&mut found).rev() {
        let number = usize::from(step.number());
        let (Some(size), Some(before)) = (sizes.get_mut(number), before.get_mut(number)) else {
            continue;
        };
        *found = *size;
        match step {
            Step::Request(request) if request & HIT == 0 => *size = before.take().unwrap_or(*size),
            Step::Request(_) => {}
            Step::Change(change) => match change.event {
                Event::Resized | Event::Filled => *size = change.before,
                Event::Brought => *before = Some(change.before),
                Event::Dropped => {}
            },
        }
    }
    (found, sizes)
}
