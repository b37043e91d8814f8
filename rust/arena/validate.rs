//! Validation: every counter, list and table recomputed from the cells.

use super::arena::{Arena, End, IN_MAIN, List, OVERFLOW, ROOT, WRONG_STATE};
use super::by_age::is_live;
use super::cell::{Kind, State};
use super::hash_table::SEGMENT;
use super::storage::{STRING_SIZES, Storage};
use super::tree::{EMPTY, tail_slashes};
use crate::error::{Error, Result};

fn check(holds: bool, what: &'static str) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::Corrupt(what))
    }
}

/// For each word of the string arena that was ever used: whether a label or a free list has it.
struct Words(Vec<bool>);

impl Words {
    fn new(used: usize) -> Self {
        let mut words = vec![false; used];
        // Word 0 is never used.
        if let Some(first) = words.first_mut() {
            *first = true;
        }
        Words(words)
    }

    fn add(&mut self, at: u32, words: usize) -> Result<()> {
        let range = at as usize..(at as usize).saturating_add(words);
        let string = self.0.get_mut(range).unwrap_or_default();
        check(
            string.len() == words && !string.contains(&true),
            "strings: a word in use twice",
        )?;
        string.fill(true);
        Ok(())
    }

    fn check(&self) -> Result<()> {
        check(!self.0.contains(&false), "strings: a word that is lost")
    }
}

/// What the header says about the entries, recomputed.
#[derive(Default)]
struct Totals {
    used_bytes: u64,
    live_bytes: u64,
    entries: u64,
    live: u64,
    failed: u64,
    absences: u64,
}

impl<S: Storage> Arena<S> {
    /// Recomputes everything. Takes time in proportion to the size of the index.
    pub fn validate(&self) -> Result<()> {
        let header = *self.header();
        check(
            header.cells_used as usize <= self.storage.cells().len(),
            "more cells used than there are",
        )?;
        check(
            header.strings_used as usize <= self.storage.strings().len(),
            "more strings used than there are",
        )?;
        let mut totals = Totals::default();
        let [
            mut free,
            mut named,
            mut children,
            mut validators,
            mut validated,
            mut segments,
            mut by_age,
        ] = [0u64; 7];
        let mut words = Words::new(header.strings_used as usize);
        for i in ROOT..header.cells_used {
            let cell = self.get(i)?;
            let kind = cell.kind()?;
            if kind == Kind::Free {
                free += 1;
                continue;
            }
            if kind == Kind::Segment {
                segments += 1;
                continue;
            }
            if let Some((at, len)) = cell.string()? {
                words.add(at, len)?;
            }
            if kind == Kind::Validator {
                validators += 1;
                let is_entry = self.get(cell.parent)?.is_entry();
                check(
                    is_entry && self.is_own_validator(i)?,
                    "validator: of no entry",
                )?;
                continue;
            }
            validated += u64::from(cell.has_validator());
            if i != ROOT {
                named += 1;
                self.validate_name(i)?;
            }
            if kind == Kind::Dir {
                by_age += self.validate_ring(i)?;
            }
            if matches!(kind, Kind::Dir | Kind::Object) {
                children += self.validate_children(i)?;
                continue;
            }
            if kind == Kind::Absent {
                totals.absences += 1;
                continue;
            }
            totals.entries += 1;
            let size = cell.size()?;
            let add = |sum: u64| sum.checked_add(size).ok_or(OVERFLOW);
            let cost = self.header().cost(size);
            totals.used_bytes = totals.used_bytes.checked_add(cost).ok_or(OVERFLOW)?;
            match cell.state() {
                State::Live => {
                    totals.live += 1;
                    totals.live_bytes = add(totals.live_bytes)?;
                }
                State::DeleteFailed => totals.failed += 1,
                State::Filling | State::Deleting => {}
            }
        }
        check(totals.used_bytes == header.used_bytes, "used bytes")?;
        check(totals.live_bytes == header.live_bytes, "live bytes")?;
        check(totals.entries == header.entries, "count of entries")?;
        check(totals.live == header.live_entries, "count of live entries")?;
        check(totals.absences == header.absences, "count of absences")?;
        for size in 1..=STRING_SIZES {
            for at in self.free_strings(size)? {
                words.add(at, size)?;
            }
        }
        words.check()?;
        check(children == named, "tree: a cell missing from its parent")?;
        check(validators == validated, "validator: missing")?;
        self.validate_free(free)?;
        self.validate_lists(&totals)?;
        check(by_age == totals.live, "rings: count")?;
        check(
            self.list_cells(List::Segments)?.len() as u64 == segments,
            "segments: count",
        )?;
        self.validate_places()?;
        self.validate_table(named + validators)
    }

    /// Whether a validator is the one of its entry.
    fn is_own_validator(&self, i: u32) -> Result<bool> {
        Ok(self.find_validator(self.get(i)?.parent)? == Some(i))
    }

