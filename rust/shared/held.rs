//! The lock of an index, held without a step: what a process holds that is stopped in the middle of one.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use super::lock_files::{OpenError, open_and_lock, take_slot};
use super::lock_word::LockWord;

/// Keeps all others out of the index until it is released. Dropped before, it leaves what a death in a step leaves.
#[derive(Debug)]
pub struct HeldLock {
    word: LockWord,
    _alive: File,
}

impl HeldLock {
    /// Takes the lock of the index below `root`, within `patience`.
    ///
    /// # Errors
    ///
    /// [`OpenError::Busy`] after that.
    pub fn take(root: &Path, patience: Duration) -> Result<HeldLock, OpenError> {
        let _opening = open_and_lock(&root.join("lock"), patience)?;
        let (slot, alive) = take_slot(root)?;
        let word = LockWord::open(root, slot)?;
        word.lock_within(patience)?;
        Ok(HeldLock {
            word,
            _alive: alive,
        })
    }

    /// Releases it; false where it was taken over meanwhile, or released before.
    pub fn release(&self) -> bool {
        self.word.release()
    }
}
