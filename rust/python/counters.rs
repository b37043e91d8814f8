//! What the reads of one store came to, and what an index has counted. Both are known without any lock.

use std::sync::atomic::{AtomicI64, Ordering};

use pyo3::prelude::*;

use crate::cache;

/// Hits and misses of one store, whichever index has answered.
///
/// Signed, for a correction may come before what it corrects.
#[pyclass(frozen, module = "zcache._core")]
#[derive(Debug, Default)]
pub(super) struct ReadCounters {
    hits: AtomicI64,
    misses: AtomicI64,
    negative_hits: AtomicI64,
}

impl ReadCounters {
    #[inline]
    pub(super) fn count(&self, hit: bool) {
        let counter = if hit { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn count_negative(&self) {
        self.negative_hits.fetch_add(1, Ordering::Relaxed);
    }

    fn read(counter: &AtomicI64) -> u64 {
        u64::try_from(counter.load(Ordering::Relaxed)).unwrap_or(0)
    }
}

#[pymethods]
impl ReadCounters {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    #[getter]
    fn hits(&self) -> u64 {
        Self::read(&self.hits)
    }

    #[getter]
    fn misses(&self) -> u64 {
        Self::read(&self.misses)
    }

    #[getter]
    fn negative_hits(&self) -> u64 {
        Self::read(&self.negative_hits)
    }

    fn count_miss(&self) {
        self.count(false);
    }

    fn recount_as_negative_hit(&self) {
        self.misses.fetch_sub(1, Ordering::Relaxed);
        self.count_negative();
    }

    fn recount_negative_as_miss(&self) {
        self.negative_hits.fetch_sub(1, Ordering::Relaxed);
        self.count(false);
    }

    fn retract_miss(&self) {
        self.misses.fetch_sub(1, Ordering::Relaxed);
    }

    fn recount_as_miss(&self) {
        self.hits.fetch_sub(1, Ordering::Relaxed);
        self.count(false);
    }

    fn recount_as_hit(&self) {
        self.misses.fetch_sub(1, Ordering::Relaxed);
        self.count(true);
    }
}

/// The counters of an index, as of one moment.
#[pyclass(frozen, module = "zcache._core")]
#[derive(Debug)]
pub(super) struct Stats(pub(super) cache::Stats);

#[pymethods]
impl Stats {
    #[new]
    #[pyo3(signature = (*, refusals=0))]
    fn new(refusals: u64) -> Self {
        Stats(cache::Stats {
            refusals,
            ..cache::Stats::default()
        })
    }

    #[getter]
    fn evictions(&self) -> u64 {
        self.0.evictions
    }

    #[getter]
    fn expirations(&self) -> u64 {
        self.0.expirations
    }

    #[getter]
    fn refusals(&self) -> u64 {
        self.0.refusals
    }

    fn __add__(&self, other: &Self) -> Self {
        Stats(self.0 + other.0)
    }

    fn __sub__(&self, other: &Self) -> Self {
        Stats(self.0 - other.0)
    }
}
