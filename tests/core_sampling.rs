//! The sample of requests: what is kept of them, in an index and in a file that is damaged, torn or gone.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use zcache::arena::Heap;
use zcache::cache::{Answer, Cache, Freshness, Joined, Limits, Reserve};
use zcache::key::{ByteRange, Part, hash_word};
use zcache::sampling::{
    DROPPED, EARLIER, FILLED, FORMER, HIT, KEYS, OUTDATED, REQUESTS, Sample, Trace, UNKNOWN,
};
use zcache::shared::{Opening, SharedIndex};

use crate::place::Place;

fn hash(key: u64) -> u64 {
    hash_word(key.to_le_bytes(), 8, 0, 1)
}

fn whole(key: u64) -> Part {
    Part::of_whole(hash(key))
}

fn keys_of(trace: &Trace) -> Vec<u64> {
    trace.parts.iter().map(|part| part.hash).collect()
}

fn request(sample: &mut Sample, key: u64) {
    sample.count();
    if sample.has(hash(key)) {
        sample.push(&whole(key), Some(key + 1), HIT);
    }
}

#[test]
fn few_requests_are_all_kept_in_their_order() {
    let mut sample = Sample::new(3);
    let keys: Vec<u64> = (0..500).map(|n| n * n % 200).collect();
    for key in &keys {
        request(&mut sample, *key);
    }
    let trace = sample.trace();
    assert_eq!(
        keys_of(&trace),
        keys.iter().map(|k| hash(*k)).collect::<Vec<_>>()
    );
    assert_eq!(trace.sizes, keys.iter().map(|k| k + 1).collect::<Vec<_>>());
    assert!(trace.flags.iter().all(|flags| *flags == HIT));
    assert_eq!(
        (trace.requests, trace.rate, trace.has_slid),
        (500, 1.0, false)
    );
    assert_eq!(sample.seed(), 3);
}

#[test]
fn of_many_keys_some_are_kept_with_all_their_requests() {
    let mut sample = Sample::new(0);
    let (keys, epochs) = (200_000, 3);
    for _ in 0..epochs {
        for key in 0..keys {
            request(&mut sample, key);
        }
    }
    let trace = sample.trace();
    let mut counts: HashMap<u64, u64> = HashMap::new();
    for key in keys_of(&trace) {
        *counts.entry(key).or_default() += 1;
    }
    assert!(counts.len() <= KEYS && counts.len() > KEYS / 2);
    assert!(counts.values().all(|count| *count == epochs));
    let expected = trace.rate * keys as f64;
    assert!((counts.len() as f64 / expected - 1.0).abs() < 0.05);
    // In the order in which they came.
    let order: Vec<u64> = (0..keys).map(hash).filter(|h| sample.has(*h)).collect();
    assert_eq!(keys_of(&trace)[..order.len()], order);
    assert_eq!((trace.requests, trace.has_slid), (keys * epochs, false));
    assert!(size_of::<Sample>() < 1 << 20);
}

#[test]
fn of_few_keys_the_last_requests_are_kept_and_which_keys_came_before() {
    let mut sample = Sample::new(0);
    let rounds = REQUESTS as u64 / 100 + 10;
    for _ in 0..rounds {
        for key in 0..100 {
            request(&mut sample, key);
        }
    }
    request(&mut sample, 100);
    let trace = sample.trace();
    assert!(trace.has_slid);
    assert_eq!(trace.parts[..100], (0..100).map(whole).collect::<Vec<_>>());
    assert!(trace.flags[..100].iter().all(|f| *f == FORMER | EARLIER));
    assert_eq!(trace.parts.len(), 100 + REQUESTS);
    // The later half counts.
    assert_eq!(trace.requests, REQUESTS as u64 / 2);
    let (last, middle) = (trace.parts.len() - 1, 100 + REQUESTS / 2);
    assert_eq!((trace.parts[last], trace.flags[last]), (whole(100), HIT));
    assert!(trace.flags[100..middle].iter().all(|f| *f == HIT | FORMER));
    assert!(trace.flags[middle..last].iter().all(|f| *f == HIT));
}

