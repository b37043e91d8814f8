//! The lock of an index, for threads that are attached to the interpreter.
//!
//! No step keeps the lock while it calls into Python or waits for anything, so an attached thread
//! never blocks for long; where the lock is taken, the waiting thread detaches first
//! (`lock_py_attached`). Threads without an interpreter take the lock as well (see
//! [`crate::disk`]), and need none while they hold it.

use std::sync::{Mutex, MutexGuard};

use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::errors::busy;
use super::errors::poisoned;
use crate::shared::Locked;
use crate::shared::{SharedIndex, StepError};

/// What readers wait on. Attached threads clone it under the lock; that runs no Python code.
#[derive(Debug)]
pub(super) struct Flight(pub(super) Py<PyAny>);

impl Clone for Flight {
    fn clone(&self) -> Self {
        Python::attach(|py| Flight(self.0.clone_ref(py)))
    }
}

pub(super) type Backing = Locked<Flight>;

/// In a forked child: drops what other threads of the parent had in progress. False where the index
/// has to be made or opened anew.
pub(super) fn after_fork(backing: &Backing) -> PyResult<bool> {
    let Locked::Own(lock, _) = backing else {
        return Ok(false);
    };
    // Only the forking thread lives on, so a lock that is held now is never released.
    match lock.try_lock() {
        Ok(mut cache) => {
            // The flights refer to objects of the parent's threads; releasing them can run
            // their code, so that happens after the lock.
            let flights = cache.after_fork()?;
            drop(cache);
            drop(flights);
            Ok(true)
        }
        Err(_) => {
            backing.disown();
            Ok(false)
        }
    }
}

/// The result of `work` on a shared index, detached; `without` where the index is not shared.
pub(super) fn shared<R: Send>(
    backing: &Backing,
    py: Python<'_>,
    without: R,
    work: impl FnOnce(&mut SharedIndex<Flight>) -> Result<R, StepError> + Send,
) -> PyResult<R> {
    match backing {
        Locked::Own(..) => Ok(without),
        Locked::Shared(..) if backing.is_disowned() => Err(busy()),
        Locked::Shared(lock, _) => py.detach(|| Ok(work(&mut *lock.lock().map_err(poisoned)?)?)),
    }
}

/// Waits until the lock of the directory is free.
pub(super) fn wait(backing: &Backing, py: Python<'_>) -> PyResult<()> {
    match backing {
        Locked::Own(..) => Ok(()),
        Locked::Shared(..) if backing.is_disowned() => Ok(()),
        Locked::Shared(lock, _) => {
            let wait = self::lock(lock, py)?.waiter();
            py.detach(wait);
            Ok(())
        }
    }
}

/// Takes the lock; a thread that waits for it is detached meanwhile.
#[inline]
pub(super) fn lock<'a, T>(lock: &'a Mutex<T>, py: Python<'_>) -> PyResult<MutexGuard<'a, T>> {
    lock.lock_py_attached(py).map_err(poisoned)
}

/// Takes one step of the index: `work` sees the cache, whatever is behind it.
macro_rules! step {
    ($self:ident, $py:ident, |$cache:ident| $work:expr) => {
        match &*$self.backing {
            _ if $self.backing.is_disowned() => Err($crate::python::errors::busy()),
            $crate::shared::Locked::Own(lock, _) => {
                let mut guard = $crate::python::backing::lock(lock, $py)?;
                let $cache = &mut *guard;
                let result: $crate::error::Result<_> = $work;
                drop(guard);
                result.map_err(::pyo3::PyErr::from)
            }
            $crate::shared::Locked::Shared(lock, _) => {
                let mut guard = $crate::python::backing::lock(lock, $py)?;
                let relax = |pause| $py.detach(|| std::thread::sleep(pause));
                let result = guard.step(relax, |$cache| $work);
                drop(guard);
                result.map_err(::pyo3::PyErr::from)
            }
        }
    };
}

pub(super) use step;
