//! Eviction policies: which entry goes when bytes are needed.

mod adaptive;
mod deferred;
mod entries;
mod evidence;
mod ghosts;
mod keys;
mod kind;
mod latency;
mod learner;
mod lru;
mod none;
mod parts;
mod plan;
mod planned_entries;
mod policy;
mod progress;
mod recent;
mod rule;
mod samples;
mod simulated;
mod simulation;
mod table;

pub use self::adaptive::Adaptive;
pub use self::entries::Entries;
pub use self::kind::{Minimise, Policy, PolicyKind};
pub use self::lru::Lru;
pub use self::none::NoEviction;
pub use self::plan::{Distance, MAX_PLANNED, NEVER, Plan};
pub use self::policy::{Eviction, Newcomer};
pub use self::progress::{Course, Progress};
pub use self::recent::Recent;
pub(crate) use self::rule::cost_of;
pub use self::simulation::Simulation;
