//! Plans alone: positions, next uses, and the entry that is needed last.

use zcache::policy::{Course, Distance, MAX_PLANNED, NEVER, Plan};

fn plan(keys: impl IntoIterator<Item = usize>) -> Plan {
    let mut plan = Plan::default();
    for key in keys {
        assert!(plan.push(&key.to_string()));
    }
    plan.finish();
    plan
}

fn read(plan: &mut Plan, key: usize) -> Course {
    let course = plan.read(&key.to_string(), None);
    assert!(plan.is_sound());
    course
}

/// The entry that is needed last of all classes, and when.
fn farthest(plan: &Plan) -> Option<(Distance, u32)> {
    let last = plan
        .classes(true)
        .filter_map(|class| plan.last_of(class, (NEVER, NEVER)));
    last.map(|((_, entry), reads)| (reads, entry)).max()
}

#[test]
fn plan_that_is_read_in_its_order_gives_the_next_use_of_each_key() {
    let mut plan = plan((0..100).chain((0..100).rev()));
    assert_eq!(plan.next_use("0"), 0);
    assert_eq!(read(&mut plan, 0), Course::Followed);
    assert_eq!([plan.next_use("0"), plan.next_use("x")], [199, NEVER]);
    for key in (1..100).chain((1..100).rev()) {
        assert_eq!(read(&mut plan, key), Course::Followed);
    }
    assert_eq!(read(&mut plan, 0), Course::Done);
}

#[test]
fn plan_keeps_the_farthest_entry_last() {
    let mut plan = plan([1, 2, 3, 1, 2]);
    for (entry, key) in [(10, "1"), (11, "1"), (20, "2"), (30, "3"), (40, "4")] {
        assert_eq!(plan.enter(entry, key, 1), key != "4");
    }
    assert_eq!(farthest(&plan), Some((2, 30)));
    read(&mut plan, 1);
    assert_eq!(farthest(&plan), Some((2, 11)));
    plan.leave(11);
    assert_eq!(farthest(&plan), Some((2, 10)));
    read(&mut plan, 2);
    // What has no next use is not needed before the end.
    read(&mut plan, 3);
    assert_eq!(farthest(&plan), Some((2, 30)));
    assert_eq!(
        ["1", "3", "4"].map(|key| plan.need(key)),
        [Some(0), Some(2), None]
    );
    assert_eq!(plan.entries(), 3);
}

#[test]
fn what_is_over_is_needed_as_late_as_its_last_use_lies_back() {
    let mut plan = plan(0..6);
    for key in 0..5 {
        plan.enter(key, &key.to_string(), 1);
        read(&mut plan, key as usize);
    }
    assert_eq!(plan.need("0"), Some(5));
    assert_eq!(plan.need("4"), Some(1));
    assert_eq!(farthest(&plan), Some((5, 0)));
}

#[test]
fn key_that_is_read_after_its_last_use_is_one_of_no_plan() {
    let mut plan = plan([1, 2, 3, 4, 5]);
    plan.enter(10, "1", 1);
    plan.enter(11, "1", 1);
    for key in 1..5 {
        read(&mut plan, key);
    }
    assert_eq!(plan.need("1"), Some(4));
    read(&mut plan, 1);
    assert_eq!([plan.need("1"), plan.need("2")], [None, Some(3)]);
    assert_eq!(plan.entries(), 0);
}

#[test]
fn plan_of_which_reads_are_left_out_is_followed() {
    let mut plan = plan(0..1000);
    for key in (0..1000).step_by(8) {
        assert_eq!(read(&mut plan, key), Course::Followed);
    }
    // The window has left these behind.
    assert_eq!(plan.next_use("1"), NEVER);
}

#[test]
fn plan_whose_reads_overtake_each_other_is_followed() {
    let mut plan = plan((0..10).flat_map(|_| 0..1000));
    for start in (0..10_000).step_by(16) {
        for key in (start..start + 16).rev() {
            assert_ne!(read(&mut plan, key % 1000), Course::Wrong);
        }
    }
    assert_eq!(plan.position(), 10_000);
}

