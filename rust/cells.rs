//! Cells: the one array that holds everything, and the block of memory behind it.
//!
//! Every cell is 56 bytes and is addressed by a `u32`. There are no pointers and no allocation for
//! a key, so the same code runs on heap memory and on a mapped file. Cell 0 is never used, so 0
//! means "none" everywhere.

use bytemuck::{Pod, Zeroable};

use crate::error::{Fault, Res};
use crate::memo::Memo;

/// Cell numbers are kept in 28 bits of a table slot; the other 4 are a tag of the hash.
pub const MAX_CELLS: usize = 1 << 28;

/// The directory above all others. It is never freed.
pub const ROOT: u32 = 1;

/// Cells by which a block grows at least: 56 KiB.
const GROWTH: usize = 1024;

/// What a cell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Unused; linked into the list of free cells.
    Free = 0,
    /// Text that did not fit into the cell that it belongs to.
    Text = 1,
    /// A directory of keys.
    Dir = 2,
    /// A key of which ranges are held; they are its children.
    Object = 3,
    /// Entry: a whole value.
    Value = 4,
    /// Entry: a `RangeByteRequest`.
    Range = 5,
    /// Entry: an `OffsetByteRequest`.
    Offset = 6,
    /// Entry: a `SuffixByteRequest`.
    Suffix = 7,
}

/// Where an entry stands between "room was made" and "its bytes are gone".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its bytes are in the cache store and may be served.
    Present = 0,
    /// Room is granted, its bytes are being written. Counted, never served.
    Writing = 1,
    /// It is no longer valid and somebody is deleting its bytes. Counted, never served.
    Dropping = 2,
    /// It is no longer valid and its bytes could not be deleted. Counted, never served, and first
    /// in line when room is needed.
    Orphan = 3,
}

/// One cell. The links of an entry that is not `Present` are unused unless noted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Cell {
    /// Recency list (or list of orphans), towards the least recent. Dir, Object: first child.
    /// Free: next free cell. Text: next cell of the same text.
    pub older: u32,
    /// Recency list (or list of orphans), towards the most recent. Dir, Object: count of children.
    pub newer: u32,
    /// List by fetch time, towards the earliest. Entry in hand: the participant (plus one) that has
    /// it. Object: the child that holds most bytes, or 0.
    pub earlier: u32,
    /// List by fetch time, towards the latest. Object: the child that came last, or 0.
    pub later: u32,
    /// Previous child of the same parent.
    pub left: u32,
    /// Next child of the same parent.
    pub right: u32,
    /// Dir or Object that this cell is a child of; 0 for the root and for cells without a name.
    pub parent: u32,
    /// CRC32C of the value; see [`Cell::checksum`].
    checksum: u32,
    /// Entry: bytes of the value. Dir, Object: hash of the path from the root.
    pub size: u64,
    /// Name below the parent; see `Names`.
    pub text: [u8; 8],
    time: [u8; 6],
    /// Bytes of `text` in use, or [`LONG`].
    pub text_len: u8,
    /// Kind in bits 0 to 3, state in bits 4 and 5, packed in bit 6, checksum unknown in bit 7.
    bits: u8,
}

/// `text_len` of a text that continues in other cells: `text` is then the number of the first one
/// and the length, both `u32`.
pub const LONG: u8 = 255;

const PACKED: u8 = 1 << 6;
const UNCHECKED: u8 = 1 << 7;

impl Cell {
    /// An unlinked cell of this kind.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Cell {
            bits: kind as u8,
            ..Cell::zeroed()
        }
    }

    /// What the cell is; an error where the bits name nothing.
    pub fn kind(&self) -> Res<Kind> {
        Ok(match self.bits & 15 {
            0 => Kind::Free,
            1 => Kind::Text,
            2 => Kind::Dir,
            3 => Kind::Object,
            4 => Kind::Value,
            5 => Kind::Range,
            6 => Kind::Offset,
            7 => Kind::Suffix,
            _ => return Err(Fault::Corrupt("a cell of no kind")),
        })
    }

    /// Whether the cell stands for bytes in the cache store.
    #[must_use]
    pub fn is_entry(&self) -> bool {
        (Kind::Value as u8..=Kind::Suffix as u8).contains(&(self.bits & 15))
    }

    /// State of an entry.
    #[must_use]
    pub fn state(&self) -> State {
        match self.bits >> 4 & 3 {
            0 => State::Present,
            1 => State::Writing,
            2 => State::Dropping,
            _ => State::Orphan,
        }
    }

    /// Changes the state of an entry.
    pub fn set_state(&mut self, state: State) {
        self.bits = self.bits & !(3 << 4) | (state as u8) << 4;
    }

    /// Whether the text is packed.
    #[must_use]
    pub fn packed(&self) -> bool {
        self.bits & PACKED != 0
    }

    /// Says whether the text is packed.
    pub fn set_packed(&mut self, packed: bool) {
        self.bits = if packed {
            self.bits | PACKED
        } else {
            self.bits & !PACKED
        };
    }

    /// The checksum, where it is known.
    #[must_use]
    pub fn checksum(&self) -> Option<u32> {
        (self.bits & UNCHECKED == 0).then_some(self.checksum)
    }

    /// Sets the checksum.
    pub fn set_checksum(&mut self, checksum: Option<u32>) {
        self.checksum = checksum.unwrap_or(0);
        self.bits = match checksum {
            Some(_) => self.bits & !UNCHECKED,
            None => self.bits | UNCHECKED,
        };
    }

    /// Fetch time in milliseconds; 0 is "cannot be dated".
    #[must_use]
    pub fn time(&self) -> u64 {
        let [a, b, c, d, e, f] = self.time;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// Sets the fetch time; what does not fit into 48 bits (the year 10889) cannot be dated.
    pub fn set_time(&mut self, millis: u64) {
        let [a, b, c, d, e, f, high @ ..] = millis.to_le_bytes();
        self.time = if high == [0, 0] {
            [a, b, c, d, e, f]
        } else {
            [0; 6]
        };
    }
}

