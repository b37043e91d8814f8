//! Decoded values: what a decode remembers of its beginning, and what makes it void.

use std::thread::sleep;

use crate::place::Place;
use zcache::arena::Heap;
use zcache::cache::{BATCH, Cache, Decode, Freshness, Joined, Limits, Peers, Reserve, START};
use zcache::error::Result;
use zcache::key::ByteRange;
use zcache::shared::{Opening, SharedIndex};

const LIMITS: Limits = Limits {
    flat_namespace: false,
    ..Limits::bounded(1_000_000)
};
const KEY: &str = "v/c/0/1";

fn heap() -> Cache<Heap, ()> {
    Cache::new(Heap::default(), LIMITS, 7).unwrap()
}

fn fill<S: Peers>(cache: &mut Cache<S, ()>, key: &str, range: ByteRange, now: u64) {
    let Joined::Lead(ticket) = cache.join(key, range, (), now, true).unwrap() else {
        panic!("{key} is on its way");
    };
    let Reserve::Granted(id) = cache.reserve(key, range, 1, ticket, now).unwrap() else {
        panic!("no room for {key}");
    };
    cache.commit(id, None, now).unwrap().unwrap();
}

fn at(now: u64, max_age: Option<u64>) -> Freshness {
    Freshness { now, max_age }
}

fn begin<S: Peers>(cache: &mut Cache<S, ()>, now: u64) -> Decode {
    let decode = cache.begin_decode(KEY, at(now, None)).unwrap();
    decode.expect("a key that is not being changed")
}

fn is_current<S: Peers>(cache: &mut Cache<S, ()>, decode: Decode) -> Result<bool> {
    cache.is_current(KEY, decode, 10, at(10, None), false)
}

/// Changes of `KEY`, or of what is above it.
fn changes<S: Peers>(cache: &mut Cache<S, ()>, change: usize) {
    let prefixes = ["", "v", "v/c/", "v/c/0/1"];
    if let Some(prefix) = prefixes.get(change) {
        cache.invalidate_prefix(prefix);
    } else {
        cache.begin_write(KEY).unwrap();
        cache.end_write(KEY, true, None).unwrap();
    }
}

#[test]
fn is_current_after_a_change_of_the_key_or_above_it_is_false() {
    let mut cache = heap();
    for change in 0..5 {
        let decode = begin(&mut cache, 1);
        assert!(is_current(&mut cache, decode).unwrap());
        changes(&mut cache, change);
        assert!(!is_current(&mut cache, decode).unwrap(), "{change}");
    }
    let decode = begin(&mut cache, 1);
    cache.invalidate_prefix("v/c/0/10");
    cache.begin_write("v/c/0/2").unwrap();
    assert!(is_current(&mut cache, decode).unwrap());
}

#[test]
fn is_current_after_a_change_by_another_participant_is_false() {
    let place = Place::new("decoded");
    let (mut one, fresh) =
        SharedIndex::<()>::open(&place.at("."), &Opening::new(LIMITS, 1)).unwrap();
    assert!(fresh);
    one.complete().unwrap();
    let (mut other, _) = SharedIndex::<()>::open(&place.at("."), &Opening::new(LIMITS, 1)).unwrap();
    for change in 0..5 {
        let decode = one.step(sleep, |cache| Ok(begin(cache, 1))).unwrap();
        assert!(one.step(sleep, |cache| is_current(cache, decode)).unwrap());
        other
            .step(sleep, |cache| {
                changes(cache, change);
                Ok(())
            })
            .unwrap();
        assert!(!one.step(sleep, |cache| is_current(cache, decode)).unwrap());
    }
    other.step(sleep, |cache| cache.begin_write(KEY)).unwrap();
    let begun = one.step(sleep, |cache| cache.begin_decode(KEY, at(1, None)));
    assert_eq!(begun.unwrap(), None);
}

/// How many of the chunks of an array are void after one write, at most, of writes of very many others.
fn most_void_at_once<S: Peers>(cache: &mut Cache<S, ()>) -> Result<usize> {
    let fresh = at(1, None);
    let chunks = ["v/c/0/0", "v/c/0/1", "v/c/0/2", "v/c/0/3"];
    let mut most = 0;
    for n in 4..20_000 {
        let decodes = chunks.map(|key| cache.begin_decode(key, fresh).unwrap().unwrap());
        let other = format!("v/c/0/{n}");
        cache.begin_write(&other)?;
        cache.end_write(&other, false, None)?;
        let all = chunks.into_iter().zip(decodes);
        let void =
            all.filter(|(key, decode)| !cache.stays_current(key, *decode, 1, fresh).unwrap());
        most = most.max(void.count());
    }
    Ok(most)
}

#[test]
fn write_of_one_key_never_makes_a_whole_folder_void() {
    // One key shares its slot by chance.
    assert_eq!(most_void_at_once(&mut heap()), Ok(1));
    let place = Place::new("folders");
    let opened = SharedIndex::<()>::open(&place.at("."), &Opening::new(LIMITS, 1));
    let (mut index, _) = opened.unwrap();
    assert_eq!(index.step(sleep, most_void_at_once), Ok(1));
}

