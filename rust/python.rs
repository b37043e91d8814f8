//! The only part that knows Python: its module, and functions without a home elsewhere.

mod backing;
mod convert;
mod errors;
#[cfg(unix)]
mod files;
mod index;
mod memory;
#[cfg(unix)]
mod offload;
mod reservation;

use pyo3::prelude::*;
use pyo3::types::PyString;

use self::convert::{RawSpan, known, span};
use self::errors::{CorruptIndexError, IndexBusyError, IndexFullError};
use crate::cache;

#[pyfunction]
#[pyo3(signature = (key, raw, /))]
fn cache_key(key: &str, raw: RawSpan) -> PyResult<String> {
    Ok(span(raw)?.cache_key(key))
}

#[pyfunction]
#[pyo3(signature = (size, raw, lenient, /))]
fn select(size: u64, raw: RawSpan, lenient: bool) -> PyResult<Option<(u64, u64)>> {
    Ok(cache::select(size, span(raw)?, lenient))
}

#[pyfunction]
#[pyo3(signature = (key, /))]
fn is_known(key: &Bound<'_, PyString>) -> bool {
    known(key).is_some()
}

/// Bytes from which on other threads may run while a checksum is computed.
const DETACH_FROM: usize = 64 * 1024;

#[pyfunction]
#[pyo3(name = "crc32c", signature = (data, /))]
fn checksum(py: Python<'_>, data: &[u8]) -> u32 {
    if data.len() < DETACH_FROM {
        ::crc32c::crc32c(data)
    } else {
        py.detach(|| ::crc32c::crc32c(data))
    }
}

#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add(
        "CorruptIndexError",
        module.py().get_type::<CorruptIndexError>(),
    )?;
    module.add("IndexFullError", module.py().get_type::<IndexFullError>())?;
    module.add("IndexBusyError", module.py().get_type::<IndexBusyError>())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<index::Index>()?;
    module.add_class::<reservation::Reservation>()?;
    #[cfg(unix)]
    {
        module.add("SIGNATURE", crate::files::SIGNATURE)?;
        module.add("PENDING", crate::files::PENDING)?;
        module.add_class::<files::NewFile>()?;
        module.add_class::<offload::Workers>()?;
        module.add_class::<offload::Desk>()?;
        module.add_function(wrap_pyfunction!(files::create_file, module)?)?;
        module.add_function(wrap_pyfunction!(files::write_file, module)?)?;
        module.add_function(wrap_pyfunction!(files::open_cached, module)?)?;
        module.add_function(wrap_pyfunction!(files::noted_file, module)?)?;
        module.add_function(wrap_pyfunction!(files::publish_file, module)?)?;
        module.add_function(wrap_pyfunction!(files::volume_space, module)?)?;
        module.add_function(wrap_pyfunction!(files::remove_file, module)?)?;
        module.add_function(wrap_pyfunction!(files::remove_file_below, module)?)?;
        module.add_function(wrap_pyfunction!(files::remove_pending, module)?)?;
        module.add_function(wrap_pyfunction!(files::leads_out, module)?)?;
    }
    module.add_function(wrap_pyfunction!(cache_key, module)?)?;
    module.add_function(wrap_pyfunction!(checksum, module)?)?;
    module.add_function(wrap_pyfunction!(is_known, module)?)?;
    module.add_function(wrap_pyfunction!(select, module)?)?;
    Ok(())
}
