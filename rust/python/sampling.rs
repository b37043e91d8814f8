//! Samples of requests on their way to Python.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::sampling::{Sample, Trace, UNKNOWN};

/// Requests, rate, whether it has slid, unit; then keys, sizes (the greatest number where one is not
/// known) and flags, as numbers in native byte order.
pub(super) fn sample(
    py: Python<'_>,
    copy: Option<Box<Sample>>,
    unit: u64,
) -> PyResult<Bound<'_, PyTuple>> {
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
