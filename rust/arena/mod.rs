//! The arena: one array of cells, and the structures in it that turn a key into a cell and back.

mod arena;
mod by_age;
mod cell;
mod hash_table;
mod name;
mod path_cache;
mod places;
pub(crate) mod racing;
mod storage;
mod strings;
mod traverse;
mod tree;
mod validate;
pub(crate) mod validator;

pub(crate) use self::arena::OVERFLOW;
pub use self::arena::{Arena, End, IN_MAIN, List, MAX_CELLS, ROOT};
pub use self::cell::{Cell, Kind, STORED, State, TOO_LARGE};
pub(crate) use self::hash_table::SEGMENT;
pub use self::places::MAX_PAGES;
pub(crate) use self::places::Place;
pub use self::storage::{Header, Heap, PolicyState, STRING_SIZES, Storage};
pub(crate) use self::traverse::LOOKED_AT;
