//! The index: extract, lock, call, convert.
//!
//! Why the lock is never held for long, see [`super::backing`].

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyBytes, PyDict, PyString};

use super::backing::{Backing, Flight, step};
use super::convert::{
    RawEntry, RawSpan, RawVictim, age, hit, known, limits, millis, raw_entries, raw_recency,
    raw_span, raw_victims, span, when_to_verify,
};
use super::errors::poisoned;
use super::memory::Fill;
use super::reservation::{Abandoned, Reservation};
use crate::block::Heap;
use crate::cache::{Cache, Joined};
#[cfg(unix)]
use crate::directory::Directory;
use crate::error::Fault;

/// An index with its bounds, flights and reservations, behind one lock.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct Index {
    pub(super) backing: Backing,
    pub(super) abandoned: Arc<Abandoned>,
}

impl Index {
    fn over(backing: Backing) -> Self {
        let abandoned = Arc::default();
        Index { backing, abandoned }
    }
}

#[pymethods]
impl Index {
    #[new]
    #[pyo3(signature = (*, max_size=None, max_age=None, lenient=false, flat=false, verify="never",
                        seed=0))]
    fn new(
        max_size: Option<u64>,
        max_age: Option<f64>,
        lenient: bool,
        flat: bool,
        verify: &str,
        seed: u64,
    ) -> PyResult<Self> {
        let limits = limits(max_size, max_age, lenient, flat, verify)?;
        let cache = Cache::new(Heap::default(), limits, seed)?;
        Ok(Index::over(Backing::Memory(Mutex::new(cache))))
    }

    /// Opens the index of a cache directory; see the stub.
    #[cfg(unix)]
    #[staticmethod]
    #[pyo3(signature = (root, /, *, max_size=None, max_age=None, lenient=false, flat=false,
                        verify="never", seed=0))]
    #[allow(clippy::too_many_arguments)] // As many options as there are.
    fn open(
        py: Python<'_>,
        root: PathBuf,
        max_size: Option<u64>,
        max_age: Option<f64>,
        lenient: bool,
        flat: bool,
        verify: &str,
        seed: u64,
    ) -> PyResult<(Self, bool)> {
        let limits = limits(max_size, max_age, lenient, flat, verify)?;
        let (directory, fresh) = py.detach(|| Directory::open(&root, limits, seed))?;
        let locks = directory.locks();
        let backing = Backing::Shared(Mutex::new(directory), locks);
        Ok((Index::over(backing), fresh))
    }

    #[pyo3(signature = (key, raw=None, now=0.0, /))]
    fn lookup<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        raw: RawSpan,
        now: f64,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        if raw.is_none()
            && let Backing::Memory(lock) = &self.backing
        {
            let mut cache = lock.lock_py_attached(py).map_err(poisoned)?;
            let hit = cache.hit(key, millis(now));
            drop(cache);
            if let Some(answer) = hit {
                let size = answer.map(|size| size.into_pyobject(py)).transpose()?;
                return Ok(size.map(Bound::into_any));
            }
        }
        let span = span(raw)?;
        let found = step!(self, py, |cache| {
            let found = cache.lookup(key, span, millis(now))?;
            Ok(found.map(|found| (found, cache.must_verify(found.handle))))
        })?;
        found
            .map(|(found, verify)| hit(py, key, span, &found, verify))
            .transpose()
    }

    #[pyo3(signature = (key, raw, now, /))]
    fn peek(&self, py: Python<'_>, key: &str, raw: RawSpan, now: f64) -> PyResult<Option<u64>> {
        let span = span(raw)?;
        let found = step!(self, py, |cache| cache.peek(key, span, millis(now)))?;
        Ok(found.map(|found| found.length))
    }

    #[pyo3(signature = (key, raw, now, size=None, /))]
    fn discard(
        &self,
        py: Python<'_>,
        key: &str,
        raw: RawSpan,
        now: f64,
        size: Option<u64>,
    ) -> PyResult<Vec<RawVictim>> {
        let span = span(raw)?;
        let victims = step!(self, py, |cache| {
            let found = cache.peek(key, span, millis(now))?;
            // One of another size has taken its place meanwhile.
            let same = found.filter(|found| size.is_none_or(|size| size == found.size));
            cache.discard(same.map_or(u64::MAX, |found| found.handle))
        })?;
        Ok(raw_victims(victims))
    }

    fn count_miss(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.count_miss();
            Ok(())
        })
    }

    fn missed(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.missed();
            Ok(())
        })
    }

    #[pyo3(signature = (key, raw, flight, now, anyway, /))]
    fn join<'py>(
        &self,
        py: Python<'py>,
        key: &Bound<'py, PyString>,
        raw: RawSpan,
        flight: &Bound<'py, PyAny>,
        now: f64,
        anyway: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let Some(key) = known(key) else {
            return Ok(false.into_pyobject(py)?.to_owned().into_any());
        };
        let span = span(raw)?;
        // The caller has it as well: where ours goes while the lock is held, nothing is released.
        let kept = Flight(flight.clone().unbind());
        let joined = step!(self, py, |cache| cache.join(
            key,
            span,
            kept,
            millis(now),
            anyway
        ))?;
        match joined {
            Joined::Ready => Ok(py.None().into_bound(py)),
            Joined::Lead(ticket) => Ok(ticket.into_pyobject(py)?.into_any()),
            Joined::Follow(whole, flight) => {
                Ok((raw_span(whole), flight.0).into_pyobject(py)?.into_any())
            }
        }
    }

    #[pyo3(signature = (key, ticket, /))]
    fn land(&self, py: Python<'_>, key: &str, ticket: u64) -> PyResult<()> {
        // The payload outlives the lock, for releasing it may run code of Python's.
        let flight = step!(self, py, |cache| Ok(cache.land(key, ticket)))?;
        drop(flight);
        Ok(())
    }

    #[pyo3(signature = (key, flight, /))]
    fn strike(&self, py: Python<'_>, key: &str, flight: Py<PyAny>) -> PyResult<()> {
        let struck = step!(self, py, |cache| Ok(
            cache.strike(key, |other| other.0.is(&flight))
        ))?;
        drop(struck);
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
        self.see_to_abandoned(py)?;
        let span = span(raw)?;
        let now = millis(now);
        let room = step!(self, py, |cache| cache
            .reserve(key, span, size, ticket, now))?;
        self.answer(py, room, None)
    }

    #[pyo3(signature = (reservation, dropped, failed, now, /))]
    fn settle<'py>(
        &self,
        py: Python<'py>,
        reservation: Bound<'py, Reservation>,
        dropped: Vec<u32>,
        failed: Vec<u32>,
        now: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (id, now) = (reservation.get().id(), millis(now));
        let room = step!(self, py, |cache| cache.settle(id, &dropped, &failed, now))?;
        self.answer(py, room, Some(reservation))
    }

    /// See [`super::memory`].
    #[pyo3(signature = (values, key, raw, data, value, ticket, now, /))]
    #[allow(clippy::too_many_arguments)] // All that a fill is about, for one call.
    fn keep(
        &self,
        values: &Bound<'_, PyDict>,
        key: &Bound<'_, PyString>,
        raw: RawSpan,
        data: &Bound<'_, PyBytes>,
        value: &Bound<'_, PyAny>,
        ticket: u64,
        now: f64,
    ) -> PyResult<Option<bool>> {
        let fill = Fill {
            backing: &self.backing,
            values,
            key,
            span: span(raw)?,
            data,
            ticket,
            now: millis(now),
        };
        if self.see_to_abandoned(values.py()).is_err() {
            return Ok(None);
        }
        match fill.run(value) {
            // Short memory, say: whoever lands the flight sees to the rest.
            Err(error) if error.is_instance_of::<PyException>(values.py()) => Ok(None),
            kept => kept,
        }
    }

    #[pyo3(signature = (reservation, checksum, now, /))]
    fn finish(
        &self,
        py: Python<'_>,
        reservation: &Reservation,
        checksum: Option<u32>,
        now: f64,
    ) -> PyResult<Option<(Vec<RawVictim>, bool)>> {
        let done = step!(self, py, |cache| {
            let done = cache.finish(reservation.id(), checksum, millis(now))?;
            Ok(done.map(|done| (done, cache.has_orphans())))
        })?;
        reservation.end();
        // The payload of the flight is released here, without the lock.
        Ok(done.map(|(done, orphans)| (raw_victims(done.victims), orphans)))
    }

    #[pyo3(signature = (reservation, /))]
    fn abort(&self, py: Python<'_>, reservation: &Reservation) -> PyResult<Vec<RawVictim>> {
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
    fn settled(&self, py: Python<'_>, dropped: Vec<u32>, failed: Vec<u32>) -> PyResult<()> {
        step!(self, py, |cache| cache.settled(&dropped, &failed))
    }

    #[pyo3(signature = (limit, /))]
    fn orphans(&self, py: Python<'_>, limit: usize) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.orphans(limit))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (key, /))]
    fn begin_write(&self, py: Python<'_>, key: &str) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.begin_write(key))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (key, ok, /))]
    fn end_write(
        &self,
        py: Python<'_>,
        key: &str,
        ok: bool,
    ) -> PyResult<(Vec<RawVictim>, Option<u64>)> {
        let (victims, ticket) = step!(self, py, |cache| cache.end_write(key, ok))?;
        Ok((raw_victims(victims), ticket))
    }

    #[pyo3(signature = (key, /))]
    fn forget(&self, py: Python<'_>, key: &str) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.forget(key))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (prefix, begins=None, /))]
    fn void_prefix(&self, py: Python<'_>, prefix: &str, begins: Option<bool>) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.void_prefix(prefix);
            if let Some(begins) = begins {
                cache.mark_change(prefix, begins);
            }
            Ok(())
        })
    }

    #[pyo3(signature = (prefix, /))]
    fn sweep(&self, py: Python<'_>, prefix: &str) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.sweep(prefix))?;
        Ok(raw_victims(victims))
    }

    fn stats(&self, py: Python<'_>) -> PyResult<(u64, u64, u64, u64, u64)> {
        let stats = step!(self, py, |cache| Ok(cache.stats()))?;
        Ok((
            stats.hits,
            stats.misses,
            stats.evictions,
            stats.expirations,
            stats.refusals,
        ))
    }

    #[getter]
    fn current_size(&self, py: Python<'_>) -> PyResult<u64> {
        self.see_to_abandoned(py)?;
        step!(self, py, |cache| Ok(cache.current_size()))
    }

    #[getter]
    fn memory(&self, py: Python<'_>) -> PyResult<u64> {
        step!(self, py, |cache| Ok(cache.memory()))
    }

    #[getter]
    fn in_flight(&self, py: Python<'_>) -> PyResult<(usize, usize)> {
        self.see_to_abandoned(py)?;
        step!(self, py, |cache| Ok(cache.in_flight()))
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        let len = step!(self, py, |cache| Ok(cache.len()))?;
        Ok(usize::try_from(len).unwrap_or(usize::MAX))
    }

    fn entries(&self, py: Python<'_>) -> PyResult<Vec<RawEntry>> {
        Ok(raw_entries(step!(self, py, |cache| cache.entries())?))
    }

    fn recency(&self, py: Python<'_>) -> PyResult<Vec<(String, RawSpan)>> {
        Ok(raw_recency(step!(self, py, |cache| cache.recency())?))
    }

    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| cache.validate())
    }

    fn after_fork(&self) -> PyResult<bool> {
        self.backing.after_fork()
    }

    #[pyo3(signature = (handle, checksum, /))]
    fn verified(&self, py: Python<'_>, handle: u64, checksum: u32) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.verified(handle, checksum);
            Ok(())
        })
    }

    #[pyo3(signature = (values, /))]
    fn adopt(&self, py: Python<'_>, values: Vec<(u64, u64, String)>) -> PyResult<bool> {
        step!(self, py, |cache| {
            if !cache.is_filled_here() {
                return Ok(false);
            }
            for (fetched, size, name) in &values {
                cache.adopt(name, *size, *fetched)?;
            }
            Ok(true)
        })
    }

    #[getter]
    fn is_complete(&self, py: Python<'_>) -> PyResult<bool> {
        step!(self, py, |cache| Ok(cache.is_complete()))
    }

    fn condemn(&self, py: Python<'_>) -> PyResult<()> {
        match &self.backing {
            Backing::Memory(_) => Ok(()),
            #[cfg(unix)]
            Backing::Shared(..) => step!(self, py, |_cache| Err(Fault::Corrupt(
                "a size that is not the one of its file"
            ))),
        }
    }

    #[cfg(unix)]
    fn leave(&self) -> Vec<i32> {
        self.backing.leave()
    }

    #[pyo3(signature = (max_size, max_age, verify, /))]
    fn rebound(
        &self,
        py: Python<'_>,
        max_size: Option<u64>,
        max_age: Option<f64>,
        verify: &str,
    ) -> PyResult<()> {
        let verify = when_to_verify(verify)?;
        step!(self, py, |cache| {
            cache.rebound(max_size.unwrap_or(u64::MAX), max_age.map(age), verify);
            Ok(())
        })
    }

    #[pyo3(signature = (size, now, /))]
    fn evict(&self, py: Python<'_>, size: u64, now: f64) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.evict(size, millis(now)))?;
        Ok(raw_victims(victims))
    }

    #[getter]
    fn shared(&self) -> bool {
        !matches!(self.backing, Backing::Memory(_))
    }

    #[cfg(unix)]
    #[getter]
    fn place(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        self.backing.place(py)
    }

    #[cfg(unix)]
    #[getter]
    fn alone(&self, py: Python<'_>) -> PyResult<bool> {
        self.backing.shared(py, true, |directory| directory.alone())
    }

    #[cfg(unix)]
    fn complete(&self, py: Python<'_>) -> PyResult<()> {
        self.backing
            .shared(py, (), |directory| directory.complete())
    }

    #[cfg(unix)]
    #[pyo3(signature = (seed, /))]
    fn restart(&self, py: Python<'_>, seed: u64) -> PyResult<bool> {
        self.backing
            .shared(py, false, |directory| directory.restart(seed))
    }

    #[cfg(unix)]
    fn reap(&self, py: Python<'_>) -> PyResult<(Vec<usize>, bool)> {
        let nobody = (Vec::new(), false);
        self.backing
            .shared(py, nobody, |directory| directory.reap())
    }

    #[cfg(unix)]
    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        self.backing.wait(py)
    }
}
