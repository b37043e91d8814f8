//! Reading files with pages in memory, on file systems that cannot read without waiting.
//!
//! The kernel is asked first whether all pages are there. Its answer holds for the moment: a page may be
//! dropped before it is read. So each read tells whether it has waited, and how long.

#[cfg(target_os = "linux")]
pub(super) use self::linux::{Waits, is_in_memory};
#[cfg(target_os = "linux")]
pub use self::linux::{read_resident, tells_residency};

#[cfg(not(target_os = "linux"))]
pub(super) use self::other::{Waits, is_in_memory};
#[cfg(not(target_os = "linux"))]
pub use self::other::{read_resident, tells_residency};

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd, AsRawFd, OwnedFd};
    use std::path::Path;
    use std::sync::OnceLock;
    use std::time::{Duration, Instant};

    use memmap2::MmapOptions;
    use rustix::fs::{
        FileType, MemfdFlags, Mode, OFlags, fstat, fstatfs, ftruncate, memfd_create, open,
    };
    use rustix::io::{Errno, pread, retry_on_intr};
    use rustix::process::geteuid;

    use crate::disk::below::open_cached;

    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    const OVERLAYFS: u64 = 0x794c_7630;

    /// Number of the system call; the few architectures that have another one have no call of this number.
    const CACHESTAT: libc::c_long = 451;

    /// Whether [`read_resident`] can be used for the files of this file system, and to open and read
    /// what is resident does not wait. File systems of a network may ask their server even then.
    #[must_use]
    pub fn tells_residency(file: impl AsFd) -> bool {
        let kind = fstatfs(file).map(|status| u64::try_from(status.f_type).unwrap_or(0));
        matches!(kind, Ok(TMPFS | RAMFS | OVERLAYFS)) && tells_the_truth()
    }

    /// Whether this kernel knows of a page that it is not in memory: some sandboxes say of each that it is.
    fn tells_the_truth() -> bool {
        static TRUTH: OnceLock<bool> = OnceLock::new();
        *TRUTH.get_or_init(|| {
            let Ok(hole) = memfd_create(c"zcache", MemfdFlags::CLOEXEC) else {
                return false;
            };
            ftruncate(&hole, 1).is_ok() && pages_in_memory(&hole, 0, 1) == Some(false)
        })
    }

    /// Reads into `into` what a regular file of `total` bytes has from `start` on, if all of it is in memory.
    /// Returns how long that had to wait all the same, and has written to all of `into` then; `None` where the
    /// file is another one, or the kernel does not say.
    ///
    /// # Errors
    ///
    /// Where it cannot be opened or read; `EAGAIN` where to open it needs a disk.
    pub fn read_resident(
        path: &Path,
        into: &mut [MaybeUninit<u8>],
        total: u64,
        start: u64,
    ) -> io::Result<Option<Duration>> {
        let waits = Waits::begin();
        let file = open_now(path)?;
        if !is_resident(&file, total, start, into.len()) {
            return Ok(None);
        }
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = start + done as u64;
            match retry_on_intr(|| pread(&file, &mut *rest, at).map(|(read, _)| read.len()))? {
                0 => return Ok(None),
                count => done += count,
            }
        }
        drop(file);
        Ok(Some(waits.end()))
    }

    /// Finds out how long something had to wait that should not.
    pub(in crate::disk) struct Waits {
        begun: Instant,
        slept: libc::c_long,
    }

    impl Waits {
        /// It begins now, in this thread.
        pub(in crate::disk) fn begin() -> Self {
            let (begun, slept) = (Instant::now(), times_slept());
            Waits { begun, slept }
        }

        /// It has ended.
        pub(in crate::disk) fn end(self) -> Duration {
            if times_slept() == self.slept {
                // It was another thread that had the processor, and not a disk that was waited for.
                Duration::ZERO
            } else {
                self.begun.elapsed()
            }
        }
    }

    fn open_now(path: &Path) -> io::Result<OwnedFd> {
        match open_cached(path) {
            // Systems before Linux 5.12, and those that hide this call.
            Err(error) if is_unknown_call(&error) => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
                Ok(open(path, flags, Mode::empty())?)
            }
            opened => opened,
        }
    }

    fn is_unknown_call(error: &io::Error) -> bool {
        let errno = Errno::from_io_error(error);
        matches!(errno, Some(Errno::NOSYS | Errno::PERM | Errno::INVAL))
    }

    /// How often this thread has left the processor because it had to wait for something.
    #[allow(unsafe_code)]
    fn times_slept() -> libc::c_long {
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: The kernel fills in what is all zeros, and a value, already.
        let usage = unsafe {
            libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
            usage.assume_init()
        };
        usage.ru_nvcsw
    }

    fn is_resident(file: impl AsFd, total: u64, start: u64, size: usize) -> bool {
        let Ok(status) = fstat(&file) else {
            return false;
        };
        // Of files of others the kernel says that all pages are in memory, so that no user can spy.
        FileType::from_raw_mode(status.st_mode) == FileType::RegularFile
            && status.st_size as u64 == total
            && status.st_uid == geteuid().as_raw()
            && are_in_memory(file, start, size)
    }

    /// Whether all pages of a part of a regular file are in memory; false too where others own it.
    pub(in crate::disk) fn is_in_memory(file: impl AsFd, start: u64, size: usize) -> bool {
        fstat(&file).is_ok_and(|status| status.st_uid == geteuid().as_raw())
            && are_in_memory(file, start, size)
    }

    fn are_in_memory(file: impl AsFd, start: u64, size: usize) -> bool {
        are_cached(&file, start, size) || pages_in_memory(file, start, size) == Some(true)
    }

    /// Whether the cache of this file has all pages of a part of it: a twentieth of what it takes to map
    /// them. That of a file of overlayfs has none, for they are with the file below it.
    #[allow(unsafe_code)]
    fn are_cached(file: impl AsFd, start: u64, size: usize) -> bool {
        #[repr(C)]
        #[derive(Default)]
        struct Found {
            cached: u64,
            others: [u64; 4],
        }
        let page = rustix::param::page_size() as u64;
        let pages = (start + size as u64).div_ceil(page) - start / page;
        let (range, mut found) = ([start, size as u64], Found::default());
        // SAFETY: The kernel reads two numbers and writes five; one before Linux 6.5 knows no such call.
        let asked = unsafe {
            let fd = file.as_fd().as_raw_fd();
            libc::syscall(CACHESTAT, fd, range.as_ptr(), &raw mut found, 0)
        };
        asked == 0 && found.cached == pages
    }

    /// Whether all pages of a part of a file are in memory; `None` where the kernel does not say.
    #[allow(unsafe_code)]
    fn pages_in_memory(file: impl AsFd, start: u64, size: usize) -> Option<bool> {
        let page = rustix::param::page_size();
        let first = start - start % page as u64;
        let len = usize::try_from(start - first).ok()?.checked_add(size)?;
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: Nothing is ever read through the mapping.
        let mapping = unsafe { MmapOptions::new().offset(first).len(len).map(fd) }.ok()?;
        let mut pages = vec![0u8; len.div_ceil(page)];
        // SAFETY: The mapping begins at a page and has `len` bytes, and there is a byte for each page of it.
        let asked = unsafe {
            let address = mapping.as_ptr().cast_mut().cast();
            libc::mincore(address, len, pages.as_mut_ptr())
        };
        (asked == 0).then(|| pages.iter().all(|page| page & 1 != 0))
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use std::io;
    use std::mem::MaybeUninit;
    use std::os::fd::AsFd;
    use std::path::Path;
    use std::time::Duration;

    /// Never: nothing is known of other systems.
    #[must_use]
    pub fn tells_residency(_: impl AsFd) -> bool {
        false
    }

    /// Never.
    ///
    /// # Errors
    ///
    /// None.
    pub fn read_resident(
        _: &Path,
        _: &mut [MaybeUninit<u8>],
        _: u64,
        _: u64,
    ) -> io::Result<Option<Duration>> {
        Ok(None)
    }

    /// Never.
    pub(in crate::disk) fn is_in_memory(_: impl AsFd, _: u64, _: usize) -> bool {
        false
    }

    /// Finds out nothing.
    pub(in crate::disk) struct Waits;

    impl Waits {
        /// It begins now.
        pub(in crate::disk) fn begin() -> Self {
            Waits
        }

        /// It has ended.
        pub(in crate::disk) fn end(self) -> Duration {
            Duration::ZERO
        }
    }
}
