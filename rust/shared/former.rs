//! What an index of an earlier boot has listed: a proof that a file is ours where a copy of the directory
//! has lost its times. It counts only together with the bytes of the file, which are compared.

use std::collections::HashMap;

use crate::arena::{ROOT, State};
use crate::cache::{Cache, Peers};
use crate::error::Result;
use crate::key;
use crate::policy::Eviction;

/// A value that was listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormerValue {
    /// Milliseconds since 1970 of its fetch.
    pub fetched: u64,
    /// Bytes of the value.
    pub size: u64,
    /// CRC32C of the value.
    pub checksum: u32,
}

/// The valid entries of an index, by the hash of their names.
#[derive(Debug, Default)]
pub(super) struct Former(HashMap<u64, FormerValue>);

impl Former {
    pub(super) fn of<S: Peers, T: Clone, P: Eviction>(cache: &Cache<S, T, P>) -> Result<Former> {
        let arena = &cache.arena;
        let live = arena.entries_below(ROOT, usize::MAX, |arena, i| {
            Ok(arena.get(i)?.state() == State::Live)
        })?;
        let mut found = HashMap::with_capacity(live.len());
        for i in live {
            let cell = arena.get(i)?;
            if let Some(checksum) = cell.checksum() {
                let (fetched, size) = (cell.time(), cell.size()?);
                let (key, range) = arena.name(i)?;
                let value = FormerValue {
                    fetched,
                    size,
                    checksum,
                };
                found.insert(hash(&range.cache_key(&key)), value);
            }
        }
        Ok(Former(found))
    }

    pub(super) fn get(&self, cache_key: &str) -> Option<FormerValue> {
        self.0.get(&hash(cache_key)).copied()
    }
}

fn hash(cache_key: &str) -> u64 {
    key::hash(cache_key.as_bytes(), 0, 0)
}
