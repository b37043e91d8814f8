//! The rebuild: an empty index takes in what a scan has found.

use pyo3::prelude::*;

use super::backing::{self, Backing, shared, step};
use super::index::Index;
use super::pool::{SegmentScan, place_name};
use crate::error::Error;

#[pymethods]
impl Index {
    #[getter]
    fn owns_rebuild(&self, py: Python<'_>) -> PyResult<bool> {
        step!(self, py, |cache| Ok(cache.owns_rebuild()))
    }

    #[getter]
    fn is_complete(&self, py: Python<'_>) -> PyResult<bool> {
        step!(self, py, |cache| Ok(cache.is_complete()))
    }

    #[getter]
    fn begins_empty(&self, py: Python<'_>) -> PyResult<bool> {
        step!(self, py, |cache| Ok(cache.begins_empty()))
    }

    #[pyo3(signature = (values, /))]
    fn adopt(&self, py: Python<'_>, values: Vec<(u64, u64, String)>) -> PyResult<bool> {
        step!(self, py, |cache| {
            if !cache.owns_rebuild() {
                return Ok(false);
            }
            for (fetched, size, name) in &values {
                cache.adopt(name, *size, *fetched)?;
            }
            Ok(true)
        })
    }

    /// Adds the segments that a scan of a pool has found; see the stub.
    #[pyo3(signature = (scan, /))]
    fn adopt_segments(&self, py: Python<'_>, scan: &SegmentScan) -> PyResult<bool> {
        let found = scan.found();
        step!(self, py, |cache| {
            if !cache.owns_rebuild() {
                return Ok(false);
            }
            found.adopt_segments(cache)?;
            Ok(true)
        })
    }

    /// Adds values that it has found; see the stub.
    #[pyo3(signature = (scan, start, stop, /))]
    fn adopt_found(
        &self,
        py: Python<'_>,
        scan: &SegmentScan,
        start: usize,
        stop: usize,
    ) -> PyResult<Option<Vec<String>>> {
        let found = scan.found();
        let refused = step!(self, py, |cache| {
            if !cache.owns_rebuild() {
                return Ok(None);
            }
            found.adopt_values(cache, start..stop).map(Some)
        })?;
        Ok(refused.map(|all| all.into_iter().map(place_name).collect()))
    }

    #[pyo3(signature = (names, /))]
    fn are_listed(&self, py: Python<'_>, names: Vec<String>) -> PyResult<Option<Vec<bool>>> {
        step!(self, py, |cache| {
            if !cache.is_complete() {
                return Ok(None);
            }
            let each = names.iter().map(|name| cache.is_listed(name));
            each.collect::<Result<_, _>>().map(Some)
        })
    }

    #[pyo3(signature = (name, /))]
    fn formerly(&self, py: Python<'_>, name: &str) -> PyResult<Option<(u64, u64, u32)>> {
        let found = shared(&self.backing, py, None, |index| Ok(index.formerly(name)))?;
        Ok(found.map(|value| (value.fetched, value.size, value.checksum)))
    }

    #[pyo3(signature = (is_emptied=false, /))]
    fn finish_rebuild(&self, py: Python<'_>, is_emptied: bool) -> PyResult<()> {
        if let Backing::Own(lock, _) = &*self.backing {
            let mut cache = backing::lock(lock, py)?;
            cache.arena.storage.complete();
            return Ok(());
        }
        shared(&self.backing, py, (), |directory| {
            if is_emptied {
                directory.complete_empty()
            } else {
                directory.complete()
            }
        })?;
        Ok(())
    }

    fn mark_corrupt(&self, py: Python<'_>) -> PyResult<()> {
        match &*self.backing {
            Backing::Own(..) => Ok(()),
            Backing::Shared(..) => step!(self, py, |_cache| Err(Error::Lost(
                "a size that is not the one of its file"
            ))),
        }
    }

    #[pyo3(signature = (seed, /))]
    fn restart(&self, py: Python<'_>, seed: u64) -> PyResult<bool> {
        shared(&self.backing, py, false, |directory| {
            directory.restart(seed)
        })
    }
}
