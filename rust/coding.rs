//! Codings: how the characters of a name become the bytes that are stored, compared and hashed.
//!
//! The same name always takes the same coding, so two names are the same where their codings and
//! bytes are, and nothing has to be decoded to compare them.

use crate::key;

/// Bytes of text that fit into the cell of an entry.
pub const INLINE: usize = 8;

/// Bytes that a coded text takes at most: 128 hexadecimal digits, 85 of other characters. Hashes and
/// ids are no longer; what is longer stays as it is, so that no look-up needs memory of its own.
const MOST: usize = 64;

/// What the bytes of a text stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// Themselves.
    Raw = 0,
    /// Two characters each of chunk coordinates: digits, `/`, `.` and `-`.
    Coordinates = 1,
    /// Two characters each of a hash: digits and `a` to `f`.
    Hex = 2,
    /// The same, but for the last byte, which holds one.
    HexOdd = 3,
    /// Four characters in three bytes: letters, digits, `-` and `_`. So base64url, base32, UUIDs
    /// and dates are coded. With `.` in the place of `-` it would be names of files instead, but
    /// those that Zarr gives many of (`0.0.1`) are coordinates, and of `zarr.json` there is one for
    /// each array.
    Six = 4,
    /// The same, but for the last three bytes, which hold three.
    SixOdd = 5,
}

impl Coding {
    /// The coding of this number.
    #[must_use]
    pub fn of(number: u8) -> Option<Coding> {
        Some(match number {
            0 => Coding::Raw,
            1 => Coding::Coordinates,
            2 => Coding::Hex,
            3 => Coding::HexOdd,
            4 => Coding::Six,
            5 => Coding::SixOdd,
            _ => return None,
        })
    }

    /// Appends stored bytes as text; false where they are no text of this coding.
    #[must_use]
    pub fn decode(self, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        let odd = matches!(self, Coding::HexOdd | Coding::SixOdd);
        match self {
            Coding::Raw => out.extend_from_slice(bytes),
            Coding::Coordinates => {
                for value in nibbles(bytes) {
                    match COORDINATES.get(usize::from(value)) {
                        Some(c) => out.push(*c),
                        None if value == PAD => {}
                        None => return false,
                    }
                }
            }
            Coding::Hex | Coding::HexOdd => {
                out.extend(nibbles(bytes).filter_map(|n| HEX.get(usize::from(n))));
            }
            Coding::Six | Coding::SixOdd => {
                for group in bytes.chunks(3) {
                    let at = |n: usize| u32::from(group.get(n).copied().unwrap_or(0));
                    let word = at(0) << 16 | at(1) << 8 | at(2);
                    let values = [18, 12, 6, 0].map(|shift| word >> shift & 63);
                    let count = group.len() * 8 / 6;
                    let characters = values.iter().filter_map(|n| SIX.get(*n as usize));
                    out.extend(characters.take(count));
                }
            }
        }
        // An odd text has one character less than its bytes could hold.
        !odd || !bytes.is_empty() && out.pop().is_some()
    }
}

fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15])
}

const COORDINATES: &[u8; 13] = b"0123456789/.-";
const PAD: u8 = 15;
const HEX: &[u8; 16] = b"0123456789abcdef";
const SIX: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// For each character its place in an alphabet, or [`NONE`].
type Places = [u8; 256];
const NONE: u8 = 255;

static COORDINATE_PLACES: Places = places(COORDINATES);
static HEX_PLACES: Places = places(HEX);
static SIX_PLACES: Places = places(SIX);

// The compiler runs this, and would say so.
#[allow(clippy::indexing_slicing)]
const fn places(alphabet: &[u8]) -> Places {
    let mut places = [NONE; 256];
    let mut at = 0;
    while at < alphabet.len() {
        places[alphabet[at] as usize] = at as u8;
        at += 1;
    }
    places
}

fn place(places: &Places, c: u8) -> u8 {
    places.get(usize::from(c)).copied().unwrap_or(NONE)
}

/// Text as a cell stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text<'a> {
    /// Chunk coordinates that fit into a cell, and how many bytes they take: what nearly every
    /// look-up is about.
    Packed([u8; INLINE], u8),
    /// Any other coded text, and how many bytes it takes.
    Coded([u8; MOST], u8, Coding),
    /// A text that stays as it is. Names of directories all do: they are stored once for all that
    /// lies below them, and are compared most.
    Raw(&'a [u8]),
}

/// Cuts a key into its directories and its name below them, coded.
#[inline]
#[must_use]
pub fn cut(key: &str) -> (&str, Text<'_>) {
    if let Some((dirs, packed, len)) = cut_chunk(key) {
        return (dirs, Text::Packed(packed, len));
    }
    let (dirs, tail) = key::split(key);
    (dirs, Text::new(tail))
}

/// The same where the name is chunk coordinates that fit into a cell.
#[inline]
#[must_use]
pub fn cut_packed(key: &str) -> Option<(&str, [u8; INLINE], u8)> {
    cut_chunk(key).or_else(|| {
        let (dirs, tail) = key::split(key);
        let (packed, len) = packed(tail.as_bytes())?;
        Some((dirs, packed, len))
    })
}

