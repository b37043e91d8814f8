//! Whole fills of a directory: what is written, what is told the index, and what is left behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use zcache::arena::Heap;
use zcache::arena::State;
use zcache::cache::{Cache, Freshness, Joined, Limits, Peers};
use zcache::disk::CacheDir;
use zcache::disk::fill::{Ending, Fill, Report};
use zcache::disk::ownership::SIGNATURE;
use zcache::disk::queue::Fills;
use zcache::key::ByteRange;
use zcache::shared::{HeldLock, Locked, Opening, SharedIndex, StepError};

const LIMITS: Limits = Limits {
    flat_namespace: false,
    ..Limits::bounded(1000)
};
/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);
/// Milliseconds on the clock of the index.
const NOW: u64 = 1_700_000_000_123;

/// The bytes of a value, and what happens when they are written.
struct Data(Vec<u8>, Option<Box<dyn Fn() + Send + Sync>>, AtomicU32);

/// Looks at the bytes for their number, before the one to write them.
const WRITTEN: u32 = 4;

impl AsRef<[u8]> for Data {
    fn as_ref(&self) -> &[u8] {
        if self.2.fetch_add(1, Ordering::Relaxed) == WRITTEN
            && let Some(then) = &self.1
        {
            then();
        }
        &self.0
    }
}

fn data(size: usize) -> Data {
    Data(vec![7; size], None, AtomicU32::new(u32::MAX / 2))
}

fn data_and(size: usize, then: impl Fn() + Send + Sync + 'static) -> Data {
    Data(vec![7; size], Some(Box::new(then)), AtomicU32::new(0))
}

/// A cache directory with a queue of fills, removed at the end.
struct Dir {
    root: PathBuf,
    index: Arc<Locked<u32>>,
    fills: Fills<u32, Data>,
    calls: Arc<AtomicUsize>,
}

fn fill_of(key: &str, ticket: u64, data: Data, free: u64) -> Fill<Data> {
    Fill {
        key: key.into(),
        range: ByteRange::Full,
        data,
        ticket,
        fetched: NOW,
        now: NOW,
        since: Instant::now(),
        min_free_space: Some(free),
    }
}

fn index_of(root: &Path) -> Arc<Locked<u32>> {
    let (mut directory, fresh) =
        SharedIndex::open(&root.join(".zcache/index"), &Opening::new(LIMITS, 1)).unwrap();
    if fresh {
        directory.complete().unwrap();
    }
    Arc::new(Locked::shared(directory))
}

impl Dir {
    fn new(name: &str) -> Dir {
        let root = std::env::temp_dir().join(format!("zcache-fill-{}-{name}", std::process::id()));
        fs::create_dir_all(root.join(".zcache/index")).unwrap();
        fs::create_dir_all(root.join(".zcache/tmp")).unwrap();
        Dir::over(root.clone(), index_of(&root))
    }

