//! The core of zcache: an index of cached values with sizes, ages, byte ranges and prefixes, and the
//! fill and write protocol on top of it. It decides and counts; it never touches a value, except in
//! [`disk`], which writes and deletes the files of a cache directory.
//!
//! # Policy
//!
//! When bytes are needed, failed deletes go first, then stale entries, then the choice of an
//! [eviction policy](policy::Eviction). The default, [`Lru`](policy::Lru), is exact: reads and
//! fills both refresh an entry. [`policy::Policy`] is the one that an index is opened with, and a
//! [`policy::Simulation`] tells what each would have served.
//!
//! Bytes are [reserved](cache::Cache::reserve) before they are written, and count until their
//! delete has succeeded, so the cache store never holds more than its bound.
//!
//! # Threading
//!
//! A [`cache::Cache`] is single-threaded data, and every operation is one step. Its owner puts it
//! behind one lock ([`shared::Locked`]), takes the lock once per step, and never holds it over I/O,
//! an await or a call into Python. Between processes, [`shared::SharedIndex`] does the same with a
//! word in a file that all of them map; from a holder that has died it is taken over.
//!
//! # Memory
//!
//! ```text
//! bytes = 56 × (entries + directories + keys with ranges    cells
//!               + validators + absences)
//!       + 4.6 to 9.2 × the same number                                 hash table
//!       + labels of more than 8 bytes, in words of 4                   strings
//!       + 8 × the same number, in a pool                               places
//!       + 4 to 8 × entries + 559,000, with the adaptive policy         history
//! ```
//!
//! A [sample](sampling::Sample) of the requests takes up to 0.99 MB more.
//!
//! Chunk coordinates take half a byte a character, so those of up to 16 characters need no string.
//! Directories are stored once for all keys below them. Ten million chunk keys take 63 bytes each,
//! their text included.
//!
//! # Which type to use
//!
//! - [`cache::Cache`] over [`arena::Heap`] for a cache store of one process; it is lost at exit.
//! - [`shared::SharedIndex`] for a directory on a local file system, shared by processes and kept
//!   over restarts. Not on network file systems: their locks and mappings are not coherent.
//! - [`disk::queue::Fills`] to write values into such a directory from threads of their own.
//!
//! # Modules
//!
//! Each depends only on those to its right:
//!
//! ```text
//! python → disk → shared → cache → policy, sampling → arena → key → checksum, error
//! ```
//!
//! `cargo test` runs all of this without Python; the bindings are behind the feature `python`.

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

#[cfg(not(unix))]
compile_error!(
    "zcache needs a Unix-like system: its index relies on flock, mmap and fork semantics"
);

pub mod arena;
pub mod cache;
pub mod checksum;
pub mod disk;
pub mod error;
pub mod key;
pub mod policy;
pub mod sampling;
pub mod shared;

#[cfg(feature = "python")]
mod python;