/// Whatever was asked for before, of keys that are sampled or not.
#[test]
fn requests_that_count_are_those_of_all_keys_since_the_first_of_them() {
    let mut sample = Sample::new(0);
    // Few of 100,000 keys are sampled in the end, ...
    for key in (0..8).flat_map(|_| 0..100_000) {
        request(&mut sample, key);
    }
    let mut keys: Vec<u64> = (0..100_000).collect();
    keys.sort_unstable_by_key(|key| hash(*key));
    let (some, others) = keys.split_at(50_000);
    // ... of which 1,000 are all that is asked for now, each beside one that is not.
    for (key, other) in (0..500).flat_map(|_| some[..1000].iter().zip(others)) {
        request(&mut sample, *key);
        request(&mut sample, *other);
    }
    let trace = sample.trace();
    assert!(trace.has_slid && trace.rate < 0.2);
    let counted = trace.flags.iter().filter(|f| **f & FORMER == 0).count() as u64;
    assert_eq!(counted, REQUESTS as u64 / 2);
    assert!(trace.requests.abs_diff(2 * counted) < counted / 100);
}

#[test]
fn request_that_is_taken_back_was_none() {
    let mut sample = Sample::new(0);
    for (size, flags) in [(None, 0), (Some(7), HIT), (None, 0), (None, OUTDATED)] {
        sample.count();
        sample.push(&whole(1), size, flags);
    }
    request(&mut sample, 2);
    sample.retract(hash(1), false);
    let trace = sample.trace();
    assert_eq!(
        (trace.requests, &trace.flags[..]),
        (4, &[0, HIT, 0, HIT][..])
    );
    sample.retract(hash(1), false);
    sample.retract(hash(1), false);
    // A hit is never taken back, nor what was counted and is not there.
    sample.retract(hash(1), false);
    sample.retract(hash(3), false);
    let trace = sample.trace();
    assert_eq!((trace.requests, &trace.flags[..]), (2, &[HIT, HIT][..]));
    // Its first request is the first that is left.
    request(&mut sample, 1);
    assert_eq!(sample.trace().parts, [1, 2, 1].map(whole));
}

#[test]
fn with_many_requests_keys_are_dropped_before_requests_are() {
    let mut sample = Sample::new(0);
    for _ in 0..20 {
        for key in 0..14_000 {
            request(&mut sample, key);
        }
    }
    let trace = sample.trace();
    assert!(!trace.has_slid && trace.rate < 0.5);
    let kept = (0..14_000).filter(|key| sample.has(hash(*key))).count();
    assert_eq!(trace.parts.len(), kept * 20);
}

#[test]
fn after_very_many_requests_the_oldest_are_forgotten_first() {
    let mut sample = Sample::new(0);
    for key in 0..KEYS as u64 {
        request(&mut sample, key);
    }
    // Of other keys, none of which is sampled.
    for _ in 0..1 << 26 {
        sample.count();
    }
    let before = sample.trace();
    assert_eq!(before.parts.len(), KEYS);
    request(&mut sample, KEYS as u64);
    let after = sample.trace();
    assert_eq!((after.rate, before.rate), (1.0, 1.0));
    assert_eq!(after.parts[..KEYS / 2], before.parts[KEYS / 2..]);
    assert_eq!(after.parts.len(), KEYS / 2 + 1);
    assert!(after.has_slid);
    // The later half of them counts, and the others count as even.
    assert!(after.requests.abs_diff(1 << 25) < KEYS as u64);
}

#[test]
fn a_size_that_is_learned_later_counts_for_all_requests_of_the_key() {
    let mut sample = Sample::new(0);
    sample.push(&whole(1), None, 0);
    sample.push(&whole(2), None, OUTDATED);
    assert_eq!(sample.trace().sizes, [UNKNOWN, UNKNOWN]);
    sample.note_size(&whole(1), 77);
    sample.note_size(&whole(3), 5);
    let trace = sample.trace();
    assert_eq!(trace.sizes, [77, UNKNOWN]);
    assert_eq!(trace.flags, [0, OUTDATED]);
}

