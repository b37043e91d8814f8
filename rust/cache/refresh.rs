//! Validators: texts by which the source tells whether a value is still the same.
//!
//! A reader of the source notes the validator with its flight, and the commit keeps it with the entry, in one
//! step. Where the source still has the same one later, the age of the entry starts anew.

use super::cache::{BATCH, Cache, Found};
use super::in_flight::Ticket;
use super::lookup::fingerprint;
use super::peers::Peers;
use super::reserve::Reservation;
use crate::arena::State;
use crate::error::Result;
use crate::key::{Asked, ByteRange};
use crate::policy::Eviction;

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Notes the validator of what was read under this ticket.
    pub fn set_validator(&mut self, key: &str, ticket: Ticket, validator: &str) {
        self.flights.set_validator(key, ticket, validator);
    }

    /// Keeps the validator of a flight with the entry that has become `Live`.
    pub(super) fn keep_validator(&mut self, reservation: &Reservation) -> Result<()> {
        let (key, ticket) = (&reservation.key, reservation.ticket);
        let Some(validator) = self.flights.take_validator(key, ticket) else {
            return Ok(());
        };
        match self
            .arena
            .set_validator(reservation.cell, validator.as_bytes())
        {
            // Without one the value is read again when it is too old.
            Err(error) if !error.is_fatal() => Ok(()),
            kept => kept,
        }
    }

    /// The validator of the entry that would serve a request at any age, if it has one.
    pub fn validator(&self, key: &str, asked: impl Into<Asked>) -> Result<Option<String>> {
        let Some(found) = self.peek(key, asked, 0)? else {
            return Ok(None);
        };
        let own = self.arena.validator(found.handle as u32)?;
        Ok(own.map(|text| String::from_utf8_lossy(text).into_owned()))
    }

    /// The source had this validator at `fetched`: the age of the entries of the key that have the same one
    /// counts from then, as far as a batch goes. Returns the one that serves the request, touched; `None`
    /// where that has another validator, or a write has invalidated the ticket.
    pub fn refresh(
        &mut self,
        key: &str,
        asked: impl Into<Asked>,
        ticket: Ticket,
        validator: &str,
        fetched: u64,
        now: u64,
    ) -> Result<Option<Found>> {
        let asked = asked.into();
        if self.valid_key(key, ticket).is_none() {
            return Ok(None);
        }
        let same = |found: &Found| {
            let own = self.arena.validator(found.handle as u32);
            own.map(|own| own == Some(validator.as_bytes()))
        };
        match self.peek(key, asked, now)? {
            Some(found) if same(&found)? => {}
            _ => return Ok(None),
        }
        let mut cells = Vec::new();
        cells.extend(self.arena.find(key, ByteRange::Full)?);
        if let Some(object) = self.arena.find_object(key)? {
            cells.extend(self.arena.entries_below(object, BATCH, |_, _| Ok(true))?);
        }
        // Whatever is left out of the batch, this one is not.
        cells.extend(self.peek(key, asked, now)?.map(|found| found.handle as u32));
        for i in cells {
            if self.arena.validator(i)? == Some(validator.as_bytes()) {
                self.date_anew(i, fetched, now)?;
            }
        }
        self.drop_older_absences(key, ticket)?;
        // Its handle has changed together with its time.
        let found = self.peek(key, asked, now)?;
        if let Some(found) = &found {
            self.policy.touch(&mut self.arena, found.handle as u32)?;
        }
        Ok(found)
    }

    fn date_anew(&mut self, i: u32, fetched: u64, now: u64) -> Result<()> {
        let cell = self.arena.get(i)?;
        if cell.state() != State::Live || cell.time() >= fetched {
            return Ok(());
        }
        let is_verified = !S::EXCLUSIVE && self.verified.get(i) == fingerprint(cell);
        let source = self.arena.source_of(i)?;
        self.undate_future(source, now)?;
        self.arena.unlink_by_age(source, i)?;
        self.link_by_time(source, i, fetched.min(now))?;
        if is_verified {
            let seen = fingerprint(self.arena.get(i)?);
            self.verified.set(i, seen);
        }
        Ok(())
    }
}
