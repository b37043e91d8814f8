//! The one file that knows Python: extract, lock, call, convert.
//!
//! No step keeps the lock while it calls into Python or waits for anything, so an attached thread
//! never blocks for long; where the lock is taken, the waiting thread detaches first
//! (`lock_py_attached`). With the GIL the lock is therefore free whenever another thread can
//! fork.

#[cfg(unix)]
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::PyString;

use crate::cache::{self, Cache, Found, Joined, Limits, Refusal, Room, Verify, Victim};
use crate::cells::{Heap, State};
use crate::error::Fault;
use crate::key::{self, Span};
#[cfg(unix)]
use crate::{
    directory::{Directory, StepError},
    files,
    mapped::{Locks, OpenError, PARTICIPANTS},
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
                format!("{PARTICIPANTS} processes use the index of this directory already"),
            )),
            OpenError::Unsuitable(what) => PyOSError::new_err(format!(
                "the file system ({what}) does not share locks and mappings between its users"
            )),
        }
    }
}

/// A span as Python passes it: `None` for the whole value, else a kind (1 range, 2 offset,
/// 3 suffix) and its numbers.
type RawSpan = Option<(u8, u64, u64)>;
type RawVictim = (u32, String);

/// What readers wait on, shared by a count that needs no interpreter: it is cloned under the lock.
type Flight = Arc<Py<PyAny>>;
type Core = Cache<Heap, Flight>;

fn span(raw: RawSpan) -> PyResult<Span> {
    Ok(match raw {
        None => Span::Full,
        Some((1, start, end)) => Span::Range { start, end },
        Some((2, from, _)) => Span::Offset(from),
        Some((3, count, _)) => Span::Suffix(count),
        Some((kind, ..)) => {
            return Err(PyValueError::new_err(format!(
                "span kind must be 1 (range), 2 (offset) or 3 (suffix), got {kind}"
            )));
        }
    })
}

fn raw_span(span: Span) -> RawSpan {
    match span {
        Span::Full => None,
        Span::Range { start, end } => Some((1, start, end)),
        Span::Offset(from) => Some((2, from, 0)),
        Span::Suffix(count) => Some((3, count, 0)),
    }
}

fn raw_victims(victims: Vec<Victim>) -> Vec<RawVictim> {
    victims
        .into_iter()
        .map(|victim| (victim.cell, victim.cache_key))
        .collect()
}

/// Seconds to whole milliseconds; what is no time at all counts as the beginning.
fn millis(seconds: f64) -> u64 {
    (seconds * 1000.0) as u64
}

fn why(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::TooLarge => "too large",
        Refusal::Void => "overtaken by a write",
        Refusal::Held => "held already",
        Refusal::Busy => "busy",
        Refusal::NoRoom => "no room",
        Refusal::Conflict => "in conflict with another key",
        Refusal::Full => "index full",
        Refusal::Rebuilding => "index not complete",
    }
}

/// An index with its bounds, flights and reservations, behind one lock.
#[pyclass(frozen, module = "zcache._core")]
struct Index {
    backing: Backing,
}

