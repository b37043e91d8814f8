//! The header file of a mapped index: what it says about the other files, and who writes what.

use std::mem::offset_of;

use bytemuck::{Pod, Zeroable};

use crate::arena::{Cell, Header, MAX_CELLS, SEGMENT};
use crate::cache::{Participant, SLOTS, Slot};

/// Participants (processes, or stores of one process) that may share a directory.
pub const PARTICIPANTS: usize = 256;

const MAGIC: u64 = u64::from_ne_bytes(*b"zcache\r\n");
/// Changes with every change of the layout; an index of another format is rebuilt.
const INDEX_FORMAT: u32 = 24;
/// Reads as another number where the byte order differs.
const BYTE_ORDER: u32 = 0x0102_0304;

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct FileHeader {
    magic: u64,
    /// The dirty mark: participant (plus one) that is in the middle of a step, or died there.
    pub(super) dirty: u32,
    /// CRC32C of what follows, up to the participants; valid whenever `dirty` is 0.
    pub(super) check: u32,
    format: u32,
    byte_order: u32,
    cell_size: u32,
    /// Participants that are writing to the source.
    writers: u32,
    /// Participant slots that were ever taken; those after them are empty.
    pub(super) participant_slots: u32,
    /// Counts the changes of the source that participants begin and end.
    pub(super) changes: u32,
    /// Participant (plus one) that rebuilds the index, or died while it did.
    pub(super) rebuild_owner: u32,
    /// Changes when any key may have been written.
    pub(super) epoch: u32,
    /// Changes whenever the index is emptied.
    pub(super) generation: u64,
    /// Elements in use: hash table slots, cells, entries of the hash table's directory, words of
    /// strings.
    pub(super) slots: u64,
    pub(super) cells: u64,
    pub(super) directory: u64,
    pub(super) strings: u64,
    /// Words of the history of the eviction policy.
    pub(super) history: u64,
    /// Modification time of the lock file. A process that cannot use the index but changes the source sets
    /// another one.
    pub(super) mark: [i64; 2],
    /// Identifies the boot of the machine.
    pub(super) boot: [u64; 5],
    pub(super) header: Header,
    pub(super) participants: [Participant; PARTICIPANTS],
}

/// What `FileHeader::check` covers.
pub(super) const CHECKED: std::ops::Range<usize> =
    offset_of!(FileHeader, format)..offset_of!(FileHeader, participants);

/// Bytes before the counters of changes.
pub(super) const HEADER_LEN: usize = 128 * 1024;
/// Where a number stands that shows that nothing before it was cut off.
pub(super) const END_AT: usize = HEADER_LEN + SLOTS * size_of::<u32>();
/// The number; no other that is written is the same.
pub(super) const END: u64 = MAGIC;
/// Bytes before the hash table's directory.
pub(super) const DIRECTORY_AT: usize = END_AT + size_of::<u64>();
const _: () = assert!(size_of::<FileHeader>() <= HEADER_LEN);

#[repr(C, align(8))]
struct Zeros([u8; size_of::<FileHeader>()]);
static ZEROS: Zeros = Zeros([0; size_of::<FileHeader>()]);