    fn over(root: PathBuf, index: Arc<Locked<u32>>) -> Dir {
        let calls = Arc::new(AtomicUsize::new(0));
        let called = Arc::clone(&calls);
        let on_idle = Box::new(move |leftovers| {
            drop(leftovers);
            called.fetch_add(1, Ordering::SeqCst);
        });
        let files = CacheDir::new(root.clone(), root.join(".zcache/tmp"));
        let fills = Fills::new(Arc::clone(&index), files, 2, on_idle);
        Dir {
            root,
            index,
            fills,
            calls,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Takes a step, as long as it takes.
    fn step<R>(&self, work: impl FnMut(&mut dyn Steps) -> R) -> R {
        step(&self.index, work)
    }

    fn join(&self, key: &str) -> u64 {
        self.step(|index| index.join(key))
    }

    fn submit(&self, key: &str, ticket: u64, data: Data, free: u64) -> u64 {
        self.fills.submit(fill_of(key, ticket, data, free)).unwrap()
    }

    fn result(&self, number: u64) -> Report {
        assert!(self.fills.wait(number, LONG), "it has not ended");
        let mut results = self.fills.collect();
        assert_eq!(results.len(), 1);
        let (found, report) = results.remove(0);
        assert_eq!(found, number);
        report
    }

    fn fill_with(&self, key: &str, data: Data) -> Report {
        let ticket = self.join(key);
        self.result(self.submit(key, ticket, data, 0))
    }

    fn fill(&self, key: &str, size: usize) -> Report {
        self.fill_with(key, data(size))
    }

    /// What is there is what the index counts, and nothing is under way.
    fn check(&self) {
        self.step(|index| {
            assert_eq!(index.in_flight(), (0, 0));
            index.validate();
            for (key, size, state) in index.entries() {
                let file = fs::metadata(self.root.join(&key)).unwrap();
                assert_eq!(file.len(), size, "{key}");
                assert_eq!(state, State::Live, "{key}");
                assert_eq!(signature(&self.root.join(&key)), SIGNATURE, "{key}");
            }
        });
        let tmp = fs::read_dir(self.at(".zcache/tmp"));
        assert_eq!(tmp.map_or(0, Iterator::count), 0, "unfinished files");
    }

    fn size(&self) -> u64 {
        self.step(|index| index.entries().iter().map(|(_, size, _)| size).sum())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn signature(path: &Path) -> i64 {
    let time = fs::symlink_metadata(path).unwrap().modified().unwrap();
    let nanos = time.duration_since(UNIX_EPOCH).unwrap().as_nanos();
    i64::try_from(nanos % 1_000_000).unwrap()
}

/// What the tests ask an index, wherever it lies.
trait Steps {
    fn join(&mut self, key: &str) -> u64;
    fn join_fresh(&mut self, key: &str, fresh: Freshness) -> u64;
    fn set_max_age(&mut self, age: u64);
    fn begin_write(&mut self, key: &str);
    fn in_flight(&self) -> (usize, usize);
    fn refusals(&self) -> u64;
    fn entries(&self) -> Vec<(String, u64, State)>;
    fn validate(&self);
}

impl<S: Peers> Steps for Cache<S, u32> {
    fn join(&mut self, key: &str) -> u64 {
        self.join_fresh(key, NOW.into())
    }
    fn join_fresh(&mut self, key: &str, fresh: Freshness) -> u64 {
        match Cache::join(self, key, ByteRange::Full, 0, fresh, false).unwrap() {
            Joined::Lead(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }
    fn set_max_age(&mut self, age: u64) {
        self.set_limits(LIMITS.max_size, Some(age), LIMITS.verify);
    }
    fn begin_write(&mut self, key: &str) {
        assert!(Cache::begin_write(self, key).unwrap().is_empty());
    }
    fn in_flight(&self) -> (usize, usize) {
        Cache::in_flight(self)
    }
    fn refusals(&self) -> u64 {
        self.stats().refusals
    }
    fn entries(&self) -> Vec<(String, u64, State)> {
        let entries = Cache::entries(self).unwrap().into_iter();
        entries
            .map(|one| (one.range.cache_key(&one.key), one.size, one.state))
            .collect()
    }
    fn validate(&self) {
        Cache::validate(self).unwrap();
    }
}

fn step<R>(index: &Locked<u32>, mut work: impl FnMut(&mut dyn Steps) -> R) -> R {
    let begun = Instant::now();
    match index {
        Locked::Own(lock, _) => work(&mut *lock.lock().unwrap()),
        Locked::Shared(lock, _) => loop {
            let mut directory = lock.lock().unwrap();
            let done = directory.step(thread::sleep, |cache| Ok(work(cache)));
            if !matches!(done, Err(StepError::Busy)) || begun.elapsed() > LONG {
                return done.unwrap();
            }
        },
    }
}

#[track_caller]
fn filled(report: &Report) {
    assert!(matches!(report.ending, Ending::Filled), "{report:?}");
}

#[track_caller]
fn rejected(report: &Report, why: &str) {
    assert!(
        matches!(report.ending, Ending::Rejected(reason) if reason == why),
        "{report:?}"
    );
}

#[test]
fn fill_with_space_is_written_and_sealed() {
    let dir = Dir::new("filled");
    filled(&dir.fill("a/b/0", 100));
    assert_eq!(fs::read(dir.at("a/b/0")).unwrap(), vec![7; 100]);
    let time = fs::metadata(dir.at("a/b/0")).unwrap().modified().unwrap();
    let fetched = UNIX_EPOCH + Duration::from_millis(NOW);
    assert!(time.duration_since(fetched).unwrap() < Duration::from_millis(1));
    assert_eq!(dir.size(), 100);
    dir.check();
    rejected(&dir.fill("larger", 1001), "too large");
    dir.check();
}

#[test]
fn fill_without_space_deletes_victims_first() {
    let dir = Dir::new("evicts");
    for key in ["a", "b", "c"] {
        filled(&dir.fill(key, 300));
    }
    let root = dir.root.clone();
    filled(&dir.fill_with(
        "d",
        data_and(700, move || {
            assert!(!root.join("a").exists() && !root.join("b").exists());
        }),
    ));
    assert!(dir.at("c").exists());
    assert_eq!(dir.size(), 1000);
    dir.check();
}

#[test]
fn fill_in_place_of_a_file_that_is_gone_is_valid_itself() {
    let dir = Dir::new("replaces");
    filled(&dir.fill("a", 300));
    fs::remove_file(dir.at("a")).unwrap();
    let fetched = NOW + 100;
    let stale = Freshness {
        now: fetched,
        max_age: Some(100),
    };
    let ticket = dir.step(|index| index.join_fresh("a", stale));
    let fill = Fill {
        fetched,
        now: fetched + 1000,
        ..fill_of("a", ticket, data(200), 0)
    };
    filled(&dir.result(dir.fills.submit(fill).unwrap()));
    let marks: Vec<_> = fs::read_dir(dir.at(".zcache/missing")).unwrap().collect();
    let [Ok(mark)] = &marks[..] else {
        panic!("{marks:?}")
    };
    // A rebuild takes in no "a" that was fetched by then: what came before this one.
    let until = mark.metadata().unwrap().modified().unwrap();
    assert_eq!(until, UNIX_EPOCH + Duration::from_millis(fetched - 1));
    dir.check();
}

#[test]
fn fill_overtaken_before_it_begins_is_rejected() {
    let dir = Dir::new("void");
    let ticket = dir.join("a");
    dir.step(|index| index.begin_write("a"));
    rejected(
        &dir.result(dir.submit("a", ticket, data(10), 0)),
        "overtaken by a write",
    );
    assert!(!dir.at("a").exists());
    dir.check();
}

#[test]
fn fill_overtaken_while_it_writes_is_removed() {
    let dir = Dir::new("overtaken");
    let index = Arc::clone(&dir.index);
    let then = move || step(&index, |index| index.begin_write("a"));
    rejected(
        &dir.fill_with("a", data_and(10, then)),
        "overtaken by a write",
    );
    assert!(!dir.at("a").exists());
    assert_eq!(dir.size(), 0);
    dir.check();
}

#[test]
fn fill_with_file_in_the_way_fails_and_leaves_it() {
    let dir = Dir::new("in-the-way");
    fs::write(dir.at("theirs"), "theirs").unwrap();
    for key in ["theirs", "theirs/below"] {
        let report = dir.fill(key, 10);
        assert!(matches!(report.ending, Ending::Failed(_)), "{report:?}");
        assert_eq!(fs::read(dir.at("theirs")).unwrap(), b"theirs");
        assert_eq!(dir.size(), 0);
        dir.check();
    }
}

#[test]
fn fill_with_values_in_the_way_replaces_them_once_they_are_outdated() {
    for (n, (old, new)) in [
        // Chunks of an array that has another number of dimensions now, and an array in place of a group.
        (vec!["a/c/0/0", "a/c/0/1"], "a/c/0"),
        (vec!["a/c/0"], "a/c/0/0/0"),
        (vec!["a/b/zarr.json", "a/b/c/0"], "a"),
        (vec!["a"], "a/b/zarr.json"),
    ]
    .into_iter()
    .enumerate()
    {
        let dir = Dir::new(&format!("outdated-{n}"));
        for key in &old {
            filled(&dir.fill(key, 10));
        }
        rejected(&dir.fill(new, 10), "path conflict");
        assert_eq!(dir.size(), 10 * old.len() as u64, "what is fresh stays");
        // It is not the age of the new key that counts.
        let fresh = Freshness {
            now: NOW,
            max_age: Some(0),
        };
        let ticket = dir.step(|index| index.join_fresh(new, fresh));
        rejected(
            &dir.result(dir.submit(new, ticket, data(20), 0)),
            "path conflict",
        );
        dir.step(|index| index.set_max_age(0));
        filled(&dir.fill_with(new, data(20)));
        assert_eq!(
            dir.step(|index| index.entries()),
            [(new.to_owned(), 20, State::Live)]
        );
        dir.check();
    }
}

#[test]
fn fill_with_values_of_others_in_the_way_removes_its_own_and_no_others() {
    let dir = Dir::new("mixed");
    filled(&dir.fill("a/c/0/0", 10));
    fs::write(dir.at("a/c/0/theirs"), "theirs").unwrap();
    dir.step(|index| index.set_max_age(0));
    let report = dir.fill("a/c/0", 10);
    assert!(matches!(report.ending, Ending::Failed(_)), "{report:?}");
    assert_eq!(fs::read(dir.at("a/c/0/theirs")).unwrap(), b"theirs");
    assert_eq!(dir.size(), 0);
    dir.check();
}

#[test]
fn fill_over_a_folder_with_a_value_that_is_not_listed_reports_it() {
    let dir = Dir::new("unlisted-below");
    filled(&dir.fill("a", 10));
    let time = fs::metadata(dir.at("a")).unwrap().modified().unwrap();
    fs::create_dir_all(dir.at("b/c/0")).unwrap();
    fs::copy(dir.at("a"), dir.at("b/c/0/0")).unwrap();
    let copy = File::options().write(true).open(dir.at("b/c/0/0")).unwrap();
    copy.set_modified(time).unwrap();
    let report = dir.fill("b/c/0", 10);
    assert!(matches!(report.ending, Ending::Unlisted), "{report:?}");
    dir.check();
}

#[test]
fn fill_over_a_valid_value_of_ours_reports_that_it_was_unlisted() {
    let dir = Dir::new("unknown");
    filled(&dir.fill("a", 10));
    fs::copy(dir.at("a"), dir.at("b")).unwrap();
    let time = fs::metadata(dir.at("a")).unwrap().modified().unwrap();
    File::options()
        .write(true)
        .open(dir.at("b"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    let report = dir.fill("b", 10);
    assert!(matches!(report.ending, Ending::Unlisted), "{report:?}");
    assert!(!dir.at("b").exists(), "it is not counted");
    dir.check();
}

#[test]
fn fill_after_tmp_was_removed_makes_it() {
    let dir = Dir::new("tmp");
    fs::remove_dir(dir.at(".zcache/tmp")).unwrap();
    filled(&dir.fill("a", 10));
    dir.check();
}

#[test]
fn fill_with_unfinished_bytes_that_stay_keeps_their_room_until_they_go() {
    let mut dir = Dir::new("left");
    let tmp = dir.at(".zcache/tmp");
    let files = CacheDir::new(dir.root.clone(), tmp.clone());
    // Whatever its unfinished name is, a folder has it: that is neither made nor unlinked.
    for slot in 0..2 {
        let name = files.unfinished(Some(slot));
        let (stem, number) = name.to_str().unwrap().rsplit_once('-').unwrap();
        let first: u64 = number.parse().unwrap();
        for number in first..first + 100 {
            fs::create_dir(format!("{stem}-{number}")).unwrap();
        }
    }
    dir.fills = Fills::new(Arc::clone(&dir.index), files, 2, Box::new(drop));
    let report = dir.fill("a", 600);
    assert!(matches!(report.ending, Ending::Failed(_)), "{report:?}");
    assert_eq!(report.delete_errors.len(), 1, "{report:?}");
    dir.step(|index| index.validate());
    rejected(&dir.fill("b", 500), "no space");
    fs::remove_dir_all(&tmp).unwrap();
    filled(&dir.fill("b", 500));
    filled(&dir.fill("a", 500));
    dir.check();
}

#[test]
fn fill_on_a_full_volume_evicts_nothing_where_that_does_not_help() {
    let before = Dir::new("volume");
    filled(&before.fill("a", 10));
    // The volume was found to have ample space, for as long as nothing can fill it; another filler has not looked yet.
    let dir = Dir::over(before.root.clone(), Arc::clone(&before.index));
    let ticket = dir.join("b");
    rejected(
        &dir.result(dir.submit("b", ticket, data(10), u64::MAX)),
        "no space on the volume",
    );
    dir.step(|index| assert_eq!(index.refusals(), 1));
    assert!(dir.at("a").exists() && !dir.at("b").exists());
    assert_eq!(dir.size(), 10);
    dir.check();
}

#[test]
fn fill_with_an_index_of_its_own_needs_no_other() {
    let mut dir = Dir::new("own");
    let cache = Cache::new(Heap::default(), LIMITS, 1).unwrap();
    dir = Dir::over(dir.root.clone(), Arc::new(Locked::own(cache)));
    fs::create_dir_all(dir.at(".zcache/tmp")).unwrap();
    filled(&dir.fill("a", 600));
    filled(&dir.fill("b", 600));
    assert!(!dir.at("a").exists());
    dir.check();
}

/// Files of this thread, and of those that it starts, are an ordinary user's: the superuser may delete all.
#[cfg(target_os = "linux")]
fn become_ordinary() {
    if rustix::process::geteuid().is_root() {
        let other_user = rustix::thread::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(other_user, other_user, other_user).unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn fill_whose_victim_stays_counts_it_until_it_goes() {
    // In a thread of its own, which ends with what it has become.
    thread::spawn(victim_that_stays).join().unwrap();
}

#[cfg(target_os = "linux")]
fn victim_that_stays() {
    use std::os::unix::fs::PermissionsExt;

    become_ordinary();
    let dir = Dir::new("stays");
    let mode = |mode| fs::set_permissions(dir.at("a"), fs::Permissions::from_mode(mode)).unwrap();
    filled(&dir.fill("a/0", 600));
    mode(0o555);
    let report = dir.fill("b", 600);
    rejected(&report, "no space");
    assert_eq!(report.delete_errors.len(), 2, "once more at the end");
    assert_eq!(dir.size(), 600);
    assert!(dir.at("a/0").exists() && !dir.at("b").exists());
    let marks = fs::read_dir(dir.at(".zcache/dropped")).unwrap();
    assert_eq!(marks.count(), 1);
    dir.step(|index| assert_eq!(index.in_flight(), (0, 0)));
    // A value that cannot be written leaves nothing behind either.
    let report = dir.fill("a/1", 10);
    assert!(matches!(report.ending, Ending::Failed(_)), "{report:?}");
    assert_eq!(dir.size(), 600);
    mode(0o755);
    filled(&dir.fill("b", 600));
    assert!(!dir.at("a/0").exists());
    assert_eq!(dir.size(), 600);
    dir.check();
}

#[test]
fn fills_of_two_participants_keep_one_bound() {
    let one = Dir::new("two");
    let other = Dir::over(one.root.clone(), index_of(&one.root));
    thread::scope(|scope| {
        for (name, dir) in [("one", &one), ("other", &other)] {
            scope.spawn(move || {
                for n in 0..200 {
                    let key = format!("{name}/{n}");
                    dir.submit(&key, dir.join(&key), data(50), 0);
                }
                assert!(dir.fills.wait(199, LONG));
                for (_, report) in dir.fills.collect() {
                    let kept = matches!(report.ending, Ending::Filled);
                    // While others are deleting, there may be no space for a moment.
                    let no_room = matches!(report.ending, Ending::Rejected(_));
                    assert!(kept || no_room, "{report:?}");
                    assert!(report.delete_errors.is_empty());
                }
            });
        }
    });
    assert!(one.size() <= LIMITS.max_size);
    assert!(one.size() >= LIMITS.max_size / 2);
    one.check();
    other.check();
}

#[test]
fn fill_under_a_foreign_lock_is_busy_and_ends_later() {
    let dir = Dir::new("busy");
    let ticket = dir.join("a");
    let lock = HeldLock::take(&dir.at(".zcache/index"), LONG).unwrap();
    let report = dir.result(dir.submit("a", ticket, data(10), 0));
    assert!(matches!(report.ending, Ending::Busy), "{report:?}");
    assert!(dir.fills.has_deferred());
    dir.fills.apply_deferred();
    assert!(dir.fills.has_deferred(), "the lock is still taken");
    assert!(lock.release());
    dir.fills.apply_deferred();
    assert!(!dir.fills.has_deferred());
    dir.check();
    filled(&dir.fill("a", 10));
}

#[test]
fn fill_whose_commit_finds_a_foreign_lock_leaves_nothing() {
    let dir = Dir::new("busy-late");
    let (held, root) = (Arc::new(OnceLock::new()), dir.at(".zcache/index"));
    let holder = Arc::clone(&held);
    let take = move || {
        let lock = HeldLock::take(&root, LONG).unwrap();
        assert!(holder.set(lock).is_ok());
    };
    let report = dir.fill_with("a", data_and(10, take));
    assert!(matches!(report.ending, Ending::Busy), "{report:?}");
    assert!(!dir.at("a").exists());
    assert!(held.get().unwrap().release());
    dir.fills.apply_deferred();
    assert_eq!(dir.size(), 0);
    dir.check();
}

#[test]
fn fill_whose_index_is_damaged_leaves_nothing() {
    let dir = Dir::new("corrupt");
    let head = dir.at(".zcache/index/head");
    let damage = move || {
        use std::os::unix::fs::FileExt;
        let file = File::options().write(true).open(&head).unwrap();
        file.write_all_at(&[255; 64], 0).unwrap();
    };
    let report = dir.fill_with("a", data_and(10, damage));
    assert!(matches!(report.ending, Ending::Corrupt(_)), "{report:?}");
    assert!(!dir.at("a").exists());
    assert!(dir.fills.has_deferred());
    let Locked::Shared(lock, _) = &*dir.index else {
        panic!("it lies in a directory");
    };
    assert!(lock.lock().unwrap().restart(2).unwrap());
    lock.lock().unwrap().complete().unwrap();
    dir.fills.apply_deferred();
    assert!(!dir.fills.has_deferred());
    dir.check();
    filled(&dir.fill("a", 10));
}

#[test]
fn fill_whose_index_was_emptied_meanwhile_is_removed() {
    let dir = Dir::new("emptied");
    let index = Arc::clone(&dir.index);
    let head = dir.at(".zcache/index/head");
    let empty = move || {
        use std::os::unix::fs::FileExt;
        let file = File::options().write(true).open(&head).unwrap();
        file.write_all_at(&[255; 64], 0).unwrap();
        let Locked::Shared(lock, _) = &*index else {
            panic!("it lies in a directory");
        };
        assert!(lock.lock().unwrap().restart(2).unwrap());
        lock.lock().unwrap().complete().unwrap();
    };
    let report = dir.fill_with("a", data_and(10, empty));
    rejected(&report, "the index was emptied meanwhile");
    assert!(!dir.at("a").exists());
    dir.check();
}

#[test]
fn fill_that_panics_closes_its_flight() {
    let dir = Dir::new("panics");
    let report = dir.fill_with("a", data_and(10, || panic!("a test says so")));
    assert!(matches!(report.ending, Ending::Failed(_)), "{report:?}");
    dir.check();
    filled(&dir.fill("a", 10));
}

fn until(what: impl Fn() -> bool) {
    let begun = SystemTime::now();
    while !what() {
        assert!(begun.elapsed().unwrap() < LONG, "it never comes");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn on_idle_after_work_is_called_once() {
    let dir = Dir::new("idle");
    for key in ["a", "b", "c"] {
        let ticket = dir.join(key);
        dir.submit(key, ticket, data(10), 0);
    }
    until(|| dir.calls.load(Ordering::SeqCst) > 0);
    assert_eq!(dir.fills.pending(), 0, "it is called when nothing is left");
    assert_eq!(dir.fills.pending_size(), 0);
    assert_eq!(dir.fills.completed(), 3);
    // The next call is for more work.
    let ticket = dir.join("d");
    dir.submit("d", ticket, data(10), 0);
    until(|| dir.calls.load(Ordering::SeqCst) > 1);
    assert_eq!(dir.calls.load(Ordering::SeqCst), 2);
    assert_eq!(dir.fills.collect().len(), 4);
}

#[test]
fn wait_without_work_times_out() {
    let dir = Dir::new("wait");
    assert!(!dir.fills.wait(0, Duration::from_millis(1)));
    filled(&dir.fill("a", 10));
    assert!(dir.fills.wait(0, Duration::ZERO));
    assert!(!dir.fills.wait(1, Duration::ZERO));
}

#[test]
fn queue_that_is_dropped_does_what_it_has() {
    let dir = Dir::new("dropped");
    let files = CacheDir::new(dir.root.clone(), dir.at(".zcache/tmp"));
    let fills = Fills::new(Arc::clone(&dir.index), files, 1, Box::new(drop));
    for n in 0..50 {
        let key = format!("a/{n}");
        let ticket = dir.join(&key);
        fills.submit(fill_of(&key, ticket, data(10), 0)).unwrap();
    }
    drop(fills);
    until(|| dir.step(|index| index.in_flight()) == (0, 0));
    assert_eq!(dir.size(), 500);
    until(|| signature(&dir.at("a/49")) == SIGNATURE);
    dir.check();
}

#[test]
fn unfinished_file_of_a_process_with_the_same_number_is_in_no_fills_way() {
    let dir = Dir::new("same-number");
    let process = std::process::id();
    let others: Vec<PathBuf> = (0..1000)
        .map(|n| dir.at(&format!(".zcache/tmp/s0-{process}-{n}")))
        .collect();
    others
        .iter()
        .for_each(|path| fs::write(path, "theirs").unwrap());
    filled(&dir.fill("a", 10));
    for path in others {
        assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
        fs::remove_file(path).unwrap();
    }
    dir.check();
}

#[test]
fn queue_without_work_keeps_no_index_in_use() {
    let mut dir = Dir::new("let-go");
    for n in 0..200 {
        filled(&dir.fill(&format!("a/{n}"), 10));
        // Not in the time after that either in which a thread waits for more work.
        assert_eq!(Arc::strong_count(&dir.index), 2);
    }
    let files = CacheDir::new(dir.root.clone(), dir.at(".zcache/tmp"));
    dir.fills = Fills::new(Arc::clone(&dir.index), files, 2, Box::new(drop));
    assert_eq!(Arc::strong_count(&dir.index), 2);
}

#[test]
fn abandon_with_a_thread_at_work_waits_for_nothing() {
    let dir = Dir::new("abandon");
    let held = Arc::new(Mutex::new(()));
    let guard = held.lock().unwrap();
    let gate = Arc::clone(&held);
    let ticket = dir.join("a");
    dir.submit(
        "a",
        ticket,
        data_and(10, move || drop(gate.lock().unwrap())),
        0,
    );
    dir.fills.abandon();
    assert!(dir.fills.is_abandoned());
    assert_eq!((dir.fills.pending(), dir.fills.pending_size()), (0, 0));
    assert!(dir.fills.collect().is_empty());
    assert!(!dir.fills.wait(0, LONG));
    let again = fill_of("b", ticket, data(1), 0);
    assert!(dir.fills.submit(again).is_err());
    drop(guard);
    until(|| dir.step(|index| index.in_flight()) == (0, 0));
}

#[test]
fn index_that_was_left_takes_no_step() {
    let dir = Dir::new("left");
    let ticket = dir.join("a");
    dir.index.disown();
    assert!(dir.index.is_disowned());
    let report = dir.result(dir.submit("a", ticket, data(10), 0));
    assert!(matches!(report.ending, Ending::Busy), "{report:?}");
    assert!(!dir.at("a").exists());
}
