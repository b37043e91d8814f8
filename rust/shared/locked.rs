//! An index behind its lock.
//!
//! The lock is held for one step, never over I/O and never while waiting for an interpreter. Threads
//! without an interpreter take steps too, so one of them may hold the lock at a fork, and the child
//! would wait for it forever. [`Locked::disown`] says so, before anything else is tried there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::index::SharedIndex;
use super::lock_files::Locks;
use crate::arena::Heap;
use crate::cache::Cache;

/// An index, wherever it is.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // There is one for each index, in a box of its own.
pub enum Locked<T> {
    /// In memory of this process. The flag says that it was disowned.
    Own(Mutex<Cache<Heap, T>>, AtomicBool),
    /// In a directory.
    Shared(Mutex<SharedIndex<T>>, Arc<Locks>),
}

impl<T: Clone> Locked<T> {
    /// Puts an index in memory behind a lock.
    #[must_use]
    pub fn own(cache: Cache<Heap, T>) -> Self {
        Locked::Own(Mutex::new(cache), AtomicBool::new(false))
    }

    /// Puts the index of a directory behind a lock.
    #[must_use]
    pub fn shared(index: SharedIndex<T>) -> Self {
        let locks = index.locks();
        Locked::Shared(Mutex::new(index), locks)
    }

    /// In a forked child: takes no step from now on. Returns the descriptors of the parent's locks.
    pub fn disown(&self) -> Vec<i32> {
        match self {
            Locked::Own(_, disowned) => {
                disowned.store(true, Ordering::Relaxed);
                Vec::new()
            }
            Locked::Shared(_, locks) => {
                locks.disable();
                locks.fds().into()
            }
        }
    }

    /// Whether it takes no step any more.
    #[must_use]
    pub fn is_disowned(&self) -> bool {
        match self {
            Locked::Own(_, disowned) => disowned.load(Ordering::Relaxed),
            Locked::Shared(_, locks) => locks.are_disabled(),
        }
    }
}
