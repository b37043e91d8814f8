//! Deaths of one, two and three participants between any two steps, and what a rebuild takes in then.
//!
//! Writers, fillers and evictors go a number of steps over one key of a real directory, one after the
//! other, and die or stop there. Then the index is lost. What it holds after the rebuild, and after
//! those that were stopped have gone on, is never older than a write that has returned.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;

use zcache::cache::{AbsenceAges, Answer, Cache, Joined, Limits, Reserve, Ticket, Victim};
use zcache::disk::ownership::{MILLI, PENDING, SIGNATURE};
use zcache::disk::removal;
use zcache::disk::value_file::{self, WrittenFile};
use zcache::key::ByteRange;
use zcache::shared::{Mapped, Opening, SharedIndex, StepError};

const LIMITS: Limits = Limits {
    flat_namespace: false,
    ..Limits::bounded(1000)
};
const KEY: &str = "a/k";
const FETCHED: i64 = 1_700_000_000_123 * MILLI;

/// Names of what one participant can be in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write,
    Delete,
    Fill,
    /// A fill that finds nothing in the source.
    Miss,
    Evict,
}
/// Each with the number of its steps.
const KINDS: [(Kind, usize); 5] = [
    (Kind::Write, 5),
    (Kind::Delete, 5),
    (Kind::Fill, 6),
    (Kind::Miss, 3),
    (Kind::Evict, 3),
];
/// Stands for nothing in the source.
const NOTHING: u32 = 0;
const ANY_AGE: AbsenceAges = AbsenceAges {
    own: None,
    node: None,
};

/// The directory, the source, and what may be read.
struct World {
    root: PathBuf,
    source: u32,
    /// What was in the source since the last write that has returned was about to.
    valid: Vec<u32>,
    next: u32,
}

impl World {
    fn open(&mut self) -> SharedIndex<u32> {
        let (mut index, fresh) =
            SharedIndex::open(&self.index_root(), &Opening::new(LIMITS, 1)).unwrap();
        if fresh {
            self.rebuild(&mut index);
        }
        index
    }

    fn index_root(&self) -> PathBuf {
        self.root.join(".zcache/index")
    }

    fn file(&self) -> PathBuf {
        self.root.join(KEY)
    }

    /// What `zcache._backends.directory.scan` does.
    fn rebuild(&mut self, index: &mut SharedIndex<u32>) {
        let found = fs::symlink_metadata(self.file()).ok();
        let mark = found.as_ref().map(|status| status.mtime_nsec() % MILLI);
        if mark == Some(PENDING) {
            removal::remove(&self.file()).unwrap();
        }
        if mark == Some(SIGNATURE) {
            let size = found.unwrap().size();
            let adopted = index.step(sleep, |cache| cache.adopt(KEY, size, 1));
            adopted.unwrap();
        }
        index.complete().unwrap();
    }

    /// Takes a step; where the index was lost, recovers it first.
    fn step<R>(
        &mut self,
        index: &mut SharedIndex<u32>,
        mut work: impl FnMut(&mut Cache<Mapped, u32>) -> zcache::error::Result<R>,
    ) -> R {
        for _ in 0..3 {
            match index.step(sleep, &mut work) {
                Ok(answer) => return answer,
                Err(StepError::Busy) => panic!("the lock is free"),
                Err(StepError::Failed(_)) => {
                    if index.restart(7).unwrap() {
                        self.rebuild(index);
                    }
                }
            }
        }
        panic!("the index is lost again and again")
    }

    /// The next step finds that a participant has died inside one.
    fn lose_index(&self) {
        let head = OpenOptions::new()
            .write(true)
            .open(self.index_root().join("head"));
        head.unwrap().write_all_at(&[9], 8).unwrap();
    }

    fn remove(&self, victims: &[Victim]) {
        for victim in victims {
            removal::remove_below(&self.root, Path::new(&victim.cache_key)).unwrap();
        }
    }

    /// A read of the cache.
    fn check(&mut self, index: &mut SharedIndex<u32>, case: &str) {
        let found = self.step(index, |cache| {
            cache.ask(KEY, ByteRange::Full, 1, Some(ANY_AGE))
        });
        match found {
            Answer::Found(_) => {}
            Answer::Absent => {
                let valid = &self.valid;
                return assert!(valid.contains(&NOTHING), "{case}: nothing of {valid:?}");
            }
            _ => return,
        }
        let Ok(bytes) = fs::read(self.file()) else {
            return;
        };
        let value = u32::from_le_bytes(bytes.try_into().unwrap());
        let valid = &self.valid;
        assert!(valid.contains(&value), "{case}: {value} of {valid:?}");
    }
}

