//! Files of values: detach, call, convert.

use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};

use pyo3::prelude::*;

use super::errors::{exception, os_error};
use crate::disk::value_file;

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn open_cached(path: &str) -> PyResult<i32> {
    // It does not wait, so detaching would gain nothing.
    let file = value_file::open_cached(Path::new(path)).map_err(os_error)?;
    Ok(file.into_raw_fd())
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn recorded_size_and_checksum(path: PathBuf) -> Option<(u64, u32)> {
    value_file::recorded(&path)
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn volume_space(path: PathBuf) -> PyResult<(u64, u64)> {
    // Two microseconds; detaching and attaching can take longer.
    value_file::space(&path).map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn remove_file(py: Python<'_>, path: PathBuf) -> PyResult<bool> {
    py.detach(|| value_file::remove(&path)).map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (root, names, /))]
pub(super) fn remove_files<'py>(
    py: Python<'py>,
    root: PathBuf,
    names: Vec<PathBuf>,
) -> Vec<Option<Bound<'py, PyAny>>> {
    let all = py.detach(|| {
        let each = names
            .iter()
            .map(|name| value_file::remove_below(&root, name));
        each.collect::<Vec<_>>()
    });
    let exceptions = all
        .into_iter()
        .map(|one| one.err().map(|e| exception(py, e)));
    exceptions.collect()
}

#[pyfunction]
#[pyo3(signature = (root, name, /))]
pub(super) fn leads_outside(py: Python<'_>, root: PathBuf, name: PathBuf) -> bool {
    py.detach(|| value_file::leads_outside(&root, &name))
}
