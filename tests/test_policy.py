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

from support import (
    PROTOTYPE,
    CountingStore,
    WatchedDict,
    WatchedStore,
    buf,
    check_books,
    fill,
    held,
    read,
)
from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from zarr.abc.store import Store

    from support import Clock


def make(max_size: int | None, **options: object) -> CacheStore:
    """A store whose source counts what reaches it."""
    return CacheStore(CountingStore(MemoryStore()), max_size=max_size, **options)  # type: ignore[arg-type]


def source_of(store: CacheStore) -> CountingStore:
    assert isinstance(store._store, CountingStore)
    return store._store


@pytest.fixture(params=["memory", "local", "wrapped"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Cache stores that take each their own way through the code."""
    if request.param == "local":
        return LocalStore(tmp_path / "cache")
    return MemoryStore() if request.param == "memory" else WatchedStore(MemoryStore())


# ----------------------------------------------------------------------------------- LRU


async def test_reads_refresh(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30)
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await read(store, "a")
    await fill(store, d=bytes(10))
    assert held(cache) == {"a": 10, "c": 10, "d": 10}
    await read(store, "b")  # a miss, which is filled
    assert held(cache) == {"a": 10, "b": 10, "d": 10}
    assert store.cache_stats()["evictions"] == 2
    check_books(store)


async def test_writes_refresh(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30)
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await fill(store, a=bytes(9))
    await fill(store, d=bytes(10))
    assert held(cache) == {"a": 9, "c": 10, "d": 10}
    assert store.cache_stats()["evictions"] == 1
    check_books(store)


async def test_partial_reads_refresh(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30)
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await read(store, "a", RangeByteRequest(2, 4))
    await store.get_partial_values(PROTOTYPE, [("b", None)])
    await fill(store, d=bytes(10))
    assert held(cache) == {"a": 10, "b": 10, "d": 10}
    await fill(store, e=bytes(10))
    assert held(cache) == {"b": 10, "d": 10, "e": 10}
    check_books(store)


async def test_questions_do_not_refresh(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30)
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    assert await store.exists("a")
    assert await store.getsize("a") == 10
    await fill(store, d=bytes(10))
    assert "a" not in held(cache)


SIZES = st.integers(0, 12)
STEPS = st.lists(
    st.tuples(st.sampled_from(["read", "write", "delete"]), st.sampled_from("abcdefg"), SIZES),
    max_size=60,
)


@given(max_size=st.integers(0, 30), steps=STEPS)
@settings(max_examples=200)
def test_order_is_exact(max_size: int, steps: Sequence[tuple[str, str, int]]) -> None:
    """After each step the cache holds what the textbook's LRU cache holds, in its order."""
    store = CacheStore(MemoryStore(), max_size=max_size)
    model: OrderedDict[str, int] = OrderedDict()
    source: dict[str, int] = {}
    evictions = 0

    def keep(key: str, size: int) -> None:
        nonlocal evictions
        model.pop(key, None)
        if size > max_size:
            return
        while sum(model.values()) + size > max_size:
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
        assert [key for key, _ in store._engine.index.recency()] == list(model)
        assert held(store._cache) == model
        assert store.cache_stats()["evictions"] == evictions
        check_books(store)


# ------------------------------------------------------------------------------ the bound


@pytest.mark.parametrize("kind", ["memory", "wrapped"])
async def test_bound_holds_at_each_instant(kind: str) -> None:
    """Watched from inside: room is made first, bytes are written second."""
    inside = WatchedDict() if kind == "memory" else WatchedStore(MemoryStore())
    cache = MemoryStore(inside) if isinstance(inside, WatchedDict) else inside
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=100)
    dice = random.Random(0)
    for _ in range(500):
        key = f"{dice.choice('ab')}/{dice.randrange(20)}"
        if dice.random() < 0.5:
            await store.set(key, buf(bytes(dice.randrange(130))))
        else:
            await read(store, key)
    assert store.cache_stats()["evictions"] > 100
    assert 80 < inside.peak <= 100
    check_books(store)


@pytest.mark.parametrize("kind", ["memory", "wrapped"])
async def test_too_large_never_reaches_the_cache_store(kind: str) -> None:
    inside = WatchedDict() if kind == "memory" else WatchedStore(MemoryStore())
    cache = MemoryStore(inside) if isinstance(inside, WatchedDict) else inside
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=10)
    await fill(store, small=bytes(10), large=bytes(11))
    for _ in range(2):
        assert await read(store, "large") == bytes(11)
    assert await store.getsize("large") == 11
    assert inside.written == ["small"]
    assert inside.peak == 10
    # Nothing had to go for it.
    assert store.cache_stats()["evictions"] == 0
    assert await read(store, "small") == bytes(10)
    assert store.cache_stats()["hits"] == 1
    # A range of it is small enough, and an entry of its own.
    assert await read(store, "large", RangeByteRequest(0, 4)) == bytes(4)
    assert len(inside.written) == 2
    assert store.cache_info()["current_size"] == 4
    check_books(store)


async def test_no_room_at_all(cache: Store) -> None:
    store = CacheStore(CountingStore(MemoryStore()), cache_store=cache, max_size=0)
    await fill(store, a=b"1", empty=b"")
    for _ in range(2):
        assert await read(store, "a") == b"1"
        assert await read(store, "empty") == b""
    assert held(cache) == {"empty": 0}
    assert source_of(store).take() == {"set": 2, "get": 2}
    check_books(store)


async def test_no_bound(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache)
    for number in range(200):
        await store.set(f"c/{number}", buf(bytes(1000)))
    assert store.cache_info()["current_size"] == 200_000
    assert store.cache_stats()["evictions"] == 0
    check_books(store)


