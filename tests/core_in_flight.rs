//! Flights: which one a reader joins, and which numbers name them.

use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, RejectReason, Reserve};
use zcache::cache::{Flights, Ticket};
use zcache::key::ByteRange;

const LIMITS: Limits = Limits::bounded(100);

fn cache() -> Cache<Heap, u32> {
    Cache::new(Heap::default(), LIMITS, 1).unwrap()
}

fn join(cache: &mut Cache<Heap, u32>, range: ByteRange, payload: u32) -> Joined<u32> {
    cache.join("a/c/0", range, payload, 1, false).unwrap()
}

fn lead(cache: &mut Cache<Heap, u32>, range: ByteRange, payload: u32) -> Ticket {
    match join(cache, range, payload) {
        Joined::Lead(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

#[test]
fn abort_flight_is_not_joined_or_cached() {
    let mut cache = cache();
    let range = |n| ByteRange::Range {
        start: n,
        end: n + 1,
    };
    // Enough flights for one key to be found through an index, too.
    let tickets: Vec<Ticket> = (0..40)
        .map(|n| lead(&mut cache, range(n), n as u32))
        .collect();
    assert_eq!(cache.abort_flight("a/c/0", |payload| *payload == 99), None);
    assert_eq!(cache.abort_flight("a/c/1", |payload| *payload == 7), None);
    let aborted = cache
        .abort_flight("a/c/0", |payload| *payload == 7)
        .unwrap();
    assert_eq!(aborted.payload, Some(7));
    assert!(!aborted.joined);
    assert_eq!(cache.abort_flight("a/c/0", |payload| *payload == 7), None);
    // Its value is not cached, and completing it does nothing.
    let answer = cache.reserve("a/c/0", range(7), 1, tickets[7], 1).unwrap();
    assert_eq!(answer, Reserve::Rejected(RejectReason::Invalidated));
    assert_eq!(cache.complete_flight("a/c/0", tickets[7]), None);
    // The next reader opens a flight; the other flights go on.
    lead(&mut cache, range(7), 70);
    for n in 0..40 {
        let payload = if n == 7 { 70 } else { n as u32 };
        assert_eq!(
            join(&mut cache, range(n), 99),
            Joined::Follow(range(n), payload)
        );
    }
    assert_eq!(cache.in_flight().0, 40);
}

#[test]
fn abort_flight_during_fill_deletes_its_bytes() {
    let mut cache = cache();
    let ticket = lead(&mut cache, ByteRange::Full, 1);
    let Reserve::Granted(id) = cache
        .reserve("a/c/0", ByteRange::Full, 8, ticket, 1)
        .unwrap()
    else {
        panic!("not granted")
    };
    cache.abort_flight("a/c/0", |_| true).unwrap();
    let done = cache.commit(id, Some(0), 1).unwrap().unwrap();
    assert_eq!(done.victims.len(), 1);
    assert_eq!(done.flight, None);
    assert_eq!(cache.peek("a/c/0", ByteRange::Full, 1).unwrap(), None);
    cache.deletes_done(&[done.victims[0].cell], &[]).unwrap();
    assert_eq!(cache.current_size(), 0);
    cache.validate().unwrap();
}

#[test]
fn commit_number_of_another_index_is_unknown() {
    let mut first = cache();
    let mut second = cache();
    let ticket = lead(&mut first, ByteRange::Full, 1);
    assert_ne!(ticket, lead(&mut second, ByteRange::Full, 2));
    let Reserve::Granted(id) = first
        .reserve("a/c/0", ByteRange::Full, 8, ticket, 1)
        .unwrap()
    else {
        panic!("not granted")
    };
    assert_eq!(second.complete_flight("a/c/0", ticket), None);
    assert_eq!(
        second
            .reserve("a/c/0", ByteRange::Full, 8, ticket, 1)
            .unwrap(),
        Reserve::Rejected(RejectReason::Invalidated)
    );
    assert!(second.commit(id, Some(0), 1).unwrap().is_none());
    assert!(second.abort(id).unwrap().is_empty());
    assert_eq!(second.in_flight().0, 1);
    assert!(first.commit(id, Some(0), 1).unwrap().is_some());
    // After a fork too, which drops all flights.
    let mut flights: Flights<u32> = first.after_fork().unwrap();
    assert!(flights.take().is_empty());
    assert!(first.drop_missing("a/c/0").unwrap().len() == 1);
    assert!(lead(&mut first, ByteRange::Full, 3) > ticket);
}

#[test]
fn abandon_reservation_leaves_failed_deletes() {
    let mut cache = cache();
    let fill = |cache: &mut Cache<Heap, u32>, key: &str, size| {
        let Joined::Lead(ticket) = cache.join(key, ByteRange::Full, 0, 1, false).unwrap() else {
            panic!("{key} is there")
        };
        cache
            .reserve(key, ByteRange::Full, size, ticket, 1)
            .unwrap()
    };
    let Reserve::Granted(id) = fill(&mut cache, "a", 60) else {
        panic!("not granted")
    };
    cache.commit(id, Some(0), 1).unwrap();
    // It waits for a delete, which may or may not have happened.
    let Reserve::NeedsEviction(id, victims) = fill(&mut cache, "b", 50) else {
        panic!("no eviction needed")
    };
    assert_eq!(victims.len(), 1);
    cache.abandon(id).unwrap();
    assert_eq!(cache.in_flight().1, 0);
    assert_eq!(cache.current_size(), 60);
    cache.validate().unwrap();
    // It was granted, and its bytes may or may not have been written.
    let failed = cache.retry_failed(10).unwrap();
    assert_eq!(failed.len(), 1);
    cache.deletes_done(&[failed[0].cell], &[]).unwrap();
    let Reserve::Granted(id) = fill(&mut cache, "c", 50) else {
        panic!("not granted")
    };
    cache.abandon(id).unwrap();
    assert!(cache.commit(id, Some(0), 1).unwrap().is_none());
    assert_eq!(cache.current_size(), 50);
    assert_eq!(cache.retry_failed(10).unwrap()[0].cache_key, "c");
    // One that has ended already.
    cache.abandon(id).unwrap();
    cache.validate().unwrap();
}

#[test]
fn reserve_below_changing_prefix_is_rejected() {
    let mut cache = cache();
    let earlier = lead(&mut cache, ByteRange::Full, 1);
    cache.invalidate_prefix("a/");
    cache.prefix_change("a/", true).unwrap();
    cache.prefix_change("a", true).unwrap();
    let during = lead(&mut cache, ByteRange::Full, 2);
    for ticket in [earlier, during] {
        let answer = cache
            .reserve("a/c/0", ByteRange::Full, 1, ticket, 1)
            .unwrap();
        assert_eq!(answer, Reserve::Rejected(RejectReason::Invalidated));
    }
    // Keys beside the prefix are not affected.
    let Joined::Lead(beside) = cache.join("ab", ByteRange::Full, 3, 1, false).unwrap() else {
        panic!("no other reader")
    };
    let answer = cache.reserve("ab", ByteRange::Full, 1, beside, 1).unwrap();
    assert!(matches!(answer, Reserve::Granted(_)));
    // One of two has ended.
    cache.prefix_change("a", false).unwrap();
    let answer = cache
        .reserve("a/c/0", ByteRange::Full, 1, during, 1)
        .unwrap();
    assert_eq!(answer, Reserve::Rejected(RejectReason::Invalidated));
    cache.invalidate_prefix("a");
    cache.prefix_change("a/", false).unwrap();
    let later = lead(&mut cache, ByteRange::Full, 4);
    let answer = cache
        .reserve("a/c/0", ByteRange::Full, 1, later, 1)
        .unwrap();
    assert!(matches!(answer, Reserve::Granted(_)));
}

#[test]
fn end_write_of_a_value_that_another_write_overlapped_is_a_rejection() {
    let mut cache = cache();
    let refusals = |cache: &Cache<Heap, u32>| cache.stats().refusals;
    cache.begin_write("a/c/0").unwrap();
    cache.begin_write("a/c/0").unwrap();
    assert_eq!(cache.end_write("a/c/0", true, None).unwrap().1, None);
    assert_eq!(refusals(&cache), 1);
    // One that has failed, or has nothing to keep.
    assert_eq!(cache.end_write("a/c/0", false, None).unwrap().1, None);
    assert_eq!(refusals(&cache), 1);
    // It ends below a prefix that has changed meanwhile.
    cache.begin_write("a/c/0").unwrap();
    cache.invalidate_prefix("a");
    assert_eq!(cache.end_write("a/c/0", true, None).unwrap().1, None);
    assert_eq!(refusals(&cache), 2);
    cache.begin_write("a/c/0").unwrap();
    assert!(cache.end_write("a/c/0", true, None).unwrap().1.is_some());
    assert_eq!(refusals(&cache), 2);
}

#[test]
fn end_write_with_payload_is_joined_until_its_value_is_cached() {
    let mut cache = cache();
    cache.begin_write("a/c/0").unwrap();
    let (_, ticket) = cache.end_write("a/c/0", true, Some(9)).unwrap();
    let ticket = ticket.unwrap();
    let joined = cache.join("a/c/0", ByteRange::Full, 1, 1, false).unwrap();
    assert_eq!(joined, Joined::Follow(ByteRange::Full, 9));
    let answer = cache
        .reserve("a/c/0", ByteRange::Full, 1, ticket, 1)
        .unwrap();
    let Reserve::Granted(id) = answer else {
        panic!("{answer:?}");
    };
    let done = cache.commit(id, Some(0), 1).unwrap().unwrap();
    assert!(done.flight.unwrap().joined);
    let joined = cache.join("a/c/0", ByteRange::Full, 1, 1, false).unwrap();
    assert_eq!(joined, Joined::Ready);
}

fn part(n: u64) -> ByteRange {
    ByteRange::Range {
        start: n,
        end: n + 1,
    }
}

#[test]
fn superseded_flight_ends_with_the_next_of_its_range() {
    // Few flights of one key, and so many that they are found through an index.
    for others in [0, 40] {
        let mut cache = cache();
        for n in 0..others {
            lead(&mut cache, part(n), n as u32);
        }
        let range = part(99);
        let first = lead(&mut cache, range, 101);
        assert_eq!(join(&mut cache, range, 0), Joined::Follow(range, 101));
        cache.supersede_flight("a/c/0", |payload| *payload == 101);
        let second = lead(&mut cache, range, 102);
        cache.supersede_flight("a/c/0", |payload| *payload == 102);
        let third = lead(&mut cache, range, 103);
        assert_eq!(join(&mut cache, range, 0), Joined::Follow(range, 103));
        cache.validate().unwrap();
        // The first one goes on, and is cached.
        let Reserve::Granted(id) = cache.reserve("a/c/0", range, 1, first, 1).unwrap() else {
            panic!("not granted")
        };
        let done = cache.commit(id, Some(0), 1).unwrap().unwrap();
        assert!(done.flight.unwrap().joined);
        cache.validate().unwrap();
        // The second one, which can do so no more, ends with the third one.
        let closed = cache.complete_flight("a/c/0", third).unwrap();
        assert_eq!((closed.payload, closed.passed), (Some(103), vec![102]));
        assert_eq!(cache.complete_flight("a/c/0", second), None);
        assert_eq!(cache.in_flight().0, others as usize);
        assert_eq!(cache.is_in_flight("a/c/0"), others > 0);
        cache.validate().unwrap();
    }
}

#[test]
fn superseded_flight_is_aborted_by_one_who_waits_for_it() {
    let mut cache = cache();
    let first = lead(&mut cache, ByteRange::Full, 1);
    cache.supersede_flight("a/c/0", |payload| *payload == 1);
    let closed = cache.abort_flight("a/c/0", |payload| *payload == 1);
    assert_eq!(closed.unwrap().payload, Some(1));
    assert_eq!(cache.complete_flight("a/c/0", first), None);
    assert!(!cache.is_in_flight("a/c/0"));
}

#[test]
fn invalidated_flight_ends_with_the_next_that_would_have_joined_it() {
    for range in [ByteRange::Full, part(3)] {
        let mut cache = cache();
        lead(&mut cache, ByteRange::Full, 1);
        cache.invalidate_prefix("a");
        lead(&mut cache, ByteRange::Full, 2);
        cache.invalidate_prefix("a");
        let third = lead(&mut cache, range, 3);
        cache.validate().unwrap();
        let mut closed = cache.complete_flight("a/c/0", third).unwrap();
        closed.passed.sort_unstable();
        assert_eq!(closed.passed, [1, 2]);
        assert!(!cache.is_in_flight("a/c/0"));
        cache.validate().unwrap();
    }
}

#[test]
fn superseded_flight_of_a_full_value_goes_on_beside_a_part() {
    let mut cache = cache();
    let full = lead(&mut cache, ByteRange::Full, 1);
    cache.supersede_flight("a/c/0", |_| true);
    let ticket = lead(&mut cache, part(3), 2);
    let closed = cache.complete_flight("a/c/0", ticket).unwrap();
    assert!(closed.passed.is_empty());
    let answer = cache.reserve("a/c/0", ByteRange::Full, 1, full, 1).unwrap();
    assert!(matches!(answer, Reserve::Granted(_)));
}
