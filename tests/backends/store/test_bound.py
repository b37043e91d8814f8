"""A bound that becomes smaller, over what is in memory and over any other store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from zarr.storage import FsspecStore, LoggingStore, MemoryStore

from doubles import DictStore, SyncDictStore
from support import buf, check_quiet, fill, read, sizes_of, until
from zcache import CacheStore
from zcache.testing import FakeClock, StoreDouble, check_invariants, in_flight

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

KEYS = [f"k/{number}" for number in range(10)]
VALUE = bytes(1000)
BOUND = 2500

GENERIC: dict[str, Callable[[], Store]] = {
    "coroutines": DictStore,
    "synchronous": SyncDictStore,
    "double": lambda: StoreDouble(MemoryStore()),
}


def source() -> MemoryStore:
    return MemoryStore({key: buf(VALUE) for key in KEYS})


def bytes_in(cache: Store) -> int:
    if isinstance(cache, DictStore):
        return sum(map(len, cache.values.values()))
    return sum(sizes_of(cache).values())


async def filled(behind: Store, cache: Store, **options: int) -> CacheStore:
    """A store with room for all values, which are cached."""
    store = CacheStore(behind, cache_store=cache, source_id="s", **options)  # type: ignore[arg-type]
    for key in KEYS:
        assert await read(store, key) == VALUE
    assert await store.drain()
    return store


@pytest.mark.parametrize("wrapped", [False, True])
async def test_smaller_bound_over_memory_is_kept_at_once(wrapped: bool) -> None:
    behind, kept = source(), MemoryStore()
    cache = LoggingStore(kept) if wrapped else kept
    large = await filled(behind, cache, max_size=10**6)
    assert len(kept._store_dict) == len(KEYS)
    small = CacheStore(behind, cache_store=cache, source_id="s", max_size=BOUND)
    assert bytes_in(kept) == small.cache_info()["current_size"] <= BOUND
    check_invariants(small)
    # Those that were used last are there still.
    assert small.is_cached(KEYS[-1])
    assert not large.is_cached(KEYS[0])
    await check_quiet(small)


def test_smaller_bound_over_what_is_taken_over_is_kept_at_once() -> None:
    cache = source()
    store = CacheStore(source(), cache_store=cache, max_size=BOUND, adopt=True)
    assert bytes_in(cache) == store.cache_info()["current_size"] <= BOUND
    check_invariants(store)


@pytest.mark.parametrize("use", ["hits", "write", "drain", "drain_sync"])
@pytest.mark.parametrize("kind", GENERIC)
async def test_smaller_bound_over_a_store_is_kept_from_the_first_operation_on(
    kind: str, use: str
) -> None:
    behind, cache = source(), GENERIC[kind]()
    large = await filled(behind, cache, max_size=10**6)
    store = CacheStore(behind, cache_store=cache, source_id="s", max_size=BOUND)
    if use == "hits":
        for key in KEYS[-2:]:
            assert await read(store, key) == VALUE
        await until(lambda: store.cache_info()["current_size"] <= BOUND)
        await until(lambda: bytes_in(cache) <= BOUND)
    elif use == "write":
        await fill(store, other=b"1")
        await until(lambda: bytes_in(cache) <= BOUND)
    elif use == "drain":
        assert await store.drain()
    else:
        assert await asyncio.to_thread(store.drain_sync)
    assert await store.drain()
    assert bytes_in(cache) == store.cache_info()["current_size"] <= BOUND
    await check_quiet(large)


async def test_smaller_bound_over_a_store_that_is_listed_is_kept() -> None:
    behind, cache = source(), FsspecStore.from_url("memory://zcache-smaller-bound")
    await filled(behind, cache, max_size=10**6)
    # Another process finds what is there.
    again = FsspecStore.from_url("memory://zcache-smaller-bound", read_only=False)
    store = CacheStore(behind, cache_store=again, source_id="s", max_size=BOUND)
    assert await store.drain()
    assert store.cache_info()["current_size"] <= BOUND
    await check_quiet(store)


async def test_smaller_bound_over_a_store_that_does_not_delete_costs_no_read() -> None:
    clock = FakeClock()
    behind, cache = source(), StoreDouble(MemoryStore())
    store = CacheStore(behind, cache_store=cache, source_id="s", max_size=10**6, clock=clock)
    for key in KEYS:
        await read(store, key)
    assert await store.drain()
    cache.fail("delete", OSError(5, "refused"))
    small = CacheStore(behind, cache_store=cache, source_id="s", max_size=BOUND)
    for key in KEYS * 3:
        assert await read(small, key) == VALUE
        assert await small.drain()
    assert small.cache_stats()["cache_failures"] > 0
    # What could not be deleted is counted until it is.
    assert bytes_in(cache) == small.cache_info()["current_size"]
    cache.heal()
    clock.advance(1000)
    for key in KEYS:
        assert await read(small, key) == VALUE
        assert await small.drain()
    await until(lambda: in_flight(small) == (0, 0))
    assert bytes_in(cache) == small.cache_info()["current_size"] <= BOUND
