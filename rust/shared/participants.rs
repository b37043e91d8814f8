//! Participants of a mapped index: which ones are alive, which one rebuilds it, and what they tell
//! each other.

use bytemuck::Zeroable;

use super::header::new_generation;
use super::lock_files::is_alive;
use super::mapped::Mapped;
use super::sample_file::SampleFile;
use crate::arena::racing::load_u64;
use crate::cache::{Participant, Peers, Slot, ToldAges, Version};
use crate::error::Result;
use crate::sampling::Sample;

impl Mapped {
    /// The other live participants, as they go on after the index is emptied; none where the header is
    /// unreadable.
    pub(super) fn living(&self) -> Vec<(usize, Participant)> {
        // Reading the mapping of a truncated file would be fatal.
        let is_whole = self.files.head.is_whole();
        if !is_whole || !self.file_header().is_plausible() {
            return Vec::new();
        }
        let others = self.others();
        let living = others.filter(|(n, _)| is_alive(&self.root, *n));
        living
            .map(|(n, other)| (n, other.without_entries()))
            .collect()
    }

    fn others(&self) -> impl Iterator<Item = (usize, Participant)> {
        let all = self.participants().iter().copied().enumerate();
        all.filter(|(n, other)| *n != self.own_slot && other.live != 0)
    }

    /// Adds this participant to the list. The lock must be held.
    pub fn register(&mut self) {
        let (own_slot, bound) = (self.own_slot, self.bound);
        let (uses_policy, ages) = (u16::from(self.uses_policy), self.ages);
        self.generation = self.file_header().generation;
        let fresh = Participant {
            live: 1,
            bound,
            uses_policy,
            ages,
            ..Participant::zeroed()
        };
        self.file_header_mut().add_participant(own_slot, fresh);
    }

    /// Ends the rebuild, if this participant owns it; not one that has taken in, or has left, values of a damaged index.
    pub fn complete(&mut self, is_emptied: bool) {
        if self.owns_rebuild() && (is_emptied || !self.begins_empty()) {
            self.set_damaged(false);
            self.file_header_mut().rebuild_owner = 0;
        }
    }

    /// The participant that rebuilds the index.
    #[must_use]
    pub fn rebuild_owner(&self) -> Option<usize> {
        (self.file_header().rebuild_owner as usize).checked_sub(1)
    }

    /// Participants that are in the list but no longer alive.
    #[must_use]
    pub fn dead(&self) -> Vec<usize> {
        let others = self.others().map(|(n, _)| n);
        others.filter(|n| !is_alive(&self.root, *n)).collect()
    }

    /// Whether the participant that was rebuilding the index has died.
    #[must_use]
    pub fn is_rebuild_abandoned(&self) -> bool {
        let owner = self.rebuild_owner().filter(|n| *n != self.own_slot);
        owner.is_some_and(|n| {
            let listed = self.participants().get(n).is_some_and(|p| p.live != 0);
            !listed || !is_alive(&self.root, n)
        })
    }
}

impl Peers for Mapped {
    fn is_policy_used(&self) -> bool {
        let mut users = self.others().filter(|(_, other)| other.uses_policy != 0);
        users.any(|(n, _)| is_alive(&self.root, n))
    }
    fn use_policy(&mut self, is_used: bool) {
        self.uses_policy = is_used;
        if let Some(own) = self.own_mut()
            && own.live != 0
        {
            own.uses_policy = u16::from(is_used);
        }
    }
    fn changes(&self, slot: Slot) -> u32 {
        let count = self.files.changes().get(usize::from(slot));
        count.copied().unwrap_or(0)
    }
    fn own_changes(&self, slot: Slot) -> u32 {
        self.own_changes.get(slot)
    }
    fn epoch(&self) -> u32 {
        self.file_header().epoch
    }
    fn first_version(&self) -> Version {
        [0, self.file_header().generation as u32]
    }
    fn count_change(&mut self, slot: Slot) {
        let header = self.file_header_mut();
        header.changes = header.changes.wrapping_add(1);
        if let Some(count) = self.files.changes_mut().get_mut(usize::from(slot)) {
            *count = count.wrapping_add(1);
            self.own_changes.start();
            self.own_changes.count(slot);
        }
    }
    fn bump_epoch(&mut self) {
        let header = self.file_header_mut();
        header.epoch = header.epoch.wrapping_add(1);
    }
    fn announce_write(&mut self, slot: Slot, begins: bool) {
        let own_slot = self.own_slot;
        self.file_header_mut()
            .announce_write(own_slot, slot, begins);
    }
    fn has_writers(&self) -> bool {
        self.file_header().has_writers()
    }
    fn is_written(&self, slot: Slot) -> bool {
        self.file_header().is_written(self.own_slot, slot)
    }
    fn remove_participant(&mut self, n: usize) -> Participant {
        self.file_header_mut().remove_participant(n)
    }
    fn participants(&self) -> &[Participant] {
        self.file_header().participants()
    }
    fn participants_mut(&mut self) -> &mut [Participant] {
        self.file_header_mut().participants_mut()
    }
    fn set_ages(&mut self, ages: &ToldAges) {
        self.ages = *ages;
        if let Some(own) = self.own_mut()
            && own.live != 0
        {
            own.ages = *ages;
        }
    }
    fn set_bound(&mut self, bound: u64) {
        self.bound = bound;
        if let Some(own) = self.own_mut()
            && own.live != 0
        {
            own.bound = bound;
        }
    }
    fn own_slot(&self) -> usize {
        self.own_slot
    }
    fn is_current(&self) -> bool {
        load_u64(&self.file_header().generation) == self.generation
    }
    fn check_place(&mut self) -> Result<()> {
        self.require_place_or_leave()
    }
    fn owns_rebuild(&self) -> bool {
        self.rebuild_owner() == Some(self.own_slot)
    }
    fn begins_empty(&self) -> bool {
        self.is_damaged()
    }
    fn is_complete(&self) -> bool {
        self.file_header().rebuild_owner == 0
    }
    fn sample(&mut self) -> Option<&mut Sample> {
        self.sample.get_with_room()
    }
    fn checked_sample(&mut self) -> Option<&mut Sample> {
        let seed = new_generation();
        if !self.sample.is_in_place() {
            self.sample = SampleFile::open(&self.root, seed);
        }
        self.sample.check(seed);
        self.sample.get()
    }
}
