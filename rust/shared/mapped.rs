//! Storage in files that several processes map: the index of a cache directory.
//!
//! Five files (a pool has a sixth, `places`), because each grows by itself: `head` (format, header, participants,
//! versions, and the hash table's directory at its end), `table` (slots), `cells`, `texts` (strings) and `history`
//! (of the eviction policy). One more, `owner`, has the lock that is held around each step (`lock_word`), and one `s<n>`
//! for each participant is locked as long as that participant lives: the kernel releases it when its holder dies. The
//! time of `lock` is set by those who change the source without the index.
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

use super::header::{
    CHECKED, DIRECTORY_AT, END, END_AT, FileHeader, PARTICIPANTS, boot, new_generation,
};
use super::index_file::IndexFile;
use super::lock_files::{
    Locks, OpenError, TRY_AGAIN, has_former_participant, is_alive, is_at, open_and_lock,
    open_folder, slot_file, take_slot, touch, unsuitable,
};
use super::lock_word::LockWord;
use super::sample_file::SampleFile;
use crate::arena::{Cell, Header, Storage};
use crate::error::{Error, Result};

/// The mapped files, and the lock that guards them.
#[derive(Debug)]
pub struct Mapped {
    pub(super) root: PathBuf,
    lock: File,
    word: Arc<LockWord>,
    /// Times that the files were replaced, as of those that are open.
    replaced: u64,
    pub(super) files: [IndexFile; FILES.len()],
    /// Of the index of a pool: a word for each cell.
    places: Option<IndexFile>,
    pub(super) own_slot: usize,
    pub(super) bound: u64,
    pub(super) generation: u64,
    /// Whether it is sound but of an earlier boot, or of another machine: not to be believed without a
    /// look at the files.
    pub(super) outdated: bool,
    /// Locked as long as this participant lives; only the kernel looks at it.
    alive: File,
    locks: Arc<Locks>,
    /// When it was last seen that the files are where others look for them.
    looked: Instant,
    /// When it was last seen that they are as long as they have to be; `None` where the next step looks.
    looked_at_files: Option<Instant>,
    pub(super) sample: SampleFile,
}

/// Time after which a step looks again whether the files are in their place. Each change of the source
/// looks, whatever the time.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Age at which the times of the files are renewed.
const OLD: Duration = Duration::from_secs(3600);

