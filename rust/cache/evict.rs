//! Eviction: which entry goes next, and the outcome of deletes.

use super::cache::{BATCH, Cache, Tally, Victim};
use super::peers::Peers;
use super::reserve::{RejectReason, Reserve};
use super::rivals::Need;
use crate::arena::{End, List, State};
use crate::error::{Error, Result};
use crate::key::ByteRange;
use crate::policy::{Eviction, Newcomer};

/// A value that needs room, and what the policy has said of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) newcomer: Newcomer,
    /// `None` until it was asked.
    pub(super) is_admitted: Option<bool>,
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Drops entries of at least `size` bytes, if there are so many; a batch at most.
    pub fn evict(&mut self, size: u64, now: u64) -> Result<Vec<Victim>> {
        let mut victims = Vec::new();
        let mut freed = 0u64;
        let mut need = Need::default();
        while freed < size && victims.len() < BATCH {
            need.missing = size - freed;
            let Some(i) = self.next_victim(now, true, true, &mut need, None)? else {
                break;
            };
            freed = freed.saturating_add(self.evict_one(i, now, &mut victims)?);
        }
        Ok(victims)
    }

    /// Whether a volume can win so many bytes and inodes by evictions.
    pub fn can_free(&self, bytes: u64, inodes: u64) -> Result<bool> {
        let header = self.arena.header();
        let (mut held, mut files) = (header.held_bytes(), header.entries);
        for i in self.arena.list_cells(List::InProgress)? {
            let cell = self.arena.get(i)?;
            held = held.saturating_sub(header.cost(cell.size()?));
            files = files.saturating_sub(1);
        }
        if self.arena.storage.has_places() {
            // A value of a pool has no inode.
            files = 0;
        }
        Ok(bytes <= held && inodes <= files)
    }

    /// Reports the outcome of deletes that no reservation waits for.
    pub fn deletes_done(&mut self, deleted: &[u32], failed: &[u32]) -> Result<()> {
        for &i in deleted {
            if self.is_deleting(i) {
                self.release(i)?;
            }
        }
        for &i in failed {
            if self.is_deleting(i) {
                self.delete_failed(i)?;
            }
        }
        Ok(())
    }

    /// Reports deletes that many reservations have asked for together, and advances each of them.
    pub fn many_evicted(
        &mut self,
        ids: &[Option<u64>],
        deleted: &[u32],
        failed: &[u32],
        now: u64,
    ) -> Result<Vec<Option<Reserve>>> {
        self.deletes_done(deleted, failed)?;
        let mut answers = Vec::with_capacity(ids.len());
        for id in ids {
            let Some(id) = *id else {
                answers.push(None);
                continue;
            };
            let Some(mut reservation) = self.reservations.remove(&id) else {
                answers.push(Some(self.rejected(RejectReason::Invalidated)));
                continue;
            };
            // All of them leave alone what could not be deleted for one.
            reservation.failures += u32::from(!failed.is_empty());
            reservation.awaited.clear();
            answers.push(Some(self.advance(id, reservation, None, now)?));
        }
        Ok(answers)
    }

    /// [`Self::deletes_done`] unless the index was emptied since this [`Cache::generation`].
    pub fn deletes_done_since(
        &mut self,
        generation: u64,
        deleted: &[u32],
        failed: &[u32],
    ) -> Result<()> {
        if self.generation != generation {
            return Ok(());
        }
        self.deletes_done(deleted, failed)
    }

    /// Reports that these were not deleted.
    pub(super) fn deletes_failed(&mut self, victims: &[Victim]) -> Result<()> {
        let failed: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        self.deletes_done(&[], &failed)
    }

    fn is_deleting(&self, i: u32) -> bool {
        let cell = self.arena.get(i);
        let owner = self.arena.storage.own_slot() as u32 + 1;
        cell.is_ok_and(|c| c.is_entry() && c.state() == State::Deleting && c.earlier == owner)
    }

    /// Size and checksum of an entry that this participant is deleting, where both are known.
    #[must_use]
    pub fn expected(&self, i: u32) -> Option<(u64, u32)> {
        if !self.is_deleting(i) {
            return None;
        }
        let cell = self.arena.get(i).ok()?;
        Some((cell.size().ok()?, cell.checksum()?))
    }

    /// Whether there are bytes that could not be deleted.
    #[must_use]
    pub fn has_failed_deletes(&self) -> bool {
        self.arena.header().delete_failed != [0; 2]
    }

    /// Up to `limit` failed deletes that are worth another try.
    pub fn retry_failed(&mut self, limit: usize) -> Result<Vec<Victim>> {
        let mut victims = Vec::new();
        while victims.len() < limit {
            let Some(i) = self.arena.end(List::DeleteFailed, End::First)? else {
                break;
            };
            self.take(i, &mut victims)?;
        }
        Ok(victims)
    }

    /// The entry that goes next: failed deletes if asked for, then the useless, then the choice of
    /// the policy or the plans; `None` where they let nothing go for this newcomer, which is needed then, unless it
    /// has to be.
    pub(super) fn next_victim(
        &mut self,
        now: u64,
        failed: bool,
        has_to_be: bool,
        need: &mut Need,
        newcomer: Option<&mut Candidate>,
    ) -> Result<Option<u32>> {
        if failed && let Some(i) = self.arena.end(List::DeleteFailed, End::First)? {
            return Ok(Some(i));
        }
        if let Some(i) = self.next_useless(now)? {
            return Ok(Some(i));
        }
        if !has_to_be && let Some(candidate) = newcomer {
            let is_admitted = match candidate.is_admitted {
                Some(known) => known,
                None => self.policy.admits(&mut self.arena, candidate.newcomer)?,
            };
            candidate.is_admitted = Some(is_admitted);
            // What the plan will read is its business.
            if !is_admitted && !need.is_planned {
                return Ok(None);
            }
        }
        self.least_needed(need, has_to_be)
    }

    /// Takes an entry for the sake of its bytes, and counts it: an eviction, and an expiration too where it was stale.
    /// A failed delete that is tried again was counted before.
    pub(super) fn evict_one(&mut self, i: u32, now: u64, victims: &mut Vec<Victim>) -> Result<u64> {
        if self.arena.get(i)?.state() == State::Live {
            let stale = self.is_useless(i, now)?;
            Tally::add(&self.tally.evictions, 1);
            Tally::add(&self.tally.expirations, u64::from(stale));
        }
        self.take(i, victims)
    }

    /// Makes an entry a victim and returns the bytes that its delete is likely to free, or 0 where it is in
    /// progress already.
    ///
    /// Folders go with their last value, and how many those are is known only then. They count as the entry's part of
    /// all folders: without them two entries would go where one is enough. What that was too much is missed when
    /// bytes are reserved, and asked of further victims.
    pub(super) fn take(&mut self, i: u32, victims: &mut Vec<Victim>) -> Result<u64> {
        let state = self.arena.get(i)?.state();
        if matches!(state, State::Filling | State::Deleting) {
            return Ok(0);
        }
        self.arena.prefetch(i)?;
        let (key, range) = self.arena.name(i)?;
        if !S::EXCLUSIVE && self.arena.find(&key, range)? != Some(i) {
            // A damaged cell may give the name of a file that is not ours.
            return Err(Error::Corrupt("tree: a key that leads to another cell"));
        }
        let size = if state == State::Live {
            self.begin_delete(i)?
        } else {
            self.retry_delete(i)?
        };
        let cache_key = match range {
            ByteRange::Full => key,
            _ => range.cache_key(&key),
        };
        let placed = self.placed(i)?;
        victims.push(Victim {
            cell: i,
            cache_key,
            placed,
        });
        Ok(self.frees(self.arena.header().cost(size)))
    }

    /// Bytes that the delete of an entry is likely to free that takes so much room.
    pub(super) fn frees(&self, room: u64) -> u64 {
        room.saturating_add(self.folders_of_one())
    }

    /// Bytes of all folders by the number of entries; 0 in a pool, which has no folders of entries.
    fn folders_of_one(&self) -> u64 {
        if self.arena.storage.has_places() {
            return 0;
        }
        let header = self.arena.header();
        header
            .held_by_folders()
            .checked_div(header.entries)
            .unwrap_or_default()
    }

    pub(super) fn drop_all(&mut self, cells: &[u32]) -> Result<Vec<Victim>> {
        let mut victims = Vec::with_capacity(cells.len());
        for &i in cells {
            self.take(i, &mut victims)?;
        }
        Ok(victims)
    }
}
