//! Which rule fits the traffic: small simulations of all of them, on keys sampled by their hash.
//!
//! Each simulation sees the same keys, and has the same part of the bytes of the cache. What their misses have
//! cost lately decides. Three things keep that honest:
//!
//! - A simulation that has fallen behind goes on from the keys of the best one: it stands for what the cache would
//!   do if it went by its rule from now on.
//! - Where the cache misses far more than the simulation of its own rule does, it lets go of what it holds.
//! - A change of the rule that did not pay, by the misses of the cache itself, doubles the lead that the next one
//!   takes; one that did halves it. So traffic that goes back and forth does not drag the rule with it.

use bytemuck::{Pod, Zeroable};

use super::entries::Entries;
use super::evidence::{Evidence, FADE_LEAST, Paid};
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

/// Requests for each key of a simulation before that happens again.
const PATIENCE: u64 = 2;
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Head {
    evidence: Evidence,
    /// When each simulation went on from the best one.
    restarted: [u64; COUNT],
    /// Of 2 to the power of so many keys one is sampled.
    shift: u64,
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
fn is_sampled(key: u64, shift: u64) -> bool {
    key.checked_shr(64 - shift as u32).unwrap_or(0) == 0
}

impl<'a> Learner<'a> {
    /// The learner in this memory; zeros are one that has seen nothing.
    pub(super) fn of(words: &'a mut [u64]) -> Option<Self> {
        let (head, rest) = words.split_at_mut_checked(HEAD)?;
        let samples = Samples::of(rest).ok()?;
        let head: &mut Head = bytemuck::try_from_bytes_mut(bytemuck::cast_slice_mut(head)).ok()?;
        head.shift = head.shift.min(63);
        head.evidence.repair();
        Some(Learner { head, samples })
    }

    /// Whether a key is sampled.
    pub(super) fn samples(&self, key: u64) -> bool {
        is_sampled(key, self.head.shift)
    }

    /// Takes a request into account. Returns the rule that the cache should go by, which was `state.rule`, and whether it
    /// lets go of what it holds first.
    pub(super) fn observe(
        &mut self,
        request: Request,
        entries: u64,
        state: &PolicyState,
        capacity: u64,
    ) -> Result<(u16, bool)> {
        let current = usize::from(state.rule).min(COUNT - 1);
        let key = match self.samples.find(request.key)? {
            0 => self.add(request, entries)?,
            key => Some(key),
        };
        let Some(key) = key else {
            return Ok((current as u16, self.head.evidence.renews()));
        };
        let cost = cost_of(state, request.size) as f64;
        let capacity = capacity >> self.head.shift;
        let mut counts = [0; COUNT];
        let mut simulated = [0.0; COUNT];
        for (n, (count, paid)) in counts.iter_mut().zip(&mut simulated).enumerate() {
            let (is_hit, keys) = self.simulate(n, key, state, capacity)?;
            (*count, *paid) = (keys, if is_hit { 0.0 } else { cost });
        }
        // Alike for all of them, however many keys each holds.
        let most = counts.iter().copied().max().unwrap_or(0) as f64;
        let evidence = &mut self.head.evidence;
        let paid = Paid {
            simulated,
            own: if request.is_hit { 0.0 } else { cost },
            at_most: cost,
        };
        evidence.note(current, paid, most);
        self.samples.remove_unheld(key)?;
        let best = evidence.best();
        let chosen = evidence.choose(current, best, most);
        self.restart_one(best, chosen, counts)?;
        if counts.into_iter().any(|keys| keys > MANY) {
            self.sample_fewer()?;
        }
        Ok((chosen as u16, self.head.evidence.renews()))
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
        self.samples.retain(|key| is_sampled(key, shift))?;
        // What a simulation holds when it is full is half of what it was. Else it would see room where there is none, and
        // compare nothing.
        for n in 0..COUNT {
            let (_, mut simulated) = self.samples.simulation(n)?;
            simulated.state_mut().full_bytes /= 2;
        }
        Ok(())
    }

    /// Looks at one simulation, another one each time.
    fn restart_one(&mut self, best: usize, in_force: usize, counts: [u64; COUNT]) -> Result<()> {
        let evidence = &mut self.head.evidence;
        let n = (evidence.requests() % COUNT as u64) as usize;
        let keys = counts.get(n).copied().unwrap_or(0);
        let restarted = self.head.restarted.get_mut(n).ok_or(OUTSIDE)?;
        let waited = evidence.requests().wrapping_sub(*restarted);
        if n == best || n == in_force || waited < PATIENCE * keys.max(FADE_LEAST as u64) {
            return Ok(());
        }
        if evidence.is_behind(n, best) {
            self.samples.copy(best, n)?;
            evidence.restart(n, best);
            *restarted = evidence.requests();
        }
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
        let wanted = simulated.totals().1.saturating_add(size);
        let newcomer = Newcomer {
            hash: simulated.hash(key)?,
            size,
            room: wanted.saturating_sub(capacity),
            is_alone: true,
        };
        if size > capacity {
            return Ok((false, simulated.totals().0));
        }
        if wanted > capacity && !ruled.admits(&mut simulated, newcomer)? {
            ruled.turn_away(&mut simulated, newcomer.hash)?;
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
