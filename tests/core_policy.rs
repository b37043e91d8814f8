//! The seam for eviction policies: a cache goes by whichever policy it has.

use zcache::arena::{End, Heap, List};
use zcache::cache::{Cache, Joined, Limits, Reserve};
use zcache::error::Result;
use zcache::key::ByteRange;
use zcache::policy::{Entries, Eviction, Lru};

/// First in, first out: reads change nothing.
#[derive(Debug, Default)]
struct Fifo;

impl Eviction for Fifo {
    fn insert<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        entries.enter(entry, 0)
    }
    fn touch<E: Entries>(&mut self, _: &mut E, _: u32) -> Result<()> {
        Ok(())
    }
    fn remove<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        entries.leave(entry)
    }
    fn victim<E: Entries>(&mut self, entries: &mut E) -> Result<Option<u32>> {
        entries.end(List::Recency, End::First)
    }
    fn order<E: Entries>(&self, entries: &E) -> Result<Vec<u32>> {
        entries.all_of(List::Recency)
    }
    fn reset(&mut self) {}
}

/// Fills three of the keys `a` to `d`, reads `a`, and fills the fourth; returns what is cached, next
/// victim first.
fn evict_one<P: Eviction>() -> Vec<String> {
    let limits = Limits::bounded(3);
    let mut cache: Cache<Heap, (), P> = Cache::new(Heap::default(), limits, 1).unwrap();
    for key in ["a", "b", "c", "d"] {
        if key == "d" {
            assert!(cache.lookup("a", ByteRange::Full, 1).unwrap().is_some());
        }
        let Joined::Lead(ticket) = cache.join(key, ByteRange::Full, (), 1, false).unwrap() else {
            panic!("{key} is cached already");
        };
        let mut answer = cache.reserve(key, ByteRange::Full, 1, ticket, 1).unwrap();
        if let Reserve::NeedsEviction(id, victims) = answer {
            assert_eq!(victims.len(), 1);
            answer = cache.all_evicted(id, 1).unwrap();
        }
        let Reserve::Granted(id) = answer else {
            panic!("{answer:?}");
        };
        cache.commit(id, Some(0), 1).unwrap().unwrap();
        cache.validate().unwrap();
    }
    let order = cache.recency().unwrap();
    order.into_iter().map(|(key, _)| key).collect()
}

#[test]
fn lru_entry_that_was_read_is_kept() {
    assert_eq!(evict_one::<Lru>(), ["c", "a", "d"]);
}

#[test]
fn other_policy_decides_for_the_whole_cache() {
    assert_eq!(evict_one::<Fifo>(), ["b", "c", "d"]);
}
