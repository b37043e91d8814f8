//! What is behind an index, and its lock.
//!
//! No step keeps the lock while it calls into Python or waits for anything, so an attached thread
//! never blocks for long; where the lock is taken, the waiting thread detaches first
//! (`lock_py_attached`). With the GIL the lock is therefore free whenever another thread can
//! fork.

use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
#[cfg(unix)]
use pyo3::sync::MutexExt;

use super::errors::poisoned;
use crate::block::Heap;
use crate::cache::Cache;
#[cfg(unix)]
use crate::{
    directory::{Directory, StepError},
    mapped::Locks,
};

/// What readers wait on. It is cloned under the lock, which runs no code of Python's, by threads that
/// are attached.
#[derive(Debug)]
pub(super) struct Flight(pub(super) Py<PyAny>);

impl Clone for Flight {
    fn clone(&self) -> Self {
        Python::attach(|py| Flight(self.0.clone_ref(py)))
    }
}

pub(super) type Core = Cache<Heap, Flight>;

pub(super) enum Backing {
    Memory(Mutex<Core>),
    #[cfg(unix)]
    Shared(Mutex<Directory<Flight>>, Arc<Locks>),
}

impl Backing {
    /// In a forked child: lets go of what other threads of the parent had in hand. False where the
    /// index has to be made or opened anew.
    pub(super) fn after_fork(&self) -> PyResult<bool> {
        let Backing::Memory(lock) = self else {
            return Ok(false);
        };
        // Only the forking thread lives on, so a lock that is taken now is never given back.
        match lock.try_lock() {
            Ok(mut cache) => {
                // The flights refer to objects of the parent's threads; releasing them can run
                // their code, so that happens after the lock.
                let flights = cache.after_fork()?;
                drop(cache);
                drop(flights);
                Ok(true)
            }
            Err(_) => Ok(false),
        }
    }
}

#[cfg(unix)]
impl Backing {
    /// In a forked child: takes no step from now on. Returns the descriptors of the parent's locks.
    pub(super) fn leave(&self) -> Vec<i32> {
        match self {
            Backing::Memory(_) => Vec::new(),
            Backing::Shared(_, locks) => {
                locks.leave();
                locks.fds().into()
            }
        }
    }

    /// Which of the participants this one is.
    pub(super) fn place(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        match self {
            Backing::Memory(_) => Ok(None),
            Backing::Shared(lock, _) => {
                Ok(Some(lock.lock_py_attached(py).map_err(poisoned)?.place()))
            }
        }
    }

    /// What `work` makes of the directory, detached; `without` where there is none.
    pub(super) fn shared<R: Send>(
        &self,
        py: Python<'_>,
        without: R,
        work: impl FnOnce(&mut Directory<Flight>) -> Result<R, StepError> + Send,
    ) -> PyResult<R> {
        match self {
            Backing::Memory(_) => Ok(without),
            Backing::Shared(lock, _) => {
                py.detach(|| Ok(work(&mut *lock.lock().map_err(poisoned)?)?))
            }
        }
    }

    /// Waits until the lock of the directory is free.
    pub(super) fn wait(&self, py: Python<'_>) -> PyResult<()> {
        if let Backing::Shared(lock, _) = self {
            let wait = lock.lock_py_attached(py).map_err(poisoned)?.waiter();
            py.detach(wait);
        }
        Ok(())
    }
}

/// Takes one step of the index: `work` sees the cache, whatever is behind it.
macro_rules! step {
    ($self:ident, $py:ident, |$cache:ident| $work:expr) => {
        match &$self.backing {
            Backing::Memory(lock) => {
                let mut guard = lock.lock_py_attached($py).map_err(poisoned)?;
                let $cache = &mut *guard;
                let result: Result<_, Fault> = $work;
                drop(guard);
                result.map_err(PyErr::from)
            }
            #[cfg(unix)]
            Backing::Shared(lock, _) => {
                let mut guard = lock.lock_py_attached($py).map_err(poisoned)?;
                let relax = |pause| $py.detach(|| std::thread::sleep(pause));
                let result = guard.step(relax, |$cache| $work);
                drop(guard);
                result.map_err(PyErr::from)
            }
        }
    };
}

pub(super) use step;
