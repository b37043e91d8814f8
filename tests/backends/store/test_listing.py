"""Cache stores that can only be asked what they hold, and fail when they are."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest

from doubles import FaultyStore, SyncDictStore
from support import buf, logged, read, read_through, said, until, value_sync
from zcache import CacheStore, OfflineError
from zcache._backends.store.listing import WRITING
from zcache._backends.tombstones import DROPPED, tombstone
from zcache.testing import FakeClock, check_invariants_async, is_complete

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SOURCE = {f"{d}{n}": bytes([65 + n]) * 10 for d in ("", "d/") for n in range(3)}


FAILURES_TO_OPEN = 5


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
def source() -> SyncDictStore:
    return SyncDictStore(SOURCE)


def make(source: SyncDictStore, cache: Remote, **options: Any) -> CacheStore:
    return CacheStore(source, cache_store=cache, source_id="a source", **options)


async def settled(store: CacheStore) -> None:
    """Wait for a listing and for fills."""
    await store.drain()


async def filled(source: SyncDictStore) -> Remote:
    """What another process has left behind."""
    cache = Remote()
    store = make(source, cache)
    await settled(store)
    for key, value in SOURCE.items():
        assert await read_through(store, key) == value
    cache.counts.clear()
    return cache


def held(cache: Remote) -> dict[str, bytes]:
    return {key: value for key, value in cache.values.items() if not key.startswith(".zcache/s")}


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", ["list", "getsize", "get", "set"])
async def test_listing_fails_is_tried_again_after_a_pause(
    source: SyncDictStore,
    operation: str,
    error: Callable[[], Exception],
    sync: bool,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = Remote() if operation == "set" else await filled(source)
    store = make(source, cache, max_size=100, clock=clock)
    cache.plan = lambda at, *_: error() if at == operation else None

    async def reads() -> None:
        for key, value in SOURCE.items():
            found = (
                await asyncio.to_thread(value_sync, store, key) if sync else await read(store, key)
            )
            assert found == value
            await settled(store)

    for _ in range(3):
        await reads()
    before = cache.counts.total()
    assert cache.counts[operation] <= FAILURES_TO_OPEN * len(SOURCE)
    await reads()
    assert cache.counts.total() == before
    clock.advance(1.01)
    await reads()
    assert cache.counts.total() > before
    stats = store.cache_stats()
    assert stats["cache_failures"] in (2, FAILURES_TO_OPEN + 1)  # After a time-out at once.
    assert stats["cache_skips"] > 0
    assert [record.levelno for record in logged(caplog)] == [logging.WARNING]
    assert held(cache) == ({} if operation == "set" else SOURCE)
    cache.plan = lambda *_: None
    clock.advance(100)
    await settled(store)
    await reads()
    counted = source.counts["get"]
    await reads()
    assert source.counts["get"] == counted
    assert store.cache_stats()["hits"] > 0
    await check_invariants_async(store)
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


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_listing_incomplete_a_change_is_not_undone(
    source: SyncDictStore, change: Callable[[CacheStore], Any], clock: FakeClock
) -> None:
    cache = await filled(source)
    store = make(source, cache, max_size=100, clock=clock)
    cache.plan = lambda *_: OSError(5, "down")
    await change(store)
    for key in SOURCE:
        assert await read_through(store, key) == source.values.get(key)
    cache.plan = lambda *_: None
    clock.advance(100)
    await settled(store)
    for _ in range(2):
        for key in SOURCE:
            assert await read_through(store, key) == source.values.get(key)
    assert {key: source.values.get(key) for key in held(cache)} == held(cache)
    await check_invariants_async(store)


async def test_listing_incomplete_delete_refused_is_not_served(
    source: SyncDictStore, clock: FakeClock
) -> None:
    cache = await filled(source)
    store = make(source, cache, clock=clock)
    cache.plan = lambda *_: OSError(5, "down")
    await store.set("1", buf(b"new"))
    cache.plan = lambda at, *_: OSError(5, "down") if at in ("delete", "exists") else None
    for turn in range(8):
        assert await read_through(store, "1") == b"new"
        if turn == 4:
            cache.plan = lambda *_: None
        clock.advance(100)
    assert held(cache)["1"] == b"new"
    assert store.cache_info()["current_size"] == sum(map(len, held(cache).values()))


async def test_listing_during_a_write_keeps_the_older_value_out(
    source: SyncDictStore, clock: FakeClock
) -> None:
    cache = await filled(source)
    store = make(source, cache, clock=clock)
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
    clock.advance(100)
    await settled(store)
    assert await read_through(store, "0") == SOURCE["0"]
    assert await read_through(store, "1") == SOURCE["1"]
    assert store.cache_info()["cached_keys"] >= len(SOURCE) - 1
    go.set()
    await write
    for _ in range(2):
        assert await read_through(store, "1") == b"new"
    await check_invariants_async(store)


async def test_listing_under_way_reads_go_to_the_source(source: SyncDictStore) -> None:
    cache = await filled(source)
    store = make(source, cache)
    go = asyncio.Event()

    async def before(operation: str, key: str) -> None:
        if operation == "list":
            await go.wait()

    cache.before = before  # type: ignore[method-assign]
    counted = source.counts["get"]
    for key, value in SOURCE.items():
        assert await read(store, key) == value
    assert source.counts["get"] == counted + len(SOURCE)
    assert store.cache_info()["cached_keys"] == 0
    go.set()
    await settled(store)
    assert store.cache_info()["cached_keys"] == len(SOURCE)
    for key, value in SOURCE.items():
        assert await read(store, key) == value
    assert source.counts["get"] == counted + len(SOURCE)


async def test_listing_many_reads_at_once_make_one(source: SyncDictStore) -> None:
    cache = await filled(source)
    store = make(source, cache)

    async def before(operation: str, key: str) -> None:
        await asyncio.sleep(0.01)
        raise OSError(5, "down")

    cache.before = before  # type: ignore[method-assign]
    found = await asyncio.gather(*[read(store, key) for key in SOURCE for _ in range(20)])
    assert found == [value for value in SOURCE.values() for _ in range(20)]
    await until(lambda: store.cache_stats()["cache_failures"])
    assert cache.counts.total() == store.cache_stats()["cache_failures"] == 1


async def test_a_listed_store_of_another_source_is_refused_by_drain(
    source: SyncDictStore, caplog: pytest.LogCaptureFixture
) -> None:
    cache = await filled(source)
    other = SyncDictStore({"0": b"another's"})
    store = CacheStore(other, cache_store=copy_of(cache), source_id="another")
    assert await read(store, "0") == b"another's"
    with pytest.raises(ValueError, match="holds the cache of a source, not of another"):
        await store.drain()
    assert await read(store, "0") == b"another's"
    assert store.cache_info()["cached_keys"] == 0
    assert [record.levelno for record in logged(caplog)] == [logging.WARNING]


def copy_of(cache: Remote) -> Remote:
    """A store with the same contents, at another place."""
    other = Remote()
    other.values = dict(cache.values)
    return other


class Silent(Remote):
    """Its listing yields nothing, or names of values that are not there, and never ends."""

    hangs: str | None = None
    made = 0

    async def getsize(self, key: str) -> int:
        if key.startswith("gone/"):
            raise FileNotFoundError(key)
        return await super().getsize(key)

    async def list(self) -> AsyncIterator[str]:
        if self.hangs == "at once":
            await asyncio.Event().wait()
        while self.hangs:
            self.made += 1
            yield f"gone/{self.made}"
            await asyncio.sleep(0)
        async for key in super().list():
            yield key


@pytest.mark.parametrize("hangs", ["at once", "never ends"])
async def test_listing_without_progress_is_counted_and_tried_again(
    source: SyncDictStore,
    hangs: str,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zcache._backends.store.listing.LIST_TIMEOUT", 0.05)
    cache = Silent()
    cache.hangs = hangs
    store = make(source, cache, clock=clock, adopt=True)

    async def fails() -> None:
        before = store.cache_stats()["cache_failures"]
        for key, value in SOURCE.items():
            assert await read(store, key) == value
        await until(lambda: store.cache_stats()["cache_failures"] > before)

    await fails()
    clock.advance(1.01)
    await fails()
    assert len(said(caplog)) == 1
    assert "no answer" in caplog.text
    cache.hangs = None
    clock.advance(100)
    for _ in range(3):
        for key, value in SOURCE.items():
            assert await read_through(store, key) == value
    assert store.cache_stats()["hits"] > 0
    await check_invariants_async(store)


async def test_listing_that_never_ends_keeps_few_names(source: SyncDictStore) -> None:
    class Name(str):
        __slots__ = ()
        kept = 0

        def __init__(self, _: str) -> None:
            Name.kept += 1

        def __del__(self) -> None:
            Name.kept -= 1

    class Endless(Silent):
        most = 0

        async def list(self) -> AsyncIterator[str]:
            while self.hangs:
                self.made += 1
                self.most = max(self.most, Name.kept)
                yield Name(f"gone/{self.made}")
                await asyncio.sleep(0)

    cache = Endless()
    cache.hangs = "never ends"
    store = make(source, cache, adopt=True)
    await read(store, "1")
    await until(lambda: cache.made > 3000)
    cache.hangs = None
    await settled(store)
    assert cache.most < 1000


async def test_listing_of_many_values_takes_all_in(source: SyncDictStore) -> None:
    cache = await filled(source)
    cache.values.update({f"more/{number}": b"12345" for number in range(1000)})
    store = make(source, cache)
    await read(store, "1")
    await settled(store)
    assert store.cache_info()["cached_keys"] == len(SOURCE) + 1000
    await check_invariants_async(store)


async def test_offline_read_waits_for_no_listing_that_fails(
    source: SyncDictStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcache._backends.store.listing.LIST_TIMEOUT", 0.05)
    monkeypatch.setattr("zcache._protocol.hits.COMPLETE_TIMEOUT", 3600)
    cache = Silent()
    cache.hangs = "at once"
    store = make(source, cache, offline=True)
    for key in SOURCE:
        with pytest.raises(OfflineError):
            await asyncio.wait_for(read(store, key), 30)


async def test_offline_reads_wait_once_for_a_listing(
    source: SyncDictStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcache._protocol.hits.COMPLETE_TIMEOUT", 0.05)
    cache = Silent()
    cache.hangs = "at once"
    store = make(source, cache, offline=True)
    with pytest.raises(OfflineError):
        await read(store, "1")
    # Who waits now does so for very long.
    monkeypatch.setattr("zcache._protocol.hits.COMPLETE_PAUSE", 3600)
    for key in SOURCE:
        with pytest.raises(OfflineError):
            await asyncio.wait_for(read(store, key), 30)


class Stalling(Remote):
    """Lists in the order of names, and stops before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = asyncio.Event()

    async def list(self) -> AsyncIterator[str]:
        names = sorted(self.values)
        for name in names:
            if name == names[-1]:
                await self.goes_on.wait()
            yield name


