//! The string arena: labels that do not fit into their cells, of every length, in reused strings,
//! when memory runs out, and with every word of them damaged.

use std::mem::offset_of;
use std::rc::Rc;

use crate::faulty_storage::{Damage, Part, Plan, Refuse, Vectors};
use zcache::arena::{Cell, Header, Heap};
use zcache::cache::{Cache, Joined, Limits, Peers, RejectReason, Reserve, START};
use zcache::error::{Error, Result};
use zcache::key::{ByteRange, MAX_LABEL};

const UNBOUNDED: Limits = Limits::bounded(u64::MAX);

/// Accesses to the storage that all steps of a test after some damage need at most.
const PATIENCE: u64 = 100_000_000;

/// Characters of chunk coordinates, of hashes, of base64url, and others.
const ALPHABETS: [&str; 4] = [
    "0123456789.-",
    "0123456789abcdef",
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_",
    "xyz~.",
];

/// A name of so many characters; another one for each `salt` below the length of the alphabet.
fn name(alphabet: usize, length: usize, salt: usize) -> String {
    let characters: Vec<char> = ALPHABETS[alphabet].chars().collect();
    let at = |n: usize| characters[(salt + n * n + n / 7) % characters.len()];
    (0..length).map(at).collect()
}

fn fill<S: Peers>(cache: &mut Cache<S, ()>, key: &str, size: u64) -> Result<Option<RejectReason>> {
    let Joined::Lead(ticket) = cache.join(key, ByteRange::Full, (), 1, false)? else {
        return Ok(Some(RejectReason::AlreadyCached));
    };
    let refused = match cache.reserve(key, ByteRange::Full, size, ticket, 1) {
        Ok(Reserve::Granted(id)) => cache.commit(id, Some(0), 1).map(|_| None),
        Ok(Reserve::Rejected(reason)) => Ok(Some(reason)),
        Ok(Reserve::NeedsEviction(..)) => panic!("nothing needs evicting"),
        Err(error) => Err(error),
    };
    cache.complete_flight(key, ticket);
    refused
}

fn remove<S: Peers>(cache: &mut Cache<S, ()>, key: &str) -> Result<()> {
    let victims = cache.drop_missing(key)?;
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    cache.deletes_done(&cells, &[])
}

fn bytes_of<S: Peers>(cache: &Cache<S, ()>, key: &str) -> Option<u64> {
    let found = cache.peek(key, ByteRange::Full, 1).unwrap();
    found.map(|found| found.size)
}

#[test]
fn labels_of_every_length_are_found_after_reuse() {
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 9).unwrap();
    let mut keys: Vec<String> = Vec::new();
    for length in 1..MAX_LABEL {
        for alphabet in 0..ALPHABETS.len() {
            // The same name as a directory, and one that differs in its last character only.
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
        let mut held: Vec<String> = entries.into_iter().map(|entry| entry.key).collect();
        held.sort();
        held
    };
    assert_eq!(held(&cache), keys);
    for (size, key) in (1..).zip(&keys) {
        assert_eq!(bytes_of(&cache, key), Some(size), "{key}");
        assert_eq!(bytes_of(&cache, &format!("{key}!")), None, "{key}");
    }

    // Every second one goes and comes back, in another order, into strings that others have freed.
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
    assert_eq!(cache.memory(), memory, "strings are reused");
    for (size, key) in (1..).zip(&keys) {
        assert_eq!(bytes_of(&cache, key), Some(size), "{key}");
    }
    for key in &keys {
        remove(&mut cache, key).unwrap();
    }
    cache.validate().unwrap();
    assert!(cache.entries().unwrap().is_empty());
}

/// Bytes of strings that a name takes beside its cell.
fn string_bytes(name: &str) -> u64 {
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 9).unwrap();
    fill(&mut cache, "a", 1).unwrap();
    let before = cache.memory();
    fill(&mut cache, name, 1).unwrap();
    // Word 0 is never used.
    (cache.memory() - before - 56).saturating_sub(4)
}

#[test]
fn string_takes_its_length_in_words() {
    for (length, bytes) in [(8, 0), (9, 12), (20, 20), (64, 64), (65, 68), (255, 256)] {
        let name = "~".repeat(length);
        assert_eq!(string_bytes(&name), bytes, "{length} bytes");
    }
    for (length, bytes) in [(16, 0), (17, 20)] {
        let name = name(0, length, 0);
        assert_eq!(string_bytes(&name), bytes, "{name}");
    }
}

#[test]
fn key_with_a_longer_part_is_rejected() {
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 9).unwrap();
    let long = "~".repeat(MAX_LABEL + 1);
    let digits = "1".repeat(MAX_LABEL + 1);
    for key in [
        long.clone(),
        format!("{long}/zarr.json"),
        format!("a/{long}/c/0"),
        format!("a/c/{digits}"),
    ] {
        for range in [ByteRange::Full, ByteRange::Offset(1)] {
            let Joined::Lead(ticket) = cache.join(&key, range, (), 1, false).unwrap() else {
                panic!("{key} is not cached")
            };
            let answer = cache.reserve(&key, range, 1, ticket, 1).unwrap();
            assert_eq!(answer, Reserve::Rejected(RejectReason::KeyTooLong));
            cache.complete_flight(&key, ticket);
            assert!(!cache.adopt(&range.cache_key(&key), 1, 1).unwrap());
            assert_eq!(cache.lookup(&key, range, 1), Ok(None));
        }
        assert!(cache.begin_write(&key).unwrap().is_empty());
        cache.end_write(&key, true, None).unwrap();
        assert!(cache.drain_prefix(&key, START).unwrap().0.is_empty());
    }
    assert!(cache.entries().unwrap().is_empty());
    cache.validate().unwrap();
}

