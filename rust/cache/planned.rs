//! What will be read, and what goes before it.
//!
//! When a value in no plan is needed is not known: it is taken to be as far away as its last use lies back. By this
//! measure what is needed last goes first.
//!
//! Plans belong to this process; each source of a pool has its own. In a shared index others bring entries in and
//! take them out, so an entry of a plan is looked at before it is believed.

use std::cmp::Ordering;

use super::cache::{BATCH, Cache};
use super::keys::Cursor;
use super::peers::Peers;
use crate::arena::{End, List, ROOT, State};
use crate::error::Result;
use crate::policy::{Course, Distance, Entries, Eviction, NEVER, Plan, Recent};

/// Entries of the plan that one step passes over to find one that is in no plan; half as many after a step in
/// vain, down to the few.
const PASSES: u32 = 256;
const FEW_PASSES: u32 = 4;

/// Where nothing tells when a value is needed: later than all others.
const UNKNOWN: Distance = Distance::MAX;

/// When a value that needs room is needed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    reads: Distance,
    /// Whether a plan has a use for it. All else is the business of the policy as well.
    pub(super) is_planned: bool,
}

impl Need {
    pub(super) const UNKNOWN: Need = Need {
        reads: UNKNOWN,
        is_planned: false,
    };
}

/// The plans of all sources, what is read beside them, and how long it is looked for what is in none.
#[derive(Debug)]
pub(super) struct Planned {
    /// Those of an index that is no pool are one.
    plans: Vec<Plan>,
    /// By the reads of all plans.
    recent: Recent,
    passes: u32,
}

impl Planned {
    fn of(&self, key: &str) -> Option<&Plan> {
        self.plans.iter().find(|plan| plan.covers(key))
    }

    /// Removes the plan of the source of this folder.
    fn remove(&mut self, folder: &str) -> Option<Plan> {
        let at = self.plans.iter().position(|p| p.folder() == folder)?;
        let plan = self.plans.swap_remove(at);
        plan.set_course(None);
        Some(plan)
    }

    /// Has an entry of this key, or of no key, be where it belongs; whether the key is in a plan.
    fn enter(&mut self, i: u32, key: Option<&str>) -> bool {
        let mut is_planned = false;
        for plan in &mut self.plans {
            match key.filter(|key| plan.covers(key)) {
                Some(key) => is_planned |= plan.enter(i, key),
                None => plan.leave(i),
            }
        }
        is_planned
    }

    /// A key is read; what has become of its plan, and where that is.
    fn read(&mut self, key: &str, entry: Option<u32>, entries: u64) -> Option<(usize, Course)> {
        let at = self.plans.iter().position(|plan| plan.covers(key));
        let plan = at.and_then(|at| self.plans.get_mut(at));
        let Some(plan) = plan else {
            self.recent.read(key, entries);
            if let Some(entry) = entry {
                self.enter(entry, None);
            }
            return None;
        };
        let before = plan.position();
        let course = plan.read(key, entry);
        self.recent.pass(plan.position() - before);
        if plan.need(key).is_none() {
            self.recent.read(key, entries);
        }
        Some((at?, course))
    }

    /// When a value is needed that was read just now.
    fn need(&self, key: &str) -> Need {
        let plan = self.of(key);
        match plan.and_then(|plan| plan.need(key)) {
            Some(reads) => Need {
                reads,
                is_planned: plan.is_some_and(|plan| plan.next_use(key) != NEVER),
            },
            None => Need {
                reads: self.distance(self.recent.age_before(key)),
                is_planned: false,
            },
        }
    }

    /// In how many reads a value in no plan is needed: as many as its last use lies back.
    fn unplanned(&self, key: &str) -> Distance {
        self.distance(self.recent.age(key))
    }

    /// Reads of one plan, of so many of all: each is taken to be read as fast as any other.
    fn distance(&self, age: Option<u32>) -> Distance {
        let plans = self.plans.len().max(1) as Distance;
        age.map_or(UNKNOWN, |age| Distance::from(age) / plans)
    }

    /// What is needed last of the keys of the plans: when, and its entry. Plans are compared by the reads that each
    /// has until then.
    fn farthest(&self) -> Option<(Distance, u32)> {
        self.plans.iter().filter_map(Plan::farthest).max()
    }

    fn has(&self, i: u32) -> bool {
        self.plans.iter().any(|plan| plan.has(i))
    }

