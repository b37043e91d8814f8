//! What is asked of the file system about segments.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fstat, open};
use rustix::io::Errno;

use super::files::Got;
use super::format::{HEADER, ValueHeader};
use crate::cache::{FIRST_PAGE, PAGE, Placed};
use crate::disk::below::is;
use crate::shared::new_generation;

/// Whether files in a folder can have holes that give their blocks back.
///
/// # Errors
///
/// Where the folder takes no file.
pub fn can_punch(folder: &Path) -> io::Result<bool> {
    let file = unnamed(folder)?;
    if keeps_whole_extents(&file) {
        return Ok(false);
    }
    let tried = file
        .write_all_at(&[1; 2 * PAGE as usize], 0)
        .and_then(|()| punch(&file, 0, PAGE));
    match tried {
        Ok(()) => Ok(true),
        Err(error) if is_unsupported(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a hole gives nothing back before all that was written together with it has gone: so it is on btrfs, where `du`
/// tells otherwise.
fn keeps_whole_extents(file: &File) -> bool {
    #[cfg(target_os = "linux")]
    {
        const BTRFS: u64 = 0x9123_683e;
        // Of 32 bits, with a sign on some machines.
        let kind = rustix::fs::fstatfs(file).map(|status| status.f_type as u64 & 0xffff_ffff);
        kind == Ok(BTRFS)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = file;
        false
    }
}

/// A new file in a folder, without a name: no other process finds it, and nothing is left of it after a crash.
fn unnamed(folder: &Path) -> io::Result<File> {
    let mode = Mode::from_raw_mode(0o600);
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    #[cfg(target_os = "linux")]
    if let Ok(file) = open(folder, flags | OFlags::TMPFILE, mode) {
        return Ok(file.into());
    }
    // Not on this file system: its name is removed before anything is written.
    let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    loop {
        let path = folder.join(format!("trial-{:016x}", new_generation()));
        match open(&path, flags, mode) {
            Err(Errno::EXIST) => {}
            opened => {
                let file = opened?;
                std::fs::remove_file(&path)?;
                return Ok(file.into());
            }
        }
    }
}

/// Gives back the blocks of whole pages; they read as zeros.
pub(super) fn punch(file: &File, start: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, start, length) {
        Ok(()) => Ok(()),
        Err(Errno::NOSYS | Errno::INVAL | Errno::NODEV) => Err(Errno::OPNOTSUPP.into()),
        punched => Ok(punched?),
    }
}

/// Whether an error says that no holes can be made here.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::OPNOTSUPP)
}

/// Bytes by which a segment is lengthened at once.
const STEP: u64 = 1 << 20;

/// Lengthens a segment ahead of what is appended to it, with a hole: of a file that is written to behind its end, XFS
/// allocates more than is written, and keeps that as long as the file is open.
///
/// Not to the capacity at once: a copy may fill the hole. What the file system refuses it tells the write that follows.
pub(super) fn lengthen(file: &File, capacity: u32, end: u64, is_changing: &Mutex<()>) {
    // What others have written meanwhile is not cut off.
    let _one = is_changing.lock().unwrap_or_else(PoisonError::into_inner);
    if file.metadata().is_ok_and(|status| status.len() < end) {
        let full = (u64::from(FIRST_PAGE) + u64::from(capacity)) * PAGE;
        // A value that is alone has one page in that.
        let _ = file.set_len(end.next_multiple_of(STEP).min(full).max(end));
    }
}

/// Whether an error of opening says that there is no file of ours.
pub(super) fn is_elsewhere(error: &io::Error) -> bool {
    let other = [
        Errno::ISDIR,
        Errno::NOTDIR,
        Errno::NODEV,
        Errno::LOOP,
        Errno::NXIO,
    ];
    let errno = Errno::from_io_error(error);
    error.kind() == io::ErrorKind::NotFound || errno.is_some_and(|errno| other.contains(&errno))
}

/// Whether an error of opening says that this process, or the whole system, has no descriptor left.
pub(super) fn is_without_descriptors(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE))
}

pub(super) fn regular(file: File) -> io::Result<File> {
    if is(&fstat(&file)?, rustix::fs::FileType::RegularFile) {
        Ok(file)
    } else {
        Err(Errno::NODEV.into())
    }
}