/// One participant at work.
struct Actor {
    kind: Kind,
    index: SharedIndex<u32>,
    at: usize,
    goes_on: bool,
    victims: Vec<Victim>,
    ticket: Option<Ticket>,
    value: u32,
    reservation: Option<u64>,
    made: Option<WrittenFile>,
    unfinished: PathBuf,
}

impl Actor {
    fn new(world: &mut World, kind: Kind) -> Actor {
        world.next += 1;
        let value = match kind {
            Kind::Delete => NOTHING,
            _ => world.next,
        };
        Actor {
            kind,
            index: world.open(),
            at: 0,
            goes_on: true,
            victims: Vec::new(),
            ticket: None,
            value,
            reservation: None,
            made: None,
            unfinished: world.root.join(format!(".zcache/tmp/{}", world.next)),
        }
    }

    /// Goes one step; false once it has ended.
    fn go(&mut self, world: &mut World) -> bool {
        self.at += 1;
        self.goes_on = self.goes_on
            && match self.kind {
                Kind::Write | Kind::Delete => self.write(world),
                Kind::Fill => self.fill(world),
                Kind::Miss => self.miss(world),
                Kind::Evict => self.evict(world),
            };
        self.goes_on
    }

    fn confirm(&mut self, world: &mut World) {
        let cells: Vec<u32> = self.victims.iter().map(|victim| victim.cell).collect();
        world.step(&mut self.index, |cache| {
            cache.deletes_done_since(0, &cells, &[])
        });
    }

    /// See `zcache._protocol.write`.
    fn write(&mut self, world: &mut World) -> bool {
        match self.at {
            1 => self.victims = world.step(&mut self.index, |cache| cache.begin_write(KEY)),
            2 => {
                world.remove(&self.victims);
                self.confirm(world);
                assert!(removal::remove_key(&world.root, KEY).is_empty());
            }
            3 => {
                world.source = self.value;
                world.valid.push(self.value);
            }
            4 => {
                let ended = world.step(&mut self.index, |cache| cache.end_write(KEY, true, None));
                (self.victims, self.ticket) = ended;
            }
            5 => {
                world.remove(&self.victims);
                if self.ticket.is_none() {
                    assert!(removal::remove_key(&world.root, KEY).is_empty());
                }
                // It returns.
                world.valid = vec![world.source];
            }
            _ => return false,
        }
        true
    }

    /// See `zcache._protocol.read` and `disk::fill`.
    fn fill(&mut self, world: &mut World) -> bool {
        match self.at {
            1 => {
                let joined = world.step(&mut self.index, |cache| {
                    cache.join(KEY, ByteRange::Full, 0, 1, false)
                });
                let Joined::Lead(ticket) = joined else {
                    return false;
                };
                self.ticket = Some(ticket);
            }
            2 => {
                self.value = world.source;
                return self.value != NOTHING;
            }
            3 => {
                let ticket = self.ticket.unwrap();
                let room = world.step(&mut self.index, |cache| {
                    cache.reserve(KEY, ByteRange::Full, 4, ticket, 1)
                });
                let Reserve::Granted(id) = room else {
                    return false;
                };
                self.reservation = Some(id);
            }
            4 => {
                let (name, data) = (Path::new(KEY), self.value.to_le_bytes());
                let nanos = FETCHED + PENDING;
                let root = &world.root;
                match value_file::write_value(root, name, &self.unfinished, &data, nanos, [0; 8]) {
                    Ok(made) => self.made = Some(made),
                    Err(_) => {
                        removal::remove_below(root, name).unwrap();
                        return false;
                    }
                }
            }
            5 => {
                let (id, made) = (self.reservation.unwrap(), self.made.unwrap());
                // A step that finds the index lost is not tried again.
                let done = self
                    .index
                    .step(sleep, |cache| cache.commit(id, Some(made.checksum), 1));
                match done {
                    Ok(Some(done)) if done.victims.is_empty() => {}
                    Ok(Some(done)) => {
                        world.remove(&done.victims);
                        return false;
                    }
                    Ok(None) | Err(_) => {
                        let _ = value_file::remove_made(&world.root, Path::new(KEY), &made);
                        return false;
                    }
                }
            }
            6 => {
                let _ = value_file::seal(&world.root, Path::new(KEY), &self.made.unwrap());
            }
            _ => return false,
        }
        true
    }