    fn entries(&self) -> usize {
        self.plans.iter().map(Plan::entries).sum()
    }
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Goes by a plan from now on. Returns the one before of the same source, to be freed without the lock. What
    /// is there of the new one is found by [`Cache::match_plan`].
    pub fn set_plan(&mut self, plan: Plan) -> Option<Plan> {
        let planned = self.planned.get_or_insert_with(|| {
            Box::new(Planned {
                plans: Vec::new(),
                recent: Recent::default(),
                passes: PASSES,
            })
        });
        let before = planned.remove(plan.folder());
        plan.set_course(Some(Course::Followed));
        planned.plans.push(plan);
        planned.passes = PASSES;
        before
    }

    /// Goes by no plan of the source of this folder any more. Returns it, to be freed without the lock.
    pub fn forget_plan(&mut self, folder: &str) -> Option<Plan> {
        let planned = self.planned.as_deref_mut()?;
        let plan = planned.remove(folder);
        if planned.plans.is_empty() {
            self.planned = None;
        }
        plan
    }

    /// Goes by no plan any more.
    pub(super) fn forget_plans(&mut self) {
        if let Some(planned) = self.planned.take() {
            for plan in &planned.plans {
                plan.set_course(None);
            }
        }
    }

    /// Finds entries of the plan, a batch at a time; where to go on, or `None` at the end.
    pub fn match_plan(&mut self, (from, end): Cursor) -> Result<Option<Cursor>> {
        // The index may have been emptied meanwhile.
        let end = end.min(self.arena.header().cells_used);
        let stop = end.min(from.saturating_add(BATCH as u32));
        if self.planned.is_none() {
            return Ok(None);
        }
        for at in from.max(ROOT)..stop {
            self.is_in_plan(at)?;
        }
        Ok((stop < end).then_some((stop, end)))
    }

    /// A key is read, which this entry has served.
    #[inline]
    pub(super) fn read_planned(&mut self, key: &str, entry: Option<u32>) {
        if self.planned.is_some() {
            self.advance_plan(key, entry);
        }
    }

    #[cold]
    fn advance_plan(&mut self, key: &str, entry: Option<u32>) {
        let entries = self.arena.header().live_entries;
        let Some(planned) = self.planned.as_deref_mut() else {
            return;
        };
        if let Some((at, course)) = planned.read(key, entry, entries)
            && course != Course::Followed
        {
            planned.plans.swap_remove(at).set_course(Some(course));
            if planned.plans.is_empty() {
                self.planned = None;
            }
        }
    }

    /// An entry has become `Live`.
    #[inline]
    pub(super) fn enter_plan(&mut self, i: u32) -> Result<()> {
        if self.planned.is_some() {
            self.is_in_plan(i)?;
        }
        Ok(())
    }

    /// An entry is `Live` no longer.
    #[inline]
    pub(super) fn leave_plan(&mut self, i: u32) {
        if let Some(planned) = self.planned.as_deref_mut() {
            planned.enter(i, None);
        }
    }

    /// All entries are gone.
    pub(super) fn empty_plan(&mut self) {
        if let Some(planned) = self.planned.as_deref_mut() {
            planned.plans.iter_mut().for_each(Plan::leave_all);
        }
    }

    /// Bytes of memory.
    pub(super) fn plan_memory(&self) -> usize {
        let planned = self.planned.as_ref();
        planned.map_or(0, |p| {
            p.recent.memory() + p.plans.iter().map(Plan::memory).sum::<usize>()
        })
    }

    /// Whether this is a `Live` entry of a key of a plan; it is told to the plan.
    fn is_in_plan(&mut self, i: u32) -> Result<bool> {
        let cell = self.arena.get(i)?;
        let is_live = cell.is_entry() && cell.state() == State::Live;
        if !is_live {
            self.leave_plan(i);
            return Ok(false);
        }
        if S::EXCLUSIVE && self.planned.as_deref().is_some_and(|p| p.has(i)) {
            return Ok(true);
        }
        let key = self.arena.name(i)?.0;
        let planned = self.planned.as_deref_mut();
        Ok(planned.is_some_and(|planned| planned.enter(i, Some(&key))))
    }

    /// When a value that was read just now is needed.
    pub(super) fn need(&self, key: &str) -> Need {
        let planned = self.planned.as_deref();
        planned.map_or(Need::UNKNOWN, |planned| planned.need(key))
    }

