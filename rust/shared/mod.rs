//! An index that several processes share: files that they map, a lock around each step, and the
//! list of participants.

mod files;
mod former;
mod guard;
mod header;
mod held;
mod index;
mod index_file;
mod lock_files;
mod lock_word;
mod locked;
mod mapped;
mod neighbours;
mod own;
mod participants;
mod recovery;
mod sample_file;
mod step;
mod unfinished;

pub use self::former::FormerValue;
pub use self::header::PARTICIPANTS;
pub(crate) use self::header::new_generation;
pub use self::held::HeldLock;
pub use self::index::{Opening, SharedIndex, StepError};
pub use self::lock_files::{Locks, OpenError, make_way, make_way_at};
pub use self::locked::Locked;
pub use self::mapped::Mapped;
pub use self::neighbours::{Neighbours, neighbours};
pub use self::own::{make_file, make_folder, make_folder_in, open_own, open_own_in};
