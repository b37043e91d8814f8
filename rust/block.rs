//! The block of memory behind an index: the heap, or files that several processes map.

use bytemuck::{Pod, Zeroable};

use crate::cell::Cell;
use crate::error::{Fault, Res};

/// Words of the largest block of text; there is a list of free ones for each size up to it.
pub const TEXT_SIZES: usize = 32;

/// The numbers that belong to the whole index. Lists are (first, last): the first is the next to
/// go.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Header {
    /// Bytes that the cache store holds for zcache, or may hold: entries in every state.
    pub physical: u64,
    /// Bytes of the entries that are `Present`.
    pub present: u64,
    /// Free bytes that reservations hold until they are granted.
    pub promised: u64,
    /// Seed of all hashes.
    pub seed: u64,
    /// Entries in every state.
    pub entries: u64,
    /// Entries that are `Present`.
    pub present_entries: u64,
    /// First of the free cells, or 0.
    pub free: u32,
    /// Free cells in that list.
    pub free_count: u32,
    /// Cells that were ever used; those from here on are untouched.
    pub used: u32,
    /// Bits of the hash that the table's directory uses.
    pub depth: u32,
    /// Entries by recency: least recent, most recent.
    pub recency: [u32; 2],
    /// Entries by fetch time: earliest, latest.
    pub time: [u32; 2],
    /// Entries whose bytes could not be deleted: next to try, last to try.
    pub orphans: [u32; 2],
    /// Entries that somebody has in hand: `Writing` and `Dropping`.
    pub busy: [u32; 2],
    /// Segments of the table.
    pub segments: u32,
    /// Words of texts that were ever used, word 0 among them; those from here on are untouched.
    pub texts_used: u32,
    /// First of the free blocks of text of one word, of two words, and so on, or 0.
    pub free_texts: [u32; TEXT_SIZES],
}

impl Header {
    /// The header of nothing.
    pub const EMPTY: Header = Header {
        physical: 0,
        present: 0,
        promised: 0,
        seed: 0,
        entries: 0,
        present_entries: 0,
        free: 0,
        free_count: 0,
        used: 0,
        depth: 0,
        recency: [0; 2],
        time: [0; 2],
        orphans: [0; 2],
        busy: [0; 2],
        segments: 0,
        texts_used: 0,
        free_texts: [0; TEXT_SIZES],
    };
}

/// Keys that one participant can name as being written; where it writes more at once, no key may be
/// filled meanwhile.
pub const WRITES: usize = 32;

/// One of those who share an index: a process, or a store of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Participant {
    /// Its part of `Header::promised`.
    pub promised: u64,
    /// Its bound, in bytes.
    pub bound: u64,
    /// Whether this place is taken; its owner may have died since.
    pub live: u32,
    /// Writes under way for which there is no place in `writes`.
    pub unnamed: u32,
    /// Versions (plus one) of the keys and directories that it is changing; 0 where there is none.
    /// What was read before a write has ended is not kept, and of a writer that has died nobody
    /// hears the end.
    pub writes: [u16; WRITES],
}

impl Participant {
    /// A place that nobody has taken.
    pub const NONE: Participant = Participant {
        promised: 0,
        bound: 0,
        live: 0,
        unnamed: 0,
        writes: [0; WRITES],
    };

    /// Whether it is writing anything.
    #[must_use]
    pub fn is_writing(&self) -> bool {
        self.unnamed != 0 || self.writes != [0; WRITES]
    }
}

/// The memory behind an index: the heap, or files that several processes map.
///
/// `grow_*` takes the new length in elements, never less than the present one; new elements are
/// zero. Growth that fails leaves everything as it was.
pub trait Block {
    /// Whether nobody else can change the block, nor damage it.
    const EXCLUSIVE: bool = false;

