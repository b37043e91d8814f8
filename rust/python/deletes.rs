//! Victims, and how their deletes went.

use pyo3::prelude::*;

use super::backing::step;
use super::convert::{RawVictim, millis, raw_victims};
use super::index::Index;

#[pymethods]
impl Index {
    #[pyo3(signature = (size, now, /))]
    fn evict(&self, py: Python<'_>, size: u64, now: f64) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.evict(size, millis(now)))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (dropped, failed, /))]
    fn confirm_deletes(
        &self,
        py: Python<'_>,
        dropped: Vec<u32>,
        failed: Vec<u32>,
    ) -> PyResult<bool> {
        step!(self, py, |cache| {
            cache.deletes_done(&dropped, &failed)?;
            Ok(cache.take_emptied())
        })
    }

    #[pyo3(signature = (cells, /))]
    fn expected(&self, py: Python<'_>, cells: Vec<u32>) -> PyResult<Vec<Option<(u64, u32)>>> {
        step!(self, py, |cache| Ok(cells
            .iter()
            .map(|&cell| cache.expected(cell))
            .collect()))
    }

    #[pyo3(signature = (limit, /))]
    fn failed_deletes(&self, py: Python<'_>, limit: usize) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.retry_failed(limit))?;
        Ok(raw_victims(victims))
    }
}