#[test]
fn each_request_has_the_size_that_the_value_had_then() {
    let mut sample = Sample::new(0);
    // Of a value that others change: a hit shows its size, ...
    sample.push(&whole(1), Some(5), HIT);
    sample.push(&whole(1), Some(6), HIT);
    // ... a miss brings the next one, which is told later, ...
    sample.push(&whole(1), None, OUTDATED);
    sample.push(&whole(2), None, 0);
    sample.note_size(&whole(1), 70);
    sample.note_size(&whole(2), 9);
    sample.note_size(&whole(1), 70);
    sample.push(&whole(1), Some(70), HIT);
    // ... maybe by a hit of it.
    sample.push(&whole(1), None, 0);
    sample.push(&whole(1), Some(800), HIT);
    // One that is taken back has brought nothing.
    sample.push(&whole(2), None, 0);
    sample.retract(hash(2), false);
    sample.note_size(&whole(2), 11);
    sample.push(&whole(2), Some(11), HIT);
    let trace = sample.trace();
    assert_eq!(keys_of(&trace), [1, 1, 1, 2, 1, 1, 1, 2].map(hash));
    assert_eq!(trace.sizes, [5, 6, 70, 9, 70, 800, 800, 11]);
}

#[test]
fn writes_are_kept_between_the_requests() {
    let mut sample = Sample::new(0);
    sample.count();
    sample.push(&whole(1), Some(5), HIT);
    sample.note_drop(&whole(1));
    sample.note_fill(&whole(1), 6);
    sample.note_fill(&whole(2), 7);
    // Of what is not known there is nothing to drop.
    sample.note_drop(&whole(3));
    sample.count();
    sample.push(&whole(1), Some(6), HIT);
    let trace = sample.trace();
    assert_eq!(keys_of(&trace), [1, 1, 1, 2, 1].map(hash));
    assert_eq!(trace.flags, [HIT, DROPPED, FILLED, FILLED, HIT]);
    assert_eq!([0, 2, 3, 4].map(|at| trace.sizes[at]), [5, 6, 7, 6]);
    assert_eq!(trace.requests, 2);
}

