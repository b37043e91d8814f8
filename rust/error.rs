//! The one error type of the core.

use std::fmt;

/// Why an operation on the index could not be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The cells contradict each other. The index must be thrown away and rebuilt; an index is
    /// disposable, a wrong answer is not. The text names the check that failed.
    Corrupt(&'static str),
    /// The block cannot grow: the address space of cell numbers, or the memory behind the block,
    /// is used up. The index is unchanged; the caller leaves the value uncached.
    Full,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Corrupt(what) => write!(f, "the index contradicts itself: {what}"),
            Fault::Full => write!(f, "the index cannot grow any further"),
        }
    }
}

impl std::error::Error for Fault {}

/// Result of everything that reads or writes cells.
pub type Res<T> = Result<T, Fault>;
