//! A pool: the view that one source has of its index, and the files of its segments.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::backing::{Flight, step};
use super::errors::{exception, os_error};
use super::index::Index;
use crate::cache::{Cache, Peers, Placed};
use crate::disk::segments::{self, Found};
use crate::error::Result;
use crate::key::ByteRange;

/// One source of a pool: its keys are below a folder of their own in the index.
#[derive(Debug)]
pub(super) struct Source {
    /// Its label and a slash.
    pub(super) folder: Box<str>,
    /// What was looked up last: it is read next.
    last: Mutex<Option<Last>>,
}

#[derive(Debug)]
struct Last {
    name: String,
    place: FoundPlace,
}

/// An entry, and where its bytes are.
#[derive(Clone, Copy, Debug)]
pub(super) struct FoundPlace {
    pub(super) cell: u32,
    pub(super) word: u64,
    pub(super) placed: Placed,
}

impl FoundPlace {
    pub(super) fn of<S: Peers>(cache: &Cache<S, Flight>, cell: u32) -> Result<Option<Self>> {
        let placed = cache.placed(cell)?;
        Ok(placed.map(|placed| FoundPlace {
            cell,
            word: cache.place_word(cell),
            placed,
        }))
    }
}

impl Source {
    pub(super) fn new(label: &str) -> Self {
        Source {
            folder: format!("{label}/").into(),
            last: Mutex::default(),
        }
    }

    pub(super) fn label(&self) -> &str {
        self.folder.strip_suffix('/').unwrap_or(&self.folder)
    }

    fn last(&self) -> MutexGuard<'_, Option<Last>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps where an entry was found, for the read that follows.
    pub(super) fn remember(&self, key: &str, range: ByteRange, place: Option<FoundPlace>) {
        let Some(place) = place else { return };
        let mut last = self.last();
        // In the same memory: this is done at each hit.
        let mut name = last.take().map_or_else(String::new, |last| last.name);
        name.clear();
        match range {
            ByteRange::Full => name.push_str(key),
            _ => name = range.cache_key(key),
        }
        *last = Some(Last { name, place });
    }

    pub(super) fn recall(&self, name: &str) -> Option<FoundPlace> {
        let last = self.last();
        let last = last.as_ref().filter(|last| last.name == name);
        last.map(|last| last.place)
    }
}

/// What stands for the name of a value with a known place.
pub(super) fn place_name(placed: Placed) -> String {
    let Placed {
        segment,
        page,
        size,
        capacity,
    } = placed;
    format!("{segment:016x}.{page}.{size}.{capacity}")
}

fn place_of(name: &str) -> Option<Placed> {
    let mut parts = name.split('.');
    let segment = u64::from_str_radix(parts.next()?, 16).ok()?;
    let page = parts.next()?.parse().ok()?;
    let size = parts.next()?.parse().ok()?;
    let capacity = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(Placed {
        segment,
        page,
        size,
        capacity,
    })
}

/// See the stub.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct SegmentFiles(Arc<segments::SegmentFiles>);

impl SegmentFiles {
    pub(super) fn files(&self) -> Arc<segments::SegmentFiles> {
        Arc::clone(&self.0)
    }
}

#[pymethods]
impl SegmentFiles {
    #[new]
    #[pyo3(signature = (root, /, *, holes))]
    fn new(root: PathBuf, holes: bool) -> Self {
        SegmentFiles(Arc::new(segments::SegmentFiles::new(root, holes)))
    }

    #[staticmethod]
    #[pyo3(signature = (folder, /))]
    fn can_punch(py: Python<'_>, folder: PathBuf) -> PyResult<bool> {
        py.detach(|| segments::can_punch(&folder)).map_err(os_error)
    }

    /// Numbers of all segments.
    fn numbers(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        py.detach(|| self.0.list()).map_err(os_error)
    }

    #[pyo3(signature = (numbers, cleans, /))]
    fn scan(&self, py: Python<'_>, numbers: Vec<u64>, cleans: bool) -> PyResult<SegmentScan> {
        let found = py.detach(|| segments::scan_listed(&self.0, &numbers, cleans));
        Ok(SegmentScan(Mutex::new(found.map_err(os_error)?)))
    }

