//! Segments of a pool: what is appended, read and deleted, and what the bound counts.

use crate::place::Place;
use crate::pool;

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;

use zcache::cache::{FIRST_PAGE, Limits, PAGE, Placed, START};
use zcache::checksum::crc32c;
use zcache::disk::fill::Ending;
use zcache::disk::segments::{
    Got, SegmentFiles, ValueToWrite, can_punch, delete_below, scan, walk,
};
use zcache::key::ByteRange;
use zcache::policy::{Minimise, Plan, PolicyKind};
use zcache::shared::{Locked, SharedIndex};

use self::pool::{BOUND, LIMITS, NOW, Pool, contents, end, open};

#[test]
fn fill_of_any_size_is_read_as_it_was_written() {
    let mut pool = Pool::new("sizes");
    for size in [0, 1, 100, 3584, 3585, 4096, 20_000, 100_000] {
        let key = format!("a/{size}");
        pool.fill(&key, size);
        assert_eq!(pool.read(&key), Some(contents(&key, size)), "{size}");
    }
    let range = ByteRange::Range { start: 5, end: 9 };
    pool.fill_as("b/c/0/1", range, b"part".to_vec());
    let (_, placed) = pool.find("b/c/0/1", range).unwrap();
    let name = range.cache_key("b/c/0/1");
    assert_eq!(pool.read_part(placed, &name, 1, 2, true).unwrap(), b"ar");
    end(pool);
}

#[test]
fn bound_holds_in_blocks_while_values_come_and_go() {
    for holes in [true, false] {
        let mut pool = Pool::with(&format!("bound-{holes}"), LIMITS, holes);
        let mut seed = 1u64;
        for n in 0..600 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let size = match seed >> 60 {
                0 => 100_000,
                1..4 => 20_000,
                _ => (seed >> 32) as usize % 5000,
            };
            pool.fill(&format!("a/{n}"), size);
            let (held, counted) = (pool.held(), pool.counted());
            assert!(held <= counted, "{n}: {held} bytes held, {counted} counted");
            assert!(counted <= BOUND, "{n}: {counted} counted");
        }
        for key in pool.keys() {
            let value = pool.read(&key).unwrap();
            assert_eq!(value, contents(&key, value.len()));
        }
        if holes {
            // Of a hundred pages, with a sixteenth in each segment, and some that are sparse.
            assert!(pool.segments().len() <= 50, "{}", pool.segments().len());
        }
        end(pool);
    }
}

/// What the file system notes of the holes takes blocks as well, most of them where they come in no order.
#[test]
fn bound_holds_in_blocks_where_every_other_page_is_a_hole() {
    let limits = Limits {
        max_size: 16 * 4096 * PAGE,
        ..LIMITS
    };
    let mut pool = Pool::with("every-other", limits, true);
    let keys: Vec<String> = (0..4096).map(|n| format!("a/{n}")).collect();
    for part in keys.chunks(256) {
        let value = |key: &String| (pool.join(key, ByteRange::Full), key.clone(), 100);
        let values: Vec<_> = part.iter().map(value).collect();
        pool.fill_together(&values);
    }
    let [segment] = pool.segments()[..] else {
        panic!("{:?}", pool.segments());
    };
    let is_odd = |key: &&String| pool.find(key, ByteRange::Full).unwrap().1.page % 2 == 1;
    let mut odd: Vec<&String> = keys.iter().filter(is_odd).collect();
    odd.sort_by_key(|key| crc32c(key.as_bytes()));
    File::open(pool.segment(segment))
        .unwrap()
        .sync_all()
        .unwrap();
    for key in odd {
        let victims = pool.step(|cache| cache.drop_missing(key));
        pool.delete(&victims);
        let (held, counted) = (pool.held(), pool.counted());
        assert!(held <= counted, "{held} bytes held, {counted} counted");
    }
    end(pool);
}

