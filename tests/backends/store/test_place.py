"""A cache store that outlives its process, but is no directory: what it holds is found by a listing."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, LoggingStore, MemoryStore

from support import (
    PROTOTYPE,
    buf,
    check_quiet,
    drained,
    drained_sync,
    fill,
    logged,
    read,
    read_through,
    sizes_of,
    write,
)
from zcache import CacheStore
from zcache.exceptions import CacheOwnershipError, SyncNotSupportedError
from zcache.testing import StoreDouble, check_invariants, is_complete, stored_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype


class Elsewhere(LocalStore):
    """A store of a kind that zcache does not know."""


def elsewhere(
    where: Path, source: Store | None = None, **options: Any
) -> tuple[CacheStore, StoreDouble, StoreDouble]:
    """A store, its source and its cache store."""
    cache = StoreDouble(Elsewhere(where / "elsewhere"))
    double = StoreDouble(source or LocalStore(where / "source"))
    if source is None:
        options = {"source_id": "source"} | options
    return CacheStore(double, cache_store=cache, **options), double, cache


async def opened(
    where: Path, source: Store | None = None, **options: Any
) -> tuple[CacheStore, StoreDouble, StoreDouble]:
    """The same, once it is listed."""
    store, double, cache = elsewhere(where, source, **options)
    await read(store, "unknown")
    await drained(store)
    double.take()
    return store, double, cache


async def test_open_again_is_listed_once_in_the_background(tmp_path: Path) -> None:
    store, _, _ = await opened(tmp_path, cache_set_data=False)
    await store.set("a", buf(b"0123456789"))
    await read_through(store, "a", RangeByteRequest(1, 4))
    await store.set("b", buf(b"22"))
    await read_through(store, "b")
    del store
    gc.collect()
    store, source, cache = elsewhere(tmp_path, max_size=10)
    assert cache.take() == {}  # The constructor asks nothing.
    assert store.cache_info()["cached_keys"] == 0
    gate = cache.block("list")
    # The listing takes as long as it takes; the source serves meanwhile.
    assert await asyncio.gather(*[read(store, "b") for _ in range(10)]) == [b"22"] * 10
    assert source.take()["get"] >= 1
    assert not is_complete(store)
    gate.release()
    await drained(store)
    calls = cache.take()
    assert (calls["list"], calls["getsize"]) == (1, 2)
    source.take()
    assert await read(store, "a", RangeByteRequest(1, 4)) == b"123"
    assert await read(store, "b") == b"22"
    assert source.take()["get"] == 0
    assert store.cache_info()["current_size"] == 5
    await write(store, "c", bytes(7))
    assert store.cache_info()["current_size"] <= 10
    await check_quiet(store)


async def test_value_without_a_date_is_stale_where_values_expire(tmp_path: Path) -> None:
    store, _, _ = await opened(tmp_path)
    await fill(store, a=b"1")
    del store
    gc.collect()
    store, source, _ = await opened(tmp_path, max_age_seconds=1e6)
    for _ in range(2):
        assert await read_through(store, "a") == b"1"
    assert source.take()["get"] == 1
    await check_quiet(store)


async def test_stamp_of_another_source_the_cache_store_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, _, _ = await opened(tmp_path, LocalStore(tmp_path / "source"), source_id="one")
    await fill(store, a=b"1")
    del store
    gc.collect()
    assert json.loads((tmp_path / "elsewhere/.zcache/stamp.json").read_text())["source"] == "one"
    store, other, _ = elsewhere(tmp_path, LocalStore(tmp_path / "other"), source_id="two")
    await other.inner.set("a", buf(b"2"))
    # Reads and writes go on; what waits for the cache store hears of it.
    assert await read(store, "a") == b"2"
    with pytest.raises(CacheOwnershipError, match="source_id='one'"):
        await store.drain()
    await store.set("a", buf(b"3"))
    assert await read(store, "a") == b"3"
    assert [record.levelno for record in logged(caplog)] == [logging.WARNING]
    assert (tmp_path / "elsewhere/a").read_bytes() == b"1"


async def test_stamp_missing_is_refused_unless_adopted(tmp_path: Path) -> None:
    store, _, _ = await opened(tmp_path)
    await fill(store, a=b"1")
    del store
    gc.collect()
    (tmp_path / "elsewhere/.zcache/stamp.json").unlink()
    store, _, _ = elsewhere(tmp_path)
    assert await read(store, "a") == b"1"
    with pytest.raises(CacheOwnershipError, match=r"adopt=True"):
        await store.drain()
    del store
    gc.collect()
    store, source, _ = await opened(tmp_path, adopt=True)
    assert await read(store, "a") == b"1"
    assert source.take()["get"] == 0
    await check_quiet(store)


async def test_source_without_a_name_starts_cold(tmp_path: Path) -> None:
    store, _, _ = await opened(tmp_path, MemoryStore())
    await fill(store, a=b"1")
    del store
    gc.collect()
    store, _, _ = elsewhere(tmp_path, MemoryStore())
    assert await read_through(store, "a") is None
    assert stored_sizes(store) == {}
    await check_quiet(store)


async def test_listing_fails_the_source_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, source, cache = elsewhere(tmp_path)
    cache.fail("list", OSError("no"))
    for _ in range(10):
        await write(store, "a", b"1")
        assert await read_through(store, "a") == b"1"
    assert source.calls["get"] == 10
    assert stored_sizes(store) == {}
    assert len(logged(caplog)) <= 1


async def test_store_in_memory_wrapped_twice_belongs_to_one_source() -> None:
    """Each wrapper of a user's own is a place of its own, but the values behind them are the same."""
    inner = MemoryStore()
    sources = [MemoryStore(), MemoryStore()]
    for source, value in zip(sources, (b"one", b"two"), strict=True):
        await source.set("a", buf(value))
    store = CacheStore(sources[0], cache_store=StoreDouble(inner))
    assert await read_through(store, "a") == b"one"
    assert [name async for name in inner.list()] == ["a"]
    for cache in (StoreDouble(inner), inner):
        with pytest.raises(CacheOwnershipError, match=r"holds the cache of|is not empty"):
            CacheStore(sources[1], cache_store=cache)
    assert await read(store, "a") == b"one"
    del store
    gc.collect()