    /// Deletes values by what stands for their names.
    #[pyo3(signature = (names, /))]
    fn delete<'py>(
        &self,
        py: Python<'py>,
        names: Vec<String>,
    ) -> PyResult<Vec<Option<Bound<'py, PyAny>>>> {
        let places = names.iter().map(|name| {
            place_of(name)
                .ok_or_else(|| PyValueError::new_err(format!("{name:?} is no place of a value")))
        });
        let places = places.collect::<PyResult<Vec<_>>>()?;
        let all: Vec<_> = py.detach(|| {
            let deletes = places.into_iter().map(|placed| self.0.delete(placed));
            deletes.collect()
        });
        let exceptions = all
            .into_iter()
            .map(|one| one.err().map(|e| exception(py, e)));
        Ok(exceptions.collect())
    }

    /// Has a rebuild ignore values that could not be deleted; best effort.
    #[pyo3(signature = (names, /))]
    fn unseal(&self, py: Python<'_>, names: Vec<String>) {
        py.detach(|| {
            for placed in names.iter().filter_map(|name| place_of(name)) {
                let _ = self.0.unseal(placed);
            }
        });
    }

    /// Deletes all values at and below a prefix, whether or not an index knows them.
    #[pyo3(signature = (prefix, only_counts=false, /))]
    fn delete_below(&self, py: Python<'_>, prefix: &str, only_counts: bool) -> PyResult<usize> {
        py.detach(|| segments::delete_below(&self.0, prefix, only_counts))
            .map_err(os_error)
    }

    #[getter]
    fn walked(&self) -> u64 {
        self.0.walked()
    }

    /// Name, bytes and fetch time of each value, valid or not yet.
    fn values(&self, py: Python<'_>) -> PyResult<Vec<(String, u64, u64)>> {
        let found = py.detach(|| segments::walk(&self.0)).map_err(os_error)?;
        let value = |value: segments::FoundValue| (value.name, value.placed.size, value.fetched);
        Ok(found.into_iter().map(value).collect())
    }

    #[pyo3(signature = (number, /))]
    fn remove(&self, py: Python<'_>, number: u64) -> PyResult<()> {
        py.detach(|| self.0.remove(number)).map_err(os_error)
    }

    /// Deletes all values of a segment, with its file.
    #[pyo3(signature = (number, /))]
    fn empty(&self, py: Python<'_>, number: u64) -> PyResult<()> {
        py.detach(|| self.0.empty(number)).map_err(os_error)
    }

    fn close(&self) {
        self.0.close();
    }
}

/// See the stub.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct SegmentScan(Mutex<Found>);

impl SegmentScan {
    pub(super) fn found(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl SegmentScan {
    fn __len__(&self) -> usize {
        self.found().values.len()
    }

    #[getter]
    fn size(&self) -> u64 {
        let sizes = |found: &Found| found.values.iter().map(|value| value.placed.size).sum();
        sizes(&self.found())
    }
}

#[pymethods]
impl Index {
    /// Each segment: its number, and the most bytes that its file takes; see the stub.
    fn segment_sizes(&self, py: Python<'_>) -> PyResult<Vec<(u64, u64)>> {
        step!(self, py, |cache| cache.segment_sizes())
    }

    /// Gives back what these segments hold beside the entries; see the stub.
    #[pyo3(signature = (files, numbers, /))]
    #[allow(clippy::needless_pass_by_value)] // What PyO3 extracts.
    fn give_back_unlisted(
        &self,
        py: Python<'_>,
        files: &SegmentFiles,
        numbers: Vec<u64>,
    ) -> PyResult<()> {
        let placed = step!(self, py, |cache| cache.placed_in(&numbers))?;
        let files = files.files();
        py.detach(|| segments::keep_only(&files, &numbers, &placed))
            .map_err(os_error)
    }

    #[pyo3(signature = (limit, /))]
    fn spent_segments(&self, py: Python<'_>, limit: usize) -> PyResult<Vec<(u32, u64)>> {
        step!(self, py, |cache| {
            cache.close_empty_segments()?;
            cache.spent_segments(limit)
        })
    }

    #[pyo3(signature = (segments, /))]
    fn segments_removed(&self, py: Python<'_>, segments: Vec<(u32, u64)>) -> PyResult<()> {
        step!(self, py, |cache| {
            for &(cell, number) in &segments {
                cache.segment_removed(cell, number)?;
            }
            Ok(())
        })
    }
}