/// Without memory for another string, longer free ones are split; then values stay uncached, and
/// nothing is lost.
#[test]
fn memory_runs_out_splits_longer_strings() {
    let plan = Rc::new(Plan::default());
    let mut cache = Cache::new(Vectors::new(&plan), UNBOUNDED, 3).unwrap();
    let large = |n: usize| format!("{n:04}{}", "~".repeat(124));
    let small = |n: usize| format!("{n:04}{}", "~".repeat(8));
    let mut held = 0;
    while held < 100 {
        assert_eq!(fill(&mut cache, &large(held), 1), Ok(None));
        held += 1;
    }
    plan.refuse.set(Refuse {
        strings: true,
        ..Refuse::default()
    });
    // Up to the end of what was grown into before.
    while fill(&mut cache, &large(held), 1) == Ok(None) {
        held += 1;
        assert!(held < 300);
    }
    cache.validate().unwrap();
    assert_eq!(cache.len() as usize, held);
    while fill(&mut cache, &small(held), 1) == Ok(None) {
        held += 1;
        assert!(held < 3000);
    }
    cache.validate().unwrap();
    let memory = cache.memory();

    remove(&mut cache, &large(7)).unwrap();
    assert_eq!(fill(&mut cache, &large(7), 1), Ok(None));
    remove(&mut cache, &large(8)).unwrap();
    remove(&mut cache, &large(9)).unwrap();
    // Each of the two strings of 32 words holds ten of 3 words.
    let mut count = 0;
    while fill(&mut cache, &small(5000 + count), 1) == Ok(None) {
        count += 1;
        cache.validate().unwrap();
    }
    assert_eq!(count, 20);
    assert_eq!(
        fill(&mut cache, &large(8), 1),
        Ok(Some(RejectReason::IndexFull)),
        "the parts are not joined"
    );
    cache.validate().unwrap();
    let words = cache.memory() - memory;
    assert_eq!(words % 56, 0, "cells only");

    plan.refuse.set(Refuse::default());
    for n in [8, 9] {
        assert_eq!(fill(&mut cache, &large(n), 1), Ok(None));
    }
    for n in 0..count {
        assert!(bytes_of(&cache, &small(5000 + n)).is_some());
    }
    cache.validate().unwrap();
}

/// Every word is overwritten with numbers that lead somewhere and numbers that do not: every step
/// ends with an error or an answer.
#[test]
fn damage_to_any_word_ends_in_an_answer_or_an_error() {
    let plan = Rc::new(Plan::default());
    let build = |plan: &Rc<Plan>| {
        plan.patience.set(0);
        let mut cache = Cache::new(Vectors::new(plan), UNBOUNDED, 3).unwrap();
        let mut keys = Vec::new();
        for length in [9, 14, 64, 127, 128] {
            for (alphabet, salt) in [(1, 0), (2, 1), (3, 0), (3, 1), (3, 2)] {
                keys.push(format!("blobs/{}", name(alphabet, length, salt)));
            }
        }
        for key in &keys {
            assert_eq!(fill(&mut cache, key, 1), Ok(None));
        }
        // Free strings of each of these sizes, at least two in a list.
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
    let words = plan.strings_used.get() as usize;
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
            plan.damage.replace(vec![(Part::Strings, at, how)]);
            plan.fuse.set(1);
            plan.patience.set(PATIENCE);
            // A change, which sets off the damage.
            let _ = fill(&mut cache, "a", 1);
            noticed += usize::from(cache.validate().is_err());
            for key in &keys {
                let _ = cache.peek(key, ByteRange::Full, 1);
                let _ = fill(&mut cache, key, 2);
            }
            let _ = cache.entries();
            for key in &keys {
                let _ = remove(&mut cache, key);
                let _ = fill(&mut cache, &format!("{key}~"), 2);
            }
            match cache.validate() {
                Ok(()) | Err(Error::Corrupt(_)) => {}
                Err(Error::Full | Error::Refused(_) | Error::Lost(_) | Error::Unusable(..)) => {
                    panic!("validation does not grow")
                }
            }
        }
    }
    // All but damage in free strings and damage that changes nothing.
    assert!(noticed > 2 * words);
}

#[test]
fn labels_of_equal_bytes_and_different_packing_differ() {
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), UNBOUNDED, 9).unwrap();
    let names = [
        ["abcdefgh", "6162636465666768"],
        ["array/c/41", "array/c/A"],
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

/// Position and length of a string, and the free lists, are checked before they are used.
#[test]
fn damaged_positions_and_lengths_are_errors() {
    let plan = Rc::new(Plan::default());
    let name = "~".repeat(MAX_LABEL);
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
        // A change that touches no string.
        remove(&mut cache, "a").unwrap();
        assert!(cache.validate().is_err(), "{damage:?}");
        cache
    };
    // Cell 1 is the root, and the first name is in cell 2.
    let label = (2 * size_of::<Cell>() + offset_of!(Cell, label)) / 4;
    // Word 0, the name, and 13 characters that were freed.
    let used = 1 + 64 + 4;
    for (at, number) in [
        (label, 0),
        (label, used),
        (label, used - 1),
        (label, u32::MAX),
        (label + 1, u32::MAX),
        (label + 1, 50_000),
    ] {
        let mut cache = damaged(&[(Part::Cells, at, number)]);
        assert!(cache.entries().is_err());
        assert!(remove(&mut cache, &name).is_err());
        assert!(cache.peek(&name, ByteRange::Full, 1).is_err());
    }
    // The string is beyond those in use.
    let at = offset_of!(Header, strings_used) / 4;
    let cache = damaged(&[(Part::Header, at, 2)]);
    assert!(cache.entries().is_err());
    // A free string is in no list or in two, or one in use is in a list.
    let at = offset_of!(Header, free_strings) / 4 + 3;
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
