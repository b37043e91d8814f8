//! The files of an index, each by what it holds: their names, the room that is in use of them, and the memory that they
//! are to an arena.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::header::{CHECKED, DIRECTORY_AT, END, END_AT, FileHeader, HEADER_LEN};
use super::index_file::IndexFile;
use crate::arena::{Cell, Header, Storage};
use crate::cache::SLOTS;
use crate::checksum::crc32c;
use crate::error::Result;

/// Each file grows by itself.
#[derive(Debug)]
pub(super) struct Files {
    /// Format, header, participants, counters of changes, and the hash table's directory at its end.
    pub(super) head: IndexFile,
    /// Slots of the hash table.
    table: IndexFile,
    cells: IndexFile,
    /// Strings.
    texts: IndexFile,
    /// Of the eviction policy.
    history: IndexFile,
    /// Of the index of a pool: a word for each cell.
    places: Option<IndexFile>,
}

/// Files as they were found when they were opened.
#[derive(Debug)]
pub(super) struct OpenedFiles {
    pub(super) files: Files,
    /// Whether one that never is so had no bytes.
    pub(super) is_empty: bool,
    /// Whether one was longer than what it held.
    pub(super) is_hollowed: bool,
}

impl Files {
    /// Each as `get` gives it, by its name and the bytes that it has at least.
    fn each(
        with_places: bool,
        mut get: impl FnMut(&'static str, usize) -> io::Result<IndexFile>,
    ) -> io::Result<Files> {
        Ok(Files {
            head: get("head", DIRECTORY_AT)?,
            table: get("table", 0)?,
            cells: get("cells", 0)?,
            texts: get("texts", 0)?,
            history: get("history", 0)?,
            places: with_places.then(|| get("places", 0)).transpose()?,
        })
    }

    /// All of them; the first one says whether a rebuild is due.
    pub(super) fn all(&self) -> impl Iterator<Item = &IndexFile> {
        let Files {
            head,
            table,
            cells,
            texts,
            history,
            places,
        } = self;
        [head, table, cells, texts, history]
            .into_iter()
            .chain(places)
    }

    /// Maps as much of them as is in use. Only now and then (`looks`) it is seen whether others have cut off or
    /// removed files that are mapped far enough, for that takes system calls; what is missing of them ends the step
    /// that asks for it (`guard`).
    pub(super) fn remap(&mut self, looks: bool) -> Result<()> {
        let header = self.header();
        let (table, texts) = (bytes::<u32>(header.slots), bytes::<u32>(header.strings));
        let (cells, places) = (bytes::<Cell>(header.cells), bytes::<u64>(header.cells));
        let history = bytes::<u64>(header.history);
        let head = DIRECTORY_AT as u64 + bytes::<u32>(header.directory);
        self.head.remap(head, looks)?;
        self.table.remap(table, looks)?;
        self.cells.remap(cells, looks)?;
        self.texts.remap(texts, looks)?;
        // Most indexes have none; and one that is too short is caught where it is used.
        self.history.remap(history, false)?;
        match &mut self.places {
            Some(file) => file.remap(places, looks),
            None => Ok(()),
        }
    }

    /// Opens those that are there, or makes them.
    pub(super) fn open(root: &Path, with_places: bool) -> io::Result<OpenedFiles> {
        let (mut is_empty, mut is_hollowed) = (false, false);
        let files = Files::each(with_places, |name, least| {
            let opened = IndexFile::open(root, name, least)?;
            // Most indexes have no history, and what is in the head tells by itself.
            is_empty |= opened.is_empty && !["head", "history"].contains(&name);
            is_hollowed |= opened.is_hollowed;
            Ok(opened.file)
        })?;
        Ok(OpenedFiles {
            files,
            is_empty,
            is_hollowed,
        })
    }

    /// Takes those that are there under the names of the index now.
    pub(super) fn reopen(&mut self, root: &Path) -> io::Result<()> {
        *self = Files::each(self.has_places(), |name, _| IndexFile::reopen(root, name))?;
        Ok(())
    }

    /// Makes empty ones like these under names of their own; see [`Files::publish`].
    pub(super) fn make(&self, root: &Path) -> io::Result<Files> {
        Files::each(self.has_places(), |name, least| {
            IndexFile::make(root, name, least)
        })
    }

    /// Gives those that were made their names. The first one says that a rebuild is due, so it goes first.
    pub(super) fn publish(&self, root: &Path) -> io::Result<()> {
        self.all().try_for_each(|file| file.publish(root))
    }

    /// Removes those that have their names.
    pub(super) fn remove(&self, folder: &OwnedFd) {
        self.all().for_each(|file| file.remove(folder));
    }

    /// The files themselves.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = &File> {
        self.all().map(|one| &one.file)
    }

    /// Whether they are those of a pool.
    pub(super) fn has_places(&self) -> bool {
        self.places.is_some()
    }

    /// Whether a page of them could not be had; what was found in its place is not theirs.
    pub(super) fn has_faulted(&self) -> bool {
        self.all().any(|file| file.map.has_faulted())
    }

    pub(super) fn header(&self) -> &FileHeader {
        let bytes = self.head.map.get(..size_of::<FileHeader>());
        bytemuck::try_from_bytes(bytes.unwrap_or_default())
            .unwrap_or_else(|_| FileHeader::missing())
    }

