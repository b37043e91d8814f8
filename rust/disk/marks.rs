//! Marks of others, who change the source and share no index with this process: what began before them is not filled.

use std::thread;

use super::cache_dir::{CacheDir, Mark};
use super::deferred::{POISONED, step};
use crate::cache::{Cache, Peers};
use crate::error::Result;
use crate::policy::Eviction;
use crate::shared::{Locked, StepError};

/// Ends all reads of the source that have begun before a mark that was not seen yet.
pub(super) fn note<S: Peers, T: Clone, P: Eviction>(
    cache: &mut Cache<S, T, P>,
    dir: &CacheDir,
    mark: Option<Mark>,
) {
    if dir.is_news(mark) {
        cache.invalidate_prefix("");
    }
}

/// Whether others share an index that this process does not use. It would not know of the file of a fill, and so not
/// remove it with what is below a prefix.
pub(super) fn has_neighbours(mark: Option<Mark>) -> bool {
    mark.is_some_and(|mark| mark.neighbours.is_some())
}

/// Looks for a mark.
///
/// # Errors
///
/// Where the step cannot be taken now; the next commit looks again.
pub(super) fn look<T: Clone>(index: &Locked<T>, dir: &CacheDir) -> Result<(), StepError> {
    let mark = dir.mark();
    step!(index, |cache| {
        note(cache, dir, mark);
        Ok(())
    })
}
