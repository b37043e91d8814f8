//! What will be read, on its way from Python: taken from an iterable before any lock is held.

use std::sync::Mutex;

use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyBytes, PyString};

use super::backing::step;
use super::errors::poisoned;
use super::index::Index;
use crate::cache::Cursor;
use crate::policy;

/// Keys after which other threads may run, and signals are looked at.
const TURN: usize = 4096;

/// Keys in the order in which they will be read; an index takes them once.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct Plan {
    keys: Mutex<Option<policy::Plan>>,
    len: usize,
    progress: policy::Progress,
}

impl Plan {
    /// The keys, if no index has them yet and there are any.
    pub(super) fn take(&self, py: Python<'_>) -> PyResult<Option<policy::Plan>> {
        let mut keys = self.keys.lock_py_attached(py).map_err(poisoned)?;
        Ok(keys.take().filter(|keys| !keys.is_empty()))
    }
}

#[pymethods]
impl Plan {
    #[new]
    #[pyo3(signature = (keys, /))]
    fn new(keys: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = keys.py();
        let is_text = keys.is_instance_of::<PyString>() || keys.is_instance_of::<PyBytes>();
        let mut items = match keys.try_iter() {
            Ok(items) if !is_text => items,
            _ => return Err(invalid("keys", keys)),
        };
        let mut plan = policy::Plan::default();
        let mut room = plan.grow();
        while !plan.is_full() {
            let Some(item) = items.next().transpose()? else {
                break;
            };
            let Ok(key) = item.cast::<PyString>() else {
                return Err(invalid("key", &item));
            };
            // What is no Unicode is never asked of the index.
            plan.push(key.to_str().unwrap_or_default());
            if plan.len().is_multiple_of(TURN) {
                py.check_signals()?;
                py.detach(|| {});
            }
            if plan.len() == room {
                room = py.detach(|| plan.grow());
            }
        }
        py.detach(|| plan.finish());
        let (len, progress) = (plan.len(), plan.progress());
        let keys = Mutex::new(Some(plan));
        Ok(Plan {
            keys,
            len,
            progress,
        })
    }

    fn __len__(&self) -> usize {
        self.len
    }

    #[getter]
    fn state(&self) -> Option<&'static str> {
        self.progress.course().map(|course| match course {
            policy::Course::Followed => "followed",
            policy::Course::Done => "done",
            policy::Course::Wrong => "wrong",
        })
    }
}

#[pymethods]
impl Index {
    #[pyo3(signature = (plan, /))]
    fn set_plan(&self, py: Python<'_>, plan: &Plan) -> PyResult<Cursor> {
        let (before, first) = step!(self, py, |cache| {
            // Not before the lock is held: a step that was not taken is taken again.
            let before = match plan.take(py) {
                Ok(plan) => {
                    let folder = self.folder();
                    match plan {
                        Some(plan) => cache.set_plan(plan.within(folder)),
                        None => cache.forget_plan(folder),
                    }
                }
                Err(_) => None,
            };
            Ok((before, cache.first_keys()))
        })?;
        // Freed without the lock, and while other threads run.
        py.detach(|| drop(before));
        Ok(first)
    }

    #[pyo3(signature = (cursor, /))]
    fn match_plan(&self, py: Python<'_>, cursor: Cursor) -> PyResult<Option<Cursor>> {
        step!(self, py, |cache| cache.match_plan(cursor))
    }
}

/// A `zcache.exceptions.OptionTypeError`.
fn option_type_error(py: Python<'_>, message: &str) -> PyResult<PyErr> {
    let kind = py.import("zcache.exceptions")?.getattr("OptionTypeError")?;
    Ok(PyErr::from_value(kind.call1((message,))?))
}

/// The error about what is no key, or no keys.
fn invalid(what: &str, item: &Bound<'_, PyAny>) -> PyErr {
    let shown = item.repr().map_or_else(
        |_| item.get_type().to_string(),
        |text| text.to_string_lossy().into_owned(),
    );
    let shown: String = shown.chars().take(200).collect();
    let message = format!(
        "will_read(): invalid {what}: {shown}; give an iterable of keys as str, such as [\"a/c/0\", \"a/c/1\"]"
    );
    option_type_error(item.py(), &message).unwrap_or_else(|error| error)
}
