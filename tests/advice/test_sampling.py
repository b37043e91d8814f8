"""Which requests an index samples: of which stores, threads, loops and processes, and what becomes of them."""

from __future__ import annotations

import asyncio
import csv
import gzip
import os
import pickle
from typing import TYPE_CHECKING

import pytest
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore

from agent import Agent
from directories import INDEX, closed, complete, open_store
from forks import run
from pools import CACHES, STORES
from support import (
    PROTOTYPE,
    buf,
    check_quiet,
    drained,
    files_below,
    is_value,
    read,
    read_through,
    threads,
    value_sync,
)
from zcache import CacheStore, OptionTypeError
from zcache._advice.trace import DROPPED, FILLED, Trace, sampled
from zcache._backends.base import BUSY
from zcache.testing import FakeClock, StoreDouble
from zcache.testing._internals import ask

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import ByteRequest


def trace_of(store: CacheStore) -> Trace:
    return ask(store, sampled)


def source_of(count: int, size: int = 100) -> MemoryStore:
    return MemoryStore({f"a/c/{number}": buf(bytes(size)) for number in range(count)})


async def test_reads_of_values_are_sampled_in_their_order() -> None:
    store = CacheStore(source_of(5), max_size=250)
    for number in (0, 1, 2, 0, 4, 4):
        await read(store, f"a/c/{number}")
    trace = trace_of(store)
    first = list(trace.keys)
    assert (first[0], first[4]) == (first[3], first[5])
    assert len(set(first)) == 4
    assert list(trace.sizes) == [100] * 6
    assert list(trace.hits) == [False] * 5 + [True]
    assert (trace.requests, trace.rate, trace.has_slid) == (6, 1.0, False)
    assert trace.requests == store.cache_stats()["total_requests"]


async def test_reads_of_what_the_source_does_not_have_are_no_requests() -> None:
    store = CacheStore(source_of(1), cache_missing=True)
    for _ in range(3):
        for key in ("a/c/0", "nothing", "../a", "a//b"):
            await read(store, key)
    trace = trace_of(store)
    assert (len(trace.keys), trace.requests) == (3, 3)


@pytest.mark.parametrize("kind", ["memory", "directory", "pool"])
async def test_read_that_finds_a_value_gone_is_no_request(tmp_path: Path, kind: str) -> None:
    """Though the size that the value had is known."""
    store = CacheStore(source_of(3), cache_store=CACHES[kind](tmp_path / "cache"), source_id="here")
    wanted: list[tuple[str, ByteRequest | None]] = [(f"a/c/{number}", None) for number in range(3)]
    await store.get_partial_values(PROTOTYPE, wanted)
    # The sizes are known once the values are filled.
    await drained(store)
    for key, _ in wanted:
        await store.delete(key)
    assert await read(store, "a/c/0") is None
    assert await store.get_partial_values(PROTOTYPE, wanted) == [None] * 3
    trace = trace_of(store)
    assert (int((trace.writes == 0).sum()), trace.requests) == (3, 3)
    assert not trace.hits.any()


async def test_readers_who_wait_for_what_is_gone_make_no_requests(clock: FakeClock) -> None:
    source = source_of(1)
    store = CacheStore(StoreDouble(source), max_age_seconds=5, clock=clock)
    await read(store, "a/c/0")
    clock.advance(10)
    await source.delete("a/c/0")
    assert await asyncio.gather(*(read(store, "a/c/0") for _ in range(4))) == [None] * 4
    trace = trace_of(store)
    assert (len(trace.keys), trace.requests) == (1, 1)


