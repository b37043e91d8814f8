"""What is not in use is kept for a while, within bounds, and goes in time."""

from __future__ import annotations

import gc
import math
import multiprocessing
import weakref
from typing import Any

import pytest

from support import until
from zcache._runtime import lingering
from zcache._runtime.lingering import OVERHEAD, lease, release


class Thing:
    """What somebody uses."""

    size = 1


def use(key: str, *, size: int = 1, limit: float = 10) -> tuple[Any, weakref.ref[Thing]]:
    """A lease of a new thing."""
    thing = Thing()
    thing.size = size
    held = lease(key, thing, lambda: {key: size}, limit)
    return held, weakref.ref(thing)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    gc.collect()
    release()
    yield
    release()


def test_thing_outlives_its_last_user_and_the_next_one_has_it() -> None:
    held, thing = use("a")
    again = lease("a", thing(), lambda: {"a": 1}, 10)
    assert again is held
    del held
    assert not lingering._left
    del again
    assert thing() is not None
    held = lease("a", thing(), lambda: {"a": 1}, 10)
    assert not lingering._left
    del held
    release()
    assert thing() is None


def test_things_without_users_take_no_more_than_the_largest_may() -> None:
    sizes = {"a": 4 * OVERHEAD, "b": 4 * OVERHEAD, "c": 6 * OVERHEAD}
    held = {name: use(name, size=size, limit=11 * OVERHEAD) for name, size in sizes.items()}
    things = {name: thing for name, (_, thing) in held.items()}
    for name in "bac":
        del held[name]
    assert [name for name, thing in things.items() if thing() is not None] == ["a", "c"]
    held["large"] = use("large", size=15 * OVERHEAD, limit=20 * OVERHEAD)
    del held["large"]
    assert [name for name, thing in things.items() if thing() is not None] == []


def test_things_that_tell_few_bytes_count_with_what_each_takes_itself() -> None:
    for limit, stay in ((10, 1), (OVERHEAD, 1), (10 * OVERHEAD, 10), (math.inf, 1)):
        held = [use(str(n), limit=limit) for n in range(30)]
        things = [thing for _, thing in held]
        held.clear()
        assert sum(thing() is not None for thing in things) == stay
        release()


def test_bytes_that_things_have_in_common_count_once() -> None:
    things = []
    for name, size in {"a": 5, "b": 7}.items():
        thing = Thing()
        things.append(weakref.ref(thing))
        sizes = {"common": size * OVERHEAD, name: OVERHEAD}
        lease(name, thing, lambda sizes=sizes: sizes, 10 * OVERHEAD)
        del thing
    assert [thing() is not None for thing in things] == [True, True]
    held, last = use("c", size=OVERHEAD)
    del held
    assert [thing() is not None for thing in (*things, last)] == [False, True, True]


def test_things_without_a_bound_take_no_more_than_the_largest_does() -> None:
    held = {name: use(name, size=4, limit=math.inf) for name in "abc"}
    things = [thing for _, thing in held.values()]
    held.clear()
    assert [thing() is not None for thing in things] == [False, False, True]


def test_thing_that_takes_nothing_goes_with_its_user() -> None:
    held, thing = use("a", size=0)
    del held
    assert thing() is None


async def test_thing_goes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering, "LINGER", 0.01)
    # The thread that looks after what another test has left sleeps for a minute.
    monkeypatch.setattr(lingering, "_timer", lingering._nothing)
    for _ in range(3):
        held, thing = use("a")
        del held
        await until(lambda thing=thing: thing() is None)
        await until(lambda: lingering._timer() is None)


def test_user_in_a_cycle_leaves_it_where_the_garbage_collector_ends_it() -> None:
    held, thing = use("a")
    cycle: list[Any] = [held]
    cycle.append(cycle)
    del held, cycle
    assert not lingering._left
    gc.collect()
    assert lingering._left
    assert thing() is not None


def test_forked_child_lets_go_of_what_its_parent_left() -> None:
    held, thing = use("a")
    del held
    assert thing() is not None
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        other, _ = use("b")
        del other
        theirs.send((thing() is None, list(lingering._left)))

    process: Any = context.Process(target=child)
    process.start()
    assert ours.poll(60)
    assert ours.recv() == (True, ["b"])
    process.join(60)
    assert thing() is not None
