//! The memory behind an arena: the heap, or files that several processes map.

use bytemuck::{Pod, Zeroable};

use super::cell::Cell;
use crate::error::{Error, Result};

/// Words of the longest string; each length has its own list of free strings.
pub const STRING_SIZES: usize = 64;

/// What an eviction policy keeps beside its lists.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PolicyState {
    /// The policy; the number of a `PolicyKind`.
    pub kind: u32,
    /// The rule that an adaptive policy goes by.
    pub rule: u16,
    /// Whether it lets go of the main list first, whatever its rule; 0 or 1.
    pub renews: u16,
    /// Bytes of the entries in the main list.
    pub main_bytes: u64,
    /// Reads and fills of entries.
    pub uses: u64,
    /// Of which so many when frequencies were last halved.
    pub aged_at: u64,
    /// Of which so many when an entry last came in.
    pub filled_at: u64,
    /// Times that frequencies were halved.
    pub halvings: u32,
    /// What is minimised; the number of a `Minimise`.
    pub minimise: u32,
    /// Bytes that take as long as a request alone, where that is measured.
    pub request_bytes: u64,
    /// Of the requests that were measured lately: the number, and the sums of bytes, of seconds, of the squares
    /// of the bytes, and of bytes times seconds; `f64` as bits.
    pub measured: [u64; 5],
    /// Bytes of the entries when room had last to be made for a new one, or 0.
    pub full_bytes: u64,
    /// New keys that came without reads of what is in the main list.
    pub new_keys: u64,
}

/// The numbers that belong to the whole index. Lists are (first, last); the first is the next one
/// to be taken.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Header {
    /// Bytes of a block of the cache store: a value takes whole ones. 0 and 1 are the same.
    pub unit: u64,
    /// Bytes of the folders of the cache store, by what was told of them: below 0 while of one that was made and removed
    /// only the removal was told. Never clamped, or that would be lost.
    pub folder_bytes: i64,
    /// Bytes that the cache store holds for zcache, or may hold: entries in every state.
    pub used_bytes: u64,
    /// Bytes of the `Live` entries.
    pub live_bytes: u64,
    /// Free bytes that reservations hold until they are granted.
    pub reserved_bytes: u64,
    /// What the eviction policy keeps.
    pub policy: PolicyState,
    /// Seed of all hashes.
    pub seed: u64,
    /// Entries in every state.
    pub entries: u64,
    /// `Live` entries.
    pub live_entries: u64,
    /// Absences.
    pub absences: u64,
    /// Absences that were ever made.
    pub absences_made: u64,
    /// Directories that were ever freed, where other processes may remember their cells.
    pub directories_freed: u64,
    /// First free cell, or 0.
    pub free: u32,
    /// Cells in the list of free ones.
    pub free_count: u32,
    /// Cells that were ever used; those after them are untouched.
    pub cells_used: u32,
    /// Bits of the hash that index the directory of the hash table.
    pub depth: u32,
    /// `Live` entries in the order of use: least recent, most recent.
    pub recency: [u32; 2],
    /// Those that the eviction policy protects.
    pub main: [u32; 2],
    /// Entries that could not be deleted: next to retry, last to retry.
    pub delete_failed: [u32; 2],
    /// Entries that are being written or deleted.
    pub in_progress: [u32; 2],
    /// Absences in the order of use: next to go, last to go.
    pub absence_order: [u32; 2],
    /// Segments of a pool: first, last.
    pub value_segments: [u32; 2],
    /// Segments of a pool that were ever made.
    pub value_segments_made: u32,
    /// Bytes that stand before each value in a segment of a pool; 0 where values have files of their own.
    pub value_header: u32,
    /// Segments of the hash table.
    pub segments: u32,
    /// Words of the string arena that were ever used, word 0 included; those after them are
    /// untouched.
    pub strings_used: u32,
    /// First free string of one word, of two words, and so on, or 0.
    pub free_strings: [u32; STRING_SIZES],
}

impl Default for Header {
    fn default() -> Self {
        Self::zeroed()
    }
}

impl Header {
    /// Bytes that a value of this size takes in the cache store at most.
    #[must_use]
    pub fn cost(&self, size: u64) -> u64 {
        if self.unit <= 1 {
            return size;
        }
        // One more for each MiB: what the file system notes of where the blocks are. And a name alone
        // takes room as well.
        let written = size.saturating_add(u64::from(self.value_header));
        let blocks = written.div_ceil(self.unit).max(1);
        let blocks = blocks.saturating_add(size >> 20);
        blocks.saturating_mul(self.unit)
    }

    /// Bytes that are in use.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.used_bytes.saturating_add(self.held_by_folders())
    }

    /// Those of folders.
    #[must_use]
    pub fn held_by_folders(&self) -> u64 {
        u64::try_from(self.folder_bytes).unwrap_or(0)
    }
}

/// Memory for cells, hash table and strings.
///
/// `grow_*` takes the new length in elements, never less than the present one; new elements are
/// zero. Growth that fails leaves everything unchanged.
pub trait Storage {
    /// Whether this process alone can change the memory.
    const EXCLUSIVE: bool = false;

