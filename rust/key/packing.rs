//! Packing: how the tail of a key becomes the bytes that are stored, compared and hashed.
//!
//! Chunk coordinates of up to 16 characters take half a byte each, so they fit into their cell;
//! everything else is stored as it is. The same tail is always packed in the same way, so two tails
//! are equal if and only if packing and bytes are, and comparing needs no decoding.

use super::key;

/// Bytes of a label that fit into the cell of an entry.
pub const INLINE: usize = 8;

/// What the bytes of a label stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Themselves.
    Raw = 0,
    /// Two characters of chunk coordinates each: digits, `/`, `.` and `-`.
    Coordinates = 1,
}

impl Packing {
    /// The packing with this number.
    #[must_use]
    pub fn of(number: u8) -> Option<Packing> {
        match number {
            0 => Some(Packing::Raw),
            1 => Some(Packing::Coordinates),
            _ => None,
        }
    }

    /// Appends the text that these bytes stand for; false where they stand for none.
    #[must_use]
    pub fn decode(self, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        match self {
            Packing::Raw => out.extend_from_slice(bytes),
            Packing::Coordinates => {
                for value in bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]) {
                    match COORDINATES.get(usize::from(value)) {
                        Some(c) => out.push(*c),
                        None if value == PAD => {}
                        None => return false,
                    }
                }
            }
        }
        true
    }
}

const COORDINATES: &[u8; 13] = b"0123456789/.-";
const PAD: u8 = 15;

/// No position in [`COORDINATES`].
const NONE: u8 = 255;

/// For each character its position in [`COORDINATES`], or [`NONE`].
static POSITIONS: [u8; 256] = positions();

// Evaluated at compile time, where an index out of range is an error.
#[allow(clippy::indexing_slicing)]
const fn positions() -> [u8; 256] {
    let mut positions = [NONE; 256];
    let mut at = 0;
    while at < COORDINATES.len() {
        positions[COORDINATES[at] as usize] = at as u8;
        at += 1;
    }
    positions
}

fn position(c: u8) -> u8 {
    POSITIONS.get(usize::from(c)).copied().unwrap_or(NONE)
}

/// The label of a cell as it is stored: the name of a directory, the tail of a key, or a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label<'a> {
    /// Packed chunk coordinates, padded with zeros, and how many bytes they take.
    Packed([u8; INLINE], u8),
    /// Bytes that are stored as they are. Names of directories are never packed: they are stored
    /// once for all keys below, and compared most.
    Raw(&'a [u8]),
}

impl<'a> Label<'a> {
    /// The label of a tail.
    #[must_use]
    pub fn new(tail: &'a str) -> Self {
        match pack(tail.as_bytes()) {
            Some((packed, len)) => Label::Packed(packed, len),
            None => Label::Raw(tail.as_bytes()),
        }
    }

    /// The bytes to store and to hash.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Label::Packed(bytes, len) => bytes.get(..usize::from(*len)).unwrap_or_default(),
            Label::Raw(bytes) => bytes,
        }
    }

    /// What the bytes stand for.
    #[must_use]
    pub fn packing(&self) -> Packing {
        match self {
            Label::Packed(..) => Packing::Coordinates,
            Label::Raw(_) => Packing::Raw,
        }
    }

    /// Slashes in the text.
    #[must_use]
    pub fn slashes(&self) -> usize {
        match self {
            Label::Packed(word, _) => {
                // Half a byte that is a slash is zero here, and only that.
                let others = u64::from_le_bytes(*word) ^ all(0xaa);
                let others = others | others >> 2;
                let others = (others | others >> 1) & all(0x11);
                2 * INLINE - others.count_ones() as usize
            }
            Label::Raw(bytes) => bytes.iter().filter(|c| **c == b'/').count(),
        }
    }
}

/// Splits a key into its directories and the label of its tail.
#[inline]
#[must_use]
pub fn split(key: &str) -> (&str, Label<'_>) {
    if let Some((dirs, packed, len)) = split_chunk(key) {
        return (dirs, Label::Packed(packed, len));
    }
    let (dirs, tail) = key::split(key);
    (dirs, Label::new(tail))
}

/// The same where the tail is packed.
#[inline]
#[must_use]
pub fn split_packed(key: &str) -> Option<(&str, [u8; INLINE], u8)> {
    split_chunk(key).or_else(|| {
        let (dirs, tail) = key::split(key);
        let (packed, len) = pack(tail.as_bytes())?;
        Some((dirs, packed, len))
    })
}

/// The same for the usual chunk key, which ends with `/c/` and up to 13 characters: all of them at
/// once, in half of the instructions and without an unpredictable branch for each.
#[inline]
fn split_chunk(key: &str) -> Option<(&str, [u8; INLINE], u8)> {
    // A short key is padded in front with the ends of directories.
    let mut last = [b'/'; 16];
    match key.as_bytes().last_chunk() {
        Some(bytes) => last = *bytes,
        None => last
            .get_mut(16 - key.len()..)?
            .copy_from_slice(key.as_bytes()),
    }
    let word = u128::from_le_bytes(last);
    let marker = match others((word >> 64) as u64) {
        0 => others(word as u64).checked_ilog2()?,
        others => 64 + others.ilog2(),
    } as usize
        / 8;
    let Some([b'/', b'c', b'/', _, ..]) = last.get(marker.checked_sub(1)?..) else {
        return None;
    };
    let len = last.len() - marker - 2;
    let text = word >> (8 * (marker + 2));
    let packed = pairs(text as u64) | pairs((text >> 64) as u64) << 32;
    // An odd number of characters leaves half a byte, which is padded.
    let bytes = len.div_ceil(2);
    let padding = (u64::from(PAD) * (len as u64 % 2)) << (8 * (bytes - 1));
    let packed = packed & u64::MAX >> (64 - 8 * bytes) | padding;
    let dirs = key.get(..key.len() - len)?;
    Some((dirs, packed.to_le_bytes(), bytes as u8))
}

