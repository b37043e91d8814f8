//! Errors of the core as exceptions of Python: all of them become so here.

use pyo3::exceptions::{PyOSError, PyRuntimeError};
use pyo3::prelude::*;

use crate::error::Fault;
#[cfg(unix)]
use crate::{
    directory::StepError,
    mapped::{OpenError, PARTICIPANTS},
};

pyo3::create_exception!(
    _core,
    CorruptIndexError,
    PyRuntimeError,
    "The index contradicts itself; it has to be thrown away."
);

impl From<Fault> for PyErr {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Corrupt(what) => CorruptIndexError::new_err(what),
            Fault::Full => IndexFullError::new_err(fault.to_string()),
        }
    }
}

pyo3::create_exception!(
    _core,
    IndexFullError,
    PyOSError,
    "The index cannot grow any further."
);

pyo3::create_exception!(
    _core,
    IndexBusyError,
    PyRuntimeError,
    "Another process holds the lock of the index; wait for it and try again."
);

#[cfg(unix)]
impl From<StepError> for PyErr {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Busy => IndexBusyError::new_err("the lock of the index is taken"),
            StepError::Fault(fault) => fault.into(),
        }
    }
}

#[cfg(unix)]
impl From<OpenError> for PyErr {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Io(error) => os_error(error),
            OpenError::Crowded => PyOSError::new_err((
                rustix::io::Errno::USERS.raw_os_error(),
                format!("{PARTICIPANTS} stores use the index of this directory already"),
            )),
            OpenError::Unsuitable(what) => PyOSError::new_err(format!(
                "the file system ({what}) does not share locks and mappings between its users"
            )),
        }
    }
}

/// Errors with their number: what to do about them depends on that.
#[cfg(unix)]
pub(super) fn os_error(error: std::io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(number) => PyOSError::new_err((number, error.to_string())),
        None => error.into(),
    }
}

pub(super) fn poisoned<T>(_: T) -> PyErr {
    CorruptIndexError::new_err("an earlier step did not finish")
}