#[test]
fn begin_while_the_key_is_being_changed_is_not_to_be_kept() {
    let mut cache = heap();
    let begin = |cache: &mut Cache<Heap, ()>| cache.begin_decode(KEY, at(1, None)).unwrap();
    cache.begin_write(KEY).unwrap();
    assert_eq!(begin(&mut cache), None);
    cache.end_write(KEY, false, None).unwrap();
    assert!(begin(&mut cache).is_some());
    cache.prefix_change("v/c", true).unwrap();
    assert_eq!(begin(&mut cache), None);
    cache.prefix_change("v/c", false).unwrap();
    assert!(begin(&mut cache).is_some());
}

#[test]
fn age_counts_from_the_oldest_bytes_that_may_be_read() {
    let mut cache = heap();
    let fetched = |cache: &mut Cache<Heap, ()>, now| {
        let decode = cache.begin_decode(KEY, at(now, Some(100))).unwrap();
        decode.map(|decode| decode.fetched)
    };
    assert_eq!(fetched(&mut cache, 50), Some(50));
    fill(&mut cache, KEY, ByteRange::Suffix(5), 10);
    fill(&mut cache, KEY, ByteRange::Range { start: 0, end: 3 }, 30);
    assert_eq!(fetched(&mut cache, 50), Some(10));
    // What is stale is not read.
    assert_eq!(fetched(&mut cache, 115), Some(30));
    let decode = Decode {
        version: begin(&mut cache, 1).version,
        fetched: 10,
    };
    for (now, expected) in [(109, true), (110, false)] {
        let fresh = at(now, Some(100));
        let found = cache.is_current(KEY, decode, 10, fresh, false).unwrap();
        assert_eq!(found, expected);
    }
    // How old it will be is not known.
    cache.join(KEY, ByteRange::Full, (), 50, false).unwrap();
    assert_eq!(fetched(&mut cache, 50), Some(0));
    let undated = Decode {
        fetched: 0,
        ..decode
    };
    let fresh = at(50, Some(100));
    assert!(!cache.is_current(KEY, undated, 50, fresh, false).unwrap());
    assert!(cache.begin_decode(KEY, at(50, None)).unwrap().is_some());
}

#[test]
fn age_of_very_many_ranges_is_not_known() {
    let mut cache = heap();
    for n in 0..BATCH as u64 + 1 {
        fill(
            &mut cache,
            KEY,
            ByteRange::Range {
                start: n,
                end: n + 1,
            },
            10,
        );
    }
    let begun = cache.begin_decode(KEY, at(50, Some(100))).unwrap();
    assert_eq!(begun.map(|decode| decode.fetched), Some(0));
}

#[test]
fn is_current_while_newer_bytes_are_cached_is_false() {
    let mut cache = heap();
    fill(&mut cache, KEY, ByteRange::Full, 5);
    let decode = begin(&mut cache, 6);
    assert!(is_current(&mut cache, decode).unwrap());
    let (victims, _) = cache.drain_prefix(KEY, START).unwrap();
    cache.deletes_done(&[victims[0].cell], &[]).unwrap();
    fill(&mut cache, KEY, ByteRange::Full, 11);
    assert!(!is_current(&mut cache, decode).unwrap());
}

#[test]
fn stays_current_uses_nothing_and_says_the_same() {
    let mut cache = heap();
    let fresh = at(10, Some(100));
    fill(&mut cache, KEY, ByteRange::Full, 5);
    fill(&mut cache, "v/c/0/2", ByteRange::Full, 5);
    let decode = begin(&mut cache, 6);
    assert!(cache.stays_current(KEY, decode, 10, fresh).unwrap());
    assert!(!cache.stays_current(KEY, decode, 4, fresh).unwrap());
    let late = at(106, Some(100));
    assert!(!cache.stays_current(KEY, decode, 10, late).unwrap());
    // The other one was used later.
    assert_eq!(cache.recency().unwrap().pop().unwrap().0, "v/c/0/2");
    changes(&mut cache, 1);
    assert!(!cache.stays_current(KEY, decode, 10, fresh).unwrap());
}

#[test]
fn is_current_at_the_beginning_of_the_clock_is_true() {
    let mut cache = heap();
    fill(&mut cache, KEY, ByteRange::Full, 0);
    for max_age in [None, Some(100)] {
        let fresh = at(0, max_age);
        let decode = cache.begin_decode(KEY, fresh).unwrap().unwrap();
        assert!(cache.is_current(KEY, decode, 0, fresh, false).unwrap());
    }
}

#[test]
fn use_of_what_was_decoded_keeps_its_bytes() {
    let mut cache = heap();
    let last = |cache: &Cache<Heap, ()>| cache.recency().unwrap().pop().unwrap().0;
    for key in [KEY, "v/c/0/2"] {
        fill(&mut cache, key, ByteRange::Range { start: 0, end: 1 }, 1);
    }
    let decode = begin(&mut cache, 1);
    for (touch_ranges, expected) in [(false, "v/c/0/2"), (true, KEY)] {
        let fresh = at(2, None);
        cache
            .is_current(KEY, decode, 1, fresh, touch_ranges)
            .unwrap();
        assert_eq!(last(&cache), expected);
    }
    fill(&mut cache, KEY, ByteRange::Full, 1);
    fill(&mut cache, "v/c/0/3", ByteRange::Full, 1);
    is_current(&mut cache, decode).unwrap();
    assert_eq!(last(&cache), KEY);
}
