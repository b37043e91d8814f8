//! Keys: which ones may be cached, how they are split and packed, and which bytes a request selects.

mod byte_range;
mod glob;
mod key;
pub mod packing;
mod part;
mod select;

pub use self::byte_range::{ByteRange, RangeLabel};
pub use self::glob::Glob;
pub(crate) use self::key::ODD;
pub use self::key::{
    MAX_KEY, MAX_LABEL, RESERVED, above_tails_below, and_above, directories, hash, hash_word,
    is_below, is_cacheable, labels_fit, split,
};
pub use self::part::Part;
pub(crate) use self::part::{packed, unpacked};
pub use self::select::{Asked, select};
pub(crate) use self::select::{is_agreed, within};