enum Backing {
    Memory(Mutex<Core>),
    #[cfg(unix)]
    Shared(Mutex<Directory<Flight>>, Arc<Locks>),
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

fn poisoned<T>(_: T) -> PyErr {
    CorruptIndexError::new_err("an earlier step did not finish")
}

#[pymethods]
impl Index {
    #[new]
    #[pyo3(signature = (*, max_size=None, max_age=None, lenient=false, flat=false, verify="never",
                        seed=0))]
    fn new(
        max_size: Option<u64>,
        max_age: Option<f64>,
        lenient: bool,
        flat: bool,
        verify: &str,
        seed: u64,
    ) -> PyResult<Self> {
        let limits = limits(max_size, max_age, lenient, flat, verify)?;
        let cache = Cache::new(Heap::default(), limits, seed)?;
        Ok(Index {
            backing: Backing::Memory(Mutex::new(cache)),
        })
    }

    /// Opens the index of a cache directory; see the stub.
    #[cfg(unix)]
    #[staticmethod]
    #[pyo3(signature = (root, /, *, max_size=None, max_age=None, lenient=false, flat=false,
                        verify="never", seed=0))]
    #[allow(clippy::too_many_arguments)] // As many options as there are.
    fn open(
        py: Python<'_>,
        root: PathBuf,
        max_size: Option<u64>,
        max_age: Option<f64>,
        lenient: bool,
        flat: bool,
        verify: &str,
        seed: u64,
    ) -> PyResult<(Self, bool)> {
        let limits = limits(max_size, max_age, lenient, flat, verify)?;
        let (directory, fresh) = py.detach(|| Directory::open(&root, limits, seed))?;
        let locks = directory.locks();
        Ok((
            Index {
                backing: Backing::Shared(Mutex::new(directory), locks),
            },
            fresh,
        ))
    }

    #[pyo3(signature = (key, raw, now, /))]
    fn lookup<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        raw: RawSpan,
        now: f64,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let span = span(raw)?;
        let found = step!(self, py, |cache| {
            let found = cache.lookup(key, span, millis(now))?;
            Ok(found.map(|found| (found, cache.must_verify(found.handle))))
        })?;
        found
            .map(|(found, verify)| hit(py, key, span, &found, verify))
            .transpose()
    }

    #[pyo3(signature = (key, raw, now, /))]
    fn peek(&self, py: Python<'_>, key: &str, raw: RawSpan, now: f64) -> PyResult<Option<u64>> {
        let span = span(raw)?;
        let found = step!(self, py, |cache| cache.peek(key, span, millis(now)))?;
        Ok(found.map(|found| found.length))
    }

    #[pyo3(signature = (key, raw, now, size=None, /))]
    fn discard(
        &self,
        py: Python<'_>,
        key: &str,
        raw: RawSpan,
        now: f64,
        size: Option<u64>,
    ) -> PyResult<Vec<RawVictim>> {
        let span = span(raw)?;
        let victims = step!(self, py, |cache| {
            let found = cache.peek(key, span, millis(now))?;
            // One of another size has taken its place meanwhile.
            let same = found.filter(|found| size.is_none_or(|size| size == found.size));
            cache.discard(same.map_or(u64::MAX, |found| found.handle))
        })?;
        Ok(raw_victims(victims))
    }

    fn count_miss(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.count_miss();
            Ok(())
        })
    }

    fn missed(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.missed();
            Ok(())
        })
    }

    #[pyo3(signature = (key, raw, flight, now, anyway, /))]
    fn join<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        raw: RawSpan,
        flight: Py<PyAny>,
        now: f64,
        anyway: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let span = span(raw)?;
        // A second reference of our own: nothing of Python is released while the lock is held.
        let flight = Arc::new(flight);
        let kept = Arc::clone(&flight);
        let joined = step!(self, py, |cache| cache.join(
            key,
            span,
            kept,
            millis(now),
            anyway
        ))?;
        drop(flight);
        match joined {
            Joined::Ready => Ok(py.None().into_bound(py)),
            Joined::Lead(ticket) => Ok(ticket.into_pyobject(py)?.into_any()),
            Joined::Follow(whole, flight) => Ok((raw_span(whole), flight.bind(py))
                .into_pyobject(py)?
                .into_any()),
        }
    }

    #[pyo3(signature = (key, ticket, /))]
    fn land(&self, py: Python<'_>, key: &str, ticket: u64) -> PyResult<()> {
        // The payload outlives the lock, for releasing it may run code of Python's.
        let flight = step!(self, py, |cache| Ok(cache.land(key, ticket)))?;
        drop(flight);
        Ok(())
    }

    #[pyo3(signature = (key, raw, size, ticket, now, /))]
    fn reserve<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        raw: RawSpan,
        size: u64,
        ticket: u64,
        now: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let span = span(raw)?;
        let room = step!(self, py, |cache| cache.reserve(
            key,
            span,
            size,
            ticket,
            millis(now)
        ))?;
        answer(py, room)
    }

    #[pyo3(signature = (reservation, dropped, failed, now, /))]
    fn settle<'py>(
        &self,
        py: Python<'py>,
        reservation: u64,
        dropped: Vec<u32>,
        failed: Vec<u32>,
        now: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let room = step!(self, py, |cache| cache.settle(
            reservation,
            &dropped,
            &failed,
            millis(now)
        ))?;
        answer(py, room)
    }

    #[pyo3(signature = (reservation, now, /))]
    fn cleared<'py>(
        &self,
        py: Python<'py>,
        reservation: u64,
        now: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let room = step!(self, py, |cache| cache.cleared(reservation, millis(now)))?;
        answer(py, room)
    }

    #[pyo3(signature = (reservation, checksum, now, /))]
    fn finish(
        &self,
        py: Python<'_>,
        reservation: u64,
        checksum: Option<u32>,
        now: f64,
    ) -> PyResult<Vec<RawVictim>> {
        // The payload outlives the lock, for releasing it may run code of Python's.
        let (victims, flight) = step!(self, py, |cache| cache.finish(
            reservation,
            checksum,
            millis(now)
        ))?;
        drop(flight);
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (reservation, checksum, now, /))]
    fn commit(
        &self,
        py: Python<'_>,
        reservation: u64,
        checksum: Option<u32>,
        now: f64,
    ) -> PyResult<Option<Vec<RawVictim>>> {
        let victims = step!(self, py, |cache| {
            if cache.is_reserved(reservation) {
                cache.commit(reservation, checksum, millis(now)).map(Some)
            } else {
                Ok(None)
            }
        })?;
        Ok(victims.map(raw_victims))
    }

    #[pyo3(signature = (reservation, /))]
    fn abort(&self, py: Python<'_>, reservation: u64) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.abort(reservation))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (dropped, failed, /))]
    fn settled(&self, py: Python<'_>, dropped: Vec<u32>, failed: Vec<u32>) -> PyResult<()> {
        step!(self, py, |cache| cache.settled(&dropped, &failed))
    }

    #[pyo3(signature = (limit, /))]
    fn orphans(&self, py: Python<'_>, limit: usize) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.orphans(limit))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (key, /))]
    fn begin_write(&self, py: Python<'_>, key: &str) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.begin_write(key))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (key, ok, /))]
    fn end_write(
        &self,
        py: Python<'_>,
        key: &str,
        ok: bool,
    ) -> PyResult<(Vec<RawVictim>, Option<u64>)> {
        let (victims, ticket) = step!(self, py, |cache| cache.end_write(key, ok))?;
        Ok((raw_victims(victims), ticket))
    }

    #[pyo3(signature = (key, /))]
    fn forget(&self, py: Python<'_>, key: &str) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.forget(key))?;
        Ok(raw_victims(victims))
    }

    #[pyo3(signature = (prefix, begins=None, /))]
    fn void_prefix(&self, py: Python<'_>, prefix: &str, begins: Option<bool>) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.void_prefix(prefix);
            if let Some(begins) = begins {
                cache.mark_change(begins);
            }
            Ok(())
        })
    }

    #[pyo3(signature = (prefix, /))]
    fn sweep(&self, py: Python<'_>, prefix: &str) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.sweep(prefix))?;
        Ok(raw_victims(victims))
    }

    fn stats(&self, py: Python<'_>) -> PyResult<(u64, u64, u64, u64, u64)> {
        let stats = step!(self, py, |cache| Ok(cache.stats()))?;
        Ok((
            stats.hits,
            stats.misses,
            stats.evictions,
            stats.expirations,
            stats.refusals,
        ))
    }

    #[getter]
    fn current_size(&self, py: Python<'_>) -> PyResult<u64> {
        step!(self, py, |cache| Ok(cache.current_size()))
    }

    #[getter]
    fn memory(&self, py: Python<'_>) -> PyResult<u64> {
        step!(self, py, |cache| Ok(cache.memory()))
    }

    #[getter]
    fn in_flight(&self, py: Python<'_>) -> PyResult<(usize, usize)> {
        step!(self, py, |cache| Ok(cache.in_flight()))
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        let len = step!(self, py, |cache| Ok(cache.len()))?;
        Ok(usize::try_from(len).unwrap_or(usize::MAX))
    }

    fn entries(&self, py: Python<'_>) -> PyResult<Vec<(String, RawSpan, u64, &'static str)>> {
        let entries = step!(self, py, |cache| cache.entries())?;
        let state = |state| match state {
            State::Present => "present",
            State::Writing => "writing",
            State::Dropping => "dropping",
            State::Orphan => "orphan",
        };
        Ok(entries
            .into_iter()
            .map(|(k, s, n, st)| (k, raw_span(s), n, state(st)))
            .collect())
    }

    fn recency(&self, py: Python<'_>) -> PyResult<Vec<(String, RawSpan)>> {
        let recency = step!(self, py, |cache| cache.recency())?;
        Ok(recency
            .into_iter()
            .map(|(key, span)| (key, raw_span(span)))
            .collect())
    }

    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        step!(self, py, |cache| cache.validate())
    }

    fn after_fork(&self) -> PyResult<bool> {
        let Backing::Memory(lock) = &self.backing else {
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

    #[pyo3(signature = (handle, checksum, /))]
    fn verified(&self, py: Python<'_>, handle: u64, checksum: u32) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.verified(handle, checksum);
            Ok(())
        })
    }

    #[pyo3(signature = (values, /))]
    fn adopt(&self, py: Python<'_>, values: Vec<(u64, u64, String)>) -> PyResult<bool> {
        step!(self, py, |cache| {
            if !cache.is_filled_here() {
                return Ok(false);
            }
            for (fetched, size, name) in &values {
                cache.adopt(name, *size, *fetched)?;
            }
            Ok(true)
        })
    }

    #[getter]
    fn is_complete(&self, py: Python<'_>) -> PyResult<bool> {
        step!(self, py, |cache| Ok(cache.is_complete()))
    }

    fn condemn(&self, py: Python<'_>) -> PyResult<()> {
        match &self.backing {
            Backing::Memory(_) => Ok(()),
            #[cfg(unix)]
            Backing::Shared(..) => step!(self, py, |_cache| Err(Fault::Corrupt(
                "a size that is not the one of its file"
            ))),
        }
    }

    /// Descriptors of the locks, for a forked child to let go of them.
    #[cfg(unix)]
    #[getter]
    fn locks(&self) -> Vec<i32> {
        match &self.backing {
            Backing::Memory(_) => Vec::new(),
            Backing::Shared(_, locks) => locks.fds().into(),
        }
    }

    #[pyo3(signature = (max_size, max_age, /))]
    fn rebound(&self, py: Python<'_>, max_size: Option<u64>, max_age: Option<f64>) -> PyResult<()> {
        step!(self, py, |cache| {
            cache.rebound(max_size.unwrap_or(u64::MAX), max_age.map(age));
            Ok(())
        })
    }

    #[pyo3(signature = (size, now, /))]
    fn evict(&self, py: Python<'_>, size: u64, now: f64) -> PyResult<Vec<RawVictim>> {
        let victims = step!(self, py, |cache| cache.evict(size, millis(now)))?;
        Ok(raw_victims(victims))
    }

    #[getter]
    fn shared(&self) -> bool {
        !matches!(self.backing, Backing::Memory(_))
    }

    #[cfg(unix)]
    #[getter]
    fn place(&self, py: Python<'_>) -> PyResult<Option<usize>> {
        match &self.backing {
            Backing::Memory(_) => Ok(None),
            Backing::Shared(lock, _) => {
                Ok(Some(lock.lock_py_attached(py).map_err(poisoned)?.place()))
            }
        }
    }

    #[cfg(unix)]
    #[getter]
    fn alone(&self, py: Python<'_>) -> PyResult<bool> {
        match &self.backing {
            Backing::Memory(_) => Ok(true),
            Backing::Shared(lock, _) => py.detach(|| Ok(guarded(lock)?.alone()?)),
        }
    }

    #[cfg(unix)]
    fn complete(&self, py: Python<'_>) -> PyResult<()> {
        match &self.backing {
            Backing::Memory(_) => Ok(()),
            Backing::Shared(lock, _) => py.detach(|| Ok(guarded(lock)?.complete()?)),
        }
    }

    #[cfg(unix)]
    #[pyo3(signature = (seed, /))]
    fn restart(&self, py: Python<'_>, seed: u64) -> PyResult<bool> {
        match &self.backing {
            Backing::Memory(_) => Ok(false),
            Backing::Shared(lock, _) => py.detach(|| Ok(guarded(lock)?.restart(seed)?)),
        }
    }

    #[cfg(unix)]
    fn reap(&self, py: Python<'_>) -> PyResult<(Vec<usize>, bool)> {
        match &self.backing {
            Backing::Memory(_) => Ok((Vec::new(), false)),
            Backing::Shared(lock, _) => py.detach(|| Ok(guarded(lock)?.reap()?)),
        }
    }

    #[cfg(unix)]
    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        match &self.backing {
            Backing::Memory(_) => Ok(()),
            Backing::Shared(lock, _) => {
                let wait = lock.lock_py_attached(py).map_err(poisoned)?.waiter();
                py.detach(wait);
                Ok(())
            }
        }
    }
}

