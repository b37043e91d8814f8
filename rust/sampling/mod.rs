//! A sample of the requests that an index has seen, from which the hits of other sizes and other
//! policies can be told.
//!
//! Keys are sampled by their hash (SHARDS, Waldspurger et al., FAST 2015): all requests of a sampled
//! key are kept, none of any other. So a cache that is smaller by the sampling rate has, on the sample,
//! nearly the hits of the full one on all requests. Nothing is simulated here.

mod known;
mod marks;
mod sample;
mod trace;

pub use self::known::UNKNOWN;
pub use self::sample::{HIT, KEYS, OUTDATED, REQUESTS, Sample};
pub use self::trace::{FORMER, SEEN_BEFORE, Trace};

use crate::key::{self, ByteRange, RangeLabel};

/// Hash by which a request is sampled: the same in every process, whatever the seed of its index, so that a
/// sample outlives a rebuild.
#[inline]
#[must_use]
pub fn hash(key: &str, range: ByteRange, seed: u64) -> u64 {
    let whole = key::hash(key.as_bytes(), seed, 0);
    let kind = match range {
        ByteRange::Full => return whole,
        ByteRange::Range { .. } => 1,
        ByteRange::Offset(_) => 2,
        ByteRange::Suffix(_) => 3,
    };
    key::hash(RangeLabel::new(range).bytes(), whole, kind)
}
