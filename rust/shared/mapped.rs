//! Storage in files that several processes map: the index of a cache directory.
//!
//! Five files (a pool has a sixth) are the index ([`Files`]). One more, `owner`, has the lock that is held around each step
//! (`lock_word`), and one `s<n>` for each participant is locked as long as that participant lives: the kernel releases it
//! when its holder dies. The time of `lock` is set by those who change the source without the index.
//!
//! Nothing in the files is trusted. Each step checks the format, the checksum of the header and the dirty mark,
//! and now and then the lengths; the numbers inside are checked as they are used. What does not fit means that the
//! index is discarded and rebuilt from a scan of the directory.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{Stat, fstat};

use super::files::{Files, InFiles, OpenedFiles};
use super::header::{FileHeader, PARTICIPANTS, boot, new_generation};
use super::lock_files::{
    Locks, OpenError, TRY_AGAIN, has_former_participant, is_alive, is_at, open_and_lock, slot_file,
    take_slot, touch, unsuitable,
};
use super::lock_word::LockWord;
use super::own::open_folder;
use super::sample_file::SampleFile;
use crate::cache::{Changes, ToldAges};
use crate::error::Result;

/// The mapped files, and the lock that guards them.
#[derive(Debug)]
pub struct Mapped {
    pub(super) root: PathBuf,
    pub(super) lock: File,
    pub(super) word: Arc<LockWord>,
    /// Times that the files were replaced, as of those that are open.
    pub(super) replaced: u64,
    pub(super) files: Files,
    pub(super) own_slot: usize,
    pub(super) bound: u64,
    /// See [`Participant::uses_policy`](crate::cache::Participant::uses_policy).
    pub(super) uses_policy: bool,
    /// See [`Participant::ages`](crate::cache::Participant::ages).
    pub(super) ages: ToldAges,
    pub(super) generation: u64,
    /// Those that this participant has counted, in these files or in former ones: what began with those is void anyway.
    pub(super) own_changes: Changes,
    /// Whether it is sound but of an earlier boot, or of another machine: not to be believed without a
    /// look at the files.
    pub(super) outdated: bool,
    /// Locked as long as this participant lives; only the kernel looks at it.
    alive: File,
    locks: Arc<Locks>,
    /// When it was last seen that the files are where others look for them.
    pub(super) looked: Instant,
    /// When it was last seen that they are as long as they have to be; `None` where the next step looks.
    pub(super) looked_at_files: Option<Instant>,
    pub(super) sample: SampleFile,
}

/// Age at which the times of the files are renewed.
const OLD: Duration = Duration::from_secs(3600);

impl Mapped {
    /// Opens the files below `root`, a directory that exists, waits for the lock and takes a slot,
    /// but does not register yet. The lock is held when this returns.
    ///
    /// The flag says that the index is new and empty; the caller rebuilds it.
    pub fn open(
        root: &Path,
        bound: u64,
        patience: Duration,
        with_places: bool,
    ) -> Result<(Self, bool), OpenError> {
        #[cfg(target_os = "linux")]
        if let Some(name) = unsuitable(u64::try_from(rustix::fs::statfs(root)?.f_type).unwrap_or(0))
        {
            return Err(OpenError::Unsuitable(name));
        }
        let begun = Instant::now();
        let left = || patience.saturating_sub(begun.elapsed());
        loop {
            let (lock, opening) = open_and_lock(&root.join("lock"), left())?;
            if has_former_participant(root)? {
                if left().is_zero() {
                    return Err(OpenError::Busy);
                }
                drop((lock, opening));
                std::thread::sleep(TRY_AGAIN);
                continue;
            }
            let (own_slot, alive) = take_slot(root)?;
            let word = Arc::new(LockWord::open(root, own_slot)?);
            word.lock_within(left())?;
            // They may have been removed meanwhile, and others use other ones.
            if word.is_in_place() && !word.is_lost() && is_at(&lock, &root.join("lock")) {
                let kept = Arc::clone(&word);
                let opened =
                    Mapped::open_locked(root, bound, with_places, lock, word, own_slot, alive);
                if opened.is_err() {
                    kept.release();
                }
                return opened;
            }
            word.release();
            // On a disk that fails it would be so each time.
            if left().is_zero() {
                return Err(OpenError::Busy);
            }
        }
    }

    fn open_locked(
        root: &Path,
        bound: u64,
        with_places: bool,
        lock: File,
        word: Arc<LockWord>,
        own_slot: usize,
        alive: File,
    ) -> Result<(Self, bool), OpenError> {
        let OpenedFiles {
            files,
            is_empty,
            is_hollowed,
        } = Files::open(root, with_places)?;
        let emptied = word.is_new() || word.is_suspect() || is_empty || is_hollowed;
        let replaced = word.replaced();
        let mut mapped = Mapped {
            root: root.to_owned(),
            lock,
            word,
            replaced,
            files,
            own_slot,
            bound,
            uses_policy: false,
            ages: ToldAges::default(),
            generation: 0,
            own_changes: Changes::default(),
            outdated: false,
            alive,
            locks: Arc::default(),
            looked: Instant::now(),
            looked_at_files: None,
            sample: SampleFile::open(root, new_generation()),
        };
        mapped.locks.set([&mapped.lock, &mapped.alive]);
        let owner = mapped.rebuild_owner();
        let header = mapped.file_header();
        let clean = !emptied
            && header.is_plausible()
            && mapped.files.has_end()
            && header.dirty == 0
            && header.check == mapped.files.checksum()
            && with_places == (header.header.value_header != 0);
        let this_boot = header.boot == boot();
        let sound = clean
            && this_boot
            // A rebuild goes on unless its owner has died; the owner with our slot has.
            && owner.is_none_or(|n| n != own_slot && is_alive(root, n))
            && mapped.files.remap(true).is_ok();
        mapped.outdated =
            clean && !this_boot && owner.is_none() && mapped.files.remap(true).is_ok();
        if !sound && !mapped.outdated {
            // What was damaged while it was not in use, or torn by a loss of power, has hidden nothing from anyone.
            let is_in_use = || (0..PARTICIPANTS).any(|n| n != own_slot && is_alive(root, n));
            let is_damaged = is_hollowed || !emptied && mapped.looks_damaged();
            if this_boot && is_damaged && is_in_use() {
                mapped.set_damaged(true);
            }
            mapped.reset()?;
        }
        let mark = mark(&fstat(&mapped.lock)?);
        let header = mapped.file_header_mut();
        header.dirty = own_slot as u32 + 1;
        if header.mark != mark {
            header.mark = mark;
            header.epoch = header.epoch.wrapping_add(1);
        }
        Ok((mapped, !sound))
    }