#[test]
fn what_drops_a_value_of_which_only_ranges_are_known_is_kept() {
    let mut sample = Sample::new(0);
    let part = Part {
        hash: hash(2),
        whole: hash(1),
        range: range(0, 5),
    };
    sample.push(&part, Some(5), HIT);
    sample.note_drop(&whole(1));
    sample.note_drop(&whole(1));
    sample.note_drop(&whole(3));
    let trace = sample.trace();
    assert_eq!(keys_of(&trace), [2, 1, 1].map(hash));
    assert_eq!(trace.flags, [HIT, DROPPED, DROPPED]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Whatever is thinned out or forgotten meanwhile, also in the middle of a change.
    #[test]
    fn sizes_that_change_are_right_for_all_requests_that_are_left(
        keys in prop::sample::select(vec![3u64, 700, 30_000]),
        steps in 100_000u64..400_000,
        seed in any::<u64>(),
    ) {
        let mut sample = Sample::new(0);
        let mut sizes: HashMap<u64, u64> = HashMap::new();
        let mut made = Vec::new();
        for step in 0..steps {
            let random = hash_word(step.to_le_bytes(), 8, seed, 1);
            let (key, choice) = (random % keys, random >> 32);
            let size = sizes.entry(key).or_insert(key + 1);
            let is_changed = choice.is_multiple_of(4);
            *size += u64::from(is_changed);
            if sample.has(hash(key)) {
                match choice % 3 {
                    0 if is_changed => {
                        sample.note_drop(&whole(key));
                        sample.note_fill(&whole(key), *size);
                    }
                    1 => {
                        sample.push(&whole(key), None, 0);
                        sample.note_size(&whole(key), *size);
                        made.push((hash(key), *size));
                    }
                    _ => {
                        sample.push(&whole(key), Some(*size), HIT);
                        made.push((hash(key), *size));
                    }
                }
            }
        }
        made.retain(|(key, _)| sample.has(*key));
        let trace = sample.trace();
        let found: Vec<(u64, u64)> = (trace.parts.iter().zip(&trace.sizes).zip(&trace.flags))
            .filter(|(_, flags)| **flags & (EARLIER | DROPPED | FILLED) == 0)
            .map(|((part, size), _)| (part.hash, *size))
            .collect();
        prop_assert!(found.len() > 10_000);
        prop_assert_eq!(&found[..], &made[made.len() - found.len()..]);
    }
}

/// The bytes of a sample, to be damaged.
fn bytes_of(sample: &mut Sample) -> &mut [u8] {
    bytemuck::bytes_of_mut(sample)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in the file: nothing panics, and what it holds is a trace.
    #[test]
    fn any_bytes_are_harmless(
        noise in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..200),
        keys in prop::collection::vec(0u64..400, 1..300),
        head in prop::collection::vec(any::<u8>(), 80),
        with_head in any::<bool>(),
    ) {
        let mut sample = Sample::new(0);
        for key in 0..300 {
            request(&mut sample, key);
        }
        let bytes = bytes_of(&mut sample);
        for (at, byte) in noise {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if with_head {
            bytes[..head.len()].copy_from_slice(&head);
        }
        for key in keys {
            request(&mut sample, key);
            sample.note_size(&whole(key), 9);
            sample.note_drop(&whole(key + 2));
            sample.note_fill(&whole(key / 2), 8);
            sample.retract(hash(key + 1), false);
        }
        let trace = sample.trace();
        prop_assert_eq!(trace.parts.len(), trace.sizes.len());
        prop_assert!(trace.parts.len() <= REQUESTS + KEYS);
        if !sample.is_sound() {
            sample.begin(1);
        }
        prop_assert!(sample.is_sound());
    }

    /// A process is killed between any two stores: any part of a step is done. The next one goes on, and what
    /// the sample then holds is at most one step off.
    #[test]
    fn a_step_that_is_cut_off_anywhere_leaves_it_usable(
        first in 0u64..60,
        done in prop::collection::vec(any::<bool>(), 24),
        key in 0u64..80,
        is_write in any::<bool>(),
    ) {
        let mut sample = Sample::new(0);
        for key in 0..first {
            request(&mut sample, key);
        }
        let mut before = *sample;
        if is_write {
            sample.note_fill(&whole(key), 7);
        } else {
            request(&mut sample, key);
        }
        let changed: Vec<usize> = {
            let (old, new) = (bytemuck::bytes_of(&before), bytemuck::bytes_of(&*sample));
            (0..old.len() / 8).filter(|n| old[n * 8..n * 8 + 8] != new[n * 8..n * 8 + 8]).collect()
        };
        prop_assert!(changed.len() <= done.len());
        let new = bytemuck::bytes_of(&*sample).to_vec();
        for (word, is_done) in changed.iter().zip(&done) {
            if *is_done {
                let at = word * 8..word * 8 + 8;
                bytes_of(&mut before)[at.clone()].copy_from_slice(&new[at]);
            }
        }
        let mut torn = before;
        if !torn.is_sound() {
            return Ok(());
        }
        for key in 0..100 {
            request(&mut torn, key);
        }
        let trace = torn.trace();
        let expected = first + 100;
        // A write has as many words as five requests, which may be counted or not.
        let (fewer, more) = if is_write { (5, 5) } else { (0, 1) };
        let some = expected.saturating_sub(fewer)..=expected + more;
        prop_assert!(some.contains(&(trace.parts.len() as u64)));
        prop_assert!(some.contains(&trace.requests));
        prop_assert_eq!(keys_of(&trace)[trace.parts.len() - 100..].to_vec(), (0..100).map(hash).collect::<Vec<_>>());
    }
}

/// More keys than there are: it has to make room for one more, again and again.
#[test]
fn a_number_of_keys_that_is_damaged_does_not_keep_a_request_for_ever() {
    const AT: usize = 56;
    let mut sample = Sample::new(0);
    for key in 0..20 {
        request(&mut sample, key);
    }
    assert_eq!(bytes_of(&mut sample)[AT..AT + 4], 20u32.to_le_bytes());
    bytes_of(&mut sample)[AT..AT + 4].copy_from_slice(&(KEYS as u32).to_le_bytes());
    for key in 20..40 {
        request(&mut sample, key);
    }
    assert!(sample.is_sound());
    let trace = sample.trace();
    let left = (0..40).filter(|key| sample.has(hash(*key))).count();
    assert!(trace.rate > 0.7 && trace.parts.len() == left);
}

/// All of them with the smallest hash.
#[test]
fn keys_that_no_threshold_tells_apart_do_not_keep_a_request_for_ever() {
    const AT: usize = 56;
    let mut sample = Sample::new(0);
    sample.push(&Part::of_whole(0), Some(5), HIT);
    let size = (size_of::<Sample>() - Sample::LEN - 2 * REQUESTS) / KEYS;
    let bytes = bytes_of(&mut sample);
    let known = bytes[Sample::LEN..Sample::LEN + size].to_vec();
    for number in 1..KEYS {
        bytes[Sample::LEN + number * size..][..size].copy_from_slice(&known);
    }
    bytes[AT..AT + 4].copy_from_slice(&(KEYS as u32).to_le_bytes());
    request(&mut sample, 1);
    request(&mut sample, 2);
    assert!(sample.is_sound());
    let left = [1, 2].map(hash).into_iter().filter(|key| sample.has(*key));
    let left: Vec<u64> = std::iter::once(0).chain(left).collect();
    assert_eq!(keys_of(&sample.trace()), left);
}

// ------------------------------------------------------------------------- in an index

const LIMITS: Limits = Limits {
    flat_namespace: false,
    ..Limits::bounded(1000)
};

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::Range { start, end }
}

