//! Which bytes of a value a request selects, and which of those a cached range holds.

use super::ByteRange;

/// What a request asks for, of a source that slices in its own way. A byte range alone is of one of which that is not
/// known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The byte range.
    pub range: ByteRange,
    /// Whether a cached full value also answers if none of its bytes are selected, or more are named than it
    /// has. Sources disagree about those, so only for a source known to slice so.
    pub slices_like_python: bool,
}

impl From<ByteRange> for Asked {
    fn from(range: ByteRange) -> Self {
        Asked {
            range,
            slices_like_python: false,
        }
    }
}

/// First byte and count of what `range` selects from a value of `size` bytes.
///
/// `None` where sources disagree about the answer (nothing is selected, or more is asked for than
/// there is), unless the source is known to slice as Python does.
#[must_use]
pub fn select(size: u64, range: ByteRange, slices_like_python: bool) -> Option<(u64, u64)> {
    let (start, end) = match range {
        ByteRange::Full => return Some((0, size)),
        // Some stores read to the end when the end comes before the start.
        ByteRange::Range { start, end } if end < start => return None,
        ByteRange::Range { start, end } => (start, end.min(size)),
        ByteRange::Offset(start) => (start, size),
        ByteRange::Suffix(count) => (size.saturating_sub(count), size),
    };
    let start = start.min(size);
    let length = end.saturating_sub(start);
    (slices_like_python || is_agreed(range, length)).then_some((start, length))
}

/// Whether all sources answer a request with these `size` bytes: something is selected, and of the last bytes no more
/// are named than there are.
pub(crate) fn is_agreed(range: ByteRange, size: u64) -> bool {
    match range {
        ByteRange::Full => true,
        ByteRange::Range { .. } | ByteRange::Offset(_) => 0 < size,
        ByteRange::Suffix(count) => 0 < count && count <= size,
    }
}

/// Where `asked` lies inside a cached range `held` of `size` bytes.
pub(crate) fn within(held: ByteRange, size: u64, asked: ByteRange) -> Option<(u64, u64)> {
    use ByteRange::{Offset, Range, Suffix};
    match (held, asked) {
        // What lies beyond the end of the cached range is unknown, even if the value is shorter.
        (Range { end: to, .. }, Range { end, .. }) if end > to => None,
        (Range { start: from, .. } | Offset(from), Range { start, end }) => {
            let inside = from <= start && start < end && end - from <= size;
            inside.then(|| (start - from, end - start))
        }
        (Offset(from), Offset(start)) => {
            let skip = start.checked_sub(from).filter(|skip| *skip < size)?;
            Some((skip, size - skip))
        }
        (Suffix(_), Suffix(count)) => (0 < count && count <= size).then(|| (size - count, count)),
        _ => None,
    }
}
