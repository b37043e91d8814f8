//! A cell: the one kind of record that the index is made of.
//!
//! Every cell is 56 bytes and is addressed by a `u32`. There are no pointers and no allocation per
//! key, so the same code runs on heap memory and on a mapped file. Cell 0 is never used, so 0
//! means "none" everywhere.

use bytemuck::{Pod, Zeroable};

use super::racing::{load_u8, load_u64};
use crate::error::{Error, Result};
use crate::key::packing::{INLINE, Packing};

/// What a cell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Unused; linked into the list of free cells.
    Free = 0,
    /// A directory of keys.
    Dir = 1,
    /// A key with cached ranges; they are its children.
    Object = 2,
    /// Entry: a whole value.
    Value = 3,
    /// Entry: a `RangeByteRequest`.
    Range = 4,
    /// Entry: an `OffsetByteRequest`.
    Offset = 5,
    /// Entry: a `SuffixByteRequest`.
    Suffix = 6,
    /// An absence: the source has no such key. It stands for no bytes, so it is no entry.
    Absent = 7,
    /// A validator of an entry, which is its parent; see `validator.rs`.
    Validator = 8,
    /// A segment of a pool: a file with the bytes of many entries; see `places.rs`.
    Segment = 9,
}

/// Where an entry stands between its reservation and the deletion of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its bytes are in the cache store and may be served.
    Live = 0,
    /// Its reservation is granted and its bytes are being written. Counted, never served.
    Filling = 1,
    /// It is no longer valid and its bytes are being deleted. Counted, never served.
    Deleting = 2,
    /// It is no longer valid and deleting its bytes has failed. Counted, never served, and the
    /// first to go when bytes are needed.
    DeleteFailed = 3,
}

/// One cell. The links of an entry that is not `Live` are unused unless noted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Cell {
    /// Recency or main list (or list of failed deletes, or of absences), towards the least recent; above it
    /// half of a note of the eviction policy. Dir, Object: first child that is no absence. Free: next free
    /// cell.
    pub older: u32,
    /// The same list, towards the most recent, and the other half of the note. Dir, Object: number of those
    /// children.
    pub newer: u32,
    /// Ring by fetch time, towards the earliest. Entry in progress: the participant (plus one) that
    /// writes or deletes it. Object: the child with most bytes, or 0. Dir: first absence in it.
    pub earlier: u32,
    /// Ring by fetch time, towards the latest. Object: the newest child, or 0. Dir: number of
    /// absences in it. Absent: the epoch in which it was learned.
    pub later: u32,
    /// Previous child (or absence) of the same parent.
    pub left: u32,
    /// Next child (or absence) of the same parent.
    pub right: u32,
    /// The Dir or Object that this cell is a child of; 0 for the root and for free cells.
    pub parent: u32,
    /// CRC32C of the value; see [`Cell::checksum`]. Dir: see [`Cell::depth`].
    checksum: u32,
    /// Entry: bytes of the value, and above them a check; see [`Cell::size`]. Dir, Object: hash of the path
    /// from the root. Absent: its number.
    size: u64,
    /// Name below the parent, or where the string arena has it; see [`STORED`].
    pub label: [u8; 8],
    /// Entry, absence: see [`Cell::time`]. Dir: see [`Cell::earliest`].
    time: [u8; 6],
    /// Bytes of `label` in use, or [`STORED`], in bits 0 to 3; [`Packing`] in bits 4 to 6; whether an entry
    /// has a validator in bit 7.
    label_bits: u8,
    /// Kind in bits 0 to 3, state in bits 4 and 5, verified in bit 6, checksum unknown in bit 7.
    bits: u8,
}

/// [`Cell::label_len`] of a label in the string arena: `label` is then its position and its length
/// in bytes, both `u32`.
pub const STORED: u8 = 15;

/// Bits of the size of an entry; the rest are its check.
const SIZE_BITS: u32 = 48;
/// No entry has so many bytes.
pub const TOO_LARGE: u64 = 1 << SIZE_BITS;

fn state_in(bits: u8) -> State {
    match bits >> 4 & 3 {
        0 => State::Live,
        1 => State::Filling,
        2 => State::Deleting,
        _ => State::DeleteFailed,
    }
}

/// Where the checksum of a Dir has a [`Cell::depth`].
fn depth_at(of_absences: bool) -> u32 {
    if of_absences { 16 } else { 0 }
}

const WITH_VALIDATOR: u8 = 1 << 7;
const VERIFIED: u8 = 1 << 6;
const NO_CHECKSUM: u8 = 1 << 7;

