//! Reads on the spot where a file system cannot read without waiting: of tmpfs and overlayfs the kernel is asked
//! first whether all pages are in memory.

use std::fs::File;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::format::HEADER;
use crate::cache::Placed;
use crate::disk::residency::{Waits, is_in_memory, tells_residency};

/// Time that such a read may take, and how many times as long threads read after one that took longer, at most.
const SLOW: Duration = Duration::from_millis(10);
const PAUSE: u32 = 100;
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What is known of the file system of the segments.
#[derive(Debug)]
pub(super) struct Resident {
    /// Whether it was found not to read without waiting.
    is_needed: AtomicBool,
    tells: OnceLock<bool>,
    made: Instant,
    /// Milliseconds since `made` before which threads read.
    resumes: AtomicU64,
}

impl Default for Resident {
    fn default() -> Self {
        Resident {
            is_needed: AtomicBool::new(false),
            tells: OnceLock::new(),
            made: Instant::now(),
            resumes: AtomicU64::new(0),
        }
    }
}

impl Resident {
    /// Whether reads go by what is in memory.
    pub(super) fn is_needed(&self) -> bool {
        self.is_needed.load(Ordering::Relaxed)
    }

    /// They do from now on.
    pub(super) fn need(&self) {
        self.is_needed.store(true, Ordering::Relaxed);
    }

    /// Whether header and part of a value are in memory, as far as the kernel tells.
    pub(super) fn has(&self, file: &File, placed: Placed, start: u64, size: usize) -> bool {
        let is_pausing = self.now() < self.resumes.load(Ordering::Relaxed);
        if is_pausing || !*self.tells.get_or_init(|| tells_residency(file)) {
            return false;
        }
        let at = placed.start();
        if start == 0 {
            return is_in_memory(file, at, HEADER + size);
        }
        let part = at + HEADER as u64 + start;
        is_in_memory(file, at, HEADER) && is_in_memory(file, part, size)
    }

    /// Reads; notes if that had to wait all the same.
    pub(super) fn watch<R>(&self, read: impl FnOnce() -> R) -> R {
        let waits = Waits::begin();
        let read = read();
        let waited = waits.end();
        if waited > SLOW {
            let pause = waited.saturating_mul(PAUSE).min(LONGEST_PAUSE);
            let until = self.now() + pause.as_millis() as u64;
            self.resumes.store(until, Ordering::Relaxed);
        }
        read
    }

    fn now(&self) -> u64 {
        self.made.elapsed().as_millis() as u64
    }
}
