//! Simulations of the eviction policies.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::convert::policy;
use crate::policy::{Minimise, PolicyKind, Simulation};

/// Which requests a cache would have served; see the stub.
#[pyfunction]
#[pyo3(signature = (eviction, capacity, keys, sizes, /))]
pub(super) fn simulate<'py>(
    py: Python<'py>,
    eviction: &str,
    capacity: u64,
    keys: &[u8],
    sizes: &[u8],
) -> PyResult<Bound<'py, PyBytes>> {
    let (kind, _) = policy(eviction, Minimise::default().as_str())?;
    if keys.len() != sizes.len() {
        return Err(PyValueError::new_err(format!(
            "{} bytes of keys, but {} bytes of sizes: give one size for each key",
            keys.len(),
            sizes.len()
        )));
    }
    let served = py.detach(|| serve(kind, capacity, keys, sizes));
    Ok(PyBytes::new(py, &served))
}

fn serve(kind: PolicyKind, capacity: u64, keys: &[u8], sizes: &[u8]) -> Vec<u8> {
    let mut simulation = Simulation::new(kind, capacity);
    let (keys, sizes) = (keys.as_chunks::<8>().0, sizes.as_chunks::<8>().0);
    let requests = keys.iter().zip(sizes);
    let served = requests.map(|(key, size)| {
        let hash = xxhash_rust::xxh3::xxh3_64(key);
        u8::from(simulation.access(hash, u64::from_ne_bytes(*size)))
    });
    served.collect()
}
