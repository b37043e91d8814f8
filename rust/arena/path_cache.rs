//! The path cache: directories that were looked up last. A reader works on a few arrays at a time,
//! so nearly every key lies in a directory that was found a moment ago; finding it anew would take
//! a hash and a comparison for each part of its path.

use std::cell::RefCell;

use crate::key::ODD;

/// Directories that are kept: a power of two, and more than a dataset has variables.
const CAPACITY: usize = 64;

/// What an index was when a directory was found in it: while it is the same, the cell is still that directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AsOf {
    pub(crate) seed: u64,
    /// Directories that were ever freed, by whichever process.
    pub(crate) freed: u64,
}

#[derive(Debug)]
struct Directory {
    path: Box<str>,
    as_of: AsOf,
    hash: u64,
    cell: u32,
}

/// Paths of directories, with the hash and the cell of each; direct-mapped.
#[derive(Debug)]
pub(crate) struct PathCache {
    directories: RefCell<[Option<Directory>; CAPACITY]>,
    /// By cell number modulo the capacity: where the path of that cell is.
    by_cell: RefCell<[u8; CAPACITY]>,
}

impl Default for PathCache {
    fn default() -> Self {
        PathCache {
            directories: RefCell::new(std::array::from_fn(|_| None)),
            by_cell: RefCell::new([0; CAPACITY]),
        }
    }
}

const WORD: usize = size_of::<u64>();

/// Where a path belongs, by its length, its middle and its end: hashing all of it would cost more
/// than the cache saves.
#[inline]
fn position(path: &str) -> usize {
    let bytes = path.as_bytes();
    let middle = bytes.len().saturating_sub(WORD) / 2;
    let words = match (bytes.get(middle..middle + WORD), bytes.last_chunk()) {
        (Some(middle), Some(last)) => [middle.try_into().unwrap_or_default(), *last],
        _ => {
            let mut word = [0; WORD];
            word.iter_mut().zip(bytes).for_each(|(to, c)| *to = *c);
            [word, [0; WORD]]
        }
    };
    let [middle, last] = words.map(u64::from_le_bytes);
    let word = middle ^ last.rotate_left(29) ^ bytes.len() as u64;
    (word.wrapping_mul(ODD) >> (u64::BITS - CAPACITY.ilog2())) as usize
}

impl PathCache {
    /// Hash and cell of a directory, if it is cached.
    #[inline]
    pub(crate) fn get(&self, path: &str, as_of: AsOf) -> Option<(u64, u32)> {
        let directories = self.directories.try_borrow().ok()?;
        let found = directories.get(position(path))?.as_ref()?;
        (found.as_of == as_of && *found.path == *path).then_some((found.hash, found.cell))
    }

    /// Appends the path of a directory, if it is cached.
    #[inline]
    pub(crate) fn append(&self, cell: u32, as_of: AsOf, out: &mut Vec<u8>) -> bool {
        let (Ok(directories), Ok(by_cell)) =
            (self.directories.try_borrow(), self.by_cell.try_borrow())
        else {
            return false;
        };
        let at = by_cell.get(cell as usize % CAPACITY).copied().unwrap_or(0);
        let found = directories.get(usize::from(at)).and_then(Option::as_ref);
        let found = found.filter(|found| found.cell == cell && found.as_of == as_of);
        if let Some(found) = found {
            out.extend_from_slice(found.path.as_bytes());
        }
        found.is_some()
    }

    /// Caches a directory.
    pub(crate) fn put(&self, path: &str, as_of: AsOf, hash: u64, cell: u32) {
        let at = position(path);
        if let (Ok(mut directories), Ok(mut by_cell)) = (
            self.directories.try_borrow_mut(),
            self.by_cell.try_borrow_mut(),
        ) && let Some(directory) = directories.get_mut(at)
            && let Some(place) = by_cell.get_mut(cell as usize % CAPACITY)
        {
            *place = at as u8;
            *directory = Some(Directory {
                path: path.into(),
                as_of,
                hash,
                cell,
            });
        }
    }

    /// Removes a cell that is no longer a directory.
    pub(crate) fn remove(&self, cell: u32) {
        if let Ok(mut directories) = self.directories.try_borrow_mut() {
            for directory in directories.iter_mut() {
                if directory.as_ref().is_some_and(|found| found.cell == cell) {
                    *directory = None;
                }
            }
        }
    }
}
