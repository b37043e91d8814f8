//! Those who share an index: threads, processes, and the child of a fork.

use pyo3::prelude::*;

use super::backing::{Backing, after_fork, shared, wait};
use super::index::Index;

#[pymethods]
impl Index {
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

    fn after_fork(&self) -> PyResult<bool> {
        after_fork(&self.backing)
    }

    fn disown(&self) -> Vec<i32> {
        self.backing.disown()
    }
}