/// The same for what nearly every look-up is about, the key of a chunk that ends with `/c/` and up to
/// 13 characters: all of them at once, in half of the instructions and without a branch for each,
/// which the processor could not foresee.
#[inline]
fn cut_chunk(key: &str) -> Option<(&str, [u8; INLINE], u8)> {
    // In front of a short key nothing but the end of a directory.
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
    // Behind the text there is nothing, or half a byte of padding.
    let bytes = len.div_ceil(2);
    let padding = (u64::from(PAD) * (len as u64 % 2)) << (8 * (bytes - 1));
    let packed = packed & u64::MAX >> (64 - 8 * bytes) | padding;
    let dirs = key.get(..key.len() - len)?;
    Some((dirs, packed.to_le_bytes(), bytes as u8))
}

/// A byte in the place of each character.
const fn all(c: u8) -> u64 {
    u64::MAX / 255 * c as u64
}

/// The highest bit of each character that is no `.`, `/` or digit, which follow one another in ASCII.
fn others(word: u64) -> u64 {
    let seven = word & all(0x7f);
    (word | (seven + all(0x7f - b'9')) | !(seven + all(0x80 - b'.'))) & all(0x80)
}

/// Packs eight of those characters into four bytes: of a digit the lower four bits, of `/` and `.`,
/// which lack the fifth one, those turned into their places in [`COORDINATES`]. Zero gives anything.
fn pairs(word: u64) -> u64 {
    let signs = !word >> 4 & all(1);
    let values = (word & all(15)) ^ (signs | signs << 2);
    let pairs = (values << 4 | values >> 8) & 0x00ff_00ff_00ff_00ff;
    let pairs = (pairs | pairs >> 8) & 0x0000_ffff_0000_ffff;
    (pairs | pairs >> 16) & 0xffff_ffff
}

impl<'a> Text<'a> {
    /// Codes the name of a key. What fits into a cell as it is stays so, unless it is chunk
    /// coordinates; the rest takes the coding that needs fewest bytes.
    #[must_use]
    pub fn new(text: &'a str) -> Self {
        let raw = text.as_bytes();
        if let Some((packed, len)) = packed(raw) {
            return Text::Packed(packed, len);
        }
        if raw.len() <= INLINE {
            return Text::Raw(raw);
        }
        Text::coded(raw)
    }

    // Out of the way of those that are chunk coordinates.
    #[inline(never)]
    fn coded(raw: &'a [u8]) -> Self {
        let odd = !raw.len().is_multiple_of(2);
        let mut bytes = [0u8; MOST];
        let len = raw.len().div_ceil(2);
        if len <= MOST {
            if pack(raw, &COORDINATE_PLACES, PAD, &mut bytes) {
                return Text::Coded(bytes, len as u8, Coding::Coordinates);
            }
            if pack(raw, &HEX_PLACES, 0, &mut bytes) {
                let coding = if odd { Coding::HexOdd } else { Coding::Hex };
                return Text::Coded(bytes, len as u8, coding);
            }
        }
        let len = (raw.len() * 3).div_ceil(4);
        if let Some(place) = bytes.get_mut(..len)
            && pack_six(raw, place)
        {
            let coding = if raw.len() % 4 == 3 {
                Coding::SixOdd
            } else {
                Coding::Six
            };
            return Text::Coded(bytes, len as u8, coding);
        }
        Text::Raw(raw)
    }

    /// The bytes to store and to hash.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Text::Packed(bytes, len) => bytes.get(..usize::from(*len)).unwrap_or_default(),
            Text::Coded(bytes, len, _) => bytes.get(..usize::from(*len)).unwrap_or_default(),
            Text::Raw(bytes) => bytes,
        }
    }

    /// What the bytes stand for.
    #[must_use]
    pub fn coding(&self) -> Coding {
        match self {
            Text::Packed(..) => Coding::Coordinates,
            Text::Coded(_, _, coding) => *coding,
            Text::Raw(_) => Coding::Raw,
        }
    }
}

/// Chunk coordinates that fit into a cell, packed, and how many bytes they take.
fn packed(raw: &[u8]) -> Option<([u8; INLINE], u8)> {
    let fits = !raw.is_empty() && raw.len() <= 2 * INLINE;
    let mut packed = [0u8; INLINE];
    let is_packed = fits && pack(raw, &COORDINATE_PLACES, PAD, &mut packed);
    is_packed.then_some((packed, raw.len().div_ceil(2) as u8))
}

/// Puts two characters into each byte; false where one of them is not in the alphabet.
#[inline]
fn pack(raw: &[u8], places: &Places, pad: u8, out: &mut [u8]) -> bool {
    let (pairs, last) = raw.as_chunks();
    for (byte, [a, b]) in out.iter_mut().zip(pairs) {
        let [high, low] = [place(places, *a), place(places, *b)];
        if high | low == NONE {
            return false;
        }
        *byte = high << 4 | low;
    }
    if let ([c], Some(byte)) = (last, out.get_mut(pairs.len())) {
        let high = place(places, *c);
        *byte = high << 4 | pad;
        return high != NONE;
    }
    true
}

