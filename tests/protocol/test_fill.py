"""The queue of pending fills: what readers have, and the cache store does not have yet."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest, Store
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import forks
from doubles import SyncDictStore, WatchedStore
from pools import pool_with_neighbours
from support import (
    PROTOTYPE,
    RANGES,
    buf,
    check_quiet,
    check_quiet_sync,
    count_turns,
    quiet,
    read,
    read_through,
    said,
    sizes_of,
    threads,
    until,
    value_sync,
)
from zcache import CachePool, CacheStore, UsageError
from zcache._backends.base import Ended
from zcache._backends.directory.filler import DirectoryFiller
from zcache._protocol.fill import FillQueue
from zcache.testing import (
    FakeClock,
    StoreDouble,
    check_index,
    check_invariants_async,
    in_flight,
    stored_sizes,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from zarr.core.buffer import Buffer

    from zcache._backends.base import FillJob

VALUE = bytes(range(100))
HANGS = 30.0
"""Seconds after which something is said to hang: far more than any time limit of zcache."""
MOST_FILLS = 20
"""More fills than are carried out at the same time."""


@pytest.fixture
def source() -> StoreDouble:
    """A source that counts what reaches it."""
    keys = ["k", *(f"k{number}" for number in range(MOST_FILLS))]
    return StoreDouble(MemoryStore({key: buf(VALUE) for key in keys}))


@pytest.fixture
def cache() -> StoreDouble:
    """A cache store that a test holds up; it ends nothing before the test does."""
    return StoreDouble(MemoryStore())


@pytest.fixture
def store(source: StoreDouble, cache: StoreDouble) -> CacheStore:
    return CacheStore(source, cache_store=cache)


@pytest.fixture(autouse=True)
def _release(cache: StoreDouble) -> Any:
    yield
    cache.heal()


PENDING: dict[str, Callable[[Path], Store | CachePool]] = {
    "directory": LocalStore,
    "pool": pool_with_neighbours,
    "store": lambda _: SyncDictStore(),
}
"""Cache stores of which fills are pending, by name; they get a folder."""
KINDS = {"memory": lambda _: MemoryStore(), **PENDING}


# ------------------------------------------------------------------- the reader returns


async def test_get_while_the_cache_store_writes_returns_the_value(
    store: CacheStore, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    assert await read(store, "k") == VALUE
    await gate.entered_async()
    assert stored_sizes(store) == {}
    assert not await store.drain(timeout=0)
    gate.release()
    assert await store.drain()
    assert stored_sizes(store) == {"k": len(VALUE)}
    await check_quiet(store)


def test_get_sync_while_the_cache_store_writes_returns_the_value(
    store: CacheStore, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    assert value_sync(store) == VALUE
    gate.wait_entered()
    assert stored_sizes(store) == {}
    assert not store.drain_sync(timeout=0)
    gate.release()
    assert store.drain_sync()
    assert stored_sizes(store) == {"k": len(VALUE)}
    check_quiet_sync(store)


async def test_set_while_the_cache_store_writes_returns(
    store: CacheStore, source: StoreDouble, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    await store.set("k", buf(b"new"))
    assert await read(store, "k") == b"new"
    assert source.calls["get"] == 0
    gate.release()
    await check_quiet(store)
    assert stored_sizes(store) == {"k": 3}


async def test_get_ranges_while_the_cache_store_writes_returns_the_ranges(
    store: CacheStore, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    asked = [RangeByteRequest(0, 10), RangeByteRequest(50, 60)]
    groups = [g async for g in store.get_ranges("k", asked, prototype=PROTOTYPE)]
    found = {number: value.to_bytes() for group in groups for number, value in group if value}
    assert found == {0: VALUE[:10], 1: VALUE[50:60]}
    gate.release()
    await check_quiet(store)
    assert len(stored_sizes(store)) == 2


# ---------------------------------------------------------------- pending values are hits


async def test_get_of_a_pending_value_asks_the_source_no_more(
    store: CacheStore, source: StoreDouble, cache: StoreDouble
) -> None:
    cache.block("set")
    assert await read(store, "k") == VALUE
    assert source.take() == {"get": 1}
    assert await read(store, "k") == VALUE
    assert await read(store, "k", RangeByteRequest(5, 9)) == VALUE[5:9]
    assert await asyncio.to_thread(value_sync, store) == VALUE
    assert await asyncio.to_thread(asyncio.run, read(store, "k")) == VALUE
    assert value_sync(store) == VALUE
    many = await store.get_partial_values(PROTOTYPE, [("k", None), ("k", RangeByteRequest(1, 2))])
    assert [value and value.to_bytes() for value in many] == [VALUE, VALUE[1:2]]
    assert source.take() == {}
    assert cache.calls["get"] == 0
    stats = store.cache_stats()
    assert (stats["misses"], stats["hits"]) == (1, 7)


async def test_pending_value_from_the_future_is_not_served(cache: StoreDouble) -> None:
    """A clock was set back: how old it is is not known."""
    seconds = 1000.0
    source = StoreDouble(MemoryStore({"k": buf(VALUE)}))
    store = CacheStore(source, cache_store=cache, max_age_seconds=10, clock=lambda: seconds)
    cache.block("set")
    assert await read(store, "k") == VALUE
    assert await read(store, "k") == VALUE
    assert source.take() == {"get": 1}
    seconds = 900.0
    assert await read(store, "k") == VALUE
    assert source.take() == {"get": 1}


@pytest.mark.parametrize("first", ["task", "thread"])
def test_followers_of_a_read_have_its_value_before_the_cache_store(
    store: CacheStore, source: StoreDouble, cache: StoreDouble, first: str
) -> None:
    cache.block("set")
    gate = source.block("get")

    async def run() -> None:
        leader = asyncio.ensure_future(
            read(store, "k") if first == "task" else asyncio.to_thread(value_sync, store)
        )
        await gate.entered_async()
        followers = [
            asyncio.to_thread(value_sync, store),
            asyncio.to_thread(asyncio.run, read(store, "k", RangeByteRequest(5, 9))),
            read(store, "k"),
        ]
        tasks = [asyncio.ensure_future(one) for one in followers]
        await asyncio.sleep(0.01)
        gate.release()
        assert await leader == VALUE
        assert await asyncio.gather(*tasks) == [VALUE, VALUE[5:9], VALUE]
        assert source.calls["get"] == 1
        assert not await store.drain(timeout=0)
        cache.heal()
        await check_quiet(store)

    asyncio.run(run())


async def test_a_reader_that_changes_its_buffer_leaves_the_pending_value_as_it_was(
    store: CacheStore, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    value = await store.get("k", PROTOTYPE)
    assert value is not None
    array = value.as_numpy_array()
    if array.flags.writeable:
        array[:] = 0
    assert await read(store, "k") == VALUE
    gate.release()
    await check_quiet(store)
    assert await read(store, "k") == VALUE


# ------------------------------------------------------------------------ invalidation

CHANGES: dict[str, Callable[[CacheStore], Any]] = {
    "set": lambda store: store.set("k19", buf(b"new")),
    "delete": lambda store: store.delete("k19"),
    "delete_dir": lambda store: store.delete_dir(""),
    "clear": lambda store: store.clear(),
    "clear_cache": lambda store: store.clear_cache(),
    "set_if_not_exists": lambda store: store.set_if_not_exists("k19", buf(b"new")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_a_change_voids_a_fill_that_waits_for_its_turn(
    store: CacheStore, source: StoreDouble, cache: StoreDouble, change: Callable[..., Any]
) -> None:
    written: list[bytes] = []
    gate = cache.block("set")
    for number in range(MOST_FILLS):
        assert await read(store, f"k{number}") == VALUE
    await gate.entered_async()
    under_way = {request.key for request in cache.requests if request.operation == "set"}
    assert "k19" not in under_way
    inner: Any = cache.inner
    put = inner.set

    async def noted(key: str, value: Buffer, *rest: Any) -> None:
        if key == "k19":
            written.append(value.to_bytes())
        await put(key, value, *rest)

    inner.set = noted
    source.take()
    await change(store)
    expected = await read(source.inner, "k19")
    assert await read(store, "k19") == expected
    gate.release()
    await check_quiet(store)
    del inner.set
    assert set(written) <= ({expected} if change is not CHANGES["clear_cache"] else {VALUE})
    assert await read(store, "k19") == expected
    await check_quiet(store)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_a_change_voids_a_fill_that_is_being_written(
    store: CacheStore, source: StoreDouble, cache: StoreDouble, change: Callable[..., Any]
) -> None:
    gate = cache.block("set", key="k19")
    assert await read(store, "k19") == VALUE
    await gate.entered_async()
    await change(store)
    expected = await read(source.inner, "k19")
    assert await read(store, "k19") == expected
    gate.release()
    await check_quiet(store)
    # What has been written late is gone again, or was written over.
    assert stored_sizes(store).get("k19") in (None, len(expected or b""))
    for _ in range(2):
        assert await read(store, "k19") == expected
        await check_quiet(store)


@pytest.mark.parametrize("kind", PENDING)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_a_change_right_after_a_read_is_never_undone_by_its_fill(
    tmp_path: Path, kind: str, change: Callable[..., Any]
) -> None:
    source = SyncDictStore()
    store = CacheStore(source, cache_store=PENDING[kind](tmp_path / "cache"), max_size=10**4)
    for number in range(50):
        source.values = {f"k{n}": b"%d" % number * 9 for n in range(MOST_FILLS)}
        await store.clear_cache()
        for key in source.values:
            assert await read(store, key) == source.values[key]
        if number % 2:
            await asyncio.sleep(0)
        await change(store)
        expected = source.values.get("k19")
        assert await read(store, "k19") == expected
        await store.drain()
        assert await read(store, "k19") == expected
    await check_quiet(store)


# --------------------------------------------------------------------- the bound in bytes


async def test_get_with_a_full_queue_waits_while_the_cache_store_makes_progress(
    source: StoreDouble, cache: StoreDouble
) -> None:
    store = CacheStore(source, cache_store=cache, max_pending_size=2 * len(VALUE))
    gate = cache.block("set")
    assert [await read(store, f"k{number}") for number in range(2)] == [VALUE] * 2
    third = asyncio.ensure_future(read(store, "k2"))
    await until(lambda: source.calls["get"] == 3)
    turns: list[None] = []
    watcher = asyncio.ensure_future(count_turns(turns))
    await until(lambda: len(turns) > 100)
    watcher.cancel()
    assert not third.done()
    gate.release()
    assert await third == VALUE
    await check_quiet(store)
    assert len(stored_sizes(store)) == 3


async def test_a_first_pass_through_a_slow_cache_store_loses_nothing(
    source: StoreDouble, cache: StoreDouble
) -> None:
    store = CacheStore(source, cache_store=cache, max_pending_size="250B")
    cache.delay("set", 0.01)
    for number in range(MOST_FILLS):
        assert await read(store, f"k{number}") == VALUE
    await check_quiet(store)
    assert len(stored_sizes(store)) == MOST_FILLS
    assert store.cache_stats()["cache_failures"] == 0


def test_a_first_pass_of_threads_through_a_slow_cache_store_loses_nothing(
    source: StoreDouble, cache: StoreDouble
) -> None:
    store = CacheStore(source, cache_store=cache, max_pending_size="250B")
    cache.delay("set", 0.01)

    def some(first: int) -> list[bytes | None]:
        return [value_sync(store, f"k{number}") for number in range(first, MOST_FILLS, 4)]

    with threads(*(lambda n=n: some(n) for n in range(4))) as found:
        pass
    assert found == [[VALUE] * 5] * 4
    check_quiet_sync(store)
    assert len(stored_sizes(store)) == MOST_FILLS


@pytest.mark.parametrize("size", [0, 10])
async def test_a_value_larger_than_the_queue_is_taken_alone(
    source: StoreDouble, cache: StoreDouble, size: int
) -> None:
    store = CacheStore(source, cache_store=cache, max_pending_size=size)
    for number in range(3):
        assert await read(store, f"k{number}") == VALUE
    await check_quiet(store)
    assert len(stored_sizes(store)) == 3


async def test_a_directory_with_a_small_queue_takes_in_all(
    source: StoreDouble, tmp_path: Path
) -> None:
    cache = LocalStore(tmp_path / "cache")
    store = CacheStore(source, cache_store=cache, max_pending_size=len(VALUE))
    keys = [f"k{number}" for number in range(MOST_FILLS)]
    assert await asyncio.gather(*(read(store, key) for key in keys)) == [VALUE] * MOST_FILLS
    await check_quiet(store)
    assert len(stored_sizes(store)) == MOST_FILLS


# --------------------------------------------------------------- a cache store that hangs


@pytest.mark.parametrize("way", ["async", "sync"])
def test_a_cache_store_that_never_writes_costs_one_reader_a_second_once(
    source: StoreDouble, cache: StoreDouble, clock: FakeClock, way: str
) -> None:
    store = CacheStore(source, cache_store=cache, max_pending_size=len(VALUE), clock=clock)
    cache.hang("set")

    def get(count: int) -> list[bytes | None]:
        if way == "sync":
            return [value_sync(store, f"k{number % MOST_FILLS}") for number in range(count)]

        async def several() -> list[bytes | None]:
            return [await read(store, f"k{number % MOST_FILLS}") for number in range(count)]

        return asyncio.run(several())

    filler = store._cache.shared.fills.filler
    wait, waits = filler.wait, 0

    async def count(*args: Any) -> bool:
        nonlocal waits
        waits += 1
        return await wait(*args)

    filler.wait = count
    # The first is pending; another one waits, and the rest do not.
    assert get(10 * MOST_FILLS) == [VALUE] * 10 * MOST_FILLS
    assert waits == 1
    assert cache.calls["set"] == 1
    assert store.cache_stats()["cache_failures"] == 1
    assert store.cache_stats()["cache_skips"] > 0


async def test_a_cache_store_that_answers_again_is_used_again(
    source: StoreDouble, cache: StoreDouble, clock: FakeClock
) -> None:
    store = CacheStore(source, cache_store=cache, max_pending_size=len(VALUE), clock=clock)
    cache.hang("set")
    for number in range(5):
        assert await read(store, f"k{number}") == VALUE
    assert cache.calls["set"] == 1
    cache.heal()
    await store.drain()
    clock.advance(100)
    for number in range(5):
        assert await read(store, f"k{number}") == VALUE
    await check_quiet(store)
    assert sorted(stored_sizes(store)) == [f"k{number}" for number in range(5)]


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_a_hit_that_the_cache_store_never_answers_is_served_by_the_source(
    store: CacheStore, source: StoreDouble, cache: StoreDouble, way: str
) -> None:
    keys = [f"k{number}" for number in range(MOST_FILLS)]
    for key in keys:
        assert await read(store, key) == VALUE
    await store.drain()
    cache.hang("get")
    source.take()
    for key in keys:
        work = read(store, key) if way == "async" else asyncio.to_thread(value_sync, store, key)
        assert await asyncio.wait_for(work, HANGS) == VALUE
    assert source.take()["get"] == MOST_FILLS
    # The circuit breaker is open: the cache store was asked once.
    assert cache.calls["get"] == 1
    stats = store.cache_stats()
    assert stats["cache_failures"] == 1
    assert stats["cache_skips"] >= MOST_FILLS - 1
    assert stats["total_requests"] == stats["misses"] == 2 * MOST_FILLS


@pytest.mark.parametrize("way", ["async", "sync"])
@pytest.mark.parametrize("change", ["set", "delete"])
async def test_a_change_that_the_cache_store_never_deletes_for_returns(
    store: CacheStore, source: StoreDouble, cache: StoreDouble, way: str, change: str
) -> None:
    assert await read(store, "k") == VALUE
    await store.drain()
    cache.hang("delete")
    for number in range(5):
        if way == "sync":
            args = ("k", buf(b"%d" % number)) if change == "set" else ("k",)
            work = asyncio.to_thread(getattr(store, f"{change}_sync"), *args)
        else:
            work = store.set("k", buf(b"%d" % number)) if change == "set" else store.delete("k")
        await asyncio.wait_for(work, HANGS)
        expected = b"%d" % number if change == "set" else None
        assert await read(store, "k") == expected
    # The value that could not be deleted counts as long as it is there.
    assert store.cache_info()["current_size"] >= len(VALUE)
    cache.heal()
    await quiet(store)
    assert await read(store, "k") == expected
    await check_invariants_async(store)


async def test_a_listing_that_never_ends_holds_nothing_up(
    source: StoreDouble, tmp_path: Path, clock: FakeClock
) -> None:
    cache = StoreDouble(LocalStore(tmp_path / "cache"))
    gates = [cache.hang(operation) for operation in ("list", "list_prefix")]
    store = CacheStore(source, cache_store=cache, source_id="x", clock=clock)
    for number in range(3):
        assert await asyncio.wait_for(read(store, f"k{number}"), HANGS) == VALUE
    assert source.take() == {"get": 3}
    await asyncio.wait_for(store.set("k", buf(b"new")), HANGS)
    assert await asyncio.wait_for(read(store, "k"), HANGS) == b"new"
    assert not await store.drain(timeout=0.01)
    assert sum(gate.entered for gate in gates) > 0
    cache.heal()
    assert await store.drain()
    clock.advance(100)
    assert await read(store, "k") == b"new"
    await check_quiet(store)
    assert stored_sizes(store) == {"k": 3}


@pytest.mark.parametrize("stuck", ["list_prefix", "delete"])
async def test_removal_by_name_that_ends_late_takes_no_listed_value_out_of_the_books(
    source: StoreDouble, tmp_path: Path, clock: FakeClock, stuck: str
) -> None:
    """A write before the listing is done removes by name, and goes on after its time is up."""
    cache = StoreDouble(LocalStore(tmp_path / "cache"))
    listing = cache.hang("list")
    # Not that of the listing, which looks for marks in the same way.
    removal = cache.hang(stuck, key=f"{RANGES}k" if stuck == "list_prefix" else None)
    store = CacheStore(source, cache_store=cache, source_id="x", clock=clock)
    await asyncio.wait_for(store.set("k", buf(b"new")), HANGS)
    assert removal.entered > 0
    listing.release()
    assert await store.drain()
    clock.advance(100)
    assert await read_through(store, "k") == b"new"
    await until(lambda: stored_sizes(store) == {"k": 3})
    cache.heal()
    if stuck == "delete":
        await until(lambda: not (tmp_path / "cache/k").exists())
        await until(lambda: stored_sizes(store) == {})
    else:
        # For ranges, for what lies below, and for two kinds of marks.
        await until(lambda: cache.calls["list_prefix"] == 2 * removal.entered + 2)
        await quiet(store)
        assert (tmp_path / "cache/k").exists()
    await check_quiet(store)
    assert await read_through(store, "k") == b"new"
    await check_quiet(store)


# ---------------------------------------------------------------------------------- drain


async def test_drain_with_a_timeout_returns_false_and_the_fill_goes_on(
    store: CacheStore, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    await read(store, "k")
    assert await store.drain(timeout=0.01) is False
    gate.release()
    assert await store.drain() is True
    assert stored_sizes(store) == {"k": len(VALUE)}


def test_drain_sync_waits_for_what_threads_have_read(store: CacheStore, cache: StoreDouble) -> None:
    gate = cache.block("set")
    assert value_sync(store) == VALUE
    assert store.drain_sync(timeout=0.01) is False
    gate.release()
    assert store.drain_sync() is True
    assert stored_sizes(store) == {"k": len(VALUE)}


async def test_drain_sync_in_the_event_loop_that_fills_raises(
    store: CacheStore, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    await read(store, "k")
    with pytest.raises(UsageError, match=r"await store\.drain\(\)"):
        store.drain_sync()
    # Another thread may wait for it.
    draining = asyncio.ensure_future(asyncio.to_thread(store.drain_sync))
    gate.release()
    assert await draining is True
    assert stored_sizes(store) == {"k": len(VALUE)}


async def test_drain_of_another_event_loop_waits_for_this_one(
    store: CacheStore, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    await read(store, "k")
    draining = asyncio.ensure_future(asyncio.to_thread(asyncio.run, store.drain()))
    await asyncio.sleep(0)
    gate.release()
    assert await draining is True
    assert stored_sizes(store) == {"k": len(VALUE)}


@pytest.mark.parametrize("kind", PENDING)
@pytest.mark.parametrize("how", ["close", "with"])
def test_close_drains(tmp_path: Path, kind: str, how: str) -> None:
    source = SyncDictStore({f"k{number}": VALUE for number in range(MOST_FILLS)})
    store = CacheStore(source, cache_store=PENDING[kind](tmp_path / "cache"))
    if how == "with":
        with store:
            for key in source.values:
                assert value_sync(store, key) == VALUE
    else:
        for key in source.values:
            assert value_sync(store, key) == VALUE
        store.close()
    assert len(stored_sizes(store)) == MOST_FILLS
    assert in_flight(store) == (0, 0)


def test_close_leaves_a_fill_that_takes_longer_to_end_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zcache.store.CLOSE_TIMEOUT", 0.01)
    cache = StoreDouble(MemoryStore())
    gate = cache.block("set")
    store = CacheStore(SyncDictStore({"k": VALUE}), cache_store=cache)
    assert value_sync(store, "k") == VALUE
    store.close()
    assert in_flight(store) != (0, 0)
    gate.release()
    assert store.drain_sync()
    assert stored_sizes(store) == {"k": len(VALUE)}


async def test_close_in_the_event_loop_that_fills_returns_and_the_fill_goes_on(
    store: CacheStore, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    await read(store, "k")
    store.close()
    gate.release()
    assert await store.drain()
    assert stored_sizes(store) == {"k": len(VALUE)}


PROCESS = """
import asyncio, sys
from zarr.storage import LocalStore, WrapperStore
from support import buf, read
from doubles import SyncDictStore, WatchedStore
from zcache import CachePool, CacheStore

