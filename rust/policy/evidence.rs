//! What the misses of simulations have cost, and which rule follows from it.

use bytemuck::{Pod, Zeroable};

use super::samples::COUNT;

/// Requests for each key of a simulation by which what misses have cost fades.
const FADE: f64 = 4.0;
/// The same for what they have cost very lately.
const FADE_SOON: f64 = 1.0;
/// The same where there are few keys.
pub(super) const FADE_LEAST: f64 = 100.0;
/// How many deviations a simulation falls behind before it goes on from the best one.
const BEHIND: f64 = 4.0;
/// By which part of its cost another rule has to be better in any case: a change costs misses as well.
const LEAD: f64 = 0.01;
/// By how many times the cache misses more than the rule in force does in its simulation before that is not believed.
const ASTRAY: f64 = 2.0;
/// Requests for each key of a simulation after a change, or after the cache was renewed, before it can be compared with
/// it.
const SETTLED: f64 = 2.0;
/// Misses for each key of a simulation since the last change of the rule before it can be compared with it: what the
/// cache holds becomes what the rule would keep only as it misses.
const TURNOVER: f64 = 1.0;
/// Requests for each key of a simulation within which the cache is renewed.
const RENEWAL: f64 = 1.0;
/// The most that a change of the rule takes, in deviations. With twice as many a rule that has come to serve nothing
/// would never be left.
const INERTIA: f64 = 6.0;

/// Sums over the sampled requests, in memory that is not trusted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct Evidence {
    /// Sampled requests, and those before the last change of the rule.
    requests: u64,
    changed: u64,
    /// What the misses of each simulation have cost lately, and the squares of it.
    costs: [f64; COUNT],
    squares: [f64; COUNT],
    /// What they have cost very lately, and since the last change.
    recent: [f64; COUNT],
    since: [f64; COUNT],
    /// What the misses of the cache have cost lately, and since the last change.
    missed: f64,
    own: f64,
    /// Deviations by which another rule has to lead.
    inertia: f64,
    /// The rule before the last change, plus one; 0 before the first.
    previous: u64,
    /// Requests until which the cache lets go of what it holds.
    renews_until: u64,
}

fn at(numbers: &[f64; COUNT], n: usize) -> f64 {
    numbers.get(n).copied().unwrap_or(0.0)
}

fn set(numbers: &mut [f64; COUNT], n: usize, to: f64) {
    if let Some(number) = numbers.get_mut(n) {
        *number = to;
    }
}

/// Makes 0 of what is no sum of costs.
#[inline]
fn repair<const N: usize>(numbers: &mut [f64; N]) {
    *numbers = numbers.map(|number| {
        let is_sound = (0.0..=f64::MAX).contains(&number);
        if is_sound { number } else { 0.0 }
    });
}

impl Evidence {
    /// Makes numbers of what cannot be.
    pub(super) fn repair(&mut self) {
        if !(1.0..=INERTIA).contains(&self.inertia) {
            self.inertia = 1.0;
        }
        // With each request: no iterator that has to be asked where it is, and no branch for each number.
        for numbers in [
            &mut self.costs,
            &mut self.squares,
            &mut self.recent,
            &mut self.since,
        ] {
            repair(numbers);
        }
        let mut others = [self.missed, self.own];
        repair(&mut others);
        [self.missed, self.own] = others;
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests
    }

    /// Takes a request into account: what it has cost in each simulation and in the cache, and how many keys the
    /// simulations hold at most.
    pub(super) fn note(&mut self, paid: [f64; COUNT], own: f64, keys: f64) {
        self.requests = self.requests.wrapping_add(1);
        let fade = |by: f64| 1.0 - 1.0 / (by * keys).max(FADE_LEAST);
        let squares = paid.map(|paid| paid * paid);
        for (sums, fade, more) in [
            (&mut self.costs, fade(FADE), paid),
            (&mut self.squares, fade(FADE), squares),
            (&mut self.recent, fade(FADE_SOON), paid),
            (&mut self.since, 1.0, paid),
        ] {
            for (sum, more) in sums.iter_mut().zip(more) {
                *sum = *sum * fade + more;
            }
        }
        self.missed = self.missed * fade(FADE) + own;
        self.own += own;
    }

    /// The deviation of what misses have cost in a simulation.
    fn deviation(&self, n: usize, least: f64) -> f64 {
        at(&self.squares, n).sqrt().max(least)
    }

    /// The rule with the least cost; the first of them where several have it.
    pub(super) fn best(&self) -> usize {
        let best = (0..COUNT).min_by(|a, b| at(&self.costs, *a).total_cmp(&at(&self.costs, *b)));
        best.unwrap_or(0)
    }

    /// Whether the cache has come to hold what is of no use, and its rule does not let it go: such as the rest of a
    /// loop that has become shorter. The simulation of that rule may have had better luck.
    fn is_astray(&self, current: usize, least: f64, keys: f64) -> bool {
        let since = self
            .requests
            .saturating_sub(self.changed.max(self.renews_until)) as f64;
        let missed = self.own > TURNOVER * keys * least;
        let most = ASTRAY * at(&self.costs, current) + BEHIND * self.deviation(current, least);
        since > SETTLED * keys && missed && self.missed > most
    }

    /// Whether the cache lets go of what it holds, so that what is asked for now gets in. Another rule would not help:
    /// the simulation of this one shows what it is worth.
    pub(super) fn renews(&self) -> bool {
        self.requests < self.renews_until
    }

    /// The rule to go by: the one in force, unless another leads by more than chance explains. `least` is the cost of
    /// one miss.
    pub(super) fn choose(&mut self, current: usize, best: usize, least: f64, keys: f64) -> usize {
        if self.is_astray(current, least, keys) {
            let requests = (RENEWAL * keys).max(FADE_LEAST) as u64;
            self.renews_until = self.requests.saturating_add(requests);
        }
        let cost = at(&self.costs, current);
        let (lead, deviation) = (cost - at(&self.costs, best), self.deviation(current, least));
        if best == current || lead <= self.inertia * deviation + LEAD * cost {
            return current;
        }
        if let Some(previous) = self.previous.checked_sub(1) {
            let without = at(&self.since, previous as usize);
            let factor = if self.own > without { 2.0 } else { 0.5 };
            self.inertia = (self.inertia * factor).clamp(1.0, INERTIA);
        }
        (self.since, self.own) = ([0.0; COUNT], 0.0);
        self.changed = self.requests;
        self.previous = current as u64 + 1;
        best
    }

    /// Whether a simulation has fallen behind the best one, also very lately: after the work has changed, what was
    /// best knows least of what is new.
    pub(super) fn is_behind(&self, n: usize, best: usize, least: f64) -> bool {
        let deviation = self.deviation(best, least);
        at(&self.costs, n) > at(&self.costs, best) + BEHIND * deviation
            && at(&self.recent, n) > at(&self.recent, best) + BEHIND / 2.0 * deviation
    }

    /// A simulation goes on from the keys of the best one.
    pub(super) fn restart(&mut self, n: usize, best: usize, least: f64) {
        let cost = at(&self.costs, best) + BEHIND / 2.0 * self.deviation(best, least);
        let (square, recent) = (at(&self.squares, best), at(&self.recent, best));
        set(&mut self.costs, n, cost);
        set(&mut self.squares, n, square);
        set(&mut self.recent, n, recent);
    }
}