/// Text bytes in a cell of kind `Text`: everything between the link and the bits.
pub const TEXT_PER_CELL: usize = std::mem::size_of::<Cell>() - 5;

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
    /// Keeps the header a multiple of 8 bytes.
    pub reserved: u32,
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
        reserved: 0,
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
    /// Writes under way that `writes` does not name, those of prefixes among them.
    pub unnamed: u32,
    /// Versions (plus one) of the keys that it is writing; 0 where there is none. What was read
    /// before a write has ended is not kept, and of a writer that has died nobody hears the end.
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
    /// Makes room for cells.
    fn grow_cells(&mut self, len: usize) -> Res<()>;
    /// Makes room for slots.
    fn grow_slots(&mut self, len: usize) -> Res<()>;
    /// Makes room in the directory.
    fn grow_directory(&mut self, len: usize) -> Res<()>;

    /// What changes when another participant writes this key (given by its hash) or a prefix.
    fn version(&self, _key: u64) -> Version {
        [0; 2]
    }
    /// The version of all keys when the index was emptied.
    fn first_version(&self) -> Version {
        [0; 2]
    }
    /// This key is being written, or was.
    fn change_key(&mut self, _key: u64) {}
    /// Any key may have been written.
    fn change_all(&mut self) {}
    /// A write of this key, or of what nobody can name, begins or ends.
    fn mark_write(&mut self, _key: Option<u64>, _begins: bool) {}
    /// Whether somebody is writing this key.
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
    fn grow_cells(&mut self, len: usize) -> Res<()> {
        grow_vec(&mut self.cells, len)
    }
    fn grow_slots(&mut self, len: usize) -> Res<()> {
        grow_vec(&mut self.slots, len)
    }
    fn grow_directory(&mut self, len: usize) -> Res<()> {
        grow_vec(&mut self.directory, len)
    }
}

/// Cells with checked access, allocation and lists. Every number read from a cell is checked
/// before it is used as an index, for a mapped file is not to be trusted.
#[derive(Debug)]
pub struct Cells<B> {
    /// The memory.
    pub block: B,
    /// Directories found last. Where others may change the block, only their hashes are of use.
    pub(crate) memo: Memo,
}

/// One of the intrusive lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// `Present` entries, least recently used first.
    Recency,
    /// `Present` entries, earliest fetch first.
    Time,
    /// `Orphan` entries, next to try first.
    Orphans,
    /// `Writing` and `Dropping` entries.
    Busy,
}

impl<B: Block> Cells<B> {
    /// Cell `i`.
    #[inline]
    pub fn get(&self, i: u32) -> Res<&Cell> {
        self.block
            .cells()
            .get(i as usize)
            .ok_or(Fault::Corrupt("a cell number out of range"))
    }

    /// Cell `i`, to change it.
    #[inline]
    pub fn get_mut(&mut self, i: u32) -> Res<&mut Cell> {
        let cell = self.block.cells_mut().get_mut(i as usize);
        cell.ok_or(Fault::Corrupt("a cell number out of range"))
    }

    /// The header.
    #[inline]
    pub fn header(&self) -> &Header {
        self.block.header()
    }

    /// The header, to change it.
    #[inline]
    pub fn header_mut(&mut self) -> &mut Header {
        self.block.header_mut()
    }

    /// Makes sure that the next `count` allocations succeed.
    pub fn ensure(&mut self, count: usize) -> Res<()> {
        let header = self.header();
        let have = header.free_count as usize
            + self
                .block
                .cells()
                .len()
                .saturating_sub(header.used as usize);
        let Some(missing) = count.checked_sub(have).filter(|n| *n > 0) else {
            return Ok(());
        };
        let len = self.block.cells().len();
        let wanted = len.saturating_add(missing.max(GROWTH)).min(MAX_CELLS);
        if wanted.saturating_sub(len) < missing {
            return Err(Fault::Full);
        }
        self.block.grow_cells(wanted)
    }

