//! Segments of a pool after the index is lost, a participant has died, or files were damaged.

use crate::pool;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::thread::sleep;

use zcache::cache::{BeginMove, Cache, Joined, PAGE, Placed, Reserve, START};
use zcache::disk::segments::{Got, SegmentFiles, SegmentHeader, ValueToWrite, scan, values_in};
use zcache::error::Error;
use zcache::key::ByteRange;
use zcache::shared::{Locked, Mapped, SharedIndex, StepError};

use self::pool::{LIMITS, NOW, Pool, contents, end, open, opening, rebuild};

type Damage = fn(&Pool, u64);

#[test]
fn rebuild_finds_what_was_sealed_and_nothing_else() {
    for holes in [true, false] {
        let mut pool = Pool::with(&format!("rebuild-{holes}"), LIMITS, holes);
        for n in 0..12 {
            pool.fill(&format!("a/{n}"), 700 * n);
        }
        let range = ByteRange::Range { start: 1, end: 3 };
        pool.fill_as("a/x", range, b"xy".to_vec());
        // One that is written, and was not sealed.
        let ticket = pool.join("a/unsealed", ByteRange::Full);
        let answer =
            pool.step(|cache| cache.reserve("a/unsealed", ByteRange::Full, 9000, ticket, NOW));
        let Reserve::Granted(id) = answer else {
            panic!("{answer:?}")
        };
        let placed = pool.step(|cache| cache.placed_for(id)).unwrap();
        let unsealed = ValueToWrite {
            placed,
            name: "a/unsealed",
            data: &[1; 9000],
            fetched: NOW,
        };
        pool.files.write(&unsealed).unwrap();
        // One that was evicted.
        let victims = pool.step(|cache| cache.drop_missing("a/7"));
        pool.delete(&victims);

        let mut before = pool.step(|cache| cache.recency());
        before.retain(|(key, _)| key != "a/unsealed");
        let pool = pool.lose_index();
        assert_eq!(pool.step(|cache| cache.recency()), before);
        assert!(pool.read("a/7").is_none() && pool.read("a/unsealed").is_none());
        for n in (0..12).filter(|n| *n != 7) {
            let key = format!("a/{n}");
            assert_eq!(pool.read(&key), Some(contents(&key, 700 * n)));
        }
        pool.step(|cache| cache.validate());
        assert!(pool.held() <= pool.counted());
        end(pool);
    }
}

#[test]
fn rebuild_keeps_the_newest_of_two_values_of_one_name() {
    let mut pool = Pool::new("newest");
    pool.fill("a/0", 100);
    let (_, old) = pool.find("a/0", ByteRange::Full).unwrap();
    let victims = pool.step(|cache| cache.drop_missing("a/0"));
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    // The process that had to delete it has said so, and has not.
    pool.step(|cache| cache.deletes_done(&cells, &[]));
    pool.fill("a/0", 200);
    let pool = pool.lose_index();
    assert_eq!(pool.read("a/0"), Some(contents("a/0", 200)));
    assert_eq!(pool.files.header(old), None, "the old one is still there");
    assert!(pool.held() <= pool.counted());
    end(pool);
}

#[test]
fn rebuild_gives_back_what_a_copy_without_holes_has_filled() {
    let mut pool = Pool::new("copied");
    for n in 0..12 {
        pool.fill(&format!("a/{n}"), 3000);
    }
    for n in (0..12).step_by(2) {
        let victims = pool.step(|cache| cache.drop_missing(&format!("a/{n}")));
        pool.delete(&victims);
    }
    for number in pool.segments() {
        let bytes = fs::read(pool.segment(number)).unwrap();
        fs::write(pool.segment(number), bytes).unwrap();
    }
    assert!(pool.held() > pool.counted());
    let pool = pool.lose_index();
    for n in (1..12).step_by(2) {
        let key = format!("a/{n}");
        assert_eq!(pool.read(&key), Some(contents(&key, 3000)));
    }
    assert!(pool.held() <= pool.counted());
    end(pool);
}