async def test_writes_are_no_requests() -> None:
    store = CacheStore(MemoryStore())
    await store.set("a", buf(b"12"))
    assert trace_of(store).requests == 0
    await read(store, "a")
    await store.set("a", buf(b"123"))
    await read(store, "a")
    trace = trace_of(store)
    assert (trace.requests, trace.earlier) == (2, 0)
    # They stand between the requests, each of which has the size of its time.
    assert list(trace.writes) == [FILLED, 0, DROPPED, FILLED, 0]
    assert list(trace.hits) == [False, True, False, False, True]
    assert list(trace.sizes) == [2, 2, 0, 3, 3]


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "dropped"])
async def test_reads_during_a_write_are_no_hits_at_any_size(is_cached: bool) -> None:
    source = StoreDouble(source_of(2))
    store = CacheStore(source, cache_set_data=is_cached)
    await read(store, "a/c/0")
    gate = source.block("set", times=1)
    write = asyncio.create_task(store.set("a/c/0", buf(b"123")))
    await gate.entered_async()
    for key in ("a/c/0", "a/c/0", "a/c/1"):
        await read(store, key)
    gate.release()
    await write
    await read(store, "a/c/0")
    trace = trace_of(store)
    last = FILLED if is_cached else DROPPED
    assert list(trace.writes) == [0, DROPPED, 0, 0, 0, last, 0]
    assert list(trace.outdated) == [False, False, True, True, False, False, False]


async def test_ranges_are_requests_of_what_they_ask_for() -> None:
    store = CacheStore(source_of(2))
    for request in (RangeByteRequest(0, 7), SuffixByteRequest(9), RangeByteRequest(0, 7), None):
        await read(store, "a/c/0", request)
    await read(store, "a/c/0", SuffixByteRequest(3))
    trace = trace_of(store)
    assert list(trace.sizes) == [7, 9, 7, 100, 3]
    assert trace.keys[0] == trace.keys[2]
    assert len(set(trace.keys)) == 4
    assert set(trace.wholes) == {trace.keys[3]}
    assert trace.ranges.tolist() == [[1, 0, 7], [3, 9, 0], [1, 0, 7], [0, 0, 0], [3, 3, 0]]
    assert list(trace.hits) == [False, False, True, False, True]


async def test_range_that_the_read_of_the_whole_value_serves_is_a_request_of_its_own() -> None:
    source = StoreDouble(source_of(1))
    store = CacheStore(source)
    gate = source.block("get", times=1)
    whole = asyncio.create_task(read(store, "a/c/0"))
    await gate.entered_async()
    part = asyncio.create_task(read(store, "a/c/0", RangeByteRequest(0, 7)))
    wanted: list[tuple[str, ByteRequest | None]] = [("a/c/0", SuffixByteRequest(9))]
    batch = asyncio.create_task(store.get_partial_values(PROTOTYPE, wanted))
    await asyncio.sleep(0)
    gate.release()
    await asyncio.gather(whole, part, batch)
    trace = trace_of(store)
    assert trace.requests == 3
    assert sorted(trace.sizes) == [7, 9, 100]
    assert len(set(trace.wholes)) == 1


async def test_read_of_a_value_on_its_way_into_the_cache_store_is_a_hit() -> None:
    cache = StoreDouble(MemoryStore())
    store = CacheStore(source_of(1), cache_store=cache)
    gate = cache.block("set")
    await read(store, "a/c/0")
    await gate.entered_async()
    await read(store, "a/c/0")
    await read(store, "a/c/0", RangeByteRequest(0, 7))
    await store.get_partial_values(PROTOTYPE, [("a/c/0", None)])
    gate.release()
    await drained(store)
    trace = trace_of(store)
    assert list(trace.hits) == [False, True, True, True]
    assert list(trace.sizes) == [100, 100, 7, 100]
    stats = store.cache_stats()
    assert (stats["hits"], stats["misses"]) == (3, 1)


async def test_values_that_are_too_large_or_not_cached_have_their_size() -> None:
    store = CacheStore(source_of(2), max_size=50)
    for _ in range(2):
        await read(store, "a/c/0")
    assert list(trace_of(store).sizes) == [100, 100]
    assert not trace_of(store).hits.any()


async def test_values_that_are_too_old_are_known_to_be(clock: FakeClock) -> None:
    store = CacheStore(source_of(1), max_age_seconds=10, clock=clock)
    await read(store, "a/c/0")
    clock.advance(20)
    await read(store, "a/c/0")
    await read(store, "a/c/0")
    trace = trace_of(store)
    assert list(trace.outdated) == [False, True, False]
    assert list(trace.hits) == [False, False, True]


