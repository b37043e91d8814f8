//! Keys: which ones may be cached, how they are split and hashed, and the names of their ranges.

use zcache::key::{
    ByteRange, MAX_KEY, MAX_LABEL, RangeLabel, above_tails_below, hash, hash_word, is_cacheable,
    split,
};

/// An odd number with mixed bits: 2^64 divided by the golden ratio.
const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

#[test]
fn split_cuts_at_the_chunk_marker_or_the_last_slash() {
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
fn is_cacheable_finds_suspicious_parts_at_every_position() {
    for length in 1..=40 {
        for at in 0..length {
            for odd in ["/", ".", "//", "/.", "./", "/..", "\0", "-"] {
                let mut key = "a".repeat(length);
                key.replace_range(at..=at, odd);
                let mut parts = key.split('/');
                let plain = parts.all(|part| !matches!(part, "" | "." | ".."));
                assert_eq!(is_cacheable(&key), plain && odd != "\0", "{key:?}");
            }
        }
    }
}

#[test]
fn is_cacheable_refuses_a_key_that_is_longer_than_any_path() {
    let longest = "a/".repeat(MAX_KEY / 2 - 1) + "bc";
    assert_eq!(longest.len(), MAX_KEY);
    assert!(is_cacheable(&longest));
    assert!(!is_cacheable(&format!("{longest}d")));
}

#[test]
fn is_cacheable_accepts_plain_relative_paths_only() {
    for key in ["a", "a/b", ".zcachet", "a/.zcache/b", "ü", "..."] {
        assert!(is_cacheable(key), "{key}");
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
        assert!(!is_cacheable(key), "{key}");
    }
}

#[test]
fn is_cacheable_rejects_parts_longer_than_a_label() {
    for (length, fits) in [(MAX_LABEL, true), (MAX_LABEL + 1, false)] {
        let part = "x".repeat(length);
        let coordinates = "1".repeat(length);
        for key in [
            part.clone(),
            format!("a/b/{part}"),
            format!("{part}/zarr.json"),
            format!("a/c/{coordinates}"),
        ] {
            assert_eq!(is_cacheable(&key), fits, "{key}");
        }
    }
    assert!(is_cacheable(&format!("{}zarr.json", "group/".repeat(200))));
}

#[test]
fn hash_word_one_bit_changed_changes_half_the_bits() {
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

/// [`is_cacheable`] and [`split`], defined as plainly as possible.
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
    let mut markers = markers.filter(|at| *at == 0 || key.as_bytes().get(at - 1) == Some(&b'/'));
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
    fn is_cacheable_and_split_match_their_plain_definitions(key in "[a./c0\u{e9}\0]{0,12}|(\\.zcache|c|a|\\.\\.?|[0-9]{1,2}){0,5}(/(c|a|\\.zcache|\\.\\.?|[0-9.]{1,3})){0,5}/?") {
        proptest::prop_assert_eq!(is_cacheable(&key), known(&key), "{}", key);
        proptest::prop_assert_eq!(split(&key), cut(&key), "{}", key);
    }
}

proptest::proptest! {
    #[test]
    fn above_tails_below_names_every_directory_outside_the_prefix(
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
fn range_label_round_trips() {
    for n in [0, 1, 127, 128, 1 << 35, u64::MAX - 1, u64::MAX] {
        let label = RangeLabel::new(ByteRange::Suffix(n));
        let mut bytes = label.bytes();
        assert_eq!(RangeLabel::read(&mut bytes), Some(n));
        assert!(bytes.is_empty());
    }
}

#[test]
fn cache_key_round_trips() {
    for (key, range) in [
        ("a/b", ByteRange::Full),
        (
            "a@3/b",
            ByteRange::Range {
                start: 0,
                end: u64::MAX,
            },
        ),
        ("a/b", ByteRange::Offset(7)),
        ("a@1-2", ByteRange::Suffix(0)),
    ] {
        assert_eq!(ByteRange::parse(&range.cache_key(key)), Some((key, range)));
    }
    for name in [
        ".zcache/x",
        ".zcache/ranges/a",
        ".zcache/ranges/a@1",
        ".zcache/ranges/a@01-2",
    ] {
        assert_eq!(ByteRange::parse(name), None, "{name}");
    }
}