#[test]
fn damaged_segment_gives_right_bytes_or_nothing() {
    let damages: [(&str, Damage); 7] = [
        ("truncated", |pool, number| {
            let file = fs::OpenOptions::new()
                .write(true)
                .open(pool.segment(number))
                .unwrap();
            let len = file.metadata().unwrap().len();
            file.set_len(len - 6000).unwrap();
        }),
        ("emptied", |pool, number| {
            fs::write(pool.segment(number), "").unwrap();
        }),
        ("removed", |pool, number| {
            fs::remove_file(pool.segment(number)).unwrap();
        }),
        ("overwritten", |pool, number| {
            let len = fs::metadata(pool.segment(number)).unwrap().len() as usize;
            fs::write(pool.segment(number), vec![1; len]).unwrap();
        }),
        ("another", |pool, number| {
            let other = pool.segments().into_iter().find(|n| *n != number).unwrap();
            fs::copy(pool.segment(other), pool.segment(number)).unwrap();
        }),
        ("folder", |pool, number| {
            fs::remove_file(pool.segment(number)).unwrap();
            fs::create_dir(pool.segment(number)).unwrap();
        }),
        ("shifted", |pool, number| {
            let bytes = fs::read(pool.segment(number)).unwrap();
            let (head, values) = bytes.split_at(65 * PAGE as usize);
            let moved = [head, &[0; PAGE as usize], values].concat();
            fs::write(pool.segment(number), moved).unwrap();
        }),
    ];
    for (name, damage) in damages {
        for loses in [false, true] {
            let mut pool = Pool::new(&format!("damage-{name}-{loses}"));
            for n in 0..24 {
                pool.fill(&format!("a/{n}"), 3000);
            }
            damage(&pool, pool.segments()[0]);
            if name == "folder" && loses {
                // What is no file of ours stays.
                end(pool);
                continue;
            }
            pool = if loses {
                pool.lose_index()
            } else {
                pool.reopen()
            };
            for n in 0..24 {
                let key = format!("a/{n}");
                if let Some(value) = pool.read(&key) {
                    assert_eq!(value, contents(&key, 3000), "{name}");
                }
            }
            if loses {
                assert!(pool.held() <= pool.counted(), "{name}");
                // What was taken in is there.
                for key in pool.keys() {
                    assert!(pool.read(&key).is_some(), "{name}: {key}");
                }
            }
            end(pool);
        }
    }
}

/// What is evicted from such a segment would stay.
#[test]
fn copy_on_a_file_system_without_holes_begins_empty() {
    let mut pool = Pool::new("moved-elsewhere");
    (0..4).for_each(|n| pool.fill(&format!("a/{n}"), 5000));
    let Pool {
        root, index, fills, ..
    } = pool;
    drop((index, fills));
    fs::remove_dir_all(root.join("index")).unwrap();
    fs::create_dir_all(root.join("index")).unwrap();
    let pool = Pool::over(root, LIMITS, false);
    assert_eq!(pool.keys(), [""; 0]);
    assert_eq!(pool.segments(), [0; 0]);
    end(pool);
}

/// Its room would be counted for ever.
#[test]
fn index_of_segments_with_holes_begins_anew_where_none_can_be_made() {
    let mut pool = Pool::new("opened-elsewhere");
    (0..4).for_each(|n| pool.fill(&format!("a/{n}"), 5000));
    let Pool {
        root, index, fills, ..
    } = pool;
    drop((index, fills));
    let mut pool = Pool::over(root, LIMITS, false);
    assert_eq!(pool.segments(), [0; 0]);
    (0..40).for_each(|n| pool.fill(&format!("b/{n}"), 5000));
    let mut keys = pool.keys();
    assert!(keys.len() > 10, "{keys:?}");
    // What was filled here is kept.
    let pool = pool.reopen();
    let mut kept = pool.keys();
    keys.sort();
    kept.sort();
    assert_eq!(kept, keys);
    end(pool);
}

#[test]
fn header_inside_a_value_is_no_header() {
    let mut pool = Pool::new("inside");
    pool.fill("a/0", 100);
    let number = pool.segments()[0];
    // A chunk that is a segment of a pool.
    let bytes = fs::read(pool.segment(number)).unwrap();
    let last = bytes[65 * PAGE as usize..].to_vec();
    let value = [vec![0; PAGE as usize - 512], last].concat();
    pool.fill_as("b/0", ByteRange::Full, value.clone());
    let (_, placed) = pool.find("b/0", ByteRange::Full).unwrap();
    // Even where the map says so.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(pool.segment(number))
        .unwrap();
    file.write_all_at(&[1; 100], placed.map_at()).unwrap();
    let pool = pool.lose_index();
    let mut keys = pool.keys();
    keys.sort();
    assert_eq!(keys, ["a/0", "b/0"]);
    assert_eq!(pool.read("b/0"), Some(value));
    end(pool);
}

