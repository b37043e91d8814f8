//! A pool with one participant, and what tests ask it.

#![allow(dead_code, reason = "each test uses a part")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use zcache::arena::State;
use zcache::cache::{Cache, Found, Joined, Limits, PAGE, Placed, Verify};
use zcache::disk::CacheDir;
use zcache::disk::fill::{Ending, Fill};
use zcache::disk::queue::Fills;
use zcache::disk::segments::{Got, SegmentFiles, scan, values_in};
use zcache::key::ByteRange;
use zcache::policy::{Minimise, PolicyKind};
use zcache::shared::{Locked, Mapped, Opening, SharedIndex};

pub(crate) const UNIT: u64 = 4096;
pub(crate) const BOUND: u64 = 100 * PAGE;
pub(crate) const LIMITS: Limits = Limits {
    verify: Verify::First,
    ..Limits::bounded(BOUND)
};
pub(crate) const LONG: Duration = Duration::from_secs(30);
pub(crate) const NOW: u64 = 1_700_000_000_123;

/// How the index of a pool is opened.
pub(crate) fn opening(limits: Limits) -> Opening {
    Opening {
        unit: UNIT,
        patience: LONG,
        policy: (PolicyKind::Lru, Minimise::Requests),
        with_places: true,
        ..Opening::new(limits, 1)
    }
}

/// A pool with one participant.
pub(crate) struct Pool {
    pub(crate) root: PathBuf,
    pub(crate) index: Arc<Locked<u32>>,
    pub(crate) files: Arc<SegmentFiles>,
    pub(crate) fills: Fills<u32, Vec<u8>>,
    pub(crate) holes: bool,
    pub(crate) clock: u64,
    pub(crate) min_free_space: u64,
}

pub(crate) fn open(
    root: &Path,
    files: &SegmentFiles,
    limits: Limits,
    holes: bool,
) -> SharedIndex<u32> {
    let at = root.join("index");
    let opening = Opening {
        one_value_a_segment: !holes,
        ..opening(limits)
    };
    let (mut index, fresh) = SharedIndex::open(&at, &opening).unwrap();
    if fresh {
        rebuild(&mut index, files);
    }
    index
}

/// What `zcache._backends.pool.layout` does.
pub(crate) fn rebuild(index: &mut SharedIndex<u32>, files: &SegmentFiles) {
    if index.step(sleep, |cache| Ok(cache.begins_empty())).unwrap() {
        for number in files.list().unwrap() {
            files.empty(number).unwrap();
        }
        return index.complete_empty().unwrap();
    }
    let found = scan(files, true).unwrap();
    let adopt = |cache: &mut Cache<Mapped, u32>| {
        found.adopt_segments(cache)?;
        let refused = found.adopt_values(cache, 0..found.values.len())?;
        assert_eq!(refused, []);
        Ok(())
    };
    index.step(sleep, adopt).unwrap();
    index.complete().unwrap();
}

pub(crate) fn contents(key: &str, size: usize) -> Vec<u8> {
    key.bytes().cycle().take(size).collect()
}

impl Pool {
    pub(crate) fn new(name: &str) -> Pool {
        Pool::with(name, LIMITS, true)
    }

    pub(crate) fn with(name: &str, limits: Limits, holes: bool) -> Pool {
        let root = std::env::temp_dir().join(format!("zcache-pool-{}-{name}", std::process::id()));
        Pool::at(root, limits, holes)
    }

