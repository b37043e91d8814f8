//! Names that do not fit into their cells: of every length and every alphabet, put into blocks that
//! others have left, where memory gives out, and with each word of them damaged, and each number
//! that leads to them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

#[path = "core/blocks.rs"]
#[allow(dead_code, reason = "shared with tests of growth and damage")]
mod blocks;

use std::mem::offset_of;
use std::rc::Rc;

use blocks::{Damage, Part, Plan, Refuse, Vectors};
use zcache::block::{Block, Header, Heap};
use zcache::cache::{Cache, Joined, Limits, Refusal, Room, Verify};
use zcache::cell::Cell;
use zcache::error::{Fault, Res};
use zcache::key::Span;

const UNBOUNDED: Limits = Limits {
    max_size: u64::MAX,
    max_age: None,
    lenient: false,
    flat: true,
    verify: Verify::Never,
};

/// Looks into the block that all of a test's steps after some damage need at most.
const PATIENCE: u64 = 100_000_000;

/// Characters of chunk coordinates, of hashes, of base64url, and others.
const ALPHABETS: [&str; 4] = [
    "0123456789.-",
    "0123456789abcdef",
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_",
    "xyz~.é",
];

/// A name of so many characters; another one for each `salt` below the length of the alphabet.
fn name(alphabet: usize, length: usize, salt: usize) -> String {
    let characters: Vec<char> = ALPHABETS[alphabet].chars().collect();
    let at = |n: usize| characters[(salt + n * n + n / 7) % characters.len()];
    (0..length).map(at).collect()
}

fn fill<B: Block>(cache: &mut Cache<B, ()>, key: &str, size: u64) -> Res<Option<Refusal>> {
    let Joined::Lead(ticket) = cache.join(key, Span::Full, (), 1, false)? else {
        return Ok(Some(Refusal::Held));
    };
    let refused = match cache.reserve(key, Span::Full, size, ticket, 1) {
        Ok(Room::Granted(id)) => cache.finish(id, Some(0), 1).map(|_| None),
        Ok(Room::Refused(refusal)) => Ok(Some(refusal)),
        Ok(Room::Evict(..)) => panic!("there is room for everything"),
        Err(fault) => Err(fault),
    };
    cache.land(key, ticket);
    refused
}

fn remove<B: Block>(cache: &mut Cache<B, ()>, key: &str) -> Res<()> {
    let victims = cache.forget(key)?;
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    cache.settled(&cells, &[])
}

fn bytes_of<B: Block>(cache: &Cache<B, ()>, key: &str) -> Option<u64> {
    let found = cache.peek(key, Span::Full, 1).unwrap();
    found.map(|found| found.size)
}

fn lengths() -> impl Iterator<Item = usize> {
    (1..=300).chain([500, 1_000, 4_096, 5_000])
}

#[test]
fn names_of_every_length() {
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 9).unwrap();
    let mut keys: Vec<String> = Vec::new();
    for length in lengths() {
        for alphabet in 0..ALPHABETS.len() {
            // The same names above a file, and one that only its last character tells apart.
            let name = name(alphabet, length, 0);
            keys.push(format!("{name}/zarr.json"));
            keys.push(format!("blobs/{name}0"));
            keys.push(format!("blobs/{name}"));
        }
    }
    keys.sort();
    keys.dedup();
    for (size, key) in (1..).zip(&keys) {
        assert_eq!(fill(&mut cache, key, size), Ok(None), "{key}");
    }
    cache.validate().unwrap();
    let held = |cache: &Cache<Heap, ()>| {
        let entries = cache.entries().unwrap();
        let mut held: Vec<String> = entries.into_iter().map(|entry| entry.0).collect();
        held.sort();
        held
    };
    assert_eq!(held(&cache), keys);
    for (size, key) in (1..).zip(&keys) {
        assert_eq!(bytes_of(&cache, key), Some(size), "{key}");
        assert_eq!(bytes_of(&cache, &format!("{key}!")), None, "{key}");
    }

    // Every second one goes and comes back, in another order, into blocks that others have left.
    let memory = cache.memory();
    for key in keys.iter().step_by(2) {
        remove(&mut cache, key).unwrap();
    }
    cache.validate().unwrap();
    let left: Vec<&String> = keys.iter().skip(1).step_by(2).collect();
    assert_eq!(held(&cache).iter().collect::<Vec<_>>(), left);
    for (n, key) in keys.iter().enumerate().step_by(2).rev() {
        assert_eq!(fill(&mut cache, key, n as u64 + 1), Ok(None));
    }
    cache.validate().unwrap();
    assert_eq!(cache.memory(), memory, "blocks are used again");
    for (size, key) in (1..).zip(&keys) {
        assert_eq!(bytes_of(&cache, key), Some(size), "{key}");
    }
    for key in &keys {
        remove(&mut cache, key).unwrap();
    }
    cache.validate().unwrap();
    assert!(cache.entries().unwrap().is_empty());
}