    /// The header.
    fn header(&self) -> &Header;
    /// The header, mutable.
    fn header_mut(&mut self) -> &mut Header;
    /// All cells.
    fn cells(&self) -> &[Cell];
    /// All cells, mutable.
    fn cells_mut(&mut self) -> &mut [Cell];
    /// All slots of the hash table.
    fn slots(&self) -> &[u32];
    /// All slots of the hash table, mutable.
    fn slots_mut(&mut self) -> &mut [u32];
    /// The hash table's directory of segments.
    fn directory(&self) -> &[u32];
    /// The hash table's directory of segments, mutable.
    fn directory_mut(&mut self) -> &mut [u32];
    /// All words of the string arena.
    fn strings(&self) -> &[u32];
    /// All words of the string arena, mutable.
    fn strings_mut(&mut self) -> &mut [u32];
    /// Whether cells have places, in segments of a pool.
    fn has_places(&self) -> bool {
        false
    }
    /// Whether the entries are of many sources: each folder at the root is one.
    fn has_sources(&self) -> bool {
        self.has_places()
    }
    /// All places, one for each cell.
    fn places(&self) -> &[u64] {
        &[]
    }
    /// All places, mutable.
    fn places_mut(&mut self) -> &mut [u64] {
        &mut []
    }
    /// Grows the cells, and their places.
    fn grow_cells(&mut self, len: usize) -> Result<()>;
    /// Grows the slots.
    fn grow_slots(&mut self, len: usize) -> Result<()>;
    /// Grows the directory.
    fn grow_directory(&mut self, len: usize) -> Result<()>;
    /// Grows the string arena.
    fn grow_strings(&mut self, len: usize) -> Result<()>;
    /// What the eviction policy remembers of keys, whether they have entries or not.
    fn history(&self) -> &[u64] {
        &[]
    }
    /// The same, mutable.
    fn history_mut(&mut self) -> &mut [u64] {
        &mut []
    }
    /// Grows the history; without one a policy remembers less.
    fn grow_history(&mut self, _len: usize) -> Result<()> {
        Err(Error::Full)
    }
}

/// Memory of one process.
#[derive(Debug, Default)]
pub struct Heap {
    rebuilding: bool,
    has_places: bool,
    has_sources: bool,
    places: Vec<u64>,
    header: Header,
    cells: Vec<Cell>,
    slots: Vec<u32>,
    directory: Vec<u32>,
    strings: Vec<u32>,
    history: Vec<u64>,
}

impl Heap {
    /// Memory of an index that rejects values until [`Heap::complete`], because it does not list yet
    /// what is in the cache store.
    #[must_use]
    pub fn rebuilding() -> Self {
        Heap {
            rebuilding: true,
            ..Heap::default()
        }
    }

    /// The same, for entries with places in segments of a pool.
    #[must_use]
    pub fn with_places(self) -> Self {
        Heap {
            has_places: true,
            ..self
        }
    }

    /// The same, for entries of many sources: each folder at the root is one.
    #[must_use]
    pub fn with_sources(self) -> Self {
        Heap {
            has_sources: true,
            ..self
        }
    }

    /// Everything that is in the cache store was adopted.
    pub fn complete(&mut self) {
        self.rebuilding = false;
    }

    /// Whether the index is complete.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        !self.rebuilding
    }
}

fn grow<T: Pod>(vec: &mut Vec<T>, len: usize) -> Result<()> {
    // A large allocation grows by remapping its pages, and pages that were never touched are not
    // resident, so plain doubling causes neither a pause nor memory in use.
    let more = len.saturating_sub(vec.len());
    vec.try_reserve(more).map_err(|_| Error::Full)?;
    vec.resize(len, T::zeroed());
    Ok(())
}

impl Storage for Heap {
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
    fn strings(&self) -> &[u32] {
        &self.strings
    }
    fn strings_mut(&mut self) -> &mut [u32] {
        &mut self.strings
    }
    fn has_places(&self) -> bool {
        self.has_places
    }
    fn has_sources(&self) -> bool {
        self.has_sources
    }
    fn places(&self) -> &[u64] {
        &self.places
    }
    fn places_mut(&mut self) -> &mut [u64] {
        &mut self.places
    }
    fn grow_cells(&mut self, len: usize) -> Result<()> {
        if self.has_places {
            grow(&mut self.places, len)?;
        }
        grow(&mut self.cells, len)
    }
    fn grow_slots(&mut self, len: usize) -> Result<()> {
        grow(&mut self.slots, len)
    }
    fn grow_directory(&mut self, len: usize) -> Result<()> {
        grow(&mut self.directory, len)
    }
    fn grow_strings(&mut self, len: usize) -> Result<()> {
        grow(&mut self.strings, len)
    }
    fn history(&self) -> &[u64] {
        &self.history
    }
    fn history_mut(&mut self) -> &mut [u64] {
        &mut self.history
    }
    fn grow_history(&mut self, len: usize) -> Result<()> {
        grow(&mut self.history, len)
    }
}
