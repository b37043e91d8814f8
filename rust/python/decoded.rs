//! Versions of what decoded chunks were made from.

use pyo3::prelude::*;
use pyo3::types::PyString;

use super::backing::step;
use super::convert::{RawDecoded, fresh, millis};
use super::index::Index;
use crate::cache::{BATCH, Decode};

#[pymethods]
impl Index {
    #[pyo3(signature = (keys, now, max_ages, /))]
    fn begin_decodes(
        &self,
        py: Python<'_>,
        keys: Vec<Bound<'_, PyString>>,
        now: f64,
        max_ages: Vec<Option<f64>>,
    ) -> PyResult<Vec<Option<(u64, u64)>>> {
        let keys: Vec<_> = keys
            .iter()
            // One that is no text is never cached.
            .map(|key| key.to_str().ok().map(|key| self.whole(key)))
            .collect();
        let asked: Vec<_> = keys.iter().zip(max_ages).collect();
        let mut stamps = Vec::with_capacity(keys.len());
        // In steps, so that no one waits for long.
        for some in asked.chunks(BATCH) {
            step!(self, py, |cache| {
                for (key, age) in some {
                    let fresh = fresh(now, *age);
                    let decode = key.as_ref().map(|key| cache.begin_decode(key, fresh));
                    let decode = decode.transpose()?.flatten();
                    stamps.push(decode.map(|decode| (decode.version, decode.fetched)));
                }
                Ok(())
            })?;
        }
        Ok(stamps)
    }

    #[pyo3(signature = (key, version, fetched, landed, touch_ranges, now, max_age=None, /))]
    #[allow(clippy::too_many_arguments)] // What a decode remembers, without an object for it.
    fn is_current(
        &self,
        py: Python<'_>,
        key: &str,
        version: u64,
        fetched: u64,
        landed: f64,
        touch_ranges: bool,
        now: f64,
        max_age: Option<f64>,
    ) -> PyResult<bool> {
        let key = &*self.whole(key);
        let decode = Decode { version, fetched };
        let (landed, fresh) = (millis(landed), fresh(now, max_age));
        step!(self, py, |cache| cache.is_current(
            key,
            decode,
            landed,
            fresh,
            touch_ranges
        ))
    }

    #[pyo3(signature = (decoded, now, /))]
    fn stay_current(
        &self,
        py: Python<'_>,
        decoded: Vec<RawDecoded<'_>>,
        now: f64,
    ) -> PyResult<Vec<bool>> {
        let mut current = Vec::with_capacity(decoded.len());
        // In steps, so that no one waits for long.
        for some in decoded.chunks(BATCH) {
            step!(self, py, |cache| {
                for (key, version, fetched, landed, max_age) in some {
                    let key = key.to_str().map(|key| self.whole(key)).unwrap_or_default();
                    let (version, fetched) = (*version, *fetched);
                    let decode = Decode { version, fetched };
                    let (landed, fresh) = (millis(*landed), fresh(now, *max_age));
                    current.push(cache.stays_current(&key, decode, landed, fresh)?);
                }
                Ok(())
            })?;
        }
        Ok(current)
    }
}
