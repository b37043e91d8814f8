//! Ranges against real bytes: whatever is served out of an entry is what the source would have
//! given, for every kind of source that there is. And the promise that makes ranges worth it: a
//! cached full value serves every range about which all sources agree.

use crate::keys;

use proptest::prelude::*;
use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Reserve};
use zcache::key::{Asked, ByteRange, select};

/// What sources make of requests that select nothing, or count in ways of their own.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// Slices as Python does. Suffixes that are too long give everything.
    Python,
    /// Ignores a range that is none and gives everything; gives nothing at all where the range
    /// lies behind the end.
    Http,
    /// Reads to the end where the end comes before the start.
    ToTheEnd,
}

impl Source {
    fn read(self, value: &[u8], asked: ByteRange) -> Option<Vec<u8>> {
        let len = value.len();
        let at = |n: u64| usize::try_from(n).unwrap_or(usize::MAX).min(len);
        let part = match (self, asked) {
            (_, ByteRange::Full) => value,
            (Source::Http, ByteRange::Range { start, end }) if end <= start => value,
            (Source::Http, ByteRange::Range { start, .. } | ByteRange::Offset(start))
                if at(start) == len =>
            {
                return None;
            }
            (Source::Http, ByteRange::Suffix(0)) => return None,
            (Source::ToTheEnd, ByteRange::Range { start, end }) if end <= start => {
                &value[at(start)..]
            }
            (Source::ToTheEnd, ByteRange::Suffix(0)) => value,
            (Source::ToTheEnd, ByteRange::Suffix(n)) if n > len as u64 => return None,
            (_, ByteRange::Range { start, end }) => &value[at(start)..at(end).max(at(start))],
            (_, ByteRange::Offset(start)) => &value[at(start)..],
            (_, ByteRange::Suffix(n)) => &value[len - at(n)..],
        };
        Some(part.to_vec())
    }
}

/// What is done to the flights of one key.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Reads this one of the ranges, joining its flight if there is one.
    Join(u64),
    /// Ends the flight that is this one among the open ones.
    Land(usize),
    Write,
    Clear,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        30 => (0u64..60).prop_map(Step::Join),
        8 => (0usize..60).prop_map(Step::Land),
        1 => Just(Step::Write),
        1 => Just(Step::Clear),
    ];
    prop::collection::vec(step, 0..150)
}

fn fill(cache: &mut Cache<Heap, ()>, range: ByteRange, size: u64) {
    fill_with(cache, range, size, 0);
}

fn fill_with(cache: &mut Cache<Heap, ()>, range: ByteRange, size: u64, checksum: u32) {
    let Joined::Lead(ticket) = cache.join("a/c/0", range, (), 1, true).unwrap() else {
        panic!("no other reader")
    };
    if let Reserve::Granted(id) = cache.reserve("a/c/0", range, size, ticket, 1).unwrap() {
        cache.commit(id, Some(checksum), 1).unwrap().unwrap();
    }
    cache.complete_flight("a/c/0", ticket);
}

/// A discarded hit drops its entry, but not the entry that has taken its place, though in the same millisecond.
#[test]
fn discard_successor_of_entry_is_kept() {
    for (size, checksum) in [(12, 0), (10, 1)] {
        check_successor_of_entry(size, checksum);
    }
}

fn check_successor_of_entry(size: u64, checksum: u32) {
    let limits = Limits::bounded(100);
    let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), limits, 0).unwrap();
    fill(&mut cache, ByteRange::Full, 10);
    let old = cache.lookup("a/c/0", ByteRange::Full, 1).unwrap().unwrap();
    let victims = cache.begin_write("a/c/0").unwrap();
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    cache.deletes_done(&cells, &[]).unwrap();
    cache.end_write("a/c/0", false, None).unwrap();
    fill_with(&mut cache, ByteRange::Full, size, checksum);
    assert!(cache.discard(old.handle).unwrap().is_empty());
    let new = cache.lookup("a/c/0", ByteRange::Full, 1).unwrap().unwrap();
    assert_eq!((new.size, new.checksum), (size, Some(checksum)));
    assert_eq!(cache.discard(new.handle).unwrap().len(), 1);
    assert!(cache.is_empty());
}

/// A flight of `flights_of_one_key`.
struct Open {
    /// The number of its range; the last is the full value.
    range: u64,
    ticket: u64,
    valid: bool,
    /// Tickets of those that end with it.
    passed: [Option<u64>; 2],
}

