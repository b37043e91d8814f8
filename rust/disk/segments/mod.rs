//! The files of a pool: segments, in which the values of many sources stand one behind the other.

mod calls;
mod files;
mod format;
mod opened;
mod resident;
mod runs;
mod scan;

pub use self::calls::can_punch;
pub use self::files::{Got, SegmentFiles};
pub use self::format::{SegmentHeader, ValueHeader};
pub use self::runs::ValueToWrite;
pub use self::scan::{
    Found, FoundSegment, FoundValue, delete_below, keep_only, scan, scan_listed, values_in, walk,
};
