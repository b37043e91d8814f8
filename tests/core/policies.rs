//! A cache in memory under a policy of eviction, and how it is read.

use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Reserve};
use zcache::key::ByteRange;
use zcache::policy::{Minimise, Policy, PolicyKind};

pub(crate) type Tested = Cache<Heap, (), Policy>;

pub(crate) fn cache_that_minimises(minimise: Minimise, max_size: u64, kind: PolicyKind) -> Tested {
    let limits = Limits::bounded(max_size);
    let mut cache: Tested = Cache::new(Heap::default(), limits, 1).unwrap();
    cache.set_policy(kind, minimise);
    cache
}

/// Reads a key, and fills it in where it was a miss, with this after each step; whether it was a hit.
pub(crate) fn read_and(
    cache: &mut Tested,
    key: &str,
    range: ByteRange,
    size: u64,
    check: impl Fn(&Tested),
) -> bool {
    let is_hit = cache.lookup(key, range, 1).unwrap().is_some();
    if !is_hit && let Joined::Lead(ticket) = cache.join(key, range, (), 1, false).unwrap() {
        let mut answer = cache.reserve(key, range, size, ticket, 1).unwrap();
        while let Reserve::NeedsEviction(id, _) = answer {
            check(cache);
            answer = cache.all_evicted(id, 1).unwrap();
        }
        match answer {
            Reserve::Granted(id) => drop(cache.commit(id, None, 1).unwrap()),
            _ => drop(cache.complete_flight(key, ticket)),
        }
    }
    check(cache);
    assert!(cache.current_size() <= cache.limits().max_size);
    is_hit
}
