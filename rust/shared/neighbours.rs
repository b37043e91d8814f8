//! What a process that shares no index can tell of those who do.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::header::{FileHeader, boot};
use super::lock_files::{is_alive, open_to_read};

/// An index that other processes use; it changes with each change of the source that they begin or end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbours {
    generation: u64,
    epoch: u32,
    changes: u32,
}

/// Reads the header of the index below `root` without mapping it; `None` where no live process uses one.
#[must_use]
pub fn neighbours(root: &Path) -> Option<Neighbours> {
    let file = open_to_read(&root.join("head")).ok()?;
    let mut header: Box<FileHeader> = bytemuck::zeroed_box();
    // Without a lock: of what is in the middle of a step, too, each of these numbers is one that was written.
    file.read_exact_at(bytemuck::bytes_of_mut(&mut *header), 0)
        .ok()?;
    if !header.is_known() || header.boot != boot() {
        return None;
    }
    let mut participants = header.participants().iter().enumerate();
    participants
        .any(|(n, one)| one.live != 0 && is_alive(root, n))
        .then_some(Neighbours {
            generation: header.generation,
            epoch: header.epoch,
            changes: header.changes,
        })
}
