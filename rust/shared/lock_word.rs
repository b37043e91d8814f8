//! The lock around each step: a word in a file that all participants map.
//!
//! To take a lock that is free, and to release it, costs no system call. The word names its owner: a slot, and a
//! number that no other participant has had (the token). A step that finds it taken tries again, and after a while looks
//! whether the owner is alive: the kernel tells by the lock of the file of the slot. From a dead owner the word is taken
//! over. What its last step has left cannot be believed, so the index is made anew, with new files. So even an owner
//! that was taken for dead by mistake, because its files were removed, works on in files that no other uses;
//! and it finds at the end of its step that the word is not its own any more.
//!
//! Not a robust mutex of pthreads: that is owned by a thread, by a number that means something else in another
//! container; its layout is that of one C library; and the kernel itself reads it when a thread ends.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::guard::Map;
use super::header::{PARTICIPANTS, new_generation};
use super::lock_files::{OpenError, TRY_AGAIN, extend, is_alive, is_at, open, unshare};

const NAME: &str = "owner";
const LEN: usize = 4096;
/// In `Words::format` of a file in use; changes with the layout.
const KNOWN: u64 = u64::from_ne_bytes(*b"zcache\0\x01");
/// Bits of the word for the slot; the others are the token.
const SLOT_BITS: u32 = 16;
/// First pause between two looks of a thread that waits in the background, and the longest: a process may be stopped
/// for hours, and each look takes system calls.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_millis(20);
/// Tries to take a lock, with pauses of `TRY_AGAIN`, before it is seen whether its owner lives.
const PATIENT: u32 = 10;

/// What the file holds. All zeros is a lock that is free, of an index that is still to be made.
#[repr(C)]
struct Words {
    /// Whether an index was made since the file was.
    format: AtomicU64,
    /// The participant that is in a step, see [`LockWord::own`]; 0 for none.
    owner: AtomicU64,
    /// Whether an owner has died in a step, or while it made the files of the index anew.
    suspect: AtomicU64,
    /// Times that the files of the index were replaced.
    replaced: AtomicU64,
    /// Token of the participant that has taken each slot last.
    tokens: [AtomicU64; PARTICIPANTS],
    /// Whether an index was found damaged, and what it may have failed to remove is there still.
    damaged: AtomicU64,
}
const _: () = assert!(size_of::<Words>() <= LEN);
const _: () = assert!(PARTICIPANTS < 1 << SLOT_BITS);

/// The lock, as one participant has it open.
#[derive(Debug)]
pub(super) struct LockWord {
    root: PathBuf,
    file: File,
    map: Map,
    slot: usize,
    token: u64,
}

