"""The bound, the order of eviction and the ages, seen through the store."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import RangeByteRequest
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from doubles import WatchedDict, WatchedStore
from support import (
    PROTOTYPE,
    buf,
    check_quiet,
    check_quiet_sync,
    fill,
    read,
    read_through,
    until,
    write,
)
from zcache import CacheStore
from zcache.testing import FakeClock, StoreDouble, recency, stored_sizes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from zarr.abc.store import Store


@pytest.fixture
def source() -> StoreDouble:
    """A source that counts what reaches it."""
    return StoreDouble(MemoryStore())


@pytest.fixture(params=["memory", "local", "wrapped"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Cache stores that take each their own way through the code."""
    if request.param == "local":
        return LocalStore(tmp_path / "cache")
    return MemoryStore() if request.param == "memory" else WatchedStore(MemoryStore())


# ----------------------------------------------------------------------------------- LRU


async def test_lru_read_makes_an_entry_most_recent(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30)
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await read_through(store, "a")
    await fill(store, d=bytes(10))
    assert stored_sizes(store) == {"a": 10, "c": 10, "d": 10}
    await read_through(store, "b")  # a miss, which is filled
    assert stored_sizes(store) == {"a": 10, "b": 10, "d": 10}
    assert store.cache_stats()["evictions"] == 2
    await check_quiet(store)


async def test_lru_write_makes_an_entry_most_recent(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30)
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await fill(store, a=bytes(9))
    await fill(store, d=bytes(10))
    assert stored_sizes(store) == {"a": 9, "c": 10, "d": 10}
    assert store.cache_stats()["evictions"] == 1
    await check_quiet(store)


async def test_lru_range_read_makes_its_value_most_recent(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30)
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await read_through(store, "a", RangeByteRequest(2, 4))
    await store.get_partial_values(PROTOTYPE, [("b", None)])
    await fill(store, d=bytes(10))
    assert stored_sizes(store) == {"a": 10, "b": 10, "d": 10}
    await fill(store, e=bytes(10))
    assert stored_sizes(store) == {"b": 10, "d": 10, "e": 10}
    await check_quiet(store)


async def test_lru_exists_and_getsize_leave_the_order(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30)
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    assert await store.exists("a")
    assert await store.getsize("a") == 10
    await fill(store, d=bytes(10))
    assert "a" not in stored_sizes(store)


SIZES = st.integers(0, 12)
STEPS = st.lists(
    st.tuples(st.sampled_from(["read", "write", "delete"]), st.sampled_from("abcdefg"), SIZES),
    max_size=60,
)


@given(max_size=st.integers(0, 30), steps=STEPS)
@settings(max_examples=200)
def test_lru_order_equals_the_reference_model(
    max_size: int, steps: Sequence[tuple[str, str, int]]
) -> None:
    """After each step the cache holds what the textbook's LRU cache holds, in its order."""
    store = CacheStore(MemoryStore(), max_size=max_size)
    model: OrderedDict[str, int] = OrderedDict()
    source: dict[str, int] = {}
    evictions = 0

    def keep(key: str, size: int) -> None:
        nonlocal evictions
        model.pop(key, None)
        if size > max_size or not max_size:
            return
        # For those without bytes, a bound of so many bytes is one of so many entries.
        crowded = size == 0
        while sum(model.values()) + size > max_size or (crowded and len(model) >= max_size):
            model.popitem(last=False)
            evictions += 1
        model[key] = size

    for action, key, size in steps:
        if action == "write":
            sync(store.set(key, buf(bytes(size))))
            source[key] = size
            keep(key, size)
        elif action == "delete":
            sync(store.delete(key))
            source.pop(key, None)
            model.pop(key, None)
        else:
            value = sync(read(store, key))
            assert (None if value is None else len(value)) == source.get(key)
            if key in model:
                model.move_to_end(key)
            elif key in source:
                keep(key, source[key])
        assert [key for key, _ in recency(store)] == list(model)
        assert stored_sizes(store) == model
        assert store.cache_stats()["evictions"] == evictions
        check_quiet_sync(store)


# ------------------------------------------------------------------------------ the bound


@pytest.mark.parametrize("kind", ["memory", "wrapped"])
async def test_bound_holds_at_every_instant(kind: str) -> None:
    """Watched from inside: room is made first, bytes are written second."""
    inside = WatchedDict() if kind == "memory" else WatchedStore(MemoryStore())
    cache = MemoryStore(inside) if isinstance(inside, WatchedDict) else inside
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=100)
    dice = random.Random(0)
    for _ in range(500):
        key = f"{dice.choice('ab')}/{dice.randrange(20)}"
        if dice.random() < 0.5:
            await write(store, key, bytes(dice.randrange(130)))
        else:
            await read_through(store, key)
    assert store.cache_stats()["evictions"] > 100
    assert 80 < inside.peak <= 100
    await check_quiet(store)


