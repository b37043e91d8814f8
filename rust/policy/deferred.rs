//! Touches that are applied together.

use super::entries::Entries;
use crate::arena::End;
use crate::error::Result;

/// How many. Moving an entry writes to two neighbours that are in no cache of the processor; many such misses
/// overlap and take the time of one.
const BATCH: usize = 64;

/// Entries that were used since the last batch, in the order of use.
///
/// In memory of one process touches are deferred and applied in batches, before anything else looks at the
/// order. Other processes would not see deferred touches, so in a shared index each is applied at once.
#[derive(Debug, Default)]
pub(super) struct Deferred(Vec<u32>);

impl Deferred {
    /// Applies a touch, now or later.
    #[inline]
    pub(super) fn touch<E: Entries>(
        &mut self,
        entries: &mut E,
        entry: u32,
        apply: impl Fn(&mut E, u32) -> Result<()>,
    ) -> Result<()> {
        if !E::EXCLUSIVE {
            return apply(entries, entry);
        }
        self.0.push(entry);
        if self.0.len() < BATCH {
            return Ok(());
        }
        self.flush(entries, apply)
    }

    /// Applies all that were deferred.
    #[inline]
    pub(super) fn flush<E: Entries>(
        &mut self,
        entries: &mut E,
        apply: impl Fn(&mut E, u32) -> Result<()>,
    ) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        // Independent reads of all neighbours, so that the misses overlap.
        let mut read = 0;
        for &i in &self.0 {
            let [older, newer] = [
                entries.neighbour(i, End::First)?,
                entries.neighbour(i, End::Last)?,
            ];
            read ^= entries.neighbour(older, End::Last)? ^ entries.neighbour(newer, End::First)?;
        }
        std::hint::black_box(read);
        let mut touched = std::mem::take(&mut self.0);
        let result = touched.iter().try_for_each(|i| apply(entries, *i));
        touched.clear();
        self.0 = touched;
        result
    }

    /// Those that wait, in the order of use.
    pub(super) fn waiting(&self) -> &[u32] {
        &self.0
    }

    /// Forgets them.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