/// A participant dies after each of its steps; another one takes over, with the index and without it.
#[test]
fn death_at_each_step_leaves_nothing_uncounted() {
    for steps in 0..6 {
        for loses in [false, true] {
            let mut pool = Pool::new(&format!("death-{steps}-{loses}"));
            pool.fill("a/0", 5000);
            {
                let mut dying = open(&pool.root, &pool.files, LIMITS, true);
                die_after(&mut dying, &pool.files, steps);
            }
            pool = if loses {
                pool.lose_index()
            } else {
                let Locked::Shared(lock, _) = &*pool.index else {
                    panic!("not shared")
                };
                lock.lock().unwrap().reap().unwrap();
                pool
            };
            pool.fill("a/1", 100);
            pool.fill("a/2", 100);
            let victims = pool.step(|cache| cache.retry_failed(10));
            pool.delete(&victims);
            assert_eq!(pool.read("a/0"), Some(contents("a/0", 5000)));
            let value = pool.read("b/0");
            match (steps, loses) {
                (0..4, _) | (4, true) => assert_eq!(value, None, "{steps} {loses}"),
                _ => assert_eq!(value, Some(contents("b/0", 9000)), "{steps} {loses}"),
            }
            let (held, counted) = (pool.held(), pool.counted());
            assert!(
                held <= counted,
                "{steps} {loses}: {held} held, {counted} counted"
            );
            end(pool);
        }
    }
}

/// Bytes of a cell of the index; the last one has the kind of what it is.
const CELL: u64 = 56;

fn damage_kind(pool: &Pool, cell: u64) {
    let mut options = fs::OpenOptions::new();
    let file = options.read(true).write(true);
    let file = file.open(pool.root.join("index/cells")).unwrap();
    let (mut byte, at) = ([0], cell * CELL + CELL - 1);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

fn restart(pool: &Pool) -> bool {
    let Locked::Shared(lock, _) = &*pool.index else {
        panic!("not shared")
    };
    lock.lock().unwrap().restart(7).unwrap()
}

/// What is not found is damage, not an answer: of a key that is written, and of a prefix that is dropped.
#[test]
fn deletion_that_damage_hides_values_from_finds_the_damage() {
    let zero = |pool: &Pool, name: &str, at: u64, len: usize| {
        let path = pool.root.join("index").join(name);
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&vec![0; len], at).unwrap();
    };
    // A name that does not fit into a cell, as the label of a source.
    let label = "0123456789abcdef0123456789abcdef";
    for (name, is_key) in [
        ("texts", true),
        ("texts", false),
        ("table", true),
        ("table", false),
        ("cells", true),
        ("cells", false),
        ("all cells", true),
        ("all cells", false),
        ("places", true),
        ("places", false),
    ] {
        let mut pool = Pool::new(&format!("hidden-{}-{is_key}", name.replace(' ', "-")));
        for n in 0..12 {
            pool.fill(&format!("{label}/k/{n}"), 100);
        }
        let (found, _) = pool.find(&format!("{label}/k/7"), ByteRange::Full).unwrap();
        // As another process, which has found no directory before.
        let (mut other, fresh) =
            SharedIndex::<u32>::open(&pool.root.join("index"), &opening(LIMITS)).unwrap();
        assert!(!fresh);
        let cell = u64::from(found.handle as u32);
        match name {
            "texts" => zero(&pool, name, 0, 4096),
            "table" => zero(&pool, name, 8, 4 * 4094),
            "all cells" => zero(&pool, "cells", 0, 64 * CELL as usize),
            "cells" => zero(&pool, name, cell * CELL, CELL as usize),
            _ => zero(&pool, name, cell * 8, 8),
        }
        let Locked::Shared(lock, _) = &*pool.index else {
            panic!("not shared")
        };
        let answer = if is_key {
            other.step(sleep, |cache| cache.begin_write(&format!("{label}/k/7")))
        } else {
            let drained = other.step(sleep, |cache| cache.drain_prefix(label, START));
            drained.map(|(victims, _)| victims)
        };
        let is_damage = matches!(answer, Err(StepError::Failed(Error::Corrupt(_))));
        assert!(is_damage, "{name} {is_key}: {answer:?}");
        assert!(lock.lock().unwrap().restart(7).unwrap());
        rebuild(&mut lock.lock().unwrap(), &pool.files);
        assert_eq!(pool.keys(), [""; 0]);
        drop(other);
        end(pool);
    }
}

