//! The check of everything: every count, list and table recomputed from the cells.

use crate::block::{Block, TEXT_SIZES};
use crate::cell::{Kind, State};
use crate::cells::{Cells, List, ROOT};
use crate::error::{Fault, Res};
use crate::table::SEGMENT;

fn check(holds: bool, what: &'static str) -> Res<()> {
    if holds {
        Ok(())
    } else {
        Err(Fault::Corrupt(what))
    }
}

/// For each word of texts that was ever used, whether a text or a list of free blocks has it.
struct Texts(Vec<bool>);

impl Texts {
    fn new(used: usize) -> Self {
        let mut words = vec![false; used];
        // Word 0 is nobody's.
        if let Some(first) = words.first_mut() {
            *first = true;
        }
        Texts(words)
    }

    fn enter(&mut self, at: u32, words: usize) -> Res<()> {
        let range = at as usize..(at as usize).saturating_add(words);
        let block = self.0.get_mut(range).unwrap_or_default();
        check(
            block.len() == words && !block.contains(&true),
            "a block of text in two places",
        )?;
        block.fill(true);
        Ok(())
    }

    fn check(&self) -> Res<()> {
        check(!self.0.contains(&false), "a block of text in no place")
    }
}

impl<B: Block> Cells<B> {
    /// Recomputes the books. Takes time in proportion to the size of the index.
    pub fn validate(&self) -> Res<()> {
        let header = *self.header();
        check(
            header.used as usize <= self.block.cells().len(),
            "more cells used than there are",
        )?;
        check(
            header.texts_used as usize <= self.block.texts().len(),
            "more texts used than there are",
        )?;
        let [mut physical, mut present] = [0u64; 2];
        let [mut entries, mut present_entries, mut free, mut named] = [0u64; 4];
        let mut texts = Texts::new(header.texts_used as usize);
        let [mut children, mut orphans] = [0u64; 2];
        for i in ROOT..header.used {
            let cell = self.get(i)?;
            match cell.kind()? {
                Kind::Free => free += 1,
                kind => {
                    for (at, words) in self.blocks_of_text(cell)? {
                        texts.enter(at, words)?;
                    }
                    if i != ROOT {
                        named += 1;
                        self.validate_name(i)?;
                    }
                    if matches!(kind, Kind::Dir | Kind::Object) {
                        children += self.validate_children(i)?;
                    } else {
                        entries += 1;
                        physical = physical.checked_add(cell.size).ok_or(OVERFLOW)?;
                        if cell.state() == State::Present {
                            present_entries += 1;
                            present = present.checked_add(cell.size).ok_or(OVERFLOW)?;
                        }
                        orphans += u64::from(cell.state() == State::Orphan);
                    }
                }
            }
        }
        check(physical == header.physical, "physical bytes")?;
        check(present == header.present, "present bytes")?;
        check(entries == header.entries, "count of entries")?;
        check(
            present_entries == header.present_entries,
            "count of present entries",
        )?;
        for words in 1..=TEXT_SIZES {
            for at in self.free_blocks(words)? {
                texts.enter(at, words)?;
            }
        }
        texts.check()?;
        check(children == named, "a cell that its parent does not know")?;
        self.validate_free(free)?;
        self.validate_lists(
            present_entries,
            orphans,
            entries - present_entries - orphans,
        )?;
        self.validate_table(named)
    }

    fn validate_name(&self, i: u32) -> Res<()> {
        let hash = self.hash_of(i)?;
        let found = self.table_find(hash, |at| Ok(at == i))?;
        check(found == Some(i), "a cell that the table does not find")?;
        let (key, span) = self.name(i)?;
        let kind = self.get(i)?.kind()?;
        let again = match kind {
            Kind::Dir => self.find_dir(&format!("{key}/"))?,
            Kind::Object => self.find_object(&key)?,
            _ => self.find(&key, span)?,
        };
        check(again == Some(i), "a name that leads to another cell")
    }

    /// Returns how many children there are.
    fn validate_children(&self, i: u32) -> Res<u64> {
        let parent = *self.get(i)?;
        let (mut at, mut before, mut count) = (parent.older, 0, 0u32);
        while at != 0 {
            let cell = self.get(at)?;
            check(
                cell.parent == i && cell.left == before,
                "a child of another parent",
            )?;
            count += 1;
            check(count <= parent.newer, "more children than counted")?;
            (before, at) = (at, cell.right);
        }
        check(count == parent.newer, "count of children")?;
        check(count > 0 || i == ROOT, "a directory without children")?;
        if parent.kind()? == Kind::Object {
            for hint in [parent.earlier, parent.later]
                .into_iter()
                .filter(|hint| *hint != 0)
            {
                let cell = self.get(hint)?;
                let good = cell.parent == i && cell.is_entry() && cell.state() == State::Present;
                check(good, "a hint that leads nowhere")?;
            }
        }
        Ok(u64::from(count))
    }

    fn validate_free(&self, free: u64) -> Res<()> {
        let (mut at, mut count) = (self.header().free, 0u64);
        while at != 0 && count <= free {
            let cell = self.get(at)?;
            check(
                cell.kind()? == Kind::Free,
                "a cell in use among the free ones",
            )?;
            (at, count) = (cell.older, count + 1);
        }
        check(
            count == free && free == u64::from(self.header().free_count),
            "count of free cells",
        )
    }

    fn validate_lists(&self, present: u64, orphans: u64, busy: u64) -> Res<()> {
        for (list, state, count) in [
            (List::Recency, State::Present, present),
            (List::Time, State::Present, present),
            (List::Orphans, State::Orphan, orphans),
            (List::Busy, State::Writing, busy),
        ] {
            let cells = self.walk(list)?;
            let mut before = 0;
            let mut latest = 0;
            for &i in &cells {
                let cell = self.get(i)?;
                check(
                    cell.is_entry()
                        && (cell.state() == state
                            || list == List::Busy && cell.state() == State::Dropping),
                    "a list with a stranger",
                )?;
                check(
                    self.neighbour(list, i, false)? == before,
                    "a list torn backwards",
                )?;
                if list == List::Time {
                    check(cell.time() >= latest, "fetch times out of order")?;
                    latest = cell.time();
                }
                before = i;
            }
            check(self.list(list)[1] == before, "a list with another end")?;
            check(cells.len() as u64 == count, "count of a list")?;
        }
        Ok(())
    }

    fn validate_table(&self, named: u64) -> Res<()> {
        let mut counted = 0u64;
        let depth = self.header().depth;
        let ways = 1usize.checked_shl(depth);
        let directory = ways.and_then(|ways| self.block.directory().get(..ways));
        let directory = directory.ok_or(Fault::Corrupt("a directory too short"))?;
        for number in 0..self.header().segments {
            let segment = self.segment(number as usize)?;
            let used = segment.iter().skip(2).filter(|slot| **slot != 0).count();
            check(
                used == segment[0] as usize && used < SEGMENT - 2,
                "count of a segment",
            )?;
            counted += used as u64;
            let ways = directory.iter().filter(|entry| **entry == number).count();
            check(
                segment[1] <= depth && ways == 1 << (depth - segment[1]),
                "ways to a segment",
            )?;
        }
        check(counted == named, "count of the table")
    }
}

const OVERFLOW: Fault = Fault::Corrupt("bytes beyond all bounds");
