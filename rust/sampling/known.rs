//! A key, or a byte range of one, that is sampled, with what is known of it.

use bytemuck::{Pod, Zeroable};

use crate::key::{ODD, Part, packed};

/// Stands for a size that is not known.
pub const UNKNOWN: u64 = (1 << SIZE_BITS) - 1;
pub(super) const SIZE_BITS: u32 = 47;
/// Beside a size: the last request was no hit, and the size of what it brings has not come yet.
const AWAITED: u64 = 1 << SIZE_BITS;
/// What is checked.
const SIZE: u64 = UNKNOWN | AWAITED;
const CHECK: u32 = SIZE_BITS + 1;

/// A key, or a byte range of one, that is sampled.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Known {
    pub(super) hash: u64,
    /// Its size, whether another is awaited, and above that a check of both.
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
        self.set(size);
    }

    /// Notes that a request has to bring the value: its size may be another one.
    pub(super) fn await_size(&mut self) {
        self.set(self.size() | AWAITED);
    }

    /// Notes that none has to.
    pub(super) fn stop_awaiting(&mut self) {
        self.set(self.size());
    }

    fn set(&mut self, size: u64) {
        self.word = size | check(self.hash, size) << CHECK;
    }

    pub(super) fn size(self) -> u64 {
        self.word & UNKNOWN
    }

    pub(super) fn is_awaited(self) -> bool {
        self.word & AWAITED != 0
    }

    /// Whether it has this size, and none is awaited.
    #[inline]
    pub(super) fn has(self, size: u64) -> bool {
        self.word & SIZE == size
    }

    pub(super) fn is_sound(self) -> bool {
        self.word >> CHECK == check(self.hash, self.word & SIZE)
    }
}

/// Bytes that are all zero are not sound.
fn check(hash: u64, size: u64) -> u64 {
    (hash ^ size ^ ODD).wrapping_mul(ODD) >> CHECK
}