#[cfg(unix)]
fn guarded(lock: &Mutex<Directory<Flight>>) -> PyResult<MutexGuard<'_, Directory<Flight>>> {
    lock.lock().map_err(poisoned)
}

/// Seconds of a maximum age to whole milliseconds; a part of one counts as one.
fn age(seconds: f64) -> u64 {
    (seconds * 1000.0).ceil() as u64
}

fn limits(
    max_size: Option<u64>,
    max_age: Option<f64>,
    lenient: bool,
    flat: bool,
    verify: &str,
) -> PyResult<Limits> {
    Ok(Limits {
        max_size: max_size.unwrap_or(u64::MAX),
        max_age: max_age.map(age),
        lenient,
        flat,
        verify: match verify {
            "never" => Verify::Never,
            "first" => Verify::First,
            "always" => Verify::Always,
            other => {
                return Err(PyValueError::new_err(format!(
                    "verify={other:?} is none of \"first\", \"always\" and \"never\""
                )));
            }
        },
    })
}

fn hit<'py>(
    py: Python<'py>,
    key: &str,
    asked: Span,
    found: &Found,
    verify: bool,
) -> PyResult<Bound<'py, PyAny>> {
    if asked == Span::Full && !verify {
        // The common case on the hot path: one small integer.
        return Ok(found.size.into_pyobject(py)?.into_any());
    }
    let name = found.span.cache_key(key);
    let handle = verify.then_some(found.handle);
    let hit = (
        name,
        found.size,
        found.start,
        found.length,
        handle,
        found.checksum,
    );
    Ok(hit.into_pyobject(py)?.into_any())
}

