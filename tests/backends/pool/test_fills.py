"""Fills of a pool: all of its sources share one queue, its threads, its bound and its circuit breaker."""

from __future__ import annotations

import errno
import gc
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from forks import fork, wait
from pools import source_of
from support import drained, drained_sync, read, said, value_sync
from zcache import CachePool, CacheStore
from zcache._backends.directory.filler import DirectoryFiller
from zcache._protocol.fill import MAX_PENDING_SIZE
from zcache.testing import check_invariants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zcache._backends.base import FillJob
    from zcache._protocol.fill import FillQueue

VALUE = bytes(60)


def opened(pool: CachePool, name: str, **options: Any) -> CacheStore:
    return CacheStore(source_of(k=VALUE), cache_store=pool, source_id=name, **options)


def queue_of(store: CacheStore) -> FillQueue:
    queue: FillQueue = store._cache.shared.fills
    return queue


def threads_of_fills() -> int:
    """Threads of this process that fill directories; those of others may end."""
    tasks = Path("/proc/self/task").glob("*/comm")
    return [task.read_text().strip() for task in tasks].count("zcache-fill")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[FillJob]:
    """Values that were handed over; none is written, and no one waits for that."""
    jobs: list[FillJob] = []

    async def wait(*_: object) -> bool:
        return False

    monkeypatch.setattr(DirectoryFiller, "submit", lambda _self, _io, job: jobs.append(job))
    monkeypatch.setattr(DirectoryFiller, "is_idle", property(lambda _: not jobs))
    monkeypatch.setattr(DirectoryFiller, "wait", wait)
    return jobs


async def test_many_sources_are_filled_by_the_threads_of_one(tmp_path: Path) -> None:
    """Each had two of its own, so a thousand sources took two thousand."""
    pool = CachePool(tmp_path)
    stores = [opened(pool, f"source {number}") for number in range(20)]
    before = threads_of_fills()
    for store in stores:
        assert await read(store, "k") == VALUE
    for store in stores:
        await drained(store)
    # They stay for some seconds.
    assert threads_of_fills() - before <= 2
    for store in stores:
        assert store.is_cached("k")
        check_invariants(store)
    assert pool.cache_info()["entries"] == len(stores)


@pytest.mark.usefixtures("held")
async def test_pending_values_of_all_sources_have_one_bound(tmp_path: Path) -> None:
    pool = CachePool(tmp_path)
    stores = [opened(pool, name, max_pending_size=2 * len(VALUE)) for name in "abc"]
    for store in stores:
        assert await read(store, "k") == VALUE
    assert queue_of(stores[0]).pending_size == 2 * len(VALUE)
    assert stores[2].cache_stats()["cache_failures"] == 1


def test_bound_of_pending_values_is_the_least_of_all_sources_that_are_in_use(
    tmp_path: Path,
) -> None:
    pool = CachePool(tmp_path)
    lax = opened(pool, "lax", max_pending_size=100)
    strict = opened(pool, "strict", max_pending_size=10)
    assert queue_of(lax).max_pending_size == 10
    del strict
    gc.collect()
    assert queue_of(lax).max_pending_size == 100


def test_bound_of_pending_values_is_the_default_beside_a_store_that_asks_for_more(
    tmp_path: Path,
) -> None:
    pool = CachePool(tmp_path)
    stores = [
        opened(pool, "greedy", max_pending_size=2 * MAX_PENDING_SIZE),
        opened(pool, "greedy"),
        opened(pool, "modest"),
    ]
    queue = queue_of(stores[0])
    assert queue.max_pending_size == MAX_PENDING_SIZE
    del stores[2]
    gc.collect()
    assert queue.max_pending_size == MAX_PENDING_SIZE
    del stores[1]
    gc.collect()
    assert queue.max_pending_size == 2 * MAX_PENDING_SIZE


@pytest.fixture
def handing_over(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[CacheStore], Callable[[], None]]]:
    """Has a store be read in a thread, which stops where it hands the value over, until the test ends or says so."""
    submit, here, goes_on = DirectoryFiller.submit, threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def submit_late(self: DirectoryFiller, io: Any, job: FillJob) -> None:
        if threading.current_thread() in threads:
            here.set()
            goes_on.wait()
        submit(self, io, job)

    def begin(store: CacheStore) -> Callable[[], None]:
        threads.append(threading.Thread(target=value_sync, args=(store, "k")))
        threads[-1].start()
        here.wait()
        return end

    def end() -> None:
        goes_on.set()
        for thread in threads:
            thread.join()

    monkeypatch.setattr(DirectoryFiller, "submit", submit_late)
    yield begin
    end()


