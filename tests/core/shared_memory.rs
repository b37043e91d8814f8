//! Memory of a test that an index takes for shared: it trusts nothing in it that others might have damaged.

use zcache::arena::{Cell, Header, Heap, Storage};
use zcache::cache::{Peers, Slot};
use zcache::error::Result;

/// The same as [`Heap`], but for what only memory of one process is trusted with. All changes are its own, and have the
/// same slot.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    heap: Heap,
    changes: u32,
}

impl From<Heap> for Shared {
    fn from(heap: Heap) -> Self {
        Shared { heap, changes: 0 }
    }
}

impl Storage for Shared {
    fn header(&self) -> &Header {
        self.heap.header()
    }
    fn header_mut(&mut self) -> &mut Header {
        self.heap.header_mut()
    }
    fn cells(&self) -> &[Cell] {
        self.heap.cells()
    }
    fn cells_mut(&mut self) -> &mut [Cell] {
        self.heap.cells_mut()
    }
    fn slots(&self) -> &[u32] {
        self.heap.slots()
    }
    fn slots_mut(&mut self) -> &mut [u32] {
        self.heap.slots_mut()
    }
    fn directory(&self) -> &[u32] {
        self.heap.directory()
    }
    fn directory_mut(&mut self) -> &mut [u32] {
        self.heap.directory_mut()
    }
    fn strings(&self) -> &[u32] {
        self.heap.strings()
    }
    fn strings_mut(&mut self) -> &mut [u32] {
        self.heap.strings_mut()
    }
    fn has_places(&self) -> bool {
        self.heap.has_places()
    }
    fn places(&self) -> &[u64] {
        self.heap.places()
    }
    fn places_mut(&mut self) -> &mut [u64] {
        self.heap.places_mut()
    }
    fn grow_cells(&mut self, len: usize) -> Result<()> {
        self.heap.grow_cells(len)
    }
    fn grow_slots(&mut self, len: usize) -> Result<()> {
        self.heap.grow_slots(len)
    }
    fn grow_directory(&mut self, len: usize) -> Result<()> {
        self.heap.grow_directory(len)
    }
    fn grow_strings(&mut self, len: usize) -> Result<()> {
        self.heap.grow_strings(len)
    }
}

impl Peers for Shared {
    fn changes(&self, _: Slot) -> u32 {
        self.changes
    }
    fn own_changes(&self, _: Slot) -> u32 {
        self.changes
    }
    fn count_change(&mut self, _: Slot) {
        self.changes += 1;
    }
}
