//! The one error type of the core.

use std::borrow::Cow;
use std::fmt;

use rustix::io::Errno;

/// Why an operation on the index failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The cells contradict each other. The index must be discarded and rebuilt: an index is
    /// disposable, a wrong answer is not. The text names the check that failed.
    Corrupt(&'static str),
    /// The index is gone, or was left in the middle of a step: it must be rebuilt as well. What its steps have
    /// said before was right, so the values that are there are no older than they told.
    Lost(&'static str),
    /// The same, because of what the operating system says.
    Unusable(&'static str, Errno),
    /// The storage cannot grow: cell numbers or memory are used up. The index is unchanged; the
    /// caller leaves the value uncached.
    Full,
    /// The same, because the operating system refuses: a volume is full, or there is no memory to map.
    Refused(Errno),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Corrupt(_) => write!(f, "corrupt index: {}", self.reason()),
            Error::Lost(_) | Error::Unusable(..) => write!(f, "lost index: {}", self.reason()),
            Error::Full => write!(f, "the index cannot grow any further"),
            Error::Refused(errno) => write!(f, "the index cannot grow: {errno}"),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// The reason alone, for where it is known that the index cannot be used.
    #[must_use]
    pub fn reason(self) -> Cow<'static, str> {
        match self {
            Error::Corrupt(what) | Error::Lost(what) => what.into(),
            Error::Unusable(what, errno) => format!("{what}: {errno}").into(),
            Error::Full | Error::Refused(_) => self.to_string().into(),
        }
    }

    /// Whether the index cannot be used any more.
    #[must_use]
    pub fn is_fatal(self) -> bool {
        matches!(
            self,
            Error::Corrupt(_) | Error::Lost(_) | Error::Unusable(..)
        )
    }
}

/// Result of everything that reads or writes cells.
pub type Result<T, E = Error> = std::result::Result<T, E>;