/// A read that has ended before its bytes: at the end of what is in memory, or of the file.
fn short(waits: bool, file: &File, placed: Placed) -> Got {
    let end = placed.start() + HEADER as u64 + placed.size;
    let is_whole = file.metadata().is_ok_and(|status| status.len() >= end);
    if !waits && is_whole {
        Got::NotNow
    } else {
        Got::Nothing
    }
}

/// Writes all of these bytes, in one call unless the file system takes them in parts.
pub(super) fn write_slices(
    file: &File,
    mut at: u64,
    mut slices: &mut [IoSlice<'_>],
) -> io::Result<()> {
    // Empty ones at the beginning would look like a file system that takes no more.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::pwritev(file, slices, at))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => {
                at += written as u64;
                IoSlice::advance_slices(&mut slices, written);
            }
        }
    }
    Ok(())
}

/// A file system or a kernel cannot read without waiting.
pub(super) const UNSUPPORTED: Errno = Errno::OPNOTSUPP;

/// Reads one after the other, in one call. That of `rustix` takes no memory that was not written to.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn read_both(
    file: &File,
    at: u64,
    first: &mut [u8],
    second: &mut [MaybeUninit<u8>],
    waits: bool,
) -> rustix::io::Result<usize> {
    use std::os::fd::AsRawFd;
    let part = |start: *mut libc::c_void, iov_len| libc::iovec {
        iov_base: start,
        iov_len,
    };
    let parts = [
        part(first.as_mut_ptr().cast(), first.len()),
        part(second.as_mut_ptr().cast(), second.len()),
    ];
    let (call, flags) = if waits {
        (libc::SYS_preadv, 0)
    } else {
        (libc::SYS_preadv2, libc::RWF_NOWAIT)
    };
    // Where a word has 32 bits, the place is given in two.
    let (low, high) = (at as libc::c_long, (at >> 32) as libc::c_long);
    let read = || {
        // SAFETY: The kernel writes into these two parts alone, at most what they hold, and reads nothing of them.
        let count = unsafe {
            let parts = (parts.as_ptr(), parts.len() as libc::c_long);
            libc::syscall(call, file.as_raw_fd(), parts.0, parts.1, low, high, flags)
        };
        usize::try_from(count)
            .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    };
    match rustix::io::retry_on_intr(read) {
        // Not on this file system, or not by this kernel.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) if !waits => Err(UNSUPPORTED),
        read => read,
    }
}

#[cfg(not(target_os = "linux"))]
fn read_both(
    file: &File,
    at: u64,
    first: &mut [u8],
    second: &mut [MaybeUninit<u8>],
    waits: bool,
) -> rustix::io::Result<usize> {
    use rustix::io::{pread, retry_on_intr};
    if !waits {
        return Err(UNSUPPORTED);
    }
    let len = first.len();
    let count = retry_on_intr(|| pread(file, &mut *first, at))?;
    if count < len {
        return Ok(count);
    }
    let at = at + len as u64;
    let more = retry_on_intr(|| pread(file, &mut *second, at).map(|(read, _)| read.len()))?;
    Ok(count + more)
}

/// Reads what a value has from `start` on, after its header. With `Got::Bytes` all of `into` was written to.
pub(super) fn read_from(
    file: &File,
    placed: Placed,
    name: &str,
    start: u64,
    into: &mut [MaybeUninit<u8>],
    waits: bool,
) -> io::Result<Got> {
    let mut header = [0; HEADER];
    // At first header and value in one call, where the value is read from its beginning.
    let len = into.len();
    let at = placed.start();
    let read = if start == 0 {
        read_both(file, at, &mut header, into, waits)
    } else {
        read_both(file, at, &mut header, &mut [], waits)
    };
    let mut done = match read {
        Ok(count) if count < HEADER => return Ok(short(waits, file, placed)),
        Ok(count) => count - HEADER,
        Err(Errno::AGAIN) => return Ok(Got::NotNow),
        Err(error) => return Err(error.into()),
    };
    if !ValueHeader::is_of(&header, &placed, name) {
        return Ok(Got::Nothing);
    }
    while done < len {
        let rest = into.get_mut(done..).unwrap_or_default();
        let from = at + HEADER as u64 + start + done as u64;
        match read_both(file, from, &mut [], rest, waits) {
            Ok(0) => return Ok(short(waits, file, placed)),
            Ok(count) => done += count,
            Err(Errno::AGAIN) => return Ok(Got::NotNow),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Got::Bytes)
}