/// Bytes of text that a name of its own takes, beside its cell.
fn text_of(name: &str) -> u64 {
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 9).unwrap();
    fill(&mut cache, "a", 1).unwrap();
    let before = cache.memory();
    fill(&mut cache, name, 1).unwrap();
    // Word 0 is nobody's.
    (cache.memory() - before - 56).saturating_sub(4)
}

#[test]
fn bytes_of_a_name() {
    for (length, bytes) in [
        (8, 0),
        (9, 12),
        (20, 20),
        (64, 64),
        (65, 68),
        (128, 128),
        // 124 bytes in a block of 128 that leads to another one.
        (129, 128 + 8),
        (252, 128 + 128),
        (253, 128 + 128 + 8),
    ] {
        let name = "~".repeat(length);
        assert_eq!(text_of(&name), bytes, "{length} bytes");
    }
    for (alphabet, length, bytes) in [
        (0, 16, 0),
        (0, 17, 12),
        (1, 16, 0),
        (1, 17, 12),
        (1, 64, 32),
        (1, 128, 64),
        (2, 10, 0),
        (2, 11, 12),
        (2, 20, 16),
        (2, 64, 48),
        (2, 85, 64),
        // Beyond that nothing is coded.
        (1, 129, 136),
        (2, 86, 88),
    ] {
        let name = name(alphabet, length, 0);
        assert_eq!(text_of(&name), bytes, "{name}");
    }
}

/// Where there is no memory for another text, what larger ones have left is cut up; then values stay
/// uncached, the books stay right, and nothing is lost.
#[test]
fn memory_gives_out() {
    let plan = Rc::new(Plan::default());
    let mut cache = Cache::new(Vectors::new(&plan), UNBOUNDED, 3).unwrap();
    let large = |n: usize| format!("{n:04}{}", "~".repeat(596));
    let small = |n: usize| format!("{n:04}{}", "~".repeat(8));
    let mut held = 0;
    while held < 50 {
        assert_eq!(fill(&mut cache, &large(held), 1), Ok(None));
        held += 1;
    }
    plan.refuse.set(Refuse {
        texts: true,
        ..Refuse::default()
    });
    // Up to the end of what was grown into before.
    while fill(&mut cache, &large(held), 1) == Ok(None) {
        held += 1;
        assert!(held < 200);
    }
    cache.validate().unwrap();
    assert_eq!(cache.len() as usize, held);
    while fill(&mut cache, &small(held), 1) == Ok(None) {
        held += 1;
        assert!(held < 1000);
    }
    cache.validate().unwrap();
    let memory = cache.memory();

    remove(&mut cache, &large(7)).unwrap();
    assert_eq!(fill(&mut cache, &large(7), 1), Ok(None));
    remove(&mut cache, &large(8)).unwrap();
    remove(&mut cache, &large(9)).unwrap();
    // 1,200 bytes, of which ten blocks of 32 words and no others are made, hold a hundred small ones.
    let mut count = 0;
    while fill(&mut cache, &small(1000 + count), 1) == Ok(None) {
        count += 1;
        cache.validate().unwrap();
    }
    assert!((95..=107).contains(&count), "{count}");
    assert_eq!(
        fill(&mut cache, &large(8), 1),
        Ok(Some(Refusal::Full)),
        "nothing joins the pieces"
    );
    cache.validate().unwrap();
    let words = cache.memory() - memory;
    assert_eq!(words % 56, 0, "cells only");

    plan.refuse.set(Refuse::default());
    for n in [8, 9] {
        assert_eq!(fill(&mut cache, &large(n), 1), Ok(None));
    }
    for n in 0..count {
        assert!(bytes_of(&cache, &small(1000 + n)).is_some());
    }
    cache.validate().unwrap();
}

