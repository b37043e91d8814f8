//! Eviction policies: which entry goes when bytes are needed.

mod lru;
mod policy;

pub use self::lru::Lru;
pub use self::policy::Eviction;
