//! What will be read.
//!
//! When a value in no plan is needed is not known: it is taken to be as far away as its last use lies back.
//!
//! Plans belong to this process; each source of a pool has its own. In a shared index others bring entries in and
//! take them out, so an entry of a plan is looked at before it is believed.

use super::cache::{BATCH, Cache};
use super::keys::Cursor;
use super::peers::Peers;
use super::rivals::PASSES;
use crate::arena::{ROOT, State};
use crate::error::Result;
use crate::policy::{Course, Distance, Eviction, NEVER, Plan, Recent};

/// Where nothing tells when a value is needed: later than all others.
pub(super) const UNKNOWN: Distance = Distance::MAX;

/// The plans of all sources, what is read beside them, and how long it is looked for what is in none.
#[derive(Debug)]
pub(super) struct Planned {
    /// Those of an index that is no pool are one.
    pub(super) plans: Vec<Plan>,
    /// By the reads of all plans.
    recent: Recent,
    pub(super) passes: u32,
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

    /// Has an entry of this key, of this weight, or of no key, be where it belongs; whether the key is in a plan.
    fn enter(&mut self, i: u32, key: Option<(&str, u64)>) -> bool {
        let mut is_planned = false;
        for plan in &mut self.plans {
            match key.filter(|(key, _)| plan.covers(key)) {
                Some((key, weight)) => is_planned |= plan.enter(i, key, weight),
                None => plan.leave(i),
            }
        }
        is_planned
    }

    /// A key is read; what has become of its plan, and where that is.
    fn read(
        &mut self,
        key: &str,
        entry: Option<(u32, u64)>,
        entries: u64,
    ) -> Option<(usize, Course)> {
        let at = self.plans.iter().position(|plan| plan.covers(key));
        let plan = at.and_then(|at| self.plans.get_mut(at));
        let Some(plan) = plan else {
            self.recent.read(key, entries);
            if let Some((entry, _)) = entry {
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

    /// In how many reads a value is needed that was read just now, and whether a plan has a use for it.
    pub(super) fn need(&self, key: &str) -> (Distance, bool) {
        let plan = self.of(key);
        match plan.and_then(|plan| plan.need(key)) {
            Some(reads) => (reads, plan.is_some_and(|plan| plan.next_use(key) != NEVER)),
            None => (self.distance(self.recent.age_before(key)), false),
        }
    }

    /// In how many reads a value in no plan is needed: as many as its last use lies back.
    pub(super) fn unplanned(&self, key: &str) -> Distance {
        self.distance(self.recent.age(key))
    }

    /// Reads of one plan, of so many of all: each is taken to be read as fast as any other.
    fn distance(&self, age: Option<u32>) -> Distance {
        let plans = self.plans.len().max(1) as Distance;
        age.map_or(UNKNOWN, |age| Distance::from(age) / plans)
    }

    fn has(&self, i: u32) -> bool {
        self.plans.iter().any(|plan| plan.has(i))
    }

    pub(super) fn entries(&self) -> usize {
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
        let entry = entry.and_then(|i| Some((i, self.weight(i).ok()?)));
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
    pub(super) fn is_in_plan(&mut self, i: u32) -> Result<bool> {
        let cell = self.arena.get(i)?;
        let is_live = cell.is_entry() && cell.state() == State::Live;
        if !is_live {
            self.leave_plan(i);
            return Ok(false);
        }
        if S::EXCLUSIVE && self.planned.as_deref().is_some_and(|p| p.has(i)) {
            return Ok(true);
        }
        let (key, weight) = (self.arena.name(i)?.0, self.weight(i)?);
        let planned = self.planned.as_deref_mut();
        Ok(planned.is_some_and(|planned| planned.enter(i, Some((&key, weight)))))
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