#[test]
fn value_that_is_written_before_one_in_front_of_it_is_not_cut_off() {
    let place = Place::new("order");
    let files = SegmentFiles::new(place.at("segments"), true);
    let at = |page| Placed {
        segment: 1,
        page,
        size: 5000,
        capacity: 2000,
    };
    let data = contents("a", 5000);
    for page in [1500, FIRST_PAGE, 700, FIRST_PAGE + 1999] {
        let value = ValueToWrite {
            placed: at(page),
            name: "a",
            data: &data,
            fetched: NOW,
        };
        files.write(&value).unwrap();
    }
    for page in [1500, FIRST_PAGE, 700, FIRST_PAGE + 1999] {
        let (got, read) = files.read_part(at(page), "a", 0, 5000, true).unwrap();
        assert_eq!((got, &read), (Got::Bytes, &data), "{page}");
    }
    // What a tool that fills holes makes of it is not much more than was written.
    let less = SegmentFiles::new(place.at("less"), true);
    let value = ValueToWrite {
        placed: at(FIRST_PAGE),
        name: "a",
        data: &data,
        fetched: NOW,
    };
    less.write(&value).unwrap();
    let len = fs::metadata(less.root().join(format!("{:016x}", 1)));
    assert!(len.unwrap().len() <= 1 << 20);
}

#[test]
fn bound_holds_in_blocks_under_each_policy_and_a_plan() {
    for kind in PolicyKind::ALL {
        let mut pool = Pool::new(&format!("policy-{kind:?}"));
        pool.step(|cache| Ok(cache.set_policy(kind, Minimise::Bytes)));
        let mut seed = 1u64;
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 32) % below
        };
        for n in 0..1000 {
            if n % 300 == 100 {
                let mut plan = Plan::default();
                (0..50).for_each(|_| assert!(plan.push(&format!("{}", next(80)))));
                plan.finish();
                pool.step(|cache| {
                    cache.set_plan(plan.within("a/"));
                    cache.match_plan(cache.first_keys())
                });
            }
            let source = if next(4) == 0 { "b" } else { "a" };
            let key = format!("{source}/{}", next(80));
            let size = if next(20) == 0 {
                60_000
            } else {
                4000 + next(9000) as usize
            };
            let found = pool.step(|cache| cache.lookup(&key, ByteRange::Full, NOW));
            if found.is_none() {
                pool.fill_as(&key, ByteRange::Full, contents(&key, size));
            }
            let (held, counted) = (pool.held(), pool.counted());
            assert!(held <= counted, "{n}: {held} bytes held, {counted} counted");
            assert!(counted <= BOUND, "{n}: {counted} counted");
        }
        assert!(pool.keys().len() > 5);
        for key in pool.keys() {
            let value = pool.read(&key).unwrap();
            assert_eq!(value, contents(&key, value.len()));
        }
        // The policy outlives the index's loss, as the values do.
        let keys = pool.keys().len();
        let pool = pool.lose_index();
        assert_eq!(pool.keys().len(), keys);
        end(pool);
    }
}

/// Also on tmpfs, which cannot read without waiting: there the kernel is asked what is in memory.
#[test]
fn value_in_memory_is_read_without_waiting() {
    let folders = [std::env::temp_dir(), PathBuf::from("/dev/shm")];
    for folder in folders.into_iter().filter(|folder| folder.is_dir()) {
        let root = folder.join(format!("zcache-pool-now-{}", std::process::id()));
        let mut pool = Pool::at(root, LIMITS, true);
        pool.fill("a/0", 20_000);
        let (_, placed) = pool.find("a/0", ByteRange::Full).unwrap();
        for (start, size) in [(0, 20_000), (0, 10), (15_000, 5000)] {
            let bytes = pool.read_part(placed, "a/0", start, size, false);
            let bytes = bytes.expect("what is in memory");
            let from = start as usize;
            assert_eq!(bytes, contents("a/0", 20_000)[from..from + size]);
        }
        pool.files.delete(placed).unwrap();
        pool.read_part(placed, "a/0", 0, 10, false).unwrap_err();
        end(pool);
    }
}

#[test]
fn segment_goes_with_its_last_value() {
    let mut pool = Pool::new("last");
    for n in 0..40 {
        pool.fill(&format!("a/{n}"), 100);
    }
    assert_eq!(pool.segments().len(), 3);
    let (victims, _) = pool.step(|cache| cache.drain_prefix("a", START));
    assert_eq!(victims.len(), 40);
    pool.delete(&victims);
    // The next fills remove the files of those that no participant appends to.
    pool.fill("b/0", 100);
    pool.fill("b/1", 100);
    assert_eq!(pool.segments().len(), 1);
    assert_eq!(pool.read("b/0"), Some(contents("b/0", 100)));
    end(pool);
}