    pub(crate) fn at(root: PathBuf, limits: Limits, holes: bool) -> Pool {
        for folder in ["index", "segments", "tmp"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        Pool::over(root, limits, holes)
    }

    pub(crate) fn over(root: PathBuf, limits: Limits, holes: bool) -> Pool {
        let files = Arc::new(SegmentFiles::new(root.join("segments"), holes));
        let index = Arc::new(Locked::shared(open(&root, &files, limits, holes)));
        let dir = CacheDir::new(root.clone(), root.join("tmp")).with_segments(Arc::clone(&files));
        let fills = Fills::new(Arc::clone(&index), dir, 2, Box::new(drop));
        Pool {
            root,
            index,
            files,
            fills,
            holes,
            clock: NOW,
            min_free_space: 0,
        }
    }

    pub(crate) fn step<R>(
        &self,
        work: impl FnOnce(&mut Cache<Mapped, u32>) -> zcache::error::Result<R>,
    ) -> R {
        let Locked::Shared(lock, _) = &*self.index else {
            panic!("not shared")
        };
        lock.lock().unwrap().step(sleep, work).unwrap()
    }

    pub(crate) fn join(&self, key: &str, range: ByteRange) -> u64 {
        match self.step(|cache| cache.join(key, range, 0, 0, true)) {
            Joined::Lead(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn fill_as(&mut self, key: &str, range: ByteRange, data: Vec<u8>) -> Ending {
        let ticket = self.join(key, range);
        self.fill_under(ticket, key, range, data)
    }

    pub(crate) fn fill_under(
        &mut self,
        ticket: u64,
        key: &str,
        range: ByteRange,
        data: Vec<u8>,
    ) -> Ending {
        let number = self.submit(ticket, key, range, data);
        assert!(self.fills.wait(number, LONG));
        let mut reports = self.fills.collect();
        let (_, report) = reports.pop().unwrap();
        assert!(report.delete_errors.is_empty(), "{report:?}");
        self.step(|cache| cache.validate());
        report.ending
    }

    pub(crate) fn submit(
        &mut self,
        ticket: u64,
        key: &str,
        range: ByteRange,
        data: Vec<u8>,
    ) -> u64 {
        self.clock += 1;
        let fill = Fill {
            key: key.into(),
            range,
            data,
            ticket,
            fetched: self.clock,
            now: self.clock,
            since: Instant::now(),
            min_free_space: Some(self.min_free_space),
        };
        self.fills.submit(fill).unwrap()
    }

    /// Fills several keys at once, under tickets that they have; how each has ended.
    pub(crate) fn fill_together(&mut self, values: &[(u64, String, usize)]) -> Vec<Ending> {
        let numbers: Vec<u64> = values
            .iter()
            .map(|(ticket, key, size)| {
                self.submit(*ticket, key, ByteRange::Full, contents(key, *size))
            })
            .collect();
        assert!(self.fills.wait(*numbers.last().unwrap(), LONG));
        let mut reports = self.fills.collect();
        reports.sort_unstable_by_key(|(number, _)| *number);
        let found: Vec<u64> = reports.iter().map(|(number, _)| *number).collect();
        assert_eq!(found, numbers);
        self.step(|cache| cache.validate());
        reports
            .into_iter()
            .map(|(_, report)| report.ending)
            .collect()
    }

    pub(crate) fn fill(&mut self, key: &str, size: usize) {
        let ending = self.fill_as(key, ByteRange::Full, contents(key, size));
        assert!(matches!(ending, Ending::Filled), "{ending:?}");
    }

    /// Looks a key up; where its bytes are.
    pub(crate) fn find(&self, key: &str, range: ByteRange) -> Option<(Found, Placed)> {
        self.step(|cache| {
            let Some(found) = cache.peek(key, range, 0)? else {
                return Ok(None);
            };
            Ok(cache
                .placed(found.handle as u32)?
                .map(|placed| (found, placed)))
        })
    }

    pub(crate) fn read(&self, key: &str) -> Option<Vec<u8>> {
        let (found, placed) = self.find(key, ByteRange::Full)?;
        self.read_part(placed, key, 0, found.size as usize, true)
            .ok()
    }

    /// What a value has from `start` on, or why there is none of it.
    pub(crate) fn read_part(
        &self,
        placed: Placed,
        name: &str,
        start: u64,
        size: usize,
        waits: bool,
    ) -> Result<Vec<u8>, Got> {
        let read = self.files.read_part(placed, name, start, size, waits);
        match read.unwrap() {
            (Got::Bytes, bytes) => Ok(bytes),
            (got, _) => Err(got),
        }
    }

    pub(crate) fn keys(&self) -> Vec<String> {
        let entries = self.step(|cache| cache.entries());
        let live = entries
            .into_iter()
            .filter(|entry| entry.state == State::Live);
        live.map(|entry| entry.key).collect()
    }

    /// What `du` says of the segments.
    pub(crate) fn held(&self) -> u64 {
        let files = fs::read_dir(self.files.root()).unwrap();
        files
            .map(|f| f.unwrap().metadata().unwrap().blocks() * 512)
            .sum()
    }

    pub(crate) fn counted(&self) -> u64 {
        self.step(|cache| Ok(cache.current_size()))
    }

    pub(crate) fn segments(&self) -> Vec<u64> {
        self.files.list().unwrap()
    }

    pub(crate) fn segment(&self, number: u64) -> PathBuf {
        self.files.root().join(format!("{number:016x}"))
    }

    /// Segments with fewer pages of values than this, though they have some.
    pub(crate) fn sparse_segments(&self, pages: u64) -> usize {
        let held = |number: &u64| {
            let values = values_in(&self.files, *number).unwrap();
            let lengths = values.iter().map(|value| value.placed.length() / PAGE);
            lengths.sum::<u64>()
        };
        let segments = self.segments();
        segments
            .iter()
            .map(held)
            .filter(|held| (1..pages).contains(held))
            .count()
    }

    /// Takes the index away, and opens the pool anew.
    pub(crate) fn lose_index(self) -> Pool {
        fs::remove_dir_all(self.root.join("index")).unwrap();
        fs::create_dir_all(self.root.join("index")).unwrap();
        self.reopen()
    }

    pub(crate) fn reopen(self) -> Pool {
        let Pool {
            root,
            index,
            fills,
            holes,
            clock,
            ..
        } = self;
        drop((fills, index));
        let pool = Pool::over(root, LIMITS, holes);
        Pool { clock, ..pool }
    }

    pub(crate) fn delete(&self, victims: &[zcache::cache::Victim]) {
        for victim in victims {
            if let Some(placed) = victim.placed {
                self.files.delete(placed).unwrap();
            }
        }
        let cells: Vec<u32> = victims.iter().map(|victim| victim.cell).collect();
        self.step(|cache| cache.deletes_done(&cells, &[]));
    }
}

pub(crate) fn end(pool: Pool) {
    let root = pool.root.clone();
    drop(pool);
    fs::remove_dir_all(root).unwrap();
}
