//! Keys: what identifies an entry, how its text is cut into interned parts, and under which name
//! its bytes lie in the cache store. How a part is stored is `coding`'s matter.
//!
//! A Zarr key such as `era5/2m_temperature/c/120/44/7` is a *path* of directories and a *tail*.
//! The directories (`era5`, `2m_temperature`, `c`) are shared by millions of keys and are stored
//! once; the tail (`120/44/7`) is stored with the entry. The tail is what follows the last `c/`
//! where that is made of chunk coordinates only (the default chunk key encoding of format 3). Else
//! it is up to three numbers at the end, but not the first of them, which may name an array or a
//! level (format 2 with `/` between coordinates, as images have it: `image/0/5/1/120/44/7`), or
//! what follows the last slash. The cut depends on the key alone, so a lookup never searches.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Prefix in the cache store that is reserved for zcache itself.
pub const RESERVED: &str = ".zcache/";

/// Which bytes of a key an entry holds; the three requests of `zarr.abc.store` and the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Span {
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

impl Span {
    /// Name under which the bytes of `key` lie in the cache store: a full value under its own key,
    /// so that the cached part of a dataset is itself readable as Zarr; a range under the reserved
    /// prefix, where `@` keeps the file of `a` apart from the directory of `a/b`.
    #[must_use]
    pub fn cache_key(self, key: &str) -> String {
        match self {
            Span::Full => key.to_owned(),
            Span::Range { start, end } => format!("{RESERVED}ranges/{key}@{start}-{end}"),
            Span::Offset(from) => format!("{RESERVED}ranges/{key}@{from}-"),
            Span::Suffix(count) => format!("{RESERVED}ranges/{key}@-{count}"),
        }
    }

    /// The inverse of [`Span::cache_key`]; `None` for a name that zcache never gives.
    #[must_use]
    pub fn parse(cache_key: &str) -> Option<(&str, Span)> {
        let Some(rest) = cache_key.strip_prefix(RESERVED) else {
            return Some((cache_key, Span::Full));
        };
        let (key, range) = rest.strip_prefix("ranges/")?.rsplit_once('@')?;
        let (from, to) = range.split_once('-')?;
        let number = |text: &str| text.parse::<u64>().ok().filter(|n| n.to_string() == text);
        let span = match (from, to) {
            ("", count) => Span::Suffix(number(count)?),
            (from, "") => Span::Offset(number(from)?),
            (from, to) => Span::Range {
                start: number(from)?,
                end: number(to)?,
            },
        };
        Some((key, span))
    }
}

/// Whether a cache may hold this key: a plain relative path, so that it names one value and only
/// one key names it, outside of what is reserved for zcache.
#[must_use]
pub fn is_known(key: &str) -> bool {
    let bytes = key.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    let (mut odd, mut foreign) = (false, is_foreign(*first));
    let mut look = |part: &[u8; PAIRS + 1]| {
        let (a, b) = look_at_pairs(part);
        odd |= a;
        foreign |= b;
    };
    for part in bytes.windows(PAIRS + 1).step_by(PAIRS) {
        if let Ok(part) = part.try_into() {
            look(part);
        }
    }
    match bytes.last_chunk() {
        Some(part) => look(part),
        None => {
            let mut part = [b'-'; PAIRS + 1];
            part.iter_mut().zip(bytes).for_each(|(to, c)| *to = *c);
            look(&part);
        }
    }
    let plain = !odd && !begins_oddly(*first);
    !foreign && *last != b'/' && (plain || has_plain_parts(bytes))
}

/// Characters of a key that are looked at together.
const PAIRS: usize = 16;

/// Whether a part of a name begins oddly, or a character is foreign; the first one is not looked at.
/// A miss asks this of its key. So: as many as a register holds, without branches, and in numbers, of
/// which the compiler compares all at once.
fn look_at_pairs(part: &[u8; PAIRS + 1]) -> (bool, bool) {
    let [first @ .., _] = part;
    let [_, second @ ..] = part;
    let (mut odd, mut foreign) = (0, 0);
    for (a, b) in first.iter().zip(second) {
        odd |= u8::from(*a == b'/') & u8::from(begins_oddly(*b));
        foreign |= u8::from(is_foreign(*b));
    }
    (odd != 0, foreign != 0)
}

