//! What will be read, and what goes before it.
//!
//! Plans belong to this process; each source of a pool has its own. In a shared index others bring entries in and
//! take them out, so an entry of a plan is looked at before it is believed.

use super::cache::{BATCH, Cache};
use super::keys::Cursor;
use super::peers::Peers;
use crate::arena::{ROOT, State};
use crate::error::Result;
use crate::policy::{Course, Entries, Eviction, NEVER, Plan};

/// Entries of the plan that one step passes over to find one that is in no plan; half as many after a step in
/// vain, down to the few.
const PASSES: u32 = 256;
const FEW_PASSES: u32 = 4;

/// Reads until a key is needed; greater than all others where it is not.
pub(super) type Distance = i64;
pub(super) const NOT_NEEDED: Distance = Distance::MAX;

/// The plans of all sources, and how long it is looked for what is in none.
#[derive(Debug)]
pub(super) struct Planned {
    /// Those of an index that is no pool are one.
    plans: Vec<Plan>,
    passes: u32,
}

impl Planned {
    fn of(&self, key: &str) -> Option<&Plan> {
        self.plans.iter().find(|plan| plan.covers(key))
    }

    /// Has an entry of this key, or of no key, be where it belongs; whether it has a next use.
    fn enter(&mut self, i: u32, key: Option<&str>) -> bool {
        let mut has_use = false;
        for plan in &mut self.plans {
            match key.filter(|key| plan.covers(key)) {
                Some(key) => has_use |= plan.enter(i, key),
                None => plan.leave(i),
            }
        }
        has_use
    }

    fn next_use(&self, key: &str) -> Distance {
        self.of(key)
            .map_or(NOT_NEEDED, |plan| distance(plan, plan.next_use(key)))
    }

    /// What is needed last: when, and its entry. Plans are compared by the reads that each has until then.
    fn farthest(&self) -> Option<(Distance, u32)> {
        let of_each = self.plans.iter().filter_map(|plan| {
            let (next, entry) = plan.farthest()?;
            Some((distance(plan, next), entry))
        });
        of_each.max()
    }

    fn entries(&self) -> usize {
        self.plans.iter().map(Plan::entries).sum()
    }
}

