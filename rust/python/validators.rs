//! Validators of the source: kept with a value, and compared when it is outdated.

use pyo3::prelude::*;

use super::backing::step;
use super::convert::{RawSpan, RawVictim, hit, millis, raw_victims, span};
use super::index::Index;

#[pymethods]
impl Index {
    #[pyo3(signature = (key, ticket, validator, fetched, now, /))]
    fn note_arrival(
        &self,
        py: Python<'_>,
        key: &str,
        ticket: u64,
        validator: Option<&str>,
        fetched: f64,
        now: f64,
    ) -> PyResult<Vec<RawVictim>> {
        let key = &*self.whole(key);
        let (fetched, now) = (millis(fetched), millis(now));
        let victims = step!(self, py, |cache| cache
            .note_arrival(key, ticket, validator, fetched, now))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (key, raw, /))]
    fn validator(&self, py: Python<'_>, key: &str, raw: RawSpan) -> PyResult<Option<String>> {
        let key = &*self.whole(key);
        let span = span(raw)?;
        step!(self, py, |cache| cache.validator(key, self.asked(span)))
    }

    #[pyo3(signature = (key, raw, ticket, validator, fetched, now, /))]
    #[allow(clippy::too_many_arguments)] // All that a comparison is about.
    fn refresh<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        raw: RawSpan,
        ticket: u64,
        validator: &str,
        fetched: f64,
        now: f64,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let (span, fetched, now) = (span(raw)?, millis(fetched), millis(now));
        let own = key;
        let key = &*self.whole(own);
        let found = step!(self, py, |cache| {
            let found = cache.refresh(key, self.asked(span), ticket, validator, fetched, now)?;
            Ok(found.map(|found| (found, cache.must_verify(found.handle))))
        })?;
        found
            .map(|(found, verify)| hit(py, own, span, &found, verify, true))
            .transpose()
    }
}