/// A request through any index, sampled as the bindings do it.
macro_rules! ask {
    ($cache:expr, $key:expr, $range:expr, $fresh:expr) => {{
        let answer = $cache.ask($key, $range, $fresh, None).unwrap();
        match answer {
            Answer::Found(found) => $cache.sample($key, $range, Some(found.length), $fresh),
            Answer::Unknown => $cache.sample($key, $range, None, $fresh),
            _ => {}
        }
    }};
}

macro_rules! fill {
    ($cache:expr, $key:expr, $range:expr, $size:expr, $now:expr) => {{
        let fresh = Freshness {
            now: $now,
            max_age: Some(100),
        };
        let Joined::Lead(ticket) = $cache.join($key, $range, 0, fresh, false).unwrap() else {
            panic!("it is there or on its way");
        };
        match $cache.reserve($key, $range, $size, ticket, $now).unwrap() {
            Reserve::Granted(id) => drop($cache.commit(id, Some(9), $now).unwrap()),
            Reserve::Rejected(_) => drop($cache.complete_flight($key, ticket)),
            answer => panic!("{answer:?}"),
        }
    }};
}

#[test]
fn requests_of_an_index_are_about_what_they_ask_for() {
    let mut cache: Cache<Heap, u32> = Cache::new(Heap::default(), LIMITS, 7).unwrap();
    assert!(cache.sampled().0.is_none());
    let fresh = Freshness {
        now: 10,
        max_age: Some(100),
    };
    ask!(cache, "a/c/0", ByteRange::Full, fresh);
    fill!(cache, "a/c/0", ByteRange::Full, 50, 10);
    // By the fast path, and as a part.
    assert_eq!(cache.hit_sampled("a/c/0", fresh, true), Some(Some(50)));
    assert_eq!(cache.hit_sampled("a/c/0", fresh, false), Some(Some(50)));
    ask!(cache, "a/c/0", range(3, 9), fresh);
    // A range of its own, and one that is too large for the cache.
    ask!(cache, "a/c/1", range(0, 6), fresh);
    fill!(cache, "a/c/1", range(0, 6), 6, 10);
    ask!(cache, "a/c/1", range(0, 6), fresh);
    ask!(cache, "b", ByteRange::Full, fresh);
    fill!(cache, "b", ByteRange::Full, 5000, 10);
    // One that the value cuts off, by however much.
    ask!(cache, "c", range(4, 99), fresh);
    fill!(cache, "c", range(4, 99), 8, 10);
    // Never cached, so no request.
    ask!(cache, "../b", ByteRange::Full, fresh);
    ask!(cache, "", ByteRange::Full, fresh);
    let (sample, taken) = cache.sampled();
    let trace = sample.unwrap().trace();
    assert_eq!((trace.requests, taken), (7, [0, 0]));
    assert_eq!(trace.sizes, [50, 50, 6, 6, 6, 5000, 8]);
    assert_eq!(trace.flags, [0, HIT, HIT, 0, HIT, 0, 0]);
    let [a, b, c, d, e, f, g] = trace.parts[..] else {
        panic!("{:?}", trace.parts)
    };
    assert!(a == b && d == e && a != f && f.hash == f.whole);
    let different = [a, c, d, f].map(|part| part.hash);
    assert!((1..4).all(|n| !different[..n].contains(&different[n])));
    assert!(a.hash == a.whole && c.whole == a.whole && d.whole != a.whole);
    assert_eq!(
        [a, c, d, g].map(|part| part.range),
        [
            ByteRange::Full,
            range(3, 9),
            range(0, 6),
            range(4, u64::MAX)
        ]
    );
    // Too old: no size would have served it.
    let late = Freshness {
        now: 200,
        max_age: Some(100),
    };
    ask!(cache, "a/c/0", ByteRange::Full, late);
    assert_eq!(cache.hit_sampled("a/c/1", late, true), Some(None));
    ask!(cache, "a/c/0", range(0, 4), late);
    assert_eq!(
        cache.sampled().0.unwrap().trace().flags[7..],
        [OUTDATED, 0, OUTDATED]
    );
}

