//! Files of values: detach, call, convert.

use std::borrow::Cow;
use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};
use std::path::{Path, PathBuf};

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use rustix::fs::{OFlags, RawMode};

use super::convert::{millis, room};
use super::errors::{exception, os_error, os_error_at};
use crate::disk::{self, below, folders, ownership, removal, residency};
use crate::shared;

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn open_cached(path: Cow<'_, Path>) -> PyResult<i32> {
    // It does not wait, so detaching would gain nothing.
    let file = below::open_cached(&path).map_err(os_error)?;
    Ok(file.into_raw_fd())
}

#[pyfunction]
#[pyo3(signature = (file, /))]
#[allow(unsafe_code)]
pub(super) fn tells_residency(file: RawFd) -> PyResult<bool> {
    if file < 0 {
        return Err(os_error(rustix::io::Errno::BADF.into()));
    }
    // SAFETY: The caller keeps it open during the call. Of any other number the kernel says what it is.
    let file = unsafe { BorrowedFd::borrow_raw(file) };
    Ok(residency::tells_residency(file))
}

#[pyfunction]
#[pyo3(signature = (path, into, total, start, size, /))]
pub(super) fn read_resident(
    py: Python<'_>,
    path: Cow<'_, Path>,
    mut into: PyBuffer<u8>,
    total: u64,
    start: u64,
    size: usize,
) -> PyResult<Option<f64>> {
    let bytes = room(&mut into, size)?;
    let waited = py.detach(|| residency::read_resident(&path, bytes, total, start));
    Ok(waited.map_err(os_error)?.map(|waited| waited.as_secs_f64()))
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn make_way(path: PathBuf) -> PyResult<()> {
    // Two calls of the system on a folder that is in memory; detaching and attaching can take longer.
    shared::make_way_at(&path).map_err(|error| os_error_at(error, &path))
}

#[pyfunction]
#[pyo3(signature = (path, flags, /))]
pub(super) fn open_own(py: Python<'_>, path: PathBuf, flags: u32) -> PyResult<i32> {
    let file = py.detach(|| shared::open_own(&path, OFlags::from_bits_retain(flags)));
    let file = file.map_err(|error| os_error_at(error, &path))?;
    Ok(file.into_raw_fd())
}

#[pyfunction]
#[pyo3(signature = (path, mode=None, /, *, group_writes=false))]
pub(super) fn make_folder(
    py: Python<'_>,
    path: PathBuf,
    mode: Option<u16>,
    group_writes: bool,
) -> PyResult<()> {
    py.detach(|| shared::make_folder(&path, mode.map(RawMode::from), group_writes))
        .map_err(|error| os_error_at(error, &path))
}

#[pyfunction]
#[pyo3(signature = (root, name, /))]
pub(super) fn open_value(py: Python<'_>, root: PathBuf, name: PathBuf) -> PyResult<i32> {
    let file = py.detach(|| below::open_value(&root, &name));
    Ok(file.map_err(os_error)?.into_raw_fd())
}

#[pyfunction]
#[pyo3(signature = (root, name, /))]
pub(super) fn open_folder(py: Python<'_>, root: PathBuf, name: PathBuf) -> PyResult<i32> {
    let folder = py.detach(|| below::open_folder(&root, &name));
    Ok(folder.map_err(os_error)?.into_raw_fd())
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn recorded_size_and_checksum(py: Python<'_>, path: PathBuf) -> Option<(u64, u32)> {
    py.detach(|| ownership::recorded(&path))
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn volume_space(path: PathBuf) -> PyResult<(u64, u64, u64)> {
    // Two microseconds; detaching and attaching can take longer.
    let space = disk::space(&path).map_err(os_error)?;
    Ok((space.free, space.total, space.min_free()))
}

#[pyfunction]
#[pyo3(signature = (root, names, known, now, /))]
pub(super) fn remove_victims<'py>(
    py: Python<'py>,
    root: PathBuf,
    names: Vec<String>,
    known: Vec<Option<(u64, u32)>>,
    now: f64,
) -> Vec<Option<Bound<'py, PyAny>>> {
    let now = millis(now);
    let remove = |(name, known): (&String, Option<(u64, u32)>)| {
        let was = removal::remove_known(&root, Path::new(name), known)?;
        if was == removal::Was::Nothing {
            // Best effort, as a tombstone is.
            let _ = removal::mark_missing(&root, name, now);
        }
        Ok(())
    };
    let all: Vec<std::io::Result<()>> = py.detach(|| names.iter().zip(known).map(remove).collect());
    let exceptions = all
        .into_iter()
        .map(|one| one.err().map(|e| exception(py, e)));
    exceptions.collect()
}

#[pyfunction]
#[pyo3(signature = (root, names, /))]
pub(super) fn remove_files<'py>(
    py: Python<'py>,
    root: PathBuf,
    names: Vec<PathBuf>,
) -> Vec<Option<Bound<'py, PyAny>>> {
    let remove = |name: &PathBuf| removal::remove_below(&root, name);
    let all: Vec<_> = py.detach(|| names.iter().map(remove).collect());
    let exceptions = all
        .into_iter()
        .map(|one| one.err().map(|e| exception(py, e)));
    exceptions.collect()
}

