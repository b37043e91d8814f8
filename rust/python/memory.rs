//! A fill in memory: all steps in one call, because none of them waits.

use std::time::Duration;

use pyo3::exceptions::{PyException, PyKeyError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};

use super::backing::{Backing, step};
use super::checksum;
use super::convert::{RawSpan, millis, span};
use super::index::Index;
use crate::cache::{Committed, Reserve, Verify, Victim};
use crate::key::ByteRange;

/// Batches of victims after which other threads may run, and for how long: a thread that detaches for
/// a moment only is attached again before another has woken.
const BATCHES: u32 = 8;
const PAUSE: Duration = Duration::from_micros(100);

#[pymethods]
impl Index {
    #[pyo3(signature = (values, key, raw, data, value, ticket, now, fetched=None, /))]
    #[allow(clippy::too_many_arguments)] // All that a fill is about, for one call.
    fn fill_memory(
        &self,
        values: &Bound<'_, PyDict>,
        key: &Bound<'_, PyString>,
        raw: RawSpan,
        data: &Bound<'_, PyBytes>,
        value: &Bound<'_, PyAny>,
        ticket: u64,
        now: f64,
        fetched: Option<f64>,
    ) -> PyResult<Option<bool>> {
        let whole = match &self.source {
            Some(_) => PyString::new(values.py(), &self.whole(key.to_str()?)),
            None => key.clone(),
        };
        let fill = Fill {
            backing: &self.backing,
            values,
            key: &whole,
            range: span(raw)?,
            data,
            ticket,
            now: millis(now),
            fetched: millis(fetched.unwrap_or(now)),
        };
        if self.end_abandoned(values.py()).is_err() {
            return Ok(None);
        }
        match fill.run(value) {
            // Out of memory, for example: the owner of the flight ends the rest.
            Err(error) if error.is_instance_of::<PyException>(values.py()) => Ok(None),
            kept => kept,
        }
    }
}

/// What a fill in memory is about.
struct Fill<'a, 'py> {
    backing: &'a Backing,
    /// What the cache store holds, by name.
    values: &'a Bound<'py, PyDict>,
    key: &'a Bound<'py, PyString>,
    range: ByteRange,
    data: &'a Bound<'py, PyBytes>,
    ticket: u64,
    /// Milliseconds.
    now: u64,
    /// Milliseconds; its age counts from then.
    fetched: u64,
}

impl Fill<'_, '_> {
    /// Reserves, stores `value` and closes the flight. Returns whether another reader has joined it;
    /// `None` where the value stays uncached, and its flight open.
    ///
    /// The lock is not held while the dict changes: dropping a value may run Python code.
    fn run(&self, value: &Bound<'_, PyAny>) -> PyResult<Option<bool>> {
        let py = self.values.py();
        let key = self.key.to_str()?;
        let data = self.data.as_bytes();
        let size = data.len() as u64;
        let (range, ticket, now) = (self.range, self.ticket, self.now);
        let (mut answer, checks) = step!(self, py, |cache| {
            let checks = cache.limits().verify != Verify::Never;
            Ok((cache.reserve(key, range, size, ticket, now)?, checks))
        })?;
        let mut batches = 0;
        loop {
            match answer {
                Reserve::Rejected(_) => return Ok(None),
                Reserve::NeedsEviction(id, victims) => {
                    if let Err(error) = self.remove(&victims) {
                        self.abandon(id)?;
                        return Err(error);
                    }
                    answer = step!(self, py, |cache| cache.all_evicted(id, now))?;
                    batches += 1;
                    if matches!(answer, Reserve::NeedsEviction(..)) && batches % BATCHES == 0 {
                        // A batch is a millisecond: a large value may push out a million small ones.
                        py.detach(|| std::thread::sleep(PAUSE));
                    }
                }
                Reserve::Granted(id) => {
                    let checksum = checks.then(|| checksum(py, data));
                    let put = match range {
                        ByteRange::Full => self.values.set_item(self.key, value),
                        _ => self.values.set_item(range.cache_key(key), value),
                    };
                    if let Err(error) = put {
                        self.abandon(id)?;
                        return Err(error);
                    }
                    return self.finish(id, checksum);
                }
            }
        }
    }

    fn finish(&self, id: u64, checksum: Option<u32>) -> PyResult<Option<bool>> {
        let py = self.values.py();
        let now = self.now;
        let done = step!(self, py, |cache| cache.commit_fetched(
            id,
            checksum,
            self.fetched,
            now
        ))?;
        // The payload of the flight is released here, without the lock: that may run Python code.
        let Some(Committed { victims, flight }) = done else {
            // The index was emptied meanwhile, and does not list these bytes.
            let cache_key = self.range.cache_key(self.key.to_str()?);
            self.remove(&[Victim {
                cell: 0,
                cache_key,
                placed: None,
            }])?;
            return Ok(None);
        };
        if !victims.is_empty() {
            self.remove(&victims)?;
            let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
            step!(self, py, |cache| cache.deletes_done(&cells, &[]))?;
        }
        // One that was taken out meanwhile (after a fork, say) may have been joined before.
        Ok(Some(flight.is_none_or(|closed| closed.joined)))
    }

    fn remove(&self, victims: &[Victim]) -> PyResult<()> {
        let py = self.values.py();
        for victim in victims {
            match self.values.del_item(&victim.cache_key) {
                Err(error) if !error.is_instance_of::<PyKeyError>(py) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn abandon(&self, id: u64) -> PyResult<()> {
        let py = self.values.py();
        step!(self, py, |cache| cache.abandon(id))
    }
}
