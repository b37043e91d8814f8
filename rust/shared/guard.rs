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
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use memmap2::MmapMut;

/// Mappings that are watched at once: those of more than all participants that one index has.
const MAPPINGS: usize = 2048;

#[derive(Debug)]
struct Watched {
    /// Its first byte; 0 where the place is free.
    start: AtomicUsize,
    end: AtomicUsize,
    has_faulted: AtomicBool,
}

static WATCHED: [Watched; MAPPINGS] = [const {
    Watched {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        has_faulted: AtomicBool::new(false),
    }
}; MAPPINGS];

/// A mapped file that does not end the process.
#[derive(Debug)]
pub(super) struct Map {
    bytes: MmapMut,
    /// Address of the first byte.
    start: usize,
    watched: Option<&'static Watched>,
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
        self.watched
            .is_some_and(|watched| watched.has_faulted.load(Ordering::Relaxed))
    }
}

fn watch(bytes: &MmapMut) -> Option<&'static Watched> {
    let start = bytes.as_ptr() as usize;
    let free = |watched: &&Watched| {
        let taken = watched
            .start
            .compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed);
        taken.is_ok()
    };
    let watched = WATCHED.iter().find(free)?;
    watched.has_faulted.store(false, Ordering::Relaxed);
    watched.end.store(start + bytes.len(), Ordering::Release);
    Some(watched)
}

impl Drop for Map {
    fn drop(&mut self) {
        if let Some(watched) = self.watched {
            watched.end.store(0, Ordering::Release);
            watched.start.store(0, Ordering::Release);
        }
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
    use std::sync::OnceLock;

    use libc::{SIGBUS, c_int, c_void, sigaction, siginfo_t};

    use super::{AtomicUsize, Once, Ordering, WATCHED};

    static PAGE: AtomicUsize = AtomicUsize::new(4096);
    static BEFORE: OnceLock<sigaction> = OnceLock::new();

    /// Takes the signal over, once.
    pub(super) fn install() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // SAFETY: `sysconf` and `sigaction` get valid arguments, and `on_fault` is a handler of
            // the kind that `SA_SIGINFO` asks for.
            unsafe {
                if let Ok(size) = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)) {
                    PAGE.store(size, Ordering::Relaxed);
                }
                let mut before = MaybeUninit::<sigaction>::zeroed();
                if libc::sigaction(SIGBUS, null_mut(), before.as_mut_ptr()) != 0 {
                    return;
                }
                let _ = BEFORE.set(before.assume_init());
                let mut action = MaybeUninit::<sigaction>::zeroed().assume_init();
                action.sa_sigaction = on_fault as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&raw mut action.sa_mask);
                libc::sigaction(SIGBUS, &raw const action, null_mut());
            }
        });
    }

    /// Runs in the thread that has touched the page; does nothing that a handler may not do.
    extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        // SAFETY: With `SA_SIGINFO` the kernel passes a valid `siginfo_t`.
        let address = unsafe { (*info).si_addr() } as usize;
        for watched in &WATCHED {
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
        let Some(before) = BEFORE.get() else { return };
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
