//! Flights: which one a reader joins, and which numbers name them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

use zcache::block::Heap;
use zcache::cache::{Cache, Joined, Limits, Refusal, Room, Verify};
use zcache::flights::{Flights, Ticket};
use zcache::key::Span;

const LIMITS: Limits = Limits {
    max_size: 100,
    max_age: None,
    lenient: false,
    flat: true,
    verify: Verify::Never,
};

fn cache() -> Cache<Heap, u32> {
    Cache::new(Heap::default(), LIMITS, 1).unwrap()
}

fn join(cache: &mut Cache<Heap, u32>, span: Span, payload: u32) -> Joined<u32> {
    cache.join("a/c/0", span, payload, 1, false).unwrap()
}

fn lead(cache: &mut Cache<Heap, u32>, span: Span, payload: u32) -> Ticket {
    match join(cache, span, payload) {
        Joined::Lead(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_flight_that_is_struck_off() {
    let mut cache = cache();
    let range = |n| Span::Range {
        start: n,
        end: n + 1,
    };
    // As many as make a key look for them by hash, too.
    let tickets: Vec<Ticket> = (0..40)
        .map(|n| lead(&mut cache, range(n), n as u32))
        .collect();
    assert_eq!(cache.strike("a/c/0", |payload| *payload == 99), None);
    assert_eq!(cache.strike("a/c/1", |payload| *payload == 7), None);
    let struck = cache.strike("a/c/0", |payload| *payload == 7).unwrap();
    assert_eq!(struck.payload, Some(7));
    assert!(!struck.joined);
    assert_eq!(cache.strike("a/c/0", |payload| *payload == 7), None);
    // What it brings is not kept, and to land it does nothing.
    let refused = cache.reserve("a/c/0", range(7), 1, tickets[7], 1).unwrap();
    assert_eq!(refused, Room::Refused(Refusal::Void));
    assert_eq!(cache.land("a/c/0", tickets[7]), None);
    // Whoever comes next reads anew; the others go on.
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
fn a_fill_under_way_of_a_flight_that_is_struck_off() {
    let mut cache = cache();
    let ticket = lead(&mut cache, Span::Full, 1);
    let Room::Granted(id) = cache.reserve("a/c/0", Span::Full, 8, ticket, 1).unwrap() else {
        panic!("there is room")
    };
    cache.strike("a/c/0", |_| true).unwrap();
    let done = cache.finish(id, Some(0), 1).unwrap().unwrap();
    assert_eq!(done.victims.len(), 1);
    assert_eq!(done.flight, None);
    assert_eq!(cache.peek("a/c/0", Span::Full, 1).unwrap(), None);
    cache.settled(&[done.victims[0].cell], &[]).unwrap();
    assert_eq!(cache.current_size(), 0);
    cache.validate().unwrap();
}

#[test]
fn what_was_begun_with_one_index_never_ends_in_another() {
    let mut first = cache();
    let mut second = cache();
    let ticket = lead(&mut first, Span::Full, 1);
    assert_ne!(ticket, lead(&mut second, Span::Full, 2));
    let Room::Granted(id) = first.reserve("a/c/0", Span::Full, 8, ticket, 1).unwrap() else {
        panic!("there is room")
    };
    assert_eq!(second.land("a/c/0", ticket), None);
    assert_eq!(
        second.reserve("a/c/0", Span::Full, 8, ticket, 1).unwrap(),
        Room::Refused(Refusal::Void)
    );
    assert!(second.finish(id, Some(0), 1).unwrap().is_none());
    assert!(second.abort(id).unwrap().is_empty());
    assert_eq!(second.in_flight().0, 1);
    assert!(first.finish(id, Some(0), 1).unwrap().is_some());
    // After a fork too, when all are dropped.
    let mut flights: Flights<u32> = first.after_fork().unwrap();
    assert!(flights.take().is_empty());
    assert!(first.forget("a/c/0").unwrap().len() == 1);
    assert!(lead(&mut first, Span::Full, 3) > ticket);
}

#[test]
fn a_reservation_whose_holder_is_gone() {
    let mut cache = cache();
    let fill = |cache: &mut Cache<Heap, u32>, key: &str, size| {
        let Joined::Lead(ticket) = cache.join(key, Span::Full, 0, 1, false).unwrap() else {
            panic!("{key} is there")
        };
        cache.reserve(key, Span::Full, size, ticket, 1).unwrap()
    };
    let Room::Granted(id) = fill(&mut cache, "a", 60) else {
        panic!("there is room")
    };
    cache.finish(id, Some(0), 1).unwrap();
    // It waits for a delete: nobody knows whether that was made.
    let Room::Evict(id, victims) = fill(&mut cache, "b", 50) else {
        panic!("there is no room")
    };
    assert_eq!(victims.len(), 1);
    cache.abandon(id).unwrap();
    assert_eq!(cache.in_flight().1, 0);
    assert_eq!(cache.current_size(), 60);
    cache.validate().unwrap();
    // It has been granted: nobody knows whether its bytes were written.
    let orphans = cache.orphans(10).unwrap();
    assert_eq!(orphans.len(), 1);
    cache.settled(&[orphans[0].cell], &[]).unwrap();
    let Room::Granted(id) = fill(&mut cache, "c", 50) else {
        panic!("there is room")
    };
    cache.abandon(id).unwrap();
    assert!(cache.finish(id, Some(0), 1).unwrap().is_none());
    assert_eq!(cache.current_size(), 50);
    assert_eq!(cache.orphans(10).unwrap()[0].cache_key, "c");
    // One that is over already.
    cache.abandon(id).unwrap();
    cache.validate().unwrap();
}

#[test]
fn what_is_below_a_prefix_that_is_being_changed() {
    let mut cache = cache();
    let earlier = lead(&mut cache, Span::Full, 1);
    cache.void_prefix("a/");
    cache.mark_change("a/", true);
    cache.mark_change("a", true);
    let during = lead(&mut cache, Span::Full, 2);
    for ticket in [earlier, during] {
        let refused = cache.reserve("a/c/0", Span::Full, 1, ticket, 1).unwrap();
        assert_eq!(refused, Room::Refused(Refusal::Void));
    }
    // Beside it everything goes on.
    let Joined::Lead(beside) = cache.join("ab", Span::Full, 3, 1, false).unwrap() else {
        panic!("nobody reads it")
    };
    let room = cache.reserve("ab", Span::Full, 1, beside, 1).unwrap();
    assert!(matches!(room, Room::Granted(_)));
    // One of two has ended.
    cache.mark_change("a", false);
    let refused = cache.reserve("a/c/0", Span::Full, 1, during, 1).unwrap();
    assert_eq!(refused, Room::Refused(Refusal::Void));
    cache.void_prefix("a");
    cache.mark_change("a/", false);
    let later = lead(&mut cache, Span::Full, 4);
    let room = cache.reserve("a/c/0", Span::Full, 1, later, 1).unwrap();
    assert!(matches!(room, Room::Granted(_)));
}
