//! The queue of fills of a cache directory: submit, collect, convert.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;

use super::backing::Flight;
use super::convert::{RawSpan, millis, span};
use super::errors::{exception, os_error};
use super::index::Index;
use super::pool::SegmentFiles;
use crate::disk::CacheDir;
use crate::disk::fill::{Ending, Fill, Report};
use crate::disk::queue::{Fills, OnIdle};

/// Time between two looks whether all calls of Python code have ended.
const PAUSE: Duration = Duration::from_millis(1);
/// Time between two checks for signals while a thread waits.
const LOOK: Duration = Duration::from_millis(50);

/// Threads that are in Python code, and whether no other may begin: an interpreter that ends stops them in
/// the middle of it, and the process with them.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static ENDS: AtomicBool = AtomicBool::new(false);

/// One call of Python code by a thread of a queue.
struct Call;

impl Call {
    fn begin() -> Option<Self> {
        CALLS.fetch_add(1, Ordering::SeqCst);
        let call = Call;
        (!ENDS.load(Ordering::SeqCst)).then_some(call)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        CALLS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// See the stub.
#[pyfunction]
#[pyo3(signature = (timeout, /))]
pub(super) fn end_calls(py: Python<'_>, timeout: f64) -> bool {
    ENDS.store(true, Ordering::SeqCst);
    // In an interpreter below the main one that ends with the process, CPython 3.11 stops a thread that detaches.
    if CALLS.load(Ordering::SeqCst) == 0 {
        return true;
    }
    let timeout = Duration::try_from_secs_f64(timeout.max(0.0)).unwrap_or(Duration::MAX);
    let begun = Instant::now();
    py.detach(|| {
        while CALLS.load(Ordering::SeqCst) != 0 {
            if begun.elapsed() >= timeout {
                return false;
            }
            std::thread::sleep(PAUSE);
        }
        true
    })
}

/// See the stub.
#[pyclass(frozen, get_all, module = "zcache._core")]
pub(super) struct FillResult {
    id: u64,
    outcome: &'static str,
    reason: Option<Cow<'static, str>>,
    error: Option<Py<PyAny>>,
    delete_errors: Vec<Py<PyAny>>,
}

impl FillResult {
    fn new(py: Python<'_>, id: u64, report: Report) -> Self {
        let exception = |error| exception(py, error).unbind();
        let (outcome, reason, error) = match report.ending {
            Ending::Filled => ("filled", None, None),
            Ending::Rejected(reason) => ("rejected", Some(reason.into()), None),
            Ending::Failed(error) => ("failed", None, Some(exception(error))),
            Ending::Unlisted => ("unlisted", None, None),
            Ending::Corrupt(error) => ("corrupt", Some(error.reason()), None),
            Ending::Busy => ("busy", None, None),
        };
        FillResult {
            id,
            outcome,
            reason,
            error,
            delete_errors: report.delete_errors.into_iter().map(exception).collect(),
        }
    }
}

#[pymethods]
impl FillResult {
    fn __repr__(&self) -> String {
        format!("<FillResult {} {}>", self.id, self.outcome)
    }
}

/// See the stub.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct DirectoryFills(Fills<Flight, PyBackedBytes>);

#[pymethods]
impl DirectoryFills {
    #[new]
    #[pyo3(signature = (index, root, tmp, *, threads=2, on_idle, source=[0; 8], marked=None,
                        segments=None))]
    #[allow(clippy::too_many_arguments)] // All that a queue is about.
    fn new(
        py: Python<'_>,
        index: &Index,
        root: PathBuf,
        tmp: PathBuf,
        threads: usize,
        on_idle: Py<PyAny>,
        source: [u8; 8],
        marked: Option<PathBuf>,
        segments: Option<&SegmentFiles>,
    ) -> Self {
        let call: OnIdle<_, _> = Box::new(move |leftovers| {
            let Some(_call) = Call::begin() else {
                // No one could drop them, and no one needs the memory.
                std::mem::forget(leftovers);
                return;
            };
            Python::try_attach(|py| {
                drop(leftovers);
                match on_idle.call0(py) {
                    // Who asks next finds what has ended.
                    Err(error) if error.is_instance_of::<PyMemoryError>(py) => {}
                    Err(error) => error.write_unraisable(py, Some(on_idle.bind(py))),
                    Ok(_) => {}
                }
            });
        });
        let files = CacheDir::new(root, tmp).of(source);
        let files = match marked {
            Some(file) => py.detach(|| files.marked_by(file)),
            None => files,
        };
        let files = match segments {
            Some(segments) => files.with_segments(segments.files()),
            None => files,
        };
        DirectoryFills(Fills::new(Arc::clone(&index.backing), files, threads, call))
    }

    #[pyo3(signature = (key, raw, data, ticket, fetched, min_free_space, now=None, /))]
    #[allow(clippy::too_many_arguments)] // All that a fill is about, for one call.
    fn submit(
        &self,
        key: &str,
        raw: RawSpan,
        data: PyBackedBytes,
        ticket: u64,
        fetched: f64,
        min_free_space: Option<u64>,
        now: Option<f64>,
    ) -> PyResult<u64> {
        let fill = Fill {
            key: key.into(),
            range: span(raw)?,
            data,
            ticket,
            fetched: millis(fetched),
            now: millis(now.unwrap_or(fetched)),
            since: Instant::now(),
            min_free_space,
        };
        self.0.submit(fill).map_err(os_error)
    }

    fn collect(&self, py: Python<'_>) -> Vec<FillResult> {
        if self.0.has_deferred() {
            // The thread that holds the lock of the index may need the interpreter.
            py.detach(|| self.0.apply_deferred());
        }
        let reports = self.0.collect().into_iter();
        reports
            .map(|(id, report)| FillResult::new(py, id, report))
            .collect()
    }

    fn look(&self, py: Python<'_>) {
        py.detach(|| self.0.look());
    }

    #[pyo3(signature = (completed, timeout, /))]
    fn wait(&self, py: Python<'_>, completed: u64, timeout: f64) -> PyResult<bool> {
        let begun = Instant::now();
        // NaN and negative times count as zero.
        let timeout = Duration::try_from_secs_f64(timeout.max(0.0)).unwrap_or(Duration::MAX);
        loop {
            let slice = timeout.saturating_sub(begun.elapsed()).min(LOOK);
            if py.detach(|| self.0.wait(completed, slice)) {
                return Ok(true);
            }
            if slice.is_zero() || self.0.is_abandoned() {
                return Ok(false);
            }
            py.check_signals()?;
        }
    }

    #[getter]
    fn completed(&self) -> u64 {
        self.0.completed()
    }

    #[getter]
    fn pending(&self) -> usize {
        self.0.pending()
    }

    #[getter]
    fn pending_size(&self) -> u64 {
        self.0.pending_size()
    }

    fn abandon(&self) {
        // Those who were in Python code are threads of the parent.
        CALLS.store(0, Ordering::SeqCst);
        self.0.abandon();
    }
}
