//! What goes before a value that needs room, by the plans and the policy.
//!
//! Until a value is needed it takes room, for the sake of one miss: what takes the most for what that costs goes first.
//! Where all are of one size that is what is needed last, as Belady has it; where misses cost the same it is
//! Belady-Size (compare Berger, Beckmann and Harchol-Balter, "Practical bounds on optimal caching with variable
//! object sizes", 2018).

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use super::cache::{BATCH, Cache};
use super::peers::Peers;
use super::planned::{Planned, UNKNOWN};
use crate::arena::{End, List};
use crate::error::Result;
use crate::policy::{Distance, Entries, Eviction, cost_of};

/// Entries of the plan that one step passes over to find one that is in no plan; half as many after a step in
/// vain, down to the few.
pub(super) const PASSES: u32 = 256;
const FEW_PASSES: u32 = 4;

/// Entries that one value is compared with, at most. One that needs the room of more stays out.
const MOST_COMPARED: usize = 64 * BATCH;

/// What keeping a value is worth: reads until it is needed, times the room that it takes, for each part of what a miss
/// costs. The more, the sooner it goes.
type Burden = f64;

/// Where nothing tells when a value is needed.
const UNKNOWN_BURDEN: Burden = Burden::INFINITY;

/// What a value that needs room is worth.
#[derive(Clone, Debug)]
pub(super) struct Need {
    burden: Burden,
    /// Whether a plan has a use for it. All else is the business of the policy as well.
    pub(super) is_planned: bool,
    /// Bytes that have to go for it; 0 where an entry has to go, whatever its size.
    pub(super) missing: u64,
    /// Whether it is worth more than all that has to go for it. It is compared once: what goes, goes for a value that
    /// comes in.
    pub(super) is_let_in: bool,
    /// What goes for it, by the plans; the first one is the last.
    chosen: Vec<u32>,
    /// Whether that has to be.
    is_forced: bool,
}

impl Default for Need {
    fn default() -> Self {
        Need {
            burden: UNKNOWN_BURDEN,
            is_planned: false,
            missing: 0,
            is_let_in: false,
            chosen: Vec::new(),
            is_forced: false,
        }
    }
}

/// An entry that may go.
#[derive(Clone, Copy, Debug)]
struct Rival {
    burden: Burden,
    entry: u32,
    room: u64,
}

/// Entries of which the first one goes first.
#[derive(Clone, Copy, Debug)]
struct Row {
    way: Way,
    first: Rival,
    /// Of what is alike, the first row comes first.
    number: usize,
}

impl Ord for Row {
    fn cmp(&self, other: &Row) -> Ordering {
        let burdens = self.first.burden.total_cmp(&other.first.burden);
        burdens.then(Reverse(self.number).cmp(&Reverse(other.number)))
    }
}

impl PartialOrd for Row {
    fn partial_cmp(&self, other: &Row) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Row {
    fn eq(&self, other: &Row) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Row {}

/// Where the entries of a row are: from this one on.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// In a list of the policy; those in no plan.
    List { at: u32, towards: End },
    /// In a class of a plan, below this position and entry.
    Class {
        plan: usize,
        class: u32,
        before: (u32, u32),
    },
}

/// Above all positions and entries.
const TOP: (u32, u32) = (u32::MAX, u32::MAX);

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// What a value of so many bytes is worth that was read just now.
    pub(super) fn need(&self, key: &str, size: u64) -> Need {
        let Some(planned) = self.planned.as_deref() else {
            return Need::default();
        };
        let (reads, is_planned) = planned.need(key);
        Need {
            burden: self.burden(reads, size),
            is_planned,
            ..Need::default()
        }
    }

    /// By the room that a value takes and by what its miss costs, the read included that it waits for.
    fn burden(&self, reads: Distance, size: u64) -> Burden {
        if reads == UNKNOWN {
            return UNKNOWN_BURDEN;
        }
        let header = self.arena.header();
        let (room, cost) = (header.cost(size).max(1), cost_of(&header.policy, size));
        (reads.max(0) + 1) as Burden * (room as Burden / cost as Burden)
    }