#[pyfunction]
#[pyo3(signature = (root, key, /))]
pub(super) fn remove_key<'py>(
    py: Python<'py>,
    root: PathBuf,
    key: &str,
) -> Vec<(String, Bound<'py, PyAny>)> {
    let failed = py.detach(|| removal::remove_key(&root, key));
    let failed = failed.into_iter();
    failed
        .map(|(name, error)| (name, exception(py, error)))
        .collect()
}

#[pyfunction]
#[pyo3(signature = (root, key, /))]
pub(super) fn is_absent(root: Cow<'_, Path>, key: &str) -> bool {
    // It does not wait, so no other thread needs the interpreter meanwhile.
    removal::is_absent(&root, key)
}

#[pyfunction]
#[pyo3(signature = (root, name, /))]
pub(super) fn write_tombstone(py: Python<'_>, root: PathBuf, name: &str) -> PyResult<()> {
    py.detach(|| removal::write_tombstone(&root, name))
        .map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (path, size, checksum, /))]
pub(super) fn file_holds(
    py: Python<'_>,
    path: PathBuf,
    size: u64,
    checksum: u32,
) -> PyResult<bool> {
    py.detach(|| ownership::holds(&path, size, checksum))
        .map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn read_record(py: Python<'_>, path: PathBuf) -> Option<(u64, u32, bool, u64, [u8; 8])> {
    let record = py.detach(|| ownership::record_of(&path))?;
    let (size, checksum) = (record.size, record.checksum);
    Some((size, checksum, record.sealed, record.fetched, record.source))
}

#[pyfunction]
#[pyo3(signature = (path, /))]
pub(super) fn file_owner(py: Python<'_>, path: PathBuf) -> PyResult<&'static str> {
    let owner = py.detach(|| ownership::owner(&path));
    let owner = owner.map_err(|errno| os_error(errno.into()))?;
    Ok(match owner {
        ownership::Owner::Ours => "ours",
        ownership::Owner::Pending => "pending",
        ownership::Owner::Foreign => "foreign",
    })
}

#[pyfunction]
#[pyo3(signature = (root, name, fetched, /))]
pub(super) fn sign_file(
    py: Python<'_>,
    root: PathBuf,
    name: PathBuf,
    fetched: u64,
) -> PyResult<()> {
    py.detach(|| ownership::sign(&root, &name, fetched))
        .map_err(os_error)
}

#[pyfunction]
#[pyo3(signature = (root, name, /))]
pub(super) fn remove_empty_folder(py: Python<'_>, root: PathBuf, name: PathBuf) -> bool {
    py.detach(|| folders::remove_empty(&root, &name))
}

#[pyfunction]
pub(super) fn take_folder_bytes() -> i64 {
    folders::take_folders()
}
