//! A reservation as Python holds it.
//!
//! An interrupt may come between any two steps of a fill, even between the return of a call and the
//! assignment of its result. So a reservation ends when its object is dropped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyString;

use super::backing::step;
use super::convert::{RawVictim, known, raw_victims};
use super::index::Index;
use crate::cache::{BATCH, Reserve};
use crate::key::ByteRange;

/// Reservations that were dropped before their end. They are ended in a later step, because the
/// garbage collector may drop objects while the lock is held.
#[derive(Default)]
pub(super) struct Abandoned {
    any: AtomicBool,
    ids: Mutex<Vec<u64>>,
}

impl Abandoned {
    pub(super) fn add(&self, more: &[u64]) {
        let mut ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        ids.extend_from_slice(more);
        self.any.store(!ids.is_empty(), Ordering::Release);
    }

    /// Those that were added since.
    pub(super) fn take(&self) -> Vec<u64> {
        if !self.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut ids)
    }
}

/// See the stub.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct Reservation {
    id: u64,
    ended: AtomicBool,
    abandoned: Arc<Abandoned>,
}

impl Reservation {
    pub(super) fn new(id: u64, abandoned: Arc<Abandoned>) -> Self {
        let ended = AtomicBool::new(false);
        Reservation {
            id,
            ended,
            abandoned,
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// The index no longer has it.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !*self.ended.get_mut() {
            self.abandoned.add(&[self.id]);
        }
    }
}

/// See the stub.
#[pyclass(frozen, get_all, module = "zcache._core")]
pub(super) struct Granted {
    reservation: Py<Reservation>,
}

#[pymethods]
impl Granted {
    #[classattr]
    #[pyo3(name = "__match_args__")]
    const MATCH_ARGS: (&'static str,) = ("reservation",);

    #[new]
    fn new(reservation: Py<Reservation>) -> Self {
        Granted { reservation }
    }
}

/// See the stub.
#[pyclass(frozen, get_all, module = "zcache._core")]
pub(super) struct NeedsEviction {
    reservation: Py<Reservation>,
    victims: Vec<RawVictim>,
}

#[pymethods]
impl NeedsEviction {
    #[classattr]
    #[pyo3(name = "__match_args__")]
    const MATCH_ARGS: (&'static str, &'static str) = ("reservation", "victims");

    #[new]
    fn new(reservation: Py<Reservation>, victims: Vec<RawVictim>) -> Self {
        NeedsEviction {
            reservation,
            victims,
        }
    }
}

/// See the stub.
#[pyclass(frozen, get_all, module = "zcache._core")]
pub(super) struct Rejected {
    reason: String,
}

#[pymethods]
impl Rejected {
    #[classattr]
    #[pyo3(name = "__match_args__")]
    const MATCH_ARGS: (&'static str,) = ("reason",);

    #[new]
    fn new(reason: String) -> Self {
        Rejected { reason }
    }
}

/// See the stub.
#[pyclass(frozen, get_all, module = "zcache._core")]
pub(super) struct Committed {
    victims: Vec<RawVictim>,
    has_failed_deletes: bool,
}

#[pymethods]
impl Committed {
    #[classattr]
    #[pyo3(name = "__match_args__")]
    const MATCH_ARGS: (&'static str, &'static str) = ("victims", "has_failed_deletes");

