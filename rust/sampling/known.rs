//! A key, or a byte range of one, that is sampled, with what is known of it.

use bytemuck::{Pod, Zeroable};

use crate::key::{ODD, Part, packed};

/// Stands for a size that is not known.
pub const UNKNOWN: u64 = (1 << SIZE_BITS) - 1;
const SIZE_BITS: u32 = 48;

/// A key, or a byte range of one, that is sampled.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Known {
    pub(super) hash: u64,
    /// Its size, and above that a check of both.
    word: u64,
    /// Which of all sampled requests was its first.
    pub(super) first: u64,
    /// Hash of the whole value.
    pub(super) whole: u64,
    /// Which bytes of that, as far as its size tells.
    pub(super) range: u64,
}

impl Known {
    pub(super) fn new(part: &Part, first: u64) -> Self {
        let mut known = Known {
            hash: part.hash,
            word: 0,
            first,
            whole: part.whole,
            range: 0,
        };
        known.set_size(part, UNKNOWN);
        known
    }

    /// Notes the bytes that `part`, which it is about, has.
    pub(super) fn set_size(&mut self, part: &Part, size: u64) {
        let size = size.min(UNKNOWN);
        self.range = packed(part.range, size);
        self.word = size | check(self.hash, size) << SIZE_BITS;
    }

    pub(super) fn size(self) -> u64 {
        self.word & UNKNOWN
    }

    pub(super) fn is_sound(self) -> bool {
        self.word >> SIZE_BITS == check(self.hash, self.size())
    }
}

fn check(hash: u64, size: u64) -> u64 {
    (hash ^ size).wrapping_mul(ODD) >> SIZE_BITS
}
