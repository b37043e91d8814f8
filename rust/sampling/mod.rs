//! A sample of the requests that an index has seen, from which the hits of other sizes and other
//! policies can be told.
//!
//! Keys are sampled by their hash (SHARDS, Waldspurger et al., FAST 2015), each byte range like a key of its
//! own: all requests of a sampled key are kept, none of any other. So a cache that is smaller by the sampling rate has, on the sample,
//! nearly the hits of the full one on all requests. Where a value changes its size, or a write drops or fills it,
//! that is kept among the requests. Nothing is simulated here.

mod change;
mod known;
mod marks;
mod sample;
mod trace;

pub use self::known::UNKNOWN;
pub use self::sample::{HIT, KEYS, OUTDATED, REQUESTS, Sample};
pub use self::trace::{DROPPED, EARLIER, FILLED, FORMER, Trace};

use crate::key::{self, ByteRange, Part, RangeLabel};

/// What a request asks for, by the hashes by which it is sampled: the same in every process, whatever the
/// seed of its index, so that a sample outlives a rebuild.
#[inline]
#[must_use]
pub fn part_of(key: &str, range: ByteRange, seed: u64) -> Part {
    let whole = key::hash(key.as_bytes(), seed, 0);
    let kind = match range {
        ByteRange::Full => return Part::of_whole(whole),
        ByteRange::Range { .. } => 1,
        ByteRange::Offset(_) => 2,
        ByteRange::Suffix(_) => 3,
    };
    Part {
        hash: key::hash(RangeLabel::new(range).bytes(), whole, kind),
        whole,
        range,
    }
}
