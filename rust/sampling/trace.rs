//! What a sample holds, as a series of requests.

use super::known::Known;
use super::sample::{HIT, NUMBER, OUTDATED, RETRACTED, Sample};
use crate::key::{Part, unpacked};

/// Flag in a [`Trace`] of what stands for the requests of a key before the first one in the ring.
pub const EARLIER: u16 = 2;
/// Flag in a [`Trace`] of what only fills a simulated cache, before the requests that count: where the
/// beginning is forgotten, these are first the keys that were requested then, in their order, and then the
/// earlier half of the requests that are left.
pub const FORMER: u16 = 1;

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
    /// its bytes, or [`UNKNOWN`](super::UNKNOWN),
    pub sizes: Vec<u64>,
    /// and [`OUTDATED`], [`HIT`], [`EARLIER`] and [`FORMER`].
    pub flags: Vec<u16>,
}

impl Trace {
    fn push(&mut self, known: &Known, flags: u16) {
        self.parts.push(Part {
            hash: known.hash,
            whole: known.whole,
            range: unpacked(known.range, known.size()),
        });
        self.sizes.push(known.size());
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
        for known in known.iter().filter(|known| known.first < start) {
            if known.is_sound() {
                trace.push(known, EARLIER | FORMER);
            }
        }
        let counted_from = match start {
            0 => 0,
            start => start.saturating_add(self.in_order().count() as u64 / 2),
        };
        let mut counted = 0;
        for (at, request) in self.in_order() {
            let known = known.get(usize::from(request & NUMBER));
            if let Some(known) = known.filter(|known| known.is_sound())
                && request & RETRACTED != RETRACTED
            {
                let former = if at < counted_from { FORMER } else { 0 };
                trace.push(known, request & (OUTDATED | HIT) | former);
                counted += u64::from(former == 0);
            }
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
