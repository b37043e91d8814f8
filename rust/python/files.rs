//! Files of values: detach, call, convert.

use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};

use pyo3::prelude::*;

use super::errors::os_error;
use crate::files::{self, Made};

/// A file that is written but not sealed.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct NewFile(Made);

impl From<Made> for NewFile {
    fn from(made: Made) -> Self {
        NewFile(made)
    }
}

#[pymethods]
impl NewFile {
    #[getter]
    fn checksum(&self) -> u32 {
        self.0.checksum
    }

    #[pyo3(signature = (root, name, /))]
    fn seal(&self, root: PathBuf, name: PathBuf) -> PyResult<()> {
        // Some microseconds; to detach and to attach again can take longer than that.
        files::seal(&root, &name, &self.0).map_err(os_error)
    }

    #[pyo3(signature = (root, name, /))]
    fn remove(&self, root: PathBuf, name: PathBuf) -> PyResult<()> {
        files::remove_made(&root, &name, &self.0).map_err(os_error)
    }
}

#[pyfunction]
#[pyo3(signature = (path, data, nanos, /))]
pub(super) fn create_file(
    py: Python<'_>,
    path: PathBuf,
    data: &[u8],
    nanos: i64,
) -> PyResult<NewFile> {
    let made = py.detach(|| files::create(&path, data, nanos));
    made.map(NewFile::from).map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (root, name, unfinished, data, nanos, /))]
pub(super) fn write_file(
    py: Python<'_>,
    root: PathBuf,
    name: PathBuf,
    unfinished: PathBuf,
    data: &[u8],
    nanos: i64,
) -> PyResult<NewFile> {
    let made = py.detach(|| files::write_below(&root, &name, &unfinished, data, nanos));
    made.map(NewFile::from).map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn open_cached(path: &str) -> PyResult<i32> {
    // It does not wait, so nobody else needs the interpreter meanwhile.
    let file = files::open_cached(Path::new(path)).map_err(os_error)?;
    Ok(file.into_raw_fd())
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn noted_file(path: PathBuf) -> Option<(u64, u32)> {
    files::noted(&path)
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn volume_space(path: PathBuf) -> PyResult<(u64, u64)> {
    // Two microseconds; to detach and to attach again can take longer than that.
    files::space(&path).map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (unfinished, path, /))]
pub(super) fn publish_file(py: Python<'_>, unfinished: PathBuf, path: PathBuf) -> PyResult<()> {
    py.detach(|| files::publish(&unfinished, &path))
        .map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn remove_file(py: Python<'_>, path: PathBuf) -> PyResult<bool> {
    py.detach(|| files::remove(&path)).map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn remove_pending(path: PathBuf) -> PyResult<bool> {
    files::remove_pending(&path).map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (root, name, /))]
pub(super) fn remove_file_below(py: Python<'_>, root: PathBuf, name: PathBuf) -> PyResult<()> {
    py.detach(|| files::remove_below(&root, &name))
        .map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (root, name, /))]
pub(super) fn leads_out(py: Python<'_>, root: PathBuf, name: PathBuf) -> bool {
    py.detach(|| files::leads_out(&root, &name))
}
