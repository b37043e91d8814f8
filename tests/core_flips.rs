//! Each bit of a small index flips while two participants have it open. Whatever it is, reads give no value
//! that is older than the last write that has returned, the bound holds, and files of others stay.
//!
//! Why that is so: a hit reads the file of its own key, of the length of its entry; a write removes the
//! files of its key by name, before and after, whatever the index says; a file says itself whether it is
//! ours and valid; and the numbers that give room have a check: the header as a whole, and each entry over
//! its size, name, kind and state.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;

use zcache::cache::{Cache, Joined, Limits, Reserve, Verify, Victim};
use zcache::checksum::crc32c;
use zcache::disk::ownership::{MILLI, PENDING, SIGNATURE};
use zcache::disk::{removal, value_file};
use zcache::key::ByteRange;
use zcache::shared::{Mapped, Opening, SharedIndex, StepError};

const BOUND: u64 = 500;
const SIZE: usize = 100;
const LIMITS: Limits = Limits {
    flat_namespace: false,
    verify: Verify::First,
    ..Limits::bounded(BOUND)
};
const FETCHED: i64 = 1_700_000_000_123 * MILLI;
/// A plain name, chunks of an array, and a name that lies in the texts.
const KEYS: [&str; 4] = [
    "a/k",
    "a/c/0",
    "a/c/1",
    "a-name-that-is-too-long-for-a-cell/zarr.json",
];
const MORE: [&str; 2] = ["b/c/0", "b/c/1"];
const RANGE: ByteRange = ByteRange::Range { start: 10, end: 20 };
/// Bytes of the header and the counters of changes.
const DIRECTORY_AT: usize = 256 * 1024 + 8;
const THEIRS: &str = "a/theirs";

struct World {
    root: PathBuf,
    /// What the source holds: the byte that a value is made of.
    source: BTreeMap<&'static str, u8>,
    next: u8,
    unfinished: u32,
    case: String,
}

type Index = SharedIndex<u32>;

impl World {
    fn index_root(&self) -> PathBuf {
        self.root.join(".zcache/index")
    }

    fn open(&mut self) -> (Index, bool) {
        let (mut index, fresh) =
            SharedIndex::open(&self.index_root(), &Opening::new(LIMITS, 1)).unwrap();
        if fresh {
            self.rebuild(&mut index);
        }
        (index, fresh)
    }

    fn files(&self) -> Vec<(String, u64, i64)> {
        let (mut found, mut todo) = (
            Vec::new(),
            vec![String::new(), ".zcache/ranges/".to_owned()],
        );
        while let Some(folder) = todo.pop() {
            let Ok(entries) = fs::read_dir(self.root.join(&folder)) else {
                continue;
            };
            for entry in entries {
                let entry = entry.unwrap();
                let name = format!("{folder}{}", entry.file_name().to_str().unwrap());
                let status = entry.metadata().unwrap();
                if name == ".zcache" {
                } else if status.is_dir() {
                    todo.push(format!("{name}/"));
                } else if name != THEIRS {
                    found.push((name, status.size(), status.mtime_nsec() % MILLI));
                }
            }
        }
        found
    }

    /// What `zcache._backends.directory.scan` does.
    fn rebuild(&mut self, index: &mut Index) {
        for (name, size, mark) in self.files() {
            if mark == PENDING {
                removal::remove_below(&self.root, Path::new(&name)).unwrap();
            } else if mark == SIGNATURE {
                let adopted = index.step(sleep, |cache| cache.adopt(&name, size, 1));
                adopted.unwrap();
            }
        }
        index.complete().unwrap();
    }

    /// What `zcache._backends.directory.scan` does where a fill meets a value that the index does not list.
    fn remove_unlisted(&mut self, index: &mut Index) {
        for (name, _, mark) in self.files() {
            let is_listed = self.step(index, |cache| {
                Ok(!cache.is_complete() || cache.is_listed(&name)?)
            });
            if mark == SIGNATURE && is_listed == Some(false) {
                removal::remove_below(&self.root, Path::new(&name)).unwrap();
            }
        }
    }

