//! What each step does with the mapped files before and after its work.

use std::io;
use std::time::{Duration, Instant};

use rustix::fs::fstat;
use rustix::io::Errno;

use super::index_file::{FAULTED, REMOVED, errno_of, not_mapped};
use super::mapped::{Mapped, mark};
use crate::error::{Error, Result};

/// Time after which a step looks again whether the files are in their place. Each change of the source
/// looks, whatever the time.
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub(super) const DIED: Error = Error::Lost("dirty mark: a participant died in a step");
const DAMAGED: Error = Error::Corrupt("dirty mark: a step has found damage");

impl Mapped {
    /// Checks the files after the lock was taken; an error means that they cannot be used. Returns
    /// whether the index was emptied, or this participant reclaimed, meanwhile.
    pub fn begin(&mut self) -> Result<bool> {
        // Others would lock another file than this one, or take this participant for dead.
        if self.word.is_lost() {
            return Err(REMOVED);
        }
        let lock = fstat(&self.lock).map_err(not_mapped)?;
        if lock.st_nlink == 0 {
            return Err(REMOVED);
        }
        let now = Instant::now();
        // It is also set where files are made anew beside some that may be in use.
        let is_marked = self.file_header().mark != mark(&lock);
        if is_marked || now.duration_since(self.looked) >= LOOK_EVERY {
            self.require_place()?;
        }
        if self.word.replaced() != self.replaced {
            // Another participant has emptied the index.
            self.require_place()?;
            self.reopen_files().map_err(|error| match errno_of(error) {
                Errno::NOENT => REMOVED,
                errno => Error::Unusable("index file: cannot be opened", errno),
            })?;
        }
        if self.has_faulted() {
            return Err(FAULTED);
        }
        if self.word.is_suspect() {
            return Err(DIED);
        }
        let header = self.file_header();
        if header.is_of_another_format() {
            return Err(Error::Lost("header: of another format"));
        }
        if !header.is_plausible() {
            return Err(Error::Corrupt("header: not of this format"));
        }
        if header.dirty != 0 {
            return Err(if self.is_damaged() { DAMAGED } else { DIED });
        }
        if header.check != self.files.checksum() {
            return Err(Error::Corrupt("header: wrong checksum"));
        }
        if !self.files.has_end() {
            return Err(Error::Corrupt("header: truncated"));
        }
        let looked = self.looked_at_files;
        let looks = looked.is_none_or(|looked| now.duration_since(looked) >= LOOK_EVERY);
        self.files.remap(looks)?;
        if looks {
            self.looked_at_files = Some(now);
        }
        let own_slot = self.own_slot;
        let header = self.file_header_mut();
        // A participant that was taken for dead is no longer in the list.
        let reclaimed = header
            .participants
            .get(own_slot)
            .is_none_or(|p| p.live == 0);
        header.dirty = own_slot as u32 + 1;
        // A process that cannot use the index has changed the source.
        if header.mark != mark(&lock) {
            header.mark = mark(&lock);
            header.epoch = header.epoch.wrapping_add(1);
        }
        Ok(reclaimed || self.file_header().generation != self.generation)
    }

    /// Has the next step look at the files, whenever that was done last.
    pub(super) fn look_at_files(&mut self) {
        self.looked_at_files = None;
    }

    /// Whether the files cannot have been left so by a participant that has ended its steps, or has died in one.
    pub(super) fn looks_damaged(&mut self) -> bool {
        let header = self.file_header();
        if header.is_of_another_format() {
            return false;
        }
        if !header.is_plausible() {
            return true;
        }
        // Within a step there is no checksum.
        header.dirty == 0
            && (header.check != self.files.checksum()
                || !self.files.has_end()
                || matches!(self.files.remap(true), Err(Error::Corrupt(_))))
    }

    /// Whether a page of the files could not be had; what was found in its place is not theirs.
    pub(super) fn has_faulted(&self) -> bool {
        self.files.has_faulted()
    }

    /// Ends what `begin` has begun and releases the lock. A step that failed leaves its dirty mark, and says whether it has
    /// found damage. False where the lock was taken over from this participant meanwhile.
    #[must_use]
    pub fn end(&mut self, outcome: Result<()>) -> bool {
        let has_faulted = self.has_faulted();
        if has_faulted || matches!(outcome, Err(Error::Corrupt(_))) {
            self.set_damaged(true);
        } else if outcome.is_ok() {
            self.set_whole();
        }
        self.word.release()
    }

    /// Takes back the dirty mark: who dies from now on leaves a sound index.
    fn set_whole(&mut self) {
        let check = self.files.checksum();
        let header = self.file_header_mut();
        header.check = check;
        header.dirty = 0;
    }

    /// Whether the index, or one before it, was damaged, and what it may have missed is in the pool still. In a directory of
    /// files the name of a value is its path, so there a write removes it whatever the index says.
    pub(super) fn is_damaged(&self) -> bool {
        self.files.has_places() && self.word.is_damaged()
    }

    /// See [`Mapped::is_damaged`]. The lock must be held.
    pub(super) fn set_damaged(&self, is_so: bool) {
        self.word.set_damaged(is_so);
    }

    /// Takes the files that are there under the names of the index now.
    fn reopen_files(&mut self) -> io::Result<()> {
        self.files.reopen(&self.root)?;
        self.replaced = self.word.replaced();
        Ok(())
    }

    /// Checks that others who open the cache store find these files.
    pub(super) fn require_place(&mut self) -> Result<()> {
        if !self.is_in_place() {
            return Err(REMOVED);
        }
        self.looked = Instant::now();
        Ok(())
    }

    /// The same within a step, before it changes anything. Where others find other files, these are left as they are:
    /// a directory that was moved is in use in its new place.
    pub(super) fn require_place_or_leave(&mut self) -> Result<()> {
        let found = self.require_place();
        if found.is_err() && !self.has_faulted() {
            self.set_whole();
        }
        found
    }
}
