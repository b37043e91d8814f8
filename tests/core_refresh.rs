//! Validators: kept with their entry in one step, gone with it, and what they let start anew.

use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Reserve, Victim};
use zcache::key::{ByteRange, MAX_LABEL};

type Index = Cache<Heap, ()>;

const AGE: Option<u64> = Some(100);

fn index(max_size: u64) -> Index {
    let limits = Limits::bounded(max_size);
    Cache::new(Heap::default(), limits, 7).unwrap()
}

fn lead(index: &mut Index, key: &str, range: ByteRange, now: u64) -> u64 {
    match index.join(key, range, (), (now, AGE), false).unwrap() {
        Joined::Lead(ticket) => ticket,
        other => panic!("{key} is there or on its way: {other:?}"),
    }
}

fn fill(index: &mut Index, key: &str, range: ByteRange, validator: Option<&str>, now: u64) {
    let ticket = lead(index, key, range, now);
    arrive(index, key, ticket, validator, now);
    fill_led(index, key, range, ticket, now);
}

/// What was asked for at this time has come. Returns the names of what goes.
fn arrive(
    index: &mut Index,
    key: &str,
    ticket: u64,
    validator: Option<&str>,
    fetched: u64,
) -> Vec<String> {
    let victims = index.note_arrival(key, ticket, validator, fetched, fetched);
    delete(index, victims.unwrap())
}

fn delete(index: &mut Index, victims: Vec<Victim>) -> Vec<String> {
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    index.deletes_done(&cells, &[]).unwrap();
    let mut names: Vec<String> = victims.into_iter().map(|v| v.cache_key).collect();
    names.sort();
    names
}

fn fill_led(index: &mut Index, key: &str, range: ByteRange, ticket: u64, now: u64) {
    let mut answer = index.reserve(key, range, 5, ticket, now).unwrap();
    while let Reserve::NeedsEviction(id, _) = answer {
        answer = index.all_evicted(id, now).unwrap();
    }
    let Reserve::Granted(id) = answer else {
        panic!("{answer:?}");
    };
    index
        .commit_fetched(id, Some(9), now, now)
        .unwrap()
        .unwrap();
    index.validate().unwrap();
}

fn part(n: u64) -> ByteRange {
    ByteRange::Range {
        start: 10 * n,
        end: 10 * n + 5,
    }
}

fn names(key: &str, parts: &[u64]) -> Vec<String> {
    parts.iter().map(|&n| part(n).cache_key(key)).collect()
}

fn is_fresh(index: &Index, key: &str, range: ByteRange, now: u64) -> bool {
    index.peek(key, range, (now, AGE)).unwrap().is_some()
}

#[test]
fn validator_is_kept_with_its_entry_and_replaced_with_it() {
    let mut index = index(1000);
    fill(&mut index, "a", ByteRange::Full, Some("first"), 1);
    assert_eq!(
        index.validator("a", ByteRange::Full).unwrap().as_deref(),
        Some("first")
    );
    fill(&mut index, "a", ByteRange::Full, Some("another"), 101);
    assert_eq!(
        index.validator("a", ByteRange::Full).unwrap().as_deref(),
        Some("another")
    );
    fill(&mut index, "a", ByteRange::Full, None, 201);
    assert_eq!(index.validator("a", ByteRange::Full).unwrap(), None);
    assert_eq!(index.validator("b", ByteRange::Full).unwrap(), None);
    for (now, length, fits) in [(301, MAX_LABEL, true), (501, MAX_LABEL + 1, false)] {
        let validator = "x".repeat(length);
        fill(&mut index, "a", ByteRange::Full, Some(&validator), now);
        let held = index.validator("a", ByteRange::Full).unwrap();
        assert_eq!(held, fits.then_some(validator));
    }
}

#[test]
fn refresh_same_validator_dates_all_parts_of_the_key() {
    let mut index = index(1000);
    let parts = [
        ByteRange::Range { start: 1, end: 6 },
        ByteRange::Offset(20),
        ByteRange::Suffix(5),
    ];
    for part in parts {
        fill(&mut index, "a", part, Some("v"), 1);
    }
    let other = ByteRange::Range { start: 8, end: 13 };
    fill(&mut index, "a", other, None, 1);
    fill(&mut index, "b", parts[0], Some("v"), 1);
    let ticket = lead(&mut index, "a", parts[0], 150);
    let found = index
        .refresh("a", parts[0], ticket, "v", 140, 150)
        .unwrap()
        .unwrap();
    assert_eq!((found.range, found.size), (parts[0], 5));
    index.validate().unwrap();
    for part in parts {
        assert!(is_fresh(&index, "a", part, 239));
        assert!(!is_fresh(&index, "a", part, 240));
    }
    assert!(!is_fresh(&index, "a", other, 150));
    assert!(!is_fresh(&index, "b", parts[0], 150));
}

