//! Mappings of files that others can truncate, and of disks that can fail.
//!
//! To touch a page of a mapped file that the file has not any more, or that cannot be read or
//! allocated, ends a process by `SIGBUS`. Here it does not: the handler puts an empty page in its place,
//! and the mapping is marked, so that the step fails at its end. What a step finds in the page does no
//! harm, for no number in a mapping is trusted. A fault anywhere else goes to the handler that had the signal
//! before.
//!
//! What remains: who sets another handler later, and does not pass on what is not its own, takes this
//! one out of the way.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use memmap2::MmapMut;

/// Mappings that one part of the list has places for.
const PLACES: usize = 1024;

#[derive(Debug)]
struct Watched {
    /// Its first byte; 0 where the place is free.
    start: AtomicUsize,
    end: AtomicUsize,
    has_faulted: AtomicBool,
}

/// A part of the list of all mappings. None is ever freed, so the handler may walk them at any instant.
#[derive(Debug)]
struct Part {
    places: [Watched; PLACES],
    /// Null, or the next part.
    next: AtomicPtr<Part>,
}

static FIRST: Part = Part::new();

impl Part {
    const fn new() -> Self {
        Part {
            places: [const {
                Watched {
                    start: AtomicUsize::new(0),
                    end: AtomicUsize::new(0),
                    has_faulted: AtomicBool::new(false),
                }
            }; PLACES],
            next: AtomicPtr::new(null_mut()),
        }
    }

    #[allow(unsafe_code)]
    fn next(&self) -> Option<&'static Part> {
        // SAFETY: It is null, or points to a part that was complete before it was stored, and is never freed.
        unsafe { self.next.load(Ordering::Acquire).as_ref() }
    }

    /// The next part, which is made if there is none. Without a mutex: a child that is forked meanwhile would never get it.
    #[allow(unsafe_code)]
    fn next_or_new(&self) -> &'static Part {
        if let Some(next) = self.next() {
            return next;
        }
        let new = Box::into_raw(Box::new(Part::new()));
        let (taken, found) = (Ordering::AcqRel, Ordering::Acquire);
        match self.next.compare_exchange(null_mut(), new, taken, found) {
            // SAFETY: From now on it is in the list, and is never freed.
            Ok(_) => unsafe { &*new },
            Err(found) => {
                // SAFETY: No other thread has seen the new one; the one that was found is never freed.
                unsafe {
                    drop(Box::from_raw(new));
                    &*found
                }
            }
        }
    }
}

/// A mapped file that does not end the process.
#[derive(Debug)]
pub(super) struct Map {
    bytes: MmapMut,
    /// Address of the first byte.
    start: usize,
    watched: &'static Watched,
}

impl Map {
    /// Maps all of a file.
    #[allow(unsafe_code)]
    pub(super) fn new(file: &File) -> io::Result<Map> {
        // SAFETY: Other processes change the file while it is mapped. Those that hold the lock do so while this one does
        // not look, but for the few numbers of `Cache::is_still`, which are loaded atomically (`arena::racing`). A
        // process that ignores the lock can change numbers, which are never trusted. Pages of a file that was
        // truncated are replaced by the handler.
        let mut bytes = unsafe { MmapMut::map_mut(file) }?;
        handler::install();
        let start = bytes.as_mut_ptr().expose_provenance();
        let watched = watch(&bytes);
        Ok(Map {
            bytes,
            start,
            watched,
        })
    }

    /// Its first bytes, for atomic numbers: they are written to through shared references.
    pub(super) fn start<W>(&self) -> *const W {
        std::ptr::with_exposed_provenance(self.start)
    }

    /// Whether a page of it could not be had.
    pub(super) fn has_faulted(&self) -> bool {
        self.watched.has_faulted.load(Ordering::Relaxed)
    }
}

fn watch(bytes: &MmapMut) -> &'static Watched {
    let start = bytes.as_ptr() as usize;
    let takes = |watched: &&Watched| {
        let (taken, other) = (Ordering::AcqRel, Ordering::Relaxed);
        // To look first is cheaper by far where most places are in use.
        watched.start.load(Ordering::Relaxed) == 0
            && watched
                .start
                .compare_exchange(0, start, taken, other)
                .is_ok()
    };
    let mut part = &FIRST;
    loop {
        if let Some(watched) = part.places.iter().find(takes) {
            watched.has_faulted.store(false, Ordering::Relaxed);
            watched.end.store(start + bytes.len(), Ordering::Release);
            return watched;
        }
        part = part.next_or_new();
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        self.watched.end.store(0, Ordering::Release);
        self.watched.start.store(0, Ordering::Release);
    }
}