fn begins_oddly(c: u8) -> bool {
    c | 1 == b'/' // which follows `.`
}

fn is_foreign(c: u8) -> bool {
    c == 0 || cfg!(windows) && matches!(c, b'\\' | b':')
}

fn has_plain_parts(bytes: &[u8]) -> bool {
    let mut parts = bytes.split(|c| *c == b'/');
    parts.all(|part| !matches!(part, b"" | b"." | b".."))
        && !(bytes.starts_with(b".zcache") && matches!(bytes.get(7), None | Some(b'/')))
}

/// The directories that a key lies in, without their slashes and "" first, then the key itself: a
/// change of any of these is one of the key.
pub fn and_above(key: &str) -> impl Iterator<Item = &str> {
    let above = key.match_indices('/').filter_map(|(at, _)| key.get(..at));
    std::iter::once("").chain(above).chain(std::iter::once(key))
}

/// Cuts a key into its directories (with the trailing slash, or empty) and its tail.
#[must_use]
pub fn split(key: &str) -> (&str, &str) {
    let bytes = key.as_bytes();
    let is_coordinate = |c: &u8| c.is_ascii_digit() || matches!(c, b'/' | b'.');
    let marker = bytes.iter().rposition(|c| !is_coordinate(c));
    let is_marker = |at: &usize| match bytes.get(..=*at) {
        Some(b"c" | [.., b'/', b'c']) => matches!(bytes.get(at + 1..), Some([b'/', _, ..])),
        _ => false,
    };
    let cut = match marker.filter(is_marker) {
        Some(at) => at + 2,
        None => numbers_at_end(bytes),
    };
    key.split_at_checked(cut).unwrap_or(("", key))
}

/// Numbers of a tail where nothing else tells coordinates from names.
const NUMBERS: usize = 3;

/// Where the tail of a key without a marker begins.
fn numbers_at_end(bytes: &[u8]) -> usize {
    let part = |end: usize| {
        let before = bytes.get(..end).unwrap_or_default();
        let start = before
            .iter()
            .rposition(|c| *c == b'/')
            .map_or(0, |at| at + 1);
        let text = before.get(start..).unwrap_or_default();
        let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
        (start, is_number)
    };
    let (mut cut, mut is_number) = part(bytes.len());
    for _ in 1..NUMBERS {
        let above = cut.checked_sub(1).filter(|_| is_number).map(part);
        // The next one up is taken only where yet another one is above it.
        match above.and_then(|(start, number)| Some((start, number, part(start.checked_sub(1)?).1)))
        {
            Some((start, true, true)) => (cut, is_number) = (start, true),
            _ => break,
        }
    }
    cut
}

/// Prefixes that the tails of some keys below `prefix` begin in, which so are children of a
/// directory above it: the paths of those directories.
pub fn above_tails_below(prefix: &str) -> impl Iterator<Item = String> {
    let inside = ["/0", "/0/0"].map(|more| format!("{prefix}{more}"));
    let paths = inside.map(|inside| split(&inside).0.to_owned());
    let len = prefix.len();
    let [one, other] = paths.map(|path| Some(path).filter(|path| path.len() <= len));
    let other = other.filter(|path| Some(path) != one.as_ref());
    one.into_iter().chain(other)
}

/// The directories of the first half of [`split`], outermost first.
pub fn directories(dirs: &str) -> impl Iterator<Item = &str> {
    dirs.split_inclusive('/')
        .map(|dir| dir.strip_suffix('/').unwrap_or(dir))
}

/// A range as text of a cell: two numbers as LEB128, so that the common ones fit inline.
#[derive(Clone, Copy, Debug)]
pub struct SpanText {
    bytes: [u8; 20],
    len: usize,
}

impl SpanText {
    /// Encodes what the kind of a cell does not say already.
    #[must_use]
    pub fn new(span: Span) -> Self {
        let mut text = SpanText {
            bytes: [0; 20],
            len: 0,
        };
        match span {
            Span::Full => {}
            Span::Range { start, end } => {
                text.number(start);
                text.number(end.wrapping_sub(start));
            }
            Span::Offset(n) | Span::Suffix(n) => text.number(n),
        }
        text
    }

