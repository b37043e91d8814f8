//! What a rebuild has found in the segments of a pool.
//!
//! Two scans may be on their way, where the index was emptied while the first one was: each adds what is not known yet.

use std::collections::HashMap;

use super::cache::Cache;
use super::peers::Peers;
use super::segments::{FIRST_PAGE, pages_of};
use crate::arena::{End, List, MAX_PAGES, Place};
use crate::error::{Error, Result};
use crate::key::ByteRange;
use crate::policy::Eviction;

impl<S: Peers, T: Clone, P: Eviction> Cache<S, T, P> {
    /// The cell of each segment, by its number.
    pub fn segment_cells(&self) -> Result<HashMap<u64, u32>> {
        let cells = self.arena.list_cells(List::Segments)?;
        let numbered = cells
            .into_iter()
            .map(|i| Ok((self.arena.segment_cell(i)?.segment_number(), i)));
        numbered.collect()
    }

    /// Adds a segment that a rebuild has found, in which values begin at pages below `capacity`. Returns its cell.
    pub fn adopt_segment(&mut self, number: u64, capacity: u32) -> Result<u32> {
        let capacity = capacity.max(1);
        let i = self.arena.add_segment(number, capacity, 0)?;
        let bytes = self.bytes_beside(capacity);
        self.count_folders(i64::try_from(bytes).unwrap_or(i64::MAX));
        self.sort_segment(i)?;
        Ok(i)
    }

    /// Adds a value that a rebuild has found in a segment; see [`Cache::adopt`].
    pub fn adopt_placed(
        &mut self,
        cache_key: &str,
        size: u64,
        fetched: u64,
        checksum: Option<u32>,
        (segment, page): (u32, u32),
    ) -> Result<bool> {
        let page = page
            .checked_sub(FIRST_PAGE)
            .filter(|page| *page < MAX_PAGES);
        let page = page.ok_or(Error::Full)?;
        if let Some((key, range)) = ByteRange::parse(cache_key)
            && let Some(i) = self.arena.find(key, range)?
            && self.arena.place(i)? == Some(Place { segment, page })
        {
            return Ok(true);
        }
        self.adopt_as(cache_key, size, fetched, checksum, |cache, i| {
            let cell = cache.arena.segment_cell_mut(segment)?;
            let was_spent = cell.is_spent_segment();
            cell.add_to_segment(pages_of(size))?;
            let place = Place { segment, page };
            cache.arena.set_place_word(i, place.word(i))?;
            if was_spent {
                cache.arena.unlink(List::Segments, segment)?;
                cache.arena.link(List::Segments, segment, End::Last)?;
            }
            Ok(())
        })
    }
}
