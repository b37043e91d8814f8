//! Memory of a test that an index takes for shared: it trusts nothing in it that others might have damaged.

use zcache::arena::{Cell, Header, Heap, Storage};
use zcache::cache::Peers;
use zcache::error::Result;

/// The same as [`Heap`], but for what only memory of one process is trusted with.
#[derive(Debug, Default)]
pub(crate) struct Shared(pub(crate) Heap);

impl Storage for Shared {
    fn header(&self) -> &Header {
        self.0.header()
    }
    fn header_mut(&mut self) -> &mut Header {
        self.0.header_mut()
    }
    fn cells(&self) -> &[Cell] {
        self.0.cells()
    }
    fn cells_mut(&mut self) -> &mut [Cell] {
        self.0.cells_mut()
    }
    fn slots(&self) -> &[u32] {
        self.0.slots()
    }
    fn slots_mut(&mut self) -> &mut [u32] {
        self.0.slots_mut()
    }
    fn directory(&self) -> &[u32] {
        self.0.directory()
    }
    fn directory_mut(&mut self) -> &mut [u32] {
        self.0.directory_mut()
    }
    fn strings(&self) -> &[u32] {
        self.0.strings()
    }
    fn strings_mut(&mut self) -> &mut [u32] {
        self.0.strings_mut()
    }
    fn has_places(&self) -> bool {
        self.0.has_places()
    }
    fn places(&self) -> &[u64] {
        self.0.places()
    }
    fn places_mut(&mut self) -> &mut [u64] {
        self.0.places_mut()
    }
    fn grow_cells(&mut self, len: usize) -> Result<()> {
        self.0.grow_cells(len)
    }
    fn grow_slots(&mut self, len: usize) -> Result<()> {
        self.0.grow_slots(len)
    }
    fn grow_directory(&mut self, len: usize) -> Result<()> {
        self.0.grow_directory(len)
    }
    fn grow_strings(&mut self, len: usize) -> Result<()> {
        self.0.grow_strings(len)
    }
}

impl Peers for Shared {}