#[test]
fn nothing_is_kept_of_what_is_being_changed() {
    let mut cache: Cache<Heap, u32> = Cache::new(Heap::default(), LIMITS, 7).unwrap();
    let fresh = Freshness {
        now: 10,
        max_age: None,
    };
    ask!(cache, "a/c/0", ByteRange::Full, fresh);
    cache.begin_write("a/c/0").unwrap();
    ask!(cache, "a/c/0", ByteRange::Full, fresh);
    ask!(cache, "a/c/0", range(3, 9), fresh);
    cache.settle_sampled("a/c/0", range(3, 9), 6, false);
    ask!(cache, "a/c/1", ByteRange::Full, fresh);
    cache.end_write("a/c/0", false, None).unwrap();
    ask!(cache, "a/c/0", ByteRange::Full, fresh);
    // A key is a prefix as well.
    cache.prefix_change("a/c/0", true).unwrap();
    cache.invalidate_prefix("a/c/0");
    ask!(cache, "a/c/0", ByteRange::Full, fresh);
    let trace = cache.sampled().0.unwrap().trace();
    assert_eq!(
        trace.flags,
        [0, DROPPED, OUTDATED, OUTDATED, 0, 0, DROPPED, OUTDATED]
    );
}

#[test]
fn hits_that_could_not_be_served_are_requests_for_the_source() {
    let fresh = Freshness {
        now: 10,
        max_age: Some(100),
    };
    let parts = [ByteRange::Full, range(3, 9)];
    // One after the other, and two that were found at once.
    for groups in [
        parts.map(|part| vec![part]).to_vec(),
        vec![vec![parts[1]; 2]],
    ] {
        let mut cache: Cache<Heap, u32> = Cache::new(Heap::default(), LIMITS, 7).unwrap();
        ask!(cache, "a/c/0", ByteRange::Full, fresh);
        fill!(cache, "a/c/0", ByteRange::Full, 50, 10);
        for group in &groups {
            for part in group {
                ask!(cache, "a/c/0", *part, fresh);
            }
            for part in group {
                cache.miss_sampled("a/c/0", *part, true);
            }
        }
        // What is looked up once more is none at all.
        cache.retract_sampled("a/c/0", range(3, 9));
        ask!(cache, "a/c/0", range(3, 9), fresh);
        let trace = cache.sampled().0.unwrap().trace();
        assert_eq!((trace.requests, &trace.flags[..]), (3, &[0, 0, HIT][..]));
        let asked: Vec<ByteRange> = trace.parts.iter().map(|part| part.range).collect();
        assert_eq!(asked, [ByteRange::Full, groups[0][0], range(3, 9)]);
    }
}

#[test]
fn what_is_known_to_be_missing_is_no_request() {
    let mut cache: Cache<Heap, u32> = Cache::new(Heap::default(), LIMITS, 7).unwrap();
    let fresh = Freshness {
        now: 10,
        max_age: None,
    };
    let Joined::Lead(ticket) = cache.join("a", ByteRange::Full, 0, fresh, false).unwrap() else {
        panic!("it is on its way");
    };
    cache.commit_absence("a", ticket, 10, 10, true).unwrap();
    ask!(cache, "a", ByteRange::Full, fresh);
    assert!(cache.sampled().0.is_none());
}

// ------------------------------------------------------------------------- in a file

type Index = SharedIndex<u32>;

fn open(root: &Path) -> Index {
    let (mut index, fresh) = Index::open(root, &Opening::new(LIMITS, 1)).unwrap();
    if fresh {
        index.complete().unwrap();
    }
    index
}

