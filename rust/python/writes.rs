//! Writes and deletes of the source, and what is not valid any more because of them.

use pyo3::prelude::*;

use super::backing::{Flight, step};
use super::convert::{RawVictim, raw_victims};
use super::index::Index;
use crate::cache::{Rest, START};

#[pymethods]
impl Index {
    #[pyo3(signature = (key, /))]
    fn begin_write(&self, py: Python<'_>, key: &str) -> PyResult<Vec<RawVictim>> {
        let key = &*self.whole(key);
        let victims = step!(self, py, |cache| cache.begin_write(key))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (key, keeps, flight=None, size=None, /))]
    fn end_write(
        &self,
        py: Python<'_>,
        key: &str,
        keeps: bool,
        flight: Option<Bound<'_, PyAny>>,
        size: Option<u64>,
    ) -> PyResult<(Vec<RawVictim>, Option<u64>)> {
        let key = &*self.whole(key);
        // The caller holds a reference too, so dropping ours under the lock frees nothing.
        let payload = flight
            .as_ref()
            .map(|flight| Flight(flight.clone().unbind()));
        let (victims, ticket) = step!(self, py, |cache| {
            let ended = cache.end_write(key, keeps, payload)?;
            match (ended.1, size) {
                (Some(_), Some(size)) => cache.note_sampled_fill(key, size),
                // Nothing stays of what was read meanwhile.
                _ => cache.note_sampled_drop(key),
            }
            Ok(ended)
        })?;
        Ok((raw_victims(victims), ticket))
    }

    #[pyo3(signature = (key, /))]
    fn drop_missing(&self, py: Python<'_>, key: &str) -> PyResult<Vec<RawVictim>> {
        let key = &*self.whole(key);
        let victims = step!(self, py, |cache| cache.drop_missing(key))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (prefix, begins=None, /))]
    fn invalidate(&self, py: Python<'_>, prefix: &str, begins: Option<bool>) -> PyResult<()> {
        let prefix = &*self.below(prefix);
        step!(self, py, |cache| {
            // First what may fail: a step that is repeated must not count twice.
            if let Some(begins) = begins {
                cache.prefix_change(prefix, begins)?;
            }
            cache.invalidate_prefix(prefix);
            Ok(())
        })
    }

    #[pyo3(signature = (prefix, at=START, /))]
    fn drain_prefix(
        &self,
        py: Python<'_>,
        prefix: &str,
        at: Rest,
    ) -> PyResult<(Vec<RawVictim>, Option<Rest>)> {
        let prefix = &*self.below(prefix);
        let (victims, next) = step!(self, py, |cache| cache.drain_prefix(prefix, at))?;
        Ok((raw_victims(victims), next))
    }

    #[pyo3(signature = (prefix, at=START, /))]
    fn drain_absences(&self, py: Python<'_>, prefix: &str, at: Rest) -> PyResult<Option<Rest>> {
        let prefix = &*self.below(prefix);
        step!(self, py, |cache| cache.drain_absences(prefix, at))
    }

    #[pyo3(signature = (prefix, /))]
    fn in_progress_below(&self, py: Python<'_>, prefix: &str) -> PyResult<Vec<RawVictim>> {
        let prefix = &*self.below(prefix);
        let victims = step!(self, py, |cache| cache.in_progress_below(prefix))?;
        Ok(raw_victims(victims))
    }
}