    fn number(&mut self, mut n: u64) {
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

/// Hash of a text below a directory whose own hash is `seed`.
#[must_use]
pub fn hash(bytes: &[u8], seed: u64, salt: u8) -> u64 {
    let mut word = [0; 8];
    match word.get_mut(..bytes.len()) {
        Some(place) => {
            place.copy_from_slice(bytes);
            hash_word(word, bytes.len() as u8, seed, salt)
        }
        None => xxh3_64_with_seed(bytes, seed.wrapping_add(u64::from(salt))),
    }
}

/// The same of at most eight bytes, with zeros behind them: the finalizer of MurmurHash3, by which
/// every bit depends on every other, in a tenth of the instructions of a hash for all lengths.
#[inline]
#[must_use]
pub fn hash_word(word: [u8; 8], len: u8, seed: u64, salt: u8) -> u64 {
    let salt = u64::from(salt) << 8 | u64::from(len);
    let mut hash = u64::from_le_bytes(word) ^ seed.wrapping_add(salt.wrapping_mul(ODD));
    hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}

/// Spreads the few salts over all bits: 2^64 by the golden ratio.
pub(crate) const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_at_the_chunk_marker_or_the_last_slash() {
        for (key, dirs, tail) in [
            (
                "era5/2m_temperature/c/120/44/7",
                "era5/2m_temperature/c/",
                "120/44/7",
            ),
            ("c/0", "c/", "0"),
            ("c/0.1", "c/", "0.1"),
            ("c", "", "c"),
            ("c/", "c/", ""),
            ("cc/0/1", "cc/0/", "1"),
            ("a/zarr.json", "a/", "zarr.json"),
            ("zarr.json", "", "zarr.json"),
            ("", "", ""),
            ("12", "", "12"),
            ("a/0.0.1", "a/", "0.0.1"),
            ("a/7", "a/", "7"),
            ("a/44/7", "a/44/", "7"),
            ("a/120/44/7", "a/120/", "44/7"),
            ("a/1/120/44/7", "a/1/", "120/44/7"),
            ("image/0/5/1/120/44/7", "image/0/5/1/", "120/44/7"),
            ("0/5/1/120/44/7", "0/5/1/", "120/44/7"),
            ("1/2/3", "1/", "2/3"),
            ("1/2", "1/", "2"),
            ("a/1/2//3/4", "a/1/2//3/", "4"),
            ("1/2/x/4", "1/2/x/", "4"),
            ("a/c/x/0", "a/c/x/", "0"),
            ("a/c//", "a/c/", "/"),
            ("ü/c/1", "ü/c/", "1"),
            ("/", "/", ""),
        ] {
            assert_eq!(split(key), (dirs, tail), "{key}");
        }
    }

    #[test]
    fn oddities_are_found_wherever_they_are() {
        for length in 1..=40 {
            for at in 0..length {
                for odd in ["/", ".", "//", "/.", "./", "/..", "\0", "-"] {
                    let mut key = "a".repeat(length);
                    key.replace_range(at..=at, odd);
                    let mut parts = key.split('/');
                    let plain = parts.all(|part| !matches!(part, "" | "." | ".."));
                    assert_eq!(is_known(&key), plain && odd != "\0", "{key:?}");
                }
            }
        }
    }

    #[test]
    fn only_plain_relative_paths_are_known() {
        for key in ["a", "a/b", ".zcachet", "a/.zcache/b", "ü", "..."] {
            assert!(is_known(key), "{key}");
        }
        for key in [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            "./a",
            "a/..",
            "..",
            ".zcache",
            ".zcache/a",
            "a\0",
        ] {
            assert!(!is_known(key), "{key}");
        }
    }

    #[test]
    fn hashes_of_names_that_differ_in_one_bit_differ_in_about_half() {
        let (mut changed, mut pairs) = (0, 0);
        for (seed, salt) in [(0, 0), (1, 3), (u64::MAX, 19), (ODD, 7)] {
            for word in [[0; 8], *b"12/34/56", [255; 8]] {
                let hash = hash_word(word, 8, seed, salt);
                for bit in 0..64 {
                    let other = (u64::from_le_bytes(word) ^ 1 << bit).to_le_bytes();
                    let apart = (hash ^ hash_word(other, 8, seed, salt)).count_ones();
                    assert!((8..=56).contains(&apart), "{word:?} {bit}: {apart}");
                    changed += apart;
                    pairs += 1;
                }
                for other in [
                    hash_word(word, 7, seed, salt),
                    hash_word(word, 8, seed ^ 1, salt),
                    hash_word(word, 8, seed, salt + 1),
                ] {
                    assert!((8..=56).contains(&(hash ^ other).count_ones()));
                }
            }
        }
        assert!((30..=34).contains(&(changed / pairs)));
        assert_eq!(hash(b"12/3", 5, 6), hash_word(*b"12/3\0\0\0\0", 4, 5, 6));
        assert_ne!(hash(b"a", 5, 6), hash(b"a\0", 5, 6));
    }

    /// What [`is_known`] and [`split`] mean, said as plainly as can be.
    fn known(key: &str) -> bool {
        let parts: Vec<&str> = key.split('/').collect();
        !key.contains('\0')
            && !parts.iter().any(|part| ["", ".", ".."].contains(part))
            && parts.first() != Some(&".zcache")
    }

    fn cut(key: &str) -> (&str, &str) {
        let coordinates = |tail: &str| {
            let plain = |c: char| c.is_ascii_digit() || c == '/' || c == '.';
            !tail.is_empty() && tail.chars().all(plain)
        };
        let markers = key.match_indices("c/").map(|(at, _)| at);
        let mut markers =
            markers.filter(|at| *at == 0 || key.as_bytes().get(at - 1) == Some(&b'/'));
        let marker = markers.find(|at| coordinates(key.get(at + 2..).unwrap_or("")));
        let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|c| c.is_ascii_digit());
        let numbers = key.rsplit('/').take_while(is_number).count();
        let kept = numbers.saturating_sub(1).clamp(1, 3);
        let slash = key.rmatch_indices('/').nth(kept - 1);
        let slash = slash.map_or(0, |(at, _)| at + 1);
        key.split_at(marker.map_or(slash, |at| at + 2))
    }