values = {f"k{number}": bytes(100_000) for number in range(50)}
cache = (CachePool if sys.argv[2] == "pool" else LocalStore)(sys.argv[1])
if sys.argv[2] == "store":
    cache = WrapperStore(cache)
store = CacheStore(SyncDictStore(values), cache_store=cache, source_id="x")

async def main():
    if sys.argv[2] == "store":
        # What it holds has to be known first.
        assert await read(store, "k0") and await store.drain()
    for key in values:
        assert await read(store, key) == values[key]

asyncio.run(main())
if sys.argv[3] == "one loop more":
    assert asyncio.run(read(store, "k0"))
"""


@pytest.mark.parametrize("kind", PENDING)
@pytest.mark.parametrize("end", ["at once", "one loop more"])
def test_the_end_of_the_process_drains(tmp_path: Path, kind: str, end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path / "cache"), kind, end],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*_paths(), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    held = {path.name for path in (tmp_path / "cache").glob("k*")}
    if kind == "pool":
        pool = CachePool(tmp_path / "cache")
        held = set(stored_sizes(CacheStore(SyncDictStore(), cache_store=pool, source_id="x")))
    missing = {f"k{number}" for number in range(50)} - held
    # Of another store the values that are being written when their event loop ends are cut off.
    assert len(missing) <= (8 if kind == "store" else 0), missing


def _paths() -> list[str]:
    return [str(Path(__file__).parents[1])]


# ---------------------------------------------------------------------------------- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("way", ["async", "sync"])
def test_a_forked_child_has_none_of_the_pending_fills(
    store: CacheStore, source: StoreDouble, cache: StoreDouble, way: str
) -> None:
    gate = cache.block("set")

    def child() -> None:
        # The parent's event loop and threads do not run here.
        cache.heal()
        assert store.drain_sync(timeout=0)
        assert in_flight(store) == (0, 0)
        assert stored_sizes(store) == {}
        assert value_sync(store) == VALUE
        assert source.calls["get"] == 2
        assert store.drain_sync()
        assert stored_sizes(store) == {"k": len(VALUE)}

    if way == "sync":
        assert value_sync(store) == VALUE
        gate.wait_entered()
        assert forks.run(child) == 0
    else:

        async def run() -> None:
            assert await read(store, "k") == VALUE
            await gate.entered_async()
            # In a thread: the child of a thread has no event loop.
            assert await asyncio.to_thread(forks.run, child) == 0
            gate.release()
            assert await store.drain()

        asyncio.run(run())
    cache.heal()
    check_quiet_sync(store)
    assert stored_sizes(store) == {"k": len(VALUE)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_of_a_process_that_fills_a_directory(tmp_path: Path) -> None:
    source = SyncDictStore({f"k{number}": VALUE * 1000 for number in range(200)})
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"), max_size="10MB")
    for key in source.values:
        assert value_sync(store, key) == VALUE * 1000

    def child() -> None:
        assert store.drain_sync(timeout=10)
        for key in source.values:
            assert value_sync(store, key) == VALUE * 1000
        assert store.drain_sync()

    assert forks.run(child) == 0
    check_quiet_sync(store)
    assert source.counts["get"] == 200


# -------------------------------------------------------------------- event loops that end


@pytest.mark.parametrize("next_one", ["loop", "thread", "drain", "drain_sync"])
def test_an_event_loop_that_closes_leaves_its_pending_fills_to_the_next(
    store: CacheStore, source: StoreDouble, next_one: str
) -> None:
    for number in range(5):
        # Its fill has no turn before the loop ends.
        assert asyncio.run(read(store, f"k{number}")) == VALUE
    if next_one == "loop":

        async def use() -> None:
            assert await read(store, "k") == VALUE
            await until(lambda: len(stored_sizes(store)) == 6)

        asyncio.run(use())
    elif next_one == "thread":
        assert value_sync(store) == VALUE
        deadline = time.monotonic() + HANGS
        while len(stored_sizes(store)) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
    elif next_one == "drain":
        assert asyncio.run(store.drain())
    else:
        assert store.drain_sync()
    check_quiet_sync(store)
    assert len(stored_sizes(store)) >= 5
    reads = source.calls["get"]
    for number in range(5):
        assert value_sync(store, f"k{number}") == VALUE
    assert source.calls["get"] == reads


@pytest.mark.parametrize("end", ["cancelled", "closed"])
def test_an_event_loop_that_closes_in_the_middle_of_a_fill_leaves_its_key_usable(
    store: CacheStore, source: StoreDouble, cache: StoreDouble, end: str
) -> None:
    gate = cache.block("set", times=1)

    async def run() -> None:
        assert await read(store, "k") == VALUE
        await gate.entered_async()

    if end == "cancelled":
        asyncio.run(run())
    else:
        loop = asyncio.new_event_loop()
        # Asyncio complains of tasks that a loop leaves behind, which is what is tested here.
        loop.set_exception_handler(lambda *_: None)
        loop.run_until_complete(run())
        loop.close()
    for _ in range(3):
        assert value_sync(store) == VALUE
        assert asyncio.run(read(store, "k0")) == VALUE
    # Where a write was cut off, it may still take effect: that key is not cached any more.
    assert source.calls["get"] <= 5
    asyncio.run(store.set("k", buf(b"new")))
    assert value_sync(store) == b"new"
    assert store.drain_sync()
    assert in_flight(store).flights == 0
    assert value_sync(store, "k0") == VALUE
    assert stored_sizes(store)["k0"] == len(VALUE)


@pytest.mark.parametrize("way", ["time", "clear_cache"])
def test_fills_that_were_cut_off_give_their_room_back(
    source: StoreDouble,
    cache: StoreDouble,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    store = CacheStore(source, cache_store=cache, clock=clock, max_size=3 * len(VALUE))

    async def cut_off(key: str) -> None:
        gate = cache.block("set", times=1)
        assert await read(store, key) == VALUE
        await gate.entered_async()

    for number in range(3):
        asyncio.run(cut_off(f"k{number}"))
    assert store.cache_info()["current_size"] == 3 * len(VALUE), "it may land still"
    assert store.cache_stats()["cache_skips"] == 3
    (message,) = said(caplog)
    assert "store.drain()" in message
    # One lands after all.
    asyncio.run(cache.inner.set("k0", buf(VALUE)))

    async def reads() -> None:
        if way == "clear_cache":
            await store.clear_cache()
        else:
            clock.advance(31)
        for _ in range(2):
            for number in range(3, 6):
                assert await read_through(store, f"k{number}") == VALUE

    asyncio.run(reads())
    check_quiet_sync(store)
    assert set(stored_sizes(store)) == {"k3", "k4", "k5"}
    assert set(sizes_of(cache)) == {"k3", "k4", "k5"}
    assert len(said(caplog)) == 1


# ------------------------------------------------------------------------------------ ages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["get", "get_sync", "get_ranges"])
async def test_ages_count_from_before_the_source_was_asked(
    source: StoreDouble, clock: FakeClock, tmp_path: Path, kind: str, way: str
) -> None:
    cache = KINDS[kind](tmp_path / "cache")
    if way == "get_sync" and kind == "directory" and not hasattr(cache, "get_sync"):
        pytest.skip("zarr before 3.4 has no synchronous local store")
    store = CacheStore(source, cache_store=cache, max_age_seconds=2, clock=clock)
    byte_range = RangeByteRequest(0, 10) if way == "get_ranges" else None

    async def get() -> bytes | None:
        if way == "get_sync":
            return await asyncio.to_thread(value_sync, store)
        if way == "get":
            return await read(store, "k")
        groups = [g async for g in store.get_ranges("k", [byte_range], prototype=PROTOTYPE)]
        (((_, value),),) = groups
        return value and value.to_bytes()

    gate = source.block("*")
    reading = asyncio.ensure_future(get())
    await gate.entered_async()
    clock.advance(1.5)
    gate.release()
    expected = VALUE[:10] if byte_range else VALUE
    assert await reading == expected
    await store.drain()
    source.take()
    clock.advance(0.4)
    assert await read(store, "k", byte_range) == expected
    assert source.take() == {}
    clock.advance(0.1)
    assert await read(store, "k", byte_range) == expected
    assert source.take() == {"get": 1}


@pytest.mark.parametrize("how", ["alone", "in a batch"])
async def test_a_pending_value_that_is_too_old_is_not_served(
    source: StoreDouble, cache: StoreDouble, clock: FakeClock, how: str
) -> None:
    store = CacheStore(source, cache_store=cache, max_age_seconds=10, clock=clock)

    async def found() -> bytes | None:
        if how == "alone":
            return await read(store, "k")
        (value,) = await store.get_partial_values(PROTOTYPE, [("k", None)])
        return value and value.to_bytes()

    gate = cache.block("set")
    assert await read(store, "k") == VALUE
    await source.inner.set("k", buf(b"newer"))
    clock.advance(9.9)
    assert await found() == VALUE
    clock.advance(0.1)
    assert await found() == b"newer"
    assert await asyncio.to_thread(value_sync, store) == b"newer"
    gate.release()
    await check_quiet(store)
    assert await read(store, "k") == b"newer"


@pytest.mark.parametrize("kind", PENDING)
async def test_fill_beside_one_of_the_same_key_that_is_void_is_done_after_it(
    tmp_path: Path, clock: FakeClock, kind: str
) -> None:
    """Where nothing is fresh, each reader voids the fill of the one before."""
    # It takes a while to write.
    source = StoreDouble(MemoryStore({"k": buf(bytes(2**25))}))
    cache = PENDING[kind](tmp_path / "cache")
    store = CacheStore(source, cache_store=cache, max_age_seconds=0, clock=clock, source_id="s")
    await store.get("k", PROTOTYPE)
    await until(lambda: in_flight(store)[1] != 0 or stored_sizes(store))
    await source.inner.set("k", buf(b"newer"))
    assert await read(store, "k") == b"newer"
    await check_quiet(store)
    assert stored_sizes(store)["k"] == len(b"newer")


async def test_fill_beside_one_of_the_same_key_that_is_being_written_waits_for_it(
    source: StoreDouble, cache: StoreDouble, clock: FakeClock
) -> None:
    store = CacheStore(source, cache_store=cache, max_age_seconds=0, clock=clock)
    gate = cache.block("set", key="k")
    assert await read(store, "k") == VALUE
    await gate.entered_async()
    for value in (b"1", b"22", b"333"):
        await source.inner.set("k", buf(value))
        assert await read(store, "k") == value
    # One that is about another key does not.
    assert await read(store, "k0") == VALUE
    await until(lambda: "k0" in stored_sizes(store))
    gate.release()
    await check_quiet(store)
    assert stored_sizes(store)["k"] == 3


# ------------------------------------------------------------------------------- streaming


class StreamingStore(WrapperStore[Store]):
    """A source that brings each range as a group of its own, when the test says so."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.allowed = asyncio.Semaphore(0)
        self.asked: list[int] = []

    async def get_ranges(
        self, key: str, byte_ranges: Sequence[Any], *, prototype: Any, **_: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        self.asked.append(len(byte_ranges))
        for number, byte_range in enumerate(byte_ranges):
            await self.allowed.acquire()
            yield [(number, await self._store.get(key, prototype, byte_range))]


ASKED = [RangeByteRequest(10 * number, 10 * number + 10) for number in range(4)]


@pytest.fixture(params=KINDS)
def streaming(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[StreamingStore, CacheStore]:
    source = StreamingStore(MemoryStore({"k": buf(VALUE)}))
    cache = KINDS[request.param](tmp_path / "cache")
    return source, CacheStore(source, cache_store=cache)


def part(number: int) -> bytes:
    return VALUE[10 * number : 10 * number + 10]


async def test_get_ranges_yields_each_group_as_the_source_brings_it(
    streaming: tuple[StreamingStore, CacheStore],
) -> None:
    source, store = streaming
    groups = store.get_ranges("k", ASKED, prototype=PROTOTYPE).__aiter__()
    for number in range(len(ASKED)):
        waiting = asyncio.ensure_future(anext(groups))
        await asyncio.sleep(0.005)
        assert not waiting.done()
        source.allowed.release()
        ((at, value),) = await asyncio.wait_for(waiting, HANGS)
        assert value is not None
        assert (at, value.to_bytes()) == (number, part(number))
    with pytest.raises(StopAsyncIteration):
        await anext(groups)
    assert source.asked == [4]
    await check_quiet(store)
    assert len(stored_sizes(store)) == 4


async def test_get_ranges_goes_on_for_others_while_its_caller_is_suspended(
    streaming: tuple[StreamingStore, CacheStore],
) -> None:
    source, store = streaming
    groups = store.get_ranges("k", ASKED, prototype=PROTOTYPE).__aiter__()
    first = asyncio.ensure_future(anext(groups))
    source.allowed.release()
    await asyncio.wait_for(first, HANGS)
    # The caller does something else now: it waits for what another reader brings.
    other = asyncio.ensure_future(read(store, "k", ASKED[3]))
    for _ in range(3):
        source.allowed.release()
    assert await asyncio.wait_for(other, HANGS) == part(3)
    assert source.asked == [4]
    rest = [item async for group in groups for item in group]
    assert [(at, value and value.to_bytes()) for at, value in rest] == [
        (number, part(number)) for number in (1, 2, 3)
    ]
    await check_quiet(store)


async def test_get_ranges_that_is_left_early_lets_others_read(
    streaming: tuple[StreamingStore, CacheStore],
) -> None:
    source, store = streaming
    groups: Any = store.get_ranges("k", ASKED, prototype=PROTOTYPE)
    first = asyncio.ensure_future(anext(groups))
    source.allowed.release()
    await asyncio.wait_for(first, HANGS)
    other = asyncio.ensure_future(read(store, "k", ASKED[3]))
    await asyncio.sleep(0)
    await groups.aclose()
    assert await asyncio.wait_for(other, HANGS) == part(3)
    await check_quiet(store)


async def test_get_ranges_serves_cached_ranges_before_the_source_has_answered(
    streaming: tuple[StreamingStore, CacheStore],
) -> None:
    source, store = streaming
    assert await read(store, "k", ASKED[1]) == part(1)
    await store.drain()
    groups = store.get_ranges("k", ASKED, prototype=PROTOTYPE).__aiter__()
    ((at, value),) = await asyncio.wait_for(anext(groups), HANGS)
    assert value is not None
    assert (at, value.to_bytes()) == (1, part(1))
    for _ in range(3):
        source.allowed.release()
    rest = [item async for group in groups for item in group]
    assert sorted(at for at, _ in rest) == [0, 2, 3]
    assert source.asked == [3]
    await check_quiet(store)


async def test_get_that_is_cancelled_leaves_its_fill_to_the_cache(
    store: CacheStore, source: StoreDouble, cache: StoreDouble
) -> None:
    gate = cache.block("set")
    task = asyncio.ensure_future(read(store, "k"))
    await gate.entered_async()
    task.cancel()
    await asyncio.wait([task])
    gate.release()
    await store.drain()
    assert await read(store, "k") == VALUE
    assert source.calls["get"] == 1
    await check_quiet(store)


async def test_bound_holds_while_fills_are_pending(source: StoreDouble) -> None:
    cache = WatchedStore(MemoryStore())
    cache.delay("set", 0.002)
    store = CacheStore(source, cache_store=cache, max_size=450)
    for _ in range(3):
        await asyncio.gather(*(read(store, f"k{number}") for number in range(MOST_FILLS)))
        check_index(store)
        assert store.cache_info()["current_size"] <= 450
    await store.drain()
    assert 0 < cache.peak <= 450
    await check_quiet(store)


async def test_drain_keeps_nothing_of_a_fill_that_ends_between_two_looks(
    tmp_path: Path, source: StoreDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep its cache alive, and the next store of the directory would have the old index."""
    store = CacheStore(source, cache_store=LocalStore(tmp_path), source_id="source")
    # No one but the drain looks.
    store._cache.shared.place.on_idle = lambda: None
    collect, looks = DirectoryFiller.collect, list[int]()

    def too_early(self: DirectoryFiller) -> Sequence[Any]:
        looks.append(1)
        if len(looks) > 1:
            return collect(self)
        end = time.monotonic() + HANGS
        while not self.is_idle and time.monotonic() < end:
            time.sleep(0.001)
        return ()

    while len(looks) < 2:  # A fill may end before the first look.
        looks.clear()
        await store.invalidate("k")
        assert await read(store, "k") == VALUE
        with monkeypatch.context() as patch:
            patch.setattr(DirectoryFiller, "collect", too_early)
            assert await store.drain()
    assert not store._cache.shared.fills.filler._jobs


async def test_value_that_the_cache_store_cannot_begin_with_takes_no_room_in_the_queue(
    tmp_path: Path, source: StoreDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    store = CacheStore(source, cache_store=LocalStore(tmp_path), source_id="source")
    monkeypatch.setattr(DirectoryFiller, "submit", submit)
    assert await read(store, "k") == VALUE
    queue: FillQueue = store._cache.shared.fills
    assert (queue.pending(), queue.pending_size) == ([], 0)


async def test_note_that_a_clock_raises_in_costs_no_other_one(
    tmp_path: Path, source: StoreDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the pauses may be a user's own."""
    jobs: list[FillJob] = []
    is_broken = False

    def clock() -> float:
        if is_broken:
            raise ArithmeticError("no time")
        return time.time()

    def collect(_: DirectoryFiller) -> Sequence[Ended]:
        failed, written = jobs
        return [
            Ended(failed, failures=[(OSError(errno.EIO, "broken"), "write")]),
            Ended(written, written=True),
        ]

    cache = LocalStore(tmp_path)
    store = CacheStore(source, cache_store=cache, source_id="source", clock=clock)
    queue: FillQueue = store._cache.shared.fills
    monkeypatch.setattr(DirectoryFiller, "submit", lambda _self, _io, job: jobs.append(job))
    monkeypatch.setattr(DirectoryFiller, "is_idle", False)
    for key in ("k", "k1"):
        assert await read(store, key) == VALUE
    is_broken = True
    with monkeypatch.context() as patched:
        patched.setattr(DirectoryFiller, "collect", collect)
        with pytest.raises(ArithmeticError):
            queue.collect()
    assert queue.pending() == []


@pytest.mark.parametrize("lost", ["results", "notes"])
async def test_offer_after_an_interrupt_took_what_was_collected_has_its_room(
    tmp_path: Path, source: StoreDouble, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The interrupt comes between the end of a fill and its note."""
    store = CacheStore(
        source, cache_store=LocalStore(tmp_path), source_id="source", max_pending_size=len(VALUE)
    )
    queue: FillQueue = store._cache.shared.fills
    filler = queue.filler
    assert isinstance(filler, DirectoryFiller)
    owner, method = (DirectoryFiller, "collect") if lost == "results" else (FillQueue, "_note")
    real: Any = getattr(owner, method)
    taken: list[Any] = []

    def interrupted(self: Any, *args: Any) -> Any:
        result = real(self, *args) if lost == "results" else args
        if not result:
            return result
        taken.append(result)
        monkeypatch.setattr(owner, method, real)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        monkeypatch.setattr(owner, method, interrupted)
        await read(store, "k")
        while not taken:
            queue.collect()
            await asyncio.sleep(0.001)
    assert taken
    assert await read(store, "k1") == VALUE
    assert await store.drain()
    assert stored_sizes(store).keys() == {"k", "k1"}
    assert queue.pending_size == 0
    assert not filler._jobs
    assert store.cache_stats()["cache_skips"] == 0
