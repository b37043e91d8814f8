//! The desk: every result is handed out once, to whoever is to have it, and the bell says when.

#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zcache::offload::{Desk, Left, Workers};

/// Whether the bell rings within so many milliseconds.
fn rings<T: Send + 'static>(desk: &Desk<T>, millis: i64) -> bool {
    // The desk outlives the call.
    #[allow(unsafe_code)]
    let fd = unsafe { BorrowedFd::borrow_raw(desk.fd()) };
    let timeout = Timespec {
        tv_sec: millis / 1000,
        tv_nsec: millis % 1000 * 1_000_000,
    };
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&timeout),
    )
    .unwrap()
        > 0
}

/// Work that goes on until it is told to end, and then returns this.
fn held(desk: &Desk<u64>, workers: &Workers, result: u64) -> (u64, Sender<()>) {
    let (end, wait) = channel();
    let number = desk.submit(workers, move || {
        wait.recv().unwrap();
        result
    });
    (number, end)
}

#[test]
fn every_result_is_collected_once() {
    let workers = Workers::new(3).unwrap();
    let desk = Desk::new().unwrap();
    let wanted: BTreeMap<u64, u64> = (0..1000)
        .map(|n| (desk.submit(&workers, move || n * n), n * n))
        .collect();
    let mut got = BTreeMap::new();
    while got.len() < wanted.len() {
        assert!(rings(&desk, 10_000), "{} of {}", got.len(), wanted.len());
        for (number, result) in desk.collect() {
            assert_eq!(got.insert(number, result), None);
        }
    }
    assert_eq!(got, wanted);
    // The bell of the last one may ring only after it was collected with others.
    while rings(&desk, 50) {
        assert!(desk.collect().is_empty());
    }
}

#[test]
fn the_bell_rings_again_after_each_collection() {
    let workers = Workers::new(1).unwrap();
    let desk = Desk::new().unwrap();
    for n in 0..100 {
        let number = desk.submit(&workers, move || n);
        assert!(rings(&desk, 10_000));
        assert_eq!(desk.collect(), [(number, n)]);
        assert!(!rings(&desk, 0), "a bell that nobody has rung");
    }
}

#[test]
fn what_is_left_is_for_whoever_waits_for_it() {
    let workers = Workers::new(2).unwrap();
    let desk = Arc::new(Desk::new().unwrap());
    let (left, end) = held(&desk, &workers, 7);
    assert_eq!(desk.leave(left), Left::Pending);
    let waiter = {
        let desk = Arc::clone(&desk);
        std::thread::spawn(move || desk.wait())
    };
    let other = desk.submit(&workers, || 8);
    assert!(rings(&desk, 10_000));
    assert_eq!(desk.collect(), [(other, 8)]);
    end.send(()).unwrap();
    assert_eq!(waiter.join().unwrap(), Some((left, 7)));
    assert!(!rings(&desk, 50));
    assert!(desk.collect().is_empty());
    assert_eq!(desk.wait(), None);
}

#[test]
fn what_is_left_comes_as_it_ends() {
    let workers = Workers::new(2).unwrap();
    let desk = Arc::new(Desk::new().unwrap());
    let (stuck, end) = held(&desk, &workers, 1);
    let (quick, end_quick) = held(&desk, &workers, 2);
    for number in [stuck, quick] {
        assert_eq!(desk.leave(number), Left::Pending);
    }
    end_quick.send(()).unwrap();
    assert_eq!(desk.wait(), Some((quick, 2)));
    end.send(()).unwrap();
    assert_eq!(desk.wait(), Some((stuck, 1)));
    assert_eq!(desk.wait(), None);
}

#[test]
fn what_is_done_is_had_at_once_and_what_is_collected_never_again() {
    let workers = Workers::new(1).unwrap();
    let desk = Desk::new().unwrap();
    let (first, second) = (desk.submit(&workers, || 1), desk.submit(&workers, || 2));
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut left = desk.leave(second);
    if left == Left::Pending {
        left = Left::Done(desk.wait().unwrap().1);
    }
    assert_eq!(left, Left::Done(2));
    let mut collected = desk.collect();
    while collected.is_empty() && Instant::now() < deadline {
        collected = desk.collect();
    }
    assert_eq!(collected, [(first, 1)]);
    assert_eq!(desk.leave(first), Left::Collected);
}

#[test]
fn work_goes_on_in_as_many_threads_as_there_are() {
    let workers = Workers::new(4).unwrap();
    let desk = Desk::new().unwrap();
    // Ends only if all four run at once.
    let barrier = Arc::new(Barrier::new(4));
    for _ in 0..4 {
        let barrier = Arc::clone(&barrier);
        desk.submit(&workers, move || u64::from(barrier.wait().is_leader()));
    }
    let mut got = Vec::new();
    while got.len() < 4 {
        assert!(rings(&desk, 10_000));
        got.extend(desk.collect());
    }
    assert_eq!(got.iter().map(|(_, leader)| leader).sum::<u64>(), 1);
}

#[test]
fn work_ends_though_nobody_is_left_to_collect_it() {
    let workers = Workers::new(1).unwrap();
    let desk = Desk::new().unwrap();
    let (done, wait) = channel();
    desk.submit(&workers, move || done.send(()).unwrap());
    drop(desk);
    drop(workers);
    wait.recv_timeout(Duration::from_secs(10)).unwrap();
}
