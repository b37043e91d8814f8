//! The seam for eviction policies.

use std::fmt::Debug;

use crate::arena::{Arena, Storage};
use crate::error::Result;

/// Orders the `Live` entries by how soon they should go.
///
/// The order lives in the links of the cells ([`List::Recency`]), so a policy works on heap and
/// mapped memory alike and takes no memory per entry of its own. What it keeps in `self` belongs to
/// one process and may be lost at any time. A cache has its policy as a type parameter: nothing is
/// dispatched on a hit.
///
/// Stale entries and failed deletes never reach a policy: the cache evicts them first.
///
/// [`List::Recency`]: crate::arena::List::Recency
pub trait Eviction: Debug + Default {
    /// An entry has become `Live`.
    fn insert<S: Storage>(&mut self, arena: &mut Arena<S>, entry: u32) -> Result<()>;

    /// A `Live` entry was read.
    fn touch<S: Storage>(&mut self, arena: &mut Arena<S>, entry: u32) -> Result<()>;

    /// An entry is about to be `Live` no longer.
    fn remove<S: Storage>(&mut self, arena: &mut Arena<S>, entry: u32) -> Result<()>;

    /// The entry that should go next. It stays until [`Eviction::remove`].
    fn victim<S: Storage>(&mut self, arena: &mut Arena<S>) -> Result<Option<u32>>;

    /// All entries, the next victim first; for tests and tools.
    fn order<S: Storage>(&self, arena: &Arena<S>) -> Result<Vec<u32>>;

    /// The index was emptied by another process.
    fn reset(&mut self);
}