    proptest::proptest! {
        #[test]
        fn keys_are_what_they_mean(key in "[a./c0\u{e9}\0]{0,12}|(\\.zcache|c|a|\\.\\.?|[0-9]{1,2}){0,5}(/(c|a|\\.zcache|\\.\\.?|[0-9.]{1,3})){0,5}/?") {
            #[cfg(not(windows))]
            proptest::prop_assert_eq!(is_known(&key), known(&key), "{}", key);
            proptest::prop_assert_eq!(split(&key), cut(&key), "{}", key);
        }
    }

    proptest::proptest! {
        #[test]
        fn tails_begin_below_a_prefix_or_in_a_directory_that_is_named(
            prefix in "(a/)?(c/)?[0-9]{1,2}(/[0-9a]{1,2}){0,5}",
            more in "(/[0-9a]{1,2}){1,6}|/c/[0-9]",
        ) {
            let key = format!("{prefix}{more}");
            let dirs = split(&key).0;
            let below = dirs.len() > prefix.len();
            let mut above = above_tails_below(&prefix);
            proptest::prop_assert!(below || above.any(|path| path == dirs), "{}", key);
        }
    }

    #[test]
    fn numbers_are_reversible() {
        for n in [0, 1, 127, 128, 1 << 35, u64::MAX - 1, u64::MAX] {
            let text = SpanText::new(Span::Suffix(n));
            let mut bytes = text.bytes();
            assert_eq!(SpanText::read(&mut bytes), Some(n));
            assert!(bytes.is_empty());
        }
    }

    #[test]
    fn cache_keys_are_reversible() {
        for (key, span) in [
            ("a/b", Span::Full),
            (
                "a@3/b",
                Span::Range {
                    start: 0,
                    end: u64::MAX,
                },
            ),
            ("a/b", Span::Offset(7)),
            ("a@1-2", Span::Suffix(0)),
        ] {
            assert_eq!(Span::parse(&span.cache_key(key)), Some((key, span)));
        }
        for name in [
            ".zcache/x",
            ".zcache/ranges/a",
            ".zcache/ranges/a@1",
            ".zcache/ranges/a@01-2",
        ] {
            assert_eq!(Span::parse(name), None, "{name}");
        }
    }
}