/// Puts four characters into three bytes; false where one of them is not in the alphabet.
fn pack_six(raw: &[u8], out: &mut [u8]) -> bool {
    let (groups, last) = raw.as_chunks();
    let mut threes = out.chunks_mut(3);
    for ([a, b, c, d], bytes) in groups.iter().zip(threes.by_ref()) {
        let values = [a, b, c, d].map(|c| place(&SIX_PLACES, *c));
        if !put_six(values, bytes) {
            return false;
        }
    }
    threes.next().is_none_or(|bytes| {
        let value = |n: usize| last.get(n).map_or(0, |c| place(&SIX_PLACES, *c));
        put_six([value(0), value(1), value(2), 0], bytes)
    })
}

#[inline]
fn put_six([a, b, c, d]: [u8; 4], out: &mut [u8]) -> bool {
    let word = [a, b, c, d].map(u32::from);
    let word = word.iter().fold(0, |word, value| word << 6 | value);
    let [_, packed @ ..] = word.to_be_bytes();
    for (to, from) in out.iter_mut().zip(packed) {
        *to = from;
    }
    a | b | c | d != NONE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes a text and checks that it comes back.
    fn coded(text: &str) -> (Coding, usize) {
        let stored = Text::new(text);
        let mut out = b"a/".to_vec();
        assert!(stored.coding().decode(stored.bytes(), &mut out), "{text}");
        assert_eq!(out, [b"a/", text.as_bytes()].concat(), "{text}");
        (stored.coding(), stored.bytes().len())
    }

    #[test]
    fn names_take_the_coding_of_fewest_bytes() {
        use Coding::*;
        for (text, coding, bytes) in [
            ("", Raw, 0),
            ("0", Coordinates, 1),
            ("120/44/7", Coordinates, 4),
            ("-/.", Coordinates, 2),
            ("1234567890123456", Coordinates, 8),
            ("12345678901234567", Coordinates, 9),
            ("1234567/1234567/1234567", Coordinates, 12),
            // They fit into a cell as they are.
            ("cafe", Raw, 4),
            ("zarr", Raw, 4),
            ("1 2", Raw, 3),
            ("deadbeef", Raw, 8),
            ("deadbeef0", HexOdd, 5),
            ("0123456789abcdef", Hex, 8),
            ("550e8400-e29b-41d4-a716-446655440000", Six, 27),
            ("_2024-01-31", SixOdd, 9),
            ("mfrggzdfmztwq2lkozzw", Six, 15),
            ("zarr.json", Raw, 9),
            ("DEADBEEF0", Six, 7),
            ("temperature", SixOdd, 9),
            ("temp\u{e9}rature", Raw, 12),
        ] {
            assert_eq!(coded(text), (coding, bytes), "{text}");
        }
    }

    #[test]
    fn a_chunk_is_cut_like_any_other_key() {
        let mut seed = 1u64;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        let characters = b"0123456789/././c-:,\x7f\0a".map(char::from);
        let mut cut_at_once = 0;
        for _ in 0..100_000 {
            let mut key = ["a/b/c/", "cc/", "/c/", "c/", "ü/long/array/c/"][random(5)].to_owned();
            for _ in 0..random(20) {
                let few = if random(3) == 0 { characters.len() } else { 12 };
                key.push(characters[random(few)]);
            }
            let (dirs, tail) = key::split(&key);
            assert_eq!(cut(&key), (dirs, Text::new(tail)), "{key}");
            cut_at_once += usize::from(cut_chunk(&key).is_some());
        }
        assert!(cut_at_once > 5_000, "{cut_at_once}");
        for key in [
            "era5/2m_temperature/c/120/44/7",
            "array/c/1234567890.12",
            "z/c/0/1",
            "c/0",
        ] {
            assert!(cut_chunk(key).is_some());
        }
    }

    #[test]
    fn every_length_comes_back() {
        for length in 0..=300 {
            for alphabet in [&COORDINATES[..], HEX, SIX, b"~.z"] {
                for salt in 0..7 {
                    let at = |n: usize| char::from(alphabet[(salt + n * n) % alphabet.len()]);
                    let text: String = (0..length).map(at).collect();
                    let (_, bytes) = coded(&text);
                    assert!(bytes <= length);
                    // Neither a longer text nor a shorter one is taken for it.
                    for other in [format!("{text}0"), format!("{text}A")] {
                        let (one, two) = (Text::new(&text), Text::new(&other));
                        assert!(one.coding() != two.coding() || one.bytes() != two.bytes());
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_is_decoded_that_was_never_coded() {
        for (coding, bytes) in [
            (Coding::Coordinates, &[0xd0][..]),
            (Coding::HexOdd, &[]),
            (Coding::SixOdd, &[]),
        ] {
            let mut out = b"a/".to_vec();
            assert!(!coding.decode(bytes, &mut out));
            assert!(out.starts_with(b"a/"));
        }
        for number in 0..=255 {
            let coding = Coding::of(number);
            assert!(coding.is_none_or(|coding| coding as u8 == number));
        }
    }
}
