//! Values are removed only if zcache wrote them.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, UNIX_EPOCH};

use zcache::disk::ownership::{PENDING, SIGNATURE};
use zcache::disk::{removal, value_file};

use crate::place::Place;

const FETCHED: i64 = 1_700_000_000_123_000_000;

#[test]
fn remove_file_of_others_is_left_alone() {
    let place = Place::new("foreign");
    let theirs = place.at("theirs");
    fs::write(&theirs, "theirs").unwrap();
    let file = fs::File::options().write(true).open(&theirs).unwrap();
    for signature in [0, SIGNATURE - 1, PENDING + 1] {
        let time = u64::try_from(FETCHED + signature).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_nanos(time))
            .unwrap();
        assert!(!removal::remove(&theirs).unwrap());
    }
    // A directory and a link to a file of ours are none of ours.
    assert!(!removal::remove(&place.0).unwrap());
    value_file::create(&place.at("1"), b"ours", FETCHED + SIGNATURE, [0; 8]).unwrap();
    symlink(place.at("1"), place.at("link")).unwrap();
    assert!(!removal::remove(&place.at("link")).unwrap());
    assert!(place.at("1").exists() && theirs.exists());
}

#[test]
fn remove_key_takes_its_ranges_wherever_it_lies() {
    for key in ["a", "b/a", "b/c/a"] {
        let place = Place::new("ranges");
        let other = format!(".zcache/ranges/{key}b@1-2");
        for name in [&format!(".zcache/ranges/{key}@1-2"), &other] {
            let path = place.at(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            value_file::create(&path, b"1", FETCHED + SIGNATURE, [0; 8]).unwrap();
        }
        assert!(removal::remove_key(&place.0, key).is_empty());
        assert!(!place.at(&format!(".zcache/ranges/{key}@1-2")).exists());
        assert!(place.at(&other).exists());
    }
}

#[test]
fn write_tombstone_name_is_its_digest() {
    let place = Place::new("tombstone");
    removal::write_tombstone(&place.0, "a/c/0").unwrap();
    removal::write_tombstone(&place.0, "a/c/0").unwrap();
    // The first 128 bits of SHA-256, as `sha256sum` gives it.
    let expected = place.at(".zcache/dropped/f3dcb708e290f0ccf64b51ce43d598d5");
    assert!(expected.exists());
}
