//! What this process has verified of an index that others share: a mark for each cell, in pages that
//! are made when they are needed. One list would have to be filled with zeros up to the cell.

/// Marks of a page.
const PAGE: usize = 1024;

/// A number for each of some cells, 0 for all others.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pages: Vec<Option<Box<[u32; PAGE]>>>,
}

impl Seen {
    /// The number of a cell.
    #[inline]
    pub(crate) fn get(&self, cell: u32) -> u32 {
        let at = cell as usize;
        let page = self.pages.get(at / PAGE).and_then(Option::as_ref);
        page.and_then(|page| page.get(at % PAGE))
            .copied()
            .unwrap_or(0)
    }

    /// Sets the number of a cell.
    pub(crate) fn set(&mut self, cell: u32, mark: u32) {
        let at = cell as usize;
        if self.pages.len() <= at / PAGE {
            self.pages.resize_with(at / PAGE + 1, || None);
        }
        if let Some(page) = self.pages.get_mut(at / PAGE) {
            let page = page.get_or_insert_with(|| Box::new([0; PAGE]));
            if let Some(place) = page.get_mut(at % PAGE) {
                *place = mark;
            }
        }
    }

    /// Forgets all of them.
    pub(crate) fn clear(&mut self) {
        self.pages.clear();
    }

    /// Bytes that it takes.
    pub(crate) fn memory(&self) -> usize {
        let pages = self.pages.iter().flatten().count();
        std::mem::size_of_val(self.pages.as_slice()) + pages * size_of::<[u32; PAGE]>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_for_each_cell_and_memory_for_few() {
        let mut seen = Seen::default();
        for cell in [0, 5, PAGE as u32 - 1, PAGE as u32, 10_000_000] {
            assert_eq!(seen.get(cell), 0);
            seen.set(cell, cell + 1);
            assert_eq!(seen.get(cell), cell + 1);
        }
        assert_eq!([seen.get(5), seen.get(6)], [6, 0]);
        assert!(seen.memory() < 200_000, "{}", seen.memory());
        seen.clear();
        assert_eq!([seen.get(5), seen.memory() as u32], [0, 0]);
    }
}
