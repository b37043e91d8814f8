//! The directories that were asked for last. A loader reads some arrays at a time, so nearly every
//! key lies in a directory that was found a moment ago; to find it anew would take a hash and a
//! comparison for each part of its path.

use std::cell::RefCell;

use crate::key::ODD;

/// Directories that are remembered: a power of two, and more than a dataset has variables.
const PLACES: usize = 64;

#[derive(Debug)]
struct Known {
    path: Box<str>,
    /// The seed of the index that it was found in.
    seed: u64,
    hash: u64,
    cell: u32,
}

/// Paths of directories, with the hash and the cell of each.
#[derive(Debug)]
pub(crate) struct Memo {
    known: RefCell<[Option<Known>; PLACES]>,
    /// For some cells the place of their path.
    places: RefCell<[u8; PLACES]>,
}

impl Default for Memo {
    fn default() -> Self {
        Memo {
            known: RefCell::new(std::array::from_fn(|_| None)),
            places: RefCell::new([0; PLACES]),
        }
    }
}

/// Where a path belongs. Looks at its length, its middle and its end.
#[inline]
fn place(path: &str) -> usize {
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
    (word.wrapping_mul(ODD) >> (u64::BITS - PLACES.ilog2())) as usize
}

const WORD: usize = size_of::<u64>();

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
        let (Ok(known), Ok(places)) = (self.known.try_borrow(), self.places.try_borrow()) else {
            return false;
        };
        let place = places.get(cell as usize % PLACES).copied().unwrap_or(0);
        let found = known.get(usize::from(place)).and_then(Option::as_ref);
        let found = found.filter(|known| known.cell == cell && known.seed == seed);
        if let Some(found) = found {
            out.extend_from_slice(found.path.as_bytes());
        }
        found.is_some()
    }

    /// Remembers a directory.
    pub(crate) fn put(&self, path: &str, seed: u64, hash: u64, cell: u32) {
        let at = place(path);
        if let (Ok(mut known), Ok(mut places)) =
            (self.known.try_borrow_mut(), self.places.try_borrow_mut())
            && let Some(known) = known.get_mut(at)
            && let Some(place) = places.get_mut(cell as usize % PLACES)
        {
            *place = at as u8;
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
