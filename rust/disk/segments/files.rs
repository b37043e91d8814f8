//! The segment files of a pool: values are appended, read, deleted and marked as valid in them.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, fstat, open, openat, unlinkat};
use rustix::io::Errno;

use super::calls::{UNSUPPORTED, is_elsewhere, is_without_descriptors, punch, read_from, regular};
use super::format::{HEADER, SEGMENT_HEADER, SegmentHeader, ValueHeader};
use super::opened::{For, Opened, has_name};
use super::resident::Resident;
use super::runs::ValueToWrite;
use super::scan::FoundValue;
use crate::cache::{FIRST_PAGE, MAP_AT, PAGE, Placed};
use crate::checksum::crc32c;
use crate::disk::below::{FOLDER, names_in, open_cached, open_folder, open_value};
use crate::shared::{make_file, make_folder, make_way, new_generation};

/// How a read of a value has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Got {
    /// All bytes were read. They are those of the entry if its place is still the same now.
    Bytes,
    /// The pages are not in memory, and the read was not to wait.
    NotNow,
    /// There is no such value at this place.
    Nothing,
}

/// The segments of a pool, those in use open.
#[derive(Debug)]
pub struct SegmentFiles {
    root: PathBuf,
    holes: bool,
    opened: Mutex<Opened>,
    resident: Resident,
    walked: AtomicU64,
    /// Held while a segment is lengthened.
    pub(super) lengthening: Mutex<()>,
}

fn name_of(number: u64) -> String {
    format!("{number:016x}")
}

/// Names this process in the segments that it makes.
fn maker() -> u64 {
    static MAKER: OnceLock<u64> = OnceLock::new();
    *MAKER.get_or_init(new_generation)
}

/// The header of a segment; `None` where there is none.
pub(super) fn header_of(file: &File) -> io::Result<Option<SegmentHeader>> {
    let mut header = [0; SEGMENT_HEADER];
    match file.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        read => read.map(|()| SegmentHeader::parse(&header)),
    }
}

fn number_of(name: &Path) -> Option<u64> {
    let name = name.to_str()?;
    let number = u64::from_str_radix(name, 16).ok()?;
    (name_of(number) == name).then_some(number)
}

impl SegmentFiles {
    /// The segments in this folder; `holes` says whether its file system can make them, see [`super::can_punch`]. Nothing
    /// is opened yet.
    #[must_use]
    pub fn new(root: PathBuf, holes: bool) -> Self {
        SegmentFiles {
            root,
            holes,
            opened: Mutex::default(),
            resident: Resident::default(),
            walked: AtomicU64::new(0),
            lengthening: Mutex::default(),
        }
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn opened(&self) -> MutexGuard<'_, Opened> {
        // Nothing in here panics half way.
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self, opened: &mut Opened) -> rustix::io::Result<Arc<File>> {
        if let Some(folder) = &opened.folder {
            return Ok(Arc::clone(folder));
        }
        let folder = Arc::new(File::from(open(&self.root, FOLDER, Mode::empty())?));
        opened.folder = Some(Arc::clone(&folder));
        Ok(folder)
    }

    pub(super) fn file(&self, number: u64, purpose: For) -> io::Result<Arc<File>> {
        let mut opened = self.opened();
        if let Some(found) = opened.find(number, purpose) {
            return Ok(found);
        }
        opened.make_room();
        let file = match self.open_file(&mut opened, number, purpose) {
            Err(error) if is_without_descriptors(&error) => {
                opened.close_all();
                self.open_file(&mut opened, number, purpose)?
            }
            file => file?,
        };
        let file = Arc::new(file);
        opened.insert(number, purpose, &file);
        Ok(file)
    }