@pytest.mark.parametrize("kind", ["memory", "wrapped"])
async def test_value_above_the_bound_never_reaches_the_cache_store(kind: str) -> None:
    inside = WatchedDict() if kind == "memory" else WatchedStore(MemoryStore())
    cache = MemoryStore(inside) if isinstance(inside, WatchedDict) else inside
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=10)
    await fill(store, small=bytes(10), large=bytes(11))
    for _ in range(2):
        assert await read_through(store, "large") == bytes(11)
    assert await store.getsize("large") == 11
    assert inside.written == ["small"]
    assert inside.peak == 10
    # Nothing had to go for it.
    assert store.cache_stats()["evictions"] == 0
    assert await read_through(store, "small") == bytes(10)
    assert store.cache_stats()["hits"] == 1
    # A range of it is small enough, and an entry of its own.
    assert await read_through(store, "large", RangeByteRequest(0, 4)) == bytes(4)
    assert len(inside.written) == 2
    assert store.cache_info()["current_size"] == 4
    await check_quiet(store)


async def test_bound_of_zero_keeps_nothing(source: StoreDouble, cache: Store) -> None:
    store = CacheStore(source, cache_store=cache, max_size=0)
    await fill(store, a=b"1", empty=b"")
    for _ in range(2):
        assert await read_through(store, "a") == b"1"
        assert await read_through(store, "empty") == b""
    assert stored_sizes(store) == {}
    assert source.take() == {"set": 2, "get": 4}
    await check_quiet(store)


async def test_no_bound_evicts_nothing(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache)
    for number in range(200):
        await write(store, f"c/{number}", bytes(1000))
    assert store.cache_info()["current_size"] == 200_000
    assert store.cache_stats()["evictions"] == 0
    await check_quiet(store)


async def test_one_value_may_evict_many(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=100)
    await fill(store, **{f"k{number}": bytes(10) for number in range(10)})
    await fill(store, large=bytes(95))
    assert stored_sizes(store) == {"large": 95}
    assert store.cache_stats()["evictions"] == 10
    await check_quiet(store)


async def test_value_replaced_or_deleted_frees_its_size(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=100)
    await fill(store, a=bytes(60), b=bytes(30))
    for size, total in [(10, 40), (70, 100), (101, 30), (0, 30), (70, 100)]:
        await write(store, "a", bytes(size))
        assert store.cache_info()["current_size"] == total
        await check_quiet(store)
    await store.delete("a")
    assert store.cache_info()["current_size"] == 30
    await fill(store, c=bytes(70))
    assert stored_sizes(store) == {"b": 30, "c": 70}
    await store.delete_dir("")
    assert store.cache_info()["current_size"] == 0
    # None of that was for want of room.
    assert store.cache_stats()["evictions"] == 0
    await check_quiet(store)


async def test_value_gone_from_the_source_frees_its_size(cache: Store, clock: FakeClock) -> None:
    source = MemoryStore()
    store = CacheStore(source, cache_store=cache, max_age_seconds=10, clock=clock)
    await fill(store, a=bytes(60))
    await source.delete("a")
    assert await read_through(store, "a") == bytes(60)  # Until it expires, this cannot be known.
    clock.advance(10)
    assert await read_through(store, "a") is None
    assert stored_sizes(store) == {}
    await check_quiet(store)


async def test_cache_set_data_false_caches_reads_only(cache: Store) -> None:
    source = StoreDouble(MemoryStore())
    store = CacheStore(source, cache_store=cache, cache_set_data=False)
    await fill(store, a=b"1")
    assert stored_sizes(store) == {}
    assert await read_through(store, "a") == b"1"
    assert stored_sizes(store) == {"a": 1}
    # What a write replaces is not served any longer either.
    await fill(store, a=b"22")
    assert stored_sizes(store) == {}
    source.take()
    assert await read_through(store, "a") == await read_through(store, "a") == b"22"
    assert source.take() == {"get": 1}
    await check_quiet(store)


# ---------------------------------------------------------------------------------- ages


