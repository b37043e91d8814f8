//! A damaged index: words of the storage change during an operation, as they may in a file that
//! other processes map. Every operation then ends, with an error or with an answer, but never in
//! a panic, in a loop, or with the name of bytes that were never zcache's to delete.

use crate::keys;

use std::collections::BTreeSet;
use std::rc::Rc;

use crate::faulty_storage::{Damage, Part, Plan, Vectors};
use proptest::prelude::*;
use zcache::cache::{Cache, Joined, Limits, Reserve, START, Victim};
use zcache::error::Result;
use zcache::key::ByteRange;

/// Accesses to the storage that one operation needs at most: some visit the table once per cell.
const PATIENCE: u64 = 3_000_000;

#[derive(Clone, Copy, Debug)]
enum Call {
    Lookup,
    Peek,
    Discard,
    Fill,
    Reserve,
    Settle,
    Commit,
    Abort,
    BeginWrite,
    EndWrite,
    Forget,
    DropPrefix,
    FailedDeletes,
    Settled,
    Fork,
    Listings,
    Validate,
}

const CALLS: [Call; 17] = [
    Call::Lookup,
    Call::Peek,
    Call::Discard,
    Call::Fill,
    Call::Reserve,
    Call::Settle,
    Call::Commit,
    Call::Abort,
    Call::BeginWrite,
    Call::EndWrite,
    Call::Forget,
    Call::DropPrefix,
    Call::FailedDeletes,
    Call::Settled,
    Call::Fork,
    Call::Listings,
    Call::Validate,
];

struct Run {
    cache: Cache<Vectors, ()>,
    plan: Rc<Plan>,
    keys: Vec<String>,
    ranges: Vec<ByteRange>,
    /// All that may ever be deleted.
    ours: BTreeSet<String>,
    rooms: Vec<(u64, Vec<u32>)>,
    victims: Vec<u32>,
    handles: Vec<u64>,
    now: u64,
    /// Whether damage is on its way. A damaged cell may give any name; that the bytes of that name
    /// are ours is checked where they are deleted, by the signature of the file.
    condemned: bool,
}

impl Run {
    fn new(limits: Limits, keys: Vec<String>, ranges: Vec<ByteRange>) -> Self {
        let plan = Rc::new(Plan::default());
        let names = keys
            .iter()
            .flat_map(|key| ranges.iter().map(move |range| range.cache_key(key)));
        Run {
            cache: Cache::new(Vectors::new(&plan), limits, 5).unwrap(),
            ours: names.collect(),
            plan,
            keys,
            ranges,
            rooms: Vec::new(),
            victims: Vec::new(),
            handles: Vec::new(),
            now: 1000,
            condemned: false,
        }
    }

    fn note(&mut self, victims: Vec<Victim>) {
        for victim in victims {
            assert!(
                self.condemned || self.ours.contains(&victim.cache_key),
                "{victim:?} is not ours"
            );
            self.victims.push(victim.cell);
        }
    }

    fn call(&mut self, call: Call, pick: usize) -> Result<()> {
        self.plan.patience.set(PATIENCE);
        self.now += pick as u64 % 3;
        let key = self.keys[pick % self.keys.len()].clone();
        let range = self.ranges[pick / 7 % self.ranges.len()];
        let now = self.now;
        let fresh = (now, self.cache.limits().max_age);
        match call {
            Call::Lookup => {
                let found = self.cache.lookup(&key, range, fresh)?;
                self.handles.extend(found.map(|found| found.handle));
            }
            Call::Peek => {
                self.cache.peek(&key, range, fresh)?;
            }
            Call::Discard => {
                if let Some(handle) = self.handles.pop() {
                    let victims = self.cache.discard(handle)?;
                    self.note(victims);
                }
            }
            Call::Fill | Call::Reserve => {
                let Joined::Lead(ticket) = self.cache.join(&key, range, (), fresh, false)? else {
                    return Ok(());
                };
                let size = pick as u64 / 3 % 50;
                let answer = self.cache.reserve(&key, range, size, ticket, now)?;
                let waiting = self.rooms.len();
                self.follow(answer);
                if matches!(call, Call::Fill) {
                    while self.rooms.len() > waiting && !self.rooms[waiting].1.is_empty() {
                        self.evictions_done(waiting, u64::MAX)?;
                    }
                    if self.rooms.len() > waiting {
                        self.commit(waiting)?;
                    }
                    self.cache.complete_flight(&key, ticket);
                }
            }
            Call::Settle => {
                if !self.rooms.is_empty() {
                    self.evictions_done(pick % self.rooms.len(), pick as u64)?;
                }
            }
            Call::Commit => {
                if !self.rooms.is_empty() {
                    self.commit(pick % self.rooms.len())?;
                }
            }
            Call::Abort => {
                if !self.rooms.is_empty() {
                    let (id, waiting) = self.rooms.swap_remove(pick % self.rooms.len());
                    self.victims.extend(waiting);
                    let victims = self.cache.abort(id)?;
                    self.note(victims);
                }
            }
            Call::BeginWrite => {
                let victims = self.cache.begin_write(&key)?;
                self.note(victims);
            }
            Call::EndWrite => {
                let (victims, _) = self.cache.end_write(&key, true, None)?;
                self.note(victims);
            }
            Call::Forget => {
                let victims = self.cache.drop_missing(&key)?;
                self.note(victims);
            }
            Call::DropPrefix => {
                let cut = key.char_indices().map(|(at, _)| at).nth(pick % 9);
                let prefix = &key[..cut.unwrap_or(key.len())];
                self.cache.invalidate_prefix(prefix);
                let mut rest = Some(START);
                while let Some(at) = rest {
                    let victims;
                    (victims, rest) = self.cache.drain_prefix(prefix, at)?;
                    self.note(victims);
                }
            }
            Call::FailedDeletes => {
                let victims = self.cache.retry_failed(usize::MAX)?;
                self.note(victims);
            }
            Call::Settled => {
                let count = self.victims.len().min(pick % 5);
                let cells: Vec<u32> = self.victims.drain(..count).collect();
                let (dropped, failed) = cells.split_at(count / 2 + pick % 2 * (count % 2));
                self.cache.deletes_done(dropped, failed)?;
            }
            Call::Fork => {
                self.rooms.clear();
                self.cache.after_fork()?;
            }
            Call::Listings => {
                let entries = self.cache.entries();
                self.cache.recency()?;
                entries?;
                let _ = (
                    self.cache.memory(),
                    self.cache.current_size(),
                    self.cache.len(),
                );
            }
            Call::Validate => self.cache.validate()?,
        }
        Ok(())
    }