    #[allow(clippy::expect_used)]
    pub(super) fn header_mut(&mut self) -> &mut FileHeader {
        let bytes = self.head.map.get_mut(..size_of::<FileHeader>());
        // The file has `DIRECTORY_AT` bytes at least, or it would not have been mapped.
        bytemuck::try_from_bytes_mut(bytes.unwrap_or_default()).expect("a mapped header")
    }

    /// Makes new ones those of an empty index that this participant rebuilds.
    pub(super) fn begin_fresh(&mut self, own_slot: usize) {
        self.header_mut().begin_fresh(own_slot);
        self.head.slice_mut(END_AT, 1).fill(END);
    }

    /// Has others who look into these files when they are replaced, without the lock, see that they are.
    pub(super) fn outdate(&mut self) {
        let is_whole = self.head.is_whole();
        // Also where nothing else in it is right: a reader may look only at the entry that it has found.
        let header = self.head.map.get_mut(..size_of::<FileHeader>());
        let header = bytemuck::try_from_bytes_mut::<FileHeader>(header.unwrap_or_default());
        if let (true, Ok(header)) = (is_whole, header) {
            header.generation = 0;
        }
    }

    /// Whether nothing of the head was cut off: no system call tells.
    pub(super) fn has_end(&self) -> bool {
        self.head.slice::<u64>(END_AT, 1) == [END]
    }

    /// Of what stands in the header.
    pub(super) fn checksum(&self) -> u32 {
        crc32c(self.head.map.get(CHECKED).unwrap_or_default())
    }

    /// Counters of changes.
    pub(super) fn changes(&self) -> &[u32] {
        self.head.slice(HEADER_LEN, SLOTS as u64)
    }

    /// The same, mutable.
    pub(super) fn changes_mut(&mut self) -> &mut [u32] {
        self.head.slice_mut(HEADER_LEN, SLOTS as u64)
    }
}

/// Bytes of so many elements.
fn bytes<T>(count: u64) -> u64 {
    count.saturating_mul(size_of::<T>() as u64)
}

/// What keeps an index in files.
pub(super) trait InFiles {
    fn files(&self) -> &Files;
    fn files_mut(&mut self) -> &mut Files;
}

impl<M: InFiles> Storage for M {
    fn header(&self) -> &Header {
        &self.files().header().header
    }
    fn header_mut(&mut self) -> &mut Header {
        &mut self.files_mut().header_mut().header
    }
    fn cells(&self) -> &[Cell] {
        let files = self.files();
        files.cells.slice(0, files.header().cells)
    }
    fn cells_mut(&mut self) -> &mut [Cell] {
        let files = self.files_mut();
        let cells = files.header().cells;
        files.cells.slice_mut(0, cells)
    }
    fn slots(&self) -> &[u32] {
        let files = self.files();
        files.table.slice(0, files.header().slots)
    }
    fn slots_mut(&mut self) -> &mut [u32] {
        let files = self.files_mut();
        let slots = files.header().slots;
        files.table.slice_mut(0, slots)
    }
    fn directory(&self) -> &[u32] {
        let files = self.files();
        files.head.slice(DIRECTORY_AT, files.header().directory)
    }
    fn directory_mut(&mut self) -> &mut [u32] {
        let files = self.files_mut();
        let directory = files.header().directory;
        files.head.slice_mut(DIRECTORY_AT, directory)
    }
    fn strings(&self) -> &[u32] {
        let files = self.files();
        files.texts.slice(0, files.header().strings)
    }
    fn strings_mut(&mut self) -> &mut [u32] {
        let files = self.files_mut();
        let strings = files.header().strings;
        files.texts.slice_mut(0, strings)
    }
    fn has_places(&self) -> bool {
        self.files().has_places()
    }
    fn places(&self) -> &[u64] {
        let files = self.files();
        let places = files.places.as_ref();
        places.map_or(&[], |places| places.slice(0, files.header().cells))
    }
    fn places_mut(&mut self) -> &mut [u64] {
        let files = self.files_mut();
        let cells = files.header().cells;
        let places = files.places.as_mut();
        places.map_or(&mut [], |places| places.slice_mut(0, cells))
    }
    fn grow_cells(&mut self, len: usize) -> Result<()> {
        let files = self.files_mut();
        if let Some(places) = &mut files.places {
            places.grow(len * size_of::<u64>())?;
        }
        files.cells.grow(len * size_of::<Cell>())?;
        files.header_mut().cells = len as u64;
        Ok(())
    }
    fn grow_slots(&mut self, len: usize) -> Result<()> {
        let files = self.files_mut();
        files.table.grow(len * size_of::<u32>())?;
        files.header_mut().slots = len as u64;
        Ok(())
    }
    fn grow_directory(&mut self, len: usize) -> Result<()> {
        let files = self.files_mut();
        files.head.grow(DIRECTORY_AT + len * size_of::<u32>())?;
        files.header_mut().directory = len as u64;
        Ok(())
    }
    fn grow_strings(&mut self, len: usize) -> Result<()> {
        let files = self.files_mut();
        files.texts.grow(len * size_of::<u32>())?;
        files.header_mut().strings = len as u64;
        Ok(())
    }
    fn history(&self) -> &[u64] {
        let files = self.files();
        files.history.slice(0, files.header().history)
    }
    fn history_mut(&mut self) -> &mut [u64] {
        let files = self.files_mut();
        let history = files.header().history;
        files.history.slice_mut(0, history)
    }
    fn grow_history(&mut self, len: usize) -> Result<()> {
        let files = self.files_mut();
        files.history.grow(len * size_of::<u64>())?;
        files.header_mut().history = len as u64;
        Ok(())
    }
}
