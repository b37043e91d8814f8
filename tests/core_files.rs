//! Files of values: published whole, never over somebody else's, and removed only if they are ours.

#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use zcache::files::{self, PENDING, SIGNATURE};

const FETCHED: i64 = 1_700_000_000_123_000_000;

/// A directory of its own, removed at the end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let place =
            std::env::temp_dir().join(format!("zcache-files-{}-{name}", std::process::id()));
        fs::create_dir_all(&place).unwrap();
        Place(place)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn modified(path: &Path) -> i64 {
    let time = fs::symlink_metadata(path).unwrap().modified().unwrap();
    i64::try_from(time.duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

#[test]
fn a_value_goes_its_way() {
    let place = Place::new("way");
    let (unfinished, path) = (place.at("1"), place.at("a/b/c"));
    let made = files::create(&unfinished, b"123456789", FETCHED + PENDING).unwrap();
    // The check value of CRC-32C.
    assert_eq!(made.checksum, 0xE306_9283);
    assert_eq!(modified(&unfinished), FETCHED + PENDING);
    files::publish(&unfinished, &path).unwrap();
    assert!(!unfinished.exists());
    assert_eq!(fs::read(&path).unwrap(), b"123456789");
    if let Some(noted) = files::noted(&path) {
        assert_eq!(noted, (9, made.checksum));
    }
    files::seal(&place.0, Path::new("a/b/c"), &made).unwrap();
    assert_eq!(modified(&path), FETCHED + SIGNATURE);
    assert!(files::remove(&path).unwrap());
    assert!(!path.exists());
    assert!(files::remove(&path).unwrap(), "it is gone");
}

#[test]
fn all_of_it_in_one_call() {
    let place = Place::new("whole");
    let (unfinished, path) = (place.at("1"), place.at("a/b"));
    let made = files::write(&unfinished, &path, b"123456789", FETCHED + PENDING).unwrap();
    assert_eq!(made.checksum, 0xE306_9283);
    assert_eq!(modified(&path), FETCHED + PENDING);
    assert_eq!(fs::read(&path).unwrap(), b"123456789");
    // Nothing is left of what has failed, and nothing changes what is there.
    assert!(files::write(&unfinished, &path, b"other", FETCHED + PENDING).is_err());
    assert!(files::write(&place.at("no/1"), &path, b"other", FETCHED).is_err());
    assert!(!unfinished.exists());
    assert_eq!(fs::read(&path).unwrap(), b"123456789");
}

#[test]
fn only_what_was_made_is_sealed() {
    let place = Place::new("pending");
    let name = Path::new("1");
    let made = files::create(&place.at("1"), b"", FETCHED + PENDING).unwrap();
    // It was evicted, and the same value was fetched again.
    fs::rename(place.at("1"), place.at("kept")).unwrap();
    files::create(&place.at("1"), b"", FETCHED + PENDING).unwrap();
    files::seal(&place.0, name, &made).unwrap();
    assert_eq!(modified(&place.at("1")), FETCHED + PENDING);
    assert!(files::remove(&place.at("1")).unwrap());
    assert!(files::seal(&place.0, name, &made).is_err(), "it is gone");
    symlink(place.at("kept"), place.at("1")).unwrap();
    assert!(files::seal(&place.0, name, &made).is_err(), "a link");
    assert_eq!(modified(&place.at("kept")), FETCHED + PENDING);
    assert!(files::remove_made(&place.0, name, &made).is_ok());
    assert!(place.at("1").is_symlink(), "not the one that was made");
    files::seal(&place.0, Path::new("kept"), &made).unwrap();
    assert_eq!(modified(&place.at("kept")), FETCHED + SIGNATURE);
    // Valid now: nobody takes it for unfinished.
    files::remove_made(&place.0, Path::new("kept"), &made).unwrap();
    assert!(!files::remove_pending(&place.at("kept")).unwrap());
    assert!(place.at("kept").exists());
    let made = files::create(&place.at("2"), b"", FETCHED + PENDING).unwrap();
    files::remove_made(&place.0, Path::new("2"), &made).unwrap();
    assert!(!place.at("2").exists());
    files::create(&place.at("2"), b"", FETCHED + PENDING).unwrap();
    assert!(files::remove_pending(&place.at("2")).unwrap());
    assert!(files::remove_pending(&place.at("2")).unwrap(), "it is gone");
}

#[test]
fn a_name_that_is_taken_stays_as_it_is() {
    let place = Place::new("taken");
    fs::write(place.at("theirs"), "theirs").unwrap();
    fs::write(place.at("file"), "a file").unwrap();
    files::create(&place.at("1"), b"ours", FETCHED + PENDING).unwrap();
    assert!(files::create(&place.at("1"), b"", FETCHED).is_err());
    assert!(files::publish(&place.at("1"), &place.at("theirs")).is_err());
    assert!(files::publish(&place.at("1"), &place.at("file/below")).is_err());
    assert_eq!(fs::read(place.at("theirs")).unwrap(), b"theirs");
    assert_eq!(fs::read(place.at("1")).unwrap(), b"ours", "still there");
}

#[test]
fn what_is_not_ours_is_not_removed() {
    let place = Place::new("foreign");
    let theirs = place.at("theirs");
    fs::write(&theirs, "theirs").unwrap();
    let file = fs::File::options().write(true).open(&theirs).unwrap();
    for mark in [0, SIGNATURE - 1, PENDING + 1] {
        let time = u64::try_from(FETCHED + mark).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_nanos(time))
            .unwrap();
        assert!(!files::remove(&theirs).unwrap());
    }
    // A directory and a link to a file of ours are none of ours.
    assert!(!files::remove(&place.0).unwrap());
    files::create(&place.at("1"), b"ours", FETCHED + SIGNATURE).unwrap();
    symlink(place.at("1"), place.at("link")).unwrap();
    assert!(!files::remove(&place.at("link")).unwrap());
    assert!(place.at("1").exists() && theirs.exists());
}

#[test]
fn a_volume_has_space() {
    let place = Place::new("space");
    let (free, all) = files::space(&place.0).unwrap();
    assert!(free <= all && all > 0);
    assert!(files::space(&place.at("nowhere")).is_err());
}
