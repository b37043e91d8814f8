//! What will be read, and what goes before it.
//!
//! The plan belongs to this process. In a shared index others bring entries in and take them out, so an entry of
//! the plan is looked at before it is believed.

use std::sync::atomic::Ordering;

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

/// What the tally says of the plan.
const NO_PLAN: u32 = 0;
const FOLLOWED: u32 = 1;
const DONE: u32 = 2;
const WRONG: u32 = 3;

/// A plan, and how long it is looked for what is in none.
#[derive(Debug)]
pub(super) struct Planned {
    plan: Plan,
    passes: u32,
}

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// Goes by a plan from now on, or by none. Returns the plan before, to be freed without the lock. What is
    /// there of the new one is found by [`Cache::match_plan`].
    pub fn set_plan(&mut self, plan: Option<Plan>) -> Option<Plan> {
        let state = if plan.is_some() { FOLLOWED } else { NO_PLAN };
        self.tally.plan.store(state, Ordering::Relaxed);
        let planned = plan.map(|plan| {
            let passes = PASSES;
            Box::new(Planned { plan, passes })
        });
        let before = std::mem::replace(&mut self.planned, planned);
        before.map(|before| before.plan)
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
        let state = match planned.plan.read(key, entry) {
            Course::Followed => return,
            Course::Done => DONE,
            Course::Wrong => WRONG,
        };
        self.tally.plan.store(state, Ordering::Relaxed);
        self.planned = None;
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
            planned.plan.leave(i);
        }
    }

    /// All entries are gone.
    pub(super) fn empty_plan(&mut self) {
        if let Some(planned) = self.planned.as_deref_mut() {
            planned.plan.leave_all();
        }
    }

    /// Bytes of memory.
    pub(super) fn plan_memory(&self) -> usize {
        self.planned.as_ref().map_or(0, |p| p.plan.memory())
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
        Ok(planned.is_some_and(|planned| planned.plan.enter(i, &key)))
    }

    /// When a key is used next; later than all others without a plan.
    pub(super) fn next_use(&self, key: &str) -> u32 {
        let planned = self.planned.as_deref();
        planned.map_or(NEVER, |planned| planned.plan.next_use(key))
    }

    /// The choice of the policy, or of the plan: what is in no plan, in the order of the policy, or else what is
    /// needed last; `None` where that is needed before a value with this next use, unless it has to go.
    pub(super) fn least_needed(&mut self, next_use: u32, has_to_be: bool) -> Result<Option<u32>> {
        if self.planned.is_none() {
            return self.choice(has_to_be);
        }
        if let Some(i) = self.unplanned(next_use != NEVER || has_to_be)? {
            return Ok(Some(i));
        }
        for _ in 0..BATCH {
            let planned = self.planned.as_deref();
            let Some((farthest, i)) = planned.and_then(|planned| planned.plan.farthest()) else {
                // Nothing of the plan is there; the policy may let nothing go.
                return self.choice(has_to_be || next_use != NEVER);
            };
            if S::EXCLUSIVE || self.has_next_use(i)? {
                // A second look may have found another key there.
                let planned = self.planned.as_deref();
                if planned.and_then(|planned| planned.plan.farthest()) != Some((farthest, i)) {
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
        if S::EXCLUSIVE && planned.plan.entries() as u64 >= live {
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
            let has_use = planned.plan.next_use(&self.arena.name(i)?.0) != NEVER;
            known += usize::from(planned.plan.has(i) && has_use);
        }
        // In a shared index others have taken some.
        let all = planned.plan.entries();
        Ok(planned.plan.is_sound() && (!S::EXCLUSIVE || known == all))
    }
}
