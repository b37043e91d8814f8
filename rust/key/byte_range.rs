//! Byte ranges: which bytes of a value an entry holds, and the name of such an entry.

use super::RESERVED;

/// Which bytes of a value: all of them, or one of the three requests of `zarr.abc.store`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ByteRange {
    /// The whole value.
    Full,
    /// `RangeByteRequest`: from `start` (inclusive) to `end` (exclusive).
    Range {
        /// First byte.
        start: u64,
        /// One past the last byte asked for; the value may end earlier.
        end: u64,
    },
    /// `OffsetByteRequest`: everything from this byte on.
    Offset(u64),
    /// `SuffixByteRequest`: up to this many bytes at the end.
    Suffix(u64),
}

impl ByteRange {
    /// Name of the entry in the cache store. A full value has its own key, so that the cached part
    /// of a dataset is itself readable as Zarr; a range lies under the reserved prefix, where `@`
    /// keeps the file of `a` apart from the directory of `a/b`.
    #[must_use]
    pub fn cache_key(self, key: &str) -> String {
        match self {
            ByteRange::Full => key.to_owned(),
            ByteRange::Range { start, end } => format!("{RESERVED}ranges/{key}@{start}-{end}"),
            ByteRange::Offset(from) => format!("{RESERVED}ranges/{key}@{from}-"),
            ByteRange::Suffix(count) => format!("{RESERVED}ranges/{key}@-{count}"),
        }
    }

    /// The inverse of [`ByteRange::cache_key`]; `None` for a name that zcache never gives.
    #[must_use]
    pub fn parse(cache_key: &str) -> Option<(&str, ByteRange)> {
        let Some(rest) = cache_key.strip_prefix(RESERVED) else {
            return Some((cache_key, ByteRange::Full));
        };
        let (key, range) = rest.strip_prefix("ranges/")?.rsplit_once('@')?;
        let (from, to) = range.split_once('-')?;
        let number = |text: &str| text.parse::<u64>().ok().filter(|n| n.to_string() == text);
        let range = match (from, to) {
            ("", count) => ByteRange::Suffix(number(count)?),
            (from, "") => ByteRange::Offset(number(from)?),
            (from, to) => ByteRange::Range {
                start: number(from)?,
                end: number(to)?,
            },
        };
        Some((key, range))
    }
}

/// The numbers of a range as the label of its cell, in LEB128: the common ones fit into the cell.
#[derive(Clone, Copy, Debug)]
pub struct RangeLabel {
    bytes: [u8; 20],
    len: usize,
}

impl RangeLabel {
    /// Encodes what the kind of a cell does not say already.
    #[must_use]
    pub fn new(range: ByteRange) -> Self {
        let mut label = RangeLabel {
            bytes: [0; 20],
            len: 0,
        };
        match range {
            ByteRange::Full => {}
            ByteRange::Range { start, end } => {
                label.push(start);
                label.push(end.wrapping_sub(start));
            }
            ByteRange::Offset(n) | ByteRange::Suffix(n) => label.push(n),
        }
        label
    }

    fn push(&mut self, mut n: u64) {
        loop {
            let low = (n & 0x7f) as u8;
            n >>= 7;
            if let Some(byte) = self.bytes.get_mut(self.len) {
                *byte = if n == 0 { low } else { low | 0x80 };
            }
            self.len += 1;
            if n == 0 {
                return;
            }
        }
    }

    /// The encoded bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// Reads one number from the front of `bytes`.
    pub fn read(bytes: &mut &[u8]) -> Option<u64> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let (first, rest) = bytes.split_first()?;
            *bytes = rest;
            n |= u64::from(first & 0x7f).checked_shl(shift)?;
            if first & 0x80 == 0 {
                return Some(n);
            }
        }
        None
    }
}
