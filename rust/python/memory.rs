//! A fill in memory: all steps in one call, because none of them waits.

use std::time::Duration;

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};

use super::backing::{Backing, step};
use super::checksum;
use crate::cache::{Committed, Reserve, Verify, Victim};
use crate::key::ByteRange;

/// Batches of victims after which other threads may run, and for how long: a thread that detaches for
/// a moment only is attached again before another has woken.
const BATCHES: u32 = 8;
const PAUSE: Duration = Duration::from_micros(100);

/// What a fill in memory is about.
pub(super) struct Fill<'a, 'py> {
    pub(super) backing: &'a Backing,
    /// What the cache store holds, by name.
    pub(super) values: &'a Bound<'py, PyDict>,
    pub(super) key: &'a Bound<'py, PyString>,
    pub(super) range: ByteRange,
    pub(super) data: &'a Bound<'py, PyBytes>,
    pub(super) ticket: u64,
    /// Milliseconds.
    pub(super) now: u64,
    /// Milliseconds; its age counts from then.
    pub(super) fetched: u64,
}

impl Fill<'_, '_> {
    /// Reserves, stores `value` and closes the flight. Returns whether another reader has joined it;
    /// `None` where the value stays uncached, and its flight open.
    ///
    /// The lock is not held while the dict changes: dropping a value may run Python code.
    pub(super) fn run(&self, value: &Bound<'_, PyAny>) -> PyResult<Option<bool>> {
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
