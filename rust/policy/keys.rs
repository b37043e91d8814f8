//! Keys without values, in the lists of a policy: what a simulation caches.

use bytemuck::{Pod, Zeroable};

use super::entries::Entries;
use super::table::Table;
use crate::arena::{End, List, PolicyState};
use crate::error::{Error, Result};

/// One key, 24 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Node {
    key: u64,
    /// The note in the lowest byte, the size above it.
    size: u64,
    older: u32,
    newer: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Head {
    state: PolicyState,
    bytes: u64,
    recency: [u32; 2],
    main: [u32; 2],
    entries: u32,
    /// Nodes that were ever used, the first included, which never is.
    used: u32,
    /// First free node, or 0.
    free: u32,
    /// Nodes that there are; 0 where the memory was never used.
    nodes: u32,
}

/// Keys in memory that belongs to another owner.
#[derive(Debug)]
pub(super) struct Keys<'a> {
    head: &'a mut Head,
    nodes: &'a mut [Node],
    /// Twice as many slots as nodes.
    table: Table<'a>,
    history: &'a mut Vec<u64>,
}

const HEAD_WORDS: usize = size_of::<Head>() / 8;
const NODE_WORDS: usize = size_of::<Node>() / 8;
const CORRUPT: Error = Error::Corrupt("simulation: damaged");
/// Bits of a note.
const NOTE_BITS: u32 = 8;

/// Words of memory for so many nodes, a power of two; one of them is never used.
pub(super) const fn words_for(nodes: usize) -> usize {
    HEAD_WORDS + nodes * NODE_WORDS + nodes
}

impl<'a> Keys<'a> {
    /// The keys in this memory, which has [`words_for`] them; zeros hold none.
    pub(super) fn of(
        words: &'a mut [u64],
        nodes: usize,
        history: &'a mut Vec<u64>,
    ) -> Result<Self> {
        let (head, rest) = words.split_at_mut_checked(HEAD_WORDS).ok_or(CORRUPT)?;
        let (of_nodes, rest) = rest
            .split_at_mut_checked(nodes * NODE_WORDS)
            .ok_or(CORRUPT)?;
        let (of_table, _) = rest.split_at_mut_checked(nodes).ok_or(CORRUPT)?;
        let head: &mut Head =
            bytemuck::try_from_bytes_mut(bytemuck::cast_slice_mut(head)).map_err(|_| CORRUPT)?;
        if head.nodes == 0 {
            (head.nodes, head.used) = (nodes as u32, 1);
        }
        if head.nodes as usize != nodes {
            return Err(CORRUPT);
        }
        Ok(Keys {
            head,
            nodes: bytemuck::try_cast_slice_mut(of_nodes).map_err(|_| CORRUPT)?,
            table: Table(bytemuck::try_cast_slice_mut(of_table).map_err(|_| CORRUPT)?),
            history,
        })
    }

    /// Whether there is no node for one more key.
    pub(super) fn is_full(&self) -> bool {
        self.head.free == 0 && self.head.used >= self.head.nodes
    }

    fn node(&self, i: u32) -> Result<&Node> {
        self.nodes.get(i as usize).ok_or(CORRUPT)
    }

    fn node_mut(&mut self, i: u32) -> Result<&mut Node> {
        self.nodes.get_mut(i as usize).ok_or(CORRUPT)
    }

    fn slot_of(&self, key: u64) -> Result<(usize, u32)> {
        self.table
            .find(key, |i| Some(self.nodes.get(i as usize)?.key))
    }

    /// The entry of a key.
    pub(super) fn find(&self, key: u64) -> Result<Option<u32>> {
        let (_, i) = self.slot_of(key)?;
        Ok((i != 0).then_some(i))
    }

    /// Makes an entry of a key that has none; it is in no list.
    pub(super) fn make(&mut self, key: u64, size: u64) -> Result<u32> {
        let (at, there) = self.slot_of(key)?;
        let i = match self.head.free {
            _ if there != 0 => return Err(CORRUPT),
            0 => self.head.used,
            free => free,
        };
        let node = self.node_mut(i)?;
        let next = node.newer;
        *node = Node {
            key,
            size: size << NOTE_BITS,
            ..Node::zeroed()
        };
        if self.head.free == 0 {
            self.head.used += 1;
        } else {
            self.head.free = next;
        }
        self.table.set(at, i)?;
        self.head.entries = self.head.entries.saturating_add(1);
        self.head.bytes = self.head.bytes.saturating_add(size);
        Ok(i)
    }

    /// Frees an entry that is in no list.
    pub(super) fn free(&mut self, i: u32) -> Result<()> {
        let (key, size) = (self.node(i)?.key, self.size(i)?);
        let (at, found) = self.slot_of(key)?;
        if found != i {
            return Err(CORRUPT);
        }
        let nodes = &*self.nodes;
        self.table
            .remove(at, |i| Some(nodes.get(i as usize)?.key))?;
        let next = self.head.free;
        let node = self.node_mut(i)?;
        *node = Node::zeroed();
        node.newer = next;
        self.head.free = i;
        self.head.entries = self.head.entries.saturating_sub(1);
        self.head.bytes = self.head.bytes.saturating_sub(size);
        Ok(())
    }

