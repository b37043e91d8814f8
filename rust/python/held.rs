//! The lock of an index, for tests: extract, detach, call.

use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::shared;

/// See the stub.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct HeldLock(shared::HeldLock);

#[pymethods]
impl HeldLock {
    #[new]
    #[pyo3(signature = (root, /, *, timeout=1.0))]
    fn new(py: Python<'_>, root: PathBuf, timeout: f64) -> PyResult<Self> {
        let patience = Duration::try_from_secs_f64(timeout).unwrap_or_default();
        let held = py.detach(|| shared::HeldLock::take(&root, patience))?;
        Ok(HeldLock(held))
    }

    fn __enter__(this: Bound<'_, Self>) -> Bound<'_, Self> {
        this
    }

    #[pyo3(signature = (*_raised))]
    fn __exit__(&self, _raised: &Bound<'_, PyTuple>) {
        self.0.release();
    }

    fn release(&self) -> bool {
        self.0.release()
    }
}
