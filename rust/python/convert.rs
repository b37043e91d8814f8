//! Values on their way between Python and the core.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::cache::{Found, Limits, Refusal, Verify, Victim};
use crate::cell::State;
use crate::key::{self, Span};

/// A span as Python passes it: `None` for the whole value, else a kind (1 range, 2 offset,
/// 3 suffix) and its numbers.
pub(super) type RawSpan = Option<(u8, u64, u64)>;
pub(super) type RawVictim = (u32, String);

pub(super) fn span(raw: RawSpan) -> PyResult<Span> {
    Ok(match raw {
        None => Span::Full,
        Some((1, start, end)) => Span::Range { start, end },
        Some((2, from, _)) => Span::Offset(from),
        Some((3, count, _)) => Span::Suffix(count),
        Some((kind, ..)) => {
            return Err(PyValueError::new_err(format!(
                "span kind must be 1 (range), 2 (offset) or 3 (suffix), got {kind}"
            )));
        }
    })
}

/// A key that may be held.
pub(super) fn known<'a>(key: &'a Bound<'_, PyString>) -> Option<&'a str> {
    // Lone surrogates are no text, and no file system and no index takes them.
    key.to_str().ok().filter(|key| key::is_known(key))
}

pub(super) fn raw_span(span: Span) -> RawSpan {
    match span {
        Span::Full => None,
        Span::Range { start, end } => Some((1, start, end)),
        Span::Offset(from) => Some((2, from, 0)),
        Span::Suffix(count) => Some((3, count, 0)),
    }
}

pub(super) fn raw_victims(victims: Vec<Victim>) -> Vec<RawVictim> {
    victims
        .into_iter()
        .map(|victim| (victim.cell, victim.cache_key))
        .collect()
}

/// Key, span, bytes and state.
pub(super) type RawEntry = (String, RawSpan, u64, &'static str);

pub(super) fn raw_entries(entries: Vec<(String, Span, u64, State)>) -> Vec<RawEntry> {
    let state = |state| match state {
        State::Present => "present",
        State::Writing => "writing",
        State::Dropping => "dropping",
        State::Orphan => "orphan",
    };
    let raw = |(key, span, size, of)| (key, raw_span(span), size, state(of));
    entries.into_iter().map(raw).collect()
}

pub(super) fn raw_recency(recency: Vec<(String, Span)>) -> Vec<(String, RawSpan)> {
    let raw = |(key, span)| (key, raw_span(span));
    recency.into_iter().map(raw).collect()
}

/// Seconds to whole milliseconds; what is no time at all counts as the beginning.
pub(super) fn millis(seconds: f64) -> u64 {
    (seconds * 1000.0) as u64
}

pub(super) fn why(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::TooLarge => "too large",
        Refusal::Void => "overtaken by a write",
        Refusal::Held => "held already",
        Refusal::Busy => "busy",
        Refusal::NoRoom => "no room",
        Refusal::Conflict => "in conflict with another key",
        Refusal::Full => "index full",
        Refusal::Rebuilding => "index not complete",
    }
}

/// Seconds of a maximum age to whole milliseconds; a part of one counts as one.
pub(super) fn age(seconds: f64) -> u64 {
    (seconds * 1000.0).ceil() as u64
}

pub(super) fn limits(
    max_size: Option<u64>,
    max_age: Option<f64>,
    lenient: bool,
    flat: bool,
    verify: &str,
) -> PyResult<Limits> {
    Ok(Limits {
        max_size: max_size.unwrap_or(u64::MAX),
        max_age: max_age.map(age),
        lenient,
        flat,
        verify: when_to_verify(verify)?,
    })
}

pub(super) fn when_to_verify(text: &str) -> PyResult<Verify> {
    match text {
        "never" => Ok(Verify::Never),
        "first" => Ok(Verify::First),
        "always" => Ok(Verify::Always),
        other => Err(PyValueError::new_err(format!(
            "verify={other:?} is none of \"first\", \"always\" and \"never\""
        ))),
    }
}

pub(super) fn hit<'py>(
    py: Python<'py>,
    key: &str,
    asked: Span,
    found: &Found,
    verify: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if asked == Span::Full && !verify {
        // The common case on the hot path: one small integer.
        return Ok(found.size.into_pyobject(py)?.into_any());
    }
    let name = found.span.cache_key(key);
    let handle = verify.then_some(found.handle);
    let hit = (
        name,
        found.size,
        found.start,
        found.length,
        handle,
        found.checksum,
    );
    Ok(hit.into_pyobject(py)?.into_any())
}
