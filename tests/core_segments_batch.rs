//! Several values of a pool at once: what is reserved, deleted, written and committed together.

use crate::pool;

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use zcache::cache::{FIRST_PAGE, Limits, MAX_NAME, PAGE, Placed, Reserve};
use zcache::disk::fill::Ending;
use zcache::disk::segments::ValueToWrite;
use zcache::key::ByteRange;
use zcache::shared::HeldLock;

use self::pool::{BOUND, LIMITS, LONG, NOW, Pool, contents, end};

/// A pool in which the fills of a batch may take many values.
fn large(name: &str) -> Pool {
    let limits = Limits {
        max_size: 4096 * PAGE,
        ..LIMITS
    };
    Pool::with(name, limits, true)
}

#[test]
fn fills_at_once_evict_no_more_than_they_need_and_keep_the_bound() {
    for holes in [true, false] {
        let limits = Limits {
            max_size: 4096 * PAGE,
            ..LIMITS
        };
        let mut pool = Pool::with(&format!("together-{holes}"), limits, holes);
        for round in 0..40 {
            let values: Vec<(u64, String, usize)> = (0..32)
                .map(|n| {
                    let key = format!("a/{round}-{n}");
                    let size = 100 + 997 * ((round + n) % 40);
                    (pool.join(&key, ByteRange::Full), key, size)
                })
                .collect();
            let endings = pool.fill_together(&values);
            assert!(
                endings
                    .iter()
                    .all(|ending| matches!(ending, Ending::Filled)),
                "{endings:?}"
            );
            for (_, key, size) in &values {
                assert_eq!(pool.read(key), Some(contents(key, *size)), "{key}");
            }
            let (held, counted) = (pool.held(), pool.counted());
            assert!(held <= counted, "{round}: {held} held, {counted} counted");
            assert!(counted <= limits.max_size, "{round}: {counted} counted");
        }
        // What they reserve for segments that they may have to begin is given back.
        assert!(pool.counted() > limits.max_size / 10 * 9);
        for key in pool.keys() {
            let value = pool.read(&key).unwrap();
            assert_eq!(value, contents(&key, value.len()));
        }
        end(pool);
    }
}

#[test]
fn fills_at_once_of_which_some_are_overtaken_leave_the_others() {
    let mut pool = large("overtaken");
    let values: Vec<(u64, String, usize)> = (0..48)
        .map(|n| {
            let key = format!("a/{n}");
            (pool.join(&key, ByteRange::Full), key, 3000 + 500 * n)
        })
        .collect();
    for n in (0..48).step_by(5) {
        pool.step(|cache| cache.begin_write(&format!("a/{n}")));
    }
    let endings = pool.fill_together(&values);
    let expect = |pool: &Pool| {
        for (n, (_, key, size)) in values.iter().enumerate() {
            let expected = (n % 5 != 0).then(|| contents(key, *size));
            assert_eq!(pool.read(key), expected, "{key}");
        }
    };
    for (n, ending) in endings.iter().enumerate() {
        assert_eq!(
            matches!(ending, Ending::Filled),
            n % 5 != 0,
            "{n}: {ending:?}"
        );
    }
    expect(&pool);
    // All that was filled is marked as valid, and nothing else.
    let pool = pool.lose_index();
    expect(&pool);
    end(pool);
}

/// Threads of this process that do fills.
#[cfg(target_os = "linux")]
fn threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| name.trim() == "zcache-fill").count()
}

#[test]
#[cfg(target_os = "linux")]
fn values_that_do_not_go_with_others_wait_for_no_thread_that_is_held_up() {
    let mut pool = large("held-up");
    // Its thread waits for more work, and finds three values that are each a batch of its own.
    pool.fill("a", 100);
    let before = threads();
    let values = ["b", "c", "d"].map(|key| {
        let ticket = pool.join(key, ByteRange::Full);
        (ticket, key, contents(key, 3 << 20))
    });
    let held = HeldLock::take(&pool.root.join("index"), LONG).unwrap();
    let numbers = values.map(|(ticket, key, data)| pool.submit(ticket, key, ByteRange::Full, data));
    let begun = Instant::now();
    while threads() <= before {
        assert!(begun.elapsed() < LONG, "{} threads", threads());
        sleep(Duration::from_millis(1));
    }
    assert!(held.release());
    assert!(pool.fills.wait(numbers[2], LONG));
    end(pool);
}

#[test]
fn values_of_which_one_cannot_be_written_are_written_without_it() {
    let pool = large("without-it");
    let names = ["a/0".to_owned(), "x".repeat(MAX_NAME + 1), "a/2".to_owned()];
    let value = |n: usize| ValueToWrite {
        placed: Placed {
            segment: 1,
            page: FIRST_PAGE + n as u32,
            size: 100,
            capacity: 100,
        },
        name: &names[n],
        data: &[1; 100],
        fetched: 1,
    };
    let values = [value(0), value(1), value(2)];
    let outcome = pool.files.write_all(&values);
    let are_written: Vec<_> = outcome.iter().map(Result::is_ok).collect();
    assert_eq!(are_written, [true, false, true]);
    for one in [values[0], values[2]] {
        let bytes = pool.read_part(one.placed, one.name, 0, 100, true);
        assert_eq!(bytes, Ok(vec![1; 100]), "{}", one.name);
    }
    end(pool);
}