fn read(index: &mut Index, key: &str) {
    let step = |cache: &mut Cache<_, u32>| {
        ask!(
            cache,
            key,
            ByteRange::Full,
            Freshness {
                now: 1,
                max_age: None
            }
        );
        Ok(())
    };
    index.step(|_| (), step).unwrap();
}

fn sampled(index: &mut Index) -> u64 {
    let step = |cache: &mut Cache<_, u32>| Ok(cache.sampled().0);
    let Some(sample) = index.step(|_| (), step).unwrap() else {
        return 0;
    };
    let trace = sample.trace();
    assert_eq!(trace.parts.len() as u64, trace.requests);
    trace.requests
}

#[test]
fn participants_share_a_sample_which_outlives_them_and_a_rebuild() {
    let place = Place::new("sample-shared");
    let (mut one, mut other) = (open(&place.0), open(&place.0));
    read(&mut one, "a");
    read(&mut other, "b");
    read(&mut other, "a");
    assert_eq!([sampled(&mut one), sampled(&mut other)], [3, 3]);
    drop((one, other));
    // One has died in a step: the index begins anew, with another seed.
    let mut head = fs::read(place.at("head")).unwrap();
    head[8] = 9;
    fs::write(place.at("head"), head).unwrap();
    let (mut index, fresh) = Index::open(&place.0, &Opening::new(LIMITS, 99)).unwrap();
    assert!(fresh);
    assert_eq!(sampled(&mut index), 3);
    read(&mut index, "a");
    let step = |cache: &mut Cache<_, u32>| Ok(keys_of(&cache.sampled().0.unwrap().trace()));
    let keys = index.step(|_| (), step).unwrap();
    assert!(keys[0] == keys[2] && keys[2] == keys[3] && keys[0] != keys[1]);
}

#[test]
fn a_file_that_is_damaged_is_begun_anew() {
    let place = Place::new("sample-damaged");
    let file = place.at("sample");
    for damage in [
        Vec::new(),
        vec![7; 100],
        vec![0xff; 900_000],
        vec![0; size_of::<Sample>()],
        vec![0xff; size_of::<Sample>()],
    ] {
        let mut index = open(&place.0);
        read(&mut index, "a");
        assert!(sampled(&mut index) > 0);
        drop(index);
        fs::write(&file, &damage).unwrap();
        let mut index = open(&place.0);
        assert_eq!(sampled(&mut index), 0, "{}", damage.len());
        read(&mut index, "a");
        assert_eq!(sampled(&mut index), 1);
    }
}

#[test]
fn a_file_that_is_taken_away_in_use_costs_only_the_sample() {
    let place = Place::new("sample-gone");
    let file = place.at("sample");
    let (mut one, mut other) = (open(&place.0), open(&place.0));
    read(&mut one, "a");
    fs::remove_file(&file).unwrap();
    read(&mut one, "a");
    assert_eq!(sampled(&mut one), 0);
    read(&mut one, "a");
    // The other one finds the new file when it is asked.
    assert_eq!(sampled(&mut other), 1);
    read(&mut other, "b");
    assert_eq!([sampled(&mut one), sampled(&mut other)], [2, 2]);
    // Cut off, upon which its pages are gone.
    fs::OpenOptions::new()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(10)
        .unwrap();
    read(&mut one, "a");
    assert_eq!(sampled(&mut one), 0);
    read(&mut one, "a");
    assert_eq!(sampled(&mut one), 1);
    // A folder in its place makes way.
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    read(&mut one, "a");
    assert_eq!(sampled(&mut one), 0);
    read(&mut one, "a");
    assert_eq!(sampled(&mut one), 1);
    let mut third = open(&place.0);
    read(&mut third, "a");
    assert_eq!(sampled(&mut third), 2);
}

#[test]
fn a_file_grows_with_its_use() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new("sample-grows");
    let mut index = open(&place.0);
    let held = || fs::metadata(place.at("sample")).unwrap().blocks() * 512;
    assert!(held() < 100_000);
    for number in 0..3000 {
        read(&mut index, &format!("a/c/{number}"));
    }
    assert_eq!(sampled(&mut index), 3000);
    assert!(held() > 100_000);
}