@pytest.mark.parametrize("mark", [DROPPED, WRITING])
async def test_listing_under_way_serves_nothing_that_is_marked(mark: str) -> None:
    """What could not be deleted, or was never finished, is not valid before the listing has ended either."""
    values = {f"d/{n:04}": b"0123456789" for n in range(600)}
    source, before = SyncDictStore(values), Remote()
    store = make(source, before)
    await settled(store)
    for key in values:
        await read_through(store, key)
    cache = Stalling()
    cache.values = dict(before.values)
    cache.values[mark + tombstone("d/0000").rpartition("/")[2]] = b""
    source.values["d/0000"] = b"9876543210"
    again = make(source, cache)
    await read(again, "d/0001")
    await until(lambda: again.cache_info()["cached_keys"] > 400)
    for _ in range(3):
        assert await read(again, "d/0000") == b"9876543210"
    cache.goes_on.set()
    assert await again.drain()
    assert await read_through(again, "d/0000") == b"9876543210"
    assert cache.values["d/0000"] == b"9876543210"
    assert not [name for name in cache.values if name.startswith(mark)]
    await check_invariants_async(again)


@pytest.mark.parametrize("clears", ["clear", "clear_cache"])
async def test_listing_held_up_a_clear_takes_names_that_begin_like_those_of_zcache(
    clears: str,
) -> None:
    """The next process served them, if this one ended before its listing."""
    names = {".zcachex/c/0", ".zcache-x", "a/c/0"}
    source, cache = SyncDictStore(dict.fromkeys(names, b"old")), Remote()
    before = make(source, cache)
    await settled(before)
    for key in names:
        await read_through(before, key)
    assert set(cache.values) > names
    goes_on = asyncio.Event()

    async def hold_up(operation: str, _: str) -> None:
        if operation == "getsize":
            await goes_on.wait()

    again = Remote()
    again.values = dict(cache.values)
    again.before = hold_up  # type: ignore[method-assign]
    store = make(source, again)
    await read(store, "other")
    assert not is_complete(store)
    await getattr(store, clears)()
    assert set(again.values) == set(cache.values) - names
    goes_on.set()
    assert await store.drain()
    await check_invariants_async(store)
