//! Every operation of the fill and write protocol, each one step under one lock. The cache decides
//! and counts; it never touches a value.
//!
//! Between two steps the caller does what takes time (reads the source, deletes or writes bytes)
//! without the lock. Each step answers with the deletes that it wants done; the caller reports every
//! one of them back as deleted or failed.

mod absent;
mod adopted;
mod ages;
mod cache;
mod changes;
mod choice;
mod commit;
mod decoded;
mod entry;
mod evict;
mod in_flight;
mod invalidate;
mod keys;
mod lookup;
mod moves;
mod peers;
mod planned;
mod promises;
mod refresh;
mod reserve;
mod rivals;
mod sampled;
mod segments;
mod verified;

pub use self::absent::{
    AbsenceAges, Answer, BESIDES, BOUND_PER_ABSENCE, FEW_ABSENCES, MAX_ABSENCES, NODES,
};
pub use self::ages::{SOURCES, SourceAge, ToldAges};
pub use self::cache::{BATCH, Cache, Found, Freshness, Limits, Stats, Tally, Verify, Victim};
pub(crate) use self::changes::Changes;
pub use self::changes::{SLOTS, Slot};
pub use self::commit::Committed;
pub use self::decoded::Decode;
pub use self::in_flight::{ClosedFlight, Flights, Ticket};
pub use self::keys::{Cursor, Entry, Rest, START};
pub use self::lookup::Joined;
pub use self::moves::{BeginMove, Move};
pub use self::peers::{Participant, Peers, Version, WRITES};
pub use self::reserve::{RejectReason, Reserve};
pub use self::segments::{FIRST_PAGE, MAP_AT, MAX_NAME, PAGE, Placed, VALUE_HEADER};
