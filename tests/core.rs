//! All tests of the core, in one program: thirty of them took most of the time of a build, for each is compiled with its
//! own copies of what is generic, and linked with the core and all dependencies.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

#[path = "core/faulty_storage.rs"]
mod faulty_storage;
#[path = "core/keys.rs"]
mod keys;
#[path = "core/place.rs"]
mod place;
#[path = "core/policies.rs"]
mod policies;
#[path = "core/pool.rs"]
mod pool;
#[path = "core/reference.rs"]
mod reference;
#[path = "core/shared_memory.rs"]
mod shared_memory;

mod core_absent;
mod core_cache_dir;
mod core_damage;
mod core_deaths;
mod core_decoded;
mod core_drain;
mod core_expiry;
mod core_fill;
mod core_flips;
mod core_growth;
mod core_in_flight;
mod core_key;
mod core_lock;
mod core_lookup;
mod core_model;
mod core_plan;
mod core_plan_positions;
mod core_policy;
mod core_ranges;
mod core_refresh;
mod core_removal;
mod core_reserve;
mod core_residency;
mod core_sampling;
mod core_segments;
mod core_segments_batch;
mod core_segments_rebuild;
mod core_shared;
mod core_shuttle;
mod core_simulation;
mod core_strings;
mod core_tree;
mod core_value_file;

#[test]
fn every_file_of_tests_is_a_module_here() {
    let named: Vec<&str> = include_str!("core.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'))
        .filter(|name| name.starts_with("core_"))
        .collect();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let mut found: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("core_"))
        .filter_map(|name| Some(name.strip_suffix(".rs")?.to_owned()))
        .collect();
    found.sort();
    assert_eq!(named, found);
}
