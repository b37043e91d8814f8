//! Peers: the other participants of an index that several processes share.

use bytemuck::{Pod, Zeroable};

use super::ages::ToldAges;
use super::changes::Slot;
use crate::arena::{Heap, Storage};
use crate::error::Result;
use crate::sampling::Sample;

/// Keys that one participant can name as being written; while it writes more at once, no key may be
/// filled.
pub const WRITES: usize = 32;

/// One of those who share an index: a process, or one store of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Participant {
    /// Its part of `Header::reserved_bytes`.
    pub reserved_bytes: u64,
    /// Bytes of the entries that it is writing.
    pub writing_bytes: u64,
    /// Bytes that it may still write without an entry: it was granted them before the index was
    /// emptied.
    pub promised_bytes: u64,
    /// Its bound, in bytes.
    pub bound: u64,
    /// Whether this slot is taken; its owner may have died since.
    pub live: u16,
    /// Whether it uses the policy in force, so that no other may choose one; see
    /// [`Cache::set_policy`](super::Cache::set_policy).
    pub uses_policy: u16,
    /// Writes in progress for which there is no space in `writes`.
    pub unnamed: u32,
    /// Slots (plus one) of the keys and prefixes that it is changing, or 0. What was
    /// read before a write ends is not kept; the write of a dead participant ends when its slot is
    /// reclaimed.
    pub writes: [u16; WRITES],
    /// The sources that it has open.
    pub ages: ToldAges,
}

impl Participant {
    /// What is left of it when the index is emptied while it lives: its writes go on.
    #[must_use]
    pub fn without_entries(self) -> Self {
        let bytes = self.reserved_bytes.saturating_add(self.writing_bytes);
        Participant {
            reserved_bytes: 0,
            writing_bytes: 0,
            promised_bytes: self.promised_bytes.saturating_add(bytes),
            ..self
        }
    }

    /// Whether it is writing anything.
    #[must_use]
    pub fn is_writing(&self) -> bool {
        self.unnamed != 0 || self.writes != [0; WRITES]
    }
}

/// Compares equal as long as no other participant has changed a key.
pub type Version = [u32; 2];

/// What participants tell each other through the storage that they share. The defaults are those of
/// a storage with one participant. What is changed is given by its slot.
pub trait Peers: Storage {
    /// Counts the changes by all participants.
    fn changes(&self, _slot: Slot) -> u32 {
        0
    }
    /// Those of them that are by this one.
    fn own_changes(&self, _slot: Slot) -> u32 {
        0
    }
    /// Changes when any key may have been written.
    fn epoch(&self) -> u32 {
        0
    }
    /// The version of all keys when the index was emptied.
    fn first_version(&self) -> Version {
        [0; 2]
    }
    /// This participant has begun a change, or ended one.
    fn count_change(&mut self, _slot: Slot) {}
    /// Any key may have been written.
    fn bump_epoch(&mut self) {}
    /// A change begins or ends.
    fn announce_write(&mut self, _slot: Slot, _begins: bool) {}
    /// Whether any participant is changing anything.
    fn has_writers(&self) -> bool {
        false
    }
    /// Whether another participant is changing this.
    fn is_written(&self, _slot: Slot) -> bool {
        false
    }
    /// Takes a participant out of the list.
    fn remove_participant(&mut self, _n: usize) -> Participant {
        Participant::default()
    }
    /// All slots that were ever taken; none where the index is not shared.
    fn participants(&self) -> &[Participant] {
        &[]
    }
    /// The same, mutable.
    fn participants_mut(&mut self) -> &mut [Participant] {
        &mut []
    }
    /// Whether any other participant that lives uses the policy in force.
    fn is_policy_used(&self) -> bool {
        false
    }
    /// Says of this participant whether it does.
    fn use_policy(&mut self, _is_used: bool) {}
    /// Tells the others of the sources that this participant has open.
    fn set_ages(&mut self, _ages: &ToldAges) {}
    /// Changes the bound of this participant.
    fn set_bound(&mut self, _bound: u64) {}
    /// The slot of this participant.
    fn own_slot(&self) -> usize {
        0
    }
    /// What this participant tells the others of itself; `None` where the index is not shared.
    fn own(&self) -> Option<&Participant> {
        self.participants().get(self.own_slot())
    }
    /// The same, mutable.
    fn own_mut(&mut self) -> Option<&mut Participant> {
        let own = self.own_slot();
        self.participants_mut().get_mut(own)
    }
    /// Checks that others who open the cache store find the same storage.
    fn check_place(&mut self) -> Result<()> {
        Ok(())
    }
    /// Whether what it shows is the index of now: no participant has emptied it since the last step.
    fn is_current(&self) -> bool {
        true
    }
    /// Whether this participant rebuilds the index from the cache store.
    fn owns_rebuild(&self) -> bool {
        true
    }
    /// Whether the values that are there are no evidence of what the source holds: the index was damaged, and may have
    /// missed what a write had to remove. So the index begins empty, and they are deleted.
    fn begins_empty(&self) -> bool {
        false
    }
    /// Whether the index lists everything that is in the cache store.
    fn is_complete(&self) -> bool {
        true
    }
    /// The sample of all requests, where it is shared.
    fn sample(&mut self) -> Option<&mut Sample> {
        None
    }
    /// The same, after a look whether it can be believed and is what others find.
    fn checked_sample(&mut self) -> Option<&mut Sample> {
        None
    }
}

impl Peers for Heap {
    fn is_complete(&self) -> bool {
        Heap::is_complete(self)
    }
}