/// Values of other processes come and go, and one that only reads has their segments open.
#[test]
#[cfg(target_os = "linux")]
fn segments_that_others_have_removed_are_closed_and_hold_nothing() {
    let mut pool = Pool::new("removed-by-others");
    let reader = SegmentFiles::new(pool.files.root().to_owned(), true);
    let root = pool.files.root().canonicalize().unwrap();
    let nameless = || {
        let opened = fs::read_dir("/proc/self/fd").unwrap();
        let opened = opened.filter_map(|file| {
            let path = file.unwrap().path();
            let target = fs::read_link(&path).ok()?;
            let is_removed = target.to_string_lossy().ends_with(" (deleted)");
            (is_removed && target.starts_with(&root)).then_some(path)
        });
        opened.collect::<Vec<_>>()
    };
    let mut removed = HashSet::new();
    for n in 0..1000 {
        let key = format!("a/{n}");
        pool.fill(&key, 20_000);
        let (_, placed) = pool.find(&key, ByteRange::Full).unwrap();
        removed.insert(placed.segment);
        let (got, _) = reader.read_part(placed, &key, 0, 20_000, true).unwrap();
        assert_eq!(got, Got::Bytes);
        let (files, live) = (nameless(), pool.segments().len());
        assert!(files.len() <= live.max(8), "{n}: {} of {live}", files.len());
        for file in files {
            assert_eq!(fs::metadata(file).unwrap().blocks(), 0, "{n}");
        }
    }
    assert!(removed.len() > 200, "{}", removed.len());
    end(pool);
}

#[test]
fn segment_with_another_name_is_removed_and_not_emptied() {
    let mut pool = Pool::new("another-name");
    pool.fill("a/0", 100);
    let (_, placed) = pool.find("a/0", ByteRange::Full).unwrap();
    let copy = pool.root.join("copy");
    fs::hard_link(pool.segment(placed.segment), &copy).unwrap();
    pool.files.remove(placed.segment).unwrap();
    assert!(pool.segments().is_empty());
    assert_ne!(fs::metadata(copy).unwrap().len(), 0);
    end(pool);
}

#[test]
fn page_is_never_used_twice() {
    let mut pool = Pool::new("twice");
    let mut seen = HashSet::new();
    for round in 0..6 {
        for n in 0..60 {
            let key = format!("{round}/{n}");
            pool.fill(&key, 5000);
            let (_, placed) = pool.find(&key, ByteRange::Full).unwrap();
            for page in 0..placed.length() / PAGE {
                let page = (placed.segment, u64::from(placed.page) + page);
                assert!(seen.insert(page), "{key}: {page:?} is used again");
            }
        }
        pool = match round % 3 {
            0 => pool.reopen(),
            1 => pool.lose_index(),
            _ => pool,
        };
    }
    end(pool);
}

#[test]
fn reader_that_is_overtaken_finds_out() {
    let mut pool = Pool::new("overtaken");
    pool.fill("a/0", 20_000);
    let (found, placed) = pool.find("a/0", ByteRange::Full).unwrap();
    let cell = found.handle as u32;
    let word = pool.step(|cache| Ok(cache.place_word(cell)));
    let is_still = |pool: &Pool| pool.step(|cache| Ok(cache.is_still(cell, word, placed.segment)));
    assert!(is_still(&pool));
    let victims = pool.step(|cache| cache.drop_missing("a/0"));
    assert!(!is_still(&pool));
    pool.delete(&victims);
    // The cell gets another entry.
    pool.fill("a/1", 20_000);
    assert!(!is_still(&pool));
    let read = pool.read_part(placed, "a/0", 0, 20_000, true);
    assert_eq!(read, Err(Got::Nothing));
    end(pool);
}

/// The cells of an entry and of its segment are used again, and each segment begins with the same page.
#[test]
fn reader_overtaken_by_the_same_cells_and_page_finds_out() {
    let mut pool = Pool::new("same-cells");
    // Each larger than the segments that values share.
    let size = 100_000;
    pool.fill("a/0", size);
    let (found, placed) = pool.find("a/0", ByteRange::Full).unwrap();
    let cell = found.handle as u32;
    let word = pool.step(|cache| Ok(cache.place_word(cell)));
    let mut met = 0;
    for n in 1..100 {
        pool.fill(&format!("a/{n}"), size);
        if pool.find("a/0", ByteRange::Full).is_none() {
            met += u32::from(pool.step(|cache| Ok(cache.place_word(cell))) == word);
            assert!(!pool.step(|cache| Ok(cache.is_still(cell, word, placed.segment))));
        }
    }
    assert_ne!(met, 0, "no other entry has had this cell and place");
    end(pool);
}

