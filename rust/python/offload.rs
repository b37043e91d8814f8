//! Writes and deletes of a disk, by threads without an interpreter: hand in, collect, convert.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyList;

use super::errors::os_error;
use super::files::NewFile;
use crate::files;
use crate::offload::{Desk as Results, Left, Workers as Threads};

/// See the stub.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct Workers(Threads);

#[pymethods]
impl Workers {
    #[new]
    #[pyo3(signature = (count, /))]
    fn new(count: usize) -> PyResult<Self> {
        Threads::new(count.max(1)).map(Workers).map_err(os_error)
    }
}

/// What a job brings back, and the bytes that it had: those are released where the interpreter is.
type Brought = (Outcome, Option<PyBackedBytes>);

enum Outcome {
    Written(io::Result<files::Made>),
    Removed(Vec<io::Result<()>>),
}

fn exception(py: Python<'_>, error: io::Error) -> Bound<'_, PyAny> {
    os_error(error).into_value(py).into_bound(py).into_any()
}

impl Outcome {
    /// What a caller gets: a value, or the exception to raise.
    fn object(self, py: Python<'_>) -> Bound<'_, PyAny> {
        // One that cannot be told must not take the others with it.
        let told = self.told(py);
        told.unwrap_or_else(|error| error.into_value(py).into_bound(py).into_any())
    }

    fn told(self, py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
        match self {
            Outcome::Written(Ok(made)) => Ok(Bound::new(py, NewFile::from(made))?.into_any()),
            Outcome::Written(Err(error)) => Ok(exception(py, error)),
            Outcome::Removed(all) => {
                let each = all
                    .into_iter()
                    .map(|one| one.err().map(|e| exception(py, e)));
                Ok(PyList::new(py, each.collect::<Vec<_>>())?.into_any())
            }
        }
    }
}

/// See the stub.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct Desk {
    workers: Threads,
    results: Results<Brought>,
}

#[pymethods]
impl Desk {
    #[new]
    #[pyo3(signature = (workers, /))]
    fn new(workers: &Workers) -> PyResult<Self> {
        Ok(Desk {
            workers: workers.0.clone(),
            results: Results::new().map_err(os_error)?,
        })
    }

    fn fileno(&self) -> RawFd {
        self.results.fd()
    }

    #[pyo3(signature = (root, name, unfinished, data, nanos, /))]
    fn write(
        &self,
        root: PathBuf,
        name: PathBuf,
        unfinished: PathBuf,
        data: PyBackedBytes,
        nanos: i64,
    ) -> u64 {
        self.results.submit(&self.workers, move || {
            let made = files::write_below(&root, &name, &unfinished, &data, nanos);
            (Outcome::Written(made), Some(data))
        })
    }

    #[pyo3(signature = (root, names, /))]
    fn remove(&self, root: PathBuf, names: Vec<PathBuf>) -> u64 {
        self.results.submit(&self.workers, move || {
            let each = names.iter().map(|name| files::remove_below(&root, name));
            (Outcome::Removed(each.collect()), None)
        })
    }

    fn collect<'py>(&self, py: Python<'py>) -> Vec<(u64, Bound<'py, PyAny>)> {
        let done = self.results.collect().into_iter();
        done.map(|(number, (outcome, _))| (number, outcome.object(py)))
            .collect()
    }

    #[pyo3(signature = (number, /))]
    fn leave<'py>(&self, py: Python<'py>, number: u64) -> (bool, Option<Bound<'py, PyAny>>) {
        match self.results.leave(number) {
            Left::Done((outcome, _)) => (false, Some(outcome.object(py))),
            Left::Collected => (false, None),
            Left::Pending => (true, None),
        }
    }

    fn wait<'py>(&self, py: Python<'py>) -> Option<(u64, Bound<'py, PyAny>)> {
        let found = py.detach(|| self.results.wait());
        found.map(|(number, (outcome, _))| (number, outcome.object(py)))
    }
}
