//! Validators: kept with their entry in one step, gone with it, and what they let start anew.

use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Reserve};
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
    if let Some(validator) = validator {
        index.set_validator(key, ticket, validator);
    }
    let mut answer = index.reserve(key, range, 5, ticket, now).unwrap();
    while let Reserve::NeedsEviction(id, _) = answer {
        answer = index.all_evicted(id, now).unwrap();
    }
    let Reserve::Granted(id) = answer else {
        panic!("{answer:?}");
    };
    index.commit(id, Some(9), now).unwrap().unwrap();
    index.validate().unwrap();
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
    fill(&mut index, "a", other, Some("w"), 1);
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
    if let Some(validator) = validator {
        index.set_validator(key, ticket, validator);
    }
    let mut answer = index.reserve(key, ByteRange::Full, 5, ticket, 1).unwrap();
    while let Reserve::NeedsEviction(id, _) = answer {
        answer = index.all_evicted(id, 1).unwrap();
    }
    let Reserve::Granted(id) = answer else {
        panic!("{answer:?}");
    };
    index.commit(id, Some(9), 1).unwrap().unwrap();
}