fn answer(py: Python<'_>, room: Room) -> PyResult<Bound<'_, PyAny>> {
    match room {
        Room::Granted(id) => {
            let none: Vec<RawVictim> = Vec::new();
            Ok((id, none).into_pyobject(py)?.into_any())
        }
        Room::Evict(id, victims) => Ok((id, raw_victims(victims)).into_pyobject(py)?.into_any()),
        Room::Refused(refusal) => Ok(why(refusal).into_pyobject(py)?.into_any()),
    }
}

#[pyfunction]
#[pyo3(signature = (key, raw, /))]
fn cache_key(key: &str, raw: RawSpan) -> PyResult<String> {
    Ok(span(raw)?.cache_key(key))
}

#[pyfunction]
#[pyo3(signature = (size, raw, lenient, /))]
fn select(size: u64, raw: RawSpan, lenient: bool) -> PyResult<Option<(u64, u64)>> {
    Ok(cache::select(size, span(raw)?, lenient))
}

#[pyfunction]
#[pyo3(signature = (key, /))]
fn is_known(key: &Bound<'_, PyString>) -> bool {
    // Lone surrogates are no text, and no file system and no index takes them.
    key.to_str().is_ok_and(key::is_known)
}

/// Errors with their number: what to do about them depends on that.
#[cfg(unix)]
fn os_error(error: std::io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(number) => PyOSError::new_err((number, error.to_string())),
        None => error.into(),
    }
}

