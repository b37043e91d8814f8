//! W-TinyLFU with a window of any share, up to LRU.
//!
//! New entries come into a window, the recency list. What falls out of it is compared with what was used least
//! recently in the main list: the one that is worth less goes. The worth is the frequency of use, in proportion
//! to the cost of a miss and to the bytes. Frequencies are halved now and then, and remembered of what has gone
//! ([`Ghosts`]).
//!
//! Where nothing but new keys comes and what is in the main list is read no more, the data is another one, and old
//! frequencies say nothing of it. A rule that renews lets the main list go then, so that the new data finds room in
//! its first pass, not once it is used more often than the old data was.
//!
//! A value that is larger than the window is compared before anything goes for it, and with each that would have to
//! go; see [`Ruled::admits`].
//!
//! Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", 2017, compare for more.
//! Here a newcomer has to lead by more than one, since the use that has brought it in is counted: the other one
//! may be about to be used as well. So in shuffled epochs, where all keys are used equally often, what is there
//! stays.

use super::entries::Entries;
use super::ghosts::{Frequency, Ghosts};
use super::kind::Minimise;
use super::policy::Newcomer;
use crate::arena::{End, IN_MAIN, List, PolicyState};
use crate::error::Result;

/// Entries that one step moves from the window to the main list, so that no step holds the lock for long.
const MOVES: u32 = 64;
/// Entries of the main list that one newcomer passes over at most.
const RIVALS: u32 = 16;
/// By how much a newcomer has to be ahead, more than this.
const LEAD: u8 = 1;
/// Entries for which uses are counted at least.
const FEW: u64 = 8;

/// The part of the entries above which so many new keys renew the main list.
const RENEWS_AFTER: u64 = 8;
/// New keys that a read of an entry of the main list makes up for. One of the window makes up for one: where what
/// is new is read again soon, a small window does.
const MAKES_UP_FOR: u64 = 64;

/// The part of a value that needs room by which what a full cache is known to hold is lowered.
const FADE: u64 = 8;

/// The bit of a note that says that the learner follows the key.
const SAMPLED: u8 = 2;
const FREQUENCY_AT: u32 = 2;

/// How the entries are divided and how fast frequencies fade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// The part of the bytes that belongs to the window, in thousandths; all of them make this LRU.
    window: u64,
    /// Uses for each entry after which frequencies are halved.
    halve_after: u64,
    /// Whether the main list goes where nothing but new keys comes.
    renews: bool,
    /// Whether a window of less than half a value has none, not one. In a cache of a few values that one is missing
    /// from the rest, and one alone would be LRU.
    may_be_empty: bool,
}

const WHOLE: u64 = 1000;

/// The rules that the adaptive policy chooses from; it begins with the first one.
pub(super) const RULES: [Rule; 4] = [
    // LRU.
    Rule {
        window: WHOLE,
        halve_after: 10,
        renews: false,
        may_be_empty: false,
    },
    // Frequency, over a short time and of the data of now, or over a long time.
    Rule {
        window: 10,
        halve_after: 4,
        renews: true,
        may_be_empty: false,
    },
    Rule {
        window: 10,
        halve_after: 20,
        renews: false,
        may_be_empty: true,
    },
    // Both.
    Rule {
        window: 200,
        halve_after: 10,
        renews: false,
        may_be_empty: true,
    },
];

/// A rule, whether the main list goes first all the same, and where in the history of the entries the ghosts begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ruled {
    pub(super) rule: Rule,
    pub(super) renews: bool,
    pub(super) ghosts_at: usize,
}

impl Ruled {
    fn is_lru(self) -> bool {
        self.rule.window >= WHOLE
    }

