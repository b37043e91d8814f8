//! An index that several participants share: what one of them does while the others lose it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use zcache::cache::{Joined, Limits, RejectReason, Reserve, START};
use zcache::key::ByteRange;
use zcache::policy::{Minimise, PolicyKind};
use zcache::shared::{HeldLock, Opening, SharedIndex, StepError};

use crate::place::is_damaged;

const LIMITS: Limits = Limits {
    flat_namespace: false,
    ..Limits::bounded(1000)
};

type Index = SharedIndex<u32>;

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let root =
            std::env::temp_dir().join(format!("zcache-shared-{}-{name}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        Dir(root)
    }

    fn open(&self) -> Index {
        let (mut index, fresh) = Index::open(&self.0, &Opening::new(LIMITS, 1)).unwrap();
        if fresh {
            index.complete().unwrap();
        }
        index
    }

    /// What a participant leaves that is killed inside a step.
    fn die_in_a_step(&self) {
        let head = OpenOptions::new()
            .write(true)
            .open(self.0.join("head"))
            .unwrap();
        head.write_all_at(&[9], 8).unwrap();
    }

    fn remove(&self, names: &[&str]) {
        for name in names {
            fs::remove_file(self.0.join(name)).unwrap();
        }
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn join(index: &mut Index, key: &str) -> u64 {
    let joined = index.step(sleep, |cache| cache.join(key, ByteRange::Full, 0, 1, false));
    match joined.unwrap() {
        Joined::Lead(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

fn reserve(index: &mut Index, key: &str, size: u64) -> Reserve {
    let ticket = join(index, key);
    index
        .step(sleep, |cache| {
            cache.reserve(key, ByteRange::Full, size, ticket, 1)
        })
        .unwrap()
}

fn granted(index: &mut Index, key: &str, size: u64) -> u64 {
    match reserve(index, key, size) {
        Reserve::Granted(id) => id,
        other => panic!("{other:?}"),
    }
}

fn is_full(index: &mut Index, key: &str, size: u64) {
    let answer = reserve(index, key, size);
    assert_eq!(answer, Reserve::Rejected(RejectReason::NoSpace), "{key}");
}

/// Empties the index as one participant does that finds it damaged.
fn rebuild(index: &mut Index) {
    is_damaged(index.step(sleep, |cache| Ok(cache.len())));
    assert!(index.restart(7).unwrap());
    index.complete().unwrap();
}

#[test]
fn what_was_granted_counts_after_a_rebuild_until_it_has_ended() {
    let dir = Dir::new("granted");
    let (mut one, mut other) = (dir.open(), dir.open());
    let id = granted(&mut one, "a", 600);
    dir.die_in_a_step();
    rebuild(&mut other);
    // The one is writing its bytes all the time, whatever the index says.
    is_full(&mut other, "b", 500);
    let small = granted(&mut other, "c", 400);
    let done = one.step(sleep, |cache| cache.commit(id, None, 1));
    assert!(done.unwrap().is_none(), "the index knows nothing of it");
    is_full(&mut other, "d", 500);
    // It has removed them.
    one.step(sleep, |cache| cache.abort(id)).unwrap();
    granted(&mut other, "e", 600);
    other.step(sleep, |cache| cache.abort(small)).unwrap();
    for index in [&mut one, &mut other] {
        index.step(sleep, |cache| cache.validate()).unwrap();
    }
}

#[test]
fn what_was_reserved_in_a_step_that_failed_takes_no_room() {
    let dir = Dir::new("failed");
    let mut index = dir.open();
    let tickets = ["a", "b"].map(|key| (key, join(&mut index, key)));
    let failed: Result<(), _> = index.step(sleep, |cache| {
        for (key, ticket) in tickets {
            let answer = cache.reserve(key, ByteRange::Full, 400, ticket, 1)?;
            assert!(matches!(answer, Reserve::Granted(_)), "{answer:?}");
        }
        Err(zcache::error::Error::Corrupt("said so"))
    });
    is_damaged(failed);
    assert!(index.restart(7).unwrap());
    index.complete().unwrap();
    granted(&mut index, "c", 1000);
    index.step(sleep, |cache| cache.validate()).unwrap();
}

#[test]
fn reserved_bytes_count_after_two_rebuilds() {
    let dir = Dir::new("reserved");
    let (mut one, mut other) = (dir.open(), dir.open());
    granted(&mut one, "a", 300);
    granted(&mut one, "b", 300);
    for _ in 0..2 {
        dir.die_in_a_step();
        rebuild(&mut other);
        is_full(&mut other, "c", 500);
    }
    // By itself as well.
    dir.die_in_a_step();
    rebuild(&mut one);
    is_full(&mut other, "d", 500);
    is_full(&mut one, "e", 500);
    granted(&mut one, "f", 400);
}

#[test]
fn what_was_granted_counts_in_new_files() {
    let dir = Dir::new("new-files");
    let (mut one, mut other) = (dir.open(), dir.open());
    let id = granted(&mut one, "a", 600);
    dir.remove(&["lock", "head", "table", "cells", "texts"]);
    is_damaged(one.step(sleep, |cache| Ok(cache.len())));
    is_damaged(other.step(sleep, |cache| Ok(cache.len())));
    assert!(one.restart(7).unwrap());
    one.complete().unwrap();
    assert!(!other.restart(8).unwrap(), "it was made anew already");
    is_full(&mut other, "b", 500);
    one.step(sleep, |cache| cache.abort(id)).unwrap();
    granted(&mut other, "c", 1000);
}

#[test]
fn bytes_of_a_writer_that_died_after_a_rebuild_are_looked_for() {
    let dir = Dir::new("died");
    let (mut one, mut other) = (dir.open(), dir.open());
    granted(&mut one, "a", 600);
    dir.die_in_a_step();
    rebuild(&mut other);
    drop(one);
    // It may have written them since: only a scan can tell.
    is_damaged(other.reap());
    rebuild(&mut other);
    granted(&mut other, "b", 1000);
}

#[test]
fn a_lock_that_is_gone_is_not_believed() {
    let dir = Dir::new("lock");
    let (mut one, mut other) = (dir.open(), dir.open());
    dir.remove(&["lock"]);
    let mut third = dir.open();
    for index in [&mut one, &mut other] {
        is_damaged(index.step(sleep, |cache| Ok(cache.len())));
        assert!(!index.restart(7).unwrap(), "the third one has the files");
    }
    // All three have the same lock.
    let _held = HeldLock::take(&dir.0, Duration::from_secs(10)).unwrap();
    for index in [&mut one, &mut other, &mut third] {
        let answer = index.step(sleep, |cache| Ok(cache.len()));
        assert!(matches!(answer, Err(StepError::Busy)), "{answer:?}");
    }
}

#[test]
fn files_of_the_index_that_are_gone_are_made_anew() {
    for name in ["head", "table", "cells", "texts"] {
        let dir = Dir::new(name);
        let (mut one, mut other) = (dir.open(), dir.open());
        dir.remove(&[name]);
        // Not each step looks.
        while one.step(sleep, |cache| Ok(cache.len())).is_ok() {
            sleep(Duration::from_millis(1));
        }
        rebuild(&mut one);
        granted(&mut other, "a", 600);
        is_full(&mut one, "b", 500);
    }
}

/// Another key, of which the changes count where those of this one do.
fn with_the_slot_of(index: &mut Index, key: &str) -> String {
    let found = index.step(sleep, |cache| {
        for n in 0.. {
            let other = format!("{key}-{n}");
            let decode = cache.begin_decode(key, 1.into())?.unwrap();
            cache.begin_write(&other)?;
            cache.end_write(&other, false, None)?;
            if !cache.stays_current(key, decode, 1, 1.into())? {
                return Ok(other);
            }
        }
        unreachable!("there are fewer slots");
    });
    found.unwrap()
}

fn begin_write(index: &mut Index, key: &str) {
    let victims = index.step(sleep, |cache| cache.begin_write(key));
    assert!(victims.unwrap().is_empty());
}

/// Whether the value may be cached.
fn end_write(index: &mut Index, key: &str) -> Option<u64> {
    let ended = index.step(sleep, |cache| cache.end_write(key, true, None));
    ended.unwrap().1
}

fn invalidate(index: &mut Index, prefix: &str) {
    let done = index.step(sleep, |cache| {
        cache.invalidate_prefix(prefix);
        Ok(())
    });
    done.unwrap();
}

fn may_fill(index: &mut Index, key: &str, ticket: u64) -> bool {
    let done = index.step(sleep, |cache| {
        let answer = cache.reserve(key, ByteRange::Full, 1, ticket, 1)?;
        if let Reserve::Granted(id) = answer {
            let victims = cache.abort(id)?;
            let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
            cache.deletes_done(&cells, &[])?;
        }
        Ok(answer)
    });
    let answer = done.unwrap();
    assert!(matches!(
        answer,
        Reserve::Granted(_) | Reserve::Rejected(RejectReason::Invalidated)
    ));
    matches!(answer, Reserve::Granted(_))
}

#[test]
fn own_change_of_a_key_is_none_of_one_that_has_its_slot() {
    let dir = Dir::new("own-slot");
    let (mut one, mut other) = (dir.open(), dir.open());
    let neighbour = with_the_slot_of(&mut one, "a/c/0");
    for round in 0..2 {
        // A fill under way, and a write.
        let ticket = join(&mut one, "a/c/0");
        begin_write(&mut one, &neighbour);
        assert!(may_fill(&mut one, "a/c/0", ticket), "while it is written");
        end_write(&mut one, &neighbour).unwrap();
        assert!(may_fill(&mut one, "a/c/0", ticket));
        begin_write(&mut one, "a/c/0");
        begin_write(&mut one, &neighbour);
        end_write(&mut one, &neighbour).unwrap();
        let ticket = end_write(&mut one, "a/c/0").expect("a write that none has overlapped");
        assert!(may_fill(&mut one, "a/c/0", ticket));
        // Which key another one has changed, it cannot tell.
        begin_write(&mut other, &neighbour);
        assert!(!may_fill(&mut one, "a/c/0", ticket));
        end_write(&mut other, &neighbour).unwrap();
        assert!(!may_fill(&mut one, "a/c/0", ticket));
        begin_write(&mut one, "a/c/0");
        begin_write(&mut other, &neighbour);
        end_write(&mut other, &neighbour).unwrap();
        assert_eq!(end_write(&mut one, "a/c/0"), None);
        let refusals = one.cache().stats().refusals;
        assert_eq!(refusals, 3 * (round + 1));
        // It is so in new files too, in which those of before are not counted.
        other.step(sleep, |cache| cache.retry_failed(10)).unwrap();
        dir.remove(&["head", "table", "cells", "texts", "history"]);
        if other.restart(7).unwrap() {
            other.complete().unwrap();
        }
        assert_eq!(one.restart(7), Ok(false));
    }
}

#[test]
fn own_change_of_a_key_or_above_it_is_one_of_its_fills() {
    let dir = Dir::new("own-flag");
    let (mut one, mut other) = (dir.open(), dir.open());
    let keys = ["a/c/0", "a/c/0/1", "a/c/1"];
    // What is changed, and which keys with it.
    let changes = [
        ("", [true, true, true]),
        ("a", [true, true, true]),
        ("a/c/0", [true, true, false]),
        ("a/c/0/1", [false, true, false]),
        ("a/c", [true, true, true]),
        ("b", [false, false, false]),
    ];
    for is_own in [true, false] {
        for (prefix, voids) in changes {
            let tickets = keys.map(|key| join(&mut one, key));
            let writer = if is_own { &mut one } else { &mut other };
            invalidate(writer, prefix);
            let all = keys.into_iter().zip(tickets);
            let void: Vec<bool> = all.map(|(key, t)| !may_fill(&mut one, key, t)).collect();
            assert_eq!(void, voids, "{prefix}, {is_own}");
            for (key, ticket) in keys.into_iter().zip(tickets) {
                let closed = one.step(sleep, |cache| Ok(cache.complete_flight(key, ticket)));
                assert!(closed.unwrap().is_some());
            }
        }
        // A write of a key is none of those below it.
        let below = join(&mut one, "a/c/0/1");
        let at = join(&mut one, "a/c/0");
        let writer = if is_own { &mut one } else { &mut other };
        begin_write(writer, "a/c/0");
        end_write(writer, "a/c/0");
        assert!(!may_fill(&mut one, "a/c/0", at));
        assert!(may_fill(&mut one, "a/c/0/1", below));
        for (key, ticket) in [("a/c/0", at), ("a/c/0/1", below)] {
            let closed = one.step(sleep, |cache| Ok(cache.complete_flight(key, ticket)));
            assert!(closed.unwrap().is_some());
        }
    }
}

#[test]
fn a_slot_that_is_gone_is_not_believed() {
    let dir = Dir::new("slot");
    let mut one = dir.open();
    let id = granted(&mut one, "a", 600);
    dir.remove(&["s0"]);
    let mut other = dir.open();
    assert_eq!(other.own_slot(), one.own_slot());
    is_damaged(one.step(sleep, |cache| cache.commit(id, None, 1)));
    one.restart(7).unwrap();
    one.step(sleep, |cache| Ok(cache.len())).unwrap();
    assert_ne!(other.own_slot(), one.own_slot());
    other.step(sleep, |cache| Ok(cache.len())).unwrap();
}

#[test]
fn a_dead_participant_without_a_file_is_taken_over_from() {
    let dir = Dir::new("no-slot");
    let mut one = dir.open();
    let small = Limits {
        max_size: 10,
        ..LIMITS
    };
    let (other, _) = Index::open(&dir.0, &Opening::new(small, 1)).unwrap();
    granted(&mut one, "a", 10);
    is_full(&mut one, "b", 10);
    drop(other);
    dir.remove(&["s1"]);
    one.reap().unwrap();
    granted(&mut one, "c", 900);
}

#[test]
fn a_directory_that_was_moved_is_not_believed() {
    let dir = Dir::new("moved");
    let elsewhere = Dir::new("elsewhere");
    let mut one = dir.open();
    fs::remove_dir(&elsewhere.0).unwrap();
    fs::rename(&dir.0, &elsewhere.0).unwrap();
    // Each change of the source looks; other steps do now and then.
    is_damaged(one.step(sleep, |cache| cache.begin_write("a")));
    fs::create_dir(&dir.0).unwrap();
    let mut other = dir.open();
    assert!(!one.restart(7).unwrap());
    let ticket = join(&mut other, "a");
    one.step(sleep, |cache| cache.begin_write("a")).unwrap();
    let answer = other.step(sleep, |cache| {
        cache.reserve("a", ByteRange::Full, 1, ticket, 1)
    });
    assert_eq!(
        answer.unwrap(),
        Reserve::Rejected(RejectReason::Invalidated)
    );
}

#[test]
fn a_directory_that_was_moved_goes_on_in_its_new_place() {
    let dir = Dir::new("left");
    let elsewhere = Dir::new("goes-on");
    let mut one = dir.open();
    granted(&mut one, "a", 10);
    fs::remove_dir(&elsewhere.0).unwrap();
    fs::rename(&dir.0, &elsewhere.0).unwrap();
    let mut other = elsewhere.open();
    let ticket = join(&mut other, "b");
    // It finds that out in the middle of a step.
    is_damaged(one.step(sleep, |cache| cache.begin_write("a")));
    drop(one);
    let answer = other.step(sleep, |cache| {
        cache.reserve("b", ByteRange::Full, 1, ticket, 1)
    });
    assert!(matches!(answer.unwrap(), Reserve::Granted(_)));
}

#[test]
fn who_has_no_index_ends_the_fills_of_others() {
    let dir = Dir::new("mark");
    let mut one = dir.open();
    let ticket = join(&mut one, "a");
    let lock = File::options()
        .write(true)
        .open(dir.0.join("lock"))
        .unwrap();
    lock.set_modified(std::time::UNIX_EPOCH).unwrap();
    let answer = one.step(sleep, |cache| {
        cache.reserve("a", ByteRange::Full, 1, ticket, 1)
    });
    assert_eq!(
        answer.unwrap(),
        Reserve::Rejected(RejectReason::Invalidated)
    );
    // The files are young again, and that is no mark.
    let ticket = join(&mut one, "b");
    one.reap().unwrap();
    assert!(
        fs::metadata(path(&dir, "lock"))
            .unwrap()
            .modified()
            .unwrap()
            > std::time::UNIX_EPOCH
    );
    let answer = one.step(sleep, |cache| {
        cache.reserve("b", ByteRange::Full, 1, ticket, 1)
    });
    assert!(matches!(answer.unwrap(), Reserve::Granted(_)));
}

fn path(dir: &Dir, name: &str) -> PathBuf {
    Path::new(&dir.0).join(name)
}

#[test]
fn who_comes_back_has_nothing_in_hand() {
    let dir = Dir::new("back");
    let (mut one, mut other) = (dir.open(), dir.open());
    one.step(sleep, |cache| cache.begin_write("a")).unwrap();
    let id = granted(&mut one, "b", 300);
    let ticket = join(&mut other, "c");
    let (fresh, flights) = one.rejoin(7);
    let fresh = fresh.unwrap();
    assert!(!fresh);
    drop(flights);
    // What was read before that may be older than what it has written meanwhile.
    let answer = other.step(sleep, |cache| {
        cache.reserve("c", ByteRange::Full, 1, ticket, 1)
    });
    assert_eq!(
        answer.unwrap(),
        Reserve::Rejected(RejectReason::Invalidated)
    );
    // No write of its own is in the way any more.
    granted(&mut other, "a", 1);
    // Its fill has not ended.
    let small = join(&mut other, "d");
    let answer = other.step(sleep, |cache| {
        cache.reserve("d", ByteRange::Full, 900, small, 1)
    });
    assert!(!matches!(answer.unwrap(), Reserve::Granted(_)));
    one.step(sleep, |cache| cache.abort(id)).unwrap();
    // The end of a write that began with another index takes nothing away.
    other.step(sleep, |cache| cache.begin_write("e")).unwrap();
    one.step(sleep, |cache| cache.end_write("e", true, None))
        .unwrap();
    let ticket = join(&mut one, "e");
    let answer = one.step(sleep, |cache| {
        cache.reserve("e", ByteRange::Full, 1, ticket, 1)
    });
    assert_eq!(
        answer.unwrap(),
        Reserve::Rejected(RejectReason::Invalidated)
    );
}

#[test]
fn what_was_granted_counts_once_its_participant_has_come_back() {
    let dir = Dir::new("back-granted");
    let (mut one, mut other) = (dir.open(), dir.open());
    let id = granted(&mut one, "a", 600);
    assert_eq!(one.rejoin(7).0, Ok(false));
    let victims = other.step(sleep, |cache| cache.retry_failed(10)).unwrap();
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    assert_eq!(cells.len(), 1);
    other
        .step(sleep, |cache| cache.deletes_done(&cells, &[]))
        .unwrap();
    // Others have deleted what there was of it, and it may be writing its bytes still.
    is_full(&mut other, "b", 500);
    one.step(sleep, |cache| cache.abort(id)).unwrap();
    granted(&mut other, "c", 500);
}

#[test]
fn bound_of_who_has_come_back_is_in_force_again() {
    let dir = Dir::new("back-bound");
    let mut one = dir.open();
    let wider = Limits {
        max_size: 5000,
        ..LIMITS
    };
    let (mut other, _) = Index::open(&dir.0, &Opening::new(wider, 1)).unwrap();
    assert_eq!(one.rejoin(7).0, Ok(false));
    assert_eq!(other.step(sleep, |cache| Ok(cache.bound())), Ok(1000));
    drop(one);
    other.reap().unwrap();
    assert_eq!(other.step(sleep, |cache| Ok(cache.bound())), Ok(5000));
}

#[test]
fn who_finds_new_files_goes_by_their_policy() {
    let dir = Dir::new("policy");
    let mut one = dir.open();
    fs::remove_dir_all(&dir.0).unwrap();
    fs::create_dir_all(&dir.0).unwrap();
    let policy = (PolicyKind::None, Minimise::Requests);
    let opening = Opening {
        policy,
        uses_policy: true,
        ..Opening::new(LIMITS, 1)
    };
    let (mut other, fresh) = Index::open(&dir.0, &opening).unwrap();
    assert!(fresh);
    other.complete().unwrap();
    assert_ne!(one.cache().policy(), policy);
    assert!(!one.restart(7).unwrap());
    assert_eq!(one.cache().policy(), policy);
}

#[test]
fn rebuild_of_who_has_died_is_taken_over() {
    let dir = Dir::new("left");
    let (one, fresh) = Index::open(&dir.0, &Opening::new(LIMITS, 1)).unwrap();
    assert!(fresh);
    let (mut other, fresh) = Index::open(&dir.0, &Opening::new(LIMITS, 1)).unwrap();
    assert!(!fresh);
    assert!(!other.restart(7).unwrap(), "it is being rebuilt");
    drop(one);
    let (_, is_abandoned) = other.reap().unwrap();
    assert!(is_abandoned);
    assert!(other.restart(7).unwrap());
    other.complete().unwrap();
}

#[test]
fn look_for_the_dead_finds_that_files_are_gone() {
    for name in ["lock", "s0"] {
        let dir = Dir::new(&format!("look-{name}"));
        let mut one = dir.open();
        dir.remove(&[name]);
        is_damaged(one.reap());
    }
}

/// Keeps a value of so many bytes.
fn fill(index: &mut Index, key: &str, size: u64) {
    let id = granted(index, key, size);
    let done = index.step(sleep, |cache| cache.commit(id, None, 1));
    assert!(done.unwrap().unwrap().victims.is_empty());
}

fn size_of(index: &mut Index, key: &str) -> Option<u64> {
    let found = index.step(sleep, |cache| cache.lookup(key, ByteRange::Full, 1));
    found.unwrap().map(|found| found.size)
}

#[test]
fn a_directory_that_another_has_freed_is_not_remembered() {
    let dir = Dir::new("freed");
    let (mut one, mut other) = (dir.open(), dir.open());
    fill(&mut one, "a/b/zarr.json", 1);
    assert_eq!(size_of(&mut one, "a/b/zarr.json"), Some(1));
    // The cells of these directories are taken for others.
    let drained = other.step(sleep, |cache| cache.drain_prefix("a", START));
    let (victims, _) = drained.unwrap();
    let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
    other
        .step(sleep, |cache| cache.deletes_done(&cells, &[]))
        .unwrap();
    for name in ["c/d", "d/c", "e/f"] {
        fill(&mut other, &format!("{name}/zarr.json"), 2);
    }
    assert_eq!(size_of(&mut one, "a/b/zarr.json"), None);
    fill(&mut one, "a/b/zarr.json", 3);
    for index in [&mut one, &mut other] {
        assert_eq!(size_of(index, "a/b/zarr.json"), Some(3));
        for name in ["c/d", "d/c", "e/f"] {
            assert_eq!(size_of(index, &format!("{name}/zarr.json")), Some(2));
        }
        index.step(sleep, |cache| cache.validate()).unwrap();
    }
}

#[test]
fn a_directory_of_files_that_were_put_back_since_is_not_remembered() {
    let (dir, copy) = (Dir::new("put-back"), Dir::new("copy"));
    let mut one = dir.open();
    fill(&mut one, "a/b/0", 1);
    let copy_all = |from: &Dir, to: &Dir| {
        for entry in fs::read_dir(&from.0).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), to.0.join(entry.file_name())).unwrap();
        }
    };
    copy_all(&dir, &copy);
    // Found in a cell that is another directory's in the files from before.
    fill(&mut one, "c/d/0", 2);
    assert_eq!(size_of(&mut one, "c/d/0"), Some(2));
    fs::remove_dir_all(&dir.0).unwrap();
    fs::create_dir(&dir.0).unwrap();
    copy_all(&copy, &dir);
    let (mut other, fresh) = Index::open(&dir.0, &Opening::new(LIMITS, 7)).unwrap();
    assert!(!fresh, "the files are sound");
    fill(&mut other, "e/f/0", 3);
    is_damaged(one.step(sleep, |cache| Ok(cache.len())));
    assert!(!one.restart(8).unwrap());
    fill(&mut one, "c/d/1", 4);
    for index in [&mut one, &mut other] {
        assert_eq!(size_of(index, "c/d/1"), Some(4));
        assert_eq!(size_of(index, "e/f/0"), Some(3));
        assert_eq!(size_of(index, "e/f/1"), None);
        index.step(sleep, |cache| cache.validate()).unwrap();
    }
}

#[test]
fn a_file_that_is_truncated_in_a_step_ends_the_step_alone() {
    for name in ["head", "table", "cells", "texts"] {
        let dir = Dir::new(&format!("truncated-{name}"));
        let (mut one, mut other) = (dir.open(), dir.open());
        let long = "k".repeat(100);
        let id = granted(&mut one, &long, 600);
        one.step(sleep, |cache| cache.commit(id, None, 1)).unwrap();
        let file = File::options().write(true).open(path(&dir, name)).unwrap();
        let answer = one.step(sleep, |cache| {
            file.set_len(0).unwrap();
            let _ = cache.entries();
            let _ = cache.validate();
            cache.drain_prefix("", START)
        });
        is_damaged(answer);
        is_damaged(one.step(sleep, |cache| Ok(cache.len())));
        assert!(one.restart(7).unwrap());
        one.complete().unwrap();
        for index in [&mut one, &mut other] {
            let id = granted(index, &long, 600);
            let gone = index.step(sleep, |cache| {
                let cells: Vec<u32> = cache.abort(id)?.iter().map(|victim| victim.cell).collect();
                cache.deletes_done(&cells, &[])
            });
            gone.unwrap();
        }
    }
}

#[test]
fn folders_removed_before_a_rebuild_counted_are_not_taken_from_its_sum() {
    let dir = Dir::new("folder-sum");
    let opening = Opening {
        unit: 4096,
        ..Opening::new(LIMITS, 1)
    };
    let (mut index, fresh) = Index::open(&dir.0, &opening).unwrap();
    assert!(fresh);
    let sum = |index: &mut Index| index.step(sleep, |cache| Ok(cache.folder_sum())).unwrap();
    let count = |index: &mut Index, sum: Option<u64>, bytes: i64| {
        let step = index.step(sleep, |cache| {
            cache.count_folders_since(sum, bytes);
            Ok(cache.current_size())
        });
        step.unwrap()
    };
    let while_it_walks = sum(&mut index);
    assert_eq!(count(&mut index, None, 8192), 8192);
    index.complete().unwrap();
    let of_the_rebuild = sum(&mut index);
    assert_eq!(count(&mut index, None, -4096), 8192);
    assert_eq!(count(&mut index, Some(while_it_walks), -4096), 8192);
    assert_eq!(count(&mut index, Some(of_the_rebuild), -4096), 4096);
    // What was made counts, whether or not the rebuild has found it.
    assert_eq!(count(&mut index, Some(while_it_walks), 4096), 8192);
    // After the next one as well.
    dir.die_in_a_step();
    let mut index = dir.open();
    assert_ne!(sum(&mut index), of_the_rebuild);
}
