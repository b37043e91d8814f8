//! What a sample holds, as a series of requests.

use super::known::Known;
use super::sample::{HIT, NUMBER, OUTDATED, Sample};

/// Flag of a request in a [`Trace`]: its key was requested before the first one in the ring.
pub const SEEN_BEFORE: u16 = 2;
/// Flag in a [`Trace`] of what stands for the first request of such a key. These come first, in their order,
/// so that a simulation does not begin with an empty cache.
pub const FORMER: u16 = 1;

/// What a sample holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Requests, sampled or not, since the sample was begun.
    pub requests: u64,
    /// Part of all keys that is sampled.
    pub rate: f64,
    /// Whether there were requests before the first one.
    pub has_slid: bool,
    /// Sampled requests that are no longer here, and those that were the first of their key.
    pub dropped: u64,
    /// See `dropped`.
    pub dropped_first: u64,
    /// For each sampled request, oldest first, what stands for its key,
    pub keys: Vec<u64>,
    /// its bytes, or [`UNKNOWN`](super::UNKNOWN),
    pub sizes: Vec<u64>,
    /// and [`OUTDATED`], [`HIT`] and [`SEEN_BEFORE`].
    pub flags: Vec<u16>,
}

impl Sample {
    /// What it holds. What is damaged is left out.
    #[must_use]
    pub fn trace(&self) -> Trace {
        let (base, start) = (self.base, self.start());
        let known = self.known.get(..self.keys as usize).unwrap_or_default();
        let has_left = |known: &&Known| (base..start).contains(&known.first);
        let mut trace = Trace {
            rate: self.rate(),
            has_slid: start > 0,
            dropped: start.saturating_sub(base),
            dropped_first: known.iter().filter(has_left).count() as u64,
            ..Trace::default()
        };
        for known in known.iter().filter(|known| known.first < start) {
            if known.is_sound() {
                trace.keys.push(known.hash);
                trace.sizes.push(known.size());
                trace.flags.push(SEEN_BEFORE | FORMER);
            }
        }
        let former = trace.keys.len();
        for request in self.in_order() {
            let known = known.get(usize::from(request & NUMBER));
            if let Some(known) = known.filter(|known| known.is_sound()) {
                trace.keys.push(known.hash);
                trace.sizes.push(known.size());
                let seen = if known.first < start { SEEN_BEFORE } else { 0 };
                trace.flags.push(request & (OUTDATED | HIT) | seen);
            }
        }
        let sampled = trace
            .dropped
            .saturating_add((trace.keys.len() - former) as u64);
        trace.requests = if self.requests == !self.inverse {
            self.requests.max(sampled)
        } else {
            (sampled as f64 / trace.rate) as u64
        };
        trace
    }
}
