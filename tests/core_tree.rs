//! The tree: prefixes among numbers, more directories than the path cache holds, and the memory of
//! an index of image planes.

use std::collections::BTreeSet;
use std::rc::Rc;

use crate::faulty_storage::{Plan, Vectors};
use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Reserve, START};
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
        let mut rest = Some(START);
        while let Some(at) = rest {
            let victims;
            (victims, rest) = full.drain_prefix(prefix, at).unwrap();
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

/// Accesses to the memory of an index, for any work.
fn accesses<R>(plan: &Plan, work: impl FnOnce() -> R) -> (R, u64) {
    const MANY: u64 = 1 << 40;
    plan.patience.set(MANY);
    let answer = work();
    (answer, MANY - plan.patience.replace(0))
}

#[test]
fn drain_of_one_chunk_looks_at_as_much_whatever_lies_beside_it() {
    let layouts: [fn(usize) -> String; 4] = [
        |n| format!("a/c/{n}"),
        |n| format!("a/c/{}/{}", n % 100, n / 100),
        |n| format!("image/0/{}/{}/{}", n / 1000, n / 100 % 10, n % 100),
        |n| format!("a/{}.{}", n % 100, n / 100),
    ];
    for name in layouts {
        let mut costs = Vec::new();
        for count in [1000, 100_000] {
            let plan = Rc::new(Plan::default());
            let limits = Limits::bounded(u64::MAX);
            let mut full: Cache<_, ()> = Cache::new(Vectors::new(&plan), limits, 7).unwrap();
            for n in 0..count {
                assert!(full.adopt(&name(n), 1, 1).unwrap());
            }
            for (n, is_there) in [(500, true), (500, false), (count, false)] {
                let ((victims, rest), cost) =
                    accesses(&plan, || full.drain_prefix(&name(n), START).unwrap());
                assert_eq!((victims.len(), rest), (usize::from(is_there), None));
                costs.push(cost);
                for victim in victims {
                    full.deletes_done(&[victim.cell], &[]).unwrap();
                }
            }
        }
        let (few, many) = costs.split_at(3);
        for (few, many) in few.iter().zip(many) {
            assert!(*many < 2 * few, "{}: {few} and {many}", name(500));
        }
    }
}

/// Others come and go between the steps of a drain of very many, by which it looks at each cell once.
#[test]
fn drain_of_a_row_of_very_many_chunks_takes_bounded_steps_once() {
    const ROW: usize = 200;
    let plan = Rc::new(Plan::default());
    let limits = Limits::bounded(u64::MAX);
    let mut index: Cache<_, ()> = Cache::new(Vectors::new(&plan), limits, 7).unwrap();
    let mut kept = BTreeSet::new();
    let mut add = |index: &mut Cache<Vectors, ()>, key: String| {
        let range = ByteRange::Range { start: 0, end: 4 };
        let name = if kept.len() % 3 == 0 {
            range
        } else {
            ByteRange::Full
        };
        assert!(index.adopt(&name.cache_key(&key), 4, 1).unwrap());
        if !key.starts_with("a/c/7/") {
            kept.insert(key);
        }
    };
    for n in 0..ROW * ROW {
        add(&mut index, format!("a/c/{}/{}", n % ROW, n / ROW));
        if n % 50 == 0 {
            add(&mut index, format!("b/c/{n}"));
        }
    }
    let (mut steps, mut drained, mut most) = (0, 0, 0);
    let mut rest = Some(START);
    while let Some(at) = rest {
        let (answer, cost) = accesses(&plan, || index.drain_prefix("a/c/7", at).unwrap());
        most = most.max(cost);
        let victims;
        (victims, rest) = answer;
        drained += victims.len();
        let mut cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        for gone in [
            format!("a/c/{}/1", 10 + steps),
            format!("a/c/{}/199", 10 + steps),
        ] {
            let victims = index.drop_missing(&gone).unwrap();
            cells.extend(victims.iter().map(|victim| victim.cell));
        }
        index.deletes_done(&cells, &[]).unwrap();
        add(&mut index, format!("a/c/9/{}", 1000 + steps));
        steps += 1;
    }
    assert_eq!(drained, ROW);
    // Some 62,000 cells, 4,096 in a step.
    assert!((10..20).contains(&steps), "{steps}");
    assert!(most < 60_000, "{most}");
    let left = index.entries().unwrap();
    assert!(left.iter().all(|entry| !entry.key.starts_with("a/c/7/")));
    assert_eq!(left.len(), kept.len() - 2 * steps);
    index.validate().unwrap();
}

#[test]
fn drain_goes_on_in_another_index_from_its_beginning() {
    let fill = |seed| {
        let limits = Limits::bounded(u64::MAX);
        let mut index: Index = Cache::new(Heap::default(), limits, seed).unwrap();
        for n in 0..10_000 {
            index
                .adopt(&format!("a/c/{}/{}", n % 100, n / 100), 1, 1)
                .unwrap();
        }
        index
    };
    let (_, rest) = fill(1).drain_prefix("a/c/7", START).unwrap();
    let (_, mut rest) = fill(1).drain_prefix("a/c/7", rest.unwrap()).unwrap();
    let mut other = fill(2);
    let mut drained = 0;
    while let Some(at) = rest {
        let victims;
        (victims, rest) = other.drain_prefix("a/c/7", at).unwrap();
        drained += victims.len();
    }
    assert_eq!(drained, 100);
}
