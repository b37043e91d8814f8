//! The head of a mapped index: what it says about the files, and who writes what.

use std::mem::offset_of;

use bytemuck::{Pod, Zeroable};

use crate::block::{Header, Participant};
use crate::cell::Cell;
use crate::cells::MAX_CELLS;
use crate::table::SEGMENT;

/// Participants (processes, or stores of one process) that may share a directory.
pub const PARTICIPANTS: usize = 256;
/// Versions of keys; two keys share one by chance.
pub(super) const VERSIONS: usize = 16 * 1024;

const MAGIC: u64 = u64::from_ne_bytes(*b"zcache\r\n");
const FORMAT: u32 = 5;
/// Reads as another number where the byte order differs.
const BYTE_ORDER: u32 = 0x0102_0304;

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Head {
    magic: u64,
    /// Participant (plus one) that works on the index now, or died while it did.
    pub(super) dirty: u32,
    /// CRC32C of what follows, up to the participants; right whenever `dirty` is 0.
    pub(super) check: u32,
    format: u32,
    byte_order: u32,
    cell_size: u32,
    /// Participants that are writing to the source.
    writers: u32,
    /// Places from this one on were never taken.
    pub(super) places: u32,
    /// Keeps what follows a multiple of 8 bytes.
    reserved: u32,
    /// Participant (plus one) that rebuilds the index, or died while it did.
    pub(super) rebuilding: u32,
    /// Changes with every prefix that is written or deleted.
    pub(super) epoch: u32,
    /// Changes whenever the index is emptied.
    pub(super) generation: u64,
    /// Elements in use: slots of the table, cells, entries of the table's directory, words of texts.
    pub(super) slots: u64,
    pub(super) cells: u64,
    pub(super) directory: u64,
    pub(super) texts: u64,
    /// Tells one boot of the machine from the next.
    pub(super) boot: [u64; 5],
    pub(super) header: Header,
    pub(super) participants: [Participant; PARTICIPANTS],
}

/// What `Head::check` is about.
pub(super) const CHECKED: std::ops::Range<usize> =
    offset_of!(Head, format)..offset_of!(Head, participants);

pub(super) const HEAD: usize = 24 * 1024;
pub(super) const DIRECTORY: usize = HEAD + VERSIONS * size_of::<u32>();
const _: () = assert!(size_of::<Head>() <= HEAD);

/// What stands for the head of a file that is not mapped: it looks wrong.
pub(super) static NO_HEAD: Head = Head {
    magic: 0,
    dirty: 0,
    check: 0,
    format: 0,
    byte_order: 0,
    cell_size: 0,
    writers: 0,
    places: 0,
    reserved: 0,
    rebuilding: 0,
    epoch: 0,
    generation: 0,
    slots: 0,
    cells: 0,
    directory: 0,
    texts: 0,
    boot: [0; 5],
    header: Header::EMPTY,
    participants: [Participant::NONE; PARTICIPANTS],
};

impl Head {
    /// Whether the numbers can be those of an index of this format.
    pub(super) fn looks_right(&self) -> bool {
        self.magic == MAGIC
            && self.format == FORMAT
            && self.byte_order == BYTE_ORDER
            && self.cell_size == size_of::<Cell>() as u32
            && self.cells <= MAX_CELLS as u64
            && u64::from(self.header.used) <= self.cells
            && u64::from(self.header.segments).saturating_mul(SEGMENT as u64) <= self.slots
            && self.places as usize <= PARTICIPANTS
            && self.slots <= 1 << 32
            && self.directory <= 1 << 20
            && self.texts <= 1 << 32
            && u64::from(self.header.texts_used) <= self.texts
    }

    /// The head of an index that is empty and that participant `me` works on and fills.
    pub(super) fn fresh(me: usize) -> Head {
        let generation = fresh_number();
        Head {
            magic: MAGIC,
            format: FORMAT,
            byte_order: BYTE_ORDER,
            cell_size: size_of::<Cell>() as u32,
            dirty: me as u32 + 1,
            rebuilding: me as u32 + 1,
            epoch: generation as u32,
            generation,
            boot: boot(),
            ..Head::zeroed()
        }
    }

    /// Places of participants that were ever taken.
    pub(super) fn taken(&self) -> &[Participant] {
        let places = self.places as usize;
        self.participants.get(..places).unwrap_or_default()
    }

    /// See [`Block::mark_write`]; `me` is the one who writes.
    ///
    /// [`Block::mark_write`]: crate::block::Block::mark_write
    pub(super) fn mark_write(&mut self, me: usize, key: u64, begins: bool) {
        let Some(participant) = self.participants.get_mut(me) else {
            return;
        };
        let before = participant.is_writing();
        let name = write_name(key);
        // A free place, or one with this name.
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

    /// Whether somebody is changing anything.
    pub(super) fn has_writers(&self) -> bool {
        self.writers != 0
    }

    /// Whether somebody is changing what has this name, as far as participant `me` cannot tell by its
    /// flights.
    pub(super) fn is_written(&self, me: usize, key: u64) -> bool {
        let name = write_name(key);
        // Of its own writes a process knows by its flights which keys they are about.
        let written =
            |(n, p): (usize, &Participant)| p.writes.contains(&name) || p.unnamed != 0 && n != me;
        self.taken().iter().enumerate().any(written)
    }

    /// Writes a participant into the list, in the place of what it was before.
    pub(super) fn enter(&mut self, n: usize, participant: Participant) {
        self.bury(n);
        if let Some(place) = self.participants.get_mut(n) {
            *place = participant;
            self.places = self.places.max(n as u32 + 1);
            self.writers += u32::from(participant.is_writing());
        }
    }

    /// Takes a participant out of the list.
    pub(super) fn bury(&mut self, n: usize) -> Participant {
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
fn fresh_number() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = since.map_or(1, |passed| passed.as_nanos() as u64);
    (nanos ^ u64::from(std::process::id()) << 44).max(1)
}

/// What stands for a key in `Participant::writes`.
fn write_name(key: u64) -> u16 {
    (key as usize % VERSIONS) as u16 + 1
}
