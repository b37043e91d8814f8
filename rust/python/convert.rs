//! Values on their way between Python and the core.

use std::mem::MaybeUninit;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;

use super::pool::place_name;
use crate::arena::State;
use crate::cache::{AbsenceAges, Entry, Found, Freshness, Limits, Verify, Victim};
use crate::key::{self, ByteRange};
use crate::policy::{Minimise, PolicyKind};

/// A byte range as Python passes it: `None` for the whole value, else a kind (1 range, 2 offset,
/// 3 suffix) and its numbers.
pub(super) type RawSpan = Option<(u8, u64, u64)>;
pub(super) type RawVictim = (u32, String);
/// A decoded chunk: its key, version, fetch time, the end of its decode, and its maximum age.
pub(super) type RawDecoded<'py> = (Bound<'py, PyString>, u64, u64, f64, Option<f64>);

pub(super) fn span(raw: RawSpan) -> PyResult<ByteRange> {
    Ok(match raw {
        None => ByteRange::Full,
        Some((1, start, end)) => ByteRange::Range { start, end },
        Some((2, from, _)) => ByteRange::Offset(from),
        Some((3, count, _)) => ByteRange::Suffix(count),
        Some((kind, ..)) => {
            return Err(PyValueError::new_err(format!(
                "span kind must be 1 (range), 2 (offset) or 3 (suffix), got {kind}"
            )));
        }
    })
}

/// A key that may be cached.
pub(super) fn known<'a>(key: &'a Bound<'_, PyString>) -> Option<&'a str> {
    // Lone surrogates are not UTF-8.
    key.to_str().ok().filter(|key| key::is_cacheable(key))
}

pub(super) fn raw_span(span: ByteRange) -> RawSpan {
    match span {
        ByteRange::Full => None,
        ByteRange::Range { start, end } => Some((1, start, end)),
        ByteRange::Offset(from) => Some((2, from, 0)),
        ByteRange::Suffix(count) => Some((3, count, 0)),
    }
}

pub(super) fn raw_victims(victims: Vec<Victim>) -> Vec<RawVictim> {
    victims
        .into_iter()
        .map(|victim| match victim.placed {
            Some(placed) => (victim.cell, place_name(placed)),
            None => (victim.cell, victim.cache_key),
        })
        .collect()
}

/// Key, span, bytes and state.
pub(super) type RawEntry = (String, RawSpan, u64, &'static str);

pub(super) fn raw_entries(entries: Vec<Entry>) -> Vec<RawEntry> {
    let state = |state| match state {
        State::Live => "live",
        State::Filling => "filling",
        State::Deleting => "deleting",
        State::DeleteFailed => "delete-failed",
    };
    let raw = |one: Entry| (one.key, raw_span(one.range), one.size, state(one.state));
    entries.into_iter().map(raw).collect()
}

pub(super) fn raw_recency(recency: Vec<(String, ByteRange)>) -> Vec<(String, RawSpan)> {
    let raw = |(key, span)| (key, raw_span(span));
    recency.into_iter().map(raw).collect()
}

/// The first bytes of a buffer that can be written to, whatever they are yet.
#[allow(unsafe_code)]
pub(super) fn room(into: &mut PyBuffer<u8>, size: usize) -> PyResult<&mut [MaybeUninit<u8>]> {
    if into.readonly() || !into.is_c_contiguous() || into.len_bytes() < size {
        return Err(PyBufferError::new_err("no room for the bytes"));
    }
    let start = into.buf_ptr().cast::<MaybeUninit<u8>>();
    // SAFETY: The buffer has this many bytes, keeps them where they are, and belongs to the caller alone.
    Ok(unsafe { std::slice::from_raw_parts_mut(start, size) })
}

/// Seconds to whole milliseconds; NaN and negative times count as zero.
pub(super) fn millis(seconds: f64) -> u64 {
    (seconds * 1000.0) as u64
}

/// What a look-up may serve, given seconds.
pub(super) fn fresh(now: f64, max_age: Option<f64>) -> Freshness {
    Freshness {
        now: millis(now),
        max_age: max_age.map(age),
    }
}

/// Seconds of a maximum age to whole milliseconds, rounded up.
pub(super) fn age(seconds: f64) -> u64 {
    (seconds * 1000.0).ceil() as u64
}

pub(super) fn limits(
    max_size: Option<u64>,
    max_age: Option<f64>,
    flat_namespace: bool,
    verify: &str,
) -> PyResult<Limits> {
    Ok(Limits {
        max_size: max_size.unwrap_or(u64::MAX),
        max_age: max_age.map(age),
        flat_namespace,
        verify: when_to_verify(verify)?,
    })
}

/// A policy by its names.
pub(super) fn policy(eviction: &str, minimise: &str) -> PyResult<(PolicyKind, Minimise)> {
    let kind = PolicyKind::of(eviction).ok_or_else(|| {
        PyValueError::new_err(format!(
            "eviction={eviction:?} is none of {:?}",
            PolicyKind::ALL.map(PolicyKind::as_str)
        ))
    })?;
    let minimise = Minimise::of(minimise).ok_or_else(|| {
        PyValueError::new_err(format!(
            "minimise={minimise:?} is none of {:?}",
            Minimise::ALL.map(Minimise::as_str)
        ))
    })?;
    Ok((kind, minimise))
}

pub(super) fn policy_names(
    (kind, minimise): (PolicyKind, Minimise),
) -> (&'static str, &'static str) {
    (kind.as_str(), minimise.as_str())
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
    asked: ByteRange,
    found: &Found,
    verify: bool,
    tells_entry: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if asked == ByteRange::Full && !verify && !tells_entry {
        // The common case on the hot path: one small integer.
        return Ok(found.size.into_pyobject(py)?.into_any());
    }
    let name = found.range.cache_key(key);
    let hit = (
        name,
        found.size,
        found.start,
        found.length,
        found.handle,
        found.checksum,
        verify,
    );
    Ok(hit.into_pyobject(py)?.into_any())
}

/// Seconds of [`AbsenceAges`].
pub(super) type RawAges = (f64, Option<f64>);

pub(super) fn absence_ages((own, node): RawAges) -> AbsenceAges {
    AbsenceAges {
        // Any age, if it is infinite.
        own: own.is_finite().then(|| age(own)),
        node: node.map(age),
    }
}

/// Stands for a key that the source does not have.
pub(super) fn absent(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    Ok(false.into_pyobject(py)?.to_owned().into_any())
}
