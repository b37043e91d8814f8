//! Open addressing from keys to numbers, by the low bits of the keys; 0 is a free slot.

use crate::error::{Error, Result};

const CORRUPT: Error = Error::Corrupt("simulation: table of keys");

/// Slots, of which there are a power of two.
#[derive(Debug)]
pub(super) struct Table<'a>(pub(super) &'a mut [u32]);

impl Table<'_> {
    /// The slot of a key and its number, or a free slot and 0. `key_of` gives the key of a number.
    pub(super) fn find(
        &self,
        key: u64,
        key_of: impl Fn(u32) -> Option<u64>,
    ) -> Result<(usize, u32)> {
        let mask = self.0.len().wrapping_sub(1);
        let mut at = key as usize & mask;
        for _ in 0..self.0.len() {
            let i = *self.0.get(at).ok_or(CORRUPT)?;
            if i == 0 || key_of(i).ok_or(CORRUPT)? == key {
                return Ok((at, i));
            }
            at = (at + 1) & mask;
        }
        Err(CORRUPT)
    }

    /// Puts a number into a free slot.
    pub(super) fn set(&mut self, at: usize, i: u32) -> Result<()> {
        *self.0.get_mut(at).ok_or(CORRUPT)? = i;
        Ok(())
    }

    /// Frees a slot; later ones of the run move back into the hole.
    pub(super) fn remove(
        &mut self,
        mut hole: usize,
        key_of: impl Fn(u32) -> Option<u64>,
    ) -> Result<()> {
        let mask = self.0.len().wrapping_sub(1);
        let mut at = hole;
        for _ in 0..self.0.len() {
            at = (at + 1) & mask;
            let moved = *self.0.get(at).ok_or(CORRUPT)?;
            if moved == 0 {
                break;
            }
            let home = key_of(moved).ok_or(CORRUPT)? as usize & mask;
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.set(hole, moved)?;
                hole = at;
            }
        }
        self.set(hole, 0)
    }

    /// Slots in use.
    pub(super) fn used(&self) -> usize {
        self.0.iter().filter(|i| **i != 0).count()
    }
}
