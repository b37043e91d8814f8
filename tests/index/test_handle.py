"""The index of now: who calls it directly, and what is kept to by it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from concurrent.futures import Future

import pytest
from zarr.storage import MemoryStore

from interrupting import Interrupter
from zcache import CachePool, CacheStore, IndexLockTimeout
from zcache._core import CorruptIndexError, Index
from zcache._index import shared_wait
from zcache._index.handle import IndexHandle, ignore
from zcache._runtime.io import IO

HANGS = 30.0
"""Seconds after which something hangs."""


class Watcher:
    """Notes whether another index could be put in the place of one that it is being told of."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self.is_told_alone: list[bool] = []

    def use_index(self, _: Index) -> None:
        thread = threading.Thread(target=self._look)
        thread.start()
        thread.join()

    def _look(self) -> None:
        is_free = self._lock.acquire(blocking=False)
        self.is_told_alone.append(not is_free)
        if is_free:
            self._lock.release()


@pytest.mark.parametrize("kind", ["memory", "pool"])
def test_watcher_is_told_of_no_index_that_another_replaces_meanwhile(kind: str) -> None:
    pool = CachePool(max_size="1MB")
    cache = pool if kind == "pool" else MemoryStore()
    store = CacheStore(MemoryStore(), cache_store=cache, source_id="s", max_size=1000)
    handle: IndexHandle = store._cache.shared.handle
    whole = pool._pool.handle if kind == "pool" else handle
    watcher = Watcher(whole.lock)
    handle.watch(watcher)
    whole.index = whole.empty_index()
    assert watcher.is_told_alone == [True, True]


def test_limits_that_change_while_they_are_handed_over_are_in_force() -> None:
    told: list[int | None] = []

    class Slow:
        """An index; while it is told of its first limits another thread changes them."""

        def set_limits(self, max_size: int | None, *_: object) -> None:
            if not told:
                handle.change_limits({"max_size": 5})
                told.append(5)
            told.append(max_size)

    store = CacheStore(MemoryStore(), cache_store=MemoryStore(), source_id="s", max_size=1000)
    handle: IndexHandle = store._cache.shared.handle
    handle.take = lambda step, _: step(Slow())  # type: ignore[method-assign]
    handle.apply_limits()
    assert told == [5, 1000, 5]


def test_what_waits_for_an_index_to_open_and_fails_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = CacheStore(MemoryStore(), cache_store=MemoryStore(), source_id="s", max_size=1000)
    handle: IndexHandle = store._cache.shared.handle
    told: list[object] = []
    go = threading.Event()

    def fail(_: object) -> None:
        raise ValueError("it cannot be told")

    opening = handle.open_later(lambda _: go.wait(), time.monotonic())
    assert opening is not None
    handle.when_open(fail)
    handle.when_open(told.append)
    go.set()
    assert opening.wait(60)
    assert told == [handle]
    assert "it cannot be told" in caplog.text


def test_an_index_that_was_waited_for_in_vain_is_not_waited_for_again() -> None:
    store = CacheStore(MemoryStore(), cache_store=MemoryStore(), source_id="s", max_size=1000)
    handle: IndexHandle = store._cache.shared.handle
    go = threading.Event()
    # As when a constructor has waited for as long as any step may.
    opening = handle.open_later(lambda _: go.wait(), time.monotonic() - 10 * HANGS)
    assert opening is not None
    outcome: list[Exception] = []

    def take_step() -> None:
        try:
            handle.call_blocking(lambda _: None, timeout=10 * HANGS)
        except IndexLockTimeout as error:
            outcome.append(error)

    thread = threading.Thread(target=take_step, daemon=True)
    thread.start()
    thread.join(HANGS)
    assert outcome
    go.set()
    assert opening.wait(HANGS)


@pytest.mark.parametrize("way", ["call", "call_shielded", "call_later", "call_blocking"])
async def test_step_that_has_found_damage_is_taken_in_the_index_that_replaces_it(way: str) -> None:
    store = CacheStore(MemoryStore(), cache_store=MemoryStore(), source_id="s", max_size=1000)
    handle: IndexHandle = store._cache.shared.handle
    damaged, sound = handle.index, handle.empty_index()
    told: list[Index] = []

    def recover(_: Exception) -> None:
        handle.index = sound

    def step(index: Index) -> Index:
        told.append(index)
        if index is damaged:
            raise CorruptIndexError("a test")
        return index

    handle.recover = recover
    if way == "call":
        assert await handle.call(IO(MemoryStore()), step) is sound
    elif way == "call_shielded":
        assert await handle.call_shielded(IO(MemoryStore()), ignore, step) is sound
    elif way == "call_later":
        taken: Future[Index] = Future()
        handle.call_later(taken.set_result, step)
        assert await asyncio.to_thread(taken.result, HANGS) is sound
    else:
        assert await asyncio.to_thread(handle.call_blocking, step) is sound
    # Once, but for the look without waiting that a shielded one begins with.
    assert told[-1] is sound
    assert told.count(sound) == 1
    assert handle.usable


def interrupted_at(number: int, *, damaged: bool) -> bool:
    """Interrupt a step that has to mend or to open its index, and take it once more; whether it came to that."""
    limits = {"max_size": 1000}
    handle = IndexHandle(Index(**limits), "x", limits)
    is_damaged = damaged

    def step(_: Index) -> int:
        if is_damaged:
            raise CorruptIndexError("a test")
        return 1

    def recover(_: Exception) -> None:
        nonlocal is_damaged
        is_damaged = False

    handle.recover = recover
    if not damaged:
        handle._be_unopened(lambda _: None)
    done = Interrupter(number).run(lambda: handle.call_blocking(step, timeout=HANGS))
    assert handle.call_blocking(step, timeout=HANGS) == 1
    return done


# Of what is interrupted between the making of a coroutine and its first step.
@pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damaged", [True, False])
def test_index_is_usable_after_a_caller_that_is_interrupted_anywhere(
    monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Who had claimed its recovery, or its opening, may be gone before a thread has it."""
    monkeypatch.setattr(shared_wait, "_LOST", 0)
    steps = itertools.takewhile(
        lambda number: interrupted_at(number, damaged=damaged), itertools.count()
    )
    assert len(list(steps)) > 50