impl Cell {
    /// An unlinked cell of this kind.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Cell {
            bits: kind as u8,
            ..Cell::zeroed()
        }
    }

    /// What the cell is; an error where the bits are invalid.
    pub fn kind(&self) -> Result<Kind> {
        Ok(match self.bits & 15 {
            0 => Kind::Free,
            1 => Kind::Dir,
            2 => Kind::Object,
            3 => Kind::Value,
            4 => Kind::Range,
            5 => Kind::Offset,
            6 => Kind::Suffix,
            7 => Kind::Absent,
            8 => Kind::Validator,
            9 => Kind::Segment,
            _ => return Err(Error::Corrupt("invalid kind of cell")),
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
        state_in(self.bits)
    }

    /// The same, where another process may change it meanwhile.
    pub(crate) fn state_now(&self) -> State {
        state_in(load_u8(&self.bits))
    }

    /// Changes the state of an entry; an error where the cell is damaged.
    pub fn set_state(&mut self, state: State) -> Result<()> {
        let size = self.size()?;
        self.begin(size, state);
        Ok(())
    }

    /// Makes an entry of this many bytes, less than [`TOO_LARGE`], of a cell that has its name.
    pub fn begin(&mut self, size: u64, state: State) {
        self.bits = self.bits & !(3 << 4) | (state as u8) << 4;
        self.size = size | u64::from(self.check_of(size)) << SIZE_BITS;
    }

    /// Bytes of an entry; an error where one bit of these, of its name, kind or state has flipped.
    #[inline]
    pub fn size(&self) -> Result<u64> {
        let size = self.size & (TOO_LARGE - 1);
        if self.size >> SIZE_BITS == u64::from(self.check_of(size)) {
            Ok(size)
        } else {
            Err(Error::Corrupt("entry: wrong check"))
        }
    }

    /// Each bit of what it covers flips one bit of it.
    #[inline]
    fn check_of(&self, size: u64) -> u16 {
        const SALT: u64 = 0xA5C3;
        let bits = self.bits & !(VERIFIED | NO_CHECKSUM);
        let rest = u64::from_le_bytes([self.label_bits, bits, 0, 0, 0, 0, 0, 0]);
        let parent = u64::from(self.parent).rotate_left(23);
        let all = SALT
            ^ size
            ^ u64::from_le_bytes(self.label).rotate_left(7)
            ^ parent
            ^ rest.rotate_left(41);
        let half = all ^ all >> 32;
        (half ^ half >> 16) as u16
    }

    /// Hash of the path of a Dir or Object.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.size
    }

    /// The same, where another process may change it meanwhile.
    pub(crate) fn hash_now(&self) -> u64 {
        load_u64(&self.size)
    }

    /// Sets the hash of the path of a Dir or Object.
    pub fn set_hash(&mut self, hash: u64) {
        self.size = hash;
    }

    /// Number of an absence, in the order in which they were made.
    #[must_use]
    pub(crate) fn absence_number(&self) -> u64 {
        self.size
    }

    /// Sets the same.
    pub(crate) fn set_absence_number(&mut self, number: u64) {
        self.size = number;
    }

    /// Tells this entry from a later one in the same cell, also from one that was fetched in the same millisecond and has
    /// other bytes.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.time() ^ self.size.rotate_left(16) ^ u64::from(self.checksum)
    }

    /// Bytes of `label` in use, or [`STORED`].
    #[must_use]
    pub fn label_len(&self) -> u8 {
        self.label_bits & 15
    }

    /// How the label is packed; an error where the bits are invalid.
    pub fn packing(&self) -> Result<Packing> {
        Packing::of((self.label_bits & !WITH_VALIDATOR) >> 4)
            .ok_or(Error::Corrupt("invalid packing of a label"))
    }

    /// Whether the label is packed like this.
    #[must_use]
    pub fn is_in(&self, packing: Packing) -> bool {
        (self.label_bits & !WITH_VALIDATOR) >> 4 == packing as u8
    }

    /// Whether the label is these packed coordinates, padded with zeros.
    #[inline]
    #[must_use]
    pub fn is_packed(&self, word: [u8; INLINE], len: u8) -> bool {
        let bits = (Packing::Coordinates as u8) << 4 | len;
        u64::from_le_bytes(self.label) == u64::from_le_bytes(word)
            && self.label_bits & !WITH_VALIDATOR == bits
    }

    /// The label padded with zeros, and its length, where it is in the cell.
    #[inline]
    #[must_use]
    pub fn inline_word(&self) -> Option<([u8; INLINE], u8)> {
        let len = self.label_len();
        let unused = u32::from((INLINE as u8).checked_sub(len)?) * 8;
        // The padding is zero already, unless the cell is damaged.
        let used = u64::MAX.checked_shr(unused).unwrap_or(0);
        let word = u64::from_le_bytes(self.label) & used;
        Some((word.to_le_bytes(), len))
    }

    /// Sets packing and length of the label.
    pub fn set_label_len(&mut self, packing: Packing, len: u8) {
        self.label_bits = (packing as u8) << 4 | len & 15;
    }

    /// Whether an entry has a validator.
    #[must_use]
    pub fn has_validator(&self) -> bool {
        self.label_bits & WITH_VALIDATOR != 0
    }

    /// Notes whether an entry has a validator; an error where the cell is damaged.
    pub fn set_validator(&mut self, has_one: bool) -> Result<()> {
        let (size, state) = (self.size()?, self.state());
        self.label_bits =
            self.label_bits & !WITH_VALIDATOR | if has_one { WITH_VALIDATOR } else { 0 };
        self.begin(size, state);
        Ok(())
    }

    /// The checksum, where it is known.
    #[must_use]
    pub fn checksum(&self) -> Option<u32> {
        (self.bits & NO_CHECKSUM == 0).then_some(self.checksum)
    }

    /// Sets the checksum.
    pub fn set_checksum(&mut self, checksum: Option<u32>) {
        self.checksum = checksum.unwrap_or(0);
        self.bits = match checksum {
            Some(_) => self.bits & !NO_CHECKSUM,
            None => self.bits | NO_CHECKSUM,
        };
    }

    /// First of the children of a Dir or Object that are absences, or that are not; and their number.
    #[must_use]
    pub(crate) fn children(&self, of_absences: bool) -> [u32; 2] {
        if of_absences {
            [self.earlier, self.later]
        } else {
            [self.older, self.newer]
        }
    }

    /// Sets the same.
    pub(crate) fn set_children(&mut self, of_absences: bool, [first, count]: [u32; 2]) {
        if of_absences {
            (self.earlier, self.later) = (first, count);
        } else {
            (self.older, self.newer) = (first, count);
        }
    }

    /// Most slashes in the name of a child of a Dir that is an absence, or that is not, since there was none: nothing
    /// in the Dir is below a name with as many. An error where a bit has flipped, for each number is noted twice.
    pub(crate) fn depth(&self, of_absences: bool) -> Result<u8> {
        let [one, other] = ((self.checksum >> depth_at(of_absences)) as u16).to_le_bytes();
        if one == other {
            Ok(one)
        } else {
            Err(Error::Corrupt("tree: depth of a directory"))
        }
    }

    /// Sets the same.
    pub(crate) fn set_depth(&mut self, of_absences: bool, slashes: u8) {
        let at = depth_at(of_absences);
        let twice = u32::from(u16::from_le_bytes([slashes; 2]));
        self.checksum = self.checksum & !(0xffff << at) | twice << at;
    }

    /// Whether the bytes were compared with their checksum. Meaningless in a shared index, where
    /// each process keeps a set of its own.
    #[inline]
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.bits & VERIFIED != 0
    }

    /// Notes that the bytes match their checksum.
    pub fn set_verified(&mut self) {
        self.bits |= VERIFIED;
    }

    /// Fetch time in milliseconds; 0 means unknown.
    #[must_use]
    pub fn time(&self) -> u64 {
        let [a, b, c, d, e, f] = self.time;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// The first of the ring by fetch time of a Dir that is a source, or 0; see `by_age.rs`.
    #[must_use]
    pub(crate) fn earliest(&self) -> u32 {
        let [a, b, c, d, ..] = self.time;
        u32::from_le_bytes([a, b, c, d])
    }

    /// Sets the same.
    pub(crate) fn set_earliest(&mut self, i: u32) {
        let [a, b, c, d] = i.to_le_bytes();
        self.time = [a, b, c, d, 0, 0];
    }

    /// Sets the fetch time; one that does not fit into 48 bits (the year 10889) is unknown.
    pub fn set_time(&mut self, millis: u64) {
        let [a, b, c, d, e, f, high @ ..] = millis.to_le_bytes();
        self.time = if high == [0, 0] {
            [a, b, c, d, e, f]
        } else {
            [0; 6]
        };
    }
}