#[test]
fn refresh_another_validator_or_a_void_ticket_changes_nothing() {
    let mut index = index(1000);
    fill(&mut index, "a", ByteRange::Full, Some("v"), 1);
    fill(&mut index, "b", ByteRange::Full, None, 1);
    let ticket = lead(&mut index, "a", ByteRange::Full, 150);
    for validator in ["", "w", "vv"] {
        let found = index.refresh("a", ByteRange::Full, ticket, validator, 150, 150);
        assert_eq!(found.unwrap(), None);
    }
    let of_b = lead(&mut index, "b", ByteRange::Full, 150);
    let found = index.refresh("b", ByteRange::Full, of_b, "v", 150, 150);
    assert_eq!(found.unwrap(), None);
    index.invalidate_prefix("a");
    let found = index.refresh("a", ByteRange::Full, ticket, "v", 150, 150);
    assert_eq!(found.unwrap(), None);
    assert!(!is_fresh(&index, "a", ByteRange::Full, 150));
    index.validate().unwrap();
}

#[test]
fn note_arrival_another_validator_ends_what_is_older_of_the_key() {
    let mut index = index(1000);
    for n in 0..3 {
        fill(&mut index, "a", part(n), Some("v"), n);
    }
    fill(&mut index, "a", part(3), None, 3);
    fill(&mut index, "b", part(0), Some("v"), 3);
    let decode = index.begin_decode("a", (4, AGE).into()).unwrap().unwrap();
    let ticket = lead(&mut index, "a", part(4), 5);
    assert_eq!(
        arrive(&mut index, "a", ticket, Some("v"), 5),
        names("a", &[])
    );
    fill_led(&mut index, "a", part(4), ticket, 5);
    let fresh = (8, AGE).into();
    assert!(index.is_current("a", decode, 4, fresh, false).unwrap());
    let ticket = lead(&mut index, "a", part(5), 7);
    let gone = arrive(&mut index, "a", ticket, Some("w"), 7);
    assert_eq!(gone, names("a", &[0, 1, 2, 3, 4]));
    assert!(!index.is_current("a", decode, 4, fresh, false).unwrap());
    fill_led(&mut index, "a", part(5), ticket, 7);
    assert!(is_fresh(&index, "a", part(5), 8));
    assert!(is_fresh(&index, "b", part(0), 8));
}

#[test]
fn note_arrival_of_what_a_later_read_has_found_changed_is_not_kept() {
    let mut index = index(1000);
    let early = lead(&mut index, "a", part(0), 5);
    fill(&mut index, "a", part(1), Some("w"), 6);
    assert_eq!(
        arrive(&mut index, "a", early, Some("v"), 5),
        names("a", &[])
    );
    let refused = index.reserve("a", part(0), 5, early, 7).unwrap();
    assert!(matches!(refused, Reserve::Rejected(_)));
    assert!(is_fresh(&index, "a", part(1), 8));
    index.validate().unwrap();
}

#[test]
fn commit_of_another_value_than_the_one_that_is_cached_by_now_is_refused() {
    let mut index = index(1000);
    let tickets = [0, 1].map(|n| lead(&mut index, "a", part(n), 5));
    // Both have come before either is cached.
    for (ticket, validator) in tickets.into_iter().zip(["v", "w"]) {
        assert_eq!(
            arrive(&mut index, "a", ticket, Some(validator), 5),
            names("a", &[])
        );
    }
    fill_led(&mut index, "a", part(1), tickets[1], 6);
    let Reserve::Granted(id) = index.reserve("a", part(0), 5, tickets[0], 6).unwrap() else {
        panic!("there is room");
    };
    let victims = index.commit(id, Some(9), 6).unwrap().unwrap().victims;
    assert_eq!(delete(&mut index, victims), names("a", &[0]));
    assert!(is_fresh(&index, "a", part(1), 8));
    assert!(!is_fresh(&index, "a", part(0), 8));
    index.validate().unwrap();
}

