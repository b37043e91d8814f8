//! Simulations of the eviction policies.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::convert::policy;
use crate::key::{ByteRange, Part};
use crate::policy::{Minimise, Simulation};

/// Which requests a cache would have served; see the stub.
#[pyfunction]
#[allow(
    clippy::too_many_arguments,
    reason = "each is a column, or what is simulated"
)]
#[pyo3(signature = (eviction, capacity, keys, sizes, parts=None, slices_like_python=false, kinds=None, lens=None, /))]
pub(super) fn simulate<'py>(
    py: Python<'py>,
    eviction: &str,
    capacity: u64,
    keys: &[u8],
    sizes: &[u8],
    parts: Option<&[u8]>,
    slices_like_python: bool,
    kinds: Option<&[u8]>,
    lens: Option<&[u8]>,
) -> PyResult<Bound<'py, PyBytes>> {
    let (kind, _) = policy(eviction, Minimise::default().as_str())?;
    if keys.len() != sizes.len() {
        return Err(PyValueError::new_err(format!(
            "{} bytes of keys, but {} bytes of sizes: give one size for each key",
            keys.len(),
            sizes.len()
        )));
    }
    let (parts, kinds) = (parts.unwrap_or_default(), kinds.unwrap_or_default());
    let lens = lens.unwrap_or(sizes);
    let simulation = Simulation::new(kind, capacity).of_source(slices_like_python);
    let served = py.detach(|| serve(simulation, [keys, sizes, lens], kinds, parts));
    Ok(PyBytes::new(py, &served))
}

/// Numbers that say what a key is a byte range of: the key of the whole value, kind and numbers as those of
/// [`RawSpan`](super::convert::RawSpan), 0 being the whole.
const PART: usize = 4;

/// Kinds of steps, of which all others are reads: of what is too old, if it is held; a write has dropped a value;
/// and what it has written takes the place.
const OUTDATED: u8 = 1;
const DROPPED: u8 = 2;
const FILLED: u8 = 3;

fn serve(mut simulation: Simulation, steps: [&[u8]; 3], kinds: &[u8], parts: &[u8]) -> Vec<u8> {
    let [keys, sizes, lens] = steps.map(|column| column.as_chunks::<8>().0);
    let parts = parts.as_chunks::<8>().0.as_chunks::<PART>().0;
    let kinds = kinds.iter().copied().chain(std::iter::repeat(0));
    let steps = keys.iter().zip(sizes).zip(lens).zip(kinds);
    let served = steps.map(|(((key, size), len), kind)| {
        let (hash, size) = (hash(key), u64::from_ne_bytes(*size));
        let about = parts.get(u64::from_ne_bytes(*key) as usize);
        let part = about.and_then(|about| part(hash, about));
        let part = part.unwrap_or_else(|| Part::of_whole(hash));
        let len = u64::from_ne_bytes(*len);
        let is_hit = match kind {
            OUTDATED => simulation.refresh_part(part, len, size),
            DROPPED | FILLED => {
                simulation.write(hash, (kind == FILLED).then_some(size));
                false
            }
            _ => simulation.access_part(part, len, size),
        };
        u8::from(is_hit)
    });
    served.collect()
}

fn hash(key: &[u8; 8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key)
}

/// A byte range; `None` for a whole value.
fn part(hash_of_key: u64, about: &[[u8; 8]; PART]) -> Option<Part> {
    let [_, kind, first, second] = about.map(u64::from_ne_bytes);
    let range = match kind {
        0 => return None,
        1 => ByteRange::Range {
            start: first,
            end: second,
        },
        2 => ByteRange::Offset(first),
        _ => ByteRange::Suffix(first),
    };
    Some(Part {
        hash: hash_of_key,
        whole: hash(&about[0]),
        range,
    })
}