    fn validate_name(&self, i: u32) -> Result<()> {
        let hash = self.hash_of(i)?;
        let found = self.table_find(hash, |at| Ok(at == i))?;
        check(found == Some(i), "hash table: cell missing")?;
        let (key, range) = self.name(i)?;
        let kind = self.get(i)?.kind()?;
        let again = match kind {
            Kind::Dir => self.find_dir(&format!("{key}/"))?,
            Kind::Object => self.find_object(&key)?,
            Kind::Absent => self.find_absence(&key)?,
            _ => self.find(&key, range)?,
        };
        check(again == Some(i), "tree: a key that leads to another cell")
    }

    /// Returns the number of children.
    fn validate_children(&self, i: u32) -> Result<u64> {
        let parent = *self.get(i)?;
        let mut all = 0;
        let kinds = match parent.kind()? {
            Kind::Dir => &[false, true][..],
            _ => &[false],
        };
        for &of_absences in kinds {
            let found = self.children_in(i, of_absences)?;
            if parent.kind()? == Kind::Dir {
                let depth = usize::from(parent.depth(of_absences)?);
                for &child in &found {
                    let is_dir = self.get(child)?.kind()? == Kind::Dir;
                    let slashes = tail_slashes(&self.name(child)?.0);
                    check(is_dir || slashes <= depth, "tree: a name deeper than noted")?;
                }
                check(!found.is_empty() || depth == 0, "tree: depth of nothing")?;
            }
            all += found.len() as u64;
        }
        if all == 0 && i != ROOT {
            return Err(EMPTY);
        }
        if parent.kind()? == Kind::Object {
            for hint in [parent.earlier, parent.later] {
                if hint == 0 {
                    continue;
                }
                let cell = self.get(hint)?;
                let good = cell.parent == i && cell.is_entry() && cell.state() == State::Live;
                check(good, "tree: a hint that is no live child")?;
            }
        }
        Ok(all)
    }

    /// Returns the number of entries in the ring of a folder.
    fn validate_ring(&self, source: u32) -> Result<u64> {
        let ring = self.ring(source)?;
        let (mut before, mut latest) = (self.latest(source)?, 0);
        for &i in &ring {
            let cell = self.get(i)?;
            check(
                is_live(cell) && self.source_of(i)? == source,
                "ring: no entry of this source",
            )?;
            check(cell.earlier == before, "ring: broken back link")?;
            check(cell.time() >= latest, "ring: fetch times out of order")?;
            (before, latest) = (i, cell.time());
        }
        Ok(ring.len() as u64)
    }

    fn validate_free(&self, free: u64) -> Result<()> {
        let (mut at, mut count) = (self.header().free, 0u64);
        while at != 0 && count <= free {
            let cell = self.get(at)?;
            check(cell.kind()? == Kind::Free, "free list: cell in use")?;
            (at, count) = (cell.older, count + 1);
        }
        check(
            count == free && free == u64::from(self.header().free_count),
            "free list: count",
        )
    }

    fn validate_lists(&self, totals: &Totals) -> Result<()> {
        let main = self.list_cells(List::Main)?;
        let mut main_bytes = 0u64;
        for &i in &main {
            let size = self.get(i)?.size()?;
            main_bytes = main_bytes.checked_add(size).ok_or(OVERFLOW)?;
        }
        check(
            main_bytes == self.header().policy.main_bytes,
            "bytes of the main list",
        )?;
        let recent = totals.live.checked_sub(main.len() as u64);
        for (list, count) in [
            (List::Recency, recent.ok_or(WRONG_STATE)?),
            (List::Main, main.len() as u64),
            (List::DeleteFailed, totals.failed),
            (
                List::InProgress,
                totals.entries - totals.live - totals.failed,
            ),
            (List::Absences, totals.absences),
        ] {
            let cells = self.list_cells(list)?;
            let mut before = 0;
            for &i in &cells {
                let cell = self.get(i)?;
                if !list.holds(cell) {
                    return Err(WRONG_STATE);
                }
                check(
                    self.neighbour(i, End::First)? == before,
                    "list: broken back link",
                )?;
                if matches!(list, List::Recency | List::Main) {
                    let in_main = self.note(i)? & IN_MAIN != 0;
                    check(
                        in_main == (list == List::Main),
                        "list: not the one of the note",
                    )?;
                }
                before = i;
            }
            check(self.list(list)[1] == before, "list: wrong last cell")?;
            check(cells.len() as u64 == count, "list: count")?;
        }
        Ok(())
    }

    fn validate_table(&self, named: u64) -> Result<()> {
        let mut counted = 0u64;
        let directory = self.pointers()?;
        for number in 0..self.header().segments {
            let segment = self.segment(number as usize)?;
            let used = segment.iter().skip(2).filter(|slot| **slot != 0).count();
            check(
                used == segment[0] as usize && used < SEGMENT - 2,
                "hash table: count of a segment",
            )?;
            counted += used as u64;
            let pointers = directory.iter().filter(|entry| **entry == number).count();
            check(
                self.pointers_to(segment[1]) == Some(pointers),
                "hash table: pointers to a segment",
            )?;
        }
        check(counted == named, "hash table: count")
    }
}
