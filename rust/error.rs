//! The one error type of the core.

use std::fmt;

/// Why an operation on the index failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The cells contradict each other. The index must be discarded and rebuilt: an index is
    /// disposable, a wrong answer is not. The text names the check that failed.
    Corrupt(&'static str),
    /// The storage cannot grow: cell numbers or memory are used up. The index is unchanged; the
    /// caller leaves the value uncached.
    Full,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Corrupt(what) => write!(f, "corrupt index: {what}"),
            Error::Full => write!(f, "the index cannot grow any further"),
        }
    }
}

impl std::error::Error for Error {}

/// Result of everything that reads or writes cells.
pub type Result<T, E = Error> = std::result::Result<T, E>;
