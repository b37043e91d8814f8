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
use super::policy::Newcomer;
use super::rule::cost_of;
use super::samples::{self, COUNT, Samples};
use crate::arena::PolicyState;
use crate::error::{Error, Result};

/// Keys of a simulation above which fewer are sampled.
const MANY: u64 = 2048;
/// Sampled entries of the cache below which more are sampled.
const FEW: u64 = 256;
const HEAD: usize = size_of::<Head>() / 8;

/// Words that a learner takes.
pub(super) const WORDS: usize = HEAD + samples::WORDS;

/// Requests for each key of a simulation by which what misses have cost fades.
const FADE: f64 = 4.0;
/// The same for what they have cost very lately.
const FADE_SOON: f64 = 1.0;
/// The same where there are few keys.
const FADE_LEAST: f64 = 100.0;
/// How many deviations a simulation falls behind before it goes on from the best one.
const BEHIND: f64 = 4.0;
/// Requests for each key of a simulation before that happens again.
const PATIENCE: u64 = 2;
/// By which part of its cost another rule has to be better in any case: a change costs misses as well.
const LEAD: f64 = 0.01;
/// The most that a change of the rule takes, in deviations. With twice as many a rule that has come to serve nothing
/// would never be left.
const INERTIA: f64 = 6.0;

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Head {
    /// Sampled requests.
    requests: u64,
    /// What the misses of each simulation have cost lately, and the squares of it.
    costs: [f64; COUNT],
    squares: [f64; COUNT],
    /// What they have cost very lately.
    recent: [f64; COUNT],
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
    samples: Samples<'a>,
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
        let samples = Samples::of(rest).ok()?;
        let head: &mut Head = bytemuck::try_from_bytes_mut(bytemuck::cast_slice_mut(head)).ok()?;
        head.shift = head.shift.min(63);
        if !(1.0..=INERTIA).contains(&head.inertia) {
            head.inertia = 1.0;
        }
        let numbers = head.costs.iter_mut().chain(&mut head.squares);
        let numbers = numbers.chain(&mut head.recent);
        for number in numbers.chain(&mut head.since).chain([&mut head.own]) {
            if !number.is_finite() || *number < 0.0 {
                *number = 0.0;
            }
        }
        Some(Learner { head, samples })
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
        let key = match self.samples.find(request.key)? {
            0 => self.add(request, entries)?,
            key => Some(key),
        };
        let Some(key) = key else {
            return Ok(current as u32);
        };
        self.head.requests = self.head.requests.wrapping_add(1);
        let cost = cost_of(state, request.size) as f64;
        if !request.is_hit {
            self.head.own += cost;
        }
        let capacity = capacity >> self.head.shift;
        let mut counts = [0; COUNT];
        let mut paid = [0.0; COUNT];
        for (n, (count, paid)) in counts.iter_mut().zip(&mut paid).enumerate() {
            let (is_hit, keys) = self.simulate(n, key, state, capacity)?;
            (*count, *paid) = (keys, if is_hit { 0.0 } else { cost });
        }
        // Alike for all of them, however many keys each holds.
        let most = counts.iter().copied().max().unwrap_or(0) as f64;
        let fade = |by: f64| 1.0 - 1.0 / (by * most).max(FADE_LEAST);
        let head = &mut *self.head;
        for (sums, fade, power) in [
            (&mut head.costs, fade(FADE), 1),
            (&mut head.squares, fade(FADE), 2),
            (&mut head.recent, fade(FADE_SOON), 1),
            (&mut head.since, 1.0, 1),
        ] {
            for (sum, paid) in sums.iter_mut().zip(&paid) {
                *sum = *sum * fade + paid.powi(power);
            }
        }
        self.samples.remove_unheld(key)?;
        let best = self.best();
        let chosen = self.choose(current, best, cost)?;
        self.restart_one(best, chosen, counts, cost)?;
        if counts.into_iter().any(|keys| keys > MANY) {
            self.sample_fewer()?;
        }
        Ok(chosen as u32)
    }

    /// Adds a key that is new; `None` where it is not sampled any more.
    fn add(&mut self, request: Request, entries: u64) -> Result<Option<u32>> {
        if self.head.shift > 0 && entries >> self.head.shift < FEW {
            self.head.shift -= 1;
        }
        while self.samples.is_full() && self.head.shift < 63 {
            self.sample_fewer()?;
        }
        if !self.samples(request.key) {
            return Ok(None);
        }
        self.samples.add(request.key, request.size).map(Some)
    }

    fn sample_fewer(&mut self) -> Result<()> {
        self.head.shift = (self.head.shift + 1).min(63);
        let shift = self.head.shift;
        self.samples.retain(|key| is_sampled(key, shift))
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
        if lead <= self.head.inertia * self.deviation(current, least) + LEAD * self.cost(current) {
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
    fn restart_one(
        &mut self,
        best: usize,
        in_force: usize,
        counts: [u64; COUNT],
        least: f64,
    ) -> Result<()> {
        let n = (self.head.requests % COUNT as u64) as usize;
        let deviation = self.deviation(best, least);
        let keys = counts.get(n).copied().unwrap_or(0);
        let restarted = self.head.restarted.get(n).ok_or(OUTSIDE)?;
        let waited = self.head.requests.wrapping_sub(*restarted);
        if n == best || n == in_force || waited < PATIENCE * keys.max(FADE_LEAST as u64) {
            return Ok(());
        }
        // Also very lately: after the work has changed, what was best knows least of what is new.
        let [own, other] = [n, best].map(|n| self.head.recent.get(n).copied().unwrap_or(0.0));
        let is_behind = self.cost(n) > self.cost(best) + BEHIND * deviation
            && own > other + BEHIND / 2.0 * deviation;
        if !is_behind {
            return Ok(());
        }
        self.samples.copy(best, n)?;
        let (cost, square) = (
            self.cost(best) + BEHIND / 2.0 * deviation,
            self.deviation(best, 0.0),
        );
        let head = &mut *self.head;
        *head.costs.get_mut(n).ok_or(OUTSIDE)? = cost;
        *head.squares.get_mut(n).ok_or(OUTSIDE)? = square * square;
        *head.recent.get_mut(n).ok_or(OUTSIDE)? = other;
        *head.restarted.get_mut(n).ok_or(OUTSIDE)? = head.requests;
        Ok(())
    }

    /// Whether the key was there, and how many there are.
    fn simulate(
        &mut self,
        n: usize,
        key: u32,
        state: &PolicyState,
        capacity: u64,
    ) -> Result<(bool, u64)> {
        let (ruled, mut simulated) = self.samples.simulation(n)?;
        if simulated.holds(key)? {
            ruled.touch(&mut simulated, key)?;
            return Ok((true, simulated.totals().0));
        }
        let own = simulated.state_mut();
        (own.minimise, own.request_bytes) = (state.minimise, state.request_bytes);
        let size = simulated.size(key)?;
        let newcomer = Newcomer {
            hash: simulated.hash(key)?,
            size,
        };
        let is_full = simulated.totals().1.saturating_add(size) > capacity;
        if size > capacity || is_full && !ruled.admits(&mut simulated, newcomer)? {
            return Ok((false, simulated.totals().0));
        }
        let mut gone = Vec::new();
        while simulated.totals().1.saturating_add(size) > capacity {
            let Some(victim) = ruled.victim(&mut simulated)? else {
                break;
            };
            ruled.remove(&mut simulated, victim)?;
            if simulated.release(victim)? {
                gone.push(victim);
            }
        }
        simulated.hold(key)?;
        ruled.insert(&mut simulated, key, false)?;
        let count = simulated.totals().0;
        for i in gone {
            self.samples.remove_unheld(i)?;
        }
        Ok((false, count))
    }

    /// Recomputes the lists of the simulations; for tests.
    pub(super) fn validate(words: &[u64]) -> Result<()> {
        let mut copy = words.to_vec();
        let Some(mut learner) = Learner::of(&mut copy) else {
            return Ok(());
        };
        learner.samples.validate()
    }
}

const OUTSIDE: Error = Error::Corrupt("learner: a rule that is none");

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, the same each time.
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
    }

    /// Requests, in the way of the adaptive policy; memory that is damaged is emptied.
    fn observe(words: &mut [u64], numbers: &mut Numbers, count: usize) -> usize {
        let state = PolicyState {
            full_bytes: 500,
            ..PolicyState::default()
        };
        let mut damages = 0;
        for _ in 0..count {
            let key = (numbers.next() % 1000).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let request = Request {
                key,
                size: 1,
                is_hit: false,
            };
            let mut learner = Learner::of(words).unwrap();
            if learner.observe(request, 500, &state, 500).is_err() {
                words.fill(0);
                damages += 1;
            }
        }
        damages
    }

    #[test]
    fn memory_that_is_damaged_anywhere_is_learned_anew() {
        let mut numbers = Numbers(0x5EED);
        let mut sound = vec![0; WORDS];
        assert_eq!(observe(&mut sound, &mut numbers, 4000), 0);
        Learner::validate(&sound).unwrap();
        for round in 0..300 {
            let mut words = sound.clone();
            for _ in 0..=round % 20 {
                let at = numbers.next() as usize % WORDS;
                words[at] = match round % 3 {
                    0 => numbers.next(),
                    1 => words[at] ^ 1 << (numbers.next() % 64),
                    _ => words[numbers.next() as usize % WORDS],
                };
            }
            // Whatever happens, it ends.
            observe(&mut words, &mut numbers, 300);
        }
        let mut words: Vec<u64> = (0..WORDS).map(|_| numbers.next()).collect();
        observe(&mut words, &mut numbers, 300);
    }
}
