//! Samples of requests on their way to Python, and what a cache would have made of them.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::key::hash_word;
use crate::policy::{PolicyKind, Simulation};
use crate::sampling::{Trace, UNKNOWN};

/// Requests, rate, whether it has slid, dropped, dropped first ones, unit; then keys, sizes (the
/// greatest number where one is not known) and flags, as numbers in native byte order.
pub(super) fn sample(py: Python<'_>, trace: Trace, unit: u64) -> PyResult<Bound<'_, PyTuple>> {
    let known = |size: u64| if size == UNKNOWN { u64::MAX } else { size };
    let sizes: Vec<u64> = trace.sizes.into_iter().map(known).collect();
    let keys = PyBytes::new(py, bytemuck::cast_slice(&trace.keys));
    let sizes = PyBytes::new(py, bytemuck::cast_slice(&sizes));
    let flags = PyBytes::new(py, bytemuck::cast_slice(&trace.flags));
    (
        trace.requests,
        trace.rate,
        trace.has_slid,
        trace.dropped,
        trace.dropped_first,
        unit,
        keys,
        sizes,
        flags,
    )
        .into_pyobject(py)
}

#[pyfunction]
#[pyo3(signature = (policy, capacity, keys, sizes, /))]
pub(super) fn simulate<'py>(
    py: Python<'py>,
    policy: &str,
    capacity: u64,
    keys: &[u8],
    sizes: &[u8],
) -> PyResult<Bound<'py, PyBytes>> {
    let kind = match policy {
        "lru" => PolicyKind::Lru,
        "none" => PolicyKind::None,
        "adaptive" => PolicyKind::Adaptive,
        other => {
            return Err(PyValueError::new_err(format!(
                "policy={other:?} is none of \"lru\", \"none\" and \"adaptive\""
            )));
        }
    };
    let hits: Vec<u8> = py.detach(|| {
        let mut simulation = Simulation::new(kind, capacity);
        // Keys that were sampled by their hashes are alike in the upper bits.
        let mixed = numbers(keys).map(|key| hash_word(key.to_le_bytes(), 8, 0, 0));
        let requests = mixed.zip(numbers(sizes));
        requests
            .map(|(key, size)| u8::from(simulation.access(key, size)))
            .collect()
    });
    Ok(PyBytes::new(py, &hits))
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let words = bytes.as_chunks().0.iter();
    words.map(|word| u64::from_ne_bytes(*word))
}
