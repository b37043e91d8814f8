//! The index: extract, lock, call, convert.
//!
//! Why the lock is never held for long, see [`super::backing`].

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString, PyTuple};

use super::ages::Ages;
use super::backing::{self, shared, wait};
use super::backing::{Backing, Flight, after_fork, step};
use super::convert::{
    RawAges, RawDecoded, RawEntry, RawSpan, RawVictim, absence_ages, absent, age, fresh, hit,
    known, limits, millis, policy, policy_names, raw_entries, raw_recency, raw_span, raw_victims,
    span, when_to_verify,
};
use super::counters::ReadCounters;
use super::errors::os_error;
use super::memory::Fill;
use super::plan::Plan;
use super::pool::{FoundPlace, SegmentFiles, SegmentScan, Source, place_name};
use super::reservation::{Abandoned, Committed, Many, Reservation};
use super::sampling::sample;
use crate::arena::Heap;
use crate::cache::{
    Answer, BATCH, Cache, Cursor, Decode, Found, Freshness, Joined, LiveEntry, Tally,
};
use crate::disk::segments;
use crate::error::Error;
use crate::key::{Asked, ByteRange};
use crate::shared::{Opening, SharedIndex};

/// An index with its bounds, flights and reservations, behind one lock.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct Index {
    pub(super) backing: Arc<Backing>,
    pub(super) abandoned: Arc<Abandoned>,
    tally: Arc<Tally>,
    /// Of the store that these lookups are for.
    counters: Option<Py<ReadCounters>>,
    /// Whether its requests go into the sample.
    sampled: bool,
    /// Whether the source of these keys slices as Python does.
    slices_like_python: bool,
    /// Of a pool: the source that these keys have.
    pub(super) source: Option<Arc<Source>>,
}

/// What a look-up has found.
pub(super) struct Looked {
    pub(super) answer: Answer<Found>,
    /// Whether the bytes have to be compared with their checksum.
    pub(super) verify: bool,
    /// Where the bytes are, in a pool.
    pub(super) place: Option<FoundPlace>,
}

impl Index {
    fn over(backing: Backing, tally: Arc<Tally>, slices_like_python: bool) -> Self {
        Index {
            backing: Arc::new(backing),
            abandoned: Arc::default(),
            tally,
            counters: None,
            sampled: false,
            slices_like_python,
            source: None,
        }
    }

