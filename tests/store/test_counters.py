"""Counters of a store: its own, from its making on."""

from __future__ import annotations

import asyncio
import os
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from doubles import GatedStore, reached
from pools import CACHES, STORES, one_of
from zcache import CacheStore
from zcache._core import CorruptIndexError, Stats
from zcache.testing import FakeClock, StoreDouble

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

VALUE = cpu.Buffer.from_bytes(b"value")
PROTOTYPE = default_buffer_prototype()


cache_store = one_of(STORES)


def source() -> StoreDouble:
    return StoreDouble(MemoryStore(dict.fromkeys("abc", VALUE)))


def reads(store: CacheStore) -> tuple[int, int]:
    stats = store.cache_stats()
    assert stats["total_requests"] == stats["hits"] + stats["misses"]
    return stats["hits"], stats["misses"]


async def read(store: Store, keys: str) -> None:
    for key in keys:
        assert (await store.get(key, PROTOTYPE)) is not None


async def test_a_store_over_a_cache_in_use_counts_from_zero(cache_store: Any) -> None:
    shared = source()
    first = CacheStore(shared, cache_store=cache_store, source_id="s")
    await read(first, "ab")
    await first.drain()
    await read(first, "aab")
    assert reads(first) == (3, 2)
    second = CacheStore(shared, cache_store=cache_store, source_id="s", max_size=5)
    assert not any(second.cache_stats().values())
    await read(second, "cc")
    assert reads(first) == (3, 2)
    hits, misses = reads(second)
    assert hits + misses == 2
    assert misses >= 1


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("keeps", [True, False])
async def test_written_values_that_other_writes_overlap_are_refusals(
    kind: str, keeps: bool, tmp_path: Path
) -> None:
    gated = GatedStore()
    cache = CACHES[kind](tmp_path)
    store = CacheStore(gated, cache_store=cache, cache_set_data=keeps)
    gated.shut["set"] = 2
    writes = [asyncio.create_task(store.set("a", VALUE)) for _ in range(2)]
    await reached(gated, 2)
    gated.release()
    await asyncio.gather(*writes)
    await store.drain()
    assert not store.is_cached("a")
    assert store.cache_stats()["refusals"] == (2 if keeps else 0)


async def test_copies_count_together(cache_store: Any) -> None:
    store = CacheStore(source(), cache_store=cache_store, source_id="s")
    copies = [store, store.with_read_only(True), pickle.loads(pickle.dumps(store))]
    await read(store, "a")
    await store.drain()
    for copy in copies:
        await read(copy, "a")
    assert {reads(copy) for copy in copies} == {(3, 1)}


async def test_counters_survive_a_rebuilt_index(tmp_path: Path) -> None:
    store = CacheStore(source(), cache_store=LocalStore(tmp_path), source_id="s", max_size=5)
    await read(store, "a")
    await store.drain()
    await read(store, "ab")
    await store.drain()
    before = store.cache_stats()
    assert before["evictions"] == 1
    with (tmp_path / ".zcache/index/head").open("r+b") as file:
        file.write(b"damaged")
    await read(store, "b")
    stats = store.cache_stats()
    assert stats["evictions"] == 1
    assert stats["total_requests"] == before["total_requests"] + 1


async def test_counters_survive_an_index_that_is_given_up(tmp_path: Path) -> None:
    store = CacheStore(source(), cache_store=LocalStore(tmp_path), source_id="s", max_size=5)
    await read(store, "ab")
    await store.drain()
    before = store.cache_stats()
    store._cache.shared.handle.abandon(CorruptIndexError("it cannot be used"))
    await read(store, "c")
    assert store.cache_stats() == {
        **before,
        "misses": 3,
        "total_requests": 3,
        "cache_skips": 1,
    }


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_counts_on_by_itself(tmp_path: Path) -> None:
    store = CacheStore(source(), cache_store=LocalStore(tmp_path), source_id="s")
    asyncio.run(read(store, "a"))
    assert store.drain_sync()
    asyncio.run(read(store, "a"))
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(read(store, "aa"))
            os.write(theirs, repr(reads(store)).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        assert pipe.read() == "(3, 1)"
    os.waitpid(child, 0)
    assert reads(store) == (1, 1)


async def test_a_read_that_finds_its_value_at_the_second_look_counts_once() -> None:
    shared = source()
    store = CacheStore(shared, cache_store=StoreDouble(MemoryStore()))
    gate = shared.block("get")
    tasks = [asyncio.ensure_future(read(store, "a")) for _ in range(10)]
    await gate.entered_async()
    gate.release()
    await asyncio.gather(*tasks)
    await store.drain()
    await read(store, "a")
    hits, misses = reads(store)
    assert hits + misses == 11
    assert hits >= 1


@pytest.mark.parametrize("cached", [False, True])
async def test_one_skipped_read_counts_once(tmp_path: Path, cached: bool) -> None:
    clock = FakeClock()
    cache = StoreDouble(LocalStore(tmp_path))
    store = CacheStore(source(), cache_store=cache, source_id="s", clock=clock)
    await read(store, "a")
    await store.drain()
    cache.fail("get", OSError("unreachable"))
    cache.fail("set", OSError("unreachable"))
    cache.fail("delete", OSError("unreachable"))
    breaker = store._cache.shared.breaker
    for operation in ("read", "write", "delete"):
        breaker.failed(TimeoutError("no answer"), operation)  # type: ignore[arg-type]
    await read(store, "a" if cached else "b")
    assert store.cache_stats()["cache_skips"] == 1
    assert reads(store) == (0, 2)
    await store.exists("a")
    assert store.cache_stats()["cache_skips"] == 2


async def test_a_second_store_reports_no_failures_of_before(tmp_path: Path) -> None:
    cache = StoreDouble(LocalStore(tmp_path))
    shared = source()
    store = CacheStore(shared, cache_store=cache, source_id="s")
    store._cache.shared.breaker.failed(OSError("unreachable"), "read")
    assert store.cache_stats()["cache_failures"] == 1
    other = CacheStore(shared, cache_store=cache, source_id="s")
    assert other.cache_stats()["cache_failures"] == 0


def test_each_counter_of_an_index_is_one_of_a_store() -> None:
    counted = {name for name in vars(Stats) if not name.startswith("_")}
    assert counted <= CacheStore(MemoryStore()).cache_stats().keys()