    /// Takes a free cell; `ensure` must have made room.
    pub fn alloc(&mut self, cell: Cell) -> Res<u32> {
        let header = *self.header();
        let i = if header.free != 0 {
            let free = *self.get(header.free)?;
            if free.kind()? != Kind::Free || header.free_count == 0 {
                return Err(Fault::Corrupt("a cell in use among the free ones"));
            }
            let header = self.header_mut();
            header.free_count = header.free_count.saturating_sub(1);
            std::mem::replace(&mut header.free, free.older)
        } else {
            let i = header.used;
            self.get(i)?;
            self.header_mut().used = i.saturating_add(1);
            i
        };
        *self.get_mut(i)? = cell;
        Ok(i)
    }

    /// Gives a cell back.
    pub fn free(&mut self, i: u32) -> Res<()> {
        let next = self.header().free;
        *self.get_mut(i)? = Cell {
            older: next,
            ..Cell::new(Kind::Free)
        };
        let header = self.header_mut();
        header.free = i;
        header.free_count = header.free_count.checked_add(1).ok_or(COUNT)?;
        Ok(())
    }

    fn ends(&mut self, list: List) -> &mut [u32; 2] {
        let header = self.block.header_mut();
        match list {
            List::Recency => &mut header.recency,
            List::Time => &mut header.time,
            List::Orphans => &mut header.orphans,
            List::Busy => &mut header.busy,
        }
    }

    /// First and last cell of a list, or zeros.
    #[must_use]
    pub fn list(&self, list: List) -> [u32; 2] {
        match list {
            List::Recency => self.header().recency,
            List::Time => self.header().time,
            List::Orphans => self.header().orphans,
            List::Busy => self.header().busy,
        }
    }

    /// First or last cell of a list; an error where it is none of those that belong there, for
    /// whoever takes one away after the other relies on its being another one each time.
    pub fn end(&self, list: List, at_last: bool) -> Res<Option<u32>> {
        let [first, last] = self.list(list);
        let i = if at_last { last } else { first };
        if i == 0 {
            return Ok(None);
        }
        let cell = self.get(i)?;
        let state = cell.state();
        let belongs = match list {
            List::Recency | List::Time => state == State::Present,
            List::Orphans => state == State::Orphan,
            List::Busy => matches!(state, State::Writing | State::Dropping),
        };
        if cell.is_entry() && belongs {
            Ok(Some(i))
        } else {
            Err(Fault::Corrupt("a list with a stranger"))
        }
    }

    /// The neighbour of `i` towards the first (`false`) or the last (`true`) cell.
    pub fn neighbour(&self, list: List, i: u32, towards_last: bool) -> Res<u32> {
        let cell = self.get(i)?;
        Ok(match (list, towards_last) {
            (List::Time, false) => cell.earlier,
            (List::Time, true) => cell.later,
            (_, false) => cell.older,
            (_, true) => cell.newer,
        })
    }

    fn set_neighbour(&mut self, list: List, i: u32, towards_last: bool, to: u32) -> Res<()> {
        let cell = self.get_mut(i)?;
        match (list, towards_last) {
            (List::Time, false) => cell.earlier = to,
            (List::Time, true) => cell.later = to,
            (_, false) => cell.older = to,
            (_, true) => cell.newer = to,
        }
        Ok(())
    }

    /// Links a cell that is in no list of this sort at one end of `list`.
    pub fn link(&mut self, list: List, i: u32, at_last: bool) -> Res<()> {
        let end = usize::from(at_last);
        let beside = std::mem::replace(self.ends(list).get_mut(end).ok_or(ENDS)?, i);
        self.set_neighbour(list, i, at_last, 0)?;
        self.set_neighbour(list, i, !at_last, beside)?;
        if beside == 0 {
            *self.ends(list).get_mut(1 - end).ok_or(ENDS)? = i;
            Ok(())
        } else {
            self.set_neighbour(list, beside, at_last, i)
        }
    }

    /// Takes a cell out of `list`.
    pub fn unlink(&mut self, list: List, i: u32) -> Res<()> {
        let before = self.neighbour(list, i, false)?;
        let after = self.neighbour(list, i, true)?;
        if before == 0 {
            self.ends(list)[0] = after;
        } else {
            self.set_neighbour(list, before, true, after)?;
        }
        if after == 0 {
            self.ends(list)[1] = before;
        } else {
            self.set_neighbour(list, after, false, before)?;
        }
        Ok(())
    }
}

const ENDS: Fault = Fault::Corrupt("a list has two ends");

/// A count that has run over; only a damaged index gets there.
pub(crate) const COUNT: Fault = Fault::Corrupt("a count beyond all bounds");
