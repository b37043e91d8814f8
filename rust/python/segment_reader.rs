//! Values of a pool on their way into arrays of Python: looked up, read, and compared.

use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use numpy::npyffi::{NpyTypes, PY_ARRAY_API, get_type_object, npy_intp};
use numpy::{Element, PyArray1, PyArrayDescrMethods, PyArrayMethods};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;

use super::backing::{self, step};
use super::convert::{RawAges, RawSpan, fresh, hit, room, span};
use super::errors::os_error;
use super::index::Index;
use super::pool::{FoundPlace, SegmentFiles};
use crate::cache::{Answer, Found};
use crate::disk::segments::{self, Got};
use crate::key::ByteRange;
use crate::shared::Locked;

/// See the stub.
#[pyclass(frozen, module = "zcache._core")]
pub(super) struct SegmentReader {
    index: Py<Index>,
    files: Arc<segments::SegmentFiles>,
    on_the_spot: Option<OnTheSpot>,
}

/// How values are read where they are looked up.
struct OnTheSpot {
    /// Counts bytes; says whether so many may be read now.
    begins: Py<PyAny>,
    /// Hears of values that are not in memory.
    note_cold: Py<PyAny>,
    largest: u64,
    /// Bytes that were read since `begins` was asked.
    uncounted: AtomicU64,
}

/// Bytes of reads that are counted together, for that takes longer than to read a page, ...
const COUNTED: u64 = 1024 * 1024;
/// ... and those that each read counts for at least.
const LEAST: u64 = 16 * 1024;

impl OnTheSpot {
    fn may_begin(&self, py: Python<'_>, size: u64) -> PyResult<bool> {
        if size == 0 || size > self.largest {
            return Ok(false);
        }
        let uncounted = self.uncounted.load(Ordering::Relaxed) + size.max(LEAST);
        // Of several threads some may go uncounted.
        if uncounted < COUNTED {
            self.uncounted.store(uncounted, Ordering::Relaxed);
            return Ok(true);
        }
        let begins = self.begins.call1(py, (uncounted,))?.is_truthy(py)?;
        // Asked again at once, where it does not.
        let rest = if begins { 0 } else { COUNTED };
        self.uncounted.store(rest, Ordering::Relaxed);
        Ok(begins)
    }

    fn is_cold(&self, py: Python<'_>) -> PyResult<()> {
        self.uncounted.store(COUNTED, Ordering::Relaxed);
        self.note_cold.call0(py).map(drop)
    }
}

impl SegmentReader {
    /// Where the value of this name is.
    fn find(&self, py: Python<'_>, name: &str, anew: bool) -> PyResult<Option<FoundPlace>> {
        let index = self.index.get();
        if !anew && let Some(found) = index.source.as_ref().and_then(|source| source.recall(name)) {
            return Ok(Some(found));
        }
        let Some((key, range)) = ByteRange::parse(name) else {
            return Ok(None);
        };
        let key = &*index.whole(key);
        let found = step!(index, py, |cache| cache.find_placed(key, range))?;
        Ok(found.map(|(cell, word, placed)| FoundPlace { cell, word, placed }))
    }

    /// Whether no other process tells this index what it does.
    fn is_alone(&self) -> bool {
        matches!(&*self.index.get().backing, Locked::Own(..))
    }

    /// Whether the entry is still the same, so that what was read is its value.
    fn is_still(&self, py: Python<'_>, found: &FoundPlace) -> PyResult<bool> {
        let index = self.index.get();
        match &*index.backing {
            _ if index.backing.is_disowned() => Ok(false),
            Locked::Own(lock, _) => {
                let cache = backing::lock(lock, py)?;
                Ok(cache.is_still(found.cell, found.word, found.placed.segment))
            }
            Locked::Shared(lock, _) => {
                let index = backing::lock(lock, py)?;
                let cache = index.cache();
                Ok(cache.is_still(found.cell, found.word, found.placed.segment))
            }
        }
    }

    /// Reads what was asked for; `None` where it is not in memory, or there is something else by now.
    #[allow(unsafe_code)]
    fn read_on_the_spot<'py>(
        &self,
        py: Python<'py>,
        on_the_spot: &OnTheSpot,
        key: &str,
        found: &Found,
        place: &FoundPlace,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Ok(size) = usize::try_from(found.length) else {
            return Ok(None);
        };
        let name = match found.range {
            ByteRange::Full => Cow::Borrowed(key),
            range => Cow::Owned(range.cache_key(key)),
        };
        let array = new_array(py, size)?;
        let start = array.data().cast::<MaybeUninit<u8>>();
        // SAFETY: It has this many bytes, one after the other, and is known here alone until all of them are read.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start, size) };
        let (files, start) = (&self.files, found.start);
        let is_alone = self.is_alone();
        let mut read = || files.read(place.placed, &name, start, bytes, false, is_alone);
        let got = if size >= DETACH_FROM {
            py.detach(read)
        } else {
            read()
        };
        match got {
            Ok(Got::Bytes) if self.is_still(py, place)? => Ok(Some(array.into_any())),
            Ok(Got::NotNow) => on_the_spot.is_cold(py).map(|()| None),
            // What it is will be seen where it can be waited for.
            Ok(Got::Bytes | Got::Nothing) | Err(_) => Ok(None),
        }
    }

    fn name_in_header(&self, name: &str) -> Option<String> {
        let index = self.index.get();
        let (key, range) = ByteRange::parse(name)?;
        Some(range.cache_key(&index.whole(key)))
    }
}

