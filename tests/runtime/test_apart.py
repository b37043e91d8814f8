"""What is made once for each key, with no lock that others need."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from forks import run
from support import threads
from zcache._runtime.apart import OneForEach


class Thing:
    """What can be referred to weakly."""


def test_what_is_being_made_holds_up_no_other() -> None:
    each: OneForEach[Thing] = OneForEach()
    is_made = threading.Event()

    def make_slowly() -> Thing:
        # While it is made another thread makes another one, and looks at all.
        assert is_made.wait(60)
        return Thing()

    def make_other() -> Thing:
        other = each.find_or_make("other", Thing)
        assert each.snapshot() == [other]
        is_made.set()
        return other

    with threads(lambda: each.find_or_make("one", make_slowly), make_other) as made:
        pass
    assert sorted(map(id, each.snapshot())) == sorted(map(id, made))


def test_who_asks_for_what_is_being_made_gets_it() -> None:
    each: OneForEach[Thing] = OneForEach()
    ready = threading.Barrier(8)

    def find() -> Thing:
        ready.wait()
        return each.find_or_make("one", Thing)

    with threads(*[find] * 8) as made:
        pass
    assert len(set(map(id, made))) == 1
    assert each.get("one") is made[0]


def test_what_could_not_be_made_is_made_by_the_next() -> None:
    each: OneForEach[Thing] = OneForEach()

    def fail() -> Thing:
        raise OSError("not now")

    with pytest.raises(OSError, match="not now"):
        each.find_or_make("one", fail)
    assert each.get("one") is None
    assert each.get("one") is not each.find_or_make("one", Thing)


def test_who_asks_for_what_its_own_thread_makes_is_not_held_up() -> None:
    """A handler of the log, say, that uses what it is told about."""
    each: OneForEach[Thing] = OneForEach()
    inner: list[Thing] = []

    def make() -> Thing:
        inner.append(each.find_or_make("one", Thing))
        return Thing()

    made: list[Thing] = []
    thread = threading.Thread(
        target=lambda: made.append(each.find_or_make("one", make)), daemon=True
    )
    thread.start()
    thread.join(60)
    assert len(made) == len(inner) == 1
    assert each.get("one") is made[0]


def test_what_is_not_in_use_is_forgotten_with_its_lock() -> None:
    each: OneForEach[Thing] = OneForEach()
    made = each.find_or_make("one", Thing)
    assert each.find_or_make("one", Thing) is made
    del made
    gc.collect()
    assert each.get("one") is None
    assert each.snapshot() == []
    assert not each._making


class Ending:
    """One that asks for others as it ends; it is part of a cycle."""

    def __init__(self, each: OneForEach[Thing]) -> None:
        self.each, self.itself = each, self

    def __del__(self) -> None:
        self.each.snapshot()


class Key:
    """One that takes so long to compare that the garbage collector comes in between."""

    def __hash__(self) -> int:
        gc.collect()
        return 1


def test_what_ends_while_one_is_found_may_ask_for_others() -> None:
    each: OneForEach[Thing] = OneForEach()
    found: list[Thing] = []

    def find() -> None:
        Ending(each)
        found.append(each.find_or_make(Key(), Thing))

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert each.snapshot() == found != []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_waits_for_nothing_that_its_parent_makes() -> None:
    each: OneForEach[Thing] = OneForEach()
    is_begun, go = threading.Event(), threading.Event()

    def make() -> Thing:
        is_begun.set()
        assert go.wait(60)
        return Thing()

    def child() -> None:
        with threads(lambda: each.find_or_make("one", Thing)):
            pass

    with threads(lambda: each.find_or_make("one", make)) as made:
        assert is_begun.wait(60)
        # As a thread that finds one has it, for a moment.
        with each._lock:
            code = run(child)
        go.set()
    assert code == 0
    assert each.get("one") is made[0]
