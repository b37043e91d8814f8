//! What a policy sees of the entries: two lists, and a note of each entry.

use crate::arena::{Arena, End, IN_MAIN, List, PolicyState, Storage};
use crate::error::{Error, Result};

/// Entries with the links, sizes and notes that policies need: those of an index, or the keys of a simulation.
///
/// Each `Live` entry is in one of two lists, [`List::Recency`] or [`List::Main`]; its note says which.
pub trait Entries {
    /// Whether this process alone can change them.
    const EXCLUSIVE: bool;

    /// What a policy keeps beside the lists.
    fn state(&self) -> &PolicyState;
    /// The same, mutable.
    fn state_mut(&mut self) -> &mut PolicyState;
    /// Number of entries, and their bytes.
    fn totals(&self) -> (u64, u64);
    /// Entries that there are at most, whatever their number is said to be.
    fn most(&self) -> u64 {
        self.totals().0
    }
    /// Bytes of an entry.
    fn size(&self, entry: u32) -> Result<u64>;
    /// Bytes that an entry takes in the books.
    fn room(&self, entry: u32) -> Result<u64> {
        self.size(entry)
    }
    /// Hash of the name of an entry, the same for each entry of that name.
    fn hash(&self, entry: u32) -> Result<u64>;
    /// What the policy has noted of an entry.
    fn note(&self, entry: u32) -> Result<u8>;
    /// Sets the same.
    fn set_note(&mut self, entry: u32, note: u8) -> Result<()>;
    /// The first or last entry of a list.
    fn end(&self, list: List, end: End) -> Result<Option<u32>>;
    /// The entry beside another one of the same list, or 0.
    fn neighbour(&self, entry: u32, towards: End) -> Result<u32>;
    /// Links an entry at one end of a list.
    fn link(&mut self, list: List, entry: u32, end: End) -> Result<()>;
    /// Unlinks an entry from its list.
    fn unlink(&mut self, list: List, entry: u32) -> Result<()>;
    /// What the policy remembers of keys, whether they have entries or not.
    fn history(&self) -> &[u64];
    /// The same, mutable.
    fn history_mut(&mut self) -> &mut [u64];
    /// Makes the history so long; new words are zero.
    fn grow_history(&mut self, len: usize) -> Result<()>;

    /// The list that an entry is in.
    #[inline]
    fn list_of(&self, entry: u32) -> Result<List> {
        Ok(if self.note(entry)? & IN_MAIN == 0 {
            List::Recency
        } else {
            List::Main
        })
    }

    /// Puts an entry that is in no list at the end of the recency list.
    fn enter(&mut self, entry: u32, note: u8) -> Result<()> {
        self.link(List::Recency, entry, End::Last)?;
        self.set_note(entry, note & !IN_MAIN)
    }

    /// Takes an entry out of its list.
    fn leave(&mut self, entry: u32) -> Result<()> {
        let list = self.list_of(entry)?;
        self.unlink(list, entry)?;
        if list == List::Main {
            self.count_main(entry, false)?;
        }
        self.set_note(entry, 0)
    }

    /// Puts an entry at the end of a list.
    #[inline]
    fn move_to(&mut self, entry: u32, list: List) -> Result<()> {
        let from = self.list_of(entry)?;
        if from == list && self.neighbour(entry, End::Last)? == 0 {
            return Ok(());
        }
        self.unlink(from, entry)?;
        self.link(list, entry, End::Last)?;
        if from == list {
            return Ok(());
        }
        self.count_main(entry, list == List::Main)?;
        let note = self.note(entry)?;
        self.set_note(entry, note ^ IN_MAIN)
    }

    /// To which end the way leads from an entry at one end of its list.
    fn way_from(&self, entry: u32) -> Result<End> {
        Ok(match self.neighbour(entry, End::Last)? {
            0 => End::First,
            _ => End::Last,
        })
    }

    /// Moves an entry to one end of its list.
    fn pass_over(&mut self, entry: u32, towards: End) -> Result<()> {
        if self.neighbour(entry, towards)? == 0 {
            return Ok(());
        }
        let list = self.list_of(entry)?;
        self.unlink(list, entry)?;
        self.link(list, entry, towards)
    }

    /// Counts the bytes of an entry that has come into the main list, or has left it.
    fn count_main(&mut self, entry: u32, came: bool) -> Result<()> {
        let size = self.size(entry)?;
        let bytes = self.state().main_bytes;
        let bytes = if came {
            bytes.checked_add(size)
        } else {
            bytes.checked_sub(size)
        };
        self.state_mut().main_bytes = bytes.ok_or(Error::Corrupt("bytes of the main list"))?;
        Ok(())
    }

    /// All entries of a list, the first one first.
    fn all_of(&self, list: List) -> Result<Vec<u32>> {
        let count = self.most();
        let mut all = Vec::new();
        let mut at = self.end(list, End::First)?.unwrap_or(0);
        while at != 0 {
            if all.len() as u64 > count {
                return Err(Error::Corrupt("list: cycle"));
            }
            all.push(at);
            at = self.neighbour(at, End::Last)?;
        }
        Ok(all)
    }
}

impl<S: Storage> Entries for Arena<S> {
    const EXCLUSIVE: bool = S::EXCLUSIVE;

    fn state(&self) -> &PolicyState {
        &self.header().policy
    }
    fn state_mut(&mut self) -> &mut PolicyState {
        &mut self.header_mut().policy
    }
    fn totals(&self) -> (u64, u64) {
        let header = self.header();
        (header.live_entries, header.live_bytes)
    }
    fn most(&self) -> u64 {
        let (count, _) = self.totals();
        count.min(self.storage.cells().len() as u64)
    }
    fn size(&self, entry: u32) -> Result<u64> {
        self.get(entry)?.size()
    }
    fn room(&self, entry: u32) -> Result<u64> {
        Ok(self.header().cost(self.get(entry)?.size()?))
    }
    fn hash(&self, entry: u32) -> Result<u64> {
        self.hash_of(entry)
    }
    #[inline]
    fn note(&self, entry: u32) -> Result<u8> {
        Arena::note(self, entry)
    }
    #[inline]
    fn set_note(&mut self, entry: u32, note: u8) -> Result<()> {
        Arena::set_note(self, entry, note)
    }
    fn end(&self, list: List, end: End) -> Result<Option<u32>> {
        Arena::end(self, list, end)
    }
    #[inline]
    fn neighbour(&self, entry: u32, towards: End) -> Result<u32> {
        Arena::neighbour(self, entry, towards)
    }
    #[inline]
    fn link(&mut self, list: List, entry: u32, end: End) -> Result<()> {
        Arena::link(self, list, entry, end)
    }
    #[inline]
    fn unlink(&mut self, list: List, entry: u32) -> Result<()> {
        Arena::unlink(self, list, entry)
    }
    fn history(&self) -> &[u64] {
        self.storage.history()
    }
    fn history_mut(&mut self) -> &mut [u64] {
        self.storage.history_mut()
    }
    fn grow_history(&mut self, len: usize) -> Result<()> {
        self.storage.grow_history(len)
    }
}
