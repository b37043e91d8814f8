//! The lock around the steps of a shared index: free, held, left by the dead, damaged, and removed.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, sleep};
use std::time::Duration;

use zcache::cache::{Joined, Limits, Reserve};
use zcache::error::Error;
use zcache::key::ByteRange;
use zcache::shared::{HeldLock, OpenError, Opening, SharedIndex, StepError};

use crate::place::is_damaged;

const LIMITS: Limits = Limits {
    flat_namespace: false,
    ..Limits::bounded(1 << 20)
};
/// Where the file `owner` names the participant that is in a step.
const OWNER: u64 = 8;
const PATIENCE: Duration = Duration::from_secs(10);

type Index = SharedIndex<u32>;

/// One that does not wait for the lock.
fn impatient() -> Opening {
    Opening {
        patience: Duration::ZERO,
        ..Opening::new(LIMITS, 1)
    }
}

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let root = std::env::temp_dir().join(format!("zcache-lock-{}-{name}", std::process::id()));
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

    fn hold(&self) -> HeldLock {
        HeldLock::take(&self.0, PATIENCE).unwrap()
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(self.0.join("owner"));
        file.unwrap().write_all_at(bytes, at).unwrap();
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn step(index: &mut Index) -> Result<u64, StepError> {
    index.step(sleep, |cache| Ok(cache.len()))
}

fn is_busy(index: &mut Index) {
    assert_eq!(step(index), Err(StepError::Busy));
}

/// Adds an entry, in as many steps as it takes.
fn fill(index: &mut Index, key: &str) {
    let joined = index.step(sleep, |cache| cache.join(key, ByteRange::Full, 0, 1, false));
    let Joined::Lead(ticket) = joined.unwrap() else {
        panic!("it is there already");
    };
    let room = index.step(sleep, |cache| {
        cache.reserve(key, ByteRange::Full, 1, ticket, 1)
    });
    let Reserve::Granted(id) = room.unwrap() else {
        panic!("there is room");
    };
    index
        .step(sleep, |cache| cache.commit(id, None, 1))
        .unwrap()
        .unwrap();
}

#[test]
fn a_lock_that_is_held_keeps_all_out_until_it_is_released() {
    let dir = Dir::new("held");
    let (mut one, mut other) = (dir.open(), dir.open());
    let held = dir.hold();
    is_busy(&mut one);
    is_busy(&mut other);
    let late = Index::open(&dir.0, &impatient());
    assert!(matches!(late, Err(OpenError::Busy)));
    let second = HeldLock::take(&dir.0, Duration::ZERO);
    assert!(matches!(second, Err(OpenError::Busy)));
    assert!(held.release());
    assert!(!held.release(), "it is not held any more");
    step(&mut one).unwrap();
    step(&mut other).unwrap();
}

#[test]
fn a_lock_on_the_file_that_tells_of_changes_stops_no_step() {
    let dir = Dir::new("flock");
    let mut index = dir.open();
    let file = fs::File::open(dir.0.join("lock")).unwrap();
    file.try_lock().unwrap();
    step(&mut index).unwrap();
    // It is one opening at a time.
    let late = Index::open(&dir.0, &impatient());
    assert!(matches!(late, Err(OpenError::Busy)));
    file.unlock().unwrap();
    step(&mut dir.open()).unwrap();
}

#[test]
fn an_index_that_one_of_the_former_format_uses_is_left_to_it() {
    let dir = Dir::new("former");
    let slot = fs::File::create(dir.0.join("p3")).unwrap();
    slot.try_lock().unwrap();
    let late = Index::open(&dir.0, &impatient());
    assert!(matches!(late, Err(OpenError::Busy)));
    slot.unlock().unwrap();
    let mut index = dir.open();
    // One that comes later makes the files anew.
    slot.try_lock().unwrap();
    fs::remove_file(dir.0.join("head")).unwrap();
    fs::write(dir.0.join("head"), "of the former format").unwrap();
    sleep(Duration::from_millis(30));
    is_damaged(step(&mut index));
    assert!(matches!(index.restart(1), Err(StepError::Busy)));
    assert_eq!(
        fs::read(dir.0.join("head")).unwrap(),
        b"of the former format"
    );
    slot.unlock().unwrap();
    assert!(index.restart(1).unwrap());
    step(&mut index).unwrap();
}

#[test]
fn who_waits_goes_on_when_the_lock_is_released_or_its_owner_dies() {
    for dies in [false, true] {
        let dir = Dir::new("waiter");
        let mut index = dir.open();
        let held = dir.hold();
        is_busy(&mut index);
        let wait = index.waiter();
        let waits = thread::spawn(wait);
        if dies {
            drop(held);
        } else {
            assert!(held.release());
        }
        waits.join().unwrap();
        if dies {
            is_damaged(step(&mut index));
        } else {
            step(&mut index).unwrap();
        }
    }
}

#[test]
fn what_a_dead_owner_has_left_is_made_anew_once() {
    let dir = Dir::new("dead");
    let (mut one, mut other) = (dir.open(), dir.open());
    fill(&mut one, "a");
    drop(dir.hold());
    is_damaged(step(&mut one));
    // The next one finds it as well, until it is made anew.
    is_damaged(step(&mut other));
    assert!(one.restart(7).unwrap());
    one.complete().unwrap();
    assert_eq!(step(&mut other), Ok(0));
    assert!(!other.restart(7).unwrap());
    fill(&mut other, "a");
    assert_eq!(step(&mut one), Ok(1));
}

#[test]
fn an_index_whose_last_user_died_in_a_step_is_new_when_it_is_opened() {
    let dir = Dir::new("last");
    fill(&mut dir.open(), "a");
    drop(dir.hold());
    let (mut index, fresh) = Index::open(&dir.0, &Opening::new(LIMITS, 1)).unwrap();
    assert!(fresh);
    index.complete().unwrap();
    assert_eq!(step(&mut index), Ok(0));
}

#[test]
fn any_word_that_no_participant_has_left_is_taken_over() {
    let dir = Dir::new("garbage");
    let (mut one, mut other) = (dir.open(), dir.open());
    let flips = (0..64).map(|bit| 1u64 << bit);
    let words = flips.chain([u64::MAX, 0x0123_4567_89ab_cdef, 1 << 16 | 1, 2 << 16 | 256]);
    for word in words {
        dir.write(OWNER, &word.to_ne_bytes());
        is_damaged(step(&mut one));
        assert!(one.restart(7).unwrap(), "{word:x}");
        one.complete().unwrap();
        step(&mut other).unwrap();
    }
}

#[test]
fn a_word_of_its_own_that_was_put_back_keeps_no_participant_out() {
    let dir = Dir::new("put-back");
    let (mut one, mut other) = (dir.open(), dir.open());
    let mut word = [0; 8];
    let file = fs::File::open(dir.0.join("owner")).unwrap();
    one.step(sleep, |_| {
        file.read_exact_at(&mut word, OWNER).unwrap();
        Ok(())
    })
    .unwrap();
    assert_ne!(word, [0; 8]);
    dir.write(OWNER, &word);
    // It is that of one who lives, so the others leave it alone.
    is_busy(&mut other);
    is_damaged(step(&mut one));
    assert!(one.restart(7).unwrap());
    one.complete().unwrap();
    step(&mut other).unwrap();
}

#[test]
fn a_file_that_is_too_long_is_cut_off() {
    let dir = Dir::new("too-long");
    step(&mut dir.open()).unwrap();
    let file = OpenOptions::new().write(true).open(dir.0.join("owner"));
    file.unwrap().set_len(1 << 40).unwrap();
    step(&mut dir.open()).unwrap();
    assert_eq!(fs::metadata(dir.0.join("owner")).unwrap().len(), 4096);
}

#[test]
fn a_step_that_panics_keeps_no_other_out() {
    let dir = Dir::new("panics");
    let (mut one, mut other) = (dir.open(), dir.open());
    fill(&mut one, "a");
    let panics =
        AssertUnwindSafe(|| one.step(sleep, |_| -> Result<(), Error> { panic!("a fault") }));
    assert!(catch_unwind(panics).is_err());
    // What it has left is not believed.
    is_damaged(step(&mut other));
    assert!(other.restart(7).unwrap());
    other.complete().unwrap();
    assert_eq!(step(&mut one), Ok(0));
}

#[test]
fn a_word_that_is_lost_in_a_step_ends_it() {
    let dir = Dir::new("lost");
    let mut index = dir.open();
    let answer = index.step(sleep, |cache| {
        dir.write(OWNER, &[0; 8]);
        Ok(cache.len())
    });
    is_damaged(answer);
}

#[test]
fn an_owner_that_is_taken_for_dead_finds_out() {
    let dir = Dir::new("by-mistake");
    let mut index = dir.open();
    let held = dir.hold();
    is_busy(&mut index);
    // Only its file tells that it lives.
    fs::remove_file(dir.0.join("s1")).unwrap();
    is_damaged(step(&mut index));
    assert!(index.restart(7).unwrap());
    index.complete().unwrap();
    step(&mut index).unwrap();
    assert!(!held.release());
    step(&mut index).unwrap();
}

#[test]
fn a_participant_of_a_directory_that_was_moved_takes_nothing_over() {
    let (dir, elsewhere) = (Dir::new("moved"), Dir::new("elsewhere"));
    let mut one = dir.open();
    fs::remove_dir(&elsewhere.0).unwrap();
    fs::rename(&dir.0, &elsewhere.0).unwrap();
    let mut other = elsewhere.open();
    let held = elsewhere.hold();
    // It finds no file of the owner where it looks.
    is_damaged(step(&mut one));
    is_busy(&mut other);
    assert!(held.release());
    step(&mut other).unwrap();
    fs::create_dir(&dir.0).unwrap();
    assert!(one.restart(7).unwrap());
    one.complete().unwrap();
    step(&mut one).unwrap();
}

#[test]
fn a_file_that_is_removed_or_cut_off_is_made_anew_for_all() {
    for len in [None, Some(0), Some(8), Some(100)] {
        let dir = Dir::new("cut-off");
        let (mut one, mut other) = (dir.open(), dir.open());
        fill(&mut one, "a");
        match len {
            None => fs::remove_file(dir.0.join("owner")).unwrap(),
            Some(len) => {
                let file = OpenOptions::new().write(true).open(dir.0.join("owner"));
                file.unwrap().set_len(len).unwrap();
            }
        }
        // It makes a new one, and must not work on files that others use with the old one.
        let (mut third, fresh) = Index::open(&dir.0, &Opening::new(LIMITS, 1)).unwrap();
        assert!(fresh, "{len:?}");
        third.complete().unwrap();
        fill(&mut third, "b");
        for index in [&mut one, &mut other] {
            // Where the file has kept its slot, it need not come back.
            if len != Some(100) {
                is_damaged(step(index));
                assert!(!index.restart(7).unwrap());
            }
            let has_new = index.step(sleep, |cache| cache.peek("b", ByteRange::Full, 1));
            assert!(has_new.unwrap().is_some());
        }
        // All are kept out by the same lock.
        let held = dir.hold();
        for index in [&mut one, &mut other, &mut third] {
            is_busy(index);
        }
        assert!(held.release());
    }
}

#[test]
fn steps_of_many_participants_never_meet() {
    const THREADS: u32 = 4;
    const STEPS: u32 = 2000;
    let dir = Dir::new("never-meet");
    let (inside, done) = (AtomicU32::new(0), AtomicU32::new(0));
    let mut first = dir.open();
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut index = dir.open();
                for _ in 0..STEPS {
                    let taken = loop {
                        let answer = index.step(sleep, |_| {
                            let others = inside.fetch_add(1, Ordering::Relaxed);
                            done.fetch_add(1, Ordering::Relaxed);
                            thread::yield_now();
                            inside.fetch_sub(1, Ordering::Relaxed);
                            Ok(others)
                        });
                        if answer != Err(StepError::Busy) {
                            break answer;
                        }
                    };
                    assert_eq!(taken, Ok(0));
                }
            });
        }
    });
    assert_eq!(done.load(Ordering::Relaxed), THREADS * STEPS);
    first.step(sleep, |cache| cache.validate()).unwrap();
}

#[test]
fn one_who_takes_the_lock_all_the_time_starves_no_other() {
    let dir = Dir::new("greedy");
    let (mut greedy, mut modest) = (dir.open(), dir.open());
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                let _ = step(&mut greedy);
            }
        });
        // Where it hangs, it is starved.
        for _ in 0..2000 {
            while step(&mut modest) == Err(StepError::Busy) {}
        }
        ends.store(true, Ordering::Relaxed);
    });
}