async def test_one_value_may_push_out_many(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=100)
    await fill(store, **{f"k{number}": bytes(10) for number in range(10)})
    await fill(store, large=bytes(95))
    assert held(cache) == {"large": 95}
    assert store.cache_stats()["evictions"] == 10
    check_books(store)


async def test_replaced_and_deleted_values_free_their_size(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=100)
    await fill(store, a=bytes(60), b=bytes(30))
    for size, total in [(10, 40), (70, 100), (101, 30), (0, 30), (70, 100)]:
        await store.set("a", buf(bytes(size)))
        assert store.cache_info()["current_size"] == total
        check_books(store)
    await store.delete("a")
    assert store.cache_info()["current_size"] == 30
    await fill(store, c=bytes(70))
    assert held(cache) == {"b": 30, "c": 70}
    await store.delete_dir("")
    assert store.cache_info()["current_size"] == 0
    # None of that was for want of room.
    assert store.cache_stats()["evictions"] == 0
    check_books(store)


async def test_what_the_source_has_lost_frees_its_size(cache: Store, clock: Clock) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_age_seconds=10)
    await fill(store, a=bytes(60))
    await store._store.delete("a")
    assert await read(store, "a") == bytes(60)  # Until it expires, nobody can know.
    clock.advance(10)
    assert await read(store, "a") is None
    assert held(cache) == {}
    check_books(store)


async def test_cache_set_data_false(cache: Store) -> None:
    source = CountingStore(MemoryStore())
    store = CacheStore(source, cache_store=cache, cache_set_data=False)
    await fill(store, a=b"1")
    assert held(cache) == {}
    assert await read(store, "a") == b"1"
    assert held(cache) == {"a": 1}
    # What a write replaces is not served any longer either.
    await fill(store, a=b"22")
    assert held(cache) == {}
    source.take()
    assert await read(store, "a") == await read(store, "a") == b"22"
    assert source.take() == {"get": 1}
    check_books(store)


# ---------------------------------------------------------------------------------- ages


@pytest.mark.parametrize("age", [10, 0.5, 0.001])
async def test_expiry(cache: Store, clock: Clock, age: float) -> None:
    source = CountingStore(MemoryStore())
    store = CacheStore(source, cache_store=cache, max_age_seconds=age)
    await fill(store, a=b"1")
    clock.advance(age * 0.4)
    assert await read(store, "a") == b"1"
    clock.advance(age * 0.4)
    await source._store.set("a", buf(b"22"))
    # A read makes it recent, not younger.
    assert await read(store, "a") == b"1"
    assert source.take() == {"set": 1}
    clock.advance(age * 0.21)
    assert await store.getsize("a") == 2
    assert await read(store, "a") == b"22"
    assert source.take() == {"getsize": 1, "get": 1}
    assert held(cache) == {"a": 2}
    clock.advance(age * 0.9)
    assert await read(store, "a") == b"22"
    assert source.take() == {}
    assert store.cache_stats()["evictions"] == 0
    check_books(store)


async def test_infinity_never_expires(clock: Clock) -> None:
    store = make(None)
    await fill(store, a=b"1")
    clock.advance(1e9)
    source_of(store).take()
    assert await read(store, "a") == b"1"
    assert source_of(store).take() == {}


async def test_age_zero_keeps_nothing_fresh(clock: Clock) -> None:
    store = make(None, max_age_seconds=0)
    await fill(store, a=b"1")
    source_of(store).take()
    for _ in range(3):
        assert await read(store, "a") == b"1"
    assert source_of(store).take() == {"get": 3}
    check_books(store)


async def test_expired_ranges(clock: Clock) -> None:
    store = make(None, max_age_seconds=10, cache_set_data=False)
    await fill(store, a=b"12345")
    assert await read(store, "a", RangeByteRequest(0, 2)) == b"12"
    await source_of(store)._store.set("a", buf(b"67890"))
    clock.advance(9)
    assert await read(store, "a", RangeByteRequest(0, 2)) == b"12"
    clock.advance(1)
    assert await read(store, "a", RangeByteRequest(0, 2)) == b"67"
    assert store.cache_info()["current_size"] == 2
    check_books(store)


async def test_expired_go_before_live_ones(cache: Store, clock: Clock) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30, max_age_seconds=10)
    await fill(store, old=bytes(10))
    clock.advance(6)
    await fill(store, young=bytes(10), younger=bytes(10))
    await read(store, "old")  # most recently used, yet the next to expire
    clock.advance(5)
    await fill(store, new=bytes(10))
    assert held(cache) == {"young": 10, "younger": 10, "new": 10}
    stats = store.cache_stats()
    assert (stats["evictions"], stats["expirations"]) == (1, 1)
    await fill(store, newer=bytes(10))
    assert held(cache) == {"younger": 10, "new": 10, "newer": 10}
    stats = store.cache_stats()
    assert (stats["evictions"], stats["expirations"]) == (2, 1)
    check_books(store)


async def test_expired_frees_its_size_though_the_new_value_is_too_large(clock: Clock) -> None:
    store = make(100, max_age_seconds=10)
    await fill(store, a=bytes(100))
    await source_of(store)._store.set("a", buf(bytes(101)))
    clock.advance(10)
    assert await read(store, "a") == bytes(101)
    assert store.cache_info()["current_size"] == 0
    assert held(store._cache) == {}
    check_books(store)


async def test_clock_that_steps_backwards(clock: Clock) -> None:
    """An entry from a future that never was is read again, not kept for ever."""
    store = make(None, max_age_seconds=10)
    await fill(store, a=b"1")
    clock.advance(-900)
    source_of(store).take()
    assert await read(store, "a") == b"1"
    assert source_of(store).take() == {"get": 1}
    assert await read(store, "a") == b"1"
    assert source_of(store).take() == {}
    check_books(store)
