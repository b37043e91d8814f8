"""Cache stores that can only be asked what they hold, and fail when they are."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import LocalStore

from coherence_support import (
    CacheStore,
    FaultyStore,
    SyncDictStore,
    ask,
    buf,
    index_of,
    read,
    value_sync,
)
from support import Clock
from zcache import _breaker, _core

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

SOURCE = {f"{d}{n}": bytes([65 + n]) * 10 for d in ("", "d/") for n in range(3)}


class Remote(FaultyStore):
    """A store that outlives its process, as those of zarr do; a listing may fail in the middle."""

    __module__ = "zarr.storage._remote"

    async def list(self) -> AsyncIterator[str]:
        self.counts["list"] += 1
        await self.before("list", "")
        async for key in super().list():
            yield key
        await self.after("list", "", None)

    async def getsize(self, key: str) -> int:
        size: int = await self._do("getsize", key, lambda: len(self.values[key]))
        return size


ERRORS: list[Callable[[], Exception]] = [
    lambda: OSError(5, "input/output error"),
    lambda: OSError(22, "invalid argument"),
    lambda: ValueError("a library's own"),
    TimeoutError,
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    NotImplementedError,
]


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_breaker, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def source() -> SyncDictStore:
    return SyncDictStore(SOURCE)


def make(source: SyncDictStore, cache: Remote, **options: Any) -> CacheStore:
    return CacheStore(source, cache_store=cache, source_id="a source", **options)


async def filled(source: SyncDictStore) -> Remote:
    """What another process has left behind."""
    cache = Remote()
    store = make(source, cache)
    for key, value in SOURCE.items():
        assert await read(store, key) == value
    cache.counts.clear()
    return cache


def held(cache: Remote) -> dict[str, bytes]:
    return {key: value for key, value in cache.values.items() if not key.startswith(".zcache/s")}


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", ["list", "getsize", "get", "set"])
async def test_a_listing_that_fails_is_left_alone_and_tried_again(
    source: SyncDictStore,
    operation: str,
    error: Callable[[], Exception],
    sync: bool,
    pause: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = Remote() if operation == "set" else await filled(source)
    store = make(source, cache, max_size=100)
    cache.plan = lambda at, *_: error() if at == operation else None

    async def reads() -> None:
        for key, value in SOURCE.items():
            found = (
                await asyncio.to_thread(value_sync, store, key) if sync else await read(store, key)
            )
            assert found == value

    for _ in range(4):
        await reads()
    assert cache.counts[operation] <= _breaker.FAILURES_TO_OPEN * len(SOURCE)
    before = cache.counts.total()
    await reads()
    assert cache.counts.total() == before
    pause.advance(1.01)
    await reads()
    assert cache.counts.total() > before
    stats = store.cache_stats()
    assert stats["cache_failures"] == _breaker.FAILURES_TO_OPEN + 1
    assert stats["cache_skips"] > 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert held(cache) == ({} if operation == "set" else SOURCE)
    cache.plan = lambda *_: None
    pause.advance(100)
    counted = source.counts["get"]
    await reads()
    assert source.counts["get"] == counted + (len(SOURCE) if operation == "set" else 0)
    assert store.cache_stats()["hits"] > 0 or operation == "set"
    ask(store, lambda index: index.validate())
    assert store.cache_info()["current_size"] == sum(map(len, held(cache).values())) == 60


CHANGES: dict[str, Callable[[CacheStore], Any]] = {
    "set": lambda store: store.set("1", buf(b"new")),
    "set_sync": lambda store: asyncio.to_thread(store.set_sync, "1", buf(b"new")),
    "delete": lambda store: store.delete("1"),
    "delete_sync": lambda store: asyncio.to_thread(store.delete_sync, "1"),
    "delete_dir": lambda store: store.delete_dir("d"),
    "clear": lambda store: store.clear(),
    "clear_cache": lambda store: store.clear_cache(),
    "strange": lambda store: store.set("d/../1", buf(b"new")),
}


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_what_was_changed_meanwhile_is_not_served_later(
    source: SyncDictStore,
    change: Callable[[CacheStore], Any],
    many: bool,
    pause: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if many:
        monkeypatch.setattr("zcache._standins._LARGEST", 0)
    cache = await filled(source)
    store = make(source, cache, max_size=100)
    cache.plan = lambda *_: OSError(5, "down")
    await change(store)
    for key in SOURCE:
        assert await read(store, key) == source.values.get(key)
    cache.plan = lambda *_: None
    pause.advance(100)
    for _ in range(2):
        for key in SOURCE:
            assert await read(store, key) == source.values.get(key)
    assert {key: source.values.get(key) for key in held(cache)} == held(cache)
    index_of(store).validate()
    assert store.cache_info()["current_size"] == sum(map(len, held(cache).values()))


async def test_what_cannot_be_deleted_then_is_not_served_either(
    source: SyncDictStore, pause: Clock
) -> None:
    cache = await filled(source)
    store = make(source, cache)
    cache.plan = lambda *_: OSError(5, "down")
    await store.set("1", buf(b"new"))
    cache.plan = lambda at, *_: OSError(5, "down") if at in ("delete", "exists") else None
    for turn in range(8):
        assert await read(store, "1") == b"new"
        if turn == 4:
            cache.plan = lambda *_: None
        pause.advance(100)
    assert held(cache)["1"] == b"new"
    assert store.cache_info()["current_size"] == sum(map(len, held(cache).values()))


async def test_a_write_that_goes_on_while_it_is_listed(source: SyncDictStore, pause: Clock) -> None:
    cache = await filled(source)
    store = make(source, cache)
    begun, go = asyncio.Event(), asyncio.Event()

    async def before(operation: str, key: str) -> None:
        if operation == "set":
            begun.set()
            await go.wait()

    source.before = before  # type: ignore[method-assign]
    cache.plan = lambda *_: OSError(5, "down")
    write = asyncio.create_task(store.set("1", buf(b"new")))
    await begun.wait()
    cache.plan = lambda *_: None
    pause.advance(100)
    assert await read(store, "0") == SOURCE["0"]
    assert await read(store, "1") == SOURCE["1"]
    assert store.cache_info()["cached_keys"] >= len(SOURCE) - 1
    go.set()
    await write
    for _ in range(2):
        assert await read(store, "1") == b"new"
    index_of(store).validate()


async def test_a_forked_child_knows_what_was_changed(source: SyncDictStore, pause: Clock) -> None:
    cache = await filled(source)
    store = make(source, cache)
    cache.plan = lambda *_: OSError(5, "down")
    await store.set("1", buf(b"new"))
    cache.plan = lambda *_: None
    store._engine.after_fork()
    for _ in range(2):
        assert await read(store, "1") == b"new"


async def test_many_at_once_make_one_attempt(source: SyncDictStore, pause: Clock) -> None:
    cache = await filled(source)
    store = make(source, cache)

    async def before(operation: str, key: str) -> None:
        await asyncio.sleep(0.01)
        raise OSError(5, "down")

    cache.before = before  # type: ignore[method-assign]
    found = await asyncio.gather(*[read(store, key) for key in SOURCE for _ in range(20)])
    assert found == [value for value in SOURCE.values() for _ in range(20)]
    assert store.cache_stats()["cache_failures"] == 1


def test_the_store_is_one_that_is_listed(tmp_path: Path) -> None:
    """Or else this file tests nothing."""
    store = make(SyncDictStore(SOURCE), Remote())
    assert not isinstance(index_of(store), _core.Index)
    assert isinstance(
        index_of(CacheStore(SyncDictStore(), cache_store=LocalStore(tmp_path))), _core.Index
    )
