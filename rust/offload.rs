//! Work for threads of our own that know no interpreter, and the desk where an event loop collects
//! what came of it.
//!
//! A thread of Python's that comes back from a system call waits for the interpreter, for
//! milliseconds where the event loop is busy, and then waits once more to wake it. These threads put
//! what they have done on a desk and write one byte to a socket that the event loop watches: one for
//! each result, so that one which got lost delays a result and no more.

use std::collections::{HashMap, HashSet};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crossbeam_channel::{Sender, unbounded};
use foldhash::fast::RandomState;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that do what they are given, in the order of its coming. They end with the last handle.
#[derive(Clone, Debug)]
pub struct Workers {
    jobs: Sender<Job>,
}

impl Workers {
    /// Starts so many threads.
    ///
    /// # Errors
    ///
    /// Where the system has no thread left, not even one.
    pub fn new(count: usize) -> io::Result<Self> {
        let (jobs, todo) = unbounded::<Job>();
        for started in 0..count {
            let todo = todo.clone();
            let work = move || todo.iter().for_each(|job| job());
            let thread = thread::Builder::new().name("zcache-disk".to_owned());
            match thread.spawn(work) {
                // Fewer do as well.
                Err(_) if started > 0 => break,
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
        Ok(Workers { jobs })
    }
}

/// What has become of work that nobody waits for any more.
#[derive(Debug, PartialEq, Eq)]
pub enum Left<T> {
    /// It is done.
    Done(T),
    /// It is done, and was collected with other work.
    Collected,
    /// It goes on; see [`Desk::wait`].
    Pending,
}

/// Where work is handed in and its results are collected.
#[derive(Debug)]
pub struct Desk<T> {
    shared: Arc<Shared<T>>,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    /// Both ends are here: to ring where nobody can hear it would be a signal.
    bell: UnixStream,
    rope: UnixStream,
}

#[derive(Debug)]
struct State<T> {
    next: u64,
    pending: HashSet<u64, RandomState>,
    done: Vec<(u64, T)>,
    /// Work whose caller is gone, and its result once there is one.
    left: HashMap<u64, Option<T>, RandomState>,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        // Nothing in here panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, number: u64, result: T) {
        let mut state = self.state();
        state.pending.remove(&number);
        if let Some(place) = state.left.get_mut(&number) {
            *place = Some(result);
            drop(state);
            self.changed.notify_all();
            return;
        }
        state.done.push((number, result));
        drop(state);
        // Where it is full it has rung often enough.
        let _ = (&self.rope).write(&[0]);
    }
}

impl<T: Send + 'static> Desk<T> {
    /// A desk without work.
    ///
    /// # Errors
    ///
    /// Where the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let (rope, bell) = UnixStream::pair()?;
        rope.set_nonblocking(true)?;
        bell.set_nonblocking(true)?;
        let state = State {
            next: 0,
            pending: HashSet::default(),
            done: Vec::new(),
            left: HashMap::default(),
        };
        let shared = Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            bell,
            rope,
        };
        Ok(Desk {
            shared: Arc::new(shared),
        })
    }

    /// Readable when there is something to collect.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.shared.bell.as_raw_fd()
    }

    /// Hands work in; the number is that of its result.
    pub fn submit(&self, workers: &Workers, work: impl FnOnce() -> T + Send + 'static) -> u64 {
        let mut state = self.shared.state();
        let number = state.next;
        state.next += 1;
        state.pending.insert(number);
        drop(state);
        let shared = Arc::clone(&self.shared);
        let job: Job = Box::new(move || shared.put(number, work()));
        if let Err(refused) = workers.jobs.send(job) {
            // Without threads, which end with the process only.
            refused.into_inner()();
        }
        number
    }

    /// Takes what is done, but for what was left. Never waits.
    pub fn collect(&self) -> Vec<(u64, T)> {
        let mut bytes = [0; 64];
        loop {
            match (&self.shared.bell).read(&mut bytes) {
                Ok(count) if count == bytes.len() => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        let mut state = self.shared.state();
        std::mem::take(&mut state.done)
    }

    /// Says that nobody waits for a result any more; it is not collected with others from now on.
    pub fn leave(&self, number: u64) -> Left<T> {
        let mut state = self.shared.state();
        if state.pending.contains(&number) {
            state.left.insert(number, None);
            return Left::Pending;
        }
        match state.done.iter().position(|(n, _)| *n == number) {
            Some(at) => Left::Done(state.done.swap_remove(at).1),
            None => Left::Collected,
        }
    }

    /// Waits for the result of any work that was left, and takes it; `None` where none is left.
    pub fn wait(&self) -> Option<(u64, T)> {
        let mut state = self.shared.state();
        while !state.left.is_empty() {
            let mut left = state.left.iter();
            if let Some(number) = left.find_map(|(n, result)| result.as_ref().map(|_| *n)) {
                return state.left.remove(&number)?.map(|result| (number, result));
            }
            let woken = self.shared.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        None
    }
}