/// How deep names in a directory are says where there is nothing to delete, so it is not believed where a bit has flipped.
#[test]
fn deletion_finds_a_flipped_bit_of_the_depth_of_a_directory() {
    for bit in [0, 1, 7, 8, 9, 15] {
        let mut pool = Pool::new(&format!("depth-{bit}"));
        for n in 0..12 {
            pool.fill(&format!("s/a/c/{}/{}", n % 3, n / 3), 100);
        }
        let path = pool.root.join("index/cells");
        let cells = fs::read(&path).unwrap();
        let is_c = |cell: &[u8]| cell[55] & 15 == 1 && cell[40..48] == *b"c\0\0\0\0\0\0\0";
        let at = cells.chunks(CELL as usize).position(is_c).unwrap();
        let (at, bit) = (at * CELL as usize + 28 + bit / 8, bit % 8);
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let flipped = [cells[at] ^ 1 << bit];
        file.write_all_at(&flipped, at as u64).unwrap();
        let Locked::Shared(lock, _) = &*pool.index else {
            panic!("not shared")
        };
        let mut index = lock.lock().unwrap();
        let answer = index.step(sleep, |cache| cache.drain_prefix("s/a/c/1", START));
        let is_damage = matches!(answer, Err(StepError::Failed(Error::Corrupt(_))));
        assert!(is_damage, "{at} {bit}: {answer:?}");
        assert!(index.restart(7).unwrap());
        rebuild(&mut index, &pool.files);
        drop(index);
        end(pool);
    }
}

/// A write returns that has found nothing, for the index is damaged; then the damage is found.
#[test]
fn pool_begins_empty_after_damage_also_where_who_has_found_it_dies() {
    for dies in ["never", "before the restart", "before the rebuild", "in it"] {
        let mut pool = Pool::new(&format!("evidence-{}", dies.replace(' ', "-")));
        for n in 0..12 {
            pool.fill(&format!("a/{n}"), 700 * n);
        }
        let (found, _) = pool.find("a/7", ByteRange::Full).unwrap();
        damage_kind(&pool, u64::from(found.handle as u32));
        let Locked::Shared(lock, _) = &*pool.index else {
            panic!("not shared")
        };
        let failed = lock.lock().unwrap().step(sleep, |cache| cache.validate());
        assert!(matches!(failed, Err(StepError::Failed(Error::Corrupt(_)))));
        if dies != "before the restart" {
            assert!(restart(&pool));
        }
        if dies == "in it" {
            let (numbers, files) = (pool.segments(), &pool.files);
            files.empty(numbers[0]).unwrap();
        }
        if dies == "never" {
            rebuild(&mut lock.lock().unwrap(), &pool.files);
        } else {
            pool = pool.reopen();
        }
        assert_eq!(pool.keys(), [""; 0], "{dies}");
        assert_eq!(pool.segments(), [0; 0], "{dies}");
        // From then on an index that is lost is rebuilt.
        pool.fill("a/0", 100);
        let pool = pool.lose_index();
        assert_eq!(pool.read("a/0"), Some(contents("a/0", 100)), "{dies}");
        end(pool);
    }
}

#[test]
fn rebuild_that_began_before_damage_was_found_takes_nothing_in() {
    let mut pool = Pool::new("overtaken-by-damage");
    pool.fill("a/0", 100);
    let found = scan(&pool.files, true).unwrap();
    let Locked::Shared(lock, _) = &*pool.index else {
        panic!("not shared")
    };
    let mut index = lock.lock().unwrap();
    let corrupt = |_: &mut Cache<Mapped, u32>| Err::<(), _>(Error::Corrupt("a test"));
    index.step(sleep, corrupt).unwrap_err();
    assert!(index.restart(7).unwrap());
    let adopt = |cache: &mut Cache<Mapped, u32>| {
        found.adopt_segments(cache)?;
        assert_eq!(found.adopt_values(cache, 0..10)?, []);
        Ok(cache.len())
    };
    assert_eq!(index.step(sleep, adopt), Ok(0));
    index.complete().unwrap();
    let is_complete = |cache: &mut Cache<Mapped, u32>| Ok(cache.is_complete());
    assert_eq!(index.step(sleep, is_complete), Ok(false));
    rebuild(&mut index, &pool.files);
    assert_eq!(index.step(sleep, is_complete), Ok(true));
    drop(index);
    assert_eq!(pool.segments(), [0; 0]);
    end(pool);
}