    /// Empties the index for all participants. The lock must be held.
    ///
    /// The others see the new files at their next step, and register again. What they are writing
    /// meanwhile, to the source and to the cache store, stays known. The old files are left as they
    /// are: to truncate what others have mapped would end their processes.
    pub fn reset(&mut self) -> io::Result<()> {
        let others = self.living();
        let policy = self.file_header().header.policy;
        // Until all of them are replaced.
        self.word.set_suspect(true);
        if self.word.is_new() {
            // Participants that have another one look for its place then.
            touch(&self.lock)?;
        }
        // A participant that died in a step may have been changing it.
        self.sample.check(new_generation());
        let made = self.files.make(&self.root).or_else(|_| {
            // On a full volume the old ones go first.
            self.files.remove(&open_folder(&self.root)?);
            self.files.make(&self.root)
        });
        let made = made?;
        self.files.outdate();
        self.files = made;
        self.files.begin_fresh(self.own_slot);
        // Of those who live on.
        let kept = &mut self.file_header_mut().header.policy;
        (kept.kind, kept.minimise) = (policy.kind, policy.minimise);
        self.file_header_mut().mark = mark(&fstat(&self.lock)?);
        for (n, other) in others {
            self.file_header_mut().add_participant(n, other);
        }
        self.files.publish(&self.root)?;
        self.word.count_replacement();
        self.replaced = self.word.replaced();
        self.word.set_known();
        self.word.set_suspect(false);
        Ok(())
    }

    /// Takes the lock if it is free.
    #[must_use]
    pub fn try_lock(&self) -> bool {
        !self.locks.are_disabled() && self.word.try_lock()
    }

    /// The same; over from its owner, if that is dead.
    #[must_use]
    pub fn try_lock_or_take_over(&self) -> bool {
        !self.locks.are_disabled() && self.word.try_lock_or_take_over()
    }

    /// A call that waits until the lock is free, after a step has found it taken, or until the next step finds that the
    /// file is gone.
    pub fn waiter(&self) -> impl Fn() + Send + 'static {
        let word = Arc::clone(&self.word);
        move || word.wait()
    }

    /// Whether others who open the index would find another lock or take this participant for dead:
    /// then neither side sees what the other one does.
    #[must_use]
    pub fn are_removed(&self) -> bool {
        self.word.is_lost() || !self.is_in_place()
    }

    /// Whether all is still what others find under its name.
    pub(super) fn is_in_place(&self) -> bool {
        is_at(&self.lock, &self.root.join("lock"))
            && self.word.is_in_place()
            && is_at(&self.alive, &slot_file(&self.root, self.own_slot))
    }

    /// Notes that the files are in use: a purge by age takes what has not changed for long.
    pub(super) fn keep_young(&mut self) -> io::Result<()> {
        let now = SystemTime::now();
        let status = fstat(&self.lock)?;
        let changed = UNIX_EPOCH + Duration::from_secs(status.st_mtime.try_into().unwrap_or(0));
        if now.duration_since(changed).is_ok_and(|age| age < OLD) {
            return Ok(());
        }
        let files = self.files.descriptors();
        for file in files.chain([&self.lock, &self.alive, self.word.file()]) {
            file.set_modified(now)?;
        }
        // Not a mark of another participant.
        self.file_header_mut().mark = mark(&fstat(&self.lock)?);
        Ok(())
    }

    /// Continues with other files, opened by the same participant. The slot of the old ones is free
    /// from then on.
    pub fn replace(&mut self, mut other: Mapped) {
        other.locks = Arc::clone(&self.locks);
        other.locks.set([&other.lock, &other.alive]);
        *self = other;
    }

    /// See [`Locks`].
    #[must_use]
    pub fn locks(&self) -> Arc<Locks> {
        Arc::clone(&self.locks)
    }

    /// Whether another process keeps the lock, as far as this one has found out.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.locks.is_held()
    }

    /// Notes whether another process keeps the lock.
    pub fn set_held(&self, held: bool) {
        self.locks.set_held(held);
    }

    /// Directory of the files.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn file_header(&self) -> &FileHeader {
        self.files.header()
    }

    pub(super) fn file_header_mut(&mut self) -> &mut FileHeader {
        self.files.header_mut()
    }
}

impl InFiles for Mapped {
    fn files(&self) -> &Files {
        &self.files
    }
    fn files_mut(&mut self) -> &mut Files {
        &mut self.files
    }
}

/// What a process that cannot use the index changes of the lock file, to say that the source was changed.
pub(super) fn mark(lock: &Stat) -> [i64; 2] {
    [lock.st_mtime, lock.st_mtime_nsec as i64]
}
