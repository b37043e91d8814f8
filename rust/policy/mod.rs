//! Eviction policies: which entry goes when bytes are needed.

mod lru;
mod policy;
mod simulation;

pub use self::lru::Lru;
pub use self::policy::Eviction;
pub use self::simulation::{PolicyKind, Simulation};
