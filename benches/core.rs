//! The core without Python: what one step of the index costs.
//!
//! `cargo bench` measures with a million keys; `cargo test --benches` runs each once with a thousand.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Reserve, START, Victim};
use zcache::key::ByteRange;

type Index = Cache<Heap, ()>;

const SIZE: u64 = 8;
const NOW: u64 = 1;

/// Criterion measures if and only if `--bench` is passed, as cargo does, and `--test` is not.
fn scale(full: usize, test: usize) -> usize {
    let has = |what: &str| std::env::args().any(|argument| argument == what);
    if has("--bench") && !has("--test") {
        full
    } else {
        test
    }
}

fn key(array: usize, n: usize) -> String {
    format!(
        "era5/array{array}/c/{}/{}/{}",
        n / 2000,
        n / 40 % 50,
        n % 40
    )
}

/// Keys of one array in an order that no prefetcher guesses.
fn keys(array: usize, count: usize) -> Vec<String> {
    let mut keys: Vec<_> = (0..count).map(|n| key(array, n)).collect();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for at in (1..keys.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        keys.swap(at, (random % (at as u64 + 1)) as usize);
    }
    keys
}

fn empty(max_size: u64) -> Index {
    let limits = Limits::bounded(max_size);
    Cache::new(Heap::default(), limits, 1).unwrap()
}

fn filled(keys: &[String], max_size: u64) -> Index {
    let mut index = empty(max_size);
    for key in keys {
        assert!(index.adopt(key, SIZE, NOW).unwrap());
    }
    index
}

fn cells(victims: &[Victim]) -> Vec<u32> {
    victims.iter().map(|victim| victim.cell).collect()
}

/// A whole fill: join, reserve, commit.
fn fill(index: &mut Index, key: &str) {
    let Joined::Lead(ticket) = index.join(key, ByteRange::Full, (), NOW, false).unwrap() else {
        panic!("{key} is there already");
    };
    let mut answer = index
        .reserve(key, ByteRange::Full, SIZE, ticket, NOW)
        .unwrap();
    loop {
        match answer {
            Reserve::Granted(id) => {
                let done = index.commit(id, Some(1), NOW).unwrap().unwrap();
                assert!(done.victims.is_empty());
                break;
            }
            Reserve::NeedsEviction(id, victims) => {
                answer = index
                    .evictions_done(id, &cells(&victims), &[], NOW)
                    .unwrap();
            }
            Reserve::Rejected(reason) => panic!("{key} was rejected: {reason:?}"),
        }
    }
}

fn lookup(c: &mut Criterion) {
    let count = scale(1_000_000, 1000);
    let keys = keys(0, count);
    let mut index = filled(&keys, u64::MAX);
    let mut turn = keys.iter().rev().cycle();
    c.bench_function("lookup, hit", |b| {
        b.iter(|| {
            let found = index
                .lookup(turn.next().unwrap(), ByteRange::Full, NOW)
                .unwrap();
            assert!(black_box(found).is_some());
        });
    });
    let mut turn = keys.iter().rev().cycle();
    c.bench_function("hit", |b| {
        b.iter(|| assert!(black_box(index.hit(turn.next().unwrap(), NOW)).is_some()));
    });
    let others: Vec<_> = (0..count).map(|n| key(1, n)).collect();
    let mut turn = others.iter().cycle();
    c.bench_function("lookup, miss", |b| {
        b.iter(|| {
            let found = index
                .lookup(turn.next().unwrap(), ByteRange::Full, NOW)
                .unwrap();
            assert!(black_box(found).is_none());
        });
    });
}

fn insert(c: &mut Criterion) {
    let keys = keys(0, scale(100_000, 1000));
    let mut group = c.benchmark_group("insert");
    group
        .throughput(Throughput::Elements(keys.len() as u64))
        .sample_size(10);
    group.bench_function("fill an empty index", |b| {
        b.iter_batched_ref(
            || empty(u64::MAX),
            |index| keys.iter().for_each(|key| fill(index, key)),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("adopt into an empty index", |b| {
        b.iter_batched(|| (), |()| filled(&keys, u64::MAX), BatchSize::LargeInput);
    });
    group.finish();
}

fn evict(c: &mut Criterion) {
    let count = scale(1_000_000, 1000);
    let (first, second) = (keys(0, count), keys(1, count));
    let mut index = filled(&first, count as u64 * SIZE);
    // The key that was evicted first comes next, so each fill evicts exactly one.
    let mut turn = second.iter().chain(&first).cycle();
    c.bench_function("fill and evict one", |b| {
        b.iter(|| fill(&mut index, turn.next().unwrap()));
    });
    assert_eq!(index.len(), count as u64);
    index.validate().unwrap();
}

fn drain_prefix(c: &mut Criterion) {
    let count = scale(100_000, 1000);
    let (doomed, others) = (keys(0, count), keys(1, 4 * count));
    let mut group = c.benchmark_group("drain_prefix");
    group
        .throughput(Throughput::Elements(count as u64))
        .sample_size(10);
    let mut index = filled(&others, u64::MAX);
    group.bench_function("one array of five", |b| {
        b.iter_custom(|rounds| {
            let mut total = std::time::Duration::ZERO;
            for _ in 0..rounds {
                for key in &doomed {
                    index.adopt(key, SIZE, NOW).unwrap();
                }
                let start = std::time::Instant::now();
                index.invalidate_prefix("era5/array0");
                let mut rest = Some(START);
                while let Some(at) = rest {
                    let victims;
                    (victims, rest) = index.drain_prefix("era5/array0", at).unwrap();
                    index.deletes_done(&cells(&victims), &[]).unwrap();
                }
                total += start.elapsed();
                assert_eq!(index.len(), others.len() as u64);
            }
            total
        });
    });
    group.finish();
}

fn ranges(c: &mut Criterion) {
    let mut group = c.benchmark_group("ranges of one key");
    for count in [1000, scale(100_000, 2000)] {
        let mut index = empty(u64::MAX);
        let ranges: Vec<_> = (0..count as u64)
            .map(|n| ByteRange::Range {
                start: n * SIZE,
                end: (n + 1) * SIZE,
            })
            .collect();
        for range in &ranges {
            index.adopt(&range.cache_key("shard"), SIZE, NOW).unwrap();
        }
        let mut turn = ranges.iter().rev().cycle();
        group.bench_function(format!("lookup, {count}"), |b| {
            b.iter(|| {
                let found = index.lookup("shard", *turn.next().unwrap(), NOW).unwrap();
                assert!(black_box(found).is_some());
            });
        });
    }
    group.finish();
}

criterion_group!(benches, lookup, insert, evict, drain_prefix, ranges);
criterion_main!(benches);
