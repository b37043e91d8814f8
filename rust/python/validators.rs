//! Validators of the source: kept with a value, and compared when it is outdated.

use pyo3::prelude::*;

use super::backing::step;
use super::convert::{RawSpan, hit, millis, span};
use super::index::Index;

#[pymethods]
impl Index {
    #[pyo3(signature = (key, ticket, validator, /))]
    fn set_validator(
        &self,
        py: Python<'_>,
        key: &str,
        ticket: u64,
        validator: &str,
    ) -> PyResult<()> {
        let key = &*self.whole(key);
        step!(self, py, |cache| {
            cache.set_validator(key, ticket, validator);
            Ok(())
        })
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