#[test]
fn index_emptied_by_another_is_not_current() {
    emptied_by_another("emptied", |other, _| {
        let damaged: Result<(), _> =
            other.step(sleep, |_| Err(zcache::error::Error::Corrupt("said so")));
        assert!(damaged.is_err());
    });
}

#[test]
fn index_emptied_by_another_that_cannot_read_its_header_is_not_current() {
    emptied_by_another("unreadable", |other, root| {
        let head = root.join("index/head");
        let file = File::options().write(true).open(head);
        file.unwrap().write_all_at(b"no index", 0).unwrap();
        assert!(other.step(sleep, |cache| Ok(cache.len())).is_err());
    });
}

fn emptied_by_another(name: &str, damage: impl Fn(&mut SharedIndex<u32>, &Path)) {
    let mut pool = Pool::new(name);
    pool.fill("a/0", 100);
    let (found, placed) = pool.find("a/0", ByteRange::Full).unwrap();
    let cell = found.handle as u32;
    let Locked::Shared(lock, _) = &*pool.index else {
        panic!("not shared")
    };
    let mut word = 0;
    lock.lock()
        .unwrap()
        .step(sleep, |cache| {
            word = cache.place_word(cell);
            Ok(())
        })
        .unwrap();
    let mut other = open(&pool.root, &pool.files, LIMITS, true);
    damage(&mut other, &pool.root);
    assert!(other.restart(2).unwrap());
    // Without a step, and so without the lock of the others.
    let one = lock.lock().unwrap();
    assert!(!one.cache().is_still(cell, word, placed.segment));
    drop(one);
    end(pool);
}

#[test]
fn name_without_room_in_a_header_stays_uncached() {
    let mut pool = Pool::new("long");
    let key = ["x".repeat(120).as_str(); 4].join("/");
    let ending = pool.fill_as(&key, ByteRange::Full, vec![1]);
    assert!(
        matches!(ending, Ending::Rejected("key too long")),
        "{ending:?}"
    );
    end(pool);
}

/// A value alone in its segment, at any place.
fn write(files: &SegmentFiles, placed: Placed) {
    let value = ValueToWrite {
        placed,
        name: "a/0",
        data: &[1; 100],
        fetched: NOW,
    };
    files.write(&value).unwrap();
}

#[test]
#[cfg(target_os = "linux")]
fn segments_are_open_a_few_at_a_time() {
    let pool = Pool::new("many");
    let place = |segment| Placed {
        segment,
        page: FIRST_PAGE,
        size: 100,
        capacity: 1,
    };
    // Also of those that have lost their name: their blocks are held as long.
    let are_open = || {
        let opened = fs::read_dir("/proc/self/fd").unwrap();
        let opened = opened.filter_map(|file| fs::read_link(file.unwrap().path()).ok());
        opened
            .filter(|path| path.parent() == Some(pool.files.root()))
            .count()
    };
    (0..200).for_each(|n| write(&pool.files, place(n)));
    let count = are_open();
    assert!((1..=128).contains(&count), "{count}");
    for n in 0..200 {
        let bytes = pool.read_part(place(n), "a/0", 0, 100, true);
        assert_eq!(bytes, Ok(vec![1; 100]), "{n}");
    }
    (0..200).for_each(|n| pool.files.remove(n).unwrap());
    assert_eq!(are_open(), 0);
    end(pool);
}

#[test]
fn value_that_was_never_valid_is_taken_back_without_a_block() {
    let pool = Pool::new("never-valid");
    // Its byte of the map is in a page of which nothing was written.
    let placed = Placed {
        segment: 1,
        page: FIRST_PAGE + 2 * PAGE as u32,
        size: 100,
        capacity: 3 * PAGE as u32,
    };
    write(&pool.files, placed);
    let held = pool.held();
    pool.files.unseal(placed).unwrap();
    assert_eq!(pool.held(), held);
    end(pool);
}

