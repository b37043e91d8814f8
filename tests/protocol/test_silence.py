"""A cache store, or a source, that never answers holds up nothing but what asked for it."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import LocalStore, MemoryStore

from doubles import DictStore, GatedStore, reached
from support import (
    buf,
    listed,
    read,
    read_through,
    until,
)
from zcache import CacheStore
from zcache._backends import base
from zcache._backends.listings import DirectoryListings
from zcache._index.handle import ignore
from zcache._runtime.threads import THREADS
from zcache.testing import (
    FakeClock,
    StoreDouble,
    in_flight,
)

if TYPE_CHECKING:
    from pathlib import Path

VALUE = bytes(range(100))
SOURCE = {f"{n}": bytes([n]) * 100 for n in range(20)}
BOUNDED = 30
"""Seconds far above every documented limit: a test that takes longer has found an endless wait."""


@pytest.fixture
def cache() -> StoreDouble:
    return StoreDouble(MemoryStore())


@pytest.fixture
def source() -> DictStore:
    return DictStore(SOURCE)


@pytest.mark.parametrize("operation", ["get", "set", "delete", "exists", "list", "getsize"])
async def test_cache_store_that_never_answers_costs_no_read(
    operation: str, source: DictStore, cache: StoreDouble
) -> None:
    store = CacheStore(source, cache_store=cache, max_size=250)
    for key in "123":
        await read_through(store, key)
    cache.hang(operation)

    async def use() -> None:
        for _ in range(2):
            for key, value in SOURCE.items():
                assert await read(store, key) == value
        await store.set("1", buf(VALUE))
        assert await read(store, "1") == VALUE
        await store.delete("2")
        assert await read(store, "2") is None

    await asyncio.wait_for(use(), BOUNDED)
    cache.heal()
    await store.drain()
    await until(lambda: in_flight(store) == (0, 0))
    assert await read(store, "1") == VALUE
    assert await read(store, "2") is None


async def test_no_write_waits_for_deletes_that_were_not_answered_before(
    source: DictStore, cache: StoreDouble, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CacheStore(source, cache_store=cache, clock=clock)
    for key in SOURCE:
        await read_through(store, key)
    cache.hang("delete")
    await store.set("1", buf(VALUE))
    # Now the cache store is known to be ill. A write that waits for it would not end, also once it may be tried again.
    monkeypatch.setattr("zcache._backends.store.backend.DELETE_TIMEOUT", 3600)

    async def use() -> None:
        for key in SOURCE:
            clock.advance(61)
            await store.set(key, buf(VALUE))
            assert await read(store, key) == VALUE

    await asyncio.wait_for(use(), BOUNDED)
    cache.heal()
    await store.drain()


@pytest.mark.parametrize("operation", ["get", "set", "delete", "exists", "list", "getsize"])
async def test_cache_store_that_is_silent_from_its_first_use_costs_no_read(
    operation: str, source: DictStore, tmp_path: Any
) -> None:
    """One that has to be listed first: reads go to the source meanwhile."""
    cache = StoreDouble(LocalStore(tmp_path))
    cache.hang(operation)
    store = CacheStore(source, cache_store=cache, source_id="s", max_size=250)

    async def use() -> None:
        for key, value in SOURCE.items():
            assert await read(store, key) == value

    await asyncio.wait_for(use(), BOUNDED)
    cache.heal()


async def test_source_that_never_answers_holds_up_its_own_readers_only() -> None:
    source = GatedStore(SOURCE)
    store = CacheStore(source)
    await read_through(store, "1")
    source.shut["get"] = 1
    waiting = asyncio.ensure_future(read(store, "2"))
    await reached(source)
    assert await read(store, "1") == SOURCE["1"]
    assert await read(store, "3") == SOURCE["3"]
    await asyncio.wait_for(store.drain(), BOUNDED)
    assert not waiting.done()
    source.release()
    assert await waiting == SOURCE["2"]


class CutOffStore(DictStore):
    """Fails where its reads are cut off in the middle."""

    hangs = False

    async def get(self, *args: Any, **options: Any) -> Any:
        if not self.hangs:
            return await super().get(*args, **options)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError("cut off") from None


async def test_error_of_a_hit_that_was_cancelled_is_no_business_of_the_event_loop(
    source: DictStore,
) -> None:
    cache = CutOffStore()
    store = CacheStore(source, cache_store=cache)
    await read_through(store, "1")
    said: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    cache.hangs = True
    reader = asyncio.ensure_future(read(store, "1"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()
    assert said == []


def test_hit_that_is_collected_with_its_event_loop_ends_quietly(
    source: DictStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    cache = CutOffStore()
    store = CacheStore(source, cache_store=cache)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(read_through(store, "1"))
    cache.hangs = True
    reader = loop.create_task(read(store, "1"))
    loop.run_until_complete(asyncio.sleep(0.01))
    assert not reader.done()
    loop.close()
    del reader, loop
    gc.collect()
    assert [one.exc_value for one in said] == []


class SlowStore(DictStore):
    """Takes a moment for each read."""

    async def get(self, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(0.2)
        return await super().get(*args, **options)


async def test_large_value_has_the_time_that_its_bytes_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a slow disk does not read in a second would never be served."""
    monkeypatch.setattr(base, "READ_TIMEOUT", 0.02)
    monkeypatch.setattr(base, "READ_RATE", 2**14)
    values = {"large": bytes(2**20), "small": VALUE}
    source = DictStore(values)
    store = CacheStore(source, cache_store=SlowStore())
    for key in values:
        await read_through(store, key)
    asked = source.counts["get"]
    assert await read(store, "large") == values["large"]
    assert source.counts["get"] == asked
    assert await read(store, "small") == VALUE
    assert source.counts["get"] == asked + 1


async def test_listing_that_the_cache_store_never_answers_opens_the_circuit_breaker(
    tmp_path: Path,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = DictStore({"a/b": VALUE, "a/c": VALUE})
    store = CacheStore(source, cache_store=LocalStore(tmp_path), source_id="source", clock=clock)
    assert await listed(store.list_dir("a")) == ["b", "c"]
    answers = threading.Event()
    begin = DirectoryListings.begin

    def late(listings: DirectoryListings, directory: str) -> Any:
        answers.wait(60)
        return begin(listings, directory)

    monkeypatch.setattr(DirectoryListings, "begin", late)
    try:
        for _ in range(5):
            assert await listed(store.list_dir("a")) == ["b", "c"]
        assert store.cache_stats()["cache_failures"] == 1
        assert caplog.text.count("no answer within") == 1
        # Reads go on.
        for _ in range(2):
            assert await read(store, "a/b") == VALUE
            await store.drain()
        assert store.cache_stats()["hits"] == 1
    finally:
        answers.set()
    # It is tried again.
    clock.advance(2)
    caplog.set_level("INFO", "zcache")
    assert await listed(store.list_dir("a")) == ["b", "c"]
    assert "works again" in caplog.text


async def test_cache_directory_that_never_answers_stops_no_other(tmp_path: Path) -> None:
    large = bytes(5 * 2**20)  # Threads read it.
    source = DictStore({"k": large})
    hangs, store = (
        CacheStore(source, cache_store=LocalStore(tmp_path / name), source_id="source")
        for name in "ab"
    )
    await read_through(store, "k")
    go = threading.Event()
    for _ in range(2 * THREADS):
        with pytest.raises(TimeoutError):
            await hangs._io.in_thread(go.wait, ignore, 0.0)
    asked = source.counts["get"]
    assert await read(store, "k") == large
    assert source.counts["get"] == asked
    go.set()
