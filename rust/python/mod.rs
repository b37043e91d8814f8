//! The Python bindings: the module `zcache._core`, and functions that belong to no class.

mod ages;
mod backing;
mod contents;
mod convert;
mod counters;
mod decoded;
mod deletes;
mod errors;
mod files;
mod fill;
mod flights;
mod held;
mod index;
mod limits;
mod lookups;
mod memory;
mod participants;
mod plan;
mod pool;
mod rebuild;
mod reservation;
mod reserve;
mod sampling;
mod segment_reader;
mod simulation;
mod validators;
mod writes;

use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};

use self::convert::{RawSpan, known, span};
use self::errors::{CorruptIndexError, IndexBusyError, IndexFullError};
use crate::cache::{BESIDES, NODES, RejectReason};
use crate::checksum::crc32c;
use crate::disk::fill::NO_SPACE_ON_VOLUME;
use crate::key;
use crate::policy::{Minimise, PolicyKind};

#[pyfunction]
#[pyo3(signature = (key, raw, /))]
fn cache_key(key: &str, raw: RawSpan) -> PyResult<String> {
    Ok(span(raw)?.cache_key(key))
}

#[pyfunction]
#[pyo3(signature = (size, raw, slices_like_python, /))]
fn select(size: u64, raw: RawSpan, slices_like_python: bool) -> PyResult<Option<(u64, u64)>> {
    Ok(key::select(size, span(raw)?, slices_like_python))
}

#[pyfunction]
#[pyo3(signature = (key, /))]
fn is_cacheable_key(key: &Bound<'_, PyString>) -> bool {
    known(key).is_some()
}

/// Bytes from which on other threads may run while a checksum is computed.
const DETACH_FROM: usize = 64 * 1024;

#[pyfunction]
#[pyo3(name = "crc32c", signature = (data, /))]
fn checksum(py: Python<'_>, data: &[u8]) -> u32 {
    if data.len() < DETACH_FROM {
        crc32c(data)
    } else {
        py.detach(|| crc32c(data))
    }
}

#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // The first use of numpy imports parts of it, and panics where a signal handler raises meanwhile.
    let _ = numpy::dtype::<u8>(module.py());
    // The first checksum chooses how they are computed, once: a child that is forked meanwhile would wait for that for ever.
    let _ = crc32c(&[0; 4096]);
    module.add(
        "CorruptIndexError",
        module.py().get_type::<CorruptIndexError>(),
    )?;
    module.add("IndexFullError", module.py().get_type::<IndexFullError>())?;
    module.add("IndexBusyError", module.py().get_type::<IndexBusyError>())?;
    module.add("MAX_KEY", key::MAX_KEY)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    let policies = PolicyKind::ALL.map(PolicyKind::as_str);
    module.add("POLICIES", PyTuple::new(module.py(), policies)?)?;
    let minimised = Minimise::ALL.map(Minimise::as_str);
    module.add("MINIMISED", PyTuple::new(module.py(), minimised)?)?;
    module.add("DEFAULT_POLICY", PolicyKind::default().as_str())?;
    module.add("DEFAULT_MINIMISED", Minimise::default().as_str())?;
    module.add("PATH_CONFLICT", RejectReason::PathConflict.as_str())?;
    module.add("NO_SPACE_ON_VOLUME", NO_SPACE_ON_VOLUME)?;
    module.add("NODES", PyTuple::new(module.py(), NODES)?)?;
    let documents: Vec<_> = NODES.iter().chain(&BESIDES).collect();
    module.add("METADATA", PyTuple::new(module.py(), documents)?)?;
    module.add_class::<index::Index>()?;
    module.add_class::<ages::Ages>()?;
    module.add_class::<plan::Plan>()?;
    module.add_class::<counters::ReadCounters>()?;
    module.add_class::<counters::Stats>()?;
    module.add_class::<reservation::Reservation>()?;
    module.add_class::<reservation::Granted>()?;
    module.add_class::<reservation::NeedsEviction>()?;
    module.add_class::<reservation::Rejected>()?;
    module.add_class::<reservation::Committed>()?;
    {
        module.add("SIGNATURE", crate::disk::ownership::SIGNATURE)?;
        module.add("PENDING", crate::disk::ownership::PENDING)?;
        module.add("VALUE_HEADER", crate::cache::VALUE_HEADER)?;
        module.add_class::<fill::DirectoryFills>()?;
        module.add_class::<fill::FillResult>()?;
        module.add_class::<held::HeldLock>()?;
        module.add_class::<pool::SegmentFiles>()?;
        module.add_class::<pool::SegmentScan>()?;
        module.add_class::<segment_reader::SegmentReader>()?;
        module.add_function(wrap_pyfunction!(fill::end_calls, module)?)?;
        module.add_function(wrap_pyfunction!(files::open_cached, module)?)?;
        module.add_function(wrap_pyfunction!(files::tells_residency, module)?)?;
        module.add_function(wrap_pyfunction!(files::read_resident, module)?)?;
        module.add_function(wrap_pyfunction!(files::recorded_size_and_checksum, module)?)?;
        module.add_function(wrap_pyfunction!(files::volume_space, module)?)?;
        module.add_function(wrap_pyfunction!(files::make_way, module)?)?;
        module.add_function(wrap_pyfunction!(files::make_folder, module)?)?;
        module.add_function(wrap_pyfunction!(files::open_own, module)?)?;
        module.add_function(wrap_pyfunction!(files::open_value, module)?)?;
        module.add_function(wrap_pyfunction!(files::open_folder, module)?)?;
        module.add_function(wrap_pyfunction!(files::remove_files, module)?)?;
        module.add_function(wrap_pyfunction!(files::remove_victims, module)?)?;
        module.add_function(wrap_pyfunction!(files::remove_key, module)?)?;
        module.add_function(wrap_pyfunction!(files::is_absent, module)?)?;
        module.add_function(wrap_pyfunction!(files::write_tombstone, module)?)?;
        module.add_function(wrap_pyfunction!(files::remove_empty_folder, module)?)?;
        module.add_function(wrap_pyfunction!(files::read_record, module)?)?;
        module.add_function(wrap_pyfunction!(files::file_holds, module)?)?;
        module.add_function(wrap_pyfunction!(files::take_folder_bytes, module)?)?;
        module.add_function(wrap_pyfunction!(files::file_owner, module)?)?;
        module.add_function(wrap_pyfunction!(files::sign_file, module)?)?;
    }
    module.add_function(wrap_pyfunction!(cache_key, module)?)?;
    module.add_function(wrap_pyfunction!(checksum, module)?)?;
    module.add_function(wrap_pyfunction!(is_cacheable_key, module)?)?;
    module.add_function(wrap_pyfunction!(select, module)?)?;
    module.add_function(wrap_pyfunction!(simulation::simulate, module)?)?;
    Ok(())
}