/// Ranges that touch each other, the value and its end.
fn near() -> impl Strategy<Value = ByteRange> {
    let n = || prop_oneof![8 => 0u64..26, 1 => keys::edge()];
    prop_oneof![
        5 => (n(), n()).prop_map(|(start, end)| ByteRange::Range { start, end }),
        2 => n().prop_map(ByteRange::Offset),
        2 => n().prop_map(ByteRange::Suffix),
        1 => Just(ByteRange::Full),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn served_as_the_source_would(
        len in 0u8..24,
        held in prop::collection::vec(near(), 1..5),
        asked in prop::collection::vec(near(), 1..20),
        source in prop::sample::select(vec![Source::Python, Source::Http, Source::ToTheEnd]),
        slices_like_python in any::<bool>(),
    ) {
        let value: Vec<u8> = (0..len).collect();
        let slices_like_python = slices_like_python && matches!(source, Source::Python);
        let limits = Limits::bounded(1 << 20);
        let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), limits, 0).unwrap();
        for &range in &held {
            if let Some(bytes) = source.read(&value, range) {
                fill(&mut cache, range, bytes.len() as u64);
            }
        }
        for &range in &asked {
            let due = source.read(&value, range);
            let Some(found) = cache.peek("a/c/0", Asked { range, slices_like_python }, 1).unwrap() else {
                let whole = held.contains(&ByteRange::Full);
                prop_assert!(!whole || select(value.len() as u64, range, slices_like_python).is_none());
                prop_assert!(!held.contains(&range) || due.is_none());
                continue;
            };
            let entry = source.read(&value, found.range).expect("it was read");
            prop_assert_eq!(entry.len() as u64, found.size);
            let (start, length) = (found.start as usize, found.length as usize);
            prop_assert_eq!(due, Some(entry[start..start + length].to_vec()));
        }
    }

    /// Many flights of one key are found as few are.
    #[test]
    fn flights_of_one_key(steps in steps()) {
        let limits = Limits::bounded(0);
        let mut cache: Cache<Heap, ()> = Cache::new(Heap::default(), limits, 0).unwrap();
        let mut open: Vec<Open> = Vec::new();
        let range = |n| if n == 59 { ByteRange::Full } else { ByteRange::Range { start: n, end: n + 1 } };
        for step in steps {
            match step {
                Step::Join(n) => {
                    let of = |m| open.iter().find(|f| f.range == m && f.valid);
                    let due = of(n).or_else(|| of(59)).map(|f| range(f.range));
                    // What could not be joined ends with the next flight.
                    let latest = |m| open.iter().filter(|f| f.range == m).map(|f| f.ticket).max();
                    let passed = [latest(n), latest(59)];
                    match cache.join("a/c/0", range(n), (), 1, true).unwrap() {
                        Joined::Lead(ticket) => {
                            prop_assert_eq!(due, None);
                            open.push(Open { range: n, ticket, valid: true, passed });
                        }
                        Joined::Follow(brings, _) => prop_assert_eq!(Some(brings), due),
                        Joined::Ready => panic!("nothing is cached"),
                    }
                }
                Step::Land(at) if at < open.len() => {
                    let ticket = open[at].ticket;
                    prop_assert!(cache.complete_flight("a/c/0", ticket).is_some());
                    prop_assert!(cache.complete_flight("a/c/0", ticket).is_none());
                    let mut ended = vec![ticket];
                    while let Some(ticket) = ended.pop() {
                        if let Some(at) = open.iter().position(|f| f.ticket == ticket) {
                            ended.extend(open.swap_remove(at).passed.into_iter().flatten());
                        }
                    }
                }
                Step::Land(_) => {}
                Step::Write => {
                    cache.begin_write("a/c/0").unwrap();
                    cache.end_write("a/c/0", false, None).unwrap();
                    open.iter_mut().for_each(|flight| flight.valid = false);
                }
                Step::Clear => {
                    cache.invalidate_prefix("a");
                    open.iter_mut().for_each(|flight| flight.valid = false);
                }
            }
            prop_assert_eq!(cache.in_flight(), (open.len(), 0));
            cache.validate().unwrap();
        }
        // The earlier ones first: none ends with another one.
        open.sort_by_key(|f| f.ticket);
        for flight in open {
            prop_assert!(cache.complete_flight("a/c/0", flight.ticket).is_some());
        }
        prop_assert_eq!(cache.in_flight(), (0, 0));
        cache.validate().unwrap();
    }

    #[test]
    fn a_value_serves_what_all_agree_on(size in keys::edge(), asked in near()) {
        let part = select(size, asked, false);
        let plain = match asked {
            ByteRange::Full => true,
            ByteRange::Range { start, end } => start < end && start < size,
            ByteRange::Offset(start) => start < size,
            ByteRange::Suffix(count) => 0 < count && count <= size,
        };
        prop_assert_eq!(part.is_some(), plain);
        for (start, length) in part.into_iter().chain(select(size, asked, true)) {
            prop_assert!(start.checked_add(length).is_some_and(|end| end <= size));
        }
    }
}
