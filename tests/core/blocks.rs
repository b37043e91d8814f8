//! A block that does what memory can do: refuse to grow, and hold other bits than were put there.

use std::cell::{Cell as Slot, RefCell};
use std::rc::Rc;

use zcache::block::{Block, Header};
use zcache::cell::Cell;
use zcache::error::{Fault, Res};

/// Which growth is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refuse {
    pub(crate) cells: bool,
    pub(crate) slots: bool,
    pub(crate) directory: bool,
    pub(crate) texts: bool,
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

/// Where: a part of the block, and a word of it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Header,
    Cells,
    Slots,
    Directory,
    Texts,
}

/// What a test has in store for a block, shared with it.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) refuse: Slot<Refuse>,
    /// Changes of the block until the damage is done.
    pub(crate) fuse: Slot<u32>,
    pub(crate) damage: RefCell<Vec<(Part, usize, Damage)>>,
    /// Accesses left until an operation counts as endless; 0 for never.
    pub(crate) patience: Slot<u64>,
    /// Words of texts in use, as of the last change.
    pub(crate) texts_used: Slot<u32>,
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

/// A block of plain vectors.
#[derive(Debug, Default)]
pub(crate) struct Vectors {
    header: Header,
    cells: Vec<Cell>,
    slots: Vec<u32>,
    directory: Vec<u32>,
    texts: Vec<u32>,
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
        self.plan.texts_used.set(self.header.texts_used);
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
        let used = self.header.used as usize;
        let words: &mut [u32] = match part {
            Part::Header => bytemuck::cast_slice_mut(std::slice::from_mut(&mut self.header)),
            Part::Cells => {
                let used = used.min(self.cells.len());
                bytemuck::cast_slice_mut(&mut self.cells[..used])
            }
            Part::Slots => &mut self.slots,
            Part::Directory => &mut self.directory,
            Part::Texts => {
                let used = (self.header.texts_used as usize).min(self.texts.len());
                &mut self.texts[..used]
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

    fn grow<T: bytemuck::Pod>(refuse: bool, vec: &mut Vec<T>, len: usize) -> Res<()> {
        assert!(len >= vec.len(), "a block never shrinks");
        if refuse && len > vec.len() {
            return Err(Fault::Full);
        }
        assert!(len < 1 << 28, "growth beyond all reason: {len}");
        vec.resize(len, T::zeroed());
        Ok(())
    }
}

impl Block for Vectors {
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
    fn texts(&self) -> &[u32] {
        self.plan.tick();
        &self.texts
    }
    fn texts_mut(&mut self) -> &mut [u32] {
        self.changing();
        &mut self.texts
    }
    fn grow_cells(&mut self, len: usize) -> Res<()> {
        Vectors::grow(self.plan.refuse.get().cells, &mut self.cells, len)
    }
    fn grow_slots(&mut self, len: usize) -> Res<()> {
        Vectors::grow(self.plan.refuse.get().slots, &mut self.slots, len)
    }
    fn grow_directory(&mut self, len: usize) -> Res<()> {
        Vectors::grow(self.plan.refuse.get().directory, &mut self.directory, len)
    }
    fn grow_texts(&mut self, len: usize) -> Res<()> {
        Vectors::grow(self.plan.refuse.get().texts, &mut self.texts, len)
    }
}