    /// The room that an entry takes for each part of what its miss costs; 0 where it takes none.
    pub(super) fn weight(&self, i: u32) -> Result<u64> {
        let (room, size) = (self.arena.room(i)?, self.arena.get(i)?.size()?);
        let cost = cost_of(&self.arena.header().policy, size);
        Ok((room / cost.max(1)).max(room.min(1)))
    }

    fn rival(&self, reads: Distance, i: u32) -> Result<Rival> {
        Ok(Rival {
            burden: self.burden(reads, self.arena.get(i)?.size()?),
            entry: i,
            room: self.arena.room(i)?,
        })
    }

    /// The choice of the policy; with plans what is worth less for its room than this value, or least if bytes have to go.
    /// Of what is in no plan it is the choice of the policy that is compared.
    pub(super) fn least_needed(&mut self, need: &mut Need, has_to_be: bool) -> Result<Option<u32>> {
        if self.planned.is_none() {
            return self.choice(has_to_be);
        }
        if need.is_forced != has_to_be {
            need.chosen.clear();
            need.is_forced = has_to_be;
        }
        if need.chosen.is_empty() {
            let has_to_be = has_to_be || need.is_let_in;
            match self.choose(need, has_to_be)? {
                Some(chosen) => {
                    need.is_let_in |= !has_to_be && !chosen.is_empty();
                    need.chosen = chosen;
                }
                None => return self.choice(has_to_be || need.is_planned),
            }
        }
        Ok(need.chosen.pop())
    }

    /// What goes for a value, a batch at most, the first one last; nothing if any of all that would have to go is worth
    /// more. `None` where nothing is found to compare.
    fn choose(&mut self, need: &Need, has_to_be: bool) -> Result<Option<Vec<u32>>> {
        // Of two of which nothing is known the policy decides.
        let is_let_in = has_to_be || !need.is_planned && self.choice(false)?.is_some();
        let most = if has_to_be { BATCH } else { MOST_COMPARED };
        let mut rows: BinaryHeap<Row> = self.rows(need)?.into();
        let mut chosen: Vec<Rival> = Vec::new();
        let (mut freed, mut compared, mut is_worth_it) = (0u64, 0, true);
        while compared == 0 || freed < need.missing {
            if compared == most {
                is_worth_it = has_to_be;
                break;
            }
            let Some(row) = rows.peek().copied() else {
                // Of what is left the policy decides.
                is_worth_it = compared == 0 || need.is_planned || is_let_in;
                break;
            };
            let rival = row.first;
            is_worth_it = match rival.burden.total_cmp(&need.burden) {
                _ if has_to_be => true,
                Ordering::Less => false,
                Ordering::Equal => is_let_in,
                Ordering::Greater => true,
            };
            if !is_worth_it {
                break;
            }
            freed = freed.saturating_add(self.frees(rival.room));
            compared += 1;
            // What goes later is only compared: the step is kept short.
            let mut passes = FEW_PASSES;
            if chosen.len() < BATCH {
                chosen.push(rival);
                passes = PASSES;
            }
            rows.pop();
            let way = match row.way {
                Way::List { towards, .. } => Way::List {
                    at: Entries::neighbour(&self.arena, rival.entry, towards)?,
                    towards,
                },
                class => class,
            };
            rows.extend(self.row(way, row.number, passes, need)?);
        }
        for row in &rows {
            // The policy does not order by use, so another may be needed later: that is looked at next.
            if let Way::List { at, towards } = row.way
                && Entries::neighbour(&self.arena, at, End::Last)? == 0
            {
                self.arena.pass_over(at, towards)?;
            }
        }
        if chosen.is_empty() && is_worth_it {
            return Ok(None);
        }
        if !is_worth_it {
            return Ok(Some(Vec::new()));
        }
        // The last ones may have made some of those before them needless.
        let is_all = need.missing != 0 && compared == chosen.len();
        let mut spare = if is_all {
            freed.saturating_sub(need.missing)
        } else {
            0
        };
        let mut goes = Vec::with_capacity(chosen.len());
        for rival in chosen.iter().rev() {
            let frees = self.frees(rival.room);
            if is_all && frees <= spare {
                spare -= frees;
            } else {
                goes.push(rival.entry);
            }
        }
        Ok(Some(goes))
    }

