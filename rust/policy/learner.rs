//! Which rule fits the traffic: small simulations of all of them, on keys sampled by their hash.
//!
//! Each simulation sees the same keys, and has the same part of the bytes of the cache. What their misses have
//! cost lately decides. Two things keep that honest:
//!
//! - A simulation that has fallen behind goes on from the keys of the best one: it stands for what the cache would
//!   do if it went by its rule from now on.
//! - A change of the rule that did not pay, by the misses of the cache itself, doubles the lead that the next one
//!   takes; one that did halves it. So traffic that goes back and forth does not drag the rule with it.

use bytemuck::{Pod, Zeroable};

use super::entries::Entries;
use super::keys::{History, Keys, words_for};
use super::rule::{RULES, Ruled, cost_of};
use crate::arena::PolicyState;
use crate::error::{Error, Result};

const COUNT: usize = RULES.len();
/// Nodes of a simulation, and the keys above which fewer are sampled.
const NODES: usize = 2048;
const MANY: u32 = 1536;
/// Sampled entries of the cache below which more are sampled.
const FEW: u64 = 256;
const GHOSTS: usize = NODES / 4;
const SIMULATION: usize = words_for(NODES) + GHOSTS;
const HEAD: usize = size_of::<Head>() / 8;

/// Words that a learner takes: 320 KiB.
pub(super) const WORDS: usize = HEAD + COUNT * SIMULATION;

/// Requests for each key of a simulation by which what misses have cost fades.
const FADE: f64 = 4.0;
/// The same where there are few keys.
const FADE_LEAST: f64 = 100.0;
/// How many deviations a simulation falls behind before it goes on from the best one.
const BEHIND: f64 = 4.0;
/// Requests for each key of a simulation before that happens again.
const PATIENCE: u64 = 2;
/// The most that a change of the rule takes, in deviations.
const INERTIA: f64 = 64.0;

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Head {
    /// Sampled requests.
    requests: u64,
    /// What the misses of each simulation have cost lately, and the squares of it.
    costs: [f64; COUNT],
    squares: [f64; COUNT],
    /// What the misses of each simulation, and of the cache, have cost since the last change.
    since: [f64; COUNT],
    own: f64,
    /// Deviations by which another rule has to lead.
    inertia: f64,
    /// When each simulation went on from the best one.
    restarted: [u64; COUNT],
    /// The rule before the last change, plus one; 0 before the first.
    previous: u32,
    /// Of 2 to the power of so many keys one is sampled.
    shift: u32,
}

/// The learner in its memory, which is not trusted.
#[derive(Debug)]
pub(super) struct Learner<'a> {
    head: &'a mut Head,
    simulations: &'a mut [u64],
}

/// A request of a sampled key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) key: u64,
    pub(super) size: u64,
    pub(super) is_hit: bool,
}

/// Whether the keys with such hashes are sampled.
fn is_sampled(key: u64, shift: u32) -> bool {
    key.checked_shr(64 - shift).unwrap_or(0) == 0
}

impl<'a> Learner<'a> {
    /// The learner in this memory; zeros are one that has seen nothing.
    pub(super) fn of(words: &'a mut [u64]) -> Option<Self> {
        let (head, rest) = words.split_at_mut_checked(HEAD)?;
        let simulations = rest.get_mut(..COUNT * SIMULATION)?;
        let head: &mut Head = bytemuck::try_from_bytes_mut(bytemuck::cast_slice_mut(head)).ok()?;
        head.shift = head.shift.min(63);
        if !(1.0..=INERTIA).contains(&head.inertia) {
            head.inertia = 1.0;
        }
        let numbers = head.costs.iter_mut().chain(&mut head.squares);
        for number in numbers.chain(&mut head.since).chain([&mut head.own]) {
            if !number.is_finite() || *number < 0.0 {
                *number = 0.0;
            }
        }
        Some(Learner { head, simulations })
    }

    /// Whether a key is sampled.
    pub(super) fn samples(&self, key: u64) -> bool {
        is_sampled(key, self.head.shift)
    }

    /// Takes a request into account; the rule that the cache should go by, of `state.rule`.
    pub(super) fn observe(
        &mut self,
        request: Request,
        entries: u64,
        state: &PolicyState,
        capacity: u64,
    ) -> Result<u32> {
        let current = (state.rule as usize).min(COUNT - 1);
        self.adjust(entries)?;
        if !self.samples(request.key) {
            return Ok(current as u32);
        }
        self.head.requests = self.head.requests.wrapping_add(1);
        let cost = cost_of(state, request.size) as f64;
        if !request.is_hit {
            self.head.own += cost;
        }
        let capacity = capacity >> self.head.shift;
        let mut counts = [0; COUNT];
        for (n, count) in counts.iter_mut().enumerate() {
            let (is_hit, keys) = self.simulate(n, request, state, capacity)?;
            *count = keys;
            let fade = 1.0 - 1.0 / (FADE * f64::from(keys)).max(FADE_LEAST);
            let paid = if is_hit { 0.0 } else { cost };
            let head = &mut *self.head;
            for (sum, more) in [
                (head.costs.get_mut(n), paid),
                (head.squares.get_mut(n), paid * paid),
            ] {
                let sum = sum.ok_or(OUTSIDE)?;
                *sum = *sum * fade + more;
            }
            *head.since.get_mut(n).ok_or(OUTSIDE)? += paid;
        }
        let best = self.best();
        let chosen = self.choose(current, best, cost)?;
        self.restart_one(best, counts, cost)?;
        Ok(chosen as u32)
    }

