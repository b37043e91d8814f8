//! Keys: which ones may be cached, and how their text is split into parts that are stored once.
//!
//! A Zarr key such as `era5/2m_temperature/c/120/44/7` is a path of *directories* and a *tail*.
//! The directories (`era5`, `2m_temperature`, `c`) are shared by millions of keys and stored once;
//! the tail (`120/44/7`) is stored with the entry. The tail is
//!
//! - what follows the last `c/`, where that is chunk coordinates only (Zarr format 3), else
//! - up to three numbers at the end, but not the first of a run of numbers, which may name an array
//!   or a level (format 2 with `/` between coordinates: `image/0/5/1/120/44/7`), else
//! - what follows the last slash.
//!
//! The split depends on the key alone, so a lookup never searches for it.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Prefix in the cache store that is reserved for zcache itself.
pub const RESERVED: &str = ".zcache/";

/// Bytes of the longest directory name or tail that the index stores: no file system takes a longer name. Keys with a
/// longer one are not cached.
pub const MAX_LABEL: usize = 255;

/// Bytes of the longest key that is cached. A path has at most 4,095, and a range has a folder, and its numbers, beside the
/// key.
pub const MAX_KEY: usize = 4000;

/// Whether a cache may hold this key: a plain relative path, so that it names one value and only
/// one key names it; outside the reserved prefix; and no longer, nor with longer parts, than fits into the index.
#[must_use]
pub fn is_cacheable(key: &str) -> bool {
    let bytes = key.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if bytes.len() > MAX_KEY {
        return false;
    }
    let (mut suspicious, mut has_nul) = (false, *first == 0);
    let mut check = |window: &[u8; WINDOW + 1]| {
        let (a, b) = check_window(window);
        suspicious |= a;
        has_nul |= b;
    };
    for window in bytes.windows(WINDOW + 1).step_by(WINDOW) {
        if let Ok(window) = window.try_into() {
            check(window);
        }
    }
    match bytes.last_chunk() {
        Some(window) => check(window),
        None => {
            let mut window = [b'-'; WINDOW + 1];
            window.iter_mut().zip(bytes).for_each(|(to, c)| *to = *c);
            check(&window);
        }
    }
    let plain = !suspicious && !is_slash_or_dot(*first);
    !has_nul && *last != b'/' && (plain || has_plain_parts(bytes)) && labels_fit(key)
}

/// Whether every part of a key fits into the index.
#[inline]
#[must_use]
pub fn labels_fit(key: &str) -> bool {
    key.len() <= MAX_LABEL || {
        let (dirs, tail) = split(key);
        tail.len() <= MAX_LABEL && directories(dirs).all(|name| name.len() <= MAX_LABEL)
    }
}

/// Pairs of neighbouring characters that are checked together.
const WINDOW: usize = 16;

/// Whether a part of the path begins with a dot or a slash, and whether there is a NUL after the
/// first character. Every miss asks this of its key, so it is branchless: the compiler turns the
/// loop into vector comparisons.
fn check_window(window: &[u8; WINDOW + 1]) -> (bool, bool) {
    let [first @ .., _] = window;
    let [_, second @ ..] = window;
    let (mut suspicious, mut has_nul) = (0, 0);
    for (a, b) in first.iter().zip(second) {
        suspicious |= u8::from(*a == b'/') & u8::from(is_slash_or_dot(*b));
        has_nul |= u8::from(*b == 0);
    }
    (suspicious != 0, has_nul != 0)
}

fn is_slash_or_dot(c: u8) -> bool {
    c | 1 == b'/' // `.` is the character before `/`
}

fn has_plain_parts(bytes: &[u8]) -> bool {
    let mut parts = bytes.split(|c| *c == b'/');
    parts.all(|part| !matches!(part, b"" | b"." | b".."))
        && !(bytes.starts_with(b".zcache") && matches!(bytes.get(7), None | Some(b'/')))
}

/// "", every directory above a key (without trailing slash), and the key itself: a change of any
/// of these changes the key.
pub fn and_above(key: &str) -> impl Iterator<Item = &str> {
    let above = key.match_indices('/').filter_map(|(at, _)| key.get(..at));
    std::iter::once("").chain(above).chain(std::iter::once(key))
}

/// Splits a key into its directories (with trailing slash, or empty) and its tail.
#[must_use]
pub fn split(key: &str) -> (&str, &str) {
    let bytes = key.as_bytes();
    let is_coordinate = |c: &u8| c.is_ascii_digit() || matches!(c, b'/' | b'.');
    let marker = bytes.iter().rposition(|c| !is_coordinate(c));
    let is_marker = |at: &usize| match bytes.get(..=*at) {
        Some(b"c" | [.., b'/', b'c']) => matches!(bytes.get(at + 1..), Some([b'/', _, ..])),
        _ => false,
    };
    let at = match marker.filter(is_marker) {
        Some(at) => at + 2,
        None => numbers_at_end(bytes),
    };
    key.split_at_checked(at).unwrap_or(("", key))
}

/// Numbers of a tail where no marker tells coordinates from names.
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

/// Directories above `prefix` that hold keys below `prefix` all the same, because their tails
/// begin inside it.
pub fn above_tails_below(prefix: &str) -> impl Iterator<Item = String> {
    let inside = ["/0", "/0/0"].map(|more| format!("{prefix}{more}"));
    let paths = inside.map(|inside| split(&inside).0.to_owned());
    let len = prefix.len();
    let [one, other] = paths.map(|path| Some(path).filter(|path| path.len() <= len));
    let other = other.filter(|path| Some(path) != one.as_ref());
    one.into_iter().chain(other)
}

/// Whether a key is a prefix or below it; each is below "".
#[must_use]
pub fn is_below(key: impl AsRef<[u8]>, prefix: &str) -> bool {
    let rest = key.as_ref().strip_prefix(prefix.as_bytes());
    prefix.is_empty() || matches!(rest, Some([] | [b'/', ..]))
}

/// The directories in the first half of [`split`], outermost first.
pub fn directories(dirs: &str) -> impl Iterator<Item = &str> {
    dirs.split_inclusive('/')
        .map(|dir| dir.strip_suffix('/').unwrap_or(dir))
}

/// Hash of a label below a directory; `seed` is the hash of the directory.
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

/// The same for at most eight bytes, padded with zeros: the finalizer of MurmurHash3, in which
/// every bit of the result depends on every bit of the input, in a tenth of the instructions of a
/// hash for any length.
#[inline]
#[must_use]
pub fn hash_word(word: [u8; 8], len: u8, seed: u64, salt: u8) -> u64 {
    let salt = u64::from(salt) << 8 | u64::from(len);
    let mut hash = u64::from_le_bytes(word) ^ seed.wrapping_add(salt.wrapping_mul(ODD));
    hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}

/// Spreads small numbers over all bits: 2^64 divided by the golden ratio.
pub(crate) const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