    /// The choice of the policy; with plans what is needed last, if later than this value, unless it has to go. Of
    /// what is in no plan it is the choice of the policy that is compared.
    pub(super) fn least_needed(&mut self, need: Need, has_to_be: bool) -> Result<Option<u32>> {
        if self.planned.is_none() {
            return self.choice(has_to_be);
        }
        let other = self.first_unplanned()?;
        // Of both, what is in no plan, where as much is known of either.
        let last = match (other, self.farthest()?) {
            (Some(other), Some(farthest)) if farthest.0 > other.0 => farthest,
            (Some(last), _) | (None, Some(last)) => last,
            (None, None) => return self.choice(has_to_be || need.is_planned),
        };
        let goes = match last.0.cmp(&need.reads) {
            _ if has_to_be => true,
            Ordering::Less => false,
            Ordering::Equal => !need.is_planned && self.choice(false)?.is_some(),
            Ordering::Greater => true,
        };
        let victim = goes.then_some(last.1);
        if let Some((_, i)) = other
            && victim != Some(i)
            && Entries::neighbour(&self.arena, i, End::Last)? == 0
        {
            // The policy does not order by use, so another may be needed later: that is looked at next.
            self.pass_over(i)?;
        }
        Ok(victim)
    }

    /// What is needed last of the keys of the plans: when, and its entry.
    fn farthest(&mut self) -> Result<Option<(Distance, u32)>> {
        for _ in 0..BATCH {
            let farthest = self.planned.as_deref().and_then(Planned::farthest);
            let Some((_, i)) = farthest else {
                return Ok(None);
            };
            // Others may have put another key there; a second look finds that.
            if S::EXCLUSIVE || self.is_in_plan(i)? {
                let again = self.planned.as_deref().and_then(Planned::farthest);
                if again == farthest {
                    return Ok(farthest);
                }
            }
        }
        Ok(None)
    }

    fn choice(&mut self, has_to_be: bool) -> Result<Option<u32>> {
        if has_to_be {
            self.policy.least(&mut self.arena)
        } else {
            self.policy.victim(&mut self.arena)
        }
    }

    /// Of the keys in no plan what is needed last, and when: the first one of each list is compared. Where that is as late,
    /// it is the one of the list that the policy goes on with.
    fn first_unplanned(&mut self) -> Result<Option<(Distance, u32)>> {
        let live = self.arena.header().live_entries;
        let Some(planned) = self.planned.as_deref() else {
            return Ok(None);
        };
        if S::EXCLUSIVE && planned.entries() as u64 >= live {
            return Ok(None);
        }
        let passes = planned.passes;
        let Some(next) = self.choice(true)? else {
            return Ok(None);
        };
        let lists = match self.arena.list_of(next)? {
            List::Main => [List::Main, List::Recency],
            _ => [List::Recency, List::Main],
        };
        let mut last: Option<(Distance, u32)> = None;
        for list in lists {
            let found = self.first_unplanned_of(list, passes)?;
            if found.map(|found| found.0) > last.map(|last| last.0) {
                last = found;
            }
        }
        if let Some(planned) = self.planned.as_deref_mut() {
            planned.passes = match last {
                Some(_) => PASSES,
                None => (passes / 2).max(FEW_PASSES),
            };
        }
        Ok(last)
    }

    /// The first entry in a list of a key in no plan. Those of plans that come before it move to the other end, so that
    /// they are passed over once.
    fn first_unplanned_of(&mut self, list: List, passes: u32) -> Result<Option<(Distance, u32)>> {
        for _ in 0..passes {
            let Some(i) = self.policy.first_of(&mut self.arena, list)? else {
                break;
            };
            if !self.is_in_plan(i)? {
                let key = self.arena.name(i)?.0;
                let planned = self.planned.as_deref();
                return Ok(planned.map(|planned| (planned.unplanned(&key), i)));
            }
            self.pass_over(i)?;
        }
        Ok(None)
    }

    fn pass_over(&mut self, i: u32) -> Result<()> {
        let list = self.arena.list_of(i)?;
        if Entries::neighbour(&self.arena, i, End::Last)? != 0 {
            return self.arena.move_to(i, list);
        }
        // The policy goes from the last one.
        Entries::unlink(&mut self.arena, list, i)?;
        Entries::link(&mut self.arena, list, i, End::First)
    }

    /// Whether the plan agrees with the entries; for tests.
    pub(super) fn is_plan_sound(&self) -> Result<bool> {
        let Some(planned) = self.planned.as_deref() else {
            return Ok(true);
        };
        let mut known = 0;
        for i in self.policy.order(&self.arena)? {
            let key = self.arena.name(i)?.0;
            let plan = planned.of(&key);
            known += usize::from(plan.is_some_and(|p| p.has(i) && p.need(&key).is_some()));
        }
        // In a shared index others have taken some.
        let are_sound = planned.plans.iter().all(Plan::is_sound);
        Ok(are_sound && (!S::EXCLUSIVE || known == planned.entries()))
    }
}
