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
    /// What the misses of each simulation have cost lately.
    costs: [f64; COUNT],
    /// The squares of it, of the requests that either it or the simulation of the rule in force has served alone.
    apart: [f64; COUNT],
    /// What they have cost very lately, and since the last change.
    recent: [f64; COUNT],
    since: [f64; COUNT],
    /// What the misses of the cache have cost lately, and since the last change.
    missed: f64,
    own: f64,
    /// What a miss of any of the requests would have cost lately, in the mean.
    unit: f64,
    /// Deviations by which another rule has to lead.
    inertia: f64,
    /// The rule before the last change, plus one; 0 before the first.
    previous: u64,
    /// Requests until which the cache lets go of what it holds.
    renews_until: u64,
}

/// What one request has cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paid {
    /// In each simulation, and in the cache; 0 where it was served.
    pub(super) simulated: [f64; COUNT],
    pub(super) own: f64,
    /// As a miss.
    pub(super) at_most: f64,
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
            &mut self.apart,
            &mut self.recent,
            &mut self.since,
        ] {
            repair(numbers);
        }
        let mut others = [self.missed, self.own, self.unit];
        repair(&mut others);
        [self.missed, self.own, self.unit] = others;
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests
    }

    /// Takes a request into account, under the rule in force: what a miss of it costs, what it has cost in each
    /// simulation and in the cache, and how many keys the simulations hold at most.
    pub(super) fn note(&mut self, current: usize, paid: Paid, keys: f64) {
        self.requests = self.requests.wrapping_add(1);
        let within = |by: f64| (by * keys).max(FADE_LEAST);
        let fade = |by: f64| 1.0 - 1.0 / within(by);
        let in_force = at(&paid.simulated, current);
        let apart = paid.simulated.map(|paid| (paid - in_force).powi(2));
        for (sums, fade, more) in [
            (&mut self.costs, fade(FADE), paid.simulated),
            (&mut self.apart, fade(FADE), apart),
            (&mut self.recent, fade(FADE_SOON), paid.simulated),
            (&mut self.since, 1.0, paid.simulated),
        ] {
            for (sum, more) in sums.iter_mut().zip(more) {
                *sum = *sum * fade + more;
            }
        }
        self.missed = self.missed * fade(FADE) + paid.own;
        self.own += paid.own;
        let seen = (self.requests as f64).clamp(1.0, within(FADE));
        self.unit += (paid.at_most - self.unit) / seen;
    }

    /// The deviation of what misses have cost in a simulation. Of values of different sizes it is that of as many bytes in
    /// values of equal size: the few largest would hide any lead, and mostly they are misses under each rule.
    fn deviation(&self, n: usize) -> f64 {
        (at(&self.costs, n) * self.unit).sqrt().max(self.unit)
    }

    /// The lead of another rule that chance explains. The past is told by the requests that only one of both serves, yet
    /// what comes may be other work, so half of it is the deviation of all misses.
    fn chance(&self, current: usize, other: usize) -> f64 {
        let squares = at(&self.costs, current) * self.unit;
        let chance = (0.5 * (at(&self.apart, other) + squares)).sqrt();
        chance.max(self.unit)
    }

    /// The rule with the least cost; the first of them where several have it.
    pub(super) fn best(&self) -> usize {
        let best = (0..COUNT).min_by(|a, b| at(&self.costs, *a).total_cmp(&at(&self.costs, *b)));
        best.unwrap_or(0)
    }

    /// Whether the cache has come to hold what is of no use, and its rule does not let it go: such as the rest of a
    /// loop that has become shorter. The simulation of that rule may have had better luck.
    fn is_astray(&self, current: usize, keys: f64) -> bool {
        let since = self
            .requests
            .saturating_sub(self.changed.max(self.renews_until)) as f64;
        let missed = self.own > TURNOVER * keys * self.unit;
        let most = ASTRAY * at(&self.costs, current) + BEHIND * self.deviation(current);
        since > SETTLED * keys && missed && self.missed > most
    }

    /// Whether the cache lets go of what it holds, so that what is asked for now gets in. Another rule would not help:
    /// the simulation of this one shows what it is worth.
    pub(super) fn renews(&self) -> bool {
        self.requests < self.renews_until
    }

    /// The rule to go by: the one in force, unless another leads by more than chance explains.
    pub(super) fn choose(&mut self, current: usize, best: usize, keys: f64) -> usize {
        if self.is_astray(current, keys) {
            let requests = (RENEWAL * keys).max(FADE_LEAST) as u64;
            self.renews_until = self.requests.saturating_add(requests);
        }
        let cost = at(&self.costs, current);
        let lead = cost - at(&self.costs, best);
        if best == current || lead <= self.inertia * self.chance(current, best) + LEAD * cost {
            return current;
        }
        if let Some(previous) = self.previous.checked_sub(1) {
            let without = at(&self.since, previous as usize);
            let factor = if self.own > without { 2.0 } else { 0.5 };
            self.inertia = (self.inertia * factor).clamp(1.0, INERTIA);
        }
        (self.since, self.own) = ([0.0; COUNT], 0.0);
        // At most: what two of them have served alone one has served without the third.
        let apart = at(&self.apart, best);
        self.apart = self.apart.map(|other| other + apart);
        set(&mut self.apart, best, 0.0);
        self.changed = self.requests;
        self.previous = current as u64 + 1;
        best
    }

    /// Whether a simulation has fallen behind the best one, also very lately: after the work has changed, what was
    /// best knows least of what is new.
    pub(super) fn is_behind(&self, n: usize, best: usize) -> bool {
        let deviation = self.deviation(best);
        at(&self.costs, n) > at(&self.costs, best) + BEHIND * deviation
            && at(&self.recent, n) > at(&self.recent, best) + BEHIND / 2.0 * deviation
    }

    /// A simulation goes on from the keys of the best one.
    pub(super) fn restart(&mut self, n: usize, best: usize) {
        let more = BEHIND / 2.0 * self.deviation(best);
        let cost = at(&self.costs, best) + more;
        // As if it had not served what it is said to have missed.
        let apart = at(&self.apart, best) + more * self.unit;
        let recent = at(&self.recent, best);
        set(&mut self.costs, n, cost);
        set(&mut self.apart, n, apart);
        set(&mut self.recent, n, recent);
    }
}