/// This byte in every position of a word.
const fn all(c: u8) -> u64 {
    u64::MAX / 255 * c as u64
}

/// The highest bit of each character that is no `.`, `/` or digit, which are neighbours in ASCII.
fn others(word: u64) -> u64 {
    let seven = word & all(0x7f);
    (word | (seven + all(0x7f - b'9')) | !(seven + all(0x80 - b'.'))) & all(0x80)
}

/// Packs eight of those characters into four bytes: the lower four bits of a digit, and for `/` and
/// `.` (their fifth bit is clear) their positions in [`COORDINATES`]. Other bytes give anything.
fn pairs(word: u64) -> u64 {
    let signs = !word >> 4 & all(1);
    let values = (word & all(15)) ^ (signs | signs << 2);
    let pairs = (values << 4 | values >> 8) & 0x00ff_00ff_00ff_00ff;
    let pairs = (pairs | pairs >> 8) & 0x0000_ffff_0000_ffff;
    (pairs | pairs >> 16) & 0xffff_ffff
}

/// Packs chunk coordinates that fit into a cell; returns how many bytes they take as well.
fn pack(raw: &[u8]) -> Option<([u8; INLINE], u8)> {
    if raw.is_empty() || raw.len() > 2 * INLINE {
        return None;
    }
    let mut packed = [0u8; INLINE];
    let (pairs, last) = raw.as_chunks();
    for (byte, [a, b]) in packed.iter_mut().zip(pairs) {
        let [high, low] = [position(*a), position(*b)];
        if high | low == NONE {
            return None;
        }
        *byte = high << 4 | low;
    }
    if let ([c], Some(byte)) = (last, packed.get_mut(pairs.len())) {
        let high = position(*c);
        if high == NONE {
            return None;
        }
        *byte = high << 4 | PAD;
    }
    Some((packed, raw.len().div_ceil(2) as u8))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packs a tail and checks that it comes back.
    fn packed(tail: &str) -> (Packing, usize) {
        let label = Label::new(tail);
        let mut out = b"a/".to_vec();
        assert!(label.packing().decode(label.bytes(), &mut out), "{tail}");
        assert_eq!(out, [b"a/", tail.as_bytes()].concat(), "{tail}");
        assert_eq!(label.slashes(), tail.matches('/').count(), "{tail}");
        (label.packing(), label.bytes().len())
    }

    #[test]
    fn label_packs_coordinates_that_fit_into_a_cell() {
        use Packing::{Coordinates, Raw};
        for (tail, packing, bytes) in [
            ("", Raw, 0),
            ("0", Coordinates, 1),
            ("120/44/7", Coordinates, 4),
            ("-/.", Coordinates, 2),
            ("1234567890123456", Coordinates, 8),
            ("12345678901234567", Raw, 17),
            ("cafe", Raw, 4),
            ("1 2", Raw, 3),
            ("0123456789abcdef", Raw, 16),
            ("zarr.json", Raw, 9),
            ("temp\u{e9}rature", Raw, 12),
        ] {
            assert_eq!(packed(tail), (packing, bytes), "{tail}");
        }
    }

    #[test]
    fn split_chunk_agrees_with_the_general_split() {
        let mut seed = 1u64;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        let characters = b"0123456789/././c-:,\x7f\0a".map(char::from);
        let mut fast = 0;
        for _ in 0..100_000 {
            let mut key = ["a/b/c/", "cc/", "/c/", "c/", "ü/long/array/c/"][random(5)].to_owned();
            for _ in 0..random(20) {
                let limit = if random(3) == 0 { characters.len() } else { 12 };
                key.push(characters[random(limit)]);
            }
            let (dirs, tail) = key::split(&key);
            assert_eq!(split(&key), (dirs, Label::new(tail)), "{key}");
            fast += usize::from(split_chunk(&key).is_some());
        }
        assert!(fast > 5_000, "{fast}");
        for key in [
            "era5/2m_temperature/c/120/44/7",
            "array/c/1234567890.12",
            "z/c/0/1",
            "c/0",
        ] {
            assert!(split_chunk(key).is_some());
        }
    }

    #[test]
    fn label_of_any_length_round_trips_and_is_unique() {
        for length in 0..=40 {
            for alphabet in [&COORDINATES[..], b"~.z"] {
                for salt in 0..7 {
                    let at = |n: usize| char::from(alphabet[(salt + n * n) % alphabet.len()]);
                    let tail: String = (0..length).map(at).collect();
                    let (_, bytes) = packed(&tail);
                    assert!(bytes <= length);
                    for other in [format!("{tail}0"), format!("{tail}A")] {
                        assert_ne!(Label::new(&tail), Label::new(&other));
                    }
                }
            }
        }
    }

    #[test]
    fn decode_unused_number_fails() {
        let mut out = b"a/".to_vec();
        assert!(!Packing::Coordinates.decode(&[0xd0], &mut out));
        assert!(out.starts_with(b"a/"));
        for number in 0..=255 {
            let packing = Packing::of(number);
            assert!(packing.is_none_or(|packing| packing as u8 == number));
        }
    }
}
