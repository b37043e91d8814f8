//! What has become of a plan.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// What has become of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// It goes on.
    Followed,
    /// All of it was read.
    Done,
    /// Too many reads are not where it says.
    Wrong,
}

/// What has become of a plan, for those who gave it to an index; needs no lock.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<AtomicU8>);

impl Progress {
    /// None where no index goes by it: not yet, or not any more, for it was forgotten or another has its place.
    #[must_use]
    pub fn course(&self) -> Option<Course> {
        match self.0.load(Ordering::Relaxed) {
            1 => Some(Course::Followed),
            2 => Some(Course::Done),
            3 => Some(Course::Wrong),
            _ => None,
        }
    }

    pub(super) fn set(&self, course: Option<Course>) {
        let number = match course {
            None => 0,
            Some(Course::Followed) => 1,
            Some(Course::Done) => 2,
            Some(Course::Wrong) => 3,
        };
        self.0.store(number, Ordering::Relaxed);
    }
}
