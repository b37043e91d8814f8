//! Files of values: published whole, never over another's file.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::UNIX_EPOCH;

use zcache::disk::folders;
use zcache::disk::ownership::{self, PENDING, SIGNATURE};
use zcache::disk::removal;
use zcache::disk::value_file::{self, WriteError, WrittenFile};

use crate::place::Place;

const SOURCE: ownership::SourceDigest = *b"a source";
const FETCHED: i64 = 1_700_000_000_123_000_000;

fn modified(path: &Path) -> i64 {
    let time = fs::symlink_metadata(path).unwrap().modified().unwrap();
    i64::try_from(time.duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

#[test]
fn value_file_published_and_sealed_is_valid() {
    let place = Place::new("way");
    let (unfinished, path) = (place.at("1"), place.at("a/b/c"));
    let made = value_file::create(&unfinished, b"123456789", FETCHED + PENDING, SOURCE).unwrap();
    // The check value of CRC-32C.
    assert_eq!(made.checksum, 0xE306_9283);
    assert_eq!(modified(&unfinished), FETCHED + PENDING);
    value_file::publish(&place.0, &unfinished, Path::new("a/b/c")).unwrap();
    assert!(!unfinished.exists());
    assert_eq!(fs::read(&path).unwrap(), b"123456789");
    assert_eq!(fs::metadata(&path).unwrap().nlink(), 1);
    if let Some(noted) = ownership::recorded(&path) {
        assert_eq!(noted, (9, made.checksum));
    }
    value_file::seal(&place.0, Path::new("a/b/c"), &made).unwrap();
    assert_eq!(modified(&path), FETCHED + SIGNATURE);
    assert!(removal::remove(&path).unwrap());
    assert!(!path.exists());
    assert!(removal::remove(&path).unwrap(), "it is gone");
}

fn write(place: &Place, name: &str, data: &[u8]) -> Result<WrittenFile, WriteError> {
    let (name, unfinished) = (Path::new(name), place.at("tmp/1"));
    let written =
        value_file::write_value(&place.0, name, &unfinished, data, FETCHED + PENDING, SOURCE);
    assert!(!unfinished.exists());
    written
}

#[test]
fn write_value_missing_folders_makes_them() {
    let place = Place::new("whole");
    let made = write(&place, "a/b", b"123456789").unwrap();
    assert_eq!(made.checksum, 0xE306_9283);
    assert_eq!(modified(&place.at("a/b")), FETCHED + PENDING);
    assert_eq!(fs::read(place.at("a/b")).unwrap(), b"123456789");
    fs::remove_dir(place.at("tmp")).unwrap();
    write(&place, "a/c", b"").unwrap();
    // A directory that is no cache any more is not made anew.
    let (name, deeper) = (Path::new("d"), place.at("no/tmp/1"));
    assert!(value_file::write_value(&place.0, name, &deeper, b"", FETCHED, SOURCE).is_err());
    assert!(!place.at("no").exists());
}

#[test]
fn write_value_taken_name_replaces_pending_only() {
    let place = Place::new("taken-value");
    write(&place, "a", b"first").unwrap();
    let made = write(&place, "a", b"second").unwrap();
    assert_eq!(fs::read(place.at("a")).unwrap(), b"second");
    value_file::seal(&place.0, Path::new("a"), &made).unwrap();
    let unknown = write(&place, "a", b"third");
    assert!(matches!(unknown, Err(WriteError::Unlisted)), "{unknown:?}");
    fs::write(place.at("theirs"), "theirs").unwrap();
    let refused = write(&place, "theirs", b"ours");
    assert!(
        matches!(&refused, Err(WriteError::Io(error)) if error.kind() == ErrorKind::AlreadyExists),
        "{refused:?}"
    );
    assert_eq!(fs::read(place.at("a")).unwrap(), b"second");
    assert_eq!(fs::read(place.at("theirs")).unwrap(), b"theirs");
}

#[test]
fn write_value_link_outside_is_refused() {
    let (place, elsewhere) = (Place::new("inside"), Place::new("outside"));
    symlink(&elsewhere.0, place.at("link")).unwrap();
    let refused = write(&place, "link/a", b"ours");
    assert!(matches!(refused, Err(WriteError::Io(_))), "{refused:?}");
    assert!(!elsewhere.at("a").exists());
}

#[test]
fn seal_other_file_of_the_name_is_left_alone() {
    let place = Place::new("pending");
    let name = Path::new("1");
    let made = value_file::create(&place.at("1"), b"", FETCHED + PENDING, SOURCE).unwrap();
    // It was evicted, and the same value was fetched again.
    fs::rename(place.at("1"), place.at("kept")).unwrap();
    value_file::create(&place.at("1"), b"", FETCHED + PENDING, SOURCE).unwrap();
    value_file::seal(&place.0, name, &made).unwrap();
    assert_eq!(modified(&place.at("1")), FETCHED + PENDING);
    assert!(removal::remove(&place.at("1")).unwrap());
    assert!(
        value_file::seal(&place.0, name, &made).is_err(),
        "it is gone"
    );
    symlink(place.at("kept"), place.at("1")).unwrap();
    assert!(value_file::seal(&place.0, name, &made).is_err(), "a link");
    assert_eq!(modified(&place.at("kept")), FETCHED + PENDING);
    assert!(value_file::remove_made(&place.0, name, &made).is_ok());
    assert!(place.at("1").is_symlink(), "not the one that was made");
    value_file::seal(&place.0, Path::new("kept"), &made).unwrap();
    assert_eq!(modified(&place.at("kept")), FETCHED + SIGNATURE);
    // Valid now: it is no longer taken for unfinished.
    value_file::remove_made(&place.0, Path::new("kept"), &made).unwrap();
    assert!(!removal::remove_pending(&place.at("kept")).unwrap());
    assert!(place.at("kept").exists());
    let made = value_file::create(&place.at("2"), b"", FETCHED + PENDING, SOURCE).unwrap();
    value_file::remove_made(&place.0, Path::new("2"), &made).unwrap();
    assert!(!place.at("2").exists());
    value_file::create(&place.at("2"), b"", FETCHED + PENDING, SOURCE).unwrap();
    assert!(removal::remove_pending(&place.at("2")).unwrap());
    assert!(
        removal::remove_pending(&place.at("2")).unwrap(),
        "it is gone"
    );
}

#[test]
fn publish_taken_name_is_left_alone() {
    let place = Place::new("taken");
    fs::write(place.at("theirs"), "theirs").unwrap();
    fs::write(place.at("file"), "a file").unwrap();
    value_file::create(&place.at("1"), b"ours", FETCHED + PENDING, SOURCE).unwrap();
    assert!(value_file::create(&place.at("1"), b"", FETCHED, SOURCE).is_err());
    assert!(value_file::publish(&place.0, &place.at("1"), Path::new("theirs")).is_err());
    assert!(value_file::publish(&place.0, &place.at("1"), Path::new("file/below")).is_err());
    assert_eq!(fs::read(place.at("theirs")).unwrap(), b"theirs");
    assert_eq!(fs::read(place.at("1")).unwrap(), b"ours", "still there");
}

/// Bytes of the blocks of all folders of a directory.
fn folder_bytes(folder: &Path) -> i64 {
    let below = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let below = below.filter(|entry| entry.file_type().unwrap().is_dir());
    let below: i64 = below.map(|entry| folder_bytes(&entry.path())).sum();
    below + i64::try_from(fs::metadata(folder).unwrap().blocks()).unwrap() * 512
}

#[test]
fn write_value_that_fails_removes_the_folders_that_it_made_and_no_others() {
    let place = Place::new("failed-write");
    fs::create_dir_all(place.at("tmp")).unwrap();
    fs::create_dir_all(place.at("theirs/empty")).unwrap();
    folders::take_folders();
    let before = folder_bytes(&place.0);
    let too_long = "x".repeat(300);
    for name in [
        format!("theirs/empty/{too_long}"),
        format!("theirs/empty/new/{too_long}"),
        format!("theirs/new/{too_long}/k"),
        format!("new/{too_long}"),
    ] {
        write(&place, &name, b"data").unwrap_err();
        removal::remove_below(&place.0, Path::new(&name)).unwrap();
        assert!(place.at("theirs/empty").exists(), "{name}");
        assert!(!place.at("theirs/empty/new").exists(), "{name}");
        assert!(!place.at("theirs/new").exists(), "{name}");
        assert!(!place.at("new").exists(), "{name}");
        let grown = folder_bytes(&place.0) - before;
        assert_eq!(folders::take_folders(), grown, "{name}");
        assert_eq!(grown, 0, "{name}");
    }
}

#[test]
fn remove_below_of_no_value_leaves_the_empty_folders_of_others() {
    let place = Place::new("nothing-to-remove");
    fs::create_dir_all(place.at("theirs")).unwrap();
    folders::take_folders();
    for name in ["theirs/k", "theirs/no/k"] {
        removal::remove_below(&place.0, Path::new(name)).unwrap();
        assert!(removal::remove_key(&place.0, name).is_empty());
        assert!(place.at("theirs").exists(), "{name}");
    }
    assert_eq!(folders::take_folders(), 0);
}

#[test]
fn write_value_folder_that_others_remove_meanwhile_is_counted() {
    const WRITES: usize = 20_000;
    let place = Place::new("made-and-removed");
    fs::create_dir(place.at("tmp")).unwrap();
    let (before, is_done) = (folder_bytes(&place.0), AtomicBool::new(false));
    let grown: i64 = thread::scope(|scope| {
        let remover = scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                removal::remove_value(&place.0, Path::new("a/b/c")).unwrap();
            }
            folders::take_folders()
        });
        for _ in 0..WRITES {
            // It may stop short: the folder goes again each time.
            let _ = write(&place, "a/b/c", b"");
        }
        is_done.store(true, Ordering::Relaxed);
        remover.join().unwrap() + folders::take_folders()
    });
    assert_eq!(folder_bytes(&place.0), before + grown);
}