    fn ghosts<E: Entries>(self, entries: &E) -> Ghosts<'_> {
        let words = entries.history().get(self.ghosts_at..);
        Ghosts::new(words.unwrap_or_default())
    }

    /// An entry has come in.
    pub(super) fn insert<E: Entries>(
        self,
        entries: &mut E,
        entry: u32,
        is_sampled: bool,
    ) -> Result<()> {
        let halvings = entries.state().halvings;
        let before = self.ghosts(entries).get(entries.hash(entry)?, halvings);
        if before == 0 {
            count_new(entries)?;
        }
        let frequency = Frequency::new(before + 1, halvings);
        let sampled = if is_sampled { SAMPLED } else { 0 };
        entries.enter(entry, frequency.bits() << FREQUENCY_AT | sampled)?;
        if !self.fits_window(entries, entries.size(entry)?) {
            entries.move_to(entry, List::Main)?;
        }
        self.count_use(entries);
        Ok(())
    }

    /// Whether a value goes by way of the window. It would take the place of many small ones else.
    fn fits_window<E: Entries>(self, entries: &E, size: u64) -> bool {
        let (count, bytes) = entries.totals();
        let mean = bytes / count.max(1);
        self.is_lru() || size <= self.window(bytes).max(mean) && !self.has_no_window(entries)
    }

    /// Whether newcomers are compared at once. Until something had to go there is nothing to compare them with.
    fn has_no_window<E: Entries>(self, entries: &E) -> bool {
        let (count, bytes) = entries.totals();
        let full = entries.state().full_bytes;
        let is_small = || self.window(full).saturating_mul(2) < bytes / count.max(1);
        self.rule.may_be_empty && full != 0 && is_small()
    }

    /// Whether more has to go than is in the window: a value would take the place of what is in the main list, and never
    /// be compared with that. So it is where others come at once, or where what a value takes beside its bytes comes and
    /// goes.
    fn is_window_spent<E: Entries>(self, entries: &E, newcomer: Newcomer) -> Result<bool> {
        let (_, bytes) = entries.totals();
        let window = bytes.saturating_sub(entries.state().main_bytes);
        let has_main = || Ok(entries.end(List::Main, End::First)?.is_some());
        Ok(!self.is_lru() && window < newcomer.room && has_main()?)
    }

    /// Bytes of the window, of so many in all.
    fn window(self, bytes: u64) -> u64 {
        let window = u128::from(bytes) * u128::from(self.rule.window) / u128::from(WHOLE);
        window as u64
    }

    /// Whether others should go for a newcomer.
    pub(super) fn admits<E: Entries>(self, entries: &mut E, newcomer: Newcomer) -> Result<bool> {
        let Newcomer { hash, size, .. } = newcomer;
        let faded = if newcomer.is_alone {
            size.div_ceil(FADE)
        } else {
            0
        };
        note_full(entries, faded);
        if self.has_no_window(entries) {
            // What came before the cache was full, or under another rule.
            for _ in 0..MOVES {
                let Some(entry) = entries.end(List::Recency, End::First)? else {
                    break;
                };
                entries.move_to(entry, List::Main)?;
            }
        }
        if self.fits_window(entries, size) && !self.is_window_spent(entries, newcomer)? {
            return Ok(true);
        }
        let halvings = entries.state().halvings;
        let uses = self.ghosts(entries).get(hash, halvings).saturating_add(1);
        Ok(self.is_renewing(entries) || is_admitted(entries, uses, size, size.max(newcomer.room))?)
    }

    /// A newcomer stays out; that it was asked for is remembered.
    pub(super) fn turn_away<E: Entries>(self, entries: &mut E, hash: u64) -> Result<()> {
        let halvings = entries.state().halvings;
        let uses = self.ghosts(entries).get(hash, halvings).saturating_add(1);
        let words = entries.history_mut().get_mut(self.ghosts_at..);
        Ghosts::put(words.unwrap_or_default(), hash, uses, halvings);
        if uses == 1 {
            count_new(entries)?;
        }
        self.count_use(entries);
        Ok(())
    }

    /// An entry was used.
    #[inline]
    pub(super) fn touch<E: Entries>(self, entries: &mut E, entry: u32) -> Result<()> {
        let note = entries.note(entry)?;
        let halvings = entries.state().halvings;
        let uses = Frequency::from_bits(note >> FREQUENCY_AT).at(halvings) + 1;
        let frequency = Frequency::new(uses, halvings);
        let rest = note & (IN_MAIN | SAMPLED);
        entries.set_note(entry, frequency.bits() << FREQUENCY_AT | rest)?;
        let list = if note & IN_MAIN == 0 || self.is_lru() {
            List::Recency
        } else {
            List::Main
        };
        let known = if note & IN_MAIN != 0 {
            MAKES_UP_FOR
        } else {
            // Several reads in a row are one.
            u64::from(entries.neighbour(entry, End::Last)? != 0)
        };
        let state = entries.state_mut();
        state.new_keys = state.new_keys.saturating_sub(known);
        entries.move_to(entry, list)?;
        self.count_use(entries);
        Ok(())
    }

    /// Whether the main list goes first.
    fn is_renewing<E: Entries>(self, entries: &E) -> bool {
        self.renews || self.rule.renews && entries.state().new_keys > renews_after(entries)
    }

    /// An entry goes.
    pub(super) fn remove<E: Entries>(self, entries: &mut E, entry: u32) -> Result<()> {
        let (uses, halvings) = (frequency(entries, entry)?, entries.state().halvings);
        let hash = entries.hash(entry)?;
        let words = entries.history_mut().get_mut(self.ghosts_at..);
        Ghosts::put(words.unwrap_or_default(), hash, uses, halvings);
        entries.leave(entry)
    }

    /// The entry that goes next.
    pub(super) fn victim<E: Entries>(self, entries: &mut E) -> Result<Option<u32>> {
        // Not of what is there now: some may have gone already for the same newcomer.
        let bytes = note_full(entries, 0);
        for _ in 0..MOVES {
            let main = entries.end(List::Main, End::First)?;
            let Some(newcomer) = entries.end(List::Recency, End::First)? else {
                return Ok(main);
            };
            if self.is_lru() || main.is_some() && self.is_renewing(entries) {
                return Ok(main.or(Some(newcomer)));
            }
            let size = entries.size(newcomer)?;
            let share = bytes.saturating_sub(self.window(bytes));
            let taken = entries.state().main_bytes;
            // A window of less than one entry has one.
            if main.is_some() && taken > share.saturating_add(size) {
                return Ok(main);
            }
            // The window keeps one entry at least, or none would ever be compared.
            let room = share.min(bytes.saturating_sub(size));
            let missing = taken.saturating_add(size).saturating_sub(room);
            let uses = frequency(entries, newcomer)?;
            if main.is_some() && missing > 0 && !is_admitted(entries, uses, size, missing)? {
                return Ok(Some(newcomer));
            }
            entries.move_to(newcomer, List::Main)?;
        }
        // The rule is new, and most entries are still in the window. What came last goes, and what may be needed
        // next stays.
        entries.end(List::Recency, End::Last)
    }

    #[inline]
    fn count_use<E: Entries>(self, entries: &mut E) {
        let (count, _) = entries.totals();
        let state = entries.state_mut();
        state.uses = state.uses.wrapping_add(1);
        let since = state.uses.wrapping_sub(state.aged_at);
        if since > self.rule.halve_after.saturating_mul(count.max(FEW)) {
            state.halvings = state.halvings.wrapping_add(1);
            state.aged_at = state.uses;
        }
    }
}