const FILES: [&str; 5] = ["head", "table", "cells", "texts", "history"];
pub(super) const HEAD: usize = 0;
const TABLE: usize = 1;
const CELLS: usize = 2;
const STRINGS: usize = 3;
const HISTORY: usize = 4;
const PLACES: &str = "places";

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
        let mut emptied = word.is_new() || word.is_suspect();
        let mut is_hollowed = false;
        let mut open = |name: &'static str| {
            let opened = IndexFile::open(root, name, least_of(name))?;
            // Most indexes have no history, and what is in the head tells by itself.
            let may_be_empty = [FILES[HEAD], FILES[HISTORY]].contains(&name);
            emptied |= opened.is_hollowed || opened.is_empty && !may_be_empty;
            is_hollowed |= opened.is_hollowed;
            Ok::<_, io::Error>(opened.file)
        };
        let files = each(FILES.map(&mut open))?;
        let places = with_places.then(|| open(PLACES)).transpose()?;
        let replaced = word.replaced();
        let mut mapped = Mapped {
            root: root.to_owned(),
            lock,
            word,
            replaced,
            files,
            places,
            own_slot,
            bound,
            generation: 0,
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
            && mapped.is_whole()
            && header.dirty == 0
            && header.check == mapped.checksum()
            && with_places == (header.header.value_header != 0);
        let this_boot = header.boot == boot();
        let sound = clean
            && this_boot
            // A rebuild goes on unless its owner has died; the owner with our slot has.
            && owner.is_none_or(|n| n != own_slot && is_alive(root, n))
            && mapped.remap(true).is_ok();
        mapped.outdated = clean && !this_boot && owner.is_none() && mapped.remap(true).is_ok();
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
        let made = self.make_files().or_else(|_| {
            // On a full volume the old ones go first.
            let folder = open_folder(&self.root)?;
            self.all().for_each(|file| file.remove(&folder));
            self.make_files()
        });
        let made = made?;
        self.outdate();
        (self.files, self.places) = made;
        *self.file_header_mut() = FileHeader::fresh(self.own_slot);
        self.files[HEAD].slice_mut(END_AT, 1).fill(END);
        // Of those who live on.
        let kept = &mut self.file_header_mut().header.policy;
        (kept.kind, kept.minimise) = (policy.kind, policy.minimise);
        self.file_header_mut().mark = mark(&fstat(&self.lock)?);
        for (n, other) in others {
            self.file_header_mut().add_participant(n, other);
        }
        // The first one says that a rebuild is due, so it goes first.
        for file in self.all() {
            file.publish(&self.root)?;
        }
        self.word.count_replacement();
        self.replaced = self.word.replaced();
        self.word.set_known();
        self.word.set_suspect(false);
        Ok(())
    }

    /// Has others who look into the files that are replaced, without the lock, see that they are.
    fn outdate(&mut self) {
        let is_whole = self.files[HEAD].is_whole();
        // Also where nothing else in it is right: a reader may look only at the entry that it has found.
        let header = self.files[HEAD].map.get_mut(..size_of::<FileHeader>());
        let header = bytemuck::try_from_bytes_mut::<FileHeader>(header.unwrap_or_default());
        if let (true, Ok(header)) = (is_whole, header) {
            header.generation = 0;
        }
    }

    /// Makes empty files under names of their own.
    fn make_files(&self) -> io::Result<Files> {
        self.with_files(|name| IndexFile::make(&self.root, name, least_of(name)))
    }

    /// As many files as there are, each by its name.
    fn with_files(
        &self,
        mut get: impl FnMut(&'static str) -> io::Result<IndexFile>,
    ) -> io::Result<Files> {
        let files = each(FILES.map(&mut get))?;
        let places = self.places.is_some().then(|| get(PLACES));
        Ok((files, places.transpose()?))
    }

    /// All files; the first one says whether a rebuild is due.
    fn all(&self) -> impl Iterator<Item = &IndexFile> {
        self.files.iter().chain(&self.places)
    }

    /// Takes the files that are there under the names of the index now.
    fn reopen_files(&mut self) -> io::Result<()> {
        (self.files, self.places) = self.with_files(|name| IndexFile::reopen(&self.root, name))?;
        self.replaced = self.word.replaced();
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
    fn is_in_place(&self) -> bool {
        is_at(&self.lock, &self.root.join("lock"))
            && self.word.is_in_place()
            && is_at(&self.alive, &slot_file(&self.root, self.own_slot))
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

    /// Notes that the files are in use: a purge by age takes what has not changed for long.
    pub(super) fn keep_young(&mut self) -> io::Result<()> {
        let now = SystemTime::now();
        let status = fstat(&self.lock)?;
        let changed = UNIX_EPOCH + Duration::from_secs(status.st_mtime.try_into().unwrap_or(0));
        if now.duration_since(changed).is_ok_and(|age| age < OLD) {
            return Ok(());
        }
        let files = self.all().map(|one| &one.file);
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

    /// Checks the files after the lock was taken; an error means that they cannot be used. Returns
    /// whether the index was emptied, or this participant reclaimed, meanwhile.
    pub fn begin(&mut self) -> Result<bool> {
        // Others would lock another file than this one, or take this participant for dead.
        if self.word.is_lost() {
            return Err(REMOVED);
        }
        let lock = fstat(&self.lock).map_err(|_| NOT_MAPPED)?;
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
            self.reopen_files().map_err(|_| REMOVED)?;
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
        if header.check != self.checksum() {
            return Err(Error::Corrupt("header: wrong checksum"));
        }
        if !self.is_whole() {
            return Err(Error::Corrupt("header: truncated"));
        }
        let looked = self.looked_at_files;
        let looks = looked.is_none_or(|looked| now.duration_since(looked) >= LOOK_EVERY);
        self.remap(looks)?;
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
    fn looks_damaged(&mut self) -> bool {
        let header = self.file_header();
        if header.is_of_another_format() {
            return false;
        }
        if !header.is_plausible() {
            return true;
        }
        // Within a step there is no checksum.
        header.dirty == 0
            && (header.check != self.checksum()
                || !self.is_whole()
                || matches!(self.remap(true), Err(Error::Corrupt(_))))
    }

    /// Whether nothing of the header file was cut off: no system call tells.
    fn is_whole(&self) -> bool {
        self.files[HEAD].slice::<u64>(END_AT, 1) == [END]
    }

    /// Whether a page of the files could not be had; what was found in its place is not theirs.
    pub(super) fn has_faulted(&self) -> bool {
        self.all().any(|file| file.map.has_faulted())
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
        let check = self.checksum();
        let header = self.file_header_mut();
        header.check = check;
        header.dirty = 0;
    }

    /// Whether the index, or one before it, was damaged, and what it may have missed is in the pool still. In a directory of
    /// files the name of a value is its path, so there a write removes it whatever the index says.
    pub(super) fn is_damaged(&self) -> bool {
        self.places.is_some() && self.word.is_damaged()
    }

    /// See [`Mapped::is_damaged`]. The lock must be held.
    pub(super) fn set_damaged(&self, is_so: bool) {
        self.word.set_damaged(is_so);
    }

    fn checksum(&self) -> u32 {
        crc32c::crc32c(self.files[HEAD].map.get(CHECKED).unwrap_or_default())
    }

    /// Maps as much of the files as is in use. Only now and then (`looks`) it is seen whether others have cut off or
    /// removed files that are mapped far enough, for that takes system calls; what is missing of them ends the step
    /// that asks for it (`guard`).
    fn remap(&mut self, looks: bool) -> Result<()> {
        let header = self.file_header();
        let wanted = [
            DIRECTORY_AT as u64 + header.directory.saturating_mul(4),
            header.slots.saturating_mul(4),
            header.cells.saturating_mul(size_of::<Cell>() as u64),
            header.strings.saturating_mul(4),
            header.history.saturating_mul(8),
            header.cells.saturating_mul(8),
        ];
        let files = self.files.iter_mut().chain(&mut self.places);
        for (n, (file, wanted)) in files.zip(wanted).enumerate() {
            // Most indexes have no history; and one that is too short is caught where it is used.
            file.remap(wanted, looks && n != HISTORY)?;
        }
        Ok(())
    }

    pub(super) fn file_header(&self) -> &FileHeader {
        let bytes = self.files[HEAD].map.get(..size_of::<FileHeader>());
        bytemuck::try_from_bytes(bytes.unwrap_or_default())
            .unwrap_or_else(|_| FileHeader::missing())
    }

    #[allow(clippy::expect_used)]
    pub(super) fn file_header_mut(&mut self) -> &mut FileHeader {
        let bytes = self.files[HEAD].map.get_mut(..size_of::<FileHeader>());
        // The file has `DIRECTORY_AT` bytes at least, or it would not have been mapped.
        bytemuck::try_from_bytes_mut(bytes.unwrap_or_default()).expect("a mapped header")
    }
}

/// All of them, or the first error.
fn each<T>(results: [io::Result<T>; FILES.len()]) -> io::Result<[T; FILES.len()]> {
    let [head, table, cells, strings, history] = results;
    Ok([head?, table?, cells?, strings?, history?])
}

/// The files of an index, and that of a pool.
type Files = ([IndexFile; FILES.len()], Option<IndexFile>);

/// Bytes that a file of this name has at least.
fn least_of(name: &str) -> usize {
    if name == FILES[HEAD] { DIRECTORY_AT } else { 0 }
}

/// What a process that cannot use the index changes of the lock file, to say that the source was changed.
fn mark(lock: &Stat) -> [i64; 2] {
    [lock.st_mtime, lock.st_mtime_nsec as i64]
}

pub(super) const REMOVED: Error = Error::Lost("index file: removed");
pub(super) const DIED: Error = Error::Lost("dirty mark: a participant died in a step");
const DAMAGED: Error = Error::Corrupt("dirty mark: a step has found damage");
/// A page that could not be had is as good as a damaged one.
pub(super) const FAULTED: Error =
    Error::Corrupt("index file: a page that cannot be read or written");
pub(super) const NOT_MAPPED: Error = Error::Lost("index file: cannot be mapped");

impl Storage for Mapped {
    fn header(&self) -> &Header {
        &self.file_header().header
    }
    fn header_mut(&mut self) -> &mut Header {
        &mut self.file_header_mut().header
    }
    fn cells(&self) -> &[Cell] {
        self.files[CELLS].slice(0, self.file_header().cells)
    }
    fn cells_mut(&mut self) -> &mut [Cell] {
        let cells = self.file_header().cells;
        self.files[CELLS].slice_mut(0, cells)
    }
    fn slots(&self) -> &[u32] {
        self.files[TABLE].slice(0, self.file_header().slots)
    }
    fn slots_mut(&mut self) -> &mut [u32] {
        let slots = self.file_header().slots;
        self.files[TABLE].slice_mut(0, slots)
    }
    fn directory(&self) -> &[u32] {
        self.files[HEAD].slice(DIRECTORY_AT, self.file_header().directory)
    }
    fn directory_mut(&mut self) -> &mut [u32] {
        let directory = self.file_header().directory;
        self.files[HEAD].slice_mut(DIRECTORY_AT, directory)
    }
    fn strings(&self) -> &[u32] {
        self.files[STRINGS].slice(0, self.file_header().strings)
    }
    fn strings_mut(&mut self) -> &mut [u32] {
        let strings = self.file_header().strings;
        self.files[STRINGS].slice_mut(0, strings)
    }
    fn has_places(&self) -> bool {
        self.places.is_some()
    }
    fn places(&self) -> &[u64] {
        let places = self.places.as_ref();
        places.map_or(&[], |places| places.slice(0, self.file_header().cells))
    }
    fn places_mut(&mut self) -> &mut [u64] {
        let cells = self.file_header().cells;
        let places = self.places.as_mut();
        places.map_or(&mut [], |places| places.slice_mut(0, cells))
    }
    fn grow_cells(&mut self, len: usize) -> Result<()> {
        if let Some(places) = &mut self.places {
            places.grow(len * size_of::<u64>())?;
        }
        self.files[CELLS].grow(len * size_of::<Cell>())?;
        self.file_header_mut().cells = len as u64;
        Ok(())
    }
    fn grow_slots(&mut self, len: usize) -> Result<()> {
        self.files[TABLE].grow(len * 4)?;
        self.file_header_mut().slots = len as u64;
        Ok(())
    }
    fn grow_directory(&mut self, len: usize) -> Result<()> {
        self.files[HEAD].grow(DIRECTORY_AT + len * 4)?;
        self.file_header_mut().directory = len as u64;
        Ok(())
    }
    fn grow_strings(&mut self, len: usize) -> Result<()> {
        self.files[STRINGS].grow(len * 4)?;
        self.file_header_mut().strings = len as u64;
        Ok(())
    }
    fn history(&self) -> &[u64] {
        self.files[HISTORY].slice(0, self.file_header().history)
    }
    fn history_mut(&mut self) -> &mut [u64] {
        let history = self.file_header().history;
        self.files[HISTORY].slice_mut(0, history)
    }
    fn grow_history(&mut self, len: usize) -> Result<()> {
        self.files[HISTORY].grow(len * 8)?;
        self.file_header_mut().history = len as u64;
        Ok(())
    }
}
