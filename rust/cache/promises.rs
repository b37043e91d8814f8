//! Bytes that may still be written without an entry: what was granted before the index was emptied.

use super::cache::Cache;
use super::peers::Peers;
use crate::policy::Eviction;

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// The index was emptied: what was granted may still be written.
    pub(super) fn promise_all(&mut self) {
        for (id, reservation) in self.reservations.iter_mut() {
            let bytes = match reservation.cell {
                0 => reservation.reserved,
                // The upper bound, with the folders that it may make.
                _ => reservation.cost,
            };
            self.promises.insert(*id, bytes);
        }
        self.reservations.clear();
    }

    /// Tells the others what may still be written.
    pub(crate) fn tell_promises(&mut self) {
        let bytes = self.promised();
        self.tell_promised(bytes);
    }

    pub(crate) fn tell_promised(&mut self, bytes: u64) {
        if let Some(own) = self.arena.storage.own_mut() {
            own.promised_bytes = bytes;
        }
    }

    /// Bytes that may still be written without an entry.
    pub(crate) fn promised(&self) -> u64 {
        self.promises
            .values()
            .fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    /// Nothing of what was granted before the index was emptied is written any more.
    pub(super) fn keep_promise(&mut self, id: u64) {
        if self.promises.remove(&id).is_some() {
            self.tell_promises();
        }
    }
}
