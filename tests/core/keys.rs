//! Keys, ranges, sizes and times that tests draw from: the ordinary ones of Zarr, and unusual ones
//! of every kind.

use proptest::prelude::*;
use zcache::key::ByteRange;

/// A chunk key of one of a few arrays, so that keys share directories.
pub(crate) fn chunk() -> impl Strategy<Value = String> {
    let array = prop::sample::select(vec!["", "a/", "a/b/", "era5/2m_temperature/", "ü/", "c/"]);
    let numbers = prop::collection::vec(prop_oneof![4 => 0u64..3, 1 => any::<u64>()], 1..5);
    let separator = prop::sample::select(vec!["/", "."]);
    (array, numbers, separator, prop::bool::weighted(0.8)).prop_map(|(array, numbers, sep, v3)| {
        let numbers: Vec<String> = numbers.iter().map(u64::to_string).collect();
        format!("{array}{}{}", if v3 { "c/" } else { "" }, numbers.join(sep))
    })
}

/// Any key at all. Names of the reserved prefix are left out: they never reach the index.
pub(crate) fn key() -> impl Strategy<Value = String> {
    let metadata = prop::sample::select(vec![
        "zarr.json",
        "a/zarr.json",
        "a/b/zarr.json",
        "a/.zarray",
        "a",
        "a/b",
        "a/c",
        "a/c/0",
        "a/c/0/1",
        "a/c/x",
        "c",
        "a@0-5",
        // Packed, the digits are the byte of the letter.
        "a/c/41",
        "a/c/A",
        // And these digits those of eight letters.
        "a/6162636465666768",
        "a/abcdefgh",
    ]);
    prop_oneof![
        6 => chunk(),
        3 => metadata.prop_map(str::to_owned),
        1 => Just(String::new()),
        1 => "/{1,6}",
        1 => "(a|b|c|0|1|\\.|/){0,9}",
        1 => any::<String>(),
        1 => "\\PC{0,40}",
        1 => long(),
        3 => name(300),
    ]
    .prop_filter("reserved", |key| !key.starts_with(".zcache/"))
}

/// A name such as a hash, an id or a file has, of so many characters at most, below a directory or
/// not. Names of one length differ in their first character, so that they meet in one list of
/// free strings.
pub(crate) fn name(most: usize) -> impl Strategy<Value = String> {
    let kinds = prop::sample::select(vec![
        "0123456789/.-",
        "0123456789abcdef",
        "0123456789abcdefABCDEFGHIJKLMNOPQRSTUVWXYZghijklmnopqrstuvwxyz-_",
        "0123456789abcdef.~",
    ]);
    let length = prop_oneof![
        3 => 0..=most,
        1 => prop::sample::select(vec![8usize, 9, 10, 16, 17, 64, 128, 129, 252, 253]),
        1 => 2_000usize..4_000,
    ];
    (
        prop::sample::select(vec!["", "blobs/"]),
        kinds,
        length,
        any::<prop::sample::Index>(),
    )
        .prop_map(|(dir, kind, length, start)| {
            let start = start.index(kind.len());
            let mut characters = kind.chars().cycle().skip(start).step_by(3);
            let first = characters.by_ref().take(length);
            format!("{dir}{}", first.collect::<String>())
        })
}

fn long() -> impl Strategy<Value = String> {
    prop_oneof![
        (40usize..4000).prop_map(|n| "x".repeat(n)),
        (40usize..1500, 0usize..200).prop_map(|(n, m)| format!(
            "{}/c/{}",
            "ä".repeat(n),
            "7".repeat(m)
        )),
        (1usize..60).prop_map(|n| "dir/".repeat(n) + "zarr.json"),
        (1usize..60).prop_map(|n| "c/".repeat(n)),
        (10usize..400).prop_map(|n| "c/".to_owned() + &"12/".repeat(n) + "0"),
    ]
}

/// Which bytes of a key.
pub(crate) fn range() -> impl Strategy<Value = ByteRange> {
    prop_oneof![
        4 => Just(ByteRange::Full),
        3 => (edge(), edge()).prop_map(|(start, end)| ByteRange::Range { start, end }),
        2 => edge().prop_map(ByteRange::Offset),
        2 => edge().prop_map(ByteRange::Suffix),
    ]
}

/// A number that is small, or at an end of what fits.
pub(crate) fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0u64..30,
        1 => 0u64..10_000,
        1 => (0u64..30).prop_map(|n| u64::MAX - n),
        1 => any::<u64>(),
    ]
}

/// Milliseconds: around the ages that tests use, and at the ends of what a cell can hold.
pub(crate) fn time() -> impl Strategy<Value = u64> {
    prop_oneof![
        10 => 0u64..8_000,
        2 => 1_000_000u64..1_003_000,
        1 => (0u64..4_000).prop_map(|n| (1 << 48) - 2_000 + n),
        1 => (0u64..2_000).prop_map(|n| u64::MAX - n),
    ]
}