    /// Takes a step, and recovers an index that is damaged; `None` where it cannot be used.
    fn step<R>(
        &mut self,
        index: &mut Index,
        mut work: impl FnMut(&mut Cache<Mapped, u32>) -> zcache::error::Result<R>,
    ) -> Option<R> {
        for _ in 0..4 {
            match index.step(sleep, &mut work) {
                Ok(answer) => return Some(answer),
                Err(StepError::Busy) => panic!("{}: the lock is free", self.case),
                Err(StepError::Failed(error)) if !error.is_fatal() => return None,
                Err(StepError::Failed(_)) => match index.restart(7) {
                    Ok(true) => self.rebuild(index),
                    Ok(false) => {}
                    // This participant does without it for a while.
                    Err(StepError::Failed(error)) if !error.is_fatal() => return None,
                    Err(error) => panic!("{}: {error:?}", self.case),
                },
            }
        }
        panic!("{}: it is damaged again and again", self.case)
    }

    fn remove(&mut self, index: &mut Index, victims: &[Victim]) {
        if victims.is_empty() {
            return;
        }
        let (mut gone, mut failed) = (Vec::new(), Vec::new());
        for victim in victims {
            match removal::remove_known(&self.root, Path::new(&victim.cache_key), None) {
                Ok(_) => gone.push(victim.cell),
                Err(_) => failed.push(victim.cell),
            }
        }
        self.step(index, |cache| cache.deletes_done(&gone, &failed));
    }

    fn check_bound(&self) {
        let files = self.files();
        let all: u64 = files.iter().map(|(_, size, _)| size).sum();
        assert!(all <= BOUND, "{}: {all} bytes: {files:?}", self.case);
        let theirs = fs::read(self.root.join(THEIRS)).unwrap();
        assert_eq!(theirs, b"theirs", "{}", self.case);
    }

    /// A read: a hit, or else a fill from the source.
    fn read(&mut self, index: &mut Index, key: &'static str, range: ByteRange) {
        let found = self
            .step(index, |cache| cache.lookup(key, range, 1))
            .flatten();
        let value = self.source[key];
        if let Some(found) = found {
            let name = found.range.cache_key(key);
            let bytes = fs::read(self.root.join(&name)).unwrap_or_default();
            let end = found.start.saturating_add(found.length);
            let intact = bytes.len() as u64 == found.size
                && end <= found.size
                && found.checksum.is_none_or(|sum| sum == crc32c(&bytes));
            if intact {
                let served = &bytes[found.start as usize..end as usize];
                let wanted = if range == ByteRange::Full { SIZE } else { 10 };
                let right = served == vec![value; wanted];
                assert!(right, "{}: {key} {range:?}: {served:?}", self.case);
                return;
            }
            let victims = self.step(index, |cache| cache.discard(found.handle));
            self.remove(index, &victims.unwrap_or_default());
        }
        self.fill(index, key, range);
    }

    fn fill(&mut self, index: &mut Index, key: &'static str, range: ByteRange) {
        let joined = self.step(index, |cache| cache.join(key, range, 0, 1, false));
        let Some(Joined::Lead(ticket)) = joined else {
            return;
        };
        let size = if range == ByteRange::Full { SIZE } else { 10 };
        let data = vec![self.source[key]; size];
        let reserved = self.step(index, |cache| {
            cache.reserve(key, range, size as u64, ticket, 1)
        });
        let mut room = reserved;
        let id = loop {
            match room {
                Some(Reserve::Granted(id)) => break Some(id),
                Some(Reserve::NeedsEviction(id, victims)) => {
                    let (mut gone, mut failed) = (Vec::new(), Vec::new());
                    for victim in &victims {
                        let name = Path::new(&victim.cache_key);
                        match removal::remove_known(&self.root, name, None) {
                            Ok(_) => gone.push(victim.cell),
                            Err(_) => failed.push(victim.cell),
                        }
                    }
                    room = self
                        .step(index, |cache| {
                            if cache.is_reserved(id) {
                                cache.evictions_done(id, &gone, &failed, 1).map(Some)
                            } else {
                                Ok(None)
                            }
                        })
                        .flatten();
                }
                Some(Reserve::Rejected(_)) | None => break None,
            }
            self.check_bound();
        };
        if let Some(id) = id {
            self.write_file(index, key, range, id, &data);
        }
        self.step(index, |cache| Ok(cache.complete_flight(key, ticket)));
        self.check_bound();
    }