fn distance(plan: &Plan, next: u32) -> Distance {
    match next {
        NEVER => NOT_NEEDED,
        next => Distance::from(next) - Distance::from(plan.position()),
    }
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Goes by a plan from now on. Returns the one before of the same source, to be freed without the lock. What
    /// is there of the new one is found by [`Cache::match_plan`].
    pub fn set_plan(&mut self, plan: Plan) -> Option<Plan> {
        let before = self.forget_plan(plan.folder());
        let mut planned = self.planned.take().unwrap_or_else(|| {
            Box::new(Planned {
                plans: Vec::new(),
                passes: PASSES,
            })
        });
        plan.set_course(Some(Course::Followed));
        planned.plans.push(plan);
        planned.passes = PASSES;
        self.planned = Some(planned);
        before
    }

    /// Goes by no plan of the source of this folder any more. Returns it, to be freed without the lock.
    pub fn forget_plan(&mut self, folder: &str) -> Option<Plan> {
        let planned = self.planned.as_deref_mut()?;
        let at = planned.plans.iter().position(|p| p.folder() == folder)?;
        let plan = planned.plans.swap_remove(at);
        if planned.plans.is_empty() {
            self.planned = None;
        }
        plan.set_course(None);
        Some(plan)
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
            self.has_next_use(at)?;
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
        let Some(planned) = self.planned.as_deref_mut() else {
            return;
        };
        let Some(at) = planned.plans.iter().position(|plan| plan.covers(key)) else {
            if let Some(entry) = entry {
                planned.enter(entry, None);
            }
            return;
        };
        let plan = planned.plans.get_mut(at);
        let course = plan.map_or(Course::Followed, |plan| plan.read(key, entry));
        if course != Course::Followed {
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
            self.has_next_use(i)?;
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
        planned.map_or(0, |p| p.plans.iter().map(Plan::memory).sum())
    }

    /// Whether this is a `Live` entry of a key that the plan will read; it is told to the plan.
    fn has_next_use(&mut self, i: u32) -> Result<bool> {
        let cell = self.arena.get(i)?;
        let is_live = cell.is_entry() && cell.state() == State::Live;
        if !is_live {
            self.leave_plan(i);
            return Ok(false);
        }
        let key = self.arena.name(i)?.0;
        let planned = self.planned.as_deref_mut();
        Ok(planned.is_some_and(|planned| planned.enter(i, Some(&key))))
    }

    /// In how many reads a key is needed.
    pub(super) fn next_use(&self, key: &str) -> Distance {
        let planned = self.planned.as_deref();
        planned.map_or(NOT_NEEDED, |planned| planned.next_use(key))
    }

    /// The choice of the policy, or of the plan: what is in no plan, in the order of the policy, or else what is
    /// needed last; `None` where that is needed before a value with this next use, unless it has to go.
    pub(super) fn least_needed(
        &mut self,
        next_use: Distance,
        has_to_be: bool,
    ) -> Result<Option<u32>> {
        if self.planned.is_none() {
            return self.choice(has_to_be);
        }
        if let Some(i) = self.unplanned(next_use != NOT_NEEDED || has_to_be)? {
            return Ok(Some(i));
        }
        for _ in 0..BATCH {
            let planned = self.planned.as_deref();
            let Some((farthest, i)) = planned.and_then(Planned::farthest) else {
                // Nothing of the plan is there; the policy may let nothing go.
                return self.choice(has_to_be || next_use != NOT_NEEDED);
            };
            if S::EXCLUSIVE || self.has_next_use(i)? {
                // A second look may have found another key there.
                let planned = self.planned.as_deref();
                if planned.and_then(Planned::farthest) != Some((farthest, i)) {
                    continue;
                }
                return Ok((has_to_be || farthest > next_use).then_some(i));
            }
        }
        self.choice(has_to_be)
    }

    fn choice(&mut self, has_to_be: bool) -> Result<Option<u32>> {
        if has_to_be {
            self.policy.least(&mut self.arena)
        } else {
            self.policy.victim(&mut self.arena)
        }
    }

    /// The first entry without a next use, in the order of the policy. Those of the plan that come before it move
    /// to the other end, so that they are passed over once.
    fn unplanned(&mut self, has_to_be: bool) -> Result<Option<u32>> {
        let live = self.arena.header().live_entries;
        let Some(planned) = self.planned.as_deref() else {
            return Ok(None);
        };
        if S::EXCLUSIVE && planned.entries() as u64 >= live {
            return Ok(None);
        }
        let passes = planned.passes;
        let mut found = None;
        for _ in 0..passes {
            let Some(i) = self.choice(has_to_be)? else {
                break;
            };
            if !self.has_next_use(i)? {
                found = Some(i);
                break;
            }
            self.pass_over(i)?;
        }
        if let Some(planned) = self.planned.as_deref_mut() {
            planned.passes = match found {
                Some(_) => PASSES,
                None if S::EXCLUSIVE => PASSES,
                None => (passes / 2).max(FEW_PASSES),
            };
        }
        Ok(found)
    }

    fn pass_over(&mut self, i: u32) -> Result<()> {
        let list = self.arena.list_of(i)?;
        if Entries::neighbour(&self.arena, i, true)? != 0 {
            return self.arena.move_to(i, list);
        }
        // The policy goes from the last one.
        Entries::unlink(&mut self.arena, list, i)?;
        Entries::link(&mut self.arena, list, i, false)
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
            known += usize::from(plan.is_some_and(|p| p.has(i) && p.next_use(&key) != NEVER));
        }
        // In a shared index others have taken some.
        let are_sound = planned.plans.iter().all(Plan::is_sound);
        Ok(are_sound && (!S::EXCLUSIVE || known == planned.entries()))
    }
}
