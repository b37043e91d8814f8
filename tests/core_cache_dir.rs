//! A cache directory and the space on its volume.

use zcache::disk;

use crate::place::Place;

#[test]
fn space_of_a_volume_is_known() {
    let place = Place::new("space");
    let disk::Space {
        free, total: all, ..
    } = disk::space(&place.0).unwrap();
    assert!(free <= all && all > 0);
    assert!(disk::space(&place.at("nowhere")).is_err());
}
