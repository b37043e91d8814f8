//! A fill of a cache directory: what is to be cached, and how that has ended.

use std::io;
use std::time::Instant;

use crate::cache::Ticket;
use crate::error::Error;
use crate::key::ByteRange;
use crate::sampling;

/// A value to be cached.
#[derive(Debug)]
pub struct Fill<D> {
    /// Its key.
    pub key: Box<str>,
    /// Which part of the key's value it is.
    pub range: ByteRange,
    /// Its bytes.
    pub data: D,
    /// Decides whether it may be cached.
    pub ticket: Ticket,
    /// Milliseconds on the clock of the index from which its age counts.
    pub fetched: u64,
    /// Milliseconds on the same clock at `since`.
    pub now: u64,
    /// When `now` was read.
    pub since: Instant,
    /// Bytes of the volume that stay free.
    pub min_free_space: Option<u64>,
}

impl<D> Fill<D> {
    /// Milliseconds on the clock of the index.
    pub(super) fn now(&self) -> u64 {
        let passed = self.since.elapsed().as_millis();
        self.now
            .saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }

    /// Stands for the value that it is about. Two values that share one by chance only wait for each other.
    pub(super) fn name(&self) -> u64 {
        sampling::part_of(&self.key, self.range, 0).hash
    }
}

impl<D: AsRef<[u8]>> Fill<D> {
    /// Bytes of the value.
    pub(super) fn size(&self) -> u64 {
        self.data.as_ref().len() as u64
    }
}

/// The reason of a fill that is rejected because the volume, or what may be used of it, is full.
pub const NO_SPACE_ON_VOLUME: &str = "no space on the volume";

/// How a fill has ended.
#[derive(Debug)]
pub enum Ending {
    /// The value is cached.
    Filled,
    /// The value stays uncached, for this reason.
    Rejected(&'static str),
    /// The file system refused to write it.
    Failed(io::Error),
    /// There was a valid value of this name that the index does not list. It is gone, and nothing is cached.
    Unlisted,
    /// The index is damaged.
    Corrupt(Error),
    /// Another process has held the lock of the index all the time.
    Busy,
}

impl Ending {
    /// Whether Python has to hear of it soon.
    pub(super) fn is_urgent(&self) -> bool {
        matches!(
            self,
            Ending::Failed(_) | Ending::Unlisted | Ending::Corrupt(_)
        )
    }
}

/// The outcome of a fill.
#[derive(Debug)]
pub struct Report {
    /// How it has ended.
    pub ending: Ending,
    /// Deletes that have failed, for it and the other fills of its batch; their bytes stay counted.
    pub delete_errors: Vec<io::Error>,
}