    /// The header.
    fn header(&self) -> &Header;
    /// The header, to change it.
    fn header_mut(&mut self) -> &mut Header;
    /// All cells.
    fn cells(&self) -> &[Cell];
    /// All cells, to change them.
    fn cells_mut(&mut self) -> &mut [Cell];
    /// All slots of the table.
    fn slots(&self) -> &[u32];
    /// All slots of the table, to change them.
    fn slots_mut(&mut self) -> &mut [u32];
    /// The table's directory of segments.
    fn directory(&self) -> &[u32];
    /// The table's directory of segments, to change it.
    fn directory_mut(&mut self) -> &mut [u32];
    /// All words of texts.
    fn texts(&self) -> &[u32];
    /// All words of texts, to change them.
    fn texts_mut(&mut self) -> &mut [u32];
    /// Makes room for cells.
    fn grow_cells(&mut self, len: usize) -> Res<()>;
    /// Makes room for slots.
    fn grow_slots(&mut self, len: usize) -> Res<()>;
    /// Makes room in the directory.
    fn grow_directory(&mut self, len: usize) -> Res<()>;
    /// Makes room for words of texts.
    fn grow_texts(&mut self, len: usize) -> Res<()>;

    /// What changes when another participant changes this name (given by its hash) or everything.
    fn version(&self, _key: u64) -> Version {
        [0; 2]
    }
    /// The version of all keys when the index was emptied.
    fn first_version(&self) -> Version {
        [0; 2]
    }
    /// A key of this name, or what lies below it, is being changed, or was.
    fn change_key(&mut self, _key: u64) {}
    /// Any key may have been written.
    fn change_all(&mut self) {}
    /// A change of a key of this name, or of what lies below it, begins or ends.
    fn mark_write(&mut self, _key: u64, _begins: bool) {}
    /// Whether somebody is changing anything.
    fn has_writers(&self) -> bool {
        false
    }
    /// Whether somebody is changing what has this name.
    fn is_written(&self, _key: u64) -> bool {
        false
    }
    /// Takes a participant out of the list.
    fn bury(&mut self, _n: usize) -> Participant {
        Participant::NONE
    }
    /// Those who share the index; none where it is not shared.
    fn participants(&self) -> &[Participant] {
        &[]
    }
    /// Those who share the index, to change them.
    fn participants_mut(&mut self) -> &mut [Participant] {
        &mut []
    }
    /// The place of this participant.
    fn me(&self) -> usize {
        0
    }
    /// Whether it is for this participant to enter what is in the cache store.
    fn is_filled_here(&self) -> bool {
        true
    }
    /// Whether the index knows all that is in the cache store.
    fn is_complete(&self) -> bool {
        true
    }
}

/// Compares equal as long as no other participant has written a key.
pub type Version = [u32; 2];

/// A block on the heap.
#[derive(Debug, Default)]
pub struct Heap {
    header: Header,
    cells: Vec<Cell>,
    slots: Vec<u32>,
    directory: Vec<u32>,
    texts: Vec<u32>,
}

fn grow_vec<T: Pod>(vec: &mut Vec<T>, len: usize) -> Res<()> {
    // A large block moves by remapping its pages, not by copying them, and pages that were never
    // touched cost nothing, so plain doubling causes neither a pause nor resident memory.
    let more = len.saturating_sub(vec.len());
    vec.try_reserve(more).map_err(|_| Fault::Full)?;
    vec.resize(len, T::zeroed());
    Ok(())
}

impl Block for Heap {
    const EXCLUSIVE: bool = true;

    fn header(&self) -> &Header {
        &self.header
    }
    fn header_mut(&mut self) -> &mut Header {
        &mut self.header
    }
    fn cells(&self) -> &[Cell] {
        &self.cells
    }
    fn cells_mut(&mut self) -> &mut [Cell] {
        &mut self.cells
    }
    fn slots(&self) -> &[u32] {
        &self.slots
    }
    fn slots_mut(&mut self) -> &mut [u32] {
        &mut self.slots
    }
    fn directory(&self) -> &[u32] {
        &self.directory
    }
    fn directory_mut(&mut self) -> &mut [u32] {
        &mut self.directory
    }
    fn texts(&self) -> &[u32] {
        &self.texts
    }
    fn texts_mut(&mut self) -> &mut [u32] {
        &mut self.texts
    }
    fn grow_cells(&mut self, len: usize) -> Res<()> {
        grow_vec(&mut self.cells, len)
    }
    fn grow_slots(&mut self, len: usize) -> Res<()> {
        grow_vec(&mut self.slots, len)
    }
    fn grow_directory(&mut self, len: usize) -> Res<()> {
        grow_vec(&mut self.directory, len)
    }
    fn grow_texts(&mut self, len: usize) -> Res<()> {
        grow_vec(&mut self.texts, len)
    }
}
