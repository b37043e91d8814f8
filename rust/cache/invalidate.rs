//! Invalidation: writes and deletes in the source, forks, rebuilds and dead participants.

use super::cache::{BATCH, Cache, Victim};
use super::changes::{Slot, slot_of_key, slot_of_prefix};
use super::in_flight::{Flights, Ticket};
use super::keys::{Rest, START};
use super::peers::Peers;
use super::segments::OpenSegment;
use crate::arena::{Arena, List, ROOT, State, Storage};
use crate::error::{Error, Result};
use crate::key::{self, ByteRange, is_below};
use crate::policy::Eviction;

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Drops what is known of a key: its entries, or that there is no such key.
    pub(super) fn drop_key(&mut self, key: &str) -> Result<Vec<Victim>> {
        if self.finds_by_index_alone() {
            self.arena.check_whole(key)?;
        }
        self.drop_absence(key)?;
        let mut cells = Vec::new();
        cells.extend(self.arena.find(key, ByteRange::Full)?);
        if let Some(object) = self.arena.find_object(key)? {
            cells.extend(
                self.arena
                    .entries_below(object, usize::MAX, not_in_progress)?,
            );
        }
        self.drop_all(&cells)
    }

    /// Whether what the index does not find stays: nothing else says where the value of a key is. Then it has to be sure.
    pub(super) fn finds_by_index_alone(&self) -> bool {
        !S::EXCLUSIVE && self.arena.storage.has_places()
    }

    /// A write of this key begins: nothing that is cached of it is valid from now on.
    pub fn begin_write(&mut self, key: &str) -> Result<Vec<Victim>> {
        self.arena.storage.check_place()?;
        // First what may find the index damaged: a step that is repeated must not count twice.
        let victims = self.drop_key(key)?;
        let slot = slot_of_key(key);
        self.count_change(slot);
        self.announce_write(slot, true);
        self.flights.begin_write(key, self.version(key));
        self.note_sampled_drop(key);
        Ok(victims)
    }

    /// A write of this key has ended. With `keeps`, where no other change overlapped it, the ticket
    /// allows its value to be cached; with a `payload`, readers may join its flight until then.
    pub fn end_write(
        &mut self,
        key: &str,
        keeps: bool,
        payload: Option<T>,
    ) -> Result<(Vec<Victim>, Option<Ticket>)> {
        self.arena.storage.check_place()?;
        let victims = self.drop_key(key)?;
        // One that began with another index is not announced here.
        let known = self.flights.is_written(key);
        let version = self.version(key);
        let alone = self.flights.end_write(key, version);
        let slot = slot_of_key(key);
        self.count_change(slot);
        if known {
            self.announce_write(slot, false);
        }
        if keeps && !alone {
            self.count_refusals(1);
        }
        let made = self.arena.header().absences_made;
        let open = || {
            self.flights
                .open(key, ByteRange::Full, payload, version, None, made)
        };
        let ticket = (keeps && alone).then(open);
        Ok((victims, ticket))
    }

    /// Has others see a change, and decoded values. The caller invalidates the flights that it concerns.
    fn count_change(&mut self, slot: Slot) {
        if S::EXCLUSIVE {
            self.changes.count(slot);
        } else {
            self.arena.storage.count_change(slot);
        }
    }

    fn announce_write(&mut self, slot: Slot, begins: bool) {
        if !S::EXCLUSIVE {
            self.arena.storage.announce_write(slot, begins);
        }
    }

    /// The source has no such key.
    pub fn drop_missing(&mut self, key: &str) -> Result<Vec<Victim>> {
        self.drop_key(key)
    }

    /// Invalidates the flights and writes below a prefix ("" is everything). To be followed by
    /// [`Cache::drain_prefix`] and [`Cache::drain_absences`].
    pub fn invalidate_prefix(&mut self, prefix: &str) {
        let prefix = prefix.trim_end_matches('/');
        self.count_change(slot_of_prefix(prefix));
        self.flights.invalidate_where(|key| is_below(key, prefix));
        // Of the keys below it the sample has only hashes.
        self.note_sampled_drop(prefix);
    }

    /// A change of everything below a prefix begins or ends; nothing below it is cached meanwhile.
    pub fn prefix_change(&mut self, prefix: &str, begins: bool) -> Result<()> {
        self.arena.storage.check_place()?;
        let prefix = prefix.trim_end_matches('/');
        if self.flights.prefix_change(prefix, begins) {
            self.announce_write(slot_of_prefix(prefix), begins);
        }
        Ok(())
    }

    /// Drops entries below a prefix ("" is everything), a batch at a time, from [`START`] on. Returns where to go on.
    ///
    /// Keys outside the prefix are not looked at, except where it ends inside the chunk coordinates of keys below it
    /// (`a/c/12`, where `a/c/12/3` is cached): those of the same array if they are few, else all, once.
    pub fn drain_prefix(&mut self, prefix: &str, at: Rest) -> Result<(Vec<Victim>, Option<Rest>)> {
        let prefix = prefix.trim_end_matches('/');
        let walk = self.walk_of(at);
        let (found, next) = match walk {
            None => self.find_below(prefix)?,
            Some(walk) => self.next_cut_off(prefix, walk, false, is_live_entry)?,
        };
        let mut victims = Vec::new();
        for i in found {
            if is_live(&self.arena, i)? {
                self.take(i, &mut victims)?;
            }
        }
        if walk.is_none() {
            self.check_taken(prefix, next, is_live_entry)?;
        }
        Ok((victims, next))
    }

    /// Checks that damage hid nothing from a step that has looked below a prefix and taken what it found, but for what is cut off
    /// of a directory of many. To be asked in that step: before the next one others may cache values there.
    pub(super) fn check_taken(
        &self,
        prefix: &str,
        next: Option<Rest>,
        is_wanted: impl Fn(&Arena<S>, u32) -> Result<bool>,
    ) -> Result<()> {
        if !self.finds_by_index_alone() || next == Some(START) {
            return Ok(());
        }
        self.arena
            .check_none_below(prefix, next.is_none(), is_wanted)
    }

    /// Entries below a prefix that can be served, a batch or a few more at most; and where to go on.
    fn find_below(&self, prefix: &str) -> Result<(Vec<u32>, Option<Rest>)> {
        let mut found = Vec::new();
        let mut next = None;
        if prefix.is_empty() {
            found = self.arena.entries_below(ROOT, BATCH, is_live)?;
        } else {
            let value = self.arena.find(prefix, ByteRange::Full)?;
            let cut = self.arena.cut_by(prefix, false)?;
            for i in value
                .into_iter()
                .chain(self.arena.find_object(prefix)?)
                .chain(self.arena.find_dir(&format!("{prefix}/"))?)
                .chain(self.arena.cut_off_in_few(&cut, false)?)
            {
                if !self.arena.get(i)?.is_entry() {
                    let rest = BATCH.saturating_sub(found.len());
                    found.extend(self.arena.entries_below(i, rest, is_live)?);
                } else if is_live(&self.arena, i)? {
                    found.push(i);
                }
            }
            if self.arena.is_of_many(&cut, false)? {
                next = Some(self.walk());
            }
        }
        if found.len() >= BATCH {
            next = Some(START);
        }
        Ok((found, next))
    }

    /// In a forked child: what other threads of the parent had in progress never ends here.
    ///
    /// Returns the flights, because releasing their payloads is the caller's business.
    pub fn after_fork(&mut self) -> Result<Flights<T>> {
        let flights = self.flights.take();
        self.reservations.clear();
        // Plans of the child are its own.
        self.forget_plans();
        self.arena.header_mut().reserved_bytes = 0;
        for i in self.arena.list_cells(List::InProgress)? {
            self.delete_failed(i)?;
        }
        Ok(flights)
    }

    /// Another participant has emptied the index: nothing that began before counts any more.
    pub(crate) fn reset(&mut self) {
        self.generation += 1;
        // Files that were put back may say of directories what they said before.
        self.arena.forget_paths();
        self.flights.invalidate_all();
        self.promise_all();
        self.policy.reset();
        self.empty_plan();
        self.verified.clear();
        self.open_segment = OpenSegment::default();
        self.moving = 0;
    }

    /// Slots of what is being written here.
    pub(crate) fn writes(&self) -> Vec<Slot> {
        self.flights.changed().collect()
    }

    /// Forgets what it had begun: that ends elsewhere. Returns the flights, because releasing their
    /// payloads is the caller's business.
    pub(crate) fn take_flights(&mut self) -> Flights<T> {
        self.flights.take()
    }

    /// Comes back to an index that it has not used for a while, and has no flights in.
    pub(crate) fn rejoin(&mut self) -> Result<()> {
        self.reset();
        // They are told again, with those from now.
        self.tell_promised(0);
        self.reclaim_dead(&[self.arena.storage.own_slot()])?;
        // Whatever it has written meanwhile.
        self.arena.storage.bump_epoch();
        Ok(())
    }

    /// Announces writes to an index that was emptied meanwhile.
    pub(crate) fn announce(&mut self, writes: &[Slot]) {
        for &slot in writes {
            self.arena.storage.announce_write(slot, true);
        }
        self.tell_promises();
    }

    /// Takes over what dead participants had in progress.
    pub(crate) fn reclaim_dead(&mut self, dead: &[usize]) -> Result<()> {
        for &n in dead {
            let storage = &mut self.arena.storage;
            let gone = storage.remove_participant(n);
            let header = storage.header_mut();
            header.reserved_bytes = header.reserved_bytes.saturating_sub(gone.reserved_bytes);
            if gone.promised_bytes != 0 {
                // It may have written them after the scan, and they are not counted.
                return Err(Error::Lost(
                    "a participant died that had not ended its writes",
                ));
            }
            if header.unit > 1 && header.value_header == 0 {
                // Of this it may have made folders; the next rebuild counts what is there.
                let folders = &mut header.folder_bytes;
                *folders = folders.saturating_add_unsigned(gone.reserved_bytes);
            }
            if gone.is_writing() {
                // What was read during its writes may be older than what they have written.
                storage.bump_epoch();
            }
            for i in self.arena.list_cells(List::InProgress)? {
                if self.arena.get(i)?.earlier as usize == n + 1 {
                    self.delete_failed(i)?;
                }
            }
            self.close_segments_of(n)?;
        }
        Ok(())
    }

    /// Adds a value that a scan of the cache store has found, unless it is known. Values are given
    /// in the order of their fetch; time 0 means unknown. Returns whether it was added.
    ///
    /// What cannot be named is not added: names that zcache never gives, and keys that are too long.
    pub fn adopt(&mut self, cache_key: &str, size: u64, fetched: u64) -> Result<bool> {
        self.adopt_as(cache_key, size, fetched, None, |_, _| Ok(()))
    }

    /// The same; `place` says where the bytes are.
    pub(super) fn adopt_as(
        &mut self,
        cache_key: &str,
        size: u64,
        fetched: u64,
        checksum: Option<u32>,
        place: impl FnOnce(&mut Self, u32) -> Result<()>,
    ) -> Result<bool> {
        let Some((key, range)) = ByteRange::parse(cache_key) else {
            return Ok(false);
        };
        if !key::labels_fit(key) {
            return Ok(false);
        }
        // Of a key that was written since the index was emptied, the scan may have seen the old
        // value.
        let written = self.version_by_all(key) != self.arena.storage.first_version();
        let Some(i) = self.begin_writing(key, range, size)? else {
            return Ok(false);
        };
        place(self, i)?;
        if written {
            self.delete_failed(i)?;
            return Ok(true);
        }
        self.make_live(i, checksum, fetched, fetched)?;
        if fetched == 0 {
            self.undate(i)?;
        }
        Ok(true)
    }
}

fn not_in_progress<S: Storage>(arena: &Arena<S>, i: u32) -> Result<bool> {
    Ok(matches!(
        arena.get(i)?.state(),
        State::Live | State::DeleteFailed
    ))
}

fn is_live_entry<S: Storage>(arena: &Arena<S>, i: u32) -> Result<bool> {
    Ok(arena.get(i)?.is_entry() && is_live(arena, i)?)
}

fn is_live<S: Storage>(arena: &Arena<S>, i: u32) -> Result<bool> {
    Ok(arena.get(i)?.state() == State::Live)
}