/// An array of so many bytes, whatever they are. The function of the crate panics where there is no memory.
#[allow(unsafe_code)]
fn new_array(py: Python<'_>, size: usize) -> PyResult<Bound<'_, PyArray1<u8>>> {
    let mut sizes = [npy_intp::try_from(size)?];
    // SAFETY: All is as numpy asks for, which takes the reference to the data type over. It is an array of one axis and
    // this type, or null with an exception.
    unsafe {
        let array = PY_ARRAY_API.PyArray_NewFromDescr(
            py,
            get_type_object(py, NpyTypes::PyArray_Type),
            u8::get_dtype(py).into_dtype_ptr(),
            1,
            sizes.as_mut_ptr(),
            null_mut(),
            null_mut(),
            0,
            null_mut(),
        );
        Ok(Bound::from_owned_ptr_or_err(py, array)?.cast_into_unchecked())
    }
}

/// Bytes from which on other threads may run while they are read.
const DETACH_FROM: usize = 256 * 1024;

#[pymethods]
impl SegmentReader {
    #[new]
    #[pyo3(signature = (index, files, /))]
    fn new(index: Py<Index>, files: &SegmentFiles) -> Self {
        SegmentReader {
            index,
            files: files.files(),
            on_the_spot: None,
        }
    }

    /// One that reads values where it looks them up; see the stub.
    #[staticmethod]
    #[pyo3(signature = (index, files, begins, note_cold, largest, /))]
    fn on_the_spot(
        index: Py<Index>,
        files: &SegmentFiles,
        begins: Py<PyAny>,
        note_cold: Py<PyAny>,
        largest: u64,
    ) -> PyResult<Self> {
        Ok(SegmentReader {
            index,
            files: files.files(),
            on_the_spot: Some(OnTheSpot {
                begins,
                note_cold,
                largest,
                uncounted: AtomicU64::new(0),
            }),
        })
    }

    /// Looks a key up as `Index.lookup` does; what is in memory is read as well.
    #[pyo3(signature = (key, raw=None, now=0.0, max_age=None, missing=None, /))]
    fn lookup<'py>(
        &self,
        py: Python<'py>,
        key: &str,
        raw: RawSpan,
        now: f64,
        max_age: Option<f64>,
        missing: Option<RawAges>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let index = self.index.get();
        let (asked, whole) = (span(raw)?, &*index.whole(key));
        let looked = index.look(py, whole, asked, fresh(now, max_age), missing)?;
        if let (Answer::Found(found), false) = (&looked.answer, looked.verify)
            && let (Some(place), Some(on_the_spot)) = (&looked.place, &self.on_the_spot)
            && on_the_spot.may_begin(py, found.length)?
            && let Some(array) = self.read_on_the_spot(py, on_the_spot, whole, found, place)?
        {
            index.count(true);
            if asked == ByteRange::Full {
                return Ok(Some(array));
            }
            let told = hit(py, key, asked, found, false, index.tells_entries)?;
            return Ok(Some((array, told).into_pyobject(py)?.into_any()));
        }
        index.tell(py, key, asked, &looked)
    }

    /// Reads into a buffer what a value of `total` bytes has from `start` on. False where that would have to wait;
    /// `None` where there is no such value.
    #[pyo3(signature = (name, into, total, start, size, waits, /))]
    #[allow(clippy::too_many_arguments)] // All that a read is about, for one call.
    fn read(
        &self,
        py: Python<'_>,
        name: &str,
        mut into: PyBuffer<u8>,
        total: u64,
        start: u64,
        size: usize,
        waits: bool,
    ) -> PyResult<Option<bool>> {
        let bytes = room(&mut into, size)?;
        let Some(in_header) = self.name_in_header(name) else {
            return Ok(None);
        };
        if start.checked_add(size as u64).is_none_or(|end| end > total) {
            return Ok(None);
        }
        let is_alone = self.is_alone();
        // Once more where it was moved meanwhile.
        for anew in [false, true] {
            let Some(found) = self.find(py, name, anew)? else {
                return Ok(None);
            };
            if found.placed.size != total {
                continue;
            }
            let mut read = || {
                let files = &self.files;
                files.read(found.placed, &in_header, start, bytes, waits, is_alone)
            };
            let got = if waits || size >= DETACH_FROM {
                py.detach(read)
            } else {
                read()
            };
            match got.map_err(os_error)? {
                Got::Bytes if self.is_still(py, &found)? => return Ok(Some(true)),
                Got::NotNow => return Ok(Some(false)),
                Got::Bytes | Got::Nothing => {}
            }
        }
        Ok(None)
    }

    /// Length and CRC32C that stand before a value.
    #[pyo3(signature = (name, /))]
    fn recorded(&self, py: Python<'_>, name: &str) -> PyResult<Option<(u64, u32)>> {
        let Some(found) = self.find(py, name, true)? else {
            return Ok(None);
        };
        let in_header = self.name_in_header(name);
        let header = py.detach(|| self.files.header(found.placed));
        let header = header.filter(|header| Some(&header.name) == in_header.as_ref());
        Ok(header.map(|header| (header.placed.size, header.checksum)))
    }
}