    fn cost(&self, n: usize) -> f64 {
        self.head.costs.get(n).copied().unwrap_or(f64::MAX)
    }

    /// The deviation of what misses have cost in a simulation.
    fn deviation(&self, n: usize, least: f64) -> f64 {
        self.head
            .squares
            .get(n)
            .map_or(0.0, |sum| sum.sqrt())
            .max(least)
    }

    fn best(&self) -> usize {
        let all = (0..COUNT).min_by(|a, b| self.cost(*a).total_cmp(&self.cost(*b)));
        all.unwrap_or(0)
    }

    fn choose(&mut self, current: usize, best: usize, least: f64) -> Result<usize> {
        let lead = self.cost(current) - self.cost(best);
        if lead <= self.head.inertia * self.deviation(current, least) {
            return Ok(current);
        }
        let head = &mut *self.head;
        if let Some(previous) = head.previous.checked_sub(1) {
            let without = head.since.get(previous as usize).ok_or(OUTSIDE)?;
            let factor = if head.own > *without { 2.0 } else { 0.5 };
            head.inertia = (head.inertia * factor).clamp(1.0, INERTIA);
        }
        (head.since, head.own) = ([0.0; COUNT], 0.0);
        head.previous = current as u32 + 1;
        Ok(best)
    }

    /// Looks at one simulation, another one each time.
    fn restart_one(&mut self, best: usize, counts: [u32; COUNT], least: f64) -> Result<()> {
        let n = (self.head.requests % COUNT as u64) as usize;
        let deviation = self.deviation(best, least);
        let keys = u64::from(counts.get(n).copied().unwrap_or(0));
        let restarted = self.head.restarted.get_mut(n).ok_or(OUTSIDE)?;
        let waited = self.head.requests.wrapping_sub(*restarted);
        if n == best || waited < PATIENCE * keys.max(FADE_LEAST as u64) {
            return Ok(());
        }
        if self.cost(n) <= self.cost(best) + BEHIND * deviation {
            return Ok(());
        }
        let from = best * SIMULATION;
        self.simulations
            .copy_within(from..from + SIMULATION, n * SIMULATION);
        let (cost, square) = (
            self.cost(best) + BEHIND / 2.0 * deviation,
            self.deviation(best, 0.0),
        );
        let head = &mut *self.head;
        *head.costs.get_mut(n).ok_or(OUTSIDE)? = cost;
        *head.squares.get_mut(n).ok_or(OUTSIDE)? = square * square;
        *head.restarted.get_mut(n).ok_or(OUTSIDE)? = head.requests;
        Ok(())
    }

    fn with_keys<R>(
        &mut self,
        n: usize,
        work: impl FnOnce(Ruled, &mut Keys<'_>) -> Result<R>,
    ) -> Result<R> {
        let from = n * SIMULATION;
        let words = self.simulations.get_mut(from..from + SIMULATION);
        let (keys, ghosts) = words.ok_or(OUTSIDE)?.split_at_mut(words_for(NODES));
        let mut keys = Keys::of(keys, NODES, History::Fixed(ghosts))?;
        let rule = *RULES.get(n).ok_or(OUTSIDE)?;
        work(Ruled { rule, ghosts_at: 0 }, &mut keys)
    }

    /// Whether the key was there, and how many there are.
    fn simulate(
        &mut self,
        n: usize,
        request: Request,
        state: &PolicyState,
        capacity: u64,
    ) -> Result<(bool, u32)> {
        self.with_keys(n, |ruled, keys| {
            let own = keys.state_mut();
            (own.minimise, own.request_bytes) = (state.minimise, state.request_bytes);
            if let Some(entry) = keys.find(request.key)? {
                ruled.touch(keys, entry)?;
                return Ok((true, keys.len()));
            }
            if request.size > capacity {
                return Ok((false, keys.len()));
            }
            while keys.is_full() || keys.totals().1.saturating_add(request.size) > capacity {
                let Some(victim) = ruled.victim(keys)? else {
                    return Ok((false, keys.len()));
                };
                ruled.remove(keys, victim)?;
                keys.free(victim)?;
            }
            let entry = keys.make(request.key, request.size)?;
            ruled.insert(keys, entry, false)?;
            Ok((false, keys.len()))
        })
    }

    /// Samples fewer keys where the simulations have too many, and more where the cache has too few.
    fn adjust(&mut self, entries: u64) -> Result<()> {
        let mut most = 0;
        for n in 0..COUNT {
            most = most.max(self.with_keys(n, |_, keys| Ok(keys.len()))?);
        }
        if most > MANY && self.head.shift < 63 {
            self.head.shift += 1;
            let limit = u64::MAX >> self.head.shift;
            for n in 0..COUNT {
                self.with_keys(n, |ruled, keys| {
                    for entry in keys.from_key(limit)? {
                        ruled.remove(keys, entry)?;
                        keys.free(entry)?;
                    }
                    Ok(())
                })?;
            }
        } else if self.head.shift > 0 && entries >> self.head.shift < FEW {
            self.head.shift -= 1;
        }
        Ok(())
    }

    /// Recomputes the lists of the simulations; for tests.
    pub(super) fn validate(words: &[u64]) -> Result<()> {
        let mut copy = words.to_vec();
        let Some(mut learner) = Learner::of(&mut copy) else {
            return Ok(());
        };
        for n in 0..COUNT {
            learner.with_keys(n, |_, keys| keys.validate())?;
        }
        Ok(())
    }
}

const OUTSIDE: Error = Error::Corrupt("learner: a rule that is none");