#[test]
fn segment_of_a_participant_that_has_died_goes_with_its_last_value() {
    let pool = Pool::new("dead-owner");
    {
        let mut dying = open(&pool.root, &pool.files, LIMITS, true);
        die_after(&mut dying, &pool.files, 5);
    }
    let Locked::Shared(lock, _) = &*pool.index else {
        panic!("not shared")
    };
    lock.lock().unwrap().reap().unwrap();
    let (_, placed) = pool.find("b/0", ByteRange::Full).unwrap();
    let victims = pool.step(|cache| cache.drop_missing("b/0"));
    pool.delete(&victims);
    let spent = pool.step(|cache| cache.spent_segments(10));
    let numbers: Vec<u64> = spent.iter().map(|(_, number)| *number).collect();
    assert_eq!(numbers, [placed.segment]);
    end(pool);
}

#[test]
fn value_that_was_damaged_is_not_moved() {
    let mut pool = Pool::new("damaged-move");
    pool.fill("a/0", 5000);
    let (_, from) = pool.find("a/0", ByteRange::Full).unwrap();
    let value = values_in(&pool.files, from.segment).unwrap().remove(0);
    let segment = pool.segment(from.segment);
    let file = fs::File::options().write(true).open(segment).unwrap();
    file.write_all_at(b"?", from.start() + 1000).unwrap();
    // Its copy would have a checksum that is right.
    let page = from.page + 10;
    assert!(pool.files.copy(&value, Placed { page, ..from }).is_err());
    end(pool);
}

fn die_after(index: &mut SharedIndex<u32>, files: &SegmentFiles, steps: usize) {
    let (key, range) = ("b/0", ByteRange::Full);
    let ticket = match index
        .step(sleep, |cache| cache.join(key, range, 0, 0, true))
        .unwrap()
    {
        Joined::Lead(ticket) => ticket,
        other => panic!("{other:?}"),
    };
    if steps == 0 {
        return;
    }
    let reserve = |cache: &mut Cache<Mapped, u32>| cache.reserve(key, range, 9000, ticket, NOW);
    let Reserve::Granted(id) = index.step(sleep, reserve).unwrap() else {
        panic!("no room")
    };
    if steps == 1 {
        return;
    }
    let placed = index
        .step(sleep, |cache| cache.placed_for(id))
        .unwrap()
        .unwrap();
    let value = ValueToWrite {
        placed,
        name: key,
        data: &contents(key, 9000),
        fetched: NOW,
    };
    if steps == 2 {
        // Half of it.
        files.write(&value).unwrap();
        files
            .delete(Placed {
                page: placed.page + 1,
                size: 1,
                ..placed
            })
            .unwrap();
        return;
    }
    let checksum = files.write(&value).unwrap();
    if steps == 3 {
        return;
    }
    let done = index
        .step(sleep, |cache| cache.commit(id, Some(checksum), NOW))
        .unwrap();
    assert!(done.unwrap().victims.is_empty());
    if steps == 4 {
        return;
    }
    files.seal(placed).unwrap();
}

#[test]
fn write_deletes_also_what_another_has_begun_to_delete() {
    let mut pool = Pool::new("stopped");
    pool.fill("a/0", 100);
    pool.fill("a/1", 100);
    let mut stopped = open(&pool.root, &pool.files, LIMITS, true);
    // It has dropped the entry, and deletes nothing any more.
    let victims = stopped
        .step(sleep, |cache| cache.drop_missing("a/0"))
        .unwrap();
    assert_eq!(victims.len(), 1);
    assert!(pool.step(|cache| cache.begin_write("a/0")).is_empty());
    let others = pool.step(|cache| cache.in_progress_below("a/0"));
    assert_eq!(others.len(), 1);
    pool.delete(&others);
    pool.step(|cache| cache.end_write("a/0", true, None));
    drop(stopped);
    let pool = pool.lose_index();
    assert_eq!(pool.read("a/0"), None);
    assert_eq!(pool.read("a/1"), Some(contents("a/1", 100)));
    end(pool);
}

