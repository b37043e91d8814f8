//! A reservation as Python holds it.
//!
//! An interrupt may come between any two steps of a fill, even between the end of a call and the name
//! that its answer is given. So a reservation that nobody holds any more is given back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::backing::{Backing, step};
use super::convert::{raw_victims, why};
use super::errors::poisoned;
use super::index::Index;
use crate::cache::Room;
use crate::error::Fault;

/// Reservations that were let go before their end. The index sees to them in a step of its own, for
/// the garbage collector lets go of things at any moment.
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

    /// The index knows nothing of it any more.
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

impl Index {
    /// Gives back what nobody holds any more.
    pub(super) fn see_to_abandoned(&self, py: Python<'_>) -> PyResult<()> {
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

    /// What a caller hears about room: the reservation, and deletes that it waits for; or why not.
    pub(super) fn answer<'py>(
        &self,
        py: Python<'py>,
        room: Room,
        held: Option<Bound<'py, Reservation>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (id, victims) = match room {
            Room::Granted(id) => (id, Vec::new()),
            Room::Evict(id, victims) => (id, raw_victims(victims)),
            Room::Refused(refusal) => {
                if let Some(held) = held {
                    held.get().end();
                }
                return Ok(why(refusal).into_pyobject(py)?.into_any());
            }
        };
        let held = match held {
            Some(held) => held,
            None => Bound::new(py, Reservation::new(id, Arc::clone(&self.abandoned)))?,
        };
        Ok((held, victims).into_pyobject(py)?.into_any())
    }
}