#[test]
fn plan_with_repeated_reads_of_a_key_waits() {
    let mut plan = plan((0..2).flat_map(|_| 0..100));
    for key in 0..100 {
        for _ in 0..5 {
            assert_eq!(read(&mut plan, key), Course::Followed);
        }
        assert_eq!(plan.next_use(&key.to_string()), 100 + key as u32);
    }
}

#[test]
fn plan_of_other_keys_or_another_order_is_wrong() {
    let mut other = plan(0..100);
    let courses: Vec<_> = (100..200).map(|key| read(&mut other, key)).collect();
    assert_eq!(courses.iter().position(|c| *c == Course::Wrong), Some(32));
    let mut reverse = plan((0..10).flat_map(|_| 0..100));
    let mut keys = (0..10).flat_map(|_| (0..100).rev());
    assert!(keys.any(|key| read(&mut reverse, key) == Course::Wrong));
}

#[test]
fn plan_within_a_folder_leaves_other_keys_alone() {
    let mut plan = plan(0..100).within("a/");
    for key in 0..100 {
        assert_eq!(
            plan.read(&format!("b/{key}"), Some((key, 1))),
            Course::Followed
        );
    }
    assert_eq!(
        [plan.entries(), plan.next_use("b/5") as usize],
        [0, NEVER as usize]
    );
    assert_eq!(plan.read("a/0", Some((1, 1))), Course::Followed);
    assert!(plan.enter(2, "a/5", 1) && !plan.enter(3, "5", 1));
    // What has no more uses is needed at its end.
    assert_eq!(farthest(&plan), Some((99, 1)));
    let elsewhere = (100..200).map(|key| plan.read(&format!("a/{key}"), None));
    assert!(elsewhere.into_iter().any(|course| course == Course::Wrong));
}

#[test]
fn plan_tells_what_is_needed_last_of_each_class_of_room() {
    let mut plan = plan([1, 2, 3, 4, 1, 2, 3, 4]);
    for (entry, key, room) in [(10, "1", 0), (20, "2", 4), (21, "2", 1 << 40), (30, "3", 7)] {
        assert!(plan.enter(entry, key, room));
        assert!(plan.is_sound());
    }
    let order = |plan: &Plan, class| {
        let mut before = (NEVER, NEVER);
        let mut order = Vec::new();
        while let Some((last, reads)) = plan.last_of(class, before) {
            order.push((last.1, reads));
            before = last;
        }
        order
    };
    let all = |plan: &Plan| -> Vec<_> {
        let all = plan.classes(true).map(|class| order(plan, class));
        all.filter(|order| !order.is_empty()).collect()
    };
    let [nothing, few, most] = [vec![(10, 0)], vec![(30, 2), (20, 1)], vec![(21, 1)]];
    assert_eq!(all(&plan), [nothing, few.clone(), most.clone()]);
    assert_eq!(
        plan.classes(false)
            .filter_map(|c| order(&plan, c).first().copied())
            .collect::<Vec<_>>(),
        [few[0], most[0]]
    );
    // An entry that has another size now, and reads that move all entries of a key.
    plan.enter(30, "3", 1 << 41);
    read(&mut plan, 1);
    read(&mut plan, 2);
    assert_eq!(
        all(&plan),
        [vec![(10, 2)], vec![(20, 3)], vec![(21, 3), (30, 0)]]
    );
    plan.leave(21);
    read(&mut plan, 3);
    assert_eq!(all(&plan), [vec![(10, 1)], vec![(20, 2)], vec![(30, 3)]]);
}

#[test]
fn plan_takes_so_many_keys() {
    let mut plan = plan(0..MAX_PLANNED);
    assert!(!plan.push("x"));
    assert_eq!(plan.len(), MAX_PLANNED);
    assert!(plan.memory() < 50 * MAX_PLANNED, "{}", plan.memory());
}