#[test]
fn late_seal_of_an_evicted_value_brings_nothing_back() {
    let mut pool = Pool::new("late");
    pool.fill("a/0", 0);
    pool.fill("a/1", 100);
    let (_, placed) = pool.find("a/0", ByteRange::Full).unwrap();
    let victims = pool.step(|cache| cache.drop_missing("a/0"));
    pool.delete(&victims);
    let held = pool.held();
    pool.files.seal(placed).unwrap();
    assert_eq!(pool.held(), held);
    let pool = pool.lose_index();
    assert_eq!(pool.keys(), ["a/1"]);
    end(pool);
}

/// What stays uncounted has to be deleted: a value of which another one of its name is known, and one of a name that zcache
/// never gives.
#[test]
fn value_that_cannot_be_taken_in_is_handed_back() {
    let mut pool = Pool::new("refused");
    pool.fill("a/0", 5000);
    pool.fill("a/1", 5000);
    for (key, name) in [("b/0", "a/0"), ("b/1", ".zcache/other")] {
        // Room that is not used by its own key.
        let ticket = pool.join(key, ByteRange::Full);
        let answer = pool.step(|cache| cache.reserve(key, ByteRange::Full, 9000, ticket, NOW));
        let Reserve::Granted(id) = answer else {
            panic!("{answer:?}")
        };
        let placed = pool.step(|cache| cache.placed_for(id)).unwrap();
        let value = ValueToWrite {
            placed,
            name,
            data: &[1; 9000],
            fetched: pool.clock + 1,
        };
        pool.files.write(&value).unwrap();
        pool.files.seal(placed).unwrap();
        let found = scan(&pool.files, false).unwrap();
        let refused = pool.step(|cache| found.adopt_values(cache, 0..found.values.len()));
        let places: Vec<_> = refused.iter().map(|p| (p.segment, p.page)).collect();
        assert_eq!(places, [(placed.segment, placed.page)], "{name}");
        pool.files.delete(placed).unwrap();
    }
    assert_eq!(pool.read("a/0"), Some(contents("a/0", 5000)));
    end(pool);
}

/// The index may be emptied while a scan is on its way: then two scans fill it.
#[test]
fn two_scans_at_once_take_in_each_segment_once() {
    let mut pool = Pool::new("two-scans");
    (0..30).for_each(|n| pool.fill(&format!("a/{n}"), 5000));
    let (found, again) = (
        scan(&pool.files, true).unwrap(),
        scan(&pool.files, true).unwrap(),
    );
    let Pool {
        root,
        index,
        fills,
        files,
        clock,
        ..
    } = pool;
    drop((index, fills));
    fs::remove_dir_all(root.join("index")).unwrap();
    fs::create_dir_all(root.join("index")).unwrap();
    let at = root.join("index");
    let (mut index, fresh) = SharedIndex::<u32>::open(&at, &opening(LIMITS)).unwrap();
    assert!(fresh);
    let adopt = |cache: &mut Cache<Mapped, u32>| {
        // One without its segments takes nothing in, and gives nothing up.
        assert_eq!(again.adopt_values(cache, 0..10)?, []);
        for part in [0..20, 10..30] {
            found.adopt_segments(cache)?;
            again.adopt_segments(cache)?;
            // Their values come later.
            assert_eq!(cache.spent_segments(10)?, []);
            assert_eq!(found.adopt_values(cache, part.clone())?, []);
            assert_eq!(again.adopt_values(cache, part)?, []);
        }
        Ok(())
    };
    index.step(sleep, adopt).unwrap();
    index.complete().unwrap();
    let spent = index.step(sleep, |cache| {
        cache.validate()?;
        assert_eq!(cache.len(), 30);
        cache.spent_segments(10)
    });
    assert_eq!(spent.unwrap(), []);
    drop((index, files));
    let pool = Pool {
        clock,
        ..Pool::over(root, LIMITS, true)
    };
    for n in 0..30 {
        let key = format!("a/{n}");
        assert_eq!(pool.read(&key), Some(contents(&key, 5000)));
    }
    end(pool);
}