#[test]
fn values_that_are_deleted_at_once_go_alone() {
    let mut pool = large("at-once");
    (0..12).for_each(|n| pool.fill(&format!("a/{n}"), 9000));
    let place = |n: usize| pool.find(&format!("a/{n}"), ByteRange::Full).unwrap().1;
    let gone = [7, 3, 2, 9, 4];
    let places: Vec<_> = gone.iter().map(|n| place(*n)).collect();
    let held = pool.held();
    let outcome = pool.files.delete_all(&places);
    assert!(outcome.len() == 5 && outcome.iter().all(Result::is_ok));
    assert_eq!(held - pool.held(), 5 * 3 * PAGE);
    for n in 0..12 {
        let key = format!("a/{n}");
        let expected = (!gone.contains(&n)).then(|| contents(&key, 9000));
        assert_eq!(pool.read(&key), expected, "{key}");
    }
    // Also where the file of some of them is gone.
    fs::remove_file(pool.segment(places[0].segment)).unwrap();
    let outcome = pool.files.delete_all(&places);
    assert!(outcome.len() == 5 && outcome.iter().all(Result::is_ok));
    end(pool);
}

#[test]
fn fill_beside_an_eviction_of_what_is_above_a_smaller_bound_evicts_only_for_itself() {
    let mut pool = Pool::new("smaller");
    (0..20).for_each(|n| pool.fill(&format!("a/{n}"), 9000));
    let count = pool.keys().len();
    pool.step(|cache| {
        cache.set_limits(BOUND / 2, None, LIMITS.verify);
        Ok(())
    });
    // In the background, as far as that has deleted nothing yet.
    let excess = pool.step(|cache| cache.excess());
    let victims = pool.step(|cache| cache.evict(excess, NOW));
    assert!(victims.len() > 5);
    assert_eq!(pool.step(|cache| cache.excess()), 0);
    let ticket = pool.join("b/0", ByteRange::Full);
    let answer = pool.step(|cache| cache.reserve("b/0", ByteRange::Full, 9000, ticket, NOW));
    let Reserve::NeedsEviction(id, more) = answer else {
        panic!("{answer:?}")
    };
    assert!(more.len() < 5, "{}", more.len());
    pool.delete(&victims);
    for victim in &more {
        pool.files.delete(victim.placed.unwrap()).unwrap();
    }
    let cells: Vec<u32> = more.iter().map(|victim| victim.cell).collect();
    let answer = pool.step(|cache| cache.evictions_done(id, &cells, &[], NOW));
    assert_eq!(answer, Reserve::Granted(id));
    assert_eq!(pool.keys().len(), count - victims.len() - more.len());
    assert!(pool.counted() <= BOUND / 2);
    pool.step(|cache| cache.abandon(id));
    end(pool);
}

#[test]
fn fills_that_are_not_written_take_no_room_for_long() {
    for (holes, size) in [(true, 60_000), (false, 100)] {
        let mut pool = Pool::with(&format!("unwritten-{holes}"), LIMITS, holes);
        let before = pool.counted();
        // Each gets a segment of its own.
        for n in 0..100 {
            let (key, range) = (format!("b/{n}"), ByteRange::Full);
            let ticket = pool.join(&key, range);
            pool.min_free_space = u64::MAX;
            let ending = pool.fill_under(ticket, &key, range, contents(&key, size));
            assert!(matches!(ending, Ending::Rejected(_)), "{ending:?}");
            pool.min_free_space = 0;
        }
        assert!(
            pool.counted() <= before,
            "{before} before, {} after",
            pool.counted()
        );
        pool.fill("c", size);
        assert_eq!(pool.read("c"), Some(contents("c", size)));
        end(pool);
    }
}

#[test]
fn segment_to_which_nothing_is_appended_makes_room_for_others() {
    // Four pages for the head of each segment: with that of a second one, nothing fits.
    let limits = Limits {
        max_size: 7 * PAGE,
        ..LIMITS
    };
    let mut one = Pool::with("idle", limits, true);
    let root = one.root.clone();
    one.fill("a", 100);
    let mut other = Pool::over(root, limits, true);
    let victims = one.step(|cache| cache.begin_write("a"));
    one.delete(&victims);
    one.step(|cache| cache.end_write("a", true, None).map(drop));
    for n in 0..3 {
        let (key, range) = (format!("b/{n}"), ByteRange::Full);
        let ticket = other.join(&key, range);
        let _ = other.fill_under(ticket, &key, range, contents(&key, 100));
    }
    assert!(other.read("b/2").is_some(), "{} counted", other.counted());
    // Its own is gone by now.
    for n in 0..3 {
        let (key, range) = (format!("c/{n}"), ByteRange::Full);
        let ticket = one.join(&key, range);
        let _ = one.fill_under(ticket, &key, range, contents(&key, 100));
    }
    assert!(one.read("c/2").is_some(), "{} counted", one.counted());
    drop(other);
    end(one);
}
