//! What a request asks for, by hashes.

use super::ByteRange;

/// Bits of a range in a word that tell its kind.
const KIND_BITS: u32 = 3;
const NUMBER: u64 = u64::MAX >> KIND_BITS;

/// A whole value, or a byte range of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Of the key and the range.
    pub hash: u64,
    /// Of the key alone: that of the whole value.
    pub whole: u64,
    /// Which bytes.
    pub range: ByteRange,
}

impl Part {
    /// The whole value with this hash.
    #[inline]
    #[must_use]
    pub fn of_whole(hash: u64) -> Self {
        Part {
            hash,
            whole: hash,
            range: ByteRange::Full,
        }
    }
}

/// A byte range in one word, of an answer of `size` bytes: see [`unpacked`].
pub(crate) fn packed(range: ByteRange, size: u64) -> u64 {
    let (kind, number) = match range {
        ByteRange::Full => (0, 0),
        ByteRange::Range { start, end } if end.saturating_sub(start) > size => (4, start),
        ByteRange::Range { start, .. } => (1, start),
        ByteRange::Offset(start) => (2, start),
        ByteRange::Suffix(count) => (3, count),
    };
    kind << (u64::BITS - KIND_BITS) | number.min(NUMBER)
}

/// The byte range of a word, where it has brought `size` bytes: the end of a range is that of its bytes. One that the
/// value had cut off ends anywhere behind it: by how much it does makes no difference to what serves it, and what it
/// serves.
pub(crate) fn unpacked(word: u64, size: u64) -> ByteRange {
    let start = word & NUMBER;
    match word >> (u64::BITS - KIND_BITS) {
        0 => ByteRange::Full,
        1 => ByteRange::Range {
            start,
            end: start.saturating_add(size),
        },
        2 => ByteRange::Offset(start),
        4 => ByteRange::Range {
            start,
            end: u64::MAX,
        },
        _ => ByteRange::Suffix(start),
    }
}
