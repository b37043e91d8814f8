//! Simulations: what caches of different policies and sizes would have served.

use proptest::prelude::*;
use zcache::key::{ByteRange, Part};
use zcache::policy::{Minimise, PolicyKind, Simulation};

use crate::policies::{cache_that_minimises, read_and};

/// A hash of 64 good bits.
fn hash(key: u64) -> u64 {
    let mut x = key.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

fn misses(policy: PolicyKind, capacity: u64, trace: impl Iterator<Item = u64>) -> f64 {
    misses_of(policy, capacity, trace.map(|key| (key, 1)))
}

fn misses_of(policy: PolicyKind, capacity: u64, trace: impl Iterator<Item = (u64, u64)>) -> f64 {
    let mut simulation = Simulation::new(policy, capacity);
    let (mut misses, mut count) = (0, 0);
    for (key, size) in trace {
        misses += u32::from(!simulation.access(hash(key), size));
        count += 1;
    }
    simulation.validate().unwrap();
    f64::from(misses) / f64::from(count)
}

/// The same keys in the same order.
fn passes(keys: u64, epochs: u64) -> impl Iterator<Item = u64> {
    (0..epochs).flat_map(move |_| 0..keys)
}

#[test]
fn simulation_of_a_loop_lru_serves_nothing() {
    assert!((misses(PolicyKind::Lru, 500, passes(1000, 10)) - 1.0).abs() < 1e-9);
}

#[test]
fn simulation_of_a_loop_none_serves_what_fits() {
    // All of the first pass, and half of each other one.
    assert!((misses(PolicyKind::None, 500, passes(1000, 10)) - 0.55).abs() < 1e-9);
}

#[test]
fn simulation_of_loops_adaptive_comes_close_to_what_fits() {
    for keys in [100, 1000, 4000, 20_000] {
        for percent in [20, 50, 90] {
            let capacity = keys * percent / 100;
            let best = misses(PolicyKind::None, capacity, passes(keys, 12));
            let adaptive = misses(PolicyKind::Adaptive, capacity, passes(keys, 12));
            assert!(adaptive < best + 0.02, "{keys} {percent} {adaptive} {best}");
        }
    }
}

#[test]
fn simulation_of_a_moving_view_adaptive_does_what_lru_does() {
    let trace = || (0..2000u64).flat_map(|at| at..at + 50);
    let lru = misses(PolicyKind::Lru, 80, trace());
    assert!(misses(PolicyKind::Adaptive, 80, trace()) <= lru + 0.01);
}

/// Windows of so many keys, each by a step further on.
fn windows(keys: u64, width: u64, step: usize, passes: u64) -> impl Iterator<Item = u64> {
    let once = move || (0..keys - width).step_by(step);
    (0..passes).flat_map(move |_| once().flat_map(move |at| at..at + width))
}

// What is read again before the cache is full is what LRU would keep then, in the simulation as well.

#[test]
fn simulation_of_a_window_that_moves_by_a_fifth_adaptive_serves_more_than_lru() {
    let trace = || windows(3000, 1000, 200, 3);
    let lru = misses(PolicyKind::Lru, 2520, trace());
    let adaptive = misses(PolicyKind::Adaptive, 2520, trace());
    assert!(adaptive < lru - 0.05, "{adaptive} {lru}");
}

#[test]
fn simulation_of_a_loop_that_fits_beside_windows_adaptive_does_what_lru_does() {
    for (keys, width, step, passes) in [(2000, 60, 8, 4), (1000, 50, 10, 6), (1200, 60, 12, 6)] {
        let trace = || {
            let window = windows(keys / 2, width, step, passes);
            window
                .zip((0..keys).cycle())
                .flat_map(move |(at, next)| [keys + at, next])
        };
        // Nine tenths of all keys.
        let capacity = keys * 27 / 20;
        let lru = misses(PolicyKind::Lru, capacity, trace());
        let adaptive = misses(PolicyKind::Adaptive, capacity, trace());
        assert!(adaptive < lru + 0.005, "{keys} {adaptive} {lru}");
    }
}

#[test]
fn simulation_of_work_that_changes_adaptive_follows() {
    let view = |first: u64| (0..1000u64).flat_map(move |at| first + at..first + at + 50);
    let trace = || {
        passes(1000, 12)
            .chain(view(5000))
            .chain(passes(1000, 12).map(|key| key + 10_000))
    };
    let lru = misses(PolicyKind::Lru, 500, trace());
    let adaptive = misses(PolicyKind::Adaptive, 500, trace());
    let none = misses(PolicyKind::None, 500, trace());
    assert!(
        adaptive < lru - 0.1 && adaptive < none - 0.1,
        "{adaptive} {lru} {none}"
    );
}

#[test]
fn simulation_of_a_loop_that_shrinks_adaptive_lets_the_rest_go() {
    // The short loop fits, and is not what was kept of the long one.
    let trace = || passes(3000, 15).chain(passes(1000, 15));
    let long = misses(PolicyKind::Adaptive, 1500, passes(3000, 15));
    let adaptive = misses(PolicyKind::Adaptive, 1500, trace());
    let of_short = adaptive * 4.0 - long * 3.0;
    assert!(of_short < 0.5, "{of_short}");
}

/// Epochs over keys in an order of their own each, and a pass over others after every eight.
fn epochs_and_validation(keys: u64, rounds: u64, seed: u64) -> impl Iterator<Item = u64> {
    (0..rounds).flat_map(move |round| {
        let epochs = (0..8).flat_map(move |epoch| {
            let mut order: Vec<u64> = (0..keys).collect();
            order.sort_unstable_by_key(|key| hash(key ^ hash(seed ^ round << 32 ^ epoch << 24)));
            order
        });
        epochs
            .chain(1_000_000..1_000_000 + keys)
            .map(move |key| key ^ seed << 40)
    })
}

#[test]
fn simulation_of_epochs_and_validation_adaptive_keeps_what_is_read_again() {
    for seed in 0..6 {
        let (keys, capacity) = (3000, 3300);
        let trace = || epochs_and_validation(keys, 12, seed);
        let lru = misses(PolicyKind::Lru, capacity, trace());
        let none = misses(PolicyKind::None, capacity, trace());
        let adaptive = misses(PolicyKind::Adaptive, capacity, trace());
        // Of the first pass and the first look at the others it cannot know.
        assert!(
            adaptive < none + 0.03 && adaptive < lru - 0.05,
            "{seed}: {adaptive} {none} {lru}"
        );
    }
}

/// Data sets one after the other, each of `keys` keys that are read in each of these orders.
fn data_sets(keys: u64, sets: u64, steps: &'static [u64]) -> impl Iterator<Item = u64> {
    (0..sets).flat_map(move |set| {
        let epochs = steps.iter();
        epochs.flat_map(move |step| (0..keys).map(move |n| set * keys + n * step % keys))
    })
}

#[test]
fn simulation_of_new_data_every_few_epochs_adaptive_lets_the_old_go() {
    // Steps that have no factor in common with the number of keys.
    let steps: [&'static [u64]; 3] = [&[1, 1511], &[1, 77, 2311], &[1, 77, 2311, 119, 1013]];
    for (keys, sets) in [(150, 60), (3000, 12)] {
        for steps in steps {
            for percent in [25, 50, 70, 93] {
                let capacity = keys * percent / 100;
                let lru = misses(PolicyKind::Lru, capacity, data_sets(keys, sets, steps));
                let adaptive = misses(PolicyKind::Adaptive, capacity, data_sets(keys, sets, steps));
                assert!(
                    adaptive < lru + 0.01,
                    "{keys} {} {percent} {adaptive} {lru}",
                    steps.len()
                );
            }
        }
    }
}

#[test]
fn simulation_of_new_data_every_five_epochs_adaptive_serves_more_than_lru() {
    let trace = || data_sets(3000, 12, &[1, 77, 2311, 119, 1013]);
    let lru = misses(PolicyKind::Lru, 2100, trace());
    let adaptive = misses(PolicyKind::Adaptive, 2100, trace());
    assert!(adaptive < lru - 0.1, "{adaptive} {lru}");
}

#[test]
fn simulation_of_new_data_beside_what_is_read_all_the_time_adaptive_keeps_that() {
    // A hot set of 100 keys, and as many keys again and again that are read once.
    let trace = || {
        (0..40_000u64).map(|n| {
            if n % 2 == 0 {
                n / 2 * 7 % 100
            } else {
                1000 + n
            }
        })
    };
    let lru = misses(PolicyKind::Lru, 110, trace());
    let adaptive = misses(PolicyKind::Adaptive, 110, trace());
    assert!(lru > 0.9, "{lru}");
    assert!(adaptive < 0.55, "{adaptive}");
}

/// A few values are much larger than the others, as log-normal ones are.
fn uneven(key: u64) -> u64 {
    1 << (hash(key + 1) % 1024).trailing_zeros().min(9)
}

#[test]
fn simulation_of_a_loop_of_uneven_sizes_adaptive_serves_what_fits() {
    let total: u64 = (0..4000).map(uneven).sum();
    for percent in [10, 50, 90] {
        let trace = || passes(4000, 12).map(|key| (key, uneven(key)));
        let capacity = total * percent / 100;
        let adaptive = misses_of(PolicyKind::Adaptive, capacity, trace());
        let none = misses_of(PolicyKind::None, capacity, trace());
        assert!(adaptive < none, "{percent} {adaptive} {none}");
    }
}

/// Most values are chunks of 10 MiB, and the rest documents of 1 KiB.
#[test]
fn simulation_of_a_loop_of_chunks_and_documents_adaptive_serves_what_fits() {
    let size = |key: u64| {
        if hash(key).is_multiple_of(5) {
            1 << 10
        } else {
            10 << 20
        }
    };
    for first in (0..4).map(|n| n << 32) {
        let trace = || passes(20_000, 6).map(|key| (key + first, size(key)));
        let capacity = (0..20_000).map(size).sum::<u64>() * 3 / 10;
        let [none, adaptive] = [PolicyKind::None, PolicyKind::Adaptive]
            .map(|policy| misses_of(policy, capacity, trace()));
        // LRU serves nothing.
        assert!(adaptive < none + 0.08, "{adaptive} {none}");
    }
}

#[test]
fn simulation_of_large_values_read_once_adaptive_keeps_the_small_ones() {
    // 400 small values again and again, and after each pass one that needs the room of half of them.
    let trace = || {
        (0..100u64).flat_map(|epoch| {
            let large = (1000 + epoch, 200);
            (0..400).map(|key| (key, 1)).chain([large])
        })
    };
    let adaptive = misses_of(PolicyKind::Adaptive, 420, trace());
    let lru = misses_of(PolicyKind::Lru, 420, trace());
    assert!(adaptive < 0.1, "{adaptive}");
    assert!(lru > 0.9, "{lru}");
}

#[test]
fn simulation_of_loops_a_cache_of_a_few_values_serves_what_fits() {
    for room in [1, 2, 3, 4, 5, 8, 20] {
        for keys in [room + 1, 2 * room, 10 * room] {
            let trace = || passes(keys, 8000 / keys);
            let none = misses(PolicyKind::None, room, trace());
            let adaptive = misses(PolicyKind::Adaptive, room, trace());
            assert!(adaptive < none + 0.03, "{room} {keys} {adaptive} {none}");
        }
    }
}

/// A key that is read again at once is served, though there is room for one value.
#[test]
fn simulation_of_two_reads_in_a_row_a_cache_of_one_value_serves_the_second() {
    let trace = passes(4000, 1).flat_map(|key| [key, key]);
    let adaptive = misses(PolicyKind::Adaptive, 1, trace);
    assert!(adaptive < 0.51, "{adaptive}");
}

/// The same keys in another order each time.
fn shuffled(keys: u64, epochs: u64) -> impl Iterator<Item = u64> {
    (0..epochs).flat_map(move |epoch| {
        let mut order: Vec<u64> = (0..keys).collect();
        order.sort_by_key(|key| hash(key << 16 | epoch));
        order
    })
}

/// The part of the bytes that is served where that of bytes, or of requests, is to be large.
fn bytes_served(what: Minimise, capacity: u64, trace: impl Iterator<Item = (u64, u64)>) -> f64 {
    let mut cache = cache_that_minimises(what, capacity, PolicyKind::Adaptive);
    let (mut served, mut all) = (0, 0);
    for (key, size) in trace {
        let is_hit = read_and(&mut cache, &key.to_string(), ByteRange::Full, size, |_| ());
        served += u64::from(is_hit) * size;
        all += size;
    }
    served as f64 / all as f64
}

#[test]
fn cache_of_uneven_sizes_minimise_bytes_learns_as_requests_does() {
    let keys = 300;
    for first in (0..6).map(|n| n << 32) {
        let size = |key: u64| (hash(key).count_ones() as f64 * 0.45).exp() as u64;
        let total: u64 = (0..keys).map(|key| size(key + first)).sum();
        let trace = || shuffled(keys, 40).map(|key| (key + first, size(key + first)));
        let [requests, bytes] = [Minimise::Requests, Minimise::Bytes]
            .map(|what| bytes_served(what, total / 10, trace()));
        assert!(bytes > requests - 0.025, "{first} {bytes} {requests}");
        assert!(bytes > 0.06, "{first} {bytes}");
    }
}

fn requests() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let loops = (1u64..400, 1u64..6).prop_map(|(keys, epochs)| passes(keys, epochs).collect());
    let random = prop::collection::vec(0u64..500, 1..600);
    let parts = prop::collection::vec(prop_oneof![loops, random], 1..5);
    (parts, prop::sample::select(vec![1u64, 7, 1000])).prop_map(|(parts, spread)| {
        let keys = parts.into_iter().flatten();
        keys.map(|key: u64| (key, hash(key) % spread)).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn simulation_of_anything_keeps_its_books_and_its_bound(
        capacity in prop_oneof![0u64..2000, 0u64..100_000],
        requests in requests(),
    ) {
        for policy in PolicyKind::ALL {
            let mut simulation = Simulation::new(policy, capacity);
            for (n, (key, size)) in requests.iter().enumerate() {
                simulation.access(hash(*key), *size);
                prop_assert!(simulation.bytes() <= capacity);
                if n % 97 == 0 {
                    simulation.validate().unwrap();
                }
            }
            simulation.validate().unwrap();
        }
    }
}

#[test]
fn simulation_of_empty_values_holds_as_many_as_the_bound_has_bytes() {
    for policy in [PolicyKind::Lru, PolicyKind::None] {
        let trace = || passes(400, 3).map(|key| (key, 0));
        let empty = misses_of(policy, 100, trace());
        let of_one_byte = misses(policy, 100, passes(400, 3));
        assert!((empty - of_one_byte).abs() < 1e-9, "{empty} {of_one_byte}");
        assert!((misses_of(policy, 0, trace()) - 1.0).abs() < 1e-9);
    }
    // They take no room from others.
    let mixed = passes(100, 3).map(|key| (key, key % 2));
    assert!((misses_of(PolicyKind::Lru, 100, mixed) - 1.0 / 3.0).abs() < 1e-9);
}

/// Bytes of a range that a value may have.
fn part(key: u64, range: ByteRange) -> Part {
    let whole = hash(key);
    let kind = match range {
        ByteRange::Full => return Part::of_whole(whole),
        ByteRange::Range { start, end } => start << 32 | end << 8 | 1,
        ByteRange::Offset(start) => start << 8 | 2,
        ByteRange::Suffix(count) => count << 8 | 3,
    };
    Part {
        hash: hash(whole ^ kind),
        whole,
        range,
    }
}

#[test]
fn simulation_serves_what_sources_disagree_about_as_the_source_slices() {
    use ByteRange::{Full, Offset, Range, Suffix};
    let range = |start, end| Range { start, end };
    for slices_like_python in [true, false] {
        let mut simulation = Simulation::new(PolicyKind::Lru, 1000).of_source(slices_like_python);
        let mut read = |range, len| simulation.access_part(part(1, range), len, len);
        assert!(!read(range(0, 40), 40));
        // By no other range, though its bytes are those of one.
        assert!(!read(range(0, 99), 40) && read(range(0, 99), 40));
        assert!(!read(range(30, 99), 10) && read(range(30, 40), 10));
        assert!(!read(Full, 40));
        assert!(read(range(20, 99), 20));
        for (range, len) in [
            (Suffix(50), 40),
            (range(7, 7), 0),
            (Offset(40), 0),
            (Suffix(0), 0),
        ] {
            assert_eq!(read(range, len), slices_like_python, "{range:?}");
            assert!(read(range, len));
        }
    }
}

#[test]
fn simulation_of_ranges_serves_what_an_index_serves() {
    use ByteRange::{Full, Offset, Range, Suffix};
    let range = |start, end| Range { start, end };
    let mut simulation = Simulation::new(PolicyKind::Lru, 100);
    let mut read = |key, range, len| simulation.access_part(part(key, range), len, len);
    // Each range is an entry of its own, which serves itself and what lies in it.
    assert!(!read(1, range(10, 20), 10));
    assert!(read(1, range(10, 20), 10));
    assert!(read(1, range(12, 15), 3));
    assert!(!read(1, range(15, 25), 10));
    assert!(!read(2, range(10, 20), 10));
    assert!(!read(1, Suffix(10), 10));
    assert!(read(1, Suffix(4), 4));
    assert!(!read(1, Offset(30), 10));
    assert!(read(1, Offset(35), 5));
    assert!(read(1, range(30, 31), 1));
    // Neither the newest nor the first of the widest.
    assert!(!read(1, range(16, 22), 6));
    // None of them serves the whole, which serves all.
    assert!(!read(1, Full, 40));
    assert!(read(1, range(5, 6), 1) && read(1, Suffix(30), 30) && read(1, Offset(0), 40));
    // It was used last, and goes with all else.
    assert!(!read(3, Full, 60));
    assert!(read(1, Full, 40));
    assert!(!read(4, Full, 100));
    assert!(!read(1, range(5, 6), 1) && !read(1, range(12, 15), 3));
    simulation.validate().unwrap();
}

#[test]
fn simulation_of_a_value_that_grows_makes_room_for_it() {
    let mut simulation = Simulation::new(PolicyKind::Lru, 10);
    for key in 1..=3 {
        assert!(!simulation.access(key, 3));
    }
    // It is there, and takes the place of the others from now on.
    assert!(simulation.access(1, 9));
    assert_eq!(simulation.bytes(), 9);
    assert!(simulation.access(1, 9) && !simulation.access(2, 3) && !simulation.access(1, 2));
    assert_eq!(simulation.bytes(), 5);
    // One that is too large by now is not kept.
    assert!(simulation.access(1, 11) && !simulation.access(1, 11));
    assert_eq!(simulation.bytes(), 3);
    simulation.validate().unwrap();
}

#[test]
fn simulation_of_what_is_too_old_replaces_it() {
    for policy in [PolicyKind::Lru, PolicyKind::None, PolicyKind::Adaptive] {
        let mut simulation = Simulation::new(policy, 10);
        let value = Part::of_whole(hash(1));
        // What is not held comes in as any other value.
        assert!(!simulation.refresh_part(value, 4, 4));
        assert!(!simulation.access(hash(2), 4));
        assert!(simulation.refresh_part(value, 6, 6));
        assert_eq!(simulation.bytes(), 10);
        assert!(simulation.access(hash(1), 6) && simulation.access(hash(2), 4));
        simulation.validate().unwrap();
    }
}

#[test]
fn simulation_of_a_write_drops_the_value_with_its_ranges() {
    let range = ByteRange::Range { start: 0, end: 4 };
    let (value, piece) = (part(1, ByteRange::Full), part(1, range));
    for written in [None, Some(30)] {
        let mut simulation = Simulation::new(PolicyKind::Lru, 100).of_source(true);
        assert!(!simulation.access_part(piece, 4, 4));
        assert!(!simulation.access_part(part(2, range), 4, 4));
        assert!(!simulation.access_part(value, 20, 20));
        simulation.write(value.hash, written);
        assert_eq!(simulation.bytes(), 4 + written.unwrap_or(0));
        assert_eq!(simulation.access_part(piece, 4, 4), written.is_some());
        assert!(simulation.access_part(part(2, range), 4, 4));
        simulation.validate().unwrap();
    }
}