#[test]
fn value_that_could_not_be_deleted_is_ignored_by_a_rebuild() {
    let mut pool = Pool::new("unsealed");
    pool.fill("a/0", 5000);
    pool.fill("a/1", 5000);
    let (_, placed) = pool.find("a/0", ByteRange::Full).unwrap();
    // Which makes no holes.
    let files = SegmentFiles::new(pool.files.root().to_owned(), false);
    assert!(files.delete(placed).is_err());
    files.unseal(placed).unwrap();
    // What is in no segment has nothing to be taken back.
    let elsewhere = Placed {
        segment: placed.segment + 1,
        ..placed
    };
    files.unseal(elsewhere).unwrap();
    let pool = pool.lose_index();
    assert_eq!(pool.keys(), ["a/1"]);
    assert!(pool.held() <= pool.counted());
    end(pool);
}

#[test]
fn segment_that_others_have_put_there_is_replaced_by_who_makes_it() {
    let junk = vec![7; 40 * PAGE as usize];
    for (n, maker) in [None, Some(1), Some(0)].into_iter().enumerate() {
        let mut pool = Pool::new(&format!("put-there-{n}"));
        pool.fill("a/0", 5000);
        let (_, placed) = pool.find("a/0", ByteRange::Full).unwrap();
        let number = placed.segment + 1;
        let mut theirs = junk.clone();
        if let Some(maker) = maker {
            let header = SegmentHeader {
                number,
                capacity: placed.capacity,
                maker,
            };
            let header = header.to_bytes();
            theirs[..header.len()].copy_from_slice(&header);
        }
        fs::write(pool.segment(number), theirs).unwrap();
        // As a copy of the pool would find it.
        assert!(
            pool.files
                .header(Placed {
                    segment: number,
                    ..placed
                })
                .is_none()
        );
        let mut last = 0;
        while pool
            .find(&format!("a/{last}"), ByteRange::Full)
            .unwrap()
            .1
            .segment
            != number
        {
            last += 1;
            pool.fill(&format!("a/{last}"), 5000);
        }
        assert!(pool.held() <= pool.counted(), "{n}");
        pool.files.close();
        pool.fill("a/last", 5000);
        assert_eq!(
            pool.find("a/last", ByteRange::Full).unwrap().1.segment,
            number
        );
        for key in [format!("a/{last}"), "a/last".to_owned()] {
            assert_eq!(pool.read(&key), Some(contents(&key, 5000)), "{n}");
        }
        end(pool);
    }
}

#[test]
fn segment_that_was_removed_is_made_anew_by_who_appends_to_it() {
    for is_folder in [false, true] {
        let mut pool = Pool::new(&format!("removed-{is_folder}"));
        pool.fill("a/0", 5000);
        let other = SegmentFiles::new(pool.files.root().to_owned(), true);
        let (_, placed) = pool.find("a/0", ByteRange::Full).unwrap();
        let (got, _) = other.read_part(placed, "a/0", 0, 5000, true).unwrap();
        assert_eq!(got, Got::Bytes);
        if is_folder {
            fs::remove_dir_all(pool.files.root()).unwrap();
        } else {
            fs::remove_file(pool.segment(placed.segment)).unwrap();
        }
        pool.fill("a/1", 5000);
        assert_eq!(pool.segments(), [placed.segment]);
        let (_, placed) = pool.find("a/1", ByteRange::Full).unwrap();
        assert_eq!(pool.read("a/1"), Some(contents("a/1", 5000)));
        assert_eq!(pool.read("a/0"), None);
        // Who has the old file open finds what is in the new one, and deletes it there.
        let (got, bytes) = other.read_part(placed, "a/1", 0, 5000, true).unwrap();
        assert_eq!((got, bytes), (Got::Bytes, contents("a/1", 5000)));
        let before = pool.held();
        other.delete(placed).unwrap();
        assert!(pool.held() < before);
        assert_eq!(pool.read("a/1"), None);
        pool.fill("a/2", 5000);
        let pool = pool.lose_index();
        assert_eq!(pool.keys(), ["a/2"]);
        end(pool);
    }
}