    /// Copies all to larger memory, where each has the same number.
    pub(super) fn copy_to(&self, other: &mut Keys<'_>) -> Result<()> {
        let nodes = other.nodes.get_mut(..self.nodes.len()).ok_or(CORRUPT)?;
        nodes.copy_from_slice(self.nodes);
        *other.head = Head {
            nodes: other.head.nodes,
            ..*self.head
        };
        for &i in self.table.0.iter().filter(|i| **i != 0) {
            let (at, _) = other.slot_of(self.node(i)?.key)?;
            other.table.set(at, i)?;
        }
        Ok(())
    }

    /// Recomputes everything.
    pub(super) fn validate(&self) -> Result<()> {
        let mut seen = [(0u32, 0u64); 2];
        for (list, seen) in [List::Recency, List::Main].into_iter().zip(&mut seen) {
            let mut before = 0;
            for i in self.all_of(list)? {
                let is_sound = self.list_of(i)? == list
                    && self.neighbour(i, End::First)? == before
                    && self.find(self.node(i)?.key)? == Some(i);
                if !is_sound {
                    return Err(CORRUPT);
                }
                before = i;
                *seen = (seen.0 + 1, seen.1 + self.size(i)?);
            }
            if self.end(list, End::Last)?.unwrap_or(0) != before {
                return Err(CORRUPT);
            }
        }
        let [(recent, recent_bytes), (main, main_bytes)] = seen;
        let is_sound = recent + main == self.head.entries
            && recent_bytes + main_bytes == self.head.bytes
            && main_bytes == self.head.state.main_bytes
            && self.table.used() == self.head.entries as usize;
        if is_sound { Ok(()) } else { Err(CORRUPT) }
    }

    fn ends(&mut self, list: List) -> Result<&mut [u32; 2]> {
        match list {
            List::Recency => Ok(&mut self.head.recency),
            List::Main => Ok(&mut self.head.main),
            _ => Err(CORRUPT),
        }
    }

    fn set_neighbour(&mut self, i: u32, towards: End, to: u32) -> Result<()> {
        let node = self.node_mut(i)?;
        *towards.of([&mut node.older, &mut node.newer]) = to;
        Ok(())
    }
}

impl Entries for Keys<'_> {
    const EXCLUSIVE: bool = true;

    fn state(&self) -> &PolicyState {
        &self.head.state
    }
    fn state_mut(&mut self) -> &mut PolicyState {
        &mut self.head.state
    }
    fn totals(&self) -> (u64, u64) {
        (u64::from(self.head.entries), self.head.bytes)
    }
    fn size(&self, entry: u32) -> Result<u64> {
        Ok(self.node(entry)?.size >> NOTE_BITS)
    }
    fn hash(&self, entry: u32) -> Result<u64> {
        Ok(self.node(entry)?.key)
    }
    fn note(&self, entry: u32) -> Result<u8> {
        Ok(self.node(entry)?.size as u8)
    }
    fn set_note(&mut self, entry: u32, note: u8) -> Result<()> {
        let node = self.node_mut(entry)?;
        node.size = node.size >> NOTE_BITS << NOTE_BITS | u64::from(note);
        Ok(())
    }
    fn end(&self, list: List, end: End) -> Result<Option<u32>> {
        let i = end.of(match list {
            List::Recency => self.head.recency,
            List::Main => self.head.main,
            _ => return Err(CORRUPT),
        });
        Ok((i != 0).then_some(i))
    }
    fn neighbour(&self, entry: u32, towards: End) -> Result<u32> {
        let node = self.node(entry)?;
        Ok(towards.of([node.older, node.newer]))
    }
    fn link(&mut self, list: List, entry: u32, end: End) -> Result<()> {
        let beside = std::mem::replace(end.of(self.ends(list)?.each_mut()), entry);
        self.set_neighbour(entry, end, 0)?;
        self.set_neighbour(entry, end.other(), beside)?;
        if beside != 0 {
            return self.set_neighbour(beside, end, entry);
        }
        *end.other().of(self.ends(list)?.each_mut()) = entry;
        Ok(())
    }
    fn unlink(&mut self, list: List, entry: u32) -> Result<()> {
        let Node { older, newer, .. } = *self.node(entry)?;
        match older {
            0 => self.ends(list)?[0] = newer,
            _ => self.set_neighbour(older, End::Last, newer)?,
        }
        match newer {
            0 => self.ends(list)?[1] = older,
            _ => self.set_neighbour(newer, End::First, older)?,
        }
        Ok(())
    }
    fn history(&self) -> &[u64] {
        self.history
    }
    fn history_mut(&mut self) -> &mut [u64] {
        self.history
    }
    fn grow_history(&mut self, len: usize) -> Result<()> {
        self.history.resize(len, 0);
        Ok(())
    }
}