impl LockWord {
    /// Opens it, or makes it, for the participant that holds this slot.
    pub(super) fn open(root: &Path, slot: usize) -> io::Result<LockWord> {
        let file = open(&root.join(NAME))?;
        let len = file.metadata()?.len();
        if len > LEN as u64 {
            // None of ours: it may be too long to be mapped.
            file.set_len(LEN as u64)?;
        }
        // What is there already stays, whatever it is: others may be using it. A copy may have holes.
        unshare(&file, LEN as u64);
        extend(&file, 0, LEN)?;
        let map = Map::new(&file)?;
        if map.len() < LEN {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let token = (new_generation() ^ unpredictable()) >> SLOT_BITS;
        let word = LockWord {
            root: root.to_owned(),
            file,
            map,
            slot,
            token: token.max(1),
        };
        if len != 0 && len < LEN as u64 {
            // It was cut off, perhaps in the middle of a step.
            word.words().format.store(0, Ordering::Relaxed);
        }
        if let Some(own) = word.words().tokens.get(slot) {
            own.store(word.token, Ordering::Release);
        }
        Ok(word)
    }

    #[allow(unsafe_code)]
    fn words(&self) -> &Words {
        // SAFETY: The mapping has this many bytes, which `open` has seen to, begins at a page, lives as long as `self`, and is
        // only ever used through these atomic numbers, for which all bytes are valid. Pages that the file
        // has lost are replaced by the handler of `guard`.
        unsafe { &*self.map.start::<Words>() }
    }

    /// What the word is while this participant is in a step.
    fn own(&self) -> u64 {
        self.token << SLOT_BITS | (self.slot as u64 + 1)
    }

    /// Takes the lock if it is free.
    pub(super) fn try_lock(&self) -> bool {
        let owner = &self.words().owner;
        // Who sees it sees the token of this participant as well.
        let taken = owner.compare_exchange(0, self.own(), Ordering::AcqRel, Ordering::Relaxed);
        taken.is_ok()
    }

    /// Takes the lock if it is free, or over from an owner that is dead.
    pub(super) fn try_lock_or_take_over(&self) -> bool {
        let words = self.words();
        let seen = words.owner.load(Ordering::Acquire);
        if seen == 0 {
            return self.try_lock();
        }
        // Of a directory that was moved nothing is found, whether or not its participants live. This one is in no step
        // while it tries to take one, so its own word is damage: a former state of the file was put back.
        if !self.is_in_place() || seen != self.own() && !self.is_dead(seen) {
            return false;
        }
        // A dead owner never comes back, and no other has its token: it is the same that was seen.
        let taken =
            words
                .owner
                .compare_exchange(seen, self.own(), Ordering::AcqRel, Ordering::Relaxed);
        if taken.is_ok() {
            self.set_suspect(true);
        }
        taken.is_ok()
    }

    /// Whether no participant that lives can have left this word; a damaged one is of none.
    fn is_dead(&self, owner: u64) -> bool {
        let slot = (owner & ((1 << SLOT_BITS) - 1)).checked_sub(1);
        let token = slot.and_then(|slot| self.words().tokens.get(slot as usize));
        let is_last = token.is_some_and(|token| {
            owner >> SLOT_BITS != 0 && token.load(Ordering::Acquire) == owner >> SLOT_BITS
        });
        !is_last || slot.is_none_or(|slot| !is_alive(&self.root, slot as usize))
    }

    /// Takes the lock, within `patience`.
    pub(super) fn lock_within(&self, patience: Duration) -> Result<(), OpenError> {
        let begun = Instant::now();
        for attempt in 1.. {
            let looks = attempt % PATIENT == 0 || begun.elapsed() >= patience;
            if self.try_lock() || looks && self.try_lock_or_take_over() {
                break;
            }
            if begun.elapsed() >= patience {
                return Err(OpenError::Busy);
            }
            std::thread::sleep(TRY_AGAIN);
        }
        Ok(())
    }

    /// Waits until a step can take the lock, or finds out that the file is not in its place.
    pub(super) fn wait(&self) {
        let mut pause = LOOK_AGAIN;
        loop {
            let owner = self.words().owner.load(Ordering::Acquire);
            let is_own = owner == self.own();
            if owner == 0 || is_own || self.is_lost() || !self.is_in_place() || self.is_dead(owner)
            {
                return;
            }
            std::thread::sleep(pause);
            pause = LONGEST.min(pause * 2);
        }
    }

    /// Releases the lock; false where it was taken over from this participant.
    pub(super) fn release(&self) -> bool {
        let owner = &self.words().owner;
        let released = owner.compare_exchange(self.own(), 0, Ordering::Release, Ordering::Relaxed);
        released.is_ok()
    }

    /// Whether this participant has to open the index anew: the file was cut off, or another has its slot.
    pub(super) fn is_lost(&self) -> bool {
        let own = self.words().tokens.get(self.slot);
        own.is_none_or(|own| own.load(Ordering::Relaxed) != self.token) || self.map.has_faulted()
    }

    /// Whether others find the same file under its name.
    pub(super) fn is_in_place(&self) -> bool {
        is_at(&self.file, &self.root.join(NAME))
    }

    /// Whether no index was made since the file was: the files that are there may be in use with
    /// another one.
    pub(super) fn is_new(&self) -> bool {
        self.words().format.load(Ordering::Relaxed) != KNOWN
    }

    /// See [`LockWord::is_new`].
    pub(super) fn set_known(&self) {
        self.words().format.store(KNOWN, Ordering::Relaxed);
    }

    /// Whether the files of the index cannot be believed.
    pub(super) fn is_suspect(&self) -> bool {
        self.words().suspect.load(Ordering::Relaxed) != 0
    }

    /// See [`LockWord::is_suspect`]. The lock must be held.
    pub(super) fn set_suspect(&self, is_so: bool) {
        self.words()
            .suspect
            .store(u64::from(is_so), Ordering::Relaxed);
    }

    /// Whether an index was found damaged since all values were removed last.
    pub(super) fn is_damaged(&self) -> bool {
        self.words().damaged.load(Ordering::Relaxed) != 0
    }

    /// See [`LockWord::is_damaged`]. The lock must be held.
    pub(super) fn set_damaged(&self, is_so: bool) {
        self.words()
            .damaged
            .store(u64::from(is_so), Ordering::Relaxed);
    }

    /// Times that the files of the index were replaced.
    pub(super) fn replaced(&self) -> u64 {
        self.words().replaced.load(Ordering::Relaxed)
    }

    /// Has all others open the files of the index anew. The lock must be held.
    pub(super) fn count_replacement(&self) {
        self.words().replaced.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

/// Differs each time, also between processes that begin at the same time.
fn unpredictable() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}
