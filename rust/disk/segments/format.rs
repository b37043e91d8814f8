//! What stands in a segment: its header and its map, and before each value a header.
//!
//! ```text
//! 0     header of the segment           MAP_AT  one byte for each page from FIRST_PAGE on
//! page  header of a value (VALUE_HEADER bytes), then its bytes, in whole pages
//! ```
//!
//! All numbers are little-endian. Each header has a CRC32C, and names the place that it was written for: a copy of
//! it elsewhere, inside of a value for instance, is no header.

use crate::cache::{MAX_NAME, Placed, VALUE_HEADER};
use crate::checksum::crc32c;

const SEGMENT_MAGIC: [u8; 8] = *b"zcache\nS";
const VALUE_MAGIC: [u8; 8] = *b"zcache\nV";
/// Changes with every change of the layout.
const SEGMENT_FORMAT: u32 = 1;

/// Bytes of the header of a segment.
pub(super) const SEGMENT_HEADER: usize = 64;
/// Bytes of the header of a value.
pub(super) const HEADER: usize = VALUE_HEADER as usize;
/// Bytes of it before the name.
const NUMBERS: usize = 56;
const _: () = assert!(NUMBERS + MAX_NAME <= HEADER);
/// What the CRC32C of a header covers: all that comes after it.
const CHECKED: usize = 12;

/// The header of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Number of the segment.
    pub number: u64,
    /// Pages in which values may begin.
    pub capacity: u32,
    /// Names the process that has made its file, and alone appends to it.
    pub maker: u64,
}

/// The header of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueHeader {
    /// Where it was written.
    pub placed: Placed,
    /// CRC32C of the value.
    pub checksum: u32,
    /// Milliseconds since 1970 of its fetch.
    pub fetched: u64,
    /// Name in the cache store.
    pub name: String,
}

/// Writes numbers one behind the other.
struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let rest = std::mem::take(&mut self.0);
        let (to, rest) = rest.split_at_mut(bytes.len().min(rest.len()));
        to.copy_from_slice(bytes.get(..to.len()).unwrap_or_default());
        self.0 = rest;
    }
}

/// Reads them again.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// Sets the CRC32C of a header.
fn seal(bytes: &mut [u8]) {
    let check = check_of(bytes);
    let place = bytes.get_mut(CHECKED - 4..CHECKED).unwrap_or_default();
    place.copy_from_slice(&check.to_le_bytes());
}

fn check_of(bytes: &[u8]) -> u32 {
    crc32c(bytes.get(CHECKED..).unwrap_or_default())
}

/// What comes after magic number and CRC32C, where both are right.
fn open<'a>(bytes: &'a [u8], magic: &[u8; 8]) -> Option<Reader<'a>> {
    let mut reader = Reader(bytes);
    let is_ours = reader.take::<8>()? == *magic && reader.u32()? == check_of(bytes);
    is_ours.then_some(reader)
}

