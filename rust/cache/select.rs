//! Which bytes of a value a request selects, and which of those a range holds that is cached.

use crate::key::Span;

/// First byte and count of what `span` selects of a value of `size` bytes; `None` where sources
/// disagree about the answer, unless `lenient`.
#[must_use]
pub fn select(size: u64, span: Span, lenient: bool) -> Option<(u64, u64)> {
    let (start, end, plain) = match span {
        Span::Full => return Some((0, size)),
        // Some stores read to the end when the end comes before the start.
        Span::Range { start, end } if end < start => return None,
        Span::Range { start, end } => (start, end.min(size), start < end && start < size),
        Span::Offset(start) => (start, size, start < size),
        Span::Suffix(count) => (size.saturating_sub(count), size, 0 < count && count <= size),
    };
    let start = start.min(size);
    (plain || lenient).then(|| (start, end.saturating_sub(start)))
}

/// Where `asked` lies inside a range `held` of which `size` bytes are there.
pub(super) fn within(held: Span, size: u64, asked: Span) -> Option<(u64, u64)> {
    match (held, asked) {
        // Of a range that selects nothing by its own numbers nobody knows what a source made.
        (Span::Range { end: to, .. }, Span::Range { end, .. }) if end > to => None,
        (Span::Range { start: from, .. } | Span::Offset(from), Span::Range { start, end }) => {
            let inside = from <= start && start < end && end - from <= size;
            inside.then(|| (start - from, end - start))
        }
        (Span::Offset(from), Span::Offset(start)) => {
            let skip = start.checked_sub(from).filter(|skip| *skip < size)?;
            Some((skip, size - skip))
        }
        (Span::Suffix(_), Span::Suffix(count)) => {
            (0 < count && count <= size).then(|| (size - count, count))
        }
        _ => None,
    }
}
