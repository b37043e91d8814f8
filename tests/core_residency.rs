//! Reads of what is in memory: on file systems that tell, only of what is there, and what it should be.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // A test may panic.

use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use zcache::disk::residency::{read_resident, tells_residency};

/// A directory of this test's on tmpfs; `None` where there is no such file system.
fn directory(name: &str) -> Option<PathBuf> {
    let shared = File::open("/dev/shm").ok()?;
    if !tells_residency(&shared) {
        eprintln!("skipped: /dev/shm does not tell what is in memory");
        return None;
    }
    let path = PathBuf::from(format!("/dev/shm/zcache-{name}-{}", std::process::id()));
    fs::create_dir(&path).unwrap();
    Some(path)
}

/// What was read into memory that was filled before.
#[allow(unsafe_code)]
fn read_into(into: &[MaybeUninit<u8>]) -> Vec<u8> {
    // SAFETY: All of it was.
    into.iter()
        .map(|byte| unsafe { byte.assume_init() })
        .collect()
}

#[test]
fn read_resident_pages_in_memory_are_read_and_others_are_not() {
    let Some(root) = directory("pages") else {
        return;
    };
    let (path, page) = (root.join("value"), rustix::param::page_size());
    // Its first page was never written.
    let total = 3 * page as u64;
    let file = File::create(&path).unwrap();
    file.set_len(total).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![7; 2 * page], page as u64).unwrap();
    let read = |start: usize, size: usize| {
        let mut into = vec![MaybeUninit::new(0); size];
        let waited = read_resident(&path, &mut into, total, start as u64).unwrap();
        waited.map(|_| read_into(&into))
    };
    assert_eq!(read(page, 2 * page), Some(vec![7; 2 * page]));
    assert_eq!(read(page + 100, 1), Some(vec![7]));
    assert_eq!(read(2 * page - 1, 2), Some(vec![7, 7]));
    assert_eq!(read(0, 1), None);
    assert_eq!(read(page - 1, 2), None);
    assert_eq!(read(2 * page, page + 1), None);
    fs::remove_dir_all(root).unwrap();
}

#[test]
fn read_resident_what_is_no_such_file_is_not_read() {
    let Some(root) = directory("kinds") else {
        return;
    };
    let path = root.join("value");
    fs::write(&path, [7; 100]).unwrap();
    let mut into = [MaybeUninit::new(0); 10];
    assert!(read_resident(&path, &mut into, 100, 0).unwrap().is_some());
    for other in [99, 101] {
        assert!(read_resident(&path, &mut into, other, 0).unwrap().is_none());
    }
    assert!(read_resident(&root.join("none"), &mut into, 100, 0).is_err());
    symlink(&path, root.join("link")).unwrap();
    assert!(read_resident(&root.join("link"), &mut into, 100, 0).is_err());
    assert!(read_resident(&root, &mut into, 100, 0).is_err());
    fs::remove_dir_all(root).unwrap();
}

#[test]
fn tells_residency_is_not_believed_of_devices() {
    assert!(!tells_residency(File::open("/proc/self/status").unwrap()));
}
