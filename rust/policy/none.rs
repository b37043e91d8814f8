//! No eviction: what came first stays until it expires or is dropped.

use super::entries::Entries;
use super::policy::Eviction;
use crate::arena::{End, List};
use crate::error::Result;

/// The recency list is in the order of arrival, and reads change nothing. Nothing makes room for a new entry;
/// where bytes have to go, because the bound has become smaller or the volume is full, the last one goes first.
#[derive(Debug, Default)]
pub struct NoEviction;

impl Eviction for NoEviction {
    fn insert<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        entries.enter(entry, 0)
    }

    #[inline]
    fn touch<E: Entries>(&mut self, _: &mut E, _: u32) -> Result<()> {
        Ok(())
    }

    fn remove<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        entries.leave(entry)
    }

    fn victim<E: Entries>(&mut self, _: &mut E) -> Result<Option<u32>> {
        Ok(None)
    }

    fn least<E: Entries>(&mut self, entries: &mut E) -> Result<Option<u32>> {
        match entries.end(List::Recency, End::Last)? {
            Some(last) => Ok(Some(last)),
            // Left there by another policy.
            None => entries.end(List::Main, End::First),
        }
    }

    /// The last one that came.
    fn first_of<E: Entries>(&mut self, entries: &mut E, list: List) -> Result<Option<u32>> {
        let end = match list {
            List::Recency => End::Last,
            _ => End::First,
        };
        entries.end(list, end)
    }

    fn order<E: Entries>(&self, entries: &E) -> Result<Vec<u32>> {
        let mut order = entries.all_of(List::Recency)?;
        order.reverse();
        order.extend(entries.all_of(List::Main)?);
        Ok(order)
    }

    fn reset(&mut self) {}
}