    fn open_file(&self, opened: &mut Opened, number: u64, purpose: For) -> io::Result<File> {
        match self.open_in_folder(opened, number, purpose) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // The folder may have been removed, and made anew.
                opened.folder = None;
                if matches!(purpose, For::Append { .. }) {
                    make_folder(&self.root, None, false)?;
                }
                self.open_in_folder(opened, number, purpose)
            }
            found => found,
        }
    }

    fn open_in_folder(&self, opened: &mut Opened, number: u64, purpose: For) -> io::Result<File> {
        let folder = self.folder(opened)?;
        let name = name_of(number);
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let For::Append { capacity } = purpose else {
            let found = match openat(&folder, &name, flags, Mode::empty()) {
                Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) => {
                    let flags = flags.difference(OFlags::RDWR) | OFlags::RDONLY;
                    openat(&folder, &name, flags, Mode::empty())
                }
                found => found,
            };
            return regular(found?.into());
        };
        let header = SegmentHeader {
            number,
            capacity,
            maker: maker(),
        };
        let create = || make_file(&folder, &name).map(File::from);
        let file = match create() {
            Err(Errno::EXIST) => {
                let file = regular(openat(&folder, &name, flags, Mode::empty())?.into())?;
                if header_of(&file)? == Some(header) {
                    return Ok(file);
                }
                // Others have put it there, such as a copy of the pool that has gone on. What it holds is counted nowhere.
                drop(file);
                unlinkat(&folder, &name, AtFlags::empty())?;
                create()?
            }
            made => made?,
        };
        file.set_len(VALUES_AT)?;
        file.write_all_at(&header.to_bytes(), 0)?;
        Ok(file)
    }

    /// Closes the segments that are open, whether or not they are there still.
    pub fn close(&self) {
        *self.opened() = Opened::default();
    }

    /// Copies a value to another place; the copy is not valid before [`SegmentFiles::seal`].
    ///
    /// # Errors
    ///
    /// Where the file system refuses, or the bytes are not those that the header tells.
    pub fn copy(&self, value: &FoundValue, to: Placed) -> io::Result<()> {
        let size = usize::try_from(value.placed.size).map_err(|_| Errno::FBIG)?;
        let (got, bytes) = self.read_part(value.placed, &value.name, 0, size, true)?;
        if got != Got::Bytes || crc32c(&bytes) != value.checksum {
            return Err(Errno::IO.into());
        }
        let copy = ValueToWrite {
            placed: to,
            name: &value.name,
            data: &bytes,
            fetched: value.fetched,
        };
        self.write(&copy).map(drop)
    }

    /// Has a rebuild ignore a value that could not be deleted.
    ///
    /// # Errors
    ///
    /// Where the file system refuses.
    pub fn unseal(&self, placed: Placed) -> io::Result<()> {
        let file = match self.file(placed.segment, For::Change) {
            Err(error) if is_elsewhere(&error) => return Ok(()),
            file => file?,
        };
        let mut byte = [0];
        // One that was never set may be in a hole, which is not to be filled.
        if file.read_at(&mut byte, placed.map_at())? == 1 && byte != [0] {
            file.write_all_at(&[0], placed.map_at())?;
        }
        Ok(())
    }

    /// Deletes a value, or what there is of it. Nothing else is ever at its place, so it may be deleted twice.
    ///
    /// # Errors
    ///
    /// Where the file system refuses; `EOPNOTSUPP` where it cannot make holes.
    pub fn delete(&self, placed: Placed) -> io::Result<()> {
        let file = match self.file(placed.segment, For::Change) {
            Err(error) if is_elsewhere(&error) => return Ok(()),
            file => file?,
        };
        if self.holes {
            return punch(&file, placed.start(), placed.length());
        }
        if placed.is_alone() {
            // It is all that there is in the file.
            return file.set_len(MAP_AT);
        }
        Err(Errno::OPNOTSUPP.into())
    }

    /// Whether a segment has a file that can be appended to.
    pub(in crate::disk) fn is_there(&self, number: u64) -> bool {
        self.file(number, For::Change).is_ok()
    }

    /// Removes the file of a segment.
    ///
    /// # Errors
    ///
    /// Where the file system refuses.
    pub fn remove(&self, number: u64) -> io::Result<()> {
        // Who has it open would keep its blocks, which are counted no more. One with another name is also a copy's.
        if let Ok(file) = self.file(number, For::Change)
            && fstat(&file).is_ok_and(|status| status.st_nlink == 1)
        {
            let _ = file.set_len(0);
        }
        let mut opened = self.opened();
        opened.close(number);
        let folder = self.folder(&mut opened)?;
        drop(opened);
        make_way(&folder, name_of(number))?;
        match unlinkat(&folder, name_of(number), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes all values of a segment with its file, also for those who have it open.
    ///
    /// # Errors
    ///
    /// Where the file system refuses.
    pub fn empty(&self, number: u64) -> io::Result<()> {
        match self.file(number, For::Change) {
            Err(error) if is_elsewhere(&error) => {}
            // What is no file of ours goes as it would otherwise.
            Err(_) => return self.remove(number),
            Ok(file) => file.set_len(0)?,
        }
        self.remove(number)
    }

    /// Reads what a value has from `start` on into `into`, all of which was written to where it returns `Got::Bytes`;
    /// with `waits` false only from memory. `EAGAIN` is an answer then, and no error. With `is_alone` no one tells the index
    /// of the caller what others do, so only what lies at the path of the pool is read.
    ///
    /// # Errors
    ///
    /// Where the file system refuses.
    pub fn read(
        &self,
        placed: Placed,
        name: &str,
        start: u64,
        into: &mut [MaybeUninit<u8>],
        waits: bool,
        is_alone: bool,
    ) -> io::Result<Got> {
        if is_alone {
            let segment = name_of(placed.segment);
            if !waits {
                return match open_cached(&self.root.join(segment)) {
                    Ok(file) => self.read_now(&File::from(file), placed, name, start, into),
                    // Who waits looks for it.
                    Err(_) => Ok(Got::NotNow),
                };
            }
            let file = open_value(&self.root, Path::new(&segment));
            return match file.and_then(|file| regular(file.into())) {
                Ok(file) => read_from(&file, placed, name, start, into, true),
                Err(error) if is_elsewhere(&error) => Ok(Got::Nothing),
                Err(error) => Err(error),
            };
        }
        for purpose in [For::Read, For::Change] {
            let file = match self.file(placed.segment, purpose) {
                Err(error) if is_elsewhere(&error) => return Ok(Got::Nothing),
                file => file?,
            };
            let got = if waits {
                read_from(&file, placed, name, start, into, true)?
            } else {
                self.read_now(&file, placed, name, start, into)?
            };
            // Another file may have its name by now.
            if got != Got::Nothing || has_name(&file) {
                return Ok(got);
            }
        }
        Ok(Got::Nothing)
    }

    /// The same, of so many bytes; none where it does not return `Got::Bytes`.
    ///
    /// # Errors
    ///
    /// Where the file system refuses.
    #[allow(unsafe_code)]
    pub fn read_part(
        &self,
        placed: Placed,
        name: &str,
        start: u64,
        size: usize,
        waits: bool,
    ) -> io::Result<(Got, Vec<u8>)> {
        let mut bytes = Vec::with_capacity(size);
        let room = bytes.spare_capacity_mut().get_mut(..size);
        let got = self.read(placed, name, start, room.unwrap_or_default(), waits, false)?;
        if got == Got::Bytes {
            // SAFETY: There is room for so many, and all of them were read.
            unsafe { bytes.set_len(size) };
        }
        Ok((got, bytes))
    }

    /// Reads what is in memory.
    fn read_now(
        &self,
        file: &File,
        placed: Placed,
        name: &str,
        start: u64,
        into: &mut [MaybeUninit<u8>],
    ) -> io::Result<Got> {
        if !self.resident.is_needed() {
            match read_from(file, placed, name, start, into, false) {
                Err(error) if Errno::from_io_error(&error) == Some(UNSUPPORTED) => {
                    self.resident.need();
                }
                got => return got,
            }
        }
        if !self.resident.has(file, placed, start, into.len()) {
            return Ok(Got::NotNow);
        }
        let watch = || read_from(file, placed, name, start, into, true);
        self.resident.watch(watch)
    }

    /// The header of a value, if it is there and sound.
    #[must_use]
    pub fn header(&self, placed: Placed) -> Option<ValueHeader> {
        let file = self.file(placed.segment, For::Change).ok()?;
        let mut bytes = [0; HEADER];
        file.read_exact_at(&mut bytes, placed.start()).ok()?;
        let header = ValueHeader::parse(&bytes)?;
        let found = Placed {
            capacity: placed.capacity,
            ..header.placed
        };
        (found == placed).then_some(header)
    }

    /// Numbers of all segments in the folder.
    ///
    /// # Errors
    ///
    /// Where it cannot be listed.
    pub fn list(&self) -> io::Result<Vec<u64>> {
        let folder = match open_folder(&self.root, Path::new("")) {
            Err(error) if is_elsewhere(&error) => return Ok(Vec::new()),
            folder => folder?,
        };
        let names = names_in(&folder)?;
        Ok(names.iter().filter_map(|name| number_of(name)).collect())
    }

    /// Headers that were read to find values without the index, since the beginning: how such a walk gets on.
    #[must_use]
    pub fn walked(&self) -> u64 {
        self.walked.load(Ordering::Relaxed)
    }

    pub(super) fn note_walked(&self) {
        self.walked.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the file system can make holes.
    pub(super) fn has_holes(&self) -> bool {
        self.holes
    }

    /// Opens a segment to look through it.
    pub(super) fn open_to_scan(&self, number: u64) -> io::Result<Arc<File>> {
        self.file(number, For::Change)
    }
}

/// First byte of the first page in which a value may begin.
pub(super) const VALUES_AT: u64 = FIRST_PAGE as u64 * PAGE;