    /// See `zcache._protocol.read`.
    fn miss(&mut self, world: &mut World) -> bool {
        match self.at {
            1 => {
                let joined = world.step(&mut self.index, |cache| {
                    cache.join(KEY, ByteRange::Full, 0, 1, true)
                });
                let Joined::Lead(ticket) = joined else {
                    return false;
                };
                self.ticket = Some(ticket);
            }
            2 => return world.source == NOTHING,
            3 => {
                let ticket = self.ticket.unwrap();
                let (victims, _) = world.step(&mut self.index, |cache| {
                    cache.commit_absence(KEY, ticket, 1, 1, true)
                });
                self.victims = victims;
                world.remove(&self.victims);
                self.confirm(world);
            }
            _ => return false,
        }
        true
    }

    fn evict(&mut self, world: &mut World) -> bool {
        match self.at {
            1 => self.victims = world.step(&mut self.index, |cache| cache.evict(1, 1)),
            2 => world.remove(&self.victims),
            3 => self.confirm(world),
            _ => return false,
        }
        true
    }
}

/// Runs one case; returns whether there was anything left to do for the last one.
fn run(root: &Path, start: u32, cast: &[(Kind, usize)], stops: bool, reaps: bool) -> bool {
    for name in ["a", ".zcache/index", ".zcache/tmp"] {
        let _ = fs::remove_dir_all(root.join(name));
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let case = format!("{start}, {cast:?}, stopped: {stops}, reaped: {reaps}");
    let mut world = World {
        root: root.to_owned(),
        source: start,
        valid: vec![start],
        next: 1,
    };
    let mut survivor = world.open();
    let kind = match start {
        NOTHING => Kind::Miss,
        _ => Kind::Fill,
    };
    let mut first = Actor::new(&mut world, kind);
    while first.go(&mut world) {}
    drop(first);
    let (mut stopped, mut was_long) = (Vec::new(), false);
    for &(kind, steps) in cast {
        let mut actor = Actor::new(&mut world, kind);
        was_long = (0..steps).all(|_| actor.go(&mut world));
        if stops {
            stopped.push(actor);
        }
        // Else it dies here.
        if reaps && let Err(error) = survivor.reap() {
            assert!(matches!(error, StepError::Failed(_)), "{case}: {error:?}");
        }
        world.check(&mut survivor, &case);
    }
    world.lose_index();
    world.check(&mut survivor, &case);
    for actor in &mut stopped {
        while actor.go(&mut world) {
            world.check(&mut survivor, &case);
        }
        world.check(&mut survivor, &case);
    }
    world.lose_index();
    world.check(&mut survivor, &case);
    was_long
}

fn all(name: &str, participants: u32) {
    // In memory where there is such a file system: that is ten times as fast.
    let memory = PathBuf::from("/dev/shm");
    let above = Some(memory).filter(|path| path.is_dir());
    let above = above.unwrap_or_else(std::env::temp_dir);
    let root = above.join(format!("zcache-deaths-{}-{name}", std::process::id()));
    let choices: Vec<(Kind, usize)> = KINDS
        .iter()
        .flat_map(|&(kind, all)| (1..=all).map(move |steps| (kind, steps)))
        .collect();
    // All of three take minutes: `ZCACHE_ALL_DEATHS=1` runs them.
    let is_sampled = participants > 2 && std::env::var_os("ZCACHE_ALL_DEATHS").is_none();
    let mut cases = 0;
    for number in (0..choices.len().pow(participants)).step_by(if is_sampled { 43 } else { 1 }) {
        let digit = |n| number / choices.len().pow(n) % choices.len();
        let cast: Vec<(Kind, usize)> = (0..participants).map(|n| choices[digit(n)]).collect();
        for (stops, reaps) in [(false, false), (false, true), (true, false)] {
            for start in [1, NOTHING] {
                cases += u32::from(run(&root, start, &cast, stops, reaps));
            }
        }
    }
    fs::remove_dir_all(&root).unwrap();
    assert!(cases > 0);
}

#[test]
fn one_participant_dies_at_any_step() {
    all("one", 1);
}

#[test]
fn two_participants_die_at_any_steps() {
    all("two", 2);
}

#[test]
fn three_participants_die_at_any_steps() {
    all("three", 3);
}
