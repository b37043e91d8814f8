//! The tree: prefixes among numbers, more directories than the path cache holds, and the memory of
//! an index of image planes.

use std::collections::BTreeSet;

use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Reserve};
use zcache::key::ByteRange;

type Index = Cache<Heap, ()>;

fn index(max_size: u64) -> Index {
    let limits = Limits::bounded(max_size);
    Cache::new(Heap::default(), limits, 7).unwrap()
}

fn held(index: &Index) -> BTreeSet<String> {
    let entries = index.entries().unwrap();
    entries.into_iter().map(|entry| entry.key).collect()
}

/// Keys of numbers as images have them, of every depth, with metadata and ranges between them.
fn numbers() -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for array in ["", "image/", "image/labels/", "c/", "1/"] {
        keys.insert(format!("{array}.zattrs"));
        let mut paths = vec![String::new()];
        for _ in 0..5 {
            let longer = paths.iter().flat_map(|path| {
                ["0", "1", "12"]
                    .map(|n| format!("{path}{}{n}", if path.is_empty() { "" } else { "/" }))
            });
            paths = longer.collect();
            keys.extend(paths.iter().map(|path| format!("{array}{path}")));
            keys.extend(
                paths
                    .iter()
                    .step_by(7)
                    .map(|path| format!("{array}{path}/.zarray")),
            );
            keys.extend(
                paths
                    .iter()
                    .step_by(5)
                    .map(|path| format!("{array}{path}/c/0/1")),
            );
        }
    }
    keys
}

#[test]
fn drain_prefix_among_numbers_drops_only_what_is_below() {
    let keys = numbers();
    let mut full = index(u64::MAX);
    for key in &keys {
        assert!(full.adopt(key, 1, 1).unwrap());
    }
    full.validate().unwrap();
    assert_eq!(held(&full), keys);
    let mut left = keys.clone();
    // The longest first, so that each still finds something.
    let mut prefixes: Vec<&str> = keys
        .iter()
        .filter_map(|key| Some(key.rsplit_once('/')?.0))
        .collect();
    prefixes.sort_by_key(|prefix| (usize::MAX - prefix.matches('/').count(), prefix.len()));
    prefixes.dedup();
    for prefix in prefixes.into_iter().step_by(3) {
        loop {
            let victims = full.drain_prefix(prefix).unwrap();
            if victims.is_empty() {
                break;
            }
            let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
            full.deletes_done(&cells, &[]).unwrap();
        }
        let below = format!("{prefix}/");
        left.retain(|key| key != prefix && !key.starts_with(&below));
        assert_eq!(held(&full), left, "{prefix}");
    }
    full.validate().unwrap();
}

#[test]
fn path_cache_more_directories_than_it_holds_stays_right() {
    const ARRAYS: usize = 300;
    const HELD: usize = 500;
    let mut index = index(HELD as u64);
    let mut held = std::collections::VecDeque::new();
    let mut seed = 1u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as usize % below
    };
    for _ in 0..20_000 {
        let array = random(ARRAYS);
        let names = [
            format!("a{array}/c"),
            format!("model_{array}/surface_temperature/c"),
        ];
        let key = format!("{}/{}", names[array % 2], random(5));
        if let Some(at) = held.iter().position(|other| *other == key) {
            assert_eq!(
                index
                    .lookup(&key, ByteRange::Full, 1)
                    .unwrap()
                    .unwrap()
                    .size,
                1
            );
            held.remove(at);
            held.push_back(key);
            continue;
        }
        assert_eq!(index.lookup(&key, ByteRange::Full, 1).unwrap(), None);
        let Joined::Lead(ticket) = index.join(&key, ByteRange::Full, (), 1, false).unwrap() else {
            panic!("{key} is there");
        };
        let mut answer = index.reserve(&key, ByteRange::Full, 1, ticket, 1).unwrap();
        if let Reserve::NeedsEviction(id, victims) = answer {
            // Names of victims are built from the path cache.
            let names: Vec<_> = victims.iter().map(|victim| &victim.cache_key).collect();
            assert_eq!(names, [&held.pop_front().unwrap()]);
            answer = index.all_evicted(id, 1).unwrap();
        }
        let Reserve::Granted(id) = answer else {
            panic!("{answer:?}")
        };
        index.commit(id, Some(9), 1).unwrap().unwrap();
        held.push_back(key);
    }
    assert_eq!(held.len(), HELD);
    index.validate().unwrap();
}

#[test]
fn memory_image_planes_take_no_more_than_chunks() {
    let memory = |name: fn(usize) -> String| {
        let mut index = index(u64::MAX);
        for n in 0..20_000 {
            assert!(index.adopt(&name(n), 8, 1).unwrap());
        }
        index.memory()
    };
    let chunks = memory(|n| format!("image/0/c/{}/{}/{}/0/0", n / 1000, n / 100 % 10, n % 100));
    for planes in [
        memory(|n| format!("image/0/{}/{}/{}/0/0", n / 1000, n / 100 % 10, n % 100)),
        memory(|n| format!("image/0/{}/{}/0/0", n / 100, n % 100)),
    ] {
        assert!(planes * 100 < chunks * 103, "{planes} to {chunks}");
    }
}
