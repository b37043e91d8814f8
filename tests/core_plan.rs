//! Plans of what will be read, under every policy: all books hold after each step, and the bound at each instant.

use zcache::cache::{BATCH, Victim};
use zcache::key::ByteRange;
use zcache::policy::{Minimise, Plan, PolicyKind};

use crate::policies::{Tested, cache_that_minimises, read_and};

fn cache(max_size: u64, kind: PolicyKind) -> Tested {
    cache_that_minimises(Minimise::Requests, max_size, kind)
}

/// Reads a key, and fills it in where it was a miss; whether it was a hit. All books hold after each step.
fn read(cache: &mut Tested, key: &str, range: ByteRange, size: u64) -> bool {
    read_and(cache, key, range, size, |cache| cache.validate().unwrap())
}

fn plan(keys: impl IntoIterator<Item = u64>) -> Plan {
    let mut plan = Plan::default();
    for key in keys {
        plan.push(&name(key));
    }
    plan.finish();
    plan
}

fn name(key: u64) -> String {
    format!("a/c/{key}")
}

fn follow(cache: &mut Tested, plan: Plan) {
    cache.set_plan(plan);
    let mut cursor = Some(cache.first_keys());
    while let Some(from) = cursor {
        cursor = cache.match_plan(from).unwrap();
    }
    cache.validate().unwrap();
}

/// The bytes of these are gone.
fn deleted(cache: &mut Tested, victims: &[Victim]) {
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    cache.deletes_done(&cells, &[]).unwrap();
}

