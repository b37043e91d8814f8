//! Storage that fails as memory can: it refuses to grow, and its words change.

use std::cell::{Cell as Slot, RefCell};
use std::rc::Rc;

use zcache::arena::{Cell, Header, Storage};
use zcache::cache::Peers;
use zcache::error::{Error, Result};

/// Which growth is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refuse {
    pub(crate) cells: bool,
    pub(crate) slots: bool,
    pub(crate) directory: bool,
    pub(crate) strings: bool,
}

/// What one word is overwritten with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Damage {
    /// One bit is flipped.
    Flip(u8),
    /// A number that may well be that of another cell.
    Set(u32),
    /// The word that stands there, more or less.
    Add(i8),
    /// The word of another place.
    Copy(usize),
}

/// A part of the storage that is damaged.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Header,
    Cells,
    Slots,
    Directory,
    Strings,
}

/// What a test has planned for a storage, shared with it.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) refuse: Slot<Refuse>,
    /// Changes of the storage until the damage is done.
    pub(crate) fuse: Slot<u32>,
    pub(crate) damage: RefCell<Vec<(Part, usize, Damage)>>,
    /// Accesses left until an operation counts as endless; 0 for never.
    pub(crate) patience: Slot<u64>,
    /// Words of strings in use, as of the last change.
    pub(crate) strings_used: Slot<u32>,
}

impl Plan {
    fn tick(&self) {
        match self.patience.get() {
            0 => {}
            1 => panic!("an operation that does not end"),
            left => self.patience.set(left - 1),
        }
    }
}

/// Storage in plain vectors.
#[derive(Debug, Default)]
pub(crate) struct Vectors {
    header: Header,
    cells: Vec<Cell>,
    slots: Vec<u32>,
    directory: Vec<u32>,
    strings: Vec<u32>,
    plan: Rc<Plan>,
}

impl Vectors {
    pub(crate) fn new(plan: &Rc<Plan>) -> Self {
        Vectors {
            plan: Rc::clone(plan),
            ..Vectors::default()
        }
    }

    fn changing(&mut self) {
        self.plan.tick();
        self.plan.strings_used.set(self.header.strings_used);
        match self.plan.fuse.get() {
            0 => {}
            1 => {
                self.plan.fuse.set(0);
                let damage = self.plan.damage.take();
                for (part, at, how) in damage {
                    self.hit(part, at, how);
                }
            }
            left => self.plan.fuse.set(left - 1),
        }
    }

    fn hit(&mut self, part: Part, at: usize, how: Damage) {
        let used = self.header.cells_used as usize;
        let words: &mut [u32] = match part {
            Part::Header => bytemuck::cast_slice_mut(std::slice::from_mut(&mut self.header)),
            Part::Cells => {
                let used = used.min(self.cells.len());
                bytemuck::cast_slice_mut(&mut self.cells[..used])
            }
            Part::Slots => &mut self.slots,
            Part::Directory => &mut self.directory,
            Part::Strings => {
                let used = (self.header.strings_used as usize).min(self.strings.len());
                &mut self.strings[..used]
            }
        };
        if words.is_empty() {
            return;
        }
        let at = at % words.len();
        words[at] = match how {
            Damage::Flip(bit) => words[at] ^ 1 << (bit % 32),
            Damage::Set(word) => word,
            Damage::Add(by) => words[at].wrapping_add_signed(i32::from(by)),
            Damage::Copy(from) => words[from % words.len()],
        };
    }

    fn grow<T: bytemuck::Pod>(refuse: bool, vec: &mut Vec<T>, len: usize) -> Result<()> {
        assert!(len >= vec.len(), "storage never shrinks");
        if refuse && len > vec.len() {
            return Err(Error::Full);
        }
        assert!(len < 1 << 28, "growth beyond all reason: {len}");
        vec.resize(len, T::zeroed());
        Ok(())
    }
}

impl Storage for Vectors {
    fn header(&self) -> &Header {
        self.plan.tick();
        &self.header
    }
    fn header_mut(&mut self) -> &mut Header {
        self.changing();
        &mut self.header
    }
    fn cells(&self) -> &[Cell] {
        self.plan.tick();
        &self.cells
    }
    fn cells_mut(&mut self) -> &mut [Cell] {
        self.changing();
        &mut self.cells
    }
    fn slots(&self) -> &[u32] {
        self.plan.tick();
        &self.slots
    }
    fn slots_mut(&mut self) -> &mut [u32] {
        self.changing();
        &mut self.slots
    }
    fn directory(&self) -> &[u32] {
        self.plan.tick();
        &self.directory
    }
    fn directory_mut(&mut self) -> &mut [u32] {
        self.changing();
        &mut self.directory
    }
    fn strings(&self) -> &[u32] {
        self.plan.tick();
        &self.strings
    }
    fn strings_mut(&mut self) -> &mut [u32] {
        self.changing();
        &mut self.strings
    }
    fn grow_cells(&mut self, len: usize) -> Result<()> {
        Vectors::grow(self.plan.refuse.get().cells, &mut self.cells, len)
    }
    fn grow_slots(&mut self, len: usize) -> Result<()> {
        Vectors::grow(self.plan.refuse.get().slots, &mut self.slots, len)
    }
    fn grow_directory(&mut self, len: usize) -> Result<()> {
        Vectors::grow(self.plan.refuse.get().directory, &mut self.directory, len)
    }
    fn grow_strings(&mut self, len: usize) -> Result<()> {
        Vectors::grow(self.plan.refuse.get().strings, &mut self.strings, len)
    }
}

impl Peers for Vectors {}