    #[new]
    pub(super) fn new(victims: Vec<RawVictim>, has_failed_deletes: bool) -> Self {
        Committed {
            victims,
            has_failed_deletes,
        }
    }
}

/// Reservations of many values, `None` for those that were rejected, and what they want deleted.
pub(super) type Many<T> = (Vec<Option<T>>, Vec<RawVictim>);

impl Index {
    /// Reserves room for many values of one size.
    pub(super) fn reserve_many(
        &self,
        py: Python<'_>,
        keys: &[Bound<'_, PyString>],
        size: u64,
        tickets: &[u64],
        now: u64,
    ) -> PyResult<Many<Reservation>> {
        let wanted: Vec<_> = keys.iter().zip(tickets).collect();
        let (mut held, mut victims) = (Vec::with_capacity(keys.len()), Vec::new());
        // In steps, so that no one waits for long.
        for some in wanted.chunks(BATCH) {
            step!(self, py, |cache| {
                for (key, ticket) in some {
                    let answer = known(key)
                        .map(|key| cache.reserve(key, ByteRange::Full, size, **ticket, now));
                    held.push(match answer.transpose()? {
                        Some(Reserve::Granted(id)) => Some(self.hold(id)),
                        Some(Reserve::NeedsEviction(id, more)) => {
                            victims.extend(more);
                            Some(self.hold(id))
                        }
                        Some(Reserve::Rejected(_)) | None => None,
                    });
                }
                Ok(())
            })?;
        }
        Ok((held, raw_victims(victims)))
    }

    /// Reports the deletes that these have asked for, and goes on with them.
    pub(super) fn advance_many(
        &self,
        py: Python<'_>,
        held: Vec<Option<Py<Reservation>>>,
        deleted: &[u32],
        failed: &[u32],
        now: u64,
    ) -> PyResult<Many<Py<Reservation>>> {
        let id = |held: &Option<Py<Reservation>>| held.as_ref().map(|held| held.get().id());
        let ids: Vec<_> = held.iter().map(id).collect();
        let answers = step!(self, py, |cache| cache
            .many_evicted(&ids, deleted, failed, now))?;
        let mut victims = Vec::new();
        let go_on = |(held, answer): (Option<Py<Reservation>>, _)| match answer {
            Some(Reserve::Rejected(_)) => {
                held.inspect(|held| held.get().end());
                None
            }
            Some(Reserve::NeedsEviction(_, more)) => {
                victims.extend(more);
                held
            }
            Some(Reserve::Granted(_)) | None => held,
        };
        let held = held.into_iter().zip(answers).map(go_on).collect();
        Ok((held, raw_victims(victims)))
    }

    fn hold(&self, id: u64) -> Reservation {
        Reservation::new(id, Arc::clone(&self.abandoned))
    }

    /// Commits many. Returns those of which the index knows nothing any more, and what has to be deleted.
    pub(super) fn commit_many(
        &self,
        py: Python<'_>,
        held: &[Py<Reservation>],
        now: u64,
    ) -> PyResult<(Vec<usize>, Vec<RawVictim>)> {
        let (mut unknown, mut victims) = (Vec::new(), Vec::new());
        let mut flights = Vec::with_capacity(held.len());
        for (batch, some) in held.chunks(BATCH).enumerate() {
            step!(self, py, |cache| {
                for (at, held) in some.iter().enumerate() {
                    match cache.commit(held.get().id(), None, now)? {
                        Some(done) => {
                            victims.extend(done.victims);
                            flights.push(done.flight);
                        }
                        None => unknown.push(batch * BATCH + at),
                    }
                    held.get().end();
                }
                Ok(())
            })?;
        }
        // Their payloads are released without the lock.
        drop(flights);
        Ok((unknown, raw_victims(victims)))
    }

    /// Ends the reservations that were dropped.
    pub(super) fn end_abandoned(&self, py: Python<'_>) -> PyResult<()> {
        let mut ids = self.abandoned.take();
        while let Some(id) = ids.pop() {
            if let Err(error) = step!(self, py, |cache| cache.abandon(id)) {
                ids.push(id);
                self.abandoned.add(&ids);
                return Err(error);
            }
        }
        Ok(())
    }

    /// The answer to a reservation as Python gets it.
    pub(super) fn answer<'py>(
        &self,
        py: Python<'py>,
        answer: Reserve,
        held: Option<Bound<'py, Reservation>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let held_for = |id| match &held {
            Some(held) => Ok(held.clone().unbind()),
            None => Py::new(py, self.hold(id)),
        };
        Ok(match answer {
            Reserve::Granted(id) => {
                let reservation = held_for(id)?;
                Bound::new(py, Granted { reservation })?.into_any()
            }
            Reserve::NeedsEviction(id, victims) => {
                let (reservation, victims) = (held_for(id)?, raw_victims(victims));
                Bound::new(py, NeedsEviction::new(reservation, victims))?.into_any()
            }
            Reserve::Rejected(reason) => {
                if let Some(held) = held {
                    held.get().end();
                }
                let reason = reason.as_str().to_owned();
                Bound::new(py, Rejected { reason })?.into_any()
            }
        })
    }
}
