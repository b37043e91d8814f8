//! The core of zcache: an exact LRU index with sizes, ages, byte ranges and prefixes, and the fill
//! and write protocol on top of it.
//!
//! ```text
//! key, coding ──▶ cell ──▶ block ──▶ cells ──▶ table, texts ──▶ names, walks ──▶ entries ──▶ cache ──▶ python
//!                                                                                flights ──▶
//! ```
//!
//! **Policy.** Least recently used, exactly; reads and writes both refresh. Who must go: bytes of
//! no use first (deletes that failed), then what is stale, then the least recently used.
//!
//! **Threads.** The core is single-threaded data. Its one owner puts it behind one lock, takes
//! the lock once per step, and never holds it over I/O, an await or a call into Python.
//!
//! **Memory.** 56 bytes a cell and 4.6 to 9.2 bytes of table for each entry whose tail fits into 8
//! bytes (16 characters of chunk coordinates or of a hash in hexadecimal digits); a longer tail
//! takes as many bytes more as it is coded in, in words of 4. Directories and keys with ranges are
//! one cell each, shared by everything below them.
//!
//! Plain `cargo test` runs all of this without Python; `python` is one thin file behind the feature
//! of the same name.

#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

pub mod block;
pub mod cache;
pub mod cell;
pub mod cells;
pub mod coding;
#[cfg(unix)]
pub mod directory;
mod entries;
pub mod error;
mod few;
#[cfg(unix)]
pub mod files;
pub mod flights;
pub mod key;
#[cfg(unix)]
pub mod mapped;
mod memo;
mod names;
#[cfg(unix)]
pub mod offload;
mod seen;
mod table;
mod texts;
mod validate;
mod walks;

#[cfg(feature = "python")]
mod python;
