//! The fast path of a hit: it answers the usual hit, leaves all others to the lookup, and has the
//! same effects.

use zcache::arena::Heap;
use zcache::cache::{Cache, Joined, Limits, Reserve, Verify};
use zcache::key::ByteRange;

const CHUNK: &str = "era5/t2m/c/120/44/7";

type Index = Cache<Heap, ()>;

fn index(verify: Verify, flat_namespace: bool) -> Index {
    let limits = Limits {
        flat_namespace,
        verify,
        ..Limits::bounded(1000)
    };
    Cache::new(Heap::default(), limits, 7).unwrap()
}

/// Begins a fill, and returns the number to commit it with.
fn begin(index: &mut Index, key: &str, size: u64, now: u64) -> u64 {
    let Joined::Lead(ticket) = index.join(key, ByteRange::Full, (), now, false).unwrap() else {
        panic!("{key} is there or on its way");
    };
    match index
        .reserve(key, ByteRange::Full, size, ticket, now)
        .unwrap()
    {
        Reserve::Granted(id) => id,
        answer => panic!("{answer:?}"),
    }
}

fn fill(index: &mut Index, key: &str, size: u64, now: u64) {
    let id = begin(index, key, size, now);
    index.commit(id, Some(9), now).unwrap().unwrap();
}

/// The answers of the fast path and of the lookup.
fn both(index: &mut Index, key: &str, now: u64) -> (Option<u64>, Option<u64>) {
    let short = index.hit(key, now).flatten();
    let long = index.lookup(key, ByteRange::Full, now).unwrap();
    (short, long.map(|found| found.size))
}

#[test]
fn hit_chunk_keys_of_every_convention_agree_with_lookup() {
    let mut index = index(Verify::Never, true);
    let chunks = [
        CHUNK,
        "z/c/0/1",
        "c/0",
        "c/0/1/2",
        "a/0.1.2",
        "0/0/3/12/7",
        "0.0",
        "7",
        "ü/c/1",
        "a/c/1234567890123456",
    ];
    for (size, key) in chunks.iter().enumerate() {
        fill(&mut index, key, size as u64, 1);
        // The lookup caches its directory.
        index.lookup(key, ByteRange::Full, 1).unwrap();
        assert_eq!(
            both(&mut index, key, 1),
            (Some(size as u64), Some(size as u64)),
            "{key}"
        );
    }
    for key in [
        "zarr.json",
        "a/zarr.json",
        "a/c/12345678901234567",
        "a/deadbeef00",
    ] {
        fill(&mut index, key, 5, 1);
        assert_eq!(both(&mut index, key, 1), (None, Some(5)), "{key}");
    }
    for key in ["", "/", "c/", "era5/t2m/c/", "era5/t2m/c/120/44/8", "z/c/0"] {
        assert_eq!(both(&mut index, key, 1), (None, None), "{key}");
    }
}

#[test]
fn hit_moves_entry_to_end() {
    let mut index = index(Verify::Never, true);
    for key in ["a/c/0", "a/c/1", "a/c/2"] {
        fill(&mut index, key, 1, 1);
    }
    assert_eq!(index.hit("a/c/0", 1), Some(Some(1)));
    assert_eq!(index.hit("a/c/9", 1), Some(None));
    assert_eq!(index.hit("b/c/9", 1), None);
    let order: Vec<_> = index
        .recency()
        .unwrap()
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    assert_eq!(order, ["a/c/1", "a/c/2", "a/c/0"]);
    index.validate().unwrap();
}

#[test]
fn hit_stale_or_unfinished_entry_is_left_to_lookup() {
    let age = Some(100);
    let mut index = index(Verify::Never, true);
    fill(&mut index, "era5/t2m/c/0", 1, 1);
    let id = begin(&mut index, CHUNK, 3, 1);
    assert_eq!(index.hit(CHUNK, (1, age)), None);
    index.commit(id, Some(9), 1).unwrap().unwrap();
    assert_eq!(index.hit(CHUNK, (1, age)), Some(Some(3)));
    assert_eq!(index.hit(CHUNK, (100, age)), Some(Some(3)));
    assert_eq!(index.hit(CHUNK, (101, age)), None);
    assert_eq!(index.begin_write(CHUNK).unwrap().len(), 1);
    assert_eq!(index.hit(CHUNK, (1, age)), None);
}

#[test]
fn hit_entry_to_verify_is_left_to_lookup() {
    for (verify, flat_namespace, checksum, expected) in [
        (Verify::Never, true, None, Some(Some(3))),
        (Verify::Never, false, Some(9), Some(Some(3))),
        // Found in a directory after a power failure, say.
        (Verify::Never, false, None, None),
        (Verify::First, true, Some(9), None),
        (Verify::Always, true, Some(9), None),
    ] {
        let mut index = index(verify, flat_namespace);
        let id = begin(&mut index, CHUNK, 3, 1);
        index.commit(id, checksum, 1).unwrap().unwrap();
        assert_eq!(
            index.hit(CHUNK, 1),
            expected,
            "{verify:?} {flat_namespace} {checksum:?}"
        );
        let found = index.lookup(CHUNK, ByteRange::Full, 1).unwrap().unwrap();
        assert_eq!(index.must_verify(found.handle), expected.is_none());
        index.verified(found.handle, 9);
        let checked = (verify != Verify::Always).then_some(Some(3));
        assert_eq!(
            index.hit(CHUNK, 1),
            checked,
            "{verify:?} {flat_namespace} {checksum:?}"
        );
    }
}