@pytest.mark.parametrize("age", [10, 0.5, 0.001])
async def test_expired_value_is_read_anew(cache: Store, clock: FakeClock, age: float) -> None:
    source = StoreDouble(MemoryStore())
    store = CacheStore(source, cache_store=cache, max_age_seconds=age, clock=clock)
    await fill(store, a=b"1")
    clock.advance(age * 0.4)
    assert await read_through(store, "a") == b"1"
    clock.advance(age * 0.4)
    await source.inner.set("a", buf(b"22"))
    # A read makes it recent, not younger.
    assert await read_through(store, "a") == b"1"
    assert source.take() == {"set": 1}
    clock.advance(age * 0.21)
    assert await store.getsize("a") == 2
    assert await read_through(store, "a") == b"22"
    assert source.take() == {"getsize": 1, "get": 1}
    assert stored_sizes(store) == {"a": 2}
    clock.advance(age * 0.9)
    assert await read_through(store, "a") == b"22"
    assert source.take() == {}
    assert store.cache_stats()["evictions"] == 0
    await check_quiet(store)


async def test_max_age_infinity_never_expires(source: StoreDouble, clock: FakeClock) -> None:
    store = CacheStore(source, clock=clock)
    await fill(store, a=b"1")
    clock.advance(1e9)
    source.take()
    assert await read_through(store, "a") == b"1"
    assert source.take() == {}


async def test_max_age_zero_reads_every_time(source: StoreDouble, clock: FakeClock) -> None:
    store = CacheStore(source, max_age_seconds=0, clock=clock)
    await fill(store, a=b"1")
    source.take()
    for _ in range(3):
        assert await read_through(store, "a") == b"1"
    assert source.take() == {"get": 3}
    await check_quiet(store)


async def test_expired_byte_range_is_read_anew(source: StoreDouble, clock: FakeClock) -> None:
    store = CacheStore(source, max_age_seconds=10, cache_set_data=False, clock=clock)
    await fill(store, a=b"12345")
    assert await read_through(store, "a", RangeByteRequest(0, 2)) == b"12"
    await source.inner.set("a", buf(b"67890"))
    clock.advance(9)
    assert await read_through(store, "a", RangeByteRequest(0, 2)) == b"12"
    clock.advance(1)
    assert await read_through(store, "a", RangeByteRequest(0, 2)) == b"67"
    assert store.cache_info()["current_size"] == 2
    await check_quiet(store)


async def test_expired_entry_is_evicted_before_live_ones(cache: Store, clock: FakeClock) -> None:
    store = CacheStore(
        MemoryStore(), cache_store=cache, max_size=30, max_age_seconds=10, clock=clock
    )
    await fill(store, old=bytes(10))
    clock.advance(6)
    await fill(store, young=bytes(10), younger=bytes(10))
    await read_through(store, "old")  # most recently used, yet the next to expire
    clock.advance(5)
    await fill(store, new=bytes(10))
    assert stored_sizes(store) == {"young": 10, "younger": 10, "new": 10}
    stats = store.cache_stats()
    assert (stats["evictions"], stats["expirations"]) == (1, 1)
    await fill(store, newer=bytes(10))
    assert stored_sizes(store) == {"younger": 10, "new": 10, "newer": 10}
    stats = store.cache_stats()
    assert (stats["evictions"], stats["expirations"]) == (2, 1)
    await check_quiet(store)


async def test_expired_entries_that_a_smaller_bound_evicts_count_as_expirations(
    cache: Store, clock: FakeClock
) -> None:
    source = MemoryStore()
    store = CacheStore(source, cache_store=cache, max_age_seconds=10, clock=clock)
    await fill(store, a=bytes(10), b=bytes(10))
    clock.advance(6)
    await fill(store, c=bytes(10), d=bytes(10))
    clock.advance(5)
    smaller = CacheStore(source, cache_store=cache, max_size=10, max_age_seconds=10, clock=clock)
    await read(smaller, "d")  # In a store of another class the first operation sees the bound.
    await until(lambda: stored_sizes(store) == {"d": 10})
    stats = store.cache_stats()
    assert (stats["evictions"], stats["expirations"]) == (3, 2)
    await check_quiet(smaller)


async def test_expired_entry_frees_its_size_though_the_new_value_is_too_large(
    source: StoreDouble, clock: FakeClock
) -> None:
    store = CacheStore(source, max_size=100, max_age_seconds=10, clock=clock)
    await fill(store, a=bytes(100))
    await source.inner.set("a", buf(bytes(101)))
    clock.advance(10)
    assert await read_through(store, "a") == bytes(101)
    assert store.cache_info()["current_size"] == 0
    assert stored_sizes(store) == {}
    await check_quiet(store)


async def test_clock_set_back_serves_nothing_too_old(source: StoreDouble, clock: FakeClock) -> None:
    """An entry from a future that never was is read again, not kept for ever."""
    store = CacheStore(source, max_age_seconds=10, clock=clock)
    await fill(store, a=b"1")
    clock.advance(-900)
    source.take()
    assert await read_through(store, "a") == b"1"
    assert source.take() == {"get": 1}
    assert await read_through(store, "a") == b"1"
    assert source.take() == {}
    await check_quiet(store)
