//! What an index holds: sizes and numbers, entries, keys.

use pyo3::prelude::*;

use super::ages::Ages;
use super::backing::step;
use super::convert::{RawEntry, RawSpan, fresh, raw_entries, raw_recency};
use super::counters::Stats;
use super::index::Index;
use crate::cache::{Cursor, Entry};
use crate::key::ByteRange;

/// Key, whether it is the full value, and bytes.
type LiveEntry = (String, bool, u64);

#[pymethods]
impl Index {
    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        let len = step!(self, py, |cache| Ok(cache.len()))?;
        Ok(usize::try_from(len).unwrap_or(usize::MAX))
    }

    #[getter]
    fn live_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        step!(self, py, |cache| Ok(cache.live_bytes()))
    }

    #[getter]
    fn current_size(&self, py: Python<'_>) -> PyResult<u64> {
        self.end_abandoned(py)?;
        step!(self, py, |cache| Ok(cache.current_size()))
    }

    #[getter]
    fn memory(&self, py: Python<'_>) -> PyResult<u64> {
        step!(self, py, |cache| Ok(cache.memory()))
    }

    fn stats(&self) -> Stats {
        Stats(self.tally.stats())
    }

    #[getter]
    fn absences(&self) -> u64 {
        self.tally.absences()
    }

    fn entries(&self, py: Python<'_>) -> PyResult<Vec<RawEntry>> {
        let mut entries = step!(self, py, |cache| cache.entries())?;
        entries.retain_mut(|entry| self.make_own(&mut entry.key));
        Ok(raw_entries(entries))
    }

    fn recency(&self, py: Python<'_>) -> PyResult<Vec<(String, RawSpan)>> {
        let mut recency = step!(self, py, |cache| cache.recency())?;
        recency.retain_mut(|entry| self.make_own(&mut entry.0));
        Ok(raw_recency(recency))
    }

    #[pyo3(signature = (cursor=None, /))]
    fn next_live(
        &self,
        py: Python<'_>,
        cursor: Option<Cursor>,
    ) -> PyResult<(Vec<LiveEntry>, Option<Cursor>)> {
        let (mut found, cursor) = step!(self, py, |cache| {
            let cursor = cursor.unwrap_or_else(|| cache.first_keys());
            cache.next_live(cursor)
        })?;
        found.retain_mut(|entry| self.make_own(&mut entry.key));
        let raw = |one: Entry| (one.key, one.range == ByteRange::Full, one.size);
        Ok((found.into_iter().map(raw).collect(), cursor))
    }

    #[pyo3(signature = (prefix, now, max_age, ages=None, cursor=None, /))]
    fn next_keys(
        &self,
        py: Python<'_>,
        prefix: &str,
        now: f64,
        max_age: Option<f64>,
        ages: Option<&Ages>,
        cursor: Option<Cursor>,
    ) -> PyResult<(Vec<String>, Option<Cursor>)> {
        let prefix = &*self.below(prefix);
        let age_of = |key: &str| ages.map_or(max_age, |ages| ages.of_key(self.own_key(key)));
        let (keys, cursor) = step!(self, py, |cache| {
            let cursor = cursor.unwrap_or_else(|| cache.first_keys());
            cache.next_keys(prefix, cursor, |key| fresh(now, age_of(key)))
        })?;
        Ok((self.own_keys(keys), cursor))
    }

    fn absent_keys(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let keys = step!(self, py, |cache| cache.absent_keys())?;
        Ok(self.own_keys(keys))
    }

    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| cache.validate())
    }
}
