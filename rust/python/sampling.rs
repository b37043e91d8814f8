//! The sample of the requests: what goes into it, and its way to Python.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use super::backing::step;
use super::convert::{RawSpan, raw_span, span};
use super::index::Index;
use crate::key::Part;
use crate::sampling::{Sample, Trace, UNKNOWN};

#[pymethods]
impl Index {
    fn sample<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let (copy, taken) = step!(self, py, |cache| Ok(cache.sampled()))?;
        sample(py, copy, taken)
    }

    #[pyo3(signature = (key, raw, /))]
    fn retract_request(&self, py: Python<'_>, key: &str, raw: RawSpan) -> PyResult<()> {
        let (key, span) = (&*self.whole(key), span(raw)?);
        step!(self, py, |cache| {
            cache.retract_sampled(key, span);
            Ok(())
        })
    }

    #[pyo3(signature = (key, raw, size, is_hit, /))]
    fn settle_request(
        &self,
        py: Python<'_>,
        key: &str,
        raw: RawSpan,
        size: u64,
        is_hit: bool,
    ) -> PyResult<()> {
        let (key, span) = (&*self.whole(key), span(raw)?);
        step!(self, py, |cache| {
            cache.settle_sampled(key, span, size, is_hit);
            Ok(())
        })
    }

    #[pyo3(signature = (key, raw, was_hit, /))]
    fn miss_request(&self, py: Python<'_>, key: &str, raw: RawSpan, was_hit: bool) -> PyResult<()> {
        let (key, span) = (&*self.whole(key), span(raw)?);
        step!(self, py, |cache| {
            cache.miss_sampled(key, span, was_hit);
            Ok(())
        })
    }

    #[pyo3(signature = (values, /))]
    fn note_sizes(&self, py: Python<'_>, values: Vec<(String, RawSpan, u64)>) -> PyResult<()> {
        let values = (values.iter())
            .map(|(key, raw, size)| Ok((self.whole(key), span(*raw)?, *size)))
            .collect::<PyResult<Vec<_>>>()?;
        step!(self, py, |cache| {
            for (key, span, size) in &values {
                cache.note_sampled_size(key, *span, *size);
            }
            Ok(())
        })
    }
}

/// Requests, rate, whether it has slid, bytes of a block and those beside each entry; then keys, sizes (the greatest number where one is not
/// known), flags, keys of whole values, and byte ranges (kind and two numbers; kind 0 is the whole), as numbers in
/// native byte order.
fn sample(
    py: Python<'_>,
    copy: Option<Box<Sample>>,
    taken: [u64; 2],
) -> PyResult<Bound<'_, PyTuple>> {
    let trace = py.detach(|| copy.map_or_else(Trace::default, |copy| copy.trace()));
    let known = |size: u64| if size == UNKNOWN { u64::MAX } else { size };
    let sizes: Vec<u64> = trace.sizes.into_iter().map(known).collect();
    let numbers = |of: fn(&Part) -> u64| -> Vec<u64> { trace.parts.iter().map(of).collect() };
    let (keys, wholes) = (numbers(|part| part.hash), numbers(|part| part.whole));
    let range = |part: &Part| {
        let (kind, first, second) = raw_span(part.range).unwrap_or_default();
        [u64::from(kind), first, second]
    };
    let ranges: Vec<u64> = trace.parts.iter().flat_map(range).collect();
    let bytes = |numbers: &[u64]| PyBytes::new(py, bytemuck::cast_slice(numbers));
    (
        trace.requests,
        trace.rate,
        trace.has_slid,
        taken,
        bytes(&keys),
        bytes(&sizes),
        PyBytes::new(py, bytemuck::cast_slice(&trace.flags)),
        bytes(&wholes),
        bytes(&ranges),
    )
        .into_pyobject(py)
}
