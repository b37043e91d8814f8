//! Flights: joined, completed, aborted, and superseded.

use pyo3::prelude::*;
use pyo3::types::PyString;

use super::backing::{Flight, step};
use super::convert::{
    RawAges, RawSpan, RawVictim, absence_ages, fresh, known, millis, raw_span, raw_victims, span,
};
use super::index::Index;
use crate::cache::{BATCH, Joined};
use crate::key::ByteRange;

#[pymethods]
impl Index {
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

    #[pyo3(signature = (key, /))]
    fn is_in_flight(&self, py: Python<'_>, key: &str) -> PyResult<bool> {
        let key = &*self.whole(key);
        step!(self, py, |cache| Ok(cache.is_in_flight(key)))
    }

    #[getter]
    fn in_flight(&self, py: Python<'_>) -> PyResult<(usize, usize)> {
        self.end_abandoned(py)?;
        step!(self, py, |cache| Ok(cache.in_flight()))
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

    #[pyo3(signature = (key, flight, /))]
    fn supersede_flight(&self, py: Python<'_>, key: &str, flight: Py<PyAny>) -> PyResult<()> {
        let key = &*self.whole(key);
        step!(self, py, |cache| {
            cache.supersede_flight(key, |other| other.0.is(&flight));
            Ok(())
        })
    }
}