async def test_reads_that_fail_are_left_out() -> None:
    source = StoreDouble(source_of(200))
    store = CacheStore(source)
    source.fail("get", OSError("unreachable"), times=50)
    for number in range(100):
        if number < 50:
            with pytest.raises(OSError, match="unreachable"):
                await read(store, f"a/c/{number}")
        else:
            await read(store, f"a/c/{number}")
    trace = trace_of(store)
    assert (len(trace.keys), trace.requests) == (50, 50)


async def test_batches_are_sampled() -> None:
    store = CacheStore(source_of(3))
    wanted = [(f"a/c/{number}", None) for number in (0, 1, 1)]
    await store.get_partial_values(PROTOTYPE, wanted)
    await store.get_partial_values(PROTOTYPE, wanted)
    trace = trace_of(store)
    assert len(trace.keys) == 6
    assert list(trace.hits[3:]) == [True] * 3


def test_threads_and_loops_are_sampled_together() -> None:
    store = CacheStore(source_of(50))

    def blocking() -> None:
        for number in range(50):
            value_sync(store, f"a/c/{number}")

    def looping() -> None:
        async def work() -> None:
            await asyncio.gather(*(read(store, f"a/c/{number}") for number in range(50)))

        asyncio.run(work())

    with threads(blocking, looping, blocking, looping):
        pass
    trace = trace_of(store)
    # Also where a read finds that another has just brought its value, and is looked up twice.
    assert len(trace.keys) == trace.requests == 200
    assert len(set(trace.keys)) == 50


async def test_reader_who_looks_again_makes_one_request() -> None:
    """Of two who miss a value the one brings it, before the other one finds that it is there by now."""
    store = CacheStore(source_of(1))
    hits = store._hits
    assert hits.get_nowait("a/c/0", PROTOTYPE, None) == (None, None)
    await read_through(store, "a/c/0")
    value = await store._reader.fetch(store._io, "a/c/0", PROTOTYPE, None, None)
    assert value is not None
    trace = trace_of(store)
    assert (list(trace.hits), trace.requests) == ([False, True], 2)


@pytest.mark.parametrize("kind", ["memory", "directory", "pool"])
async def test_read_that_finds_the_index_busy_is_sampled(tmp_path: Path, kind: str) -> None:
    store = CacheStore(source_of(2), cache_store=CACHES[kind](tmp_path / "cache"), source_id="here")
    await read_through(store, "a/c/0")
    for key in ("a/c/0", "a/c/1", "a/c/9"):
        await store._reader.get(store._io, key, PROTOTYPE, None, None, BUSY)
    await drained(store)
    trace = trace_of(store)
    assert (list(trace.hits), trace.requests) == ([False, True, False], 3)
    stats = store.cache_stats()
    assert (stats["hits"], stats["misses"]) == (1, 3)


@pytest.mark.parametrize("byte_range", [None, RangeByteRequest(3, 9)])
@pytest.mark.parametrize("kind", ["directory", "store"])
async def test_hit_that_cannot_be_served_is_sampled_as_a_miss(
    tmp_path: Path, kind: str, byte_range: ByteRequest | None
) -> None:
    """As it is counted and recorded."""
    cache = STORES[kind](tmp_path / "cache")
    store = CacheStore(source_of(2), cache_store=cache, source_id="here")
    with store.record(tmp_path / "requests"):
        for _ in range(2):
            await read_through(store, "a/c/0", byte_range)
        for path in files_below(tmp_path / "cache"):
            if is_value(str(path.relative_to(tmp_path / "cache"))):
                path.unlink()
        if isinstance(cache, StoreDouble):
            await cache.inner.clear()
        await read_through(store, "a/c/0", byte_range)
        await read_through(store, "a/c/0", byte_range)
    trace = trace_of(store)
    assert (list(trace.hits), trace.requests) == ([False, True, False, True], 4)
    assert len(set(trace.keys)) == 1
    stats = store.cache_stats()
    assert (stats["hits"], stats["misses"]) == (2, 2)
    with gzip.open(tmp_path / "requests", "rt") as file:
        file.readline()
        assert [row["hit"] for row in csv.DictReader(file)] == ["0", "1", "0", "1"]


