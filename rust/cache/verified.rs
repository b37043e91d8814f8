//! The verified set: entries of a shared index that this process has compared with their
//! checksums.

/// Entries of a page.
const PAGE: usize = 1024;

/// A fingerprint for each verified cell, 0 for all others, in pages that are made when needed: most
/// processes verify a small part of a large index.
#[derive(Debug, Default)]
pub(super) struct VerifiedSet {
    pages: Vec<Option<Box<[u32; PAGE]>>>,
}

impl VerifiedSet {
    /// The fingerprint of a cell.
    #[inline]
    pub(super) fn get(&self, cell: u32) -> u32 {
        let at = cell as usize;
        let page = self.pages.get(at / PAGE).and_then(Option::as_ref);
        page.and_then(|page| page.get(at % PAGE))
            .copied()
            .unwrap_or(0)
    }

    /// Sets the fingerprint of a cell.
    pub(super) fn set(&mut self, cell: u32, fingerprint: u32) {
        let at = cell as usize;
        if self.pages.len() <= at / PAGE {
            self.pages.resize_with(at / PAGE + 1, || None);
        }
        if let Some(page) = self.pages.get_mut(at / PAGE) {
            let page = page.get_or_insert_with(|| Box::new([0; PAGE]));
            if let Some(slot) = page.get_mut(at % PAGE) {
                *slot = fingerprint;
            }
        }
    }

    /// Removes all cells.
    pub(super) fn clear(&mut self) {
        self.pages.clear();
    }

    /// Bytes of memory.
    pub(super) fn memory(&self) -> usize {
        let pages = self.pages.iter().flatten().count();
        std::mem::size_of_val(self.pages.as_slice()) + pages * size_of::<[u32; PAGE]>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_sparse_cells_takes_memory_for_their_pages_only() {
        let mut set = VerifiedSet::default();
        for cell in [0, 5, PAGE as u32 - 1, PAGE as u32, 10_000_000] {
            assert_eq!(set.get(cell), 0);
            set.set(cell, cell + 1);
            assert_eq!(set.get(cell), cell + 1);
        }
        assert_eq!([set.get(5), set.get(6)], [6, 0]);
        assert!(set.memory() < 200_000, "{}", set.memory());
        set.clear();
        assert_eq!([set.get(5), set.memory() as u32], [0, 0]);
    }
}