def test_drain_waits_for_a_value_that_is_handed_over_while_another_one_drains(
    tmp_path: Path, handing_over: Callable[[CacheStore], Callable[[], None]]
) -> None:
    """The other one, or one that closed, took it for lost: nothing was under way."""
    pool = CachePool(tmp_path)
    slow, other = opened(pool, "slow"), opened(pool, "other")
    end = handing_over(slow)
    assert value_sync(other, "k") == VALUE
    assert other.drain_sync()
    assert [job.key for job in queue_of(slow).pending()] == ["k"]
    assert not slow.drain_sync(timeout=0)
    end()
    assert slow.drain_sync()
    assert slow.is_cached("k")


def test_value_that_is_being_handed_over_keeps_its_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    handing_over: Callable[[CacheStore], Callable[[], None]],
) -> None:
    async def wait(*_: object) -> bool:
        return False

    monkeypatch.setattr(DirectoryFiller, "wait", wait)
    pool = CachePool(tmp_path)
    slow, other = (opened(pool, name, max_pending_size=len(VALUE)) for name in ("slow", "other"))
    handing_over(slow)
    assert value_sync(other, "k") == VALUE
    assert queue_of(slow).pending_size == len(VALUE)
    assert other.cache_stats()["cache_failures"] == 1


async def test_drain_waits_for_a_value_with_an_interrupted_reader_beside_those_of_others(
    tmp_path: Path, held: list[FillJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = CachePool(tmp_path)
    cut_off, other = opened(pool, "cut off"), opened(pool, "other")
    submit = DirectoryFiller.submit

    def interrupted(self: DirectoryFiller, io: Any, job: FillJob) -> None:
        submit(self, io, job)
        if job.backend is cut_off._cache.backend:
            raise KeyboardInterrupt

    monkeypatch.setattr(DirectoryFiller, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        value_sync(cut_off, "k")
    assert await read(other, "k") == VALUE
    assert not await cut_off.drain(timeout=0)
    held.clear()
    assert await cut_off.drain()
    assert queue_of(cut_off).pending() == []


async def test_drain_waits_for_the_values_of_its_own_source(
    tmp_path: Path, held: list[FillJob]
) -> None:
    pool = CachePool(tmp_path)
    slow, other = opened(pool, "slow"), opened(pool, "other")
    assert await read(slow, "k") == VALUE
    assert [job.key for job in held] == ["k"]
    assert not await slow.drain(timeout=0)
    assert await other.drain(timeout=0)


async def test_failure_is_logged_once_for_all_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def submit(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(DirectoryFiller, "submit", submit)
    pool = CachePool(tmp_path)
    stores = [opened(pool, name) for name in "abc"]
    for store in stores:
        assert await read(store, "k") == VALUE
    assert ["broken" in message for message in said(caplog)] == [True]
    assert [store.cache_stats()["cache_failures"] for store in stores] == [3, 3, 3]


async def test_clock_of_a_store_counts_no_pauses_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They went by that of the first one, also when that had gone, whatever it did."""

    def submit(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    is_broken = False

    def clock() -> float:
        if is_broken:
            raise ArithmeticError("no time")
        return time.time()

    pool = CachePool(tmp_path)
    first, other = opened(pool, "first", clock=clock), opened(pool, "other")
    monkeypatch.setattr(DirectoryFiller, "submit", submit)
    is_broken = True
    assert await read(other, "k") == VALUE
    assert first.cache_stats()["cache_failures"] == 1


async def test_value_that_cannot_be_held_keeps_out_no_other_one_under_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = CachePool(tmp_path)
    one, other = opened(pool, "one"), opened(pool, "other")
    submit = DirectoryFiller.submit

    def submit_other(self: DirectoryFiller, io: Any, job: FillJob) -> None:
        if job.backend is one._cache.backend:
            raise OSError(errno.ENAMETOOLONG, "too long")
        submit(self, io, job)

    monkeypatch.setattr(DirectoryFiller, "submit", submit_other)
    for store in (one, other):
        assert await read(store, "k") == VALUE
        await drained(store)
    assert (one.is_cached("k"), other.is_cached("k")) == (False, True)


def test_child_that_was_forked_while_a_thread_had_the_queue_fills(tmp_path: Path) -> None:
    """Also where no store was open then: the queue is the pool's."""
    pool = CachePool(tmp_path)
    store = opened(pool, "gone")
    assert value_sync(store, "k") == VALUE
    drained_sync(store)
    lock, has_it, ends = queue_of(store)._lock, threading.Event(), threading.Event()
    del store
    gc.collect()

    def hold() -> None:
        with lock:
            has_it.set()
            ends.wait()

    def child() -> None:
        store = opened(pool, "new")
        assert value_sync(store, "k") == VALUE
        assert store.drain_sync(5)
        assert store.is_cached("k")

    thread = threading.Thread(target=hold)
    thread.start()
    has_it.wait()
    number = fork(child)
    ends.set()
    thread.join()
    assert wait([number]) == [0]
