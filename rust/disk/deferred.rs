//! Steps of an index from threads without an interpreter, and updates that wait until it is not busy.

use std::thread;

use crate::cache::{Cache, ClosedFlight, Peers, Ticket};
use crate::error::{Error, Result};
use crate::policy::Eviction;
use crate::shared::{Locked, StepError};

/// Takes one step of an index from a thread without an interpreter.
macro_rules! step {
    ($index:expr, |$cache:ident| $work:expr) => {
        match $index {
            index if index.is_disowned() => Err(StepError::Busy),
            Locked::Own(lock, _) => match lock.lock() {
                Ok(mut guard) => {
                    let $cache = &mut *guard;
                    let result: Result<_> = $work;
                    result.map_err(StepError::from)
                }
                Err(_) => Err(POISONED),
            },
            Locked::Shared(lock, _) => match lock.lock() {
                Ok(mut guard) => guard.step(thread::sleep, |$cache| $work),
                Err(_) => Err(POISONED),
            },
        }
    };
}

pub(super) use step;

pub(super) const POISONED: StepError =
    StepError::Failed(Error::Corrupt("an earlier step did not finish"));

/// An update of the index that could not be made yet.
#[derive(Debug)]
pub(super) enum Deferred {
    /// The outcome of deletes, unless the index was emptied since.
    Deletes {
        generation: u64,
        dropped: Vec<u32>,
        failed: Vec<u32>,
    },
    /// Bytes by which folders have grown, or, below 0, shrunk, since there was this sum of them.
    Folders { sum: Option<u64>, bytes: i64 },
    /// A reservation ends; `gone` says that none of its bytes are left.
    Release { id: u64, gone: bool },
    /// So many values were left uncached for a reason that the index does not know.
    Rejected(u64),
    /// A flight is closed.
    Close { key: Box<str>, ticket: Ticket },
}

/// Tries once to make an update. A flight that it closes goes to `closed`.
pub(super) fn apply<T: Clone>(
    index: &Locked<T>,
    update: &Deferred,
    closed: &mut Vec<ClosedFlight<T>>,
) -> Result<(), StepError> {
    step!(index, |cache| apply_to(cache, update, closed))
}

/// Tries once to make these updates, in one step and in their order. They are taken out if they are made.
pub(super) fn apply_all<T: Clone>(
    index: &Locked<T>,
    updates: &mut Vec<Deferred>,
    closed: &mut Vec<ClosedFlight<T>>,
) -> Result<(), StepError> {
    step!(index, |cache| {
        for update in &*updates {
            apply_to(cache, update, closed)?;
        }
        Ok(())
    })?;
    updates.clear();
    Ok(())
}

fn apply_to<S: Peers, T: Clone, P: Eviction>(
    cache: &mut Cache<S, T, P>,
    update: &Deferred,
    closed: &mut Vec<ClosedFlight<T>>,
) -> Result<()> {
    match update {
        Deferred::Deletes {
            generation,
            dropped,
            failed,
        } => cache.deletes_done_since(*generation, dropped, failed),
        Deferred::Folders { sum, bytes } => {
            cache.count_folders_since(*sum, *bytes);
            Ok(())
        }
        Deferred::Release { id, gone } => {
            let victims = cache.abort(*id)?;
            let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
            let (dropped, failed) = if *gone {
                (&cells[..], &[][..])
            } else {
                (&[][..], &cells[..])
            };
            cache.deletes_done(dropped, failed)
        }
        Deferred::Rejected(count) => {
            cache.count_refusals(*count);
            Ok(())
        }
        Deferred::Close { key, ticket } => {
            closed.extend(cache.complete_flight(key, *ticket));
            Ok(())
        }
    }
}