/// Each word, overwritten with what may lead somewhere and what cannot: every step ends, with an
/// error or an answer, and what is not found damaged by then is text that names something else.
#[test]
fn damage_to_every_word() {
    let plan = Rc::new(Plan::default());
    let build = |plan: &Rc<Plan>| {
        plan.patience.set(0);
        let mut cache = Cache::new(Vectors::new(plan), UNBOUNDED, 3).unwrap();
        let mut keys = Vec::new();
        for length in [9, 14, 64, 128, 129, 250, 400] {
            for (alphabet, salt) in [(1, 0), (2, 1), (3, 0), (3, 1), (3, 2)] {
                keys.push(format!("blobs/{}", name(alphabet, length, salt)));
            }
        }
        for key in &keys {
            assert_eq!(fill(&mut cache, key, 1), Ok(None));
        }
        // Free blocks of each of these sizes, at least two in a list.
        for key in keys
            .iter()
            .skip(3)
            .step_by(5)
            .chain(keys.iter().skip(4).step_by(5))
        {
            remove(&mut cache, key).unwrap();
        }
        cache.validate().unwrap();
        (cache, keys)
    };
    build(&plan);
    let words = plan.texts_used.get() as usize;
    let mut noticed = 0;
    for at in 0..words {
        for how in [
            Damage::Set(0),
            Damage::Set(1),
            Damage::Set(u32::MAX),
            Damage::Flip(at as u8),
            Damage::Add(1),
            Damage::Copy(at / 2),
        ] {
            let (mut cache, keys) = build(&plan);
            plan.damage.replace(vec![(Part::Texts, at, how)]);
            plan.fuse.set(1);
            plan.patience.set(PATIENCE);
            // A change, so that the damage is done.
            let _ = fill(&mut cache, "a", 1);
            noticed += usize::from(cache.validate().is_err());
            for key in &keys {
                let _ = cache.peek(key, Span::Full, 1);
                let _ = fill(&mut cache, key, 2);
            }
            let _ = cache.entries();
            for key in &keys {
                let _ = remove(&mut cache, key);
                let _ = fill(&mut cache, &format!("{key}~"), 2);
            }
            match cache.validate() {
                Ok(()) | Err(Fault::Corrupt(_)) => {}
                Err(Fault::Full) => panic!("validation does not grow"),
            }
        }
    }
    // All but what lies in free blocks, and damage that changes nothing.
    assert!(noticed > 2 * words);
}

/// The same stored bytes stand for different names.
#[test]
fn names_of_the_same_bytes() {
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 9).unwrap();
    let names = [
        ["abcdefgh", "6162636465666768"],
        ["0123456789a", "0123456789a0"],
        ["zyxwvutsrqp", "zyxwvutsrqpA"],
        ["aaaaaaaaaaaaaaaaaaa/12", "aaaaaaaaaaaaaaaaaaa/A"],
    ];
    for (size, name) in (1..).zip(names.as_flattened()) {
        assert_eq!(bytes_of(&cache, name), None, "{name}");
        assert_eq!(fill(&mut cache, name, size), Ok(None));
    }
    cache.validate().unwrap();
    for (size, name) in (1..).zip(names.as_flattened()) {
        assert_eq!(bytes_of(&cache, name), Some(size), "{name}");
    }
}

/// Where a text lies, how long it is and which blocks are free is checked before it is used.
#[test]
fn numbers_that_lead_nowhere() {
    let plan = Rc::new(Plan::default());
    let name = "~".repeat(300);
    let damaged = |damage: &[(Part, usize, u32)]| {
        plan.patience.set(0);
        let mut cache = Cache::new(Vectors::new(&plan), UNBOUNDED, 3).unwrap();
        for key in [&name, "~~~~~~~~~~~~~", "a"] {
            assert_eq!(fill(&mut cache, key, 1), Ok(None));
        }
        remove(&mut cache, "~~~~~~~~~~~~~").unwrap();
        cache.validate().unwrap();
        let set = |&(part, at, number)| (part, at, Damage::Set(number));
        plan.damage.replace(damage.iter().map(set).collect());
        plan.fuse.set(1);
        plan.patience.set(1_000_000);
        // A change that leaves the texts alone.
        remove(&mut cache, "a").unwrap();
        assert!(cache.validate().is_err(), "{damage:?}");
        cache
    };
    // Cell 1 is the root, and the first name is in cell 2.
    let text = (2 * size_of::<Cell>() + offset_of!(Cell, text)) / 4;
    // A text begins to be stored at its end.
    let used = 1 + 13 + 32 + 32 + 4;
    for (at, number) in [
        (text, 0),
        (text, used),
        (text, used - 1),
        (text, u32::MAX),
        (text + 1, u32::MAX),
        (text + 1, 50_000),
    ] {
        let mut cache = damaged(&[(Part::Cells, at, number)]);
        assert!(cache.entries().is_err());
        assert!(remove(&mut cache, &name).is_err() || at > text);
        if at == text {
            assert!(cache.peek(&name, Span::Full, 1).is_err());
        }
    }
    // A chain that bites its tail, of a text without end.
    let first = 1 + 13 + 32;
    let endless = [
        (Part::Cells, text + 1, u32::MAX),
        (Part::Texts, first as usize, first),
    ];
    assert!(damaged(&endless).entries().is_err());
    // The text is beyond what is in use.
    let at = offset_of!(Header, texts_used) / 4;
    let cache = damaged(&[(Part::Header, at, 2)]);
    assert!(cache.entries().is_err());
    // A block that was free is in no list any more, or in two, or one that is in use is in a list.
    let at = offset_of!(Header, free_texts) / 4 + 3;
    damaged(&[(Part::Header, at, 0)]);
    damaged(&[(Part::Header, at - 1, used - 4)]);
    for at in [at, at + 1] {
        damaged(&[(Part::Header, at, 2)]);
    }
    for number in [used - 1, used, u32::MAX] {
        let mut cache = damaged(&[(Part::Header, at, number)]);
        assert!(fill(&mut cache, "~~~~~~~~~~~~~", 1).is_err());
    }
}