impl SegmentHeader {
    /// As it is written.
    #[must_use]
    pub fn to_bytes(self) -> [u8; SEGMENT_HEADER] {
        let mut bytes = [0; SEGMENT_HEADER];
        let mut writer = Writer(&mut bytes);
        writer.put(&SEGMENT_MAGIC);
        writer.put(&[0; 4]);
        writer.put(&SEGMENT_FORMAT.to_le_bytes());
        writer.put(&self.number.to_le_bytes());
        writer.put(&self.capacity.to_le_bytes());
        writer.put(&self.maker.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    /// What was written; `None` where it is damaged, or of another format.
    #[must_use]
    pub fn parse(bytes: &[u8; SEGMENT_HEADER]) -> Option<Self> {
        let mut reader = open(bytes, &SEGMENT_MAGIC)?;
        if reader.u32()? != SEGMENT_FORMAT {
            return None;
        }
        Some(SegmentHeader {
            number: reader.u64()?,
            capacity: reader.u32()?,
            maker: reader.u64()?,
        })
    }
}

impl ValueHeader {
    /// As it is written; `None` where the name is too long.
    #[must_use]
    pub fn to_bytes(&self) -> Option<[u8; HEADER]> {
        if self.name.len() > MAX_NAME {
            return None;
        }
        let mut bytes = [0; HEADER];
        let mut writer = Writer(&mut bytes);
        writer.put(&VALUE_MAGIC);
        writer.put(&[0; 4]);
        writer.put(&self.checksum.to_le_bytes());
        writer.put(&self.placed.segment.to_le_bytes());
        writer.put(&self.placed.size.to_le_bytes());
        writer.put(&self.fetched.to_le_bytes());
        writer.put(&self.placed.page.to_le_bytes());
        writer.put(&(self.name.len() as u32).to_le_bytes());
        writer.put(&[0; 8]);
        writer.put(self.name.as_bytes());
        seal(&mut bytes);
        Some(bytes)
    }

    /// What was written; `None` where it is damaged.
    #[must_use]
    pub fn parse(bytes: &[u8; HEADER]) -> Option<Self> {
        let mut reader = open(bytes, &VALUE_MAGIC)?;
        let checksum = reader.u32()?;
        let (segment, size, fetched) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let (page, len) = (reader.u32()?, reader.u32()? as usize);
        let name = bytes.get(NUMBERS..NUMBERS.checked_add(len)?)?;
        Some(ValueHeader {
            placed: Placed {
                segment,
                page,
                size,
                capacity: 0,
            },
            checksum,
            fetched,
            name: String::from_utf8(name.to_vec()).ok()?,
        })
    }

    /// Whether these bytes are the header of the value of this name at this place. A comparison, without the
    /// CRC32C: a hit has no use for the rest.
    #[inline]
    #[must_use]
    pub fn is_of(bytes: &[u8; HEADER], placed: &Placed, name: &str) -> bool {
        let mut reader = Reader(bytes);
        let mut is_same = || {
            let is_value = reader.take::<8>()? == VALUE_MAGIC;
            reader.take::<8>()?;
            let is_here = reader.u64()? == placed.segment && reader.u64()? == placed.size;
            reader.u64()?;
            let is_page = reader.u32()? == placed.page;
            let len = reader.u32()? as usize;
            let own = bytes.get(NUMBERS..NUMBERS.checked_add(len)?)?;
            Some(is_value && is_here && is_page && own == name.as_bytes())
        };
        is_same().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> ValueHeader {
        ValueHeader {
            placed: Placed {
                segment: 7,
                page: 70,
                size: 100,
                capacity: 0,
            },
            checksum: 5,
            fetched: 1000,
            name: "source/a/c/0/1".to_owned(),
        }
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let written = header().to_bytes().unwrap();
        assert_eq!(ValueHeader::parse(&written), Some(header()));
        assert!(ValueHeader::is_of(
            &written,
            &header().placed,
            "source/a/c/0/1"
        ));
        let segment = SegmentHeader {
            number: 9,
            capacity: 16,
            maker: 5,
        };
        assert_eq!(SegmentHeader::parse(&segment.to_bytes()), Some(segment));
    }

    #[test]
    fn a_header_with_any_bit_flipped_is_none() {
        let written = header().to_bytes().unwrap();
        for bit in 0..8 * HEADER {
            let mut damaged = written;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(ValueHeader::parse(&damaged), None, "bit {bit}");
        }
    }

    #[test]
    fn a_header_of_another_place_size_or_name_is_not_of_the_value() {
        let written = header().to_bytes().unwrap();
        let placed = header().placed;
        for other in [
            Placed {
                segment: 8,
                ..placed
            },
            Placed { page: 71, ..placed },
            Placed { size: 99, ..placed },
        ] {
            assert!(!ValueHeader::is_of(&written, &other, "source/a/c/0/1"));
        }
        assert!(!ValueHeader::is_of(&written, &placed, "source/a/c/0/2"));
        assert!(!ValueHeader::is_of(&[0; HEADER], &placed, ""));
    }

    #[test]
    fn a_name_that_is_too_long_has_no_header() {
        let name = "x".repeat(MAX_NAME + 1);
        assert_eq!(ValueHeader { name, ..header() }.to_bytes(), None);
    }
}