    /// A key in the index: that of a source of a pool is below the folder of the source.
    #[inline]
    pub(super) fn whole<'a>(&self, key: &'a str) -> Cow<'a, str> {
        match &self.source {
            None => Cow::Borrowed(key),
            Some(source) => Cow::Owned([&*source.folder, key].concat()),
        }
    }

    /// The same for a prefix: "" is all of the source.
    fn below<'a>(&self, prefix: &'a str) -> Cow<'a, str> {
        match &self.source {
            Some(source) if prefix.is_empty() => Cow::Owned(source.label().to_owned()),
            _ => self.whole(prefix),
        }
    }

    /// A key as its source has it.
    fn own_key<'a>(&self, key: &'a str) -> &'a str {
        let folder = self.source.as_ref().map_or("", |source| &*source.folder);
        key.strip_prefix(folder).unwrap_or(key)
    }

    /// The same in its place; false where it is another source's.
    fn make_own(&self, key: &mut String) -> bool {
        let folder = self.source.as_ref().map_or("", |source| &*source.folder);
        let is_own = key.starts_with(folder);
        if is_own {
            key.drain(..folder.len());
        }
        is_own
    }

    fn own_keys(&self, mut keys: Vec<String>) -> Vec<String> {
        keys.retain_mut(|key| self.make_own(key));
        keys
    }

    /// Decoded chunks have an index of their own, so what takes many of them at once knows no sources.
    fn require_own_keys(&self) -> PyResult<()> {
        match &self.source {
            None => Ok(()),
            Some(_) => Err(PyValueError::new_err(
                "many keys at once: not for the view that a source has of a pool",
            )),
        }
    }

    /// What is asked for, as the source slices.
    #[inline]
    fn asked(&self, range: ByteRange) -> Asked {
        Asked {
            range,
            slices_like_python: self.slices_like_python,
        }
    }

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
            let answer = cache.ask(key, self.asked(span), fresh, missing.map(absence_ages))?;
            if self.sampled {
                match answer {
                    Answer::Found(found) => cache.sample(key, found.range, Some(found.size), fresh),
                    Answer::Unknown => cache.sample(key, span, None, fresh),
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
                hit(py, key, span, found, looked.verify).map(Some)
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
    #[new]
    #[pyo3(signature = (*, max_size=None, max_age=None, slices_like_python=false, flat_namespace=false,
                        verify="never", seed=None, complete=true, unit=1, eviction="lru",
                        minimise="requests", holes=None))]
    #[allow(clippy::too_many_arguments)] // As many options as there are.
    fn new(
        max_size: Option<u64>,
        max_age: Option<f64>,
        slices_like_python: bool,
        flat_namespace: bool,
        verify: &str,
        seed: Option<u64>,
        complete: bool,
        unit: u64,
        eviction: &str,
        minimise: &str,
        holes: Option<bool>,
    ) -> PyResult<Self> {
        let (kind, minimise) = policy(eviction, minimise)?;
        let limits = limits(max_size, max_age, flat_namespace, verify)?;
        let block = if complete {
            Heap::default()
        } else {
            Heap::rebuilding()
        };
        let block = match holes {
            Some(_) => block.with_places(),
            None => block,
        };
        // One that cannot be guessed: keys could else be chosen so that they collide.
        let seed = seed.unwrap_or_else(|| RandomState::new().hash_one(0));
        let mut cache = Cache::new(block, limits, seed)?;
        cache.set_unit(unit);
        cache.set_policy(kind, minimise);
        cache.set_one_value_a_segment(holes == Some(false));
        let tally = cache.tally();
        Ok(Index::over(Backing::own(cache), tally, slices_like_python))
    }

    /// Opens the index of a cache directory; see the stub.
    #[staticmethod]
    #[pyo3(signature = (root, /, *, max_size=None, max_age=None, slices_like_python=false,
                        flat_namespace=false, verify="never", seed=0, unit=1, timeout=1.0,
                        eviction="lru", minimise="requests", holes=None))]
    #[allow(clippy::too_many_arguments)] // As many options as there are.
    fn open(
        py: Python<'_>,
        root: PathBuf,
        max_size: Option<u64>,
        max_age: Option<f64>,
        slices_like_python: bool,
        flat_namespace: bool,
        verify: &str,
        seed: u64,
        unit: u64,
        timeout: f64,
        eviction: &str,
        minimise: &str,
        holes: Option<bool>,
    ) -> PyResult<(Self, bool)> {
        let policy = policy(eviction, minimise)?;
        let limits = limits(max_size, max_age, flat_namespace, verify)?;
        let opening = Opening {
            unit,
            patience: Duration::try_from_secs_f64(timeout).unwrap_or_default(),
            policy,
            with_places: holes.is_some(),
            ..Opening::new(limits, seed)
        };
        let (mut directory, fresh) = py.detach(|| SharedIndex::open(&root, &opening))?;
        if let Some(holes) = holes {
            directory.set_one_value_a_segment(!holes);
        }
        let tally = directory.tally();
        let index = Index::over(Backing::shared(directory), tally, slices_like_python);
        Ok((index, fresh))
    }

    fn policy(&self, py: Python<'_>) -> PyResult<(&'static str, &'static str)> {
        let policy = step!(self, py, |cache| Ok(cache.policy()))?;
        Ok(policy_names(policy))
    }

    #[pyo3(signature = (eviction, minimise, /))]
    fn set_policy(
        &self,
        py: Python<'_>,
        eviction: &str,
        minimise: &str,
    ) -> PyResult<(&'static str, &'static str)> {
        let (kind, minimise) = policy(eviction, minimise)?;
        let policy = step!(self, py, |cache| Ok(cache.set_policy(kind, minimise)))?;
        Ok(policy_names(policy))
    }

    #[pyo3(signature = (size, seconds, /))]
    fn note_seconds(&self, py: Python<'_>, size: u64, seconds: f64) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.note_seconds(size, seconds);
            Ok(())
        })
    }

    #[pyo3(signature = (plan, /))]
    fn set_plan(&self, py: Python<'_>, plan: &Plan) -> PyResult<Cursor> {
        // Freed without the lock.
        let (_before, first) = step!(self, py, |cache| {
            // Not before the lock is held: a step that was not taken is taken again.
            let before = match plan.take(py) {
                Ok(plan) => {
                    let folder = self.source.as_ref().map_or("", |source| &*source.folder);
                    match plan {
                        Some(plan) => cache.set_plan(plan.within(folder)),
                        None => cache.forget_plan(folder),
                    }
                }
                Err(_) => None,
            };
            Ok((before, cache.first_keys()))
        })?;
        Ok(first)
    }

    #[pyo3(signature = (cursor, /))]
    fn match_plan(&self, py: Python<'_>, cursor: Cursor) -> PyResult<Option<Cursor>> {
        step!(self, py, |cache| cache.match_plan(cursor))
    }

    #[pyo3(signature = (counters, sampled=false, /))]
    fn view(&self, counters: Py<ReadCounters>, sampled: bool) -> Self {
        Index {
            backing: Arc::clone(&self.backing),
            abandoned: Arc::clone(&self.abandoned),
            tally: Arc::clone(&self.tally),
            counters: Some(counters),
            sampled,
            slices_like_python: self.slices_like_python,
            source: self.source.clone(),
        }
    }

    #[pyo3(signature = (label, slices_like_python, /))]
    fn within(&self, py: Python<'_>, label: &str, slices_like_python: bool) -> Self {
        Index {
            backing: Arc::clone(&self.backing),
            abandoned: Arc::clone(&self.abandoned),
            tally: Arc::clone(&self.tally),
            counters: self
                .counters
                .as_ref()
                .map(|counters| counters.clone_ref(py)),
            sampled: self.sampled,
            slices_like_python,
            source: Some(Arc::new(Source::new(label))),
        }
    }

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

    #[pyo3(signature = (key, raw, now, size=None, max_age=None, /))]
    fn discard(
        &self,
        py: Python<'_>,
        key: &str,
        raw: RawSpan,
        now: f64,
        size: Option<u64>,
        max_age: Option<f64>,
    ) -> PyResult<Vec<RawVictim>> {
        let key = &*self.whole(key);
        let (span, fresh) = (span(raw)?, fresh(now, max_age));
        let victims = step!(self, py, |cache| {
            let found = cache.peek(key, self.asked(span), fresh)?;
            // An entry of another size may have taken its place.
            let same = found.filter(|found| size.is_none_or(|size| size == found.size));
            cache.discard(same.map_or(u64::MAX, |found| found.handle))
        })?;
        Ok(raw_victims(victims))
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
                    if is_there {
                        found.push(batch * BATCH + at);
                    }
                }
                Ok(())
            })?;
        }
        Ok(found)
    }

    fn recount_as_miss(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.recount_as_miss();
            Ok(())
        })
    }

    fn recount_as_hit(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.recount_as_hit();
            Ok(())
        })
    }

    #[pyo3(signature = (key, raw, flight, now, anyway, max_age=None, missing=None, /))]
    #[allow(clippy::too_many_arguments)] // All that a look-up is about, and what is waited on.
    fn join<'py>(
        &self,
        py: Python<'py>,
        key: &Bound<'py, PyString>,
        raw: RawSpan,
        flight: &Bound<'py, PyAny>,
        now: f64,
        anyway: bool,
        max_age: Option<f64>,
        missing: Option<RawAges>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let Some(key) = known(key) else {
            return Ok(false.into_pyobject(py)?.to_owned().into_any());
        };
        let key = &*self.whole(key);
        let (span, fresh) = (span(raw)?, fresh(now, max_age));
        // The caller holds a reference too, so dropping ours under the lock frees nothing.
        let kept = Flight(flight.clone().unbind());
        let joined = step!(self, py, |cache| {
            if let Some(ages) = missing
                && cache.knows_absent(key, fresh.now, absence_ages(ages))?
            {
                Ok(Joined::Ready)
            } else {
                cache.join(key, self.asked(span), kept, fresh, anyway)
            }
        })?;
        match joined {
            Joined::Ready => Ok(py.None().into_bound(py)),
            Joined::Lead(ticket) => Ok(ticket.into_pyobject(py)?.into_any()),
            Joined::Follow(whole, flight) => {
                Ok((raw_span(whole), flight.0).into_pyobject(py)?.into_any())
            }
        }
    }

    #[pyo3(signature = (keys, flight, /))]
    fn lead_all(
        &self,
        py: Python<'_>,
        keys: Vec<Bound<'_, PyString>>,
        flight: Py<PyAny>,
    ) -> PyResult<Vec<Option<u64>>> {
        self.require_own_keys()?;
        let mut tickets = Vec::with_capacity(keys.len());
        // In steps, so that no one waits for long.
        for some in keys.chunks(BATCH) {
            step!(self, py, |cache| {
                for key in some {
                    // A reference is left outside, so dropping one under the lock frees nothing.
                    let joined = known(key).map(|key| {
                        let flight = Flight(flight.clone_ref(py));
                        cache.join(key, ByteRange::Full, flight, 0, true)
                    });
                    tickets.push(match joined.transpose()? {
                        Some(Joined::Lead(ticket)) => Some(ticket),
                        _ => None,
                    });
                }
                Ok(())
            })?;
        }
        Ok(tickets)
    }

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
            .map(|(found, verify)| hit(py, own, span, &found, verify))
            .transpose()
    }

    #[pyo3(signature = (key, /))]
    fn is_in_flight(&self, py: Python<'_>, key: &str) -> PyResult<bool> {
        let key = &*self.whole(key);
        step!(self, py, |cache| Ok(cache.is_in_flight(key)))
    }

    #[pyo3(signature = (key, ticket, /))]
    fn complete_flight(&self, py: Python<'_>, key: &str, ticket: u64) -> PyResult<()> {
        let key = &*self.whole(key);
        // The payload is dropped after the lock, because that may run Python code.
        let flight = step!(self, py, |cache| Ok(cache.complete_flight(key, ticket)))?;
        drop(flight);
        Ok(())
    }

    #[pyo3(signature = (keys, tickets, /))]
    fn complete_flights(
        &self,
        py: Python<'_>,
        keys: Vec<Bound<'_, PyString>>,
        tickets: Vec<u64>,
    ) -> PyResult<()> {
        self.require_own_keys()?;
        let keys = keys.iter().map(|key| key.to_str());
        let keys: Vec<&str> = keys.collect::<PyResult<_>>()?;
        let mut closed = Vec::with_capacity(keys.len());
        step!(self, py, |cache| {
            for (key, ticket) in keys.iter().zip(tickets) {
                closed.push(cache.complete_flight(key, ticket));
            }
            Ok(())
        })?;
        // The payloads are dropped after the lock, because that may run Python code.
        drop(closed);
        Ok(())
    }

    #[pyo3(signature = (key, ticket, fetched, now, kept, /))]
    fn commit_absence(
        &self,
        py: Python<'_>,
        key: &str,
        ticket: u64,
        fetched: f64,
        now: f64,
        kept: bool,
    ) -> PyResult<Vec<RawVictim>> {
        let key = &*self.whole(key);
        let (fetched, now) = (millis(fetched), millis(now));
        let (victims, flight) = step!(self, py, |cache| cache
            .commit_absence(key, ticket, fetched, now, kept))?;
        // Dropped after the lock, because that may run Python code.
        drop(flight);
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (key, flight, /))]
    fn abort_flight(&self, py: Python<'_>, key: &str, flight: Py<PyAny>) -> PyResult<()> {
        let key = &*self.whole(key);
        let closed = step!(self, py, |cache| Ok(
            cache.abort_flight(key, |other| other.0.is(&flight))
        ))?;
        drop(closed);
        Ok(())
    }

    #[pyo3(signature = (key, raw, size, ticket, now, /))]
    fn reserve<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        raw: RawSpan,
        size: u64,
        ticket: u64,
        now: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let key = &*self.whole(key);
        self.end_abandoned(py)?;
        let span = span(raw)?;
        let now = millis(now);
        let answer = step!(self, py, |cache| cache
            .reserve(key, span, size, ticket, now))?;
        self.answer(py, answer, None)
    }

    #[pyo3(signature = (reservation, dropped, failed, now, /))]
    fn advance<'py>(
        &self,
        py: Python<'py>,
        reservation: Bound<'py, Reservation>,
        dropped: Vec<u32>,
        failed: Vec<u32>,
        now: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (id, now) = (reservation.get().id(), millis(now));
        let answer = step!(self, py, |cache| cache
            .evictions_done(id, &dropped, &failed, now))?;
        self.answer(py, answer, Some(reservation))
    }

    #[pyo3(signature = (keys, size, tickets, now, /))]
    fn reserve_all(
        &self,
        py: Python<'_>,
        keys: Vec<Bound<'_, PyString>>,
        size: u64,
        tickets: Vec<u64>,
        now: f64,
    ) -> PyResult<Many<Reservation>> {
        self.require_own_keys()?;
        self.end_abandoned(py)?;
        self.reserve_many(py, &keys, size, &tickets, millis(now))
    }

    #[pyo3(signature = (reservations, dropped, failed, now, /))]
    fn advance_all(
        &self,
        py: Python<'_>,
        reservations: Vec<Option<Py<Reservation>>>,
        dropped: Vec<u32>,
        failed: Vec<u32>,
        now: f64,
    ) -> PyResult<Many<Py<Reservation>>> {
        self.require_own_keys()?;
        self.advance_many(py, reservations, &dropped, &failed, millis(now))
    }

    /// See [`super::memory`].
    #[pyo3(signature = (values, key, raw, data, value, ticket, now, fetched=None, /))]
    #[allow(clippy::too_many_arguments)] // All that a fill is about, for one call.
    fn fill_memory(
        &self,
        values: &Bound<'_, PyDict>,
        key: &Bound<'_, PyString>,
        raw: RawSpan,
        data: &Bound<'_, PyBytes>,
        value: &Bound<'_, PyAny>,
        ticket: u64,
        now: f64,
        fetched: Option<f64>,
    ) -> PyResult<Option<bool>> {
        let whole = match &self.source {
            Some(_) => PyString::new(values.py(), &self.whole(key.to_str()?)),
            None => key.clone(),
        };
        let fill = Fill {
            backing: &self.backing,
            values,
            key: &whole,
            range: span(raw)?,
            data,
            ticket,
            now: millis(now),
            fetched: millis(fetched.unwrap_or(now)),
        };
        if self.end_abandoned(values.py()).is_err() {
            return Ok(None);
        }
        match fill.run(value) {
            // Out of memory, for example: the owner of the flight ends the rest.
            Err(error) if error.is_instance_of::<PyException>(values.py()) => Ok(None),
            kept => kept,
        }
    }

    #[pyo3(signature = (reservation, checksum, now, fetched=None, /))]
    fn commit(
        &self,
        py: Python<'_>,
        reservation: &Reservation,
        checksum: Option<u32>,
        now: f64,
        fetched: Option<f64>,
    ) -> PyResult<Option<Committed>> {
        let (fetched, now) = (millis(fetched.unwrap_or(now)), millis(now));
        let done = step!(self, py, |cache| {
            let done = cache.commit_fetched(reservation.id(), checksum, fetched, now)?;
            Ok(done.map(|done| (done, cache.has_failed_deletes())))
        })?;
        reservation.end();
        // The payload of the flight is released here, without the lock.
        Ok(done.map(|(done, failed_deletes)| {
            Committed::new(raw_victims(done.victims), failed_deletes)
        }))
    }

    #[pyo3(signature = (reservations, now, /))]
    fn commit_all(
        &self,
        py: Python<'_>,
        reservations: Vec<Py<Reservation>>,
        now: f64,
    ) -> PyResult<(Vec<usize>, Vec<RawVictim>)> {
        self.require_own_keys()?;
        self.commit_many(py, &reservations, millis(now))
    }

    #[pyo3(signature = (reservation, /))]
    fn release(&self, py: Python<'_>, reservation: &Reservation) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.abort(reservation.id()))?;
        reservation.end();
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (reservation, /))]
    fn abandon(&self, py: Python<'_>, reservation: &Reservation) -> PyResult<()> {
        step!(self, py, |cache| cache.abandon(reservation.id()))?;
        reservation.end();
        Ok(())
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

    #[pyo3(signature = (key, /))]
    fn begin_write(&self, py: Python<'_>, key: &str) -> PyResult<Vec<RawVictim>> {
        let key = &*self.whole(key);
        let victims = step!(self, py, |cache| cache.begin_write(key))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (key, ok, flight=None, /))]
    fn end_write(
        &self,
        py: Python<'_>,
        key: &str,
        ok: bool,
        flight: Option<Bound<'_, PyAny>>,
    ) -> PyResult<(Vec<RawVictim>, Option<u64>)> {
        let key = &*self.whole(key);
        // The caller holds a reference too, so dropping ours under the lock frees nothing.
        let payload = flight
            .as_ref()
            .map(|flight| Flight(flight.clone().unbind()));
        let (victims, ticket) = step!(self, py, |cache| cache.end_write(key, ok, payload))?;
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

    #[pyo3(signature = (prefix, /))]
    fn drain_prefix(&self, py: Python<'_>, prefix: &str) -> PyResult<Vec<RawVictim>> {
        let prefix = &*self.below(prefix);
        let victims = step!(self, py, |cache| cache.drain_prefix(prefix))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (prefix, /))]
    fn drain_absences(&self, py: Python<'_>, prefix: &str) -> PyResult<bool> {
        let prefix = &*self.below(prefix);
        step!(self, py, |cache| cache.drain_absences(prefix))
    }

    #[getter]
    fn absences(&self) -> u64 {
        self.tally.absences()
    }

    fn absent_keys(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let keys = step!(self, py, |cache| cache.absent_keys())?;
        Ok(self.own_keys(keys))
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

    /// See [`super::sampling`].
    fn sample<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let (copy, unit) = step!(self, py, |cache| Ok(cache.sampled()))?;
        sample(py, copy, unit)
    }

    #[pyo3(signature = (key, raw, /))]
    fn retract_request(&self, py: Python<'_>, key: &str, raw: RawSpan) -> PyResult<()> {
        let (key, span) = (&*self.whole(key), span(raw)?);
        step!(self, py, |cache| {
            cache.retract_sampled(key, span);
            Ok(())
        })
    }

    #[pyo3(signature = (values, /))]
    fn note_sizes(&self, py: Python<'_>, values: Vec<(String, RawSpan, u64)>) -> PyResult<()> {
        let values = (values.iter())
            .map(|(key, raw, size)| Ok((self.whole(key), span(*raw)?, *size)))
            .collect::<PyResult<Vec<_>>>()?;
        step!(self, py, |cache| {
            for (key, span, size) in &values {
                cache.note_sampled_size(key, *span, *size);
            }
            Ok(())
        })
    }

    fn stats(&self) -> (u64, u64, u64, u64, u64) {
        let stats = self.tally.stats();
        (
            stats.hits,
            stats.misses,
            stats.evictions,
            stats.expirations,
            stats.rejections,
        )
    }

    #[getter]
    fn live_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        step!(self, py, |cache| Ok(cache.live_bytes()))
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
        found.retain_mut(|entry| self.make_own(&mut entry.0));
        Ok((found, cursor))
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

    #[getter]
    fn in_flight(&self, py: Python<'_>) -> PyResult<(usize, usize)> {
        self.end_abandoned(py)?;
        step!(self, py, |cache| Ok(cache.in_flight()))
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        let len = step!(self, py, |cache| Ok(cache.len()))?;
        Ok(usize::try_from(len).unwrap_or(usize::MAX))
    }

    fn entries(&self, py: Python<'_>) -> PyResult<Vec<RawEntry>> {
        let mut entries = step!(self, py, |cache| cache.entries())?;
        entries.retain_mut(|entry| self.make_own(&mut entry.0));
        Ok(raw_entries(entries))
    }

    fn recency(&self, py: Python<'_>) -> PyResult<Vec<(String, RawSpan)>> {
        let mut recency = step!(self, py, |cache| cache.recency())?;
        recency.retain_mut(|entry| self.make_own(&mut entry.0));
        Ok(raw_recency(recency))
    }

    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| cache.validate())
    }

    fn after_fork(&self) -> PyResult<bool> {
        after_fork(&self.backing)
    }

    #[pyo3(signature = (handle, checksum, /))]
    fn mark_verified(&self, py: Python<'_>, handle: u64, checksum: u32) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.verified(handle, checksum);
            Ok(())
        })
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

    #[getter]
    fn owns_rebuild(&self, py: Python<'_>) -> PyResult<bool> {
        step!(self, py, |cache| Ok(cache.owns_rebuild()))
    }

    #[getter]
    fn begins_empty(&self, py: Python<'_>) -> PyResult<bool> {
        step!(self, py, |cache| Ok(cache.begins_empty()))
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

    #[pyo3(signature = (prefix, /))]
    fn in_progress_below(&self, py: Python<'_>, prefix: &str) -> PyResult<Vec<RawVictim>> {
        let prefix = &*self.below(prefix);
        let victims = step!(self, py, |cache| cache.in_progress_below(prefix))?;
        Ok(raw_victims(victims))
    }

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

    #[pyo3(signature = (name, /))]
    fn formerly(&self, py: Python<'_>, name: &str) -> PyResult<Option<(u64, u64, u32)>> {
        let found = shared(&self.backing, py, None, |index| Ok(index.formerly(name)))?;
        Ok(found.map(|value| (value.fetched, value.size, value.checksum)))
    }

    #[getter]
    fn is_complete(&self, py: Python<'_>) -> PyResult<bool> {
        step!(self, py, |cache| Ok(cache.is_complete()))
    }

    fn mark_corrupt(&self, py: Python<'_>) -> PyResult<()> {
        match &*self.backing {
            Backing::Own(..) => Ok(()),
            Backing::Shared(..) => step!(self, py, |_cache| Err(Error::Lost(
                "a size that is not the one of its file"
            ))),
        }
    }

    fn disown(&self) -> Vec<i32> {
        self.backing.disown()
    }

    #[pyo3(signature = (max_size, max_age, verify, /))]
    fn set_limits(
        &self,
        py: Python<'_>,
        max_size: Option<u64>,
        max_age: Option<f64>,
        verify: &str,
    ) -> PyResult<()> {
        let verify = when_to_verify(verify)?;
        step!(self, py, |cache| {
            cache.set_limits(max_size.unwrap_or(u64::MAX), max_age.map(age), verify);
            Ok(())
        })
    }

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

    #[pyo3(signature = (size, /))]
    fn count_folders(&self, py: Python<'_>, size: i64) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.count_folders(size);
            Ok(())
        })
    }

    #[getter]
    fn bound(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let bound = step!(self, py, |cache| Ok(cache.bound()))?;
        Ok(Some(bound).filter(|bound| *bound != u64::MAX))
    }

    #[getter]
    fn excess(&self, py: Python<'_>) -> PyResult<u64> {
        step!(self, py, |cache| cache.excess())
    }

    #[pyo3(signature = (size, now, /))]
    fn evict(&self, py: Python<'_>, size: u64, now: f64) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.evict(size, millis(now)))?;
        Ok(raw_victims(victims))
    }

    #[getter]
    fn shared(&self) -> bool {
        !matches!(*self.backing, Backing::Own(..))
    }

    #[getter]
    fn slot(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        // No step: another participant may just have died in one.
        shared(&self.backing, py, None, |directory| {
            Ok(Some(directory.own_slot()))
        })
    }

    #[getter]
    fn is_alone(&self, py: Python<'_>) -> PyResult<bool> {
        shared(&self.backing, py, true, |directory| directory.alone())
    }

    #[getter]
    fn is_in_place(&self, py: Python<'_>) -> PyResult<bool> {
        shared(&self.backing, py, true, |directory| {
            Ok(directory.is_in_place())
        })
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

    #[pyo3(signature = (seed, /))]
    fn restart(&self, py: Python<'_>, seed: u64) -> PyResult<bool> {
        shared(&self.backing, py, false, |directory| {
            directory.restart(seed)
        })
    }

    #[pyo3(signature = (seed, /))]
    fn rejoin(&self, py: Python<'_>, seed: u64) -> PyResult<bool> {
        // The flights outlive the lock, for releasing them may run code of Python's.
        let (fresh, _flights) = shared(&self.backing, py, (Ok(false), None), |directory| {
            let (fresh, flights) = directory.rejoin(seed);
            Ok((fresh, Some(flights)))
        })?;
        Ok(fresh?)
    }

    fn reclaim_dead(&self, py: Python<'_>) -> PyResult<(Vec<usize>, bool)> {
        let none = (Vec::new(), false);
        shared(&self.backing, py, none, |directory| directory.reap())
    }

    fn wait_unlocked(&self, py: Python<'_>) -> PyResult<()> {
        wait(&self.backing, py)
    }
}