impl FileHeader {
    /// The header of a file that is not mapped; it is not valid.
    pub(super) fn missing() -> &'static FileHeader {
        bytemuck::from_bytes(&ZEROS.0)
    }

    /// Whether it is one of this format.
    pub(super) fn is_known(&self) -> bool {
        self.magic == MAGIC
            && self.format == INDEX_FORMAT
            && self.byte_order == BYTE_ORDER
            && self.cell_size == size_of::<Cell>() as u32
    }

    /// Whether it is that of another version of this program, which is no damage.
    pub(super) fn is_of_another_format(&self) -> bool {
        self.magic == MAGIC && self.format != INDEX_FORMAT
    }

    /// Whether the numbers can be those of an index of this format.
    pub(super) fn is_plausible(&self) -> bool {
        self.is_known()
            && self.cells <= MAX_CELLS as u64
            && u64::from(self.header.cells_used) <= self.cells
            && u64::from(self.header.segments).saturating_mul(SEGMENT as u64) <= self.slots
            && self.participant_slots as usize <= PARTICIPANTS
            && self.slots <= 1 << 32
            && self.directory <= 1 << 20
            && self.strings <= 1 << 32
            && self.history <= 1 << 32
            && u64::from(self.header.strings_used) <= self.strings
    }

    /// Becomes that of an empty index that this participant is working on and rebuilds.
    pub(super) fn begin_fresh(&mut self, own_slot: usize) {
        // In place: it is too large for the stack of a small thread.
        bytemuck::bytes_of_mut(self).fill(0);
        let generation = new_generation();
        self.magic = MAGIC;
        self.format = INDEX_FORMAT;
        self.byte_order = BYTE_ORDER;
        self.cell_size = size_of::<Cell>() as u32;
        self.dirty = own_slot as u32 + 1;
        self.rebuild_owner = own_slot as u32 + 1;
        self.epoch = generation as u32;
        self.generation = generation;
        self.boot = boot();
    }

    /// Participant slots that were ever taken.
    pub(super) fn participants(&self) -> &[Participant] {
        let len = self.participant_slots as usize;
        self.participants.get(..len).unwrap_or_default()
    }

    /// The same, mutable.
    pub(super) fn participants_mut(&mut self) -> &mut [Participant] {
        let len = self.participant_slots as usize;
        self.participants.get_mut(..len).unwrap_or_default()
    }

    /// See [`Peers::announce_write`].
    ///
    /// [`Peers::announce_write`]: crate::cache::Peers::announce_write
    pub(super) fn announce_write(&mut self, own_slot: usize, slot: Slot, begins: bool) {
        let Some(participant) = self.participants.get_mut(own_slot) else {
            return;
        };
        let before = participant.is_writing();
        let name = write_name(slot);
        // Take an empty place, or clear one with this name.
        let sought = if begins { 0 } else { name };
        let mut writes = participant.writes.iter_mut();
        match writes.find(|at| **at == sought) {
            Some(at) => *at = if begins { name } else { 0 },
            None if begins => participant.unnamed = participant.unnamed.saturating_add(1),
            None => participant.unnamed = participant.unnamed.saturating_sub(1),
        }
        match (before, participant.is_writing()) {
            (false, true) => self.writers = self.writers.saturating_add(1),
            (true, false) => self.writers = self.writers.saturating_sub(1),
            _ => {}
        }
    }

    /// Whether any participant is changing anything.
    pub(super) fn has_writers(&self) -> bool {
        self.writers != 0
    }

    /// Whether another participant is changing this; what its own writes are about, a process knows by its flights.
    pub(super) fn is_written(&self, own_slot: usize, slot: Slot) -> bool {
        let name = write_name(slot);
        let written = |(n, p): (usize, &Participant)| {
            n != own_slot && (p.unnamed != 0 || p.writes.contains(&name))
        };
        self.participants().iter().enumerate().any(written)
    }

    /// Puts a participant into a slot, in the place of the previous one.
    pub(super) fn add_participant(&mut self, n: usize, participant: Participant) {
        self.remove_participant(n);
        if let Some(slot) = self.participants.get_mut(n) {
            *slot = participant;
            self.participant_slots = self.participant_slots.max(n as u32 + 1);
            self.writers += u32::from(participant.is_writing());
        }
    }

    /// Takes a participant out of its slot.
    pub(super) fn remove_participant(&mut self, n: usize) -> Participant {
        let gone = self.participants.get_mut(n).map(std::mem::take);
        let gone = gone.unwrap_or_default();
        self.writers = self.writers.saturating_sub(u32::from(gone.is_writing()));
        gone
    }
}

pub(super) fn boot() -> [u64; 5] {
    let mut id = [0; 5];
    if let Ok(text) = std::fs::read("/proc/sys/kernel/random/boot_id") {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut id);
        for (to, from) in bytes.iter_mut().zip(text) {
            *to = from;
        }
    }
    id
}

/// A number that no earlier index of this directory has had.
pub(crate) fn new_generation() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = since.map_or(1, |passed| passed.as_nanos() as u64);
    (nanos ^ u64::from(std::process::id()) << 44).max(1)
}

/// What stands for a slot in `Participant::writes`.
fn write_name(slot: Slot) -> u16 {
    slot + 1
}
