//! The seam for eviction policies.

use std::fmt::Debug;

use super::entries::Entries;
use crate::arena::{End, List};
use crate::error::Result;

/// A value that would come in, if there were room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Newcomer {
    /// The hash that its entry would have; see [`Entries::hash`].
    pub hash: u64,
    /// Its bytes.
    pub size: u64,
    /// Bytes of values that have to go for it.
    pub room: u64,
    /// Whether no other values are on their way in. Those have room already, and are in no list.
    pub is_alone: bool,
}

/// Orders the `Live` entries by how soon they should go.
///
/// The order lives in the links of the entries, so a policy works on heap and mapped memory alike, and on the
/// keys of a [`Simulation`](super::Simulation). What it keeps in `self` belongs to one process and may be
/// lost at any time. A cache has its policy as a type parameter.
///
/// Stale entries and failed deletes never reach a policy: the cache evicts them first.
pub trait Eviction: Debug + Default {
    /// An entry has become `Live`.
    fn insert<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()>;

    /// A `Live` entry was read.
    fn touch<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()>;

    /// An entry is about to be `Live` no longer.
    fn remove<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()>;

    /// Whether others should go for a newcomer; asked once, where there is no room for it.
    fn admits<E: Entries>(&mut self, _entries: &mut E, _newcomer: Newcomer) -> Result<bool> {
        Ok(true)
    }

    /// A newcomer stays uncached, for nothing goes for it: this policy has decided that, or a plan.
    fn turn_away<E: Entries>(&mut self, _entries: &mut E, _newcomer: Newcomer) -> Result<()> {
        Ok(())
    }

    /// The entry that should go next, so that a new one can come in; `None` where all that are there should
    /// stay. It stays until [`Eviction::remove`].
    fn victim<E: Entries>(&mut self, entries: &mut E) -> Result<Option<u32>>;

    /// The same where bytes have to go whatever they are; `None` only where there are no entries.
    fn least<E: Entries>(&mut self, entries: &mut E) -> Result<Option<u32>> {
        self.victim(entries)
    }

    /// The entry of one list that a plan looks at first: the one that was used least recently, where uses are noted.
    fn first_of<E: Entries>(&mut self, entries: &mut E, list: List) -> Result<Option<u32>> {
        entries.end(list, End::First)
    }

    /// All entries, the next victim first; for tests and tools.
    fn order<E: Entries>(&self, entries: &E) -> Result<Vec<u32>>;

    /// Recomputes what the policy keeps beside its lists; for tests.
    fn validate<E: Entries>(&self, _entries: &E) -> Result<()> {
        Ok(())
    }

    /// What an index says of its policy; see [`PolicyKind`](super::PolicyKind).
    fn number(&self) -> u32 {
        0
    }

    /// The index was emptied by another process.
    fn reset(&mut self);
}
