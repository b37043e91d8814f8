//! Room for fills: reserved, waited for, and committed or released.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyString;

use super::backing::step;
use super::convert::{RawSpan, RawVictim, known, millis, raw_victims, span};
use super::index::Index;
use super::reservation::{Committed, Granted, NeedsEviction, Rejected, Reservation};
use crate::cache::{BATCH, Reserve};
use crate::key::ByteRange;

/// Reservations of many values, `None` for those that were rejected, and what they want deleted.
type Many<T> = (Vec<Option<T>>, Vec<RawVictim>);

impl Index {
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

    fn hold(&self, id: u64) -> Reservation {
        Reservation::new(id, Arc::clone(&self.abandoned))
    }

    /// The answer to a reservation as Python gets it.
    fn answer<'py>(
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
                Bound::new(py, Granted::new(reservation))?.into_any()
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
                Bound::new(py, Rejected::new(reason))?.into_any()
            }
        })
    }
}

#[pymethods]
impl Index {
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
        let now = millis(now);
        let wanted: Vec<_> = keys.iter().zip(&tickets).collect();
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
        let now = millis(now);
        let id = |held: &Option<Py<Reservation>>| held.as_ref().map(|held| held.get().id());
        let ids: Vec<_> = reservations.iter().map(id).collect();
        let answers = step!(self, py, |cache| cache
            .many_evicted(&ids, &dropped, &failed, now))?;
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
        let held = reservations.into_iter().zip(answers).map(go_on).collect();
        Ok((held, raw_victims(victims)))
    }

    #[pyo3(signature = (reservations, now, /))]
    fn commit_all(
        &self,
        py: Python<'_>,
        reservations: Vec<Py<Reservation>>,
        now: f64,
    ) -> PyResult<(Vec<usize>, Vec<RawVictim>)> {
        self.require_own_keys()?;
        let now = millis(now);
        let (mut unknown, mut victims) = (Vec::new(), Vec::new());
        let mut flights = Vec::with_capacity(reservations.len());
        for (batch, some) in reservations.chunks(BATCH).enumerate() {
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
}
