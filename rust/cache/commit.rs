//! The end of a reservation: its entry is committed, or what was written is deleted.

use super::cache::{Cache, Victim};
use super::in_flight::ClosedFlight;
use super::peers::Peers;
use super::reserve::Reservation;
use crate::arena::State;
use crate::error::Result;
use crate::key::ByteRange;
use crate::policy::Eviction;

/// The outcome of a commit.
#[derive(Debug)]
pub struct Committed<T> {
    /// The bytes themselves, to be deleted, where the ticket was invalid.
    pub victims: Vec<Victim>,
    /// The flight of the ticket; `None` where it was closed before.
    pub flight: Option<ClosedFlight<T>>,
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// The bytes are written: commits the entry and closes the flight of its ticket, in one step.
    /// Where a write has invalidated the ticket, the bytes have to be deleted. `None` where nothing
    /// was granted.
    pub fn commit(
        &mut self,
        id: u64,
        checksum: Option<u32>,
        now: u64,
    ) -> Result<Option<Committed<T>>> {
        self.commit_fetched(id, checksum, now, now)
    }

    /// The same for a value that was fetched before now: its age counts from then.
    pub fn commit_fetched(
        &mut self,
        id: u64,
        checksum: Option<u32>,
        fetched: u64,
        now: u64,
    ) -> Result<Option<Committed<T>>> {
        let Some(mut reservation) = self.reservations.remove(&id) else {
            return Ok(None);
        };
        if reservation.cell == 0 {
            self.reservations.insert(id, reservation);
            return Ok(None);
        }
        self.arena.storage.check_place()?;
        self.release_reserved(&mut reservation);
        let victims = if self.is_valid(&reservation) {
            self.drop_absence(&reservation.key)?;
            if reservation.range == ByteRange::Full {
                self.drop_older_absences(&reservation.key, reservation.ticket)?;
            }
            self.make_live(reservation.cell, checksum, fetched, now)?;
            self.keep_validator(&reservation)?;
            Vec::new()
        } else {
            self.count_refusals(1);
            self.unwrite(&reservation)?
        };
        let (key, ticket) = (reservation.key, reservation.ticket);
        let flight = self.flights.close_known(key, ticket);
        Ok(Some(Committed { victims, flight }))
    }

    /// Whether this reservation exists; one from before the index was emptied does not.
    #[must_use]
    pub fn is_reserved(&self, id: u64) -> bool {
        self.reservations.contains_key(&id)
    }

    /// The bytes were not written, or perhaps in part. Returns what has to be deleted.
    pub fn abort(&mut self, id: u64) -> Result<Vec<Victim>> {
        let Some(mut reservation) = self.reservations.remove(&id) else {
            self.keep_promise(id);
            return Ok(Vec::new());
        };
        self.release_reserved(&mut reservation);
        if reservation.cell == 0 {
            return Ok(Vec::new());
        }
        self.unwrite(&reservation)
    }

    /// Forgets those from this one on: the step in which they were made has failed, so they have no holder. The index
    /// that counts them is made anew.
    pub(crate) fn forget_reservations(&mut self, first: u64) {
        self.reservations.retain(|id, _| *id < first);
    }

    /// Ends a reservation without its holder. How far it came is unknown, so what it has written,
    /// and the deletes that it waits for, become failed deletes.
    pub fn abandon(&mut self, id: u64) -> Result<()> {
        let Some(mut reservation) = self.reservations.remove(&id) else {
            self.keep_promise(id);
            return Ok(());
        };
        let awaited = std::mem::take(&mut reservation.awaited);
        let done = self.deletes_done(&[], &awaited);
        self.reservations.insert(id, reservation);
        done?;
        let victims = self.abort(id)?;
        self.deletes_failed(&victims)
    }

    /// The victim that is what a granted reservation has written.
    fn unwrite(&mut self, reservation: &Reservation) -> Result<Vec<Victim>> {
        let cell = reservation.cell;
        self.arena.get_mut(cell)?.set_state(State::Deleting)?;
        let cost = self.arena.header().cost(reservation.size);
        self.change_writing(|bytes| bytes.saturating_sub(cost));
        let cache_key = reservation.range.cache_key(&reservation.key);
        let placed = self.placed(cell)?;
        Ok(vec![Victim {
            cell,
            cache_key,
            placed,
        }])
    }
}
