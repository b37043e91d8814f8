//! The best of several rules, by what the traffic shows.

use super::deferred::Deferred;
use super::entries::Entries;
use super::ghosts::Ghosts;
use super::learner::{Learner, Request, WORDS};
use super::policy::{Eviction, Newcomer};
use super::rule::{RULES, Ruled, is_sampled};
use crate::arena::{End, List};
use crate::error::Result;

/// Words of the ghosts at least: 4,096 of them.
const GHOSTS: usize = 1024;
/// Ghosts in a word, and for each entry at least. As many as in a simulation, or the rules would do otherwise there.
const IN_A_WORD: u64 = 4;
const FOR_EACH: u64 = 2;
/// Entries that come in between two looks at how much history there is.
const LOOK_EVERY: u64 = 256;
/// Uses of each entry after which hits alone tell nothing new, and entries that are counted at least.
const KNOWN_AFTER: u64 = 4;
const FEW: u64 = 64;

/// Goes by one of the `RULES`, all of which divide the entries in the same way, so that it can change at any
/// time. The `Learner` decides; what it knows is in the history of the entries, with the ghosts behind it.
#[derive(Debug, Default)]
pub struct Adaptive(Deferred);

fn ruled<E: Entries>(entries: &E) -> Ruled {
    let rule = RULES
        .get(usize::from(entries.state().rule))
        .unwrap_or(&RULES[0]);
    Ruled {
        rule: *rule,
        renews: entries.state().renews != 0,
        ghosts_at: WORDS,
    }
}

/// Entries that are full have so many bytes.
fn capacity<E: Entries>(entries: &E) -> u64 {
    match entries.state().full_bytes {
        0 => u64::MAX,
        full => full.max(entries.totals().1),
    }
}

#[inline]
fn touch<E: Entries>(entries: &mut E, entry: u32) -> Result<()> {
    ruled(entries).touch(entries, entry)?;
    if is_sampled(entries, entry)? && has_to_learn(entries) {
        observe(entries, entry, true)?;
    }
    Ok(())
}

/// Whether hits tell anything: not once all is known of what is there. Before the cache is full they do: without them the
/// simulation of LRU would begin with the order in which the values came in.
fn has_to_learn<E: Entries>(entries: &E) -> bool {
    let (count, _) = entries.totals();
    let state = entries.state();
    let since = state.uses.wrapping_sub(state.filled_at);
    since < KNOWN_AFTER * count.max(FEW)
}

fn learner<E: Entries>(entries: &mut E) -> Option<Learner<'_>> {
    Learner::of(entries.history_mut().get_mut(..WORDS)?)
}

fn observe<E: Entries>(entries: &mut E, entry: u32, is_hit: bool) -> Result<()> {
    let request = Request {
        key: entries.hash(entry)?,
        size: entries.size(entry)?,
        is_hit,
    };
    learn(entries, request);
    Ok(())
}

fn learn<E: Entries>(entries: &mut E, request: Request) {
    let (state, capacity, (count, _)) = (*entries.state(), capacity(entries), entries.totals());
    let Some(mut learner) = learner(entries) else {
        return;
    };
    match learner.observe(request, count, &state, capacity) {
        Ok((rule, renews)) => {
            let state = entries.state_mut();
            (state.rule, state.renews) = (rule, u16::from(renews));
        }
        // What is damaged is learned anew.
        Err(_) => {
            if let Some(words) = entries.history_mut().get_mut(..WORDS) {
                words.fill(0);
            }
        }
    }
}

/// Makes room for what is remembered, in proportion to the entries. Without room less is remembered.
fn remember<E: Entries>(entries: &mut E) -> Result<()> {
    let (count, _) = entries.totals();
    let wanted = (FOR_EACH * count / IN_A_WORD).next_power_of_two() as usize;
    loop {
        let len = entries.history().len();
        let ghosts = match len.checked_sub(WORDS) {
            None | Some(0) => 0,
            Some(ghosts) if ghosts >= wanted => return Ok(()),
            Some(ghosts) => ghosts,
        };
        match entries.grow_history(WORDS + (ghosts * 2).max(GHOSTS)) {
            Ok(()) => {}
            Err(error) if !error.is_fatal() => return Ok(()),
            Err(error) => return Err(error),
        }
        if let Some(words) = entries.history_mut().get_mut(WORDS..)
            && ghosts != 0
        {
            Ghosts::doubled(words);
        }
    }
}

impl Eviction for Adaptive {
    fn insert<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        self.0.flush(entries, touch)?;
        if entries.history().is_empty() || entries.totals().0.is_multiple_of(LOOK_EVERY) {
            remember(entries)?;
        }
        let key = entries.hash(entry)?;
        let is_sampled = learner(entries).is_some_and(|learner| learner.samples(key));
        ruled(entries).insert(entries, entry, is_sampled)?;
        let state = entries.state_mut();
        state.filled_at = state.uses;
        if is_sampled {
            observe(entries, entry, false)?;
        }
        Ok(())
    }

    #[inline]
    fn touch<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        self.0.touch(entries, entry, touch)
    }

    fn remove<E: Entries>(&mut self, entries: &mut E, entry: u32) -> Result<()> {
        self.0.flush(entries, touch)?;
        ruled(entries).remove(entries, entry)
    }

    fn admits<E: Entries>(&mut self, entries: &mut E, newcomer: Newcomer) -> Result<bool> {
        self.0.flush(entries, touch)?;
        ruled(entries).admits(entries, newcomer)
    }

    fn turn_away<E: Entries>(&mut self, entries: &mut E, newcomer: Newcomer) -> Result<()> {
        self.0.flush(entries, touch)?;
        ruled(entries).turn_away(entries, newcomer.hash)?;
        let state = entries.state_mut();
        state.filled_at = state.uses;
        if learner(entries).is_some_and(|learner| learner.samples(newcomer.hash)) {
            let request = Request {
                key: newcomer.hash,
                size: newcomer.size,
                is_hit: false,
            };
            learn(entries, request);
        }
        Ok(())
    }

    fn victim<E: Entries>(&mut self, entries: &mut E) -> Result<Option<u32>> {
        self.0.flush(entries, touch)?;
        ruled(entries).victim(entries)
    }

    fn first_of<E: Entries>(&mut self, entries: &mut E, list: List) -> Result<Option<u32>> {
        self.0.flush(entries, touch)?;
        entries.end(list, End::First)
    }

    fn order<E: Entries>(&self, entries: &E) -> Result<Vec<u32>> {
        let mut order = Vec::new();
        for list in [List::Recency, List::Main] {
            let mut all = entries.all_of(list)?;
            for i in self.0.waiting() {
                if all.contains(i) {
                    all.retain(|other| other != i);
                    all.push(*i);
                }
            }
            order.extend(all);
        }
        Ok(order)
    }

    fn validate<E: Entries>(&self, entries: &E) -> Result<()> {
        match entries.history().get(..WORDS) {
            Some(words) => Learner::validate(words),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.0.clear();
    }
}
