//! The directories that were asked for last. A loader reads one array at a time, or a few, so nearly
//! every key lies in a directory that was found a moment ago; to find it anew would take a hash and
//! a comparison for each part of its path.

use std::cell::RefCell;

/// Directories that are remembered: a power of two.
const PLACES: usize = 8;

#[derive(Debug)]
struct Known {
    path: Box<str>,
    /// The seed of the index that it was found in.
    seed: u64,
    hash: u64,
    cell: u32,
}

/// Paths of directories, with the hash and the cell of each.
#[derive(Debug, Default)]
pub(crate) struct Memo {
    known: RefCell<[Option<Known>; PLACES]>,
}

/// Where a path belongs: arrays in one group differ at the end of it, groups at the beginning.
fn place(path: &str) -> usize {
    let bytes = path.as_bytes();
    let at = |n: usize| usize::from(bytes.get(n).copied().unwrap_or(0));
    let len = bytes.len();
    (len ^ at(len / 2) ^ at(len.wrapping_sub(4)).rotate_left(1) ^ at(0)) % PLACES
}

impl Memo {
    /// Hash and cell of a directory, if it is remembered.
    #[inline]
    pub(crate) fn get(&self, path: &str, seed: u64) -> Option<(u64, u32)> {
        let known = self.known.try_borrow().ok()?;
        let known = known.get(place(path))?.as_ref()?;
        (known.seed == seed && *known.path == *path).then_some((known.hash, known.cell))
    }

    /// Appends the path of a directory, if it is remembered.
    #[inline]
    pub(crate) fn append(&self, cell: u32, seed: u64, out: &mut Vec<u8>) -> bool {
        let Ok(known) = self.known.try_borrow() else {
            return false;
        };
        let mut known = known.iter().flatten();
        let found = known.find(|known| known.cell == cell && known.seed == seed);
        if let Some(found) = found {
            out.extend_from_slice(found.path.as_bytes());
        }
        found.is_some()
    }

    /// Remembers a directory.
    pub(crate) fn put(&self, path: &str, seed: u64, hash: u64, cell: u32) {
        if let Ok(mut known) = self.known.try_borrow_mut()
            && let Some(known) = known.get_mut(place(path))
        {
            *known = Some(Known {
                path: path.into(),
                seed,
                hash,
                cell,
            });
        }
    }

    /// Forgets a cell that is a directory no longer.
    pub(crate) fn forget(&self, cell: u32) {
        if let Ok(mut known) = self.known.try_borrow_mut() {
            for known in known.iter_mut() {
                if known.as_ref().is_some_and(|known| known.cell == cell) {
                    *known = None;
                }
            }
        }
    }
}
