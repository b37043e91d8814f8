//! A reservation as Python holds it.
//!
//! An interrupt may come between any two steps of a fill, even between the return of a call and the
//! assignment of its result. So a reservation ends when its object is dropped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;

use super::convert::RawVictim;

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
    pub(super) fn new(reservation: Py<Reservation>) -> Self {
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
    pub(super) fn new(reservation: Py<Reservation>, victims: Vec<RawVictim>) -> Self {
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
    pub(super) fn new(reason: String) -> Self {
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