/// A file that is written but not sealed.
#[cfg(unix)]
#[pyclass(frozen, module = "zcache._core")]
struct NewFile {
    file: Mutex<Option<OwnedFd>>,
    #[pyo3(get)]
    checksum: u32,
}

#[cfg(unix)]
#[pymethods]
impl NewFile {
    #[pyo3(signature = (valid, /))]
    fn seal(&self, valid: bool) -> PyResult<()> {
        let file = self.file.lock().map_err(poisoned)?.take();
        match file {
            Some(file) => files::seal(file, valid).map_err(os_error),
            None => Ok(()),
        }
    }
}

#[cfg(unix)]
#[pyfunction]
#[pyo3(signature = (path, data, nanos, /))]
fn create_file(py: Python<'_>, path: PathBuf, data: &[u8], nanos: i64) -> PyResult<NewFile> {
    let made = py.detach(|| files::create(&path, data, nanos));
    let (file, checksum) = made.map_err(os_error)?;
    Ok(NewFile {
        file: Mutex::new(Some(file)),
        checksum,
    })
}

#[cfg(unix)]
#[pyfunction]
#[pyo3(signature = (path, /))]
fn noted_file(path: PathBuf) -> Option<(u64, u32)> {
    files::noted(&path)
}

#[cfg(unix)]
#[pyfunction]
#[pyo3(signature = (path, /))]
fn volume_space(path: PathBuf) -> PyResult<(u64, u64)> {
    // Two microseconds; to detach and to attach again can take longer than that.
    files::space(&path).map_err(os_error)
}