/// Numbers that look like chance, the same each time.
fn chance(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[test]
fn plan_at_random_with_sizes_and_ranges_keeps_all_books() {
    let kinds = PolicyKind::ALL.into_iter();
    for (kind, minimise) in kinds.flat_map(|kind| Minimise::ALL.map(|minimise| (kind, minimise))) {
        let mut cache = cache_that_minimises(minimise, 500, kind);
        let mut state = kind as u64 + 1;
        for round in 0..30 {
            let order: Vec<u64> = (0..60).map(|_| chance(&mut state) % 40).collect();
            if round % 3 != 0 {
                follow(&mut cache, plan(order.iter().copied()));
            }
            for key in order {
                let key = if round % 5 == 0 { key + 20 } else { key };
                match chance(&mut state) % 8 {
                    0 => {
                        let victims = cache.begin_write(&name(key)).unwrap();
                        deleted(&mut cache, &victims);
                        let (victims, _) = cache.end_write(&name(key), false, None).unwrap();
                        deleted(&mut cache, &victims);
                    }
                    1 => {
                        read(&mut cache, &name(key), ByteRange::Suffix(3), 3);
                    }
                    _ => {
                        read(
                            &mut cache,
                            &name(key),
                            ByteRange::Full,
                            (key % 5) * (key % 13 + 1),
                        );
                    }
                }
                cache.validate().unwrap();
            }
            let victims = cache.evict(chance(&mut state) % 50, 1).unwrap();
            deleted(&mut cache, &victims);
            cache.validate().unwrap();
        }
    }
}

#[test]
fn plan_takes_what_is_in_none_first_and_in_the_order_of_the_policy() {
    let mut cache = cache(6, PolicyKind::Lru);
    for key in [100, 0, 101, 1, 102, 2] {
        read(&mut cache, &name(key), ByteRange::Full, 1);
    }
    follow(&mut cache, plan([3, 4, 5, 0, 1, 2, 3, 4, 5]));
    for (key, gone) in [(3, 100), (4, 101), (5, 102)] {
        assert!(
            cache
                .peek(&name(gone), ByteRange::Full, 1)
                .unwrap()
                .is_some()
        );
        assert!(!read(&mut cache, &name(key), ByteRange::Full, 1));
        assert!(
            cache
                .peek(&name(gone), ByteRange::Full, 1)
                .unwrap()
                .is_none()
        );
    }
    for key in 0..6 {
        assert!(read(&mut cache, &name(key), ByteRange::Full, 1));
    }
}

#[test]
fn plan_lets_nothing_in_that_is_needed_later_than_all_that_is_there() {
    for kind in PolicyKind::ALL {
        let mut cache = cache(3, kind);
        for key in [0, 1, 2] {
            read(&mut cache, &name(key), ByteRange::Full, 1);
        }
        follow(&mut cache, plan([3, 0, 1, 2, 3, 0, 1, 2]));
        read(&mut cache, &name(3), ByteRange::Full, 1);
        read(&mut cache, "other", ByteRange::Full, 1);
        for key in [0, 1, 2] {
            assert!(read(&mut cache, &name(key), ByteRange::Full, 1), "{kind:?}");
        }
        assert_eq!(cache.len(), 3);
    }
}

#[test]
fn plan_takes_what_needs_the_most_room_until_it_is_read() {
    for kind in PolicyKind::ALL {
        // Byte for byte the large one costs as little as any.
        for (minimise, gone) in [(Minimise::Requests, 0), (Minimise::Bytes, 3)] {
            let mut cache = cache_that_minimises(minimise, 15, kind);
            for (key, size) in [(0, 10), (1, 2), (2, 2), (3, 1), (4, 0)] {
                read(&mut cache, &name(key), ByteRange::Full, size);
            }
            follow(&mut cache, plan([5, 5, 1, 0, 2, 3, 4]));
            read(&mut cache, &name(5), ByteRange::Full, 1);
            let held = (0..6).filter(|key| {
                let found = cache.peek(&name(*key), ByteRange::Full, 1).unwrap();
                found.is_some()
            });
            let held: Vec<_> = held.collect();
            let left: Vec<_> = (0..6).filter(|key| *key != gone).collect();
            assert_eq!(held, left, "{kind:?} {minimise:?}");
        }
    }
}

#[test]
fn large_value_is_compared_with_all_that_would_go_before_anything_goes() {
    let (small, large) = (3 * BATCH as u64, 9999);
    for (kind, needed_soon) in PolicyKind::ALL.into_iter().flat_map(|k| [(k, 1), (k, 0)]) {
        let mut cache = cache(small, kind);
        for key in 0..small {
            read_and(&mut cache, &name(key), ByteRange::Full, 1, |_| ());
        }
        // All but these are needed much later, and make no room without them.
        let soon = 0..needed_soon * small / 10;
        let far = (0..100_000).map(|key| large + 1 + key);
        let order = [large, large + 1, large].into_iter().chain(soon.clone());
        follow(&mut cache, plan(order.chain(far).chain(soon.end..small)));
        read(&mut cache, &name(large), ByteRange::Full, small - 1);
        let found = cache.peek(&name(large), ByteRange::Full, 1).unwrap();
        assert_eq!(found.is_some(), needed_soon == 0, "{kind:?}");
        let left = if needed_soon == 0 { 2 } else { small };
        assert_eq!(cache.len() as u64, left, "{kind:?}");
    }
}

#[test]
fn many_bytes_that_have_to_go_are_what_is_needed_last() {
    for kind in PolicyKind::ALL {
        let small = 2 * BATCH as u64;
        let mut cache = cache(small * 3, kind);
        for key in 0..small {
            read_and(&mut cache, &name(key), ByteRange::Full, key % 3, |_| ());
        }
        follow(&mut cache, plan(0..small));
        let before = cache.current_size();
        let victims = cache.evict(1000, 1).unwrap();
        deleted(&mut cache, &victims);
        cache.validate().unwrap();
        assert!((1000..1002).contains(&(before - cache.current_size())));
        let gone: Vec<u64> = (0..small)
            .filter(|key| {
                let found = cache.peek(&name(*key), ByteRange::Full, 1).unwrap();
                found.is_none()
            })
            .collect();
        assert!(gone.iter().all(|key| key % 3 != 0), "{kind:?}");
        for one in [1, 2] {
            let of_size = gone.iter().copied().filter(|key| key % 3 == one);
            let first = of_size.clone().min().unwrap();
            assert!(of_size.eq((first..small).step_by(3)), "{kind:?}");
        }
    }
}

#[test]
fn plan_takes_what_fills_the_least_of_its_block_before_what_fills_it() {
    for kind in PolicyKind::ALL {
        // Four blocks are kept for folders.
        let mut cache = cache_that_minimises(Minimise::Bytes, (20 + 4) * 512, kind);
        cache.set_unit(512);
        for key in 0..20 {
            let size = if key % 2 == 0 { 5 } else { 500 };
            read(&mut cache, &name(key), ByteRange::Full, size);
        }
        let small = (0..20).step_by(2);
        follow(
            &mut cache,
            plan([20, 20].into_iter().chain(small).chain((1..20).step_by(2))),
        );
        read(&mut cache, &name(20), ByteRange::Full, 500);
        let gone = (0..21).filter(|key| {
            let found = cache.peek(&name(*key), ByteRange::Full, 1).unwrap();
            found.is_none()
        });
        assert_eq!(gone.collect::<Vec<_>>(), [18], "{kind:?}");
    }
}

#[test]
fn plan_of_which_bytes_have_to_go_loses_what_is_needed_last() {
    for kind in PolicyKind::ALL {
        let mut cache = cache(4, kind);
        for key in [0, 1, 2, 3] {
            read(&mut cache, &name(key), ByteRange::Full, 1);
        }
        follow(&mut cache, plan([2, 0, 3, 1]));
        let victims = cache.evict(2, 1).unwrap();
        let gone: Vec<_> = victims.into_iter().map(|victim| victim.cache_key).collect();
        assert_eq!(gone, [name(1), name(3)], "{kind:?}");
    }
}

#[test]
fn what_is_read_beside_a_plan_stays_where_it_is_needed_sooner() {
    for kind in PolicyKind::ALL {
        let mut cache = cache(10, kind);
        let mut state = 1;
        let order: Vec<u64> = (0..1000).map(|_| chance(&mut state) % 40).collect();
        follow(&mut cache, plan(order.iter().copied()));
        let (mut hits, mut planned_hits) = (0, 0);
        for (at, key) in order.iter().enumerate() {
            let hot = format!("hot/{}", at % 3);
            hits += u32::from(read(&mut cache, &hot, ByteRange::Full, 1));
            planned_hits += u32::from(read(&mut cache, &name(*key), ByteRange::Full, 1));
        }
        assert!(hits >= 990, "{kind:?}: {hits}");
        assert!(planned_hits >= 300, "{kind:?}: {planned_hits}");
    }
}

#[test]
fn what_becomes_hot_beside_a_plan_comes_in() {
    for kind in PolicyKind::ALL {
        let mut cache = cache(10, kind);
        let order: Vec<u64> = (0..1000).map(|at| at % 40).collect();
        follow(&mut cache, plan(order.iter().copied()));
        let mut hits = 0;
        for (at, key) in order.iter().enumerate() {
            read(&mut cache, &name(*key), ByteRange::Full, 1);
            if at >= 100 {
                let hot = format!("hot/{}", at % 3);
                hits += u32::from(read(&mut cache, &hot, ByteRange::Full, 1));
            }
        }
        assert!(hits >= 880, "{kind:?}: {hits}");
    }
}

#[test]
fn what_is_read_once_beside_a_plan_takes_no_place_for_long() {
    for kind in PolicyKind::ALL {
        let order: Vec<u64> = (0..2000).map(|at| at % 40).collect();
        let mut hits = [0; 2];
        for (alone, hits) in [true, false].into_iter().zip(&mut hits) {
            let mut cache = cache(10, kind);
            follow(&mut cache, plan(order.iter().copied()));
            for (at, key) in order.iter().enumerate() {
                *hits += u32::from(read(&mut cache, &name(*key), ByteRange::Full, 1));
                if !alone && at % 4 == 0 {
                    read(&mut cache, &format!("once/{at}"), ByteRange::Full, 1);
                }
            }
        }
        assert!(hits[1] + 10 >= hits[0], "{kind:?}: {hits:?}");
    }
}

/// The keys of a plan are taken in while no other thread of Python runs, which none of them may hold up.
#[test]
fn plan_a_key_that_there_is_room_for_makes_nothing_grow() {
    let mut plan = Plan::default();
    let mut keys = 0;
    for _ in 0..4 {
        let room = plan.grow();
        assert!(room >= 2 * plan.len().max(1));
        let memory = plan.memory();
        while plan.len() < room {
            plan.push(&name(keys));
            keys += 1;
        }
        assert_eq!(plan.memory(), memory);
    }
    plan.finish();
    assert_eq!(plan.len() as u64, keys);
}