/// Each bit of the places flips; what is read is right, and what is deleted is what should be.
#[test]
fn flipped_bit_of_a_place_is_found_before_it_is_used() {
    let mut pool = Pool::new("flips");
    let keys: Vec<String> = (0..4).map(|n| format!("a/{n}")).collect();
    for key in &keys {
        pool.fill(key, 5000);
    }
    let cells: BTreeMap<&str, u32> = (keys.iter())
        .map(|key| {
            (
                key.as_str(),
                pool.find(key, ByteRange::Full).unwrap().0.handle as u32,
            )
        })
        .collect();
    let Pool {
        root,
        index,
        fills,
        files,
        ..
    } = pool;
    drop((index, fills));
    let places = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(root.join("index/places"))
        .unwrap();
    for (key, cell) in cells {
        for bit in 0..64 {
            let (at, mask) = (u64::from(cell) * 8 + bit / 8, 1 << (bit % 8));
            let mut byte = [0];
            places.read_exact_at(&mut byte, at).unwrap();
            places.write_all_at(&[byte[0] ^ mask], at).unwrap();
            let index_root = root.join("index");
            let (mut index, fresh) =
                SharedIndex::<u32>::open(&index_root, &opening(LIMITS)).unwrap();
            assert!(!fresh);
            // Whatever would read or delete it finds the index damaged instead.
            let placed = index.step(sleep, |cache| cache.placed(cell));
            assert!(placed.is_err(), "{key}: bit {bit}");
            drop(index);
            places.write_all_at(&byte, at).unwrap();
            // It has marked the index as damaged.
            let head = fs::OpenOptions::new()
                .write(true)
                .open(root.join("index/head"))
                .unwrap();
            head.write_all_at(&[0; 4], 8).unwrap();
        }
    }
    drop(files);
    fs::remove_dir_all(root).unwrap();
}

/// A participant dies after each step of a move; then another one writes the key, or only takes over. Whatever comes
/// back without the index is the value, and nothing older than the write.
#[test]
fn death_at_each_step_of_a_move_leaves_the_value_or_nothing() {
    for steps in 0..5 {
        for (loses, writes) in [(false, false), (true, false), (false, true), (true, true)] {
            let case = format!("{steps} {loses} {writes}");
            let mut pool = Pool::new(&format!("move-{steps}-{loses}-{writes}"));
            pool.fill("a/0", 5000);
            let (_, from) = pool.find("a/0", ByteRange::Full).unwrap();
            {
                let mut dying = open(&pool.root, &pool.files, LIMITS, true);
                die_in_a_move(&mut dying, &pool.files, from, steps);
            }
            if writes {
                let victims = pool.step(|cache| cache.begin_write("a/0"));
                pool.delete(&victims);
                let others = pool.step(|cache| cache.in_progress_below("a/0"));
                pool.delete(&others);
                pool.step(|cache| cache.end_write("a/0", false, None));
            }
            if loses {
                pool = pool.lose_index();
            } else {
                let Locked::Shared(lock, _) = &*pool.index else {
                    panic!("not shared")
                };
                lock.lock().unwrap().reap().unwrap();
            }
            let victims = pool.step(|cache| cache.retry_failed(10));
            pool.delete(&victims);
            let value = pool.read("a/0");
            match (loses, writes) {
                (_, true) => assert_eq!(value, None, "{case}"),
                // The copy was not valid yet.
                (true, false) if steps == 4 => assert_eq!(value, None, "{case}"),
                _ => assert_eq!(value, Some(contents("a/0", 5000)), "{case}"),
            }
            pool.fill("a/1", 100);
            let (held, counted) = (pool.held(), pool.counted());
            assert!(held <= counted, "{case}: {held} held, {counted} counted");
            end(pool);
        }
    }
}

fn die_in_a_move(index: &mut SharedIndex<u32>, files: &SegmentFiles, from: Placed, steps: usize) {
    if steps == 0 {
        return;
    }
    let begin = |cache: &mut Cache<Mapped, u32>| cache.begin_move("a/0", ByteRange::Full, from);
    let BeginMove::To(moved) = index.step(sleep, begin).unwrap() else {
        panic!("no room")
    };
    if steps == 1 {
        return;
    }
    let value = values_in(files, from.segment).unwrap().remove(0);
    files.copy(&value, moved.to).unwrap();
    if steps == 2 {
        return;
    }
    let finish = |cache: &mut Cache<Mapped, u32>| cache.finish_move(moved, true);
    let (victims, is_moved) = index.step(sleep, finish).unwrap();
    assert!(is_moved);
    if steps == 3 {
        return;
    }
    assert_eq!(victims[0].placed.unwrap().page, from.page);
    files.delete(victims[0].placed.unwrap()).unwrap();
}
