//! The segments that a process has open.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use rustix::fs::fstat;
use rustix::process::{Resource, getrlimit};

/// Segments of a pool that a process has open at most, the part of its descriptors that they are at most, ...
const MOST: usize = 128;
const PART: u64 = 8;
/// ... and those that it may have open in any case.
const FEW: usize = 8;

/// What a segment is opened for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    Read,
    /// Not a file that has lost its name: what others see is another one by now, or none.
    Change,
    /// The same. It is made, in the place of what others have put there, unless it is this process that has made it.
    Append {
        capacity: u32,
    },
}

/// The folder of the segments and those in use, as files that are open.
#[derive(Debug, Default)]
pub(super) struct Opened {
    pub(super) folder: Option<Arc<File>>,
    files: HashMap<u64, OpenFile>,
    uses: u64,
    /// With so many files, some are closed before another one is opened.
    room: usize,
}

#[derive(Debug)]
struct OpenFile {
    file: Arc<File>,
    /// Whether it was opened to append to it, so that this process has made it.
    is_own: bool,
    used: u64,
}

/// Whether a file has not been removed.
pub(super) fn has_name(file: &File) -> bool {
    fstat(file).is_ok_and(|status| status.st_nlink != 0)
}

/// Segments that may be open: a program needs descriptors for other things too.
fn most_open() -> usize {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(descriptors / PART).map_or(MOST, |part| part.clamp(FEW, MOST))
}

impl Opened {
    /// The file of a segment, if it is open and good for this purpose.
    pub(super) fn find(&mut self, number: u64, purpose: For) -> Option<Arc<File>> {
        self.uses += 1;
        let found = self.files.get_mut(&number)?;
        let is_good = match purpose {
            For::Read => true,
            For::Change => has_name(&found.file),
            For::Append { .. } => found.is_own && has_name(&found.file),
        };
        is_good.then(|| {
            found.used = self.uses;
            Arc::clone(&found.file)
        })
    }

    /// Adds a file that was opened for this purpose.
    pub(super) fn insert(&mut self, number: u64, purpose: For, file: &Arc<File>) {
        let one = OpenFile {
            file: Arc::clone(file),
            is_own: matches!(purpose, For::Append { .. }),
            used: self.uses,
        };
        self.files.insert(number, one);
    }

    /// Closes what has lost its name, and where that leaves too many the half that was not used for longest.
    ///
    /// Then as many may be opened as are left, so that each opening looks at two files or so; and those without a name, which
    /// other processes have removed, are never more than the others were at the last look.
    pub(super) fn make_room(&mut self) {
        if self.files.len() < self.room {
            return;
        }
        self.files.retain(|_, one| has_name(&one.file));
        let most = most_open();
        if self.room >= most {
            let mut times: Vec<u64> = self.files.values().map(|one| one.used).collect();
            times.sort_unstable_by(|one, other| other.cmp(one));
            let oldest = times.get(most / 2).copied().unwrap_or(0);
            self.files.retain(|_, one| one.used > oldest);
        }
        self.room = (2 * self.files.len()).clamp(FEW, most);
    }

    /// Closes a segment once no read or write of it goes on.
    pub(super) fn close(&mut self, number: u64) {
        self.files.remove(&number);
    }

    /// The same for all segments.
    pub(super) fn close_all(&mut self) {
        self.files.clear();
    }
}
