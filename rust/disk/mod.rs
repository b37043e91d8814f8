//! A cache directory: files of values, and whole fills by threads without an interpreter.

mod batch;
pub mod below;
mod cache_dir;
mod commit;
mod deferred;
mod evictions;
pub mod fill;
pub mod folders;
mod marks;
mod moves;
pub mod ownership;
pub mod queue;
pub mod removal;
pub mod residency;
pub mod segments;
pub mod value_file;
mod values;
mod write;

pub use self::cache_dir::{CacheDir, Space, space};
