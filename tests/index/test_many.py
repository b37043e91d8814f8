"""Room for many values, and their commits, in one call."""

from __future__ import annotations

from zcache._core import Index, Reservation


def led(index: Index, names: list[str]) -> list[int]:
    return [ticket or 0 for ticket in index.lead_all(names, object())]


def keep(index: Index, names: list[str], size: int = 1) -> None:
    held, victims = index.reserve_all(names, size, led(index, names), 0.0)
    assert victims == []
    assert index.commit_all([one for one in held if one is not None], 0.0) == ([], [])


def test_reserve_all_of_more_than_one_step_takes_holds_each() -> None:
    index = Index(flat_namespace=True)
    names = [f"v/{n}" for n in range(3000)]
    keep(index, names)
    assert index.current_size == 3000
    assert index.in_flight == (0, 0)
    assert index.lookup_all(names) == list(range(3000))
    index.validate()


def test_reserve_all_evicts_the_least_recently_used_and_never_exceeds_the_bound() -> None:
    index = Index(max_size=8, flat_namespace=True)
    keep(index, [f"old/{n}" for n in range(8)])
    names = [f"new/{n}" for n in range(3)]
    held, victims = index.reserve_all(names, 1, led(index, names), 0.0)
    assert [name for _, name in victims] == ["old/0", "old/1", "old/2"]
    assert index.current_size == 8
    held, victims = index.advance_all(held, [cell for cell, _ in victims], [], 0.0)
    assert victims == []
    assert index.current_size == 8
    assert index.commit_all([one for one in held if one is not None], 0.0) == ([], [])
    assert index.lookup_all([*names, "old/0", "old/3"]) == [0, 1, 2, 4]
    index.validate()


def test_advance_all_asks_for_others_where_deletes_have_failed() -> None:
    index = Index(max_size=4, flat_namespace=True)
    keep(index, [f"old/{n}" for n in range(4)])
    names = ["new/0", "new/1"]
    held, victims = index.reserve_all(names, 1, led(index, names), 0.0)
    (kept, _), (gone, _) = victims
    held, victims = index.advance_all(held, [gone], [kept], 0.0)
    # One of them takes the room that there is.
    assert len(victims) == 1
    assert victims[0][1] == "old/2"
    held, victims = index.advance_all(held, [victims[0][0]], [], 0.0)
    assert victims == []
    assert index.commit_all([one for one in held if one is not None], 0.0) == ([], [])
    assert index.lookup_all([*names, "old/3"]) == [0, 1, 2]
    index.validate()


def test_reserve_all_holds_nothing_for_what_is_too_large_or_void_or_has_no_name() -> None:
    index = Index(max_size=2, flat_namespace=True)
    names = ["a", "b", "c", "d"]
    tickets = led(index, names)
    index.invalidate("a")
    held, victims = index.reserve_all([*names, "../e"], 1, [*tickets, 0], 0.0)
    assert victims == []
    assert [one is not None for one in held] == [False, True, True, False, False]
    assert index.reserve_all(["b"], 3, tickets[1:2], 0.0) == ([None], [])
    del held
    # What was dropped is given back.
    assert index.reserve_all([], 1, [], 0.0) == ([], [])
    assert index.current_size == 2
    index.confirm_deletes([cell for cell, _ in index.failed_deletes(8)], [])
    assert index.current_size == 0
    index.validate()


def test_commit_all_says_what_was_overtaken_and_what_is_not_known() -> None:
    index = Index(flat_namespace=True)
    names = ["a", "b", "c"]
    held: list[Reservation | None]
    held, _ = index.reserve_all(names, 1, led(index, names), 0.0)
    reservations = [one for one in held if one is not None]
    index.confirm_deletes([cell for cell, _ in index.release(reservations[2])], [])
    index.invalidate("b")
    unknown, victims = index.commit_all(reservations, 0.0)
    assert unknown == [2]
    assert [name for _, name in victims] == ["b"]
    index.confirm_deletes([cell for cell, _ in victims], [])
    assert index.lookup_all(names) == [0]
    assert index.current_size == 1
    index.complete_flight("c", 3)
    index.validate()


def test_begin_decodes_has_no_version_of_a_key_that_is_being_changed() -> None:
    index = Index()
    keys = ["a", "b", *(f"v/{n}" for n in range(2000)), "\udcff"]
    index.begin_write("b")
    stamps = index.begin_decodes(keys, 5.0, [None] * len(keys))
    assert [at for at, stamp in enumerate(stamps) if stamp is None] == [1, len(keys) - 1]
    assert index.is_current("a", *stamps[0] or (0, 0), 6.0, False, 6.0)
    index.invalidate("a")
    assert not index.is_current("a", *stamps[0] or (0, 0), 6.0, False, 6.0)
    assert index.is_current("v/7", *stamps[9] or (0, 0), 6.0, False, 6.0)