#[test]
fn segment_that_is_emptied_is_so_for_who_has_it_open() {
    let mut pool = Pool::new("emptied");
    pool.fill("a/0", 5000);
    let (_, placed) = pool.find("a/0", ByteRange::Full).unwrap();
    let other = SegmentFiles::new(pool.files.root().to_owned(), true);
    let read = || other.read_part(placed, "a/0", 0, 5000, true).unwrap().0;
    assert_eq!(read(), Got::Bytes);
    pool.files.empty(placed.segment).unwrap();
    assert_eq!(read(), Got::Nothing);
    end(pool);
}

#[test]
fn trial_whether_holes_can_be_made_leaves_files_of_others_alone() {
    let place = Place::new("trial");
    let others = place.at(&format!("trial-{}", std::process::id()));
    fs::write(&others, "mine").unwrap();
    for _ in 0..3 {
        can_punch(&place.0).unwrap();
        assert_eq!(fs::read_to_string(&others).unwrap(), "mine");
        assert_eq!(fs::read_dir(&place.0).unwrap().count(), 1);
    }
}

#[test]
fn value_that_fills_the_bound_is_cached_and_evicted() {
    let mut pool = Pool::new("large");
    // Three pages beside it, and one for its header.
    pool.fill("a/0", ((BOUND / PAGE - 4) * PAGE) as usize);
    assert!(pool.held() <= BOUND);
    pool.fill("a/1", 100);
    assert_eq!(pool.read("a/0"), None);
    pool.fill("a/2", 100);
    assert_eq!(pool.segments().len(), 1);
    assert!(pool.held() <= pool.counted());
    end(pool);
}

#[test]
fn value_is_found_and_deleted_by_its_name_alone() {
    for holes in [true, false] {
        let mut pool = Pool::with(&format!("by-name-{holes}"), LIMITS, holes);
        for key in ["a/0", "a/1/x", "ab/0", "b/0"] {
            pool.fill(key, 5000);
        }
        let names = |pool: &Pool| {
            let found = walk(&pool.files).unwrap();
            let mut names: Vec<_> = found.into_iter().map(|value| value.name).collect();
            names.sort();
            names
        };
        assert_eq!(delete_below(&pool.files, "a", true).unwrap(), 2);
        assert_eq!(names(&pool), ["a/0", "a/1/x", "ab/0", "b/0"]);
        assert_eq!(delete_below(&pool.files, "a/", false).unwrap(), 2);
        assert_eq!(names(&pool), ["ab/0", "b/0"]);
        assert_eq!(pool.read("a/0"), None);
        assert_eq!(pool.read("b/0"), Some(contents("b/0", 5000)));
        end(pool);
    }
}

#[test]
fn stragglers_are_moved_and_files_stay_few() {
    let limits = Limits {
        max_size: 400 * PAGE,
        ..LIMITS
    };
    let mut pool = Pool::with("stragglers", limits, true);
    let hot: Vec<String> = (0..24).map(|n| format!("hot/{n}")).collect();
    for round in 0..hot.len() {
        pool.fill(&hot[round], 3000);
        for n in 0..30 {
            pool.fill(&format!("cold/{round}/{n}"), 3000);
            for key in &hot[..=round] {
                let range = ByteRange::Full;
                assert!(
                    pool.step(|cache| cache.lookup(key, range, 0)).is_some(),
                    "{key}"
                );
            }
            assert!(pool.held() <= pool.counted() && pool.counted() <= limits.max_size);
        }
    }
    // At most eight that are sparse, and those that are a quarter full at least.
    let segments = pool.segments().len();
    assert!(segments <= 8 + 4 * 400 / 25, "{segments} segments");
    let sparse = pool.sparse_segments(25 / 4);
    assert!(sparse <= 8 + 1, "{sparse} sparse segments");
    let sealed = scan(&pool.files, false).unwrap();
    let sealed: HashSet<_> = sealed.values.into_iter().map(|value| value.name).collect();
    for key in &hot {
        assert_eq!(pool.read(key), Some(contents(key, 3000)));
        assert!(sealed.contains(key), "{key} would be lost with the index");
    }
    assert_eq!(pool.step(|cache| Ok(cache.in_flight())), (0, 0));
    end(pool);
}

#[test]
fn walk_over_all_headers_tells_how_it_gets_on() {
    let mut pool = Pool::new("walk");
    (0..9).for_each(|n| pool.fill(&format!("a/{n}"), 100));
    let before = pool.files.walked();
    assert_eq!(delete_below(&pool.files, "a/3", true).unwrap(), 1);
    assert!(pool.files.walked() >= before + 9);
    end(pool);
}
