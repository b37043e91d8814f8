//! Errors of the core as Python exceptions; the only place where they are converted.

use std::path::Path;

use pyo3::exceptions::{PyOSError, PyRuntimeError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::{
    shared::StepError,
    shared::{OpenError, PARTICIPANTS},
};

pyo3::create_exception!(
    _core,
    CorruptIndexError,
    PyRuntimeError,
    "The index contradicts itself; it has to be thrown away."
);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Corrupt(_) | Error::Lost(_) | Error::Unusable(..) => {
                CorruptIndexError::new_err(error.reason())
            }
            Error::Full => IndexFullError::new_err(error.to_string()),
            Error::Refused(errno) => {
                IndexFullError::new_err((errno.raw_os_error(), error.to_string()))
            }
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

impl From<StepError> for PyErr {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Busy => busy(),
            StepError::Failed(error) => error.into(),
        }
    }
}

impl From<OpenError> for PyErr {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Io(error) => os_error(error),
            OpenError::Busy => busy(),
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

/// I/O errors keep their number, by which Python code tells them apart.
pub(super) fn os_error(error: std::io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(number) => PyOSError::new_err((number, said(&error))),
        None => error.into(),
    }
}

/// The same, with the name of the file.
pub(super) fn os_error_at(error: std::io::Error, path: &Path) -> PyErr {
    match error.raw_os_error() {
        Some(number) => PyOSError::new_err((number, said(&error), path.as_os_str().to_owned())),
        None => error.into(),
    }
}

/// What the system says of an error, without the number.
fn said(error: &std::io::Error) -> String {
    let text = error.to_string();
    let said = text.split(" (os error ").next();
    said.unwrap_or_default().to_owned()
}

/// The same as an exception object.
pub(super) fn exception(py: Python<'_>, error: std::io::Error) -> Bound<'_, PyAny> {
    os_error(error).into_value(py).into_bound(py).into_any()
}

pub(super) fn busy() -> PyErr {
    IndexBusyError::new_err("the lock of the index is taken")
}

pub(super) fn poisoned<T>(_: T) -> PyErr {
    CorruptIndexError::new_err("an earlier step did not finish")
}
