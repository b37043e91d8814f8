//! Simulations of the eviction policies.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::convert::policy;
use crate::key::{ByteRange, Part};
use crate::policy::{Minimise, Simulation};

/// Which requests a cache would have served; see the stub.
#[pyfunction]
#[pyo3(signature = (eviction, capacity, keys, sizes, parts=None, slices_like_python=false, /))]
pub(super) fn simulate<'py>(
    py: Python<'py>,
    eviction: &str,
    capacity: u64,
    keys: &[u8],
    sizes: &[u8],
    parts: Option<&[u8]>,
    slices_like_python: bool,
) -> PyResult<Bound<'py, PyBytes>> {
    let (kind, _) = policy(eviction, Minimise::default().as_str())?;
    if keys.len() != sizes.len() {
        return Err(PyValueError::new_err(format!(
            "{} bytes of keys, but {} bytes of sizes: give one size for each key",
            keys.len(),
            sizes.len()
        )));
    }
    let parts = parts.unwrap_or_default();
    let simulation = Simulation::new(kind, capacity).of_source(slices_like_python);
    let served = py.detach(|| serve(simulation, [keys, sizes], parts));
    Ok(PyBytes::new(py, &served))
}

/// Numbers that say what a key is a byte range of: the key of the whole value, kind and numbers as those of
/// [`RawSpan`](super::convert::RawSpan), 0 being the whole, and its bytes.
const PART: usize = 5;

fn serve(mut simulation: Simulation, requests: [&[u8]; 2], parts: &[u8]) -> Vec<u8> {
    let [keys, sizes] = requests.map(|column| column.as_chunks::<8>().0);
    let parts = parts.as_chunks::<8>().0.as_chunks::<PART>().0;
    let requests = keys.iter().zip(sizes);
    let served = requests.map(|(key, size)| {
        let (hash, size) = (hash(key), u64::from_ne_bytes(*size));
        let about = parts.get(u64::from_ne_bytes(*key) as usize);
        let is_hit = match about.and_then(|about| part(hash, about)) {
            Some((part, len)) => simulation.access_part(part, len, size),
            None => simulation.access(hash, size),
        };
        u8::from(is_hit)
    });
    served.collect()
}

fn hash(key: &[u8; 8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key)
}

/// A byte range and its bytes; `None` for a whole value.
fn part(hash_of_key: u64, about: &[[u8; 8]; PART]) -> Option<(Part, u64)> {
    let [_, kind, first, second, len] = about.map(u64::from_ne_bytes);
    let range = match kind {
        0 => return None,
        1 => ByteRange::Range {
            start: first,
            end: second,
        },
        2 => ByteRange::Offset(first),
        _ => ByteRange::Suffix(first),
    };
    let part = Part {
        hash: hash_of_key,
        whole: hash(&about[0]),
        range,
    };
    Some((part, len))
}