    fn write_file(&mut self, index: &mut Index, key: &str, range: ByteRange, id: u64, data: &[u8]) {
        let name = range.cache_key(key);
        let name = Path::new(&*name);
        self.unfinished += 1;
        let tmp = self.root.join(format!(".zcache/tmp/{}", self.unfinished));
        let nanos = FETCHED + PENDING;
        let root = self.root.clone();
        match value_file::write_value(&root, name, &tmp, data, nanos, [0; 8]) {
            Ok(made) => {
                self.check_bound();
                // A step that finds the index damaged is not tried again.
                let sum = Some(made.checksum);
                match index.step(sleep, |cache| cache.commit(id, sum, 1)) {
                    Ok(Some(done)) if done.victims.is_empty() => {
                        value_file::seal(&root, name, &made).unwrap();
                    }
                    Ok(Some(done)) => self.remove(index, &done.victims),
                    Ok(None) | Err(_) => {
                        let _ = value_file::remove_made(&root, name, &made);
                    }
                }
            }
            Err(error) => {
                removal::remove_below(&root, name).unwrap();
                self.step(index, |cache| cache.abandon(id));
                if matches!(error, value_file::WriteError::Unlisted) {
                    self.remove_unlisted(index);
                }
            }
        }
    }

    /// See `zcache._protocol.write`.
    fn write(&mut self, index: &mut Index, key: &'static str) {
        let victims = self.step(index, |cache| cache.begin_write(key));
        self.remove(index, &victims.unwrap_or_default());
        assert!(removal::remove_key(&self.root, key).is_empty());
        self.next += 1;
        self.source.insert(key, self.next);
        let ended = self.step(index, |cache| cache.end_write(key, true, None));
        let (victims, ticket) = ended.unwrap_or_default();
        self.remove(index, &victims);
        match ticket {
            None => assert!(removal::remove_key(&self.root, key).is_empty()),
            Some(ticket) => {
                self.step(index, |cache| Ok(cache.complete_flight(key, ticket)));
            }
        }
    }

    fn use_it(&mut self, a: &mut Index, b: &mut Index) {
        for key in KEYS {
            self.read(a, key, ByteRange::Full);
        }
        self.read(a, KEYS[0], RANGE);
        for key in KEYS {
            self.write(b, key);
            for index in [&mut *a, &mut *b] {
                self.read(index, key, RANGE);
                self.read(index, key, ByteRange::Full);
            }
        }
        for key in MORE {
            self.read(b, key, ByteRange::Full);
        }
        // The next step finds that a participant has died inside one.
        let head = OpenOptions::new()
            .write(true)
            .open(self.index_root().join("head"));
        head.unwrap().write_all_at(&[9], 8).unwrap();
        for key in KEYS {
            self.read(a, key, ByteRange::Full);
            self.read(b, key, RANGE);
        }
        for key in MORE {
            self.read(a, key, ByteRange::Full);
        }
    }
}