#[cfg(unix)]
#[pyfunction]
#[pyo3(signature = (unfinished, path, /))]
fn publish_file(py: Python<'_>, unfinished: PathBuf, path: PathBuf) -> PyResult<()> {
    py.detach(|| files::publish(&unfinished, &path))
        .map_err(os_error)
}

#[cfg(unix)]
#[pyfunction]
#[pyo3(signature = (path, /))]
fn remove_file(py: Python<'_>, path: PathBuf) -> PyResult<bool> {
    py.detach(|| files::remove(&path)).map_err(os_error)
}

#[cfg(unix)]
#[pyfunction]
#[pyo3(signature = (root, name, /))]
fn leads_out(py: Python<'_>, root: PathBuf, name: PathBuf) -> bool {
    py.detach(|| files::leads_out(&root, &name))
}

/// Bytes from which on other threads may run while a checksum is computed.
const DETACH_FROM: usize = 64 * 1024;

#[pyfunction]
#[pyo3(name = "crc32c", signature = (data, /))]
fn checksum(py: Python<'_>, data: &[u8]) -> u32 {
    if data.len() < DETACH_FROM {
        ::crc32c::crc32c(data)
    } else {
        py.detach(|| ::crc32c::crc32c(data))
    }
}

#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add(
        "CorruptIndexError",
        module.py().get_type::<CorruptIndexError>(),
    )?;
    module.add("IndexFullError", module.py().get_type::<IndexFullError>())?;
    module.add("IndexBusyError", module.py().get_type::<IndexBusyError>())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<Index>()?;
    #[cfg(unix)]
    {
        module.add("SIGNATURE", files::SIGNATURE)?;
        module.add("PENDING", files::PENDING)?;
        module.add_class::<NewFile>()?;
        module.add_function(wrap_pyfunction!(create_file, module)?)?;
        module.add_function(wrap_pyfunction!(noted_file, module)?)?;
        module.add_function(wrap_pyfunction!(publish_file, module)?)?;
        module.add_function(wrap_pyfunction!(volume_space, module)?)?;
        module.add_function(wrap_pyfunction!(remove_file, module)?)?;
        module.add_function(wrap_pyfunction!(leads_out, module)?)?;
    }
    module.add_function(wrap_pyfunction!(cache_key, module)?)?;
    module.add_function(wrap_pyfunction!(checksum, module)?)?;
    module.add_function(wrap_pyfunction!(is_known, module)?)?;
    module.add_function(wrap_pyfunction!(select, module)?)?;
    Ok(())
}
