//! A cell: the one sort of record that the index is made of.
//!
//! Every cell is 56 bytes and is addressed by a `u32`. There are no pointers and no allocation for
//! a key, so the same code runs on heap memory and on a mapped file. Cell 0 is never used, so 0
//! means "none" everywhere.

use bytemuck::{Pod, Zeroable};

use crate::coding::{Coding, INLINE};
use crate::error::{Fault, Res};

/// What a cell is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Unused; linked into the list of free cells.
    Free = 0,
    /// A directory of keys.
    Dir = 1,
    /// A key of which ranges are held; they are its children.
    Object = 2,
    /// Entry: a whole value.
    Value = 3,
    /// Entry: a `RangeByteRequest`.
    Range = 4,
    /// Entry: an `OffsetByteRequest`.
    Offset = 5,
    /// Entry: a `SuffixByteRequest`.
    Suffix = 6,
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
    /// Free: next free cell.
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
    /// Bytes of `text` in use, or [`LONG`], in bits 0 to 3; [`Coding`] in bits 4 to 7.
    coded: u8,
    /// Kind in bits 0 to 3, state in bits 4 and 5, bytes verified in bit 6, checksum unknown in bit 7.
    bits: u8,
}

/// [`Cell::text_len`] of a text that does not lie in its cell: `text` is then the number of its first block
/// and its length in bytes, both `u32`.
pub const LONG: u8 = 15;

const VERIFIED: u8 = 1 << 6;
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
            1 => Kind::Dir,
            2 => Kind::Object,
            3 => Kind::Value,
            4 => Kind::Range,
            5 => Kind::Offset,
            6 => Kind::Suffix,
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

    /// Bytes of `text` in use, or [`LONG`].
    #[must_use]
    pub fn text_len(&self) -> u8 {
        self.coded & 15
    }

    /// What the text stands for; an error where the bits name nothing.
    pub fn coding(&self) -> Res<Coding> {
        Coding::of(self.coded >> 4).ok_or(Fault::Corrupt("a text of no coding"))
    }

    /// Whether the text is in this coding.
    #[must_use]
    pub fn is_in(&self, coding: Coding) -> bool {
        self.coded >> 4 == coding as u8
    }

    /// Whether the text is these chunk coordinates, of so many bytes and with zeros behind them.
    #[inline]
    #[must_use]
    pub fn is_packed(&self, word: [u8; INLINE], len: u8) -> bool {
        let coded = (Coding::Coordinates as u8) << 4 | len;
        u64::from_le_bytes(self.text) == u64::from_le_bytes(word) && self.coded == coded
    }

    /// The text with zeros behind it, and its length, where it lies here.
    #[inline]
    #[must_use]
    pub fn inline_word(&self) -> Option<([u8; INLINE], u8)> {
        let len = self.text_len();
        let unused = u32::from((INLINE as u8).checked_sub(len)?) * 8;
        // What lies behind it is zero already, unless the cell is damaged.
        let used = u64::MAX.checked_shr(unused).unwrap_or(0);
        let word = u64::from_le_bytes(self.text) & used;
        Some((word.to_le_bytes(), len))
    }

    /// Sets coding and length of the text.
    pub fn set_text_len(&mut self, coding: Coding, len: u8) {
        self.coded = (coding as u8) << 4 | len & 15;
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

    /// Whether this process has compared the bytes with their checksum; of an index that several
    /// processes share it says nothing.
    #[inline]
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.bits & VERIFIED != 0
    }

    /// Notes that the bytes are what they should be.
    pub fn set_verified(&mut self) {
        self.bits |= VERIFIED;
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
