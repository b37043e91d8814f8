//! The sample of the requests: what goes into it, and its way to Python.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use super::backing::step;
use super::convert::{RawSpan, span};
use super::index::Index;
use crate::key::ByteRange;
use crate::sampling::{Sample, Trace, UNKNOWN};

#[pymethods]
impl Index {
    fn sample<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let (copy, unit) = step!(self, py, |cache| Ok(cache.sampled()))?;
        sample(py, copy, unit)
    }

    #[pyo3(signature = (key, raw, /))]
    fn retract_request(&self, py: Python<'_>, key: &str, raw: RawSpan) -> PyResult<()> {
        let (key, span) = (&*self.whole(key), span(raw)?);
        step!(self, py, |cache| {
            cache.retract_sampled(key, span);
            Ok(())
        })
    }

    #[pyo3(signature = (key, raw, entry, size, is_hit, /))]
    fn settle_request(
        &self,
        py: Python<'_>,
        key: &str,
        raw: RawSpan,
        entry: RawSpan,
        size: u64,
        is_hit: bool,
    ) -> PyResult<()> {
        let (key, span, entry) = (&*self.whole(key), span(raw)?, span(entry)?);
        step!(self, py, |cache| {
            cache.settle_sampled(key, span, entry, size, is_hit);
            Ok(())
        })
    }

    #[pyo3(signature = (key, raw, name, /))]
    fn miss_request(&self, py: Python<'_>, key: &str, raw: RawSpan, name: &str) -> PyResult<()> {
        let (key, span) = (&*self.whole(key), span(raw)?);
        let entry = ByteRange::parse(name).map_or(span, |(_, range)| range);
        step!(self, py, |cache| {
            cache.miss_sampled(key, span, entry);
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

/// Requests, rate, whether it has slid, unit; then keys, sizes (the greatest number where one is not
/// known) and flags, as numbers in native byte order.
fn sample(py: Python<'_>, copy: Option<Box<Sample>>, unit: u64) -> PyResult<Bound<'_, PyTuple>> {
    let trace = py.detach(|| copy.map_or_else(Trace::default, |copy| copy.trace()));
    let known = |size: u64| if size == UNKNOWN { u64::MAX } else { size };
    let sizes: Vec<u64> = trace.sizes.into_iter().map(known).collect();
    let keys = PyBytes::new(py, bytemuck::cast_slice(&trace.keys));
    let sizes = PyBytes::new(py, bytemuck::cast_slice(&sizes));
    let flags = PyBytes::new(py, bytemuck::cast_slice(&trace.flags));
    (
        trace.requests,
        trace.rate,
        trace.has_slid,
        unit,
        keys,
        sizes,
        flags,
    )
        .into_pyobject(py)
}