/// An index of a few entries, and the files of their values.
struct Snapshot {
    index: Vec<(&'static str, Vec<u8>)>,
    values: Vec<(String, Vec<u8>)>,
}

fn new_world(root: &Path) -> World {
    let _ = fs::remove_dir_all(root);
    for name in [".zcache/index", ".zcache/tmp", "a"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::write(root.join(THEIRS), b"theirs").unwrap();
    let keys = KEYS.iter().chain(&MORE);
    World {
        root: root.to_owned(),
        source: keys.zip(1..).map(|(key, value)| (*key, value)).collect(),
        next: 100,
        unfinished: 0,
        case: "no flip".to_owned(),
    }
}

fn snapshot(root: &Path) -> Snapshot {
    let mut world = new_world(root);
    let (mut index, fresh) = world.open();
    assert!(fresh);
    world.fill(&mut index, KEYS[0], RANGE);
    for key in KEYS {
        world.fill(&mut index, key, ByteRange::Full);
    }
    drop(index);
    let read = |name| (name, fs::read(world.index_root().join(name)).unwrap());
    let values = world.files().into_iter().map(|(name, ..)| {
        let bytes = fs::read(world.root.join(&name)).unwrap();
        (name, bytes)
    });
    Snapshot {
        values: values.collect(),
        index: ["owner", "head", "table", "cells", "texts"]
            .map(read)
            .into(),
    }
}

impl Snapshot {
    fn restore(&self, root: &Path) -> World {
        let world = new_world(root);
        for (name, bytes) in &self.index {
            fs::write(world.index_root().join(name), bytes).unwrap();
        }
        for (name, bytes) in &self.values {
            let (name, tmp) = (Path::new(name), root.join(".zcache/tmp/0"));
            let nanos = FETCHED + PENDING;
            let made = value_file::write_value(root, name, &tmp, bytes, nanos, [0; 8]).unwrap();
            value_file::seal(root, name, &made).unwrap();
        }
        world
    }
}

/// Flips each bit of one file; of all of them with `ZCACHE_ALL_FLIPS=1`, which takes minutes, else of some.
fn flip_all(name: &str) {
    let memory = PathBuf::from("/dev/shm");
    let above = Some(memory).filter(|path| path.is_dir());
    let above = above.unwrap_or_else(std::env::temp_dir);
    let root = above.join(format!("zcache-flips-{}-{name}", std::process::id()));
    let snapshot = snapshot(&root);
    let (_, bytes) = snapshot.index.iter().find(|file| file.0 == name).unwrap();
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let mut bits = Vec::new();
    for at in 0..(used + 56).min(bytes.len()) {
        // Of those counters, which follow the header, and of empty slots of participants some: a flip there
        // only ends fills.
        let is_sampled = name == "head" && (2304..DIRECTORY_AT).contains(&at);
        if !is_sampled || at % 4099 == 0 {
            bits.extend((0..8).map(|bit| (at, bit)));
        }
    }
    let is_sampled = std::env::var_os("ZCACHE_ALL_FLIPS").is_none();
    for (at, bit) in bits.into_iter().step_by(if is_sampled { 53 } else { 1 }) {
        let mut world = snapshot.restore(&root);
        let ((mut a, fresh_a), (mut b, fresh_b)) = (world.open(), world.open());
        assert!(!fresh_a && !fresh_b);
        world.case = format!("{name}, byte {at}, bit {bit}");
        let path = world.index_root().join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << bit], at as u64).unwrap();
        world.use_it(&mut a, &mut b);
    }
    fs::remove_dir_all(&root).unwrap();
}

#[test]
fn cells_bit_flipped_in_use_serves_no_older_value_within_the_bound() {
    flip_all("cells");
}

#[test]
fn owner_bit_flipped_in_use_serves_no_older_value_within_the_bound() {
    flip_all("owner");
}

#[test]
fn texts_bit_flipped_in_use_serves_no_older_value_within_the_bound() {
    flip_all("texts");
}

#[test]
fn table_bit_flipped_in_use_serves_no_older_value_within_the_bound() {
    flip_all("table");
}

#[test]
fn head_bit_flipped_in_use_serves_no_older_value_within_the_bound() {
    flip_all("head");
}
