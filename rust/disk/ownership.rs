//! Which files zcache wrote, and whether they are valid: shown by the modification time, by the record
//! beside a value, or by its bytes.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{
    FileType, Stat, Timespec, Timestamps, XattrFlags, fgetxattr, fsetxattr, fstat, futimens,
};

use super::below::{At, Place, is, open_value};
use crate::checksum::Crc32c;

/// Nanoseconds below the millisecond of the modification time of each file that zcache wrote.
pub const SIGNATURE: i64 = 271_828;

/// The same as long as the value is not committed.
pub const PENDING: i64 = SIGNATURE + 1;

/// Nanoseconds of a millisecond.
pub const MILLI: i64 = 1_000_000;

const NANOS: i64 = 1_000_000_000;

/// The extended attribute with length and checksum of a value, on file systems that have them.
const ATTRIBUTE: &CStr = c"user.zcache";

pub(super) fn set_modified(file: impl AsFd, nanos: i64) -> rustix::io::Result<()> {
    let time = Timespec {
        tv_sec: nanos.div_euclid(NANOS),
        tv_nsec: nanos.rem_euclid(NANOS),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    futimens(file, &times)
}

/// Nanoseconds since 1970 of a modification time.
pub(super) fn modified(status: &Stat) -> i64 {
    status
        .st_mtime
        .saturating_mul(NANOS)
        .saturating_add(status.st_mtime_nsec as i64)
}

/// Digest of the name of a source, recorded with each of its values; zeros where it is unknown.
pub type SourceDigest = [u8; 8];

/// What is recorded beside a value, in an attribute that goes with it where copies lose its times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Bytes of the value.
    pub size: u64,
    /// CRC32C of the value.
    pub checksum: u32,
    /// Whether the value is valid: it was committed.
    pub sealed: bool,
    /// Milliseconds since 1970 of its fetch.
    pub fetched: u64,
    /// The source of the value.
    pub source: SourceDigest,
}

/// Bytes of a [`Record`], and of one that earlier versions wrote: size and checksum only.
const RECORD: usize = 28;

const SHORT_RECORD: usize = 12;

impl Record {
    fn to_bytes(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        // The fetch time takes 48 bits, as in the index, so that 8 bits are free.
        let when = self.fetched << 8 | u64::from(self.sealed);
        let parts: [&[u8]; 4] = [
            &self.size.to_le_bytes(),
            &self.checksum.to_le_bytes(),
            &when.to_le_bytes(),
            &self.source,
        ];
        for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Record> {
        let (size, rest) = bytes.split_first_chunk()?;
        let (checksum, rest) = rest.split_first_chunk()?;
        let short = Record {
            size: u64::from_le_bytes(*size),
            checksum: u32::from_le_bytes(*checksum),
            sealed: false,
            fetched: 0,
            source: [0; 8],
        };
        if rest.is_empty() {
            return Some(short);
        }
        let (when, rest) = rest.split_first_chunk()?;
        let when = u64::from_le_bytes(*when);
        Some(Record {
            sealed: when & 1 != 0,
            fetched: when >> 8,
            source: rest.try_into().ok()?,
            ..short
        })
    }
}

pub(super) fn write_record(file: impl AsFd, record: Record) -> rustix::io::Result<()> {
    fsetxattr(file, ATTRIBUTE, &record.to_bytes(), XattrFlags::empty())
}

/// What is recorded beside a value, if anything is.
#[must_use]
pub fn record_of<'a>(file: impl Into<At<'a>>) -> Option<Record> {
    let mut bytes = [0u8; RECORD + 1];
    let file = file.into().open().ok()?;
    let count = fgetxattr(file, ATTRIBUTE, &mut bytes[..]).ok()?;
    (count == RECORD || count == SHORT_RECORD)
        .then(|| Record::parse(bytes.get(..count)?))
        .flatten()
}

/// Length and CRC32C that a file should have, where they are recorded.
#[must_use]
pub fn recorded<'a>(file: impl Into<At<'a>>) -> Option<(u64, u32)> {
    record_of(file).map(|record| (record.size, record.checksum))
}

/// Who wrote a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A value of ours.
    Ours,
    /// One that was never said to be valid.
    Pending,
    /// Not ours, as far as it can be told without the index.
    Foreign,
}

/// Who wrote a file: by its time, or, where that was changed, by the record beside it.
///
/// # Errors
///
/// Where there is none, or the file system refuses.
pub fn owner<'a>(file: impl Into<At<'a>>) -> rustix::io::Result<Owner> {
    let file = file.into();
    let status = file.status()?;
    if !is(&status, FileType::RegularFile) {
        return Ok(Owner::Foreign);
    }
    Ok(match modified(&status).rem_euclid(MILLI) {
        SIGNATURE => Owner::Ours,
        PENDING => Owner::Pending,
        _ => match record_of(file) {
            Some(record) if record.size == status.st_size as u64 => {
                if record.sealed {
                    Owner::Ours
                } else {
                    Owner::Pending
                }
            }
            _ => Owner::Foreign,
        },
    })
}

/// Whether there is a valid value of ours of this name in a cache directory.
pub(super) fn is_ours(root: &Path, name: &Path) -> bool {
    Place::find(root, name).is_ok_and(|place| owner(place.at()) == Ok(Owner::Ours))
}

/// Whether a regular file has this size and this CRC32C.
///
/// # Errors
///
/// Where it cannot be read.
pub fn holds<'a>(file: impl Into<At<'a>>, size: u64, checksum: u32) -> io::Result<bool> {
    let file = file.into().open()?;
    let status = fstat(&file)?;
    if !is(&status, FileType::RegularFile) || status.st_size as u64 != size {
        return Ok(false);
    }
    let (mut found, mut seen) = (Crc32c::new(), 0u64);
    let mut part = vec![0; 1 << 16];
    while seen < size {
        let count = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut part[..]))?;
        if count == 0 {
            return Ok(false);
        }
        found.update(part.get(..count).unwrap_or_default());
        seen += count as u64;
    }
    Ok(seen == size && found.finish() == checksum)
}

/// Says that the file of this name in a cache directory is a value of ours, fetched at this time in milliseconds, as after a copy that has
/// lost what said so.
///
/// # Errors
///
/// Where the file system refuses.
pub fn sign(root: &Path, name: &Path, fetched: u64) -> io::Result<()> {
    let file = open_value(root, name)?;
    let milli = i64::try_from(fetched).unwrap_or(0);
    Ok(set_modified(
        &file,
        milli.saturating_mul(MILLI).saturating_add(SIGNATURE),
    )?)
}
