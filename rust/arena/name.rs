//! The way back from a cell to its key and byte range.

use smallvec::SmallVec;

use super::arena::{Arena, ROOT};
use super::cell::Kind;
use super::storage::Storage;
use super::tree::CYCLE;
use crate::error::{Error, Result};
use crate::key::{ByteRange, RangeLabel};

/// Bytes of a usual key, so that building one allocates once.
const USUAL_KEY: usize = 48;

impl<S: Storage> Arena<S> {
    /// The key of a cell, and which bytes of it the cell holds.
    pub(crate) fn name(&self, i: u32) -> Result<(String, ByteRange)> {
        let cell = *self.get(i)?;
        let kind = cell.kind()?;
        let is_range = matches!(kind, Kind::Range | Kind::Offset | Kind::Suffix);
        let range = if is_range {
            self.byte_range(i)?
        } else {
            ByteRange::Full
        };
        let mut at = if is_range { cell.parent } else { i };
        let mut path = SmallVec::<[u32; 16]>::new();
        let mut key = Vec::with_capacity(USUAL_KEY);
        while at != ROOT {
            // The path of a directory itself has no trailing slash, unlike the cached one.
            if !path.is_empty() && self.paths.append(at, self.now(), &mut key) {
                break;
            }
            path.push(at);
            at = self.get(at)?.parent;
            if path.len() > self.storage.cells().len() {
                return Err(CYCLE);
            }
        }
        while let Some(part) = path.pop() {
            let packing = self.get(part)?.packing()?;
            if !packing.decode(self.label(part)?, &mut key) {
                return Err(Error::Corrupt("label: invalid coordinates"));
            }
            if !path.is_empty() {
                key.push(b'/');
            }
        }
        let key = String::from_utf8(key).map_err(|_| Error::Corrupt("key: invalid UTF-8"))?;
        Ok((key, range))
    }

    /// Which bytes of its key an entry holds.
    pub(crate) fn byte_range(&self, i: u32) -> Result<ByteRange> {
        let mut label = self.label(i)?;
        let mut number = || RangeLabel::read(&mut label).ok_or(Error::Corrupt("range: no numbers"));
        Ok(match self.get(i)?.kind()? {
            Kind::Range => {
                let start = number()?;
                ByteRange::Range {
                    start,
                    end: start.wrapping_add(number()?),
                }
            }
            Kind::Offset => ByteRange::Offset(number()?),
            Kind::Suffix => ByteRange::Suffix(number()?),
            _ => ByteRange::Full,
        })
    }
}