impl Deref for Map {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Map {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

mod handler {
    #![allow(unsafe_code)]

    use std::mem::MaybeUninit;
    use std::ptr::null_mut;

    use libc::{SIGBUS, c_int, c_void, sigaction, siginfo_t};

    use super::{AtomicBool, AtomicPtr, AtomicUsize, FIRST, Ordering, Part};

    static PAGE: AtomicUsize = AtomicUsize::new(4096);
    /// Null, or the action that the signal had before. Never freed, so the handler may look at it at any instant.
    static BEFORE: AtomicPtr<sigaction> = AtomicPtr::new(null_mut());
    static IS_INSTALLED: AtomicBool = AtomicBool::new(false);

    /// Takes the signal over, once. Two threads may do so at the same time: neither waits for the other, for it would
    /// wait for ever in a child that is forked meanwhile.
    pub(super) fn install() {
        if IS_INSTALLED.load(Ordering::Acquire) {
            return;
        }
        let own = on_fault as *const () as usize;
        // SAFETY: `sysconf` and `sigaction` get valid arguments, and `on_fault` is a handler of the kind that
        // `SA_SIGINFO` asks for. What a `Box` has given away is taken back only where no one else has it.
        unsafe {
            if let Ok(size) = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)) {
                PAGE.store(size, Ordering::Relaxed);
            }
            let mut before = MaybeUninit::<sigaction>::zeroed();
            if libc::sigaction(SIGBUS, null_mut(), before.as_mut_ptr()) != 0 {
                return;
            }
            let before = before.assume_init();
            if before.sa_sigaction != own {
                let kept = Box::into_raw(Box::new(before));
                let (new, old) = (Ordering::AcqRel, Ordering::Acquire);
                if BEFORE.compare_exchange(null_mut(), kept, new, old).is_err() {
                    drop(Box::from_raw(kept));
                }
                let mut action = MaybeUninit::<sigaction>::zeroed().assume_init();
                action.sa_sigaction = own;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&raw mut action.sa_mask);
                libc::sigaction(SIGBUS, &raw const action, null_mut());
            }
        }
        IS_INSTALLED.store(true, Ordering::Release);
    }

    /// Runs in the thread that has touched the page; does nothing that a handler may not do.
    extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        // SAFETY: With `SA_SIGINFO` the kernel passes a valid `siginfo_t`.
        let address = unsafe { (*info).si_addr() } as usize;
        let parts = std::iter::successors(Some(&FIRST), |part| Part::next(part));
        for watched in parts.flat_map(|part| &part.places) {
            let start = watched.start.load(Ordering::Acquire);
            if start == 0 || address < start || address >= watched.end.load(Ordering::Acquire) {
                continue;
            }
            let page = PAGE.load(Ordering::Relaxed);
            // SAFETY: The page lies in a mapping of ours that is in use, and takes its place. Where that
            // is refused the signal goes on.
            let put = unsafe {
                libc::mmap(
                    (address & !(page - 1)) as *mut c_void,
                    page,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            if put != libc::MAP_FAILED {
                watched.has_faulted.store(true, Ordering::Relaxed);
                return;
            }
        }
        pass_on(signal, info, context);
    }

    /// It is not ours: the handler that had the signal before gets it.
    fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        // SAFETY: It is null, or points to an action that was complete before it was stored, and is never freed.
        let Some(before) = (unsafe { BEFORE.load(Ordering::Acquire).as_ref() }) else {
            return;
        };
        let handler = before.sa_sigaction;
        if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
            // The instruction is tried again, and ends the process.
            // SAFETY: The action is the one that the kernel gave.
            unsafe { libc::sigaction(signal, before, null_mut()) };
            return;
        }
        // SAFETY: The kernel said that this is the handler, and of which kind.
        unsafe {
            if before.sa_flags & libc::SA_SIGINFO != 0 {
                let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            } else {
                let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Map, PLACES};
    use std::fs::{self, File};

    #[test]
    fn mapping_beyond_every_earlier_one_outlives_a_truncated_file() {
        let path = std::env::temp_dir().join(format!("zcache-guard-{}", std::process::id()));
        fs::write(&path, [1; 4096]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let maps: Vec<Map> = (0..3 * PLACES).map(|_| Map::new(&file).unwrap()).collect();
        let (last, others) = maps.split_last().unwrap();
        file.set_len(0).unwrap();
        assert_eq!(last.first(), Some(&0));
        assert!(last.has_faulted());
        assert!(!others.iter().any(Map::has_faulted));
    }
}