    /// The entries that are compared: of what is alike, what is in no plan comes first.
    fn rows(&mut self, need: &Need) -> Result<Vec<Row>> {
        let mut rows = self.unplanned(need)?;
        let plans = self.planned.as_deref().map_or(0, |p| p.plans.len());
        for plan in 0..plans {
            let classes: Vec<u32> = match self.planned.as_deref().and_then(|p| p.plans.get(plan)) {
                Some(plan) => plan.classes(need.missing == 0).collect(),
                None => Vec::new(),
            };
            for class in classes {
                let way = Way::Class {
                    plan,
                    class,
                    before: TOP,
                };
                rows.extend(self.row(way, rows.len(), PASSES, need)?);
            }
        }
        Ok(rows)
    }

    /// What is found on this way, after so many passes at most.
    fn row(&mut self, way: Way, number: usize, passes: u32, need: &Need) -> Result<Option<Row>> {
        let found = match way {
            Way::List { at, towards } => self.next_unplanned(at, towards, passes, need),
            Way::Class {
                plan,
                class,
                before,
            } => self.next_planned(plan, class, before),
        };
        Ok(found?.map(|(way, first)| Row { way, first, number }))
    }

    fn next_planned(
        &mut self,
        plan: usize,
        class: u32,
        before: (u32, u32),
    ) -> Result<Option<(Way, Rival)>> {
        let last = |planned: &Planned| planned.plans.get(plan)?.last_of(class, before);
        for _ in 0..BATCH {
            let found = self.planned.as_deref().and_then(last);
            let Some((at, reads)) = found else {
                break;
            };
            // Others may have put another key there; a second look finds that.
            if S::EXCLUSIVE
                || self.is_in_plan(at.1)? && self.planned.as_deref().and_then(last) == found
            {
                let way = Way::Class {
                    plan,
                    class,
                    before: at,
                };
                let first = self.rival(reads, at.1)?;
                return Ok(Some((way, first)));
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

    /// The entries of the keys in no plan: of each list from the one on that the policy would take first. The
    /// list that it goes on with comes first.
    fn unplanned(&mut self, need: &Need) -> Result<Vec<Row>> {
        let live = self.arena.header().live_entries;
        let passes = match self.planned.as_deref() {
            Some(planned) if S::EXCLUSIVE && planned.entries() as u64 >= live => 0,
            planned => planned.map_or(0, |planned| planned.passes),
        };
        if passes == 0 {
            return Ok(Vec::new());
        }
        let Some(next) = self.choice(true)? else {
            return Ok(Vec::new());
        };
        let lists = match self.arena.list_of(next)? {
            List::Main => [List::Main, List::Recency],
            _ => [List::Recency, List::Main],
        };
        let mut rows = Vec::new();
        for list in lists {
            if let Some(at) = self.policy.first_of(&mut self.arena, list)? {
                let towards = self.arena.way_from(at)?;
                let way = Way::List { at, towards };
                rows.extend(self.row(way, rows.len(), passes, need)?);
            }
        }
        if let Some(planned) = self.planned.as_deref_mut() {
            planned.passes = match rows.is_empty() {
                false => PASSES,
                true => (passes / 2).max(FEW_PASSES),
            };
        }
        Ok(rows)
    }

    /// The next entry of a list that is of a key in no plan. Those that come before it, of plans or without room, move
    /// to the other end, so that they are passed over once.
    fn next_unplanned(
        &mut self,
        mut at: u32,
        towards: End,
        passes: u32,
        need: &Need,
    ) -> Result<Option<(Way, Rival)>> {
        for _ in 0..passes {
            if at == 0 {
                break;
            }
            let is_planned = self.is_in_plan(at)?;
            if !is_planned && (need.missing == 0 || self.arena.room(at)? != 0) {
                let key = self.arena.name(at)?.0;
                let reads = self.planned.as_deref().map(|p| p.unplanned(&key));
                let first = self.rival(reads.unwrap_or(UNKNOWN), at)?;
                let way = Way::List { at, towards };
                return Ok(Some((way, first)));
            }
            let next = Entries::neighbour(&self.arena, at, towards)?;
            self.arena.pass_over(at, towards)?;
            at = next;
        }
        Ok(None)
    }
}
