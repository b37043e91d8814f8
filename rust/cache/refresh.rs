//! Validators: texts by which the source tells whether a value is still the same.
//!
//! A reader of the source notes the validator with its flight, and the commit keeps it with the entry, in one
//! step. Where the source still has the same one later, the age of the entry starts anew.
//!
//! The entries of one key are parts of one value, and readers put them together: a new index of a shard with an old
//! inner chunk gives what no value ever was. So whatever shows that the value has changed ends those that are older.

use super::cache::{BATCH, Cache, Found, Victim};
use super::in_flight::Ticket;
use super::lookup::fingerprint;
use super::peers::Peers;
use crate::arena::{List, State};
use crate::error::Result;
use crate::key::{Asked, ByteRange};
use crate::policy::Eviction;

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// What was read under a ticket has come, and is not given to its readers yet: its validator is to be kept with
    /// it, and entries of the key that are not known to be of the same value, and were fetched before, go
    ///
    /// - if any has another validator: the value has changed, and decoded values end as well;
    /// - if this replaces one that has expired: without validators nothing else tells a change.
    ///
    /// So do reads under way that began before. The entry that this one replaces is left to its fill. Where a later
    /// read has brought another value, this one is not kept, nor where one is committed before it.
    pub fn note_arrival(
        &mut self,
        key: &str,
        ticket: Ticket,
        validator: Option<&str>,
        fetched: u64,
        now: u64,
    ) -> Result<Vec<Victim>> {
        if let Some(validator) = validator {
            self.flights.set_validator(key, ticket, validator);
        }
        let Some((range, has_expired)) = self.flights.replaces(key, ticket) else {
            return Ok(Vec::new());
        };
        let own = validator.map(str::as_bytes);
        let has_changed = self.is_another(key, own)?;
        if !has_changed && !has_expired || self.valid_key(key, ticket).is_none() {
            return Ok(Vec::new());
        }
        self.undate_future(now)?;
        let replaced = self.arena.find(key, range)?;
        let mut outdated = Vec::new();
        for i in self.live_entries(key, usize::MAX)? {
            let other = self.arena.validator(i)?;
            if own.is_some() && other == own {
                continue;
            }
            if self.arena.get(i)?.time() > fetched {
                if own.is_some() && other.is_some() {
                    self.flights.invalidate(key, ticket);
                    return Ok(Vec::new());
                }
            } else if Some(i) != replaced {
                outdated.push(i);
            }
        }
        if own.is_some() && outdated.is_empty() && !has_changed {
            return Ok(Vec::new());
        }
        let victims = self.drop_all(&outdated)?;
        let before = self.version(key);
        // What other participants read without a validator, nothing else ends.
        let is_part = own.is_none() && range != ByteRange::Full;
        let participants = self.arena.storage.participants().iter();
        let has_others = participants.filter(|p| p.live != 0).count() > 1;
        if has_changed || is_part && has_others {
            self.bump_version(key);
        }
        let after = self.version(key);
        self.flights.outdate(key, ticket, before, after);
        Ok(victims)
    }

    /// Whether a value with this validator is another one than that of the entries of the key.
    pub(super) fn is_another(&self, key: &str, validator: Option<&[u8]>) -> Result<bool> {
        let Some(own) = validator else {
            return Ok(false);
        };
        let known = self.known_validator(key)?;
        Ok(known.is_some_and(|known| known != own))
    }

    /// The validator of the entries of a key that have one: no two have different ones.
    fn known_validator(&self, key: &str) -> Result<Option<&[u8]>> {
        let value = self.arena.find(key, ByteRange::Full)?;
        let Some(object) = self.arena.find_object(key)? else {
            return value.map_or(Ok(None), |i| self.live_validator(i));
        };
        let hints = self.arena.get(object)?;
        for i in value.into_iter().chain([hints.later, hints.earlier]) {
            if i != 0
                && let Some(known) = self.live_validator(i)?
            {
                return Ok(Some(known));
            }
        }
        for i in self.live_entries(key, BATCH)? {
            if let Some(known) = self.arena.validator(i)? {
                return Ok(Some(known));
            }
        }
        Ok(None)
    }

    fn live_validator(&self, i: u32) -> Result<Option<&[u8]>> {
        let cell = self.arena.get(i)?;
        if cell.is_entry() && cell.state() == State::Live {
            self.arena.validator(i)
        } else {
            Ok(None)
        }
    }

    /// Keeps the validator of a flight with the entry that has become `Live`.
    pub(super) fn keep_validator(&mut self, cell: u32, validator: Option<&str>) -> Result<()> {
        let Some(validator) = validator else {
            return Ok(());
        };
        match self.arena.set_validator(cell, validator.as_bytes()) {
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
        self.undate_future(now)?;
        self.arena.unlink(List::FetchTime, i)?;
        self.link_by_time(i, fetched.min(now))?;
        if is_verified {
            let seen = fingerprint(self.arena.get(i)?);
            self.verified.set(i, seen);
        }
        Ok(())
    }
}