    fn follow(&mut self, answer: Reserve) {
        match answer {
            Reserve::Granted(id) => self.rooms.push((id, Vec::new())),
            Reserve::NeedsEviction(id, victims) => {
                let from = self.victims.len();
                self.note(victims);
                let cells = self.victims.split_off(from);
                self.rooms.push((id, cells));
            }
            Reserve::Rejected(_) => {}
        }
    }

    fn evictions_done(&mut self, at: usize, bits: u64) -> Result<()> {
        let (id, cells) = self.rooms.remove(at);
        let (dropped, failed): (Vec<_>, Vec<_>) = cells
            .iter()
            .partition(|cell| bits >> (**cell % 16) & 1 == 1);
        let answer = self.cache.evictions_done(id, &dropped, &failed, self.now)?;
        self.follow(answer);
        // It keeps its position in the list.
        let last = self.rooms.len();
        if last > at {
            self.rooms[at..last].rotate_right(1);
        }
        Ok(())
    }

    fn commit(&mut self, at: usize) -> Result<()> {
        let (id, waiting) = self.rooms.swap_remove(at);
        self.victims.extend(waiting);
        let victims = match self.cache.commit(id, Some(0), self.now)? {
            Some(done) => done.victims,
            None => self.cache.abort(id)?,
        };
        self.note(victims);
        Ok(())
    }
}

fn damage() -> impl Strategy<Value = Vec<(Part, usize, Damage)>> {
    let part = prop_oneof![
        4 => Just(Part::Header),
        8 => Just(Part::Cells),
        2 => Just(Part::Slots),
        1 => Just(Part::Directory),
        4 => Just(Part::Strings),
    ];
    let how = prop_oneof![
        3 => (0u8..32).prop_map(Damage::Flip),
        4 => (0u32..40).prop_map(Damage::Set),
        1 => (0u32..300).prop_map(Damage::Set),
        3 => prop::sample::select(vec![u32::MAX, 1 << 28, 4000]).prop_map(Damage::Set),
        2 => any::<i8>().prop_map(Damage::Add),
        3 => any::<usize>().prop_map(Damage::Copy),
    ];
    // The first words are those of the header of a segment.
    let at = prop_oneof![2 => any::<usize>(), 1 => 0usize..3];
    prop::collection::vec((part, at, how), 1..8)
}

fn calls(most: usize) -> impl Strategy<Value = Vec<(Call, usize)>> {
    let fills = prop_oneof![1 => Just(Call::Fill), 3 => prop::sample::select(CALLS.to_vec())];
    prop::collection::vec((fills, any::<usize>()), 0..most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn ends_without_harm(
        max_size in prop_oneof![4 => 20u64..400, 1 => Just(u64::MAX)],
        max_age in prop::option::of(1u64..50),
        flat_namespace in any::<bool>(),
        mut keys in prop::collection::vec(keys::key(), 2..12),
        names in prop::collection::vec(keys::name(300), 0..6),
        ranges in prop::collection::vec(keys::range(), 2..5),
        healthy in calls(60),
        fuse in 1u32..60,
        damage in damage(),
        damaged in calls(60),
    ) {
        let limits = Limits { max_age, flat_namespace, ..Limits::bounded(max_size) };
        keys.extend(names);
        let mut run = Run::new(limits, keys, ranges);
        for (call, pick) in healthy {
            run.call(call, pick).unwrap();
        }
        run.cache.validate().unwrap();
        run.condemned = true;
        run.plan.damage.replace(damage);
        run.plan.fuse.set(fuse);
        for (call, pick) in damaged {
            // A caller would discard the index; the test goes on.
            let _ = run.call(call, pick);
        }
    }
}