def test_first_use_without_an_event_loop_is_listed_as_well(tmp_path: Path) -> None:
    for first in (True, False):
        # `LocalStore` has synchronous methods from zarr 3.2 on.
        store, source, _ = elsewhere(tmp_path)
        if not getattr(source, "_supports_sync_io", False):
            pytest.skip("this zarr reads only from event loops")
        store.get_sync("unknown")
        drained_sync(store)
        if first:
            store.set_sync("a", buf(b"1"))
            drained_sync(store)
        source.take()
        found = store.get_sync("a")
        assert found is not None
        assert found.to_bytes() == b"1"
        drained_sync(store)
        assert store.cache_info()["cached_keys"] == 1
        assert source.take()["get"] == 0
        del store
        gc.collect()


class Coded(MemoryStore):
    """Keeps its values in another form than it was given, and counts what it is asked."""

    asked = 0

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self.asked += 1
        value = await super().get(key, prototype, byte_range)
        return None if value is None else turned(value)

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        await super().set(key, turned(value), byte_range)


def turned(value: Buffer) -> Buffer:
    return buf(bytes(255 - byte for byte in value.to_bytes()))


async def test_store_of_an_own_class_in_memory_is_asked_by_its_methods() -> None:
    source, cache = MemoryStore({"a": buf(b"value"), "b": buf(b"other")}), Coded()
    store = CacheStore(source, cache_store=cache, max_size=8)
    assert await read(store, "a") == b"value"
    assert await store.drain()
    assert sizes_of(cache) == {"a": 5}
    assert cache._store_dict["a"].to_bytes() == turned(buf(b"value")).to_bytes()
    before = cache.asked
    assert await read(store, "a") == b"value"
    assert cache.asked == before + 1
    assert store.cache_stats()["hits"] == 1
    assert await read(store, "b") == b"other"
    assert await store.drain()
    assert list(cache._store_dict) == ["b"]
    check_invariants(store)


def test_store_of_an_own_class_with_coroutines_alone_is_not_read_past_them() -> None:
    source = MemoryStore({"a": buf(b"value")})
    for cache in (Coded(), LoggingStore(Coded(), log_level="ERROR")):
        store = CacheStore(source, cache_store=cache)
        assert not store._supports_sync_io
        with pytest.raises(SyncNotSupportedError, match="the cache store"):
            store.get_sync("a", prototype=PROTOTYPE)


def test_dict_of_a_store_of_an_own_class_is_no_other_cache_store(tmp_path: Path) -> None:
    source = LocalStore(tmp_path)
    values: dict[str, Buffer] = {}
    for first, second in ((Coded, MemoryStore), (MemoryStore, Coded)):
        store = CacheStore(source, cache_store=first(values))
        with pytest.raises(CacheOwnershipError, match="has the dict of another store"):
            CacheStore(source, cache_store=second(values))
        del store
        gc.collect()


def test_store_of_an_own_class_is_not_adopted(tmp_path: Path) -> None:
    cache = Coded({"a": buf(b"value")})
    with pytest.raises(CacheOwnershipError, match=r"is not empty .* cannot be adopted"):
        CacheStore(LocalStore(tmp_path), cache_store=cache, adopt=True)
