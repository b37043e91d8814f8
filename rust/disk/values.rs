//! Where the values of a cache directory are: each in a file of its own, or, in a pool, in segments.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cache_dir::NewFiles;
use super::folders;
use super::ownership::{self, SourceDigest};
use super::removal::{self, Was};
use super::segments::{SegmentFiles, ValueToWrite};
use super::value_file::{self, WriteError, WrittenFile};
use crate::cache::{Placed, Victim};

/// Values of a pool that one batch of fills writes at most.
const MOST_AT_ONCE: usize = 16;

/// Where values are.
#[derive(Clone, Debug)]
pub(super) enum Values {
    /// In files under their own names.
    Files,
    /// In the segments of a pool.
    Segments(Arc<SegmentFiles>),
}

/// A value that is written, and not valid before it is sealed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Written {
    File(WrittenFile),
    InSegment { placed: Placed, checksum: u32 },
}

impl Written {
    /// Where it is, in a pool.
    pub(super) fn placed(&self) -> Option<Placed> {
        match self {
            Written::File(_) => None,
            Written::InSegment { placed, .. } => Some(*placed),
        }
    }

    /// CRC32C of the value.
    pub(super) fn checksum(&self) -> u32 {
        match self {
            Written::File(made) => made.checksum,
            Written::InSegment { checksum, .. } => *checksum,
        }
    }
}

/// A value on its way into the cache directory.
pub(super) struct NewValue<'a> {
    pub(super) root: &'a Path,
    pub(super) name: &'a str,
    pub(super) data: &'a [u8],
    /// Milliseconds since 1970 of its fetch.
    pub(super) fetched: u64,
    pub(super) unfinished: PathBuf,
    pub(super) source: SourceDigest,
    /// Where the index has given it room, in a pool.
    pub(super) placed: Option<Placed>,
}

impl NewValue<'_> {
    /// As segments take it.
    fn in_segment(&self) -> Option<ValueToWrite<'_>> {
        Some(ValueToWrite {
            placed: self.placed?,
            name: self.name,
            data: self.data,
            fetched: self.fetched,
        })
    }
}

fn write_file(value: &NewValue<'_>) -> Result<Written, WriteError> {
    let nanos = i64::try_from(value.fetched)
        .unwrap_or(i64::MAX)
        .saturating_mul(ownership::MILLI)
        .saturating_add(ownership::PENDING);
    let (name, data, source) = (Path::new(value.name), value.data, value.source);
    let made = value_file::write_value(value.root, name, &value.unfinished, data, nanos, source)?;
    Ok(Written::File(made))
}

impl Values {
    /// Values that one batch of fills writes at most. Files are written one after the other, so with many of them a slow disk
    /// would make no progress that others see.
    pub(super) fn most_at_once(&self) -> usize {
        match self {
            Values::Files => 1,
            Values::Segments(_) => MOST_AT_ONCE,
        }
    }

    /// The files that are made where values get these places.
    pub(super) fn new_files(&self, mut placed: impl Iterator<Item = Placed>) -> NewFiles {
        match self {
            Values::Files => NewFiles::Values,
            Values::Segments(files) if placed.all(|placed| files.is_there(placed.segment)) => {
                NewFiles::None
            }
            Values::Segments(_) => NewFiles::Segments,
        }
    }

    /// Writes values.
    pub(super) fn write(&self, values: &[NewValue<'_>]) -> Vec<Result<Written, WriteError>> {
        let Values::Segments(files) = self else {
            return values.iter().map(write_file).collect();
        };
        let placed: Vec<_> = values.iter().filter_map(NewValue::in_segment).collect();
        let mut checksums = files.write_all(&placed).into_iter();
        let made = |value: &NewValue<'_>| match (value.placed, checksums.next()) {
            (Some(placed), Some(checksum)) => Ok(Written::InSegment {
                placed,
                checksum: checksum?,
            }),
            // The index of a pool gives each value its place.
            _ => Err(WriteError::Unplaced),
        };
        values.iter().map(made).collect()
    }

    /// Removes what there may be of a value that could not be written.
    pub(super) fn clear(&self, value: &NewValue<'_>) -> io::Result<()> {
        match (self, value.placed) {
            (Values::Segments(files), Some(placed)) => files.delete(placed),
            _ => removal::remove_below(value.root, Path::new(value.name)),
        }
    }

    /// Removes a value that has no entry, unless another has taken its place.
    pub(super) fn remove_written(&self, root: &Path, name: &str, made: &Written) -> io::Result<()> {
        match (self, made) {
            (Values::Segments(files), Written::InSegment { placed, .. }) => files.delete(*placed),
            (_, Written::File(made)) => value_file::remove_made(root, Path::new(name), made),
            (Values::Files, Written::InSegment { .. }) => Ok(()),
        }
    }

    /// Marks values as valid. A rebuild ignores those for which that fails.
    pub(super) fn seal(&self, root: &Path, made: &[(&str, &Written)]) {
        if let Values::Segments(files) = self {
            let placed: Vec<Placed> = made.iter().filter_map(|(_, made)| made.placed()).collect();
            files.seal_all(&placed);
            return;
        }
        for (name, made) in made {
            if let Written::File(made) = made {
                let _ = value_file::seal(root, Path::new(name), made);
            }
        }
    }

    /// Deletes the values of victims; what was in the place of each.
    pub(super) fn delete(&self, root: &Path, victims: &[Victim]) -> Vec<io::Result<Was>> {
        let Values::Segments(files) = self else {
            let remove = |v: &Victim| removal::remove_value(root, Path::new(&v.cache_key));
            return victims.iter().map(remove).collect();
        };
        let placed: Vec<Placed> = victims.iter().filter_map(|victim| victim.placed).collect();
        let mut outcome = files.delete_all(&placed).into_iter();
        let deleted = |victim: &Victim| match victim.placed {
            // What has no place in a pool was never written.
            None => Ok(Was::Value),
            Some(_) => outcome.next().unwrap_or(Ok(())).map(|()| Was::Value),
        };
        victims.iter().map(deleted).collect()
    }

    /// Has a rebuild ignore a value that could not be deleted. Best effort: a volume that takes no writes takes no
    /// tombstones.
    pub(super) fn write_tombstone(&self, root: &Path, name: &str, placed: Option<Placed>) {
        let _ = match (self, placed) {
            (Values::Files, _) => removal::write_tombstone(root, name),
            (Values::Segments(files), Some(placed)) => files.unseal(placed),
            (Values::Segments(_), None) => Ok(()),
        };
    }

    /// Bytes by which folders have grown since the last call, in this thread.
    pub(super) fn take_folders(&self) -> i64 {
        match self {
            Values::Files => folders::take_folders(),
            Values::Segments(_) => 0,
        }
    }

    /// The segments of a pool.
    pub(super) fn segments(&self) -> Option<Arc<SegmentFiles>> {
        match self {
            Values::Segments(files) => Some(Arc::clone(files)),
            Values::Files => None,
        }
    }

    /// Removes the file of a segment.
    pub(super) fn remove_segment(&self, number: u64) -> io::Result<()> {
        match self {
            Values::Segments(files) => files.remove(number),
            Values::Files => Ok(()),
        }
    }
}