/// New keys that say that the data is another one.
fn renews_after<E: Entries>(entries: &E) -> u64 {
    let (count, _) = entries.totals();
    (count / RENEWS_AFTER).max(FEW)
}

/// A key has come that was not used lately. With an empty main list there is nothing to renew.
fn count_new<E: Entries>(entries: &mut E) -> Result<()> {
    let is_empty = entries.end(List::Main, End::First)?.is_none();
    let most = 2 * renews_after(entries);
    let state = entries.state_mut();
    state.new_keys = if is_empty {
        0
    } else {
        state.new_keys.saturating_add(1).min(most)
    };
    Ok(())
}

/// Notes how many bytes there are when more are needed, after lowering the number `by` so many; how many there are when
/// it is full. It is lowered with each value that comes alone: of those that come together each has made room already,
/// which is not full yet.
fn note_full<E: Entries>(entries: &mut E, by: u64) -> u64 {
    let (_, bytes) = entries.totals();
    let state = entries.state_mut();
    state.full_bytes = bytes.max(state.full_bytes.saturating_sub(by));
    state.full_bytes
}

/// Whether the learner follows an entry.
#[inline]
pub(super) fn is_sampled<E: Entries>(entries: &E, entry: u32) -> Result<bool> {
    Ok(entries.note(entry)? & SAMPLED != 0)
}

fn frequency<E: Entries>(entries: &E, entry: u32) -> Result<u8> {
    let bits = entries.note(entry)? >> FREQUENCY_AT;
    Ok(Frequency::from_bits(bits).at(entries.state().halvings))
}

/// Whether a newcomer is worth more, byte for byte, than each of those that would have to go from the main list,
/// from what was used least recently on. What is worth more is passed over: something behind it may be worth less. If it
/// stayed in the way of all others, a single value that was used often once, and is read no more, would keep what is of
/// no use behind it.
fn is_admitted<E: Entries>(entries: &mut E, uses: u8, size: u64, missing: u64) -> Result<bool> {
    let lead = uses.saturating_sub(LEAD);
    let (mut freed, mut passed, mut none_stays) = (0u64, 0, true);
    let mut at = entries.end(List::Main, End::First)?;
    for _ in 0..MOVES {
        let Some(rival) = at.filter(|_| freed < missing) else {
            break;
        };
        let (rival_uses, rival_size) = (frequency(entries, rival)?, entries.size(rival)?);
        // Worth for each byte, without divisions.
        let worth = |uses: u8, size: u64, other: u64| {
            let cost = u128::from(cost_of(entries.state(), size));
            u128::from(uses)
                .saturating_mul(cost)
                .saturating_mul(u128::from(other.max(1)))
        };
        let next = entries.neighbour(rival, End::Last)?;
        at = (next != 0).then_some(next);
        if worth(lead, size, rival_size) > worth(rival_uses, rival_size, size) {
            freed = freed.saturating_add(rival_size);
            if !none_stays {
                // It goes before those that were passed over.
                entries.unlink(List::Main, rival)?;
                entries.link(List::Main, rival, End::First)?;
            }
            continue;
        }
        passed += 1;
        if passed == RIVALS {
            return Ok(false);
        }
        if rival_size < size {
            entries.move_to(rival, List::Main)?;
        } else {
            none_stays = false;
        }
    }
    // All that there is may be less than what is missing.
    Ok(freed >= missing || none_stays)
}

/// What a miss of so many bytes costs, in requests or bytes.
pub(crate) fn cost_of(state: &PolicyState, size: u64) -> u64 {
    const BYTES: u32 = Minimise::Bytes as u32;
    const SECONDS: u32 = Minimise::Seconds as u32;
    match state.minimise {
        BYTES => size.max(1),
        SECONDS => size.saturating_add(state.request_bytes).max(1),
        _ => 1,
    }
}