async def test_each_store_says_whether_its_own_requests_are_sampled() -> None:
    source, cache = source_of(3), MemoryStore()
    off = CacheStore(source, cache_store=cache, sampling=False)
    on = CacheStore(source, cache_store=cache)
    copy = pickle.loads(pickle.dumps(off))
    assert (off.sampling, on.sampling, copy.sampling) == (False, True, False)
    await read(off, "a/c/0")
    await off.set("a/c/1", buf(b"value"))
    assert not len(trace_of(on).keys)
    await read(on, "a/c/0")
    await read(off.with_read_only(True), "a/c/0")
    assert trace_of(off).requests == 1
    reason = "this store was made with sampling=False"
    assert not CacheStore(source, sampling=False).advise()
    assert reason in str(CacheStore(source, sampling=False).advise())


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_sampling_is_a_flag(value: object) -> None:
    with pytest.raises(OptionTypeError, match="sampling"):
        CacheStore(MemoryStore(), sampling=value)  # type: ignore[arg-type]


# ------------------------------------------------------------------------- directories


async def test_processes_on_a_directory_share_a_sample(tmp_path: Path) -> None:
    store, source = open_store(tmp_path, LocalStore(tmp_path / "source"))
    for number in range(3):
        await source.inner.set(f"a/c/{number}", buf(b"123"))
    with Agent(tmp_path) as other:
        for number in (0, 1, 0):
            assert other("get", f"a/c/{number}") == "123"
            assert other("drain")
        await read_through(store, "a/c/2")
        await read(store, "a/c/0")
        trace = trace_of(store)
        assert list(trace.hits) == [False, False, True, False, True]
        assert list(trace.sizes) == [3] * 5
        assert trace.keys[0] == trace.keys[2] == trace.keys[4]
        other.kill()
    await read(store, "a/c/1")
    assert len(trace_of(store).keys) == 6
    await check_quiet(store)


async def test_sample_of_a_directory_outlives_its_process_and_a_rebuild(tmp_path: Path) -> None:
    store, source = open_store(tmp_path)
    await source.inner.set("a", buf(b"1234"))
    for _ in range(3):
        await read_through(store, "a")
    del store
    await closed(tmp_path)
    store, _ = open_store(tmp_path)
    assert list(trace_of(store).sizes) == [4] * 3
    await read(store, "a")
    del store
    await closed(tmp_path)
    for name in ("head", "cells"):
        (tmp_path / "cache" / INDEX / name).unlink()
    store, _ = open_store(tmp_path)
    await complete(store)
    await read(store, "a")
    trace = trace_of(store)
    assert list(trace.hits) == [False, True, True, True, True]
    assert len(set(trace.keys)) == 1


@pytest.mark.parametrize("damage", [b"", b"\xff" * 2**20, os.urandom(2000)])
async def test_sample_that_is_damaged_costs_no_read(tmp_path: Path, damage: bytes) -> None:
    store, source = open_store(tmp_path)
    await source.inner.set("a", buf(b"1234"))
    await read_through(store, "a")
    (tmp_path / "cache" / INDEX / "sample").write_bytes(damage)
    for _ in range(3):
        assert await read(store, "a") == b"1234"
    assert not store.advise()
    await read(store, "a")
    del store
    await closed(tmp_path)
    store, _ = open_store(tmp_path)
    assert await read(store, "a") == b"1234"
    assert len(trace_of(store).keys) <= 5
    await check_quiet(store)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_child_samples_on(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(b"1234")
    store, _ = open_store(tmp_path)
    assert asyncio.run(read_through(store, "a")) == b"1234"

    def child() -> None:
        assert asyncio.run(read(store, "a")) == b"1234"

    assert run(child) == 0
    assert list(trace_of(store).hits) == [False, True]
