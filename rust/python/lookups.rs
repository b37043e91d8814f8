//! Look-ups, and what they are counted as.

use pyo3::prelude::*;
use pyo3::types::PyString;

use super::backing::{self, Backing, step};
use super::convert::{
    RawAges, RawSpan, RawVictim, absence_ages, absent, fresh, hit, known, raw_victims, span,
};
use super::index::Index;
use super::pool::FoundPlace;
use crate::cache::{Answer, BATCH, Found, Freshness};
use crate::key::ByteRange;

/// What a look-up has found.
pub(super) struct Looked {
    pub(super) answer: Answer<Found>,
    /// Whether the bytes have to be compared with their checksum.
    pub(super) verify: bool,
    /// Where the bytes are, in a pool.
    pub(super) place: Option<FoundPlace>,
}

impl Index {
    /// Looks up; `key` is that of the index.
    pub(super) fn look(
        &self,
        py: Python<'_>,
        key: &str,
        span: ByteRange,
        fresh: Freshness,
        missing: Option<RawAges>,
    ) -> PyResult<Looked> {
        step!(self, py, |cache| {
            let asked = self.asked(span);
            let answer = cache.ask(key, asked, fresh, missing.map(absence_ages))?;
            if self.sampled {
                match answer {
                    Answer::Found(found) => cache.sample(key, asked, Some(found.length), fresh),
                    Answer::Unknown => cache.sample(key, asked, None, fresh),
                    Answer::Absent | Answer::PerhapsAbsent => {}
                }
            }
            let (verify, place) = match answer {
                Answer::Found(found) => (
                    cache.must_verify(found.handle),
                    FoundPlace::of(cache, found.handle as u32)?,
                ),
                _ => (false, None),
            };
            Ok(Looked {
                answer,
                verify,
                place,
            })
        })
    }

    /// Counts what was found, and tells of it; `key` is that of the source.
    pub(super) fn tell<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        span: ByteRange,
        looked: &Looked,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match &looked.answer {
            Answer::Found(found) => {
                self.count(true);
                if let Some(source) = &self.source {
                    source.remember(key, found.range, looked.place);
                }
                hit(py, key, span, found, looked.verify, self.tells_entries).map(Some)
            }
            Answer::Unknown => {
                self.count(false);
                Ok(None)
            }
            Answer::Absent => {
                if let Some(counters) = &self.counters {
                    counters.get().count_negative();
                }
                absent(py).map(Some)
            }
            Answer::PerhapsAbsent => absent(py).map(Some),
        }
    }

    #[inline]
    pub(super) fn count(&self, hit: bool) {
        if let Some(counters) = &self.counters {
            counters.get().count(hit);
        }
    }
}

#[pymethods]
impl Index {
    #[pyo3(signature = (key, raw=None, now=0.0, max_age=None, missing=None, /))]
    fn lookup<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        raw: RawSpan,
        now: f64,
        max_age: Option<f64>,
        missing: Option<RawAges>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let fresh = fresh(now, max_age);
        let own = key;
        let key = &*self.whole(own);
        if raw.is_none()
            && !self.tells_entries
            && let Backing::Own(lock, _) = &*self.backing
            && !self.backing.is_disowned()
        {
            let mut cache = backing::lock(lock, py)?;
            let hit = cache.hit_sampled(key, fresh, self.sampled);
            drop(cache);
            if let Some(answer) = hit {
                self.count(answer.is_some());
                let size = answer.map(|size| size.into_pyobject(py)).transpose()?;
                return Ok(size.map(Bound::into_any));
            }
        }
        let span = span(raw)?;
        let looked = self.look(py, key, span, fresh, missing)?;
        self.tell(py, own, span, &looked)
    }

    #[pyo3(signature = (keys, /))]
    fn lookup_all(&self, py: Python<'_>, keys: Vec<Bound<'_, PyString>>) -> PyResult<Vec<usize>> {
        self.require_own_keys()?;
        let mut found = Vec::new();
        for (batch, some) in keys.chunks(BATCH).enumerate() {
            step!(self, py, |cache| {
                for (at, key) in some.iter().enumerate() {
                    let key = known(key).unwrap_or_default();
                    let is_there = match cache.hit(key, 0) {
                        Some(size) => size.is_some(),
                        None => cache.lookup(key, ByteRange::Full, 0)?.is_some(),
                    };
                    self.count(is_there);
                    if is_there {
                        found.push(batch * BATCH + at);
                    }
                }
                Ok(())
            })?;
        }
        Ok(found)
    }

    #[pyo3(signature = (key, raw, now, max_age=None, missing=None, /))]
    fn peek<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        raw: RawSpan,
        now: f64,
        max_age: Option<f64>,
        missing: Option<RawAges>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let key = &*self.whole(key);
        let (span, fresh) = (span(raw)?, fresh(now, max_age));
        let (found, is_absent) = step!(self, py, |cache| {
            let found = cache.peek(key, self.asked(span), fresh)?;
            Ok(match missing {
                Some(ages) if found.is_none() => (
                    None,
                    cache.knows_absent(key, fresh.now, absence_ages(ages))?,
                ),
                _ => (found, false),
            })
        })?;
        if is_absent {
            return absent(py).map(Some);
        }
        let length = found.map(|found| found.length.into_pyobject(py));
        Ok(length.transpose()?.map(Bound::into_any))
    }

    #[pyo3(signature = (key, raw, size, now, max_age=None, /))]
    fn handle_of(
        &self,
        py: Python<'_>,
        key: &str,
        raw: RawSpan,
        size: Option<u64>,
        now: f64,
        max_age: Option<f64>,
    ) -> PyResult<Option<u64>> {
        let key = &*self.whole(key);
        let (span, fresh) = (span(raw)?, fresh(now, max_age));
        let found = step!(self, py, |cache| cache.peek(key, self.asked(span), fresh))?;
        let found = found.filter(|found| size.is_none_or(|size| size == found.size));
        Ok(found.map(|found| found.handle))
    }

    #[pyo3(signature = (handle, /))]
    fn discard(&self, py: Python<'_>, handle: u64) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.discard(handle))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (handle, checksum, /))]
    fn mark_verified(&self, py: Python<'_>, handle: u64, checksum: u32) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.verified(handle, checksum);
            Ok(())
        })
    }
}