#[test]
fn note_arrival_in_place_of_what_has_expired_ends_what_is_older() {
    let mut index = index(1000);
    fill(&mut index, "a", part(0), None, 1);
    fill(&mut index, "a", ByteRange::Full, None, 70);
    fill(&mut index, "a", part(1), None, 100);
    fill(&mut index, "b", part(1), None, 100);
    let ticket = lead(&mut index, "a", part(0), 171);
    let gone = arrive(&mut index, "a", ticket, None, 171);
    assert_eq!(gone, [".zcache/ranges/a@10-15", "a"]);
    fill_led(&mut index, "a", part(0), ticket, 171);
    assert!(is_fresh(&index, "b", part(1), 171));
    // Nothing has expired any more.
    let ticket = lead(&mut index, "a", part(1), 175);
    assert_eq!(arrive(&mut index, "a", ticket, None, 175), names("a", &[]));
}

#[test]
fn note_arrival_ends_earlier_reads_but_not_those_for_what_has_expired_too() {
    let mut index = index(1000);
    for n in 0..3 {
        fill(&mut index, "a", part(n), None, 1);
    }
    let early = lead(&mut index, "a", part(9), 100);
    let tickets = [0, 1, 2].map(|n| lead(&mut index, "a", part(n), 101 + n));
    // They come in another order than they were asked for in.
    assert_eq!(
        arrive(&mut index, "a", tickets[2], None, 103),
        names("a", &[0, 1])
    );
    let refused = index.reserve("a", part(9), 5, early, 104).unwrap();
    assert!(matches!(refused, Reserve::Rejected(_)));
    for (n, ticket) in [2, 0, 1].map(|n| (n, tickets[n as usize])) {
        assert_eq!(
            arrive(&mut index, "a", ticket, None, 101 + n),
            names("a", &[])
        );
        fill_led(&mut index, "a", part(n), ticket, 101 + n);
    }
    for n in 0..3 {
        assert!(is_fresh(&index, "a", part(n), 105));
    }
}

#[test]
fn eviction_of_a_range_that_has_expired_ends_all_ranges_of_its_key() {
    let mut limits = Limits::bounded(20);
    limits.max_age = AGE;
    let mut index: Index = Cache::new(Heap::default(), limits, 7).unwrap();
    fill(&mut index, "a", part(0), None, 1);
    fill(&mut index, "a", part(1), None, 60);
    fill(&mut index, "b", part(1), None, 60);
    fill(&mut index, "a", part(2), None, 61);
    fill(&mut index, "c", ByteRange::Full, None, 101);
    assert_eq!((index.len(), index.stats().expirations), (2, 3));
    assert!(is_fresh(&index, "b", part(1), 102));
    assert!(!is_fresh(&index, "a", part(1), 102));
}

#[test]
fn refresh_never_makes_an_entry_older() {
    let mut index = index(1000);
    fill(&mut index, "a", ByteRange::Full, Some("v"), 100);
    let ticket = lead(&mut index, "a", ByteRange::Full, 250);
    let found = index.refresh("a", ByteRange::Full, ticket, "v", 50, 250);
    assert!(found.unwrap().is_some());
    assert!(is_fresh(&index, "a", ByteRange::Full, 199));
    index.validate().unwrap();
}

#[test]
fn validators_go_with_their_entries_and_cost_those_without_nothing() {
    let mut plain = index(10_000);
    let mut noted = index(10_000);
    for n in 0..5_000 {
        let key = format!("a/c/{n}");
        fill_quietly(&mut plain, &key, None);
        fill_quietly(&mut noted, &key, Some(&format!("\"etag-of-{n}\"")));
    }
    noted.validate().unwrap();
    let after = noted.memory();
    assert!(after > plain.memory());
    // Two thousand fit; those that were evicted have left no notes behind.
    for n in 5_000..15_000 {
        fill_quietly(&mut noted, &format!("a/c/{n}"), Some("\"etag\""));
    }
    noted.validate().unwrap();
    assert!(noted.memory() <= after + after / 4);
}

fn fill_quietly(index: &mut Index, key: &str, validator: Option<&str>) {
    let ticket = lead(index, key, ByteRange::Full, 1);
    arrive(index, key, ticket, validator, 1);
    let mut answer = index.reserve(key, ByteRange::Full, 5, ticket, 1).unwrap();
    while let Reserve::NeedsEviction(id, _) = answer {
        answer = index.all_evicted(id, 1).unwrap();
    }
    let Reserve::Granted(id) = answer else {
        panic!("{answer:?}");
    };
    index.commit(id, Some(9), 1).unwrap().unwrap();
}
