"""Read your writes: whichever way a value changes, every later read sees the change."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import pickle
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import cpu
from zarr.storage import LocalStore

from doubles import DictStore, GatedStore, SyncDictStore, reached
from pools import BESIDE_OTHERS, one_of
from support import (
    PROTOTYPE,
    buf,
    drained,
    drained_sync,
    logged,
    read,
    read_through,
    until,
    value_sync,
    with_the_slot_of,
    write,
)
from zcache import CachePool, CacheStore
from zcache._protocol import write as writing
from zcache.testing import StoreDouble, check_invariants_async, entries, in_flight, stored_sizes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from zarr.core.buffer import Buffer

OLD, NEW = b"the old value", b"a new one, and longer than that"
SOURCE = {"a": OLD, "b": b"b" * 9, "g/a": OLD, "g/b/c": OLD, "gg/a": OLD}
RANGES = (None, RangeByteRequest(2, 9), OffsetByteRequest(4), SuffixByteRequest(5))


class Write(NamedTuple):
    """A way in which a value changes: what does it, the key that it changes, its value then."""

    do: Callable[[CacheStore], Awaitable[Any]]
    key: str
    value: bytes | None


def in_thread(do: Callable[[CacheStore], None]) -> Callable[[CacheStore], Awaitable[None]]:
    return lambda store: asyncio.to_thread(do, store)


async def set_many(store: CacheStore) -> None:
    await store._set_many([("b", buf(OLD)), ("a", buf(NEW))])


async def by_a_copy(store: CacheStore) -> None:
    await pickle.loads(pickle.dumps(store)).delete("a")


WRITES = {
    "set": Write(lambda store: store.set("a", buf(NEW)), "a", NEW),
    "set_shorter": Write(lambda store: store.set("a", buf(b"x")), "a", b"x"),
    "set_same_size": Write(lambda store: store.set("a", buf(OLD[::-1])), "a", OLD[::-1]),
    "set_empty": Write(lambda store: store.set("a", buf(b"")), "a", b""),
    "set_new": Write(lambda store: store.set("n", buf(NEW)), "n", NEW),
    "set_many": Write(set_many, "a", NEW),
    "set_if_not_exists": Write(lambda store: store.set_if_not_exists("n", buf(NEW)), "n", NEW),
    "set_if_it_exists": Write(lambda store: store.set_if_not_exists("a", buf(NEW)), "a", OLD),
    "delete": Write(lambda store: store.delete("a"), "a", None),
    "delete_dir": Write(lambda store: store.delete_dir("g"), "g/b/c", None),
    "delete_dir_slash": Write(lambda store: store.delete_dir("g/"), "g/a", None),
    "delete_dir_inner": Write(lambda store: store.delete_dir("g/b"), "g/b/c", None),
    "clear": Write(lambda store: store.clear(), "a", None),
    "by_a_copy": Write(by_a_copy, "a", None),
    "by_another_view": Write(
        lambda store: (
            store.with_read_only(read_only=True).with_read_only(read_only=False).set("a", buf(NEW))
        ),
        "a",
        NEW,
    ),
    "set_sync": Write(in_thread(lambda store: store.set_sync("a", buf(NEW))), "a", NEW),
    "delete_sync": Write(in_thread(lambda store: store.delete_sync("a")), "a", None),
}
# What changes a source that tests can hold up: its copies have gates of their own.
GATED = [name for name in WRITES if not name.startswith("by_")]


# Of each sort that zcache knows its own way to.
cache = one_of({**BESIDE_OTHERS, "another": lambda _: SyncDictStore()})


async def same_as_source(store: CacheStore, source: Store, *keys: str) -> None:
    """Assert that all ways of reading give what the source has, from the cache and without."""
    for _ in range(2):
        for key in keys:
            expected = [await read(source, key, request) for request in RANGES]
            assert [await read(store, key, request) for request in RANGES] == expected
            assert await store.exists(key) == (expected[0] is not None)
            if expected[0] is None:
                with pytest.raises(FileNotFoundError):
                    await store.getsize(key)
                continue
            assert await store.getsize(key) == len(expected[0])
            many = await store.get_partial_values(PROTOTYPE, [(key, r) for r in RANGES])
            assert [v.to_bytes() for v in many if v is not None] == expected
            if hasattr(Store, "get_ranges"):
                groups = store.get_ranges(key, RANGES, prototype=PROTOTYPE)
                found = {
                    n: v.to_bytes() async for group in groups for n, v in group if v is not None
                }
                assert [found[n] for n in range(len(RANGES))] == expected
            if store._supports_sync_io:
                sync = [await asyncio.to_thread(store.get_sync, key, byte_range=r) for r in RANGES]
                assert [None if v is None else v.to_bytes() for v in sync] == expected


@pytest.mark.parametrize("warm", ["cold", "whole", "ranges"])
@pytest.mark.parametrize("cache_set_data", [True, False])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_write_that_returned_is_seen_by_every_later_read(
    write: Write, cache: Store | CachePool, cache_set_data: bool, warm: str, tmp_path: Path
) -> None:
    source = LocalStore(tmp_path / "source")
    for key, value in SOURCE.items():
        await source.set(key, buf(value))
    store = CacheStore(source, cache_store=cache, cache_set_data=cache_set_data, max_size=2000)
    if warm != "cold":
        for key in (*SOURCE, "n"):
            for request in RANGES[1:] if warm == "ranges" else RANGES[:1]:
                await read_through(store, key, request)
        assert len(entries(store)) == len(SOURCE) * (3 if warm == "ranges" else 1)
    await write.do(store)
    assert await read(store, write.key) == write.value
    await same_as_source(store, source, *SOURCE, "n")
    await check_invariants_async(store)


@pytest.mark.parametrize("name", [*GATED, "clear_cache"])
@pytest.mark.parametrize("request_", RANGES[::3], ids=["whole", "range"])
async def test_fill_begun_before_a_write_never_commits_after_it(
    name: str, request_: Any, cache: Store | CachePool
) -> None:
    source = GatedStore(SOURCE)
    store = CacheStore(source, cache_store=cache)
    key = "a" if name == "clear_cache" else WRITES[name].key
    source.late["get"] = 1
    early = asyncio.create_task(read(store, key, request_))
    await reached(source)
    # The source has answered with the old value, but the reader does not have it yet.
    if name == "clear_cache":
        await store.clear_cache()
    else:
        await WRITES[name].do(store)
    source.release()
    assert await early == await read(DictStore(SOURCE), key, request_)
    # What lands late is not what a later reader gets.
    assert await read(store, key) == source.values.get(key)
    assert await read(store, key, request_) == await read(source, key, request_)
    await same_as_source(store, source, *SOURCE, "n")


@pytest.mark.parametrize("name", ["get", "set"])
async def test_value_is_kept_whatever_other_keys_are_written_meanwhile(
    name: str, cache: Store | CachePool
) -> None:
    keys = [f"h/{n}" for n in range(20)]
    source = GatedStore(dict.fromkeys(keys, OLD))
    store = CacheStore(source, cache_store=cache)
    neighbour = with_the_slot_of(store, keys[0])
    source.shut[name] = len(keys)
    if name == "get":
        under_way = [asyncio.create_task(read(store, key)) for key in keys]
    else:
        under_way = [asyncio.create_task(store.set(key, buf(NEW))) for key in keys]
    await reached(source, len(keys))
    await store.set(neighbour, buf(NEW))
    source.release()
    await asyncio.gather(*under_way)
    await drained(store)
    assert set(store.cached_keys()) == {neighbour, *keys}
    assert store.cache_stats()["refusals"] == 0


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("gate", ["shut", "late"])
async def test_read_after_a_write_joins_no_earlier_flight(
    name: str, gate: str, cache: Store | CachePool
) -> None:
    source = GatedStore(SOURCE)
    store = CacheStore(source, cache_store=cache)
    write = WRITES[name]
    getattr(source, gate)["get"] = 1
    early = [asyncio.create_task(read(store, write.key)) for _ in range(3)]
    await reached(source)
    await write.do(store)
    # The first read is still under way; this one does not wait for it.
    assert await asyncio.wait_for(read(store, write.key), 30) == write.value
    assert not any(task.done() for task in early)
    source.release()
    await asyncio.gather(*early)
    await same_as_source(store, source, *SOURCE, "n")


class BrokenError(Exception):
    """What a source raises."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", GATED)
async def test_write_that_fails_leaves_nothing_stale(
    name: str, when: str, cache: Store | CachePool
) -> None:
    class Failing(GatedStore):
        armed = False

        def raise_if(self, operation: str, at: str) -> None:
            if self.armed and operation not in ("get", "exists", "getsize") and at == when:
                raise BrokenError

        async def before(self, operation: str, key: str) -> None:
            self.raise_if(operation, "before")

        async def after(self, operation: str, key: str, result: object) -> None:
            self.raise_if(operation, "after")

        def before_now(self, operation: str, key: str) -> None:
            self.raise_if(operation, "before")

        def after_now(self, operation: str, key: str) -> None:
            self.raise_if(operation, "after")

    source = Failing(SOURCE)
    store = CacheStore(source, cache_store=cache)
    for key in SOURCE:
        await read(store, key)
    source.armed = True
    with pytest.raises(BrokenError):
        await WRITES[name].do(store)
    await others_ended()
    source.armed = False
    await same_as_source(store, source, *SOURCE, "n")
    await drained(store)
    assert in_flight(store) == (0, 0)


REMOVALS = {
    "set": lambda store: store.set("a", buf(NEW)),
    "set_below": lambda store: store.set("g/a", buf(NEW)),
    "delete": lambda store: store.delete("a"),
    "delete_dir": lambda store: store.delete_dir("g"),
    "clear": lambda store: store.clear(),
    "invalidate": lambda store: store.invalidate("g"),
    "clear_cache": lambda store: store.clear_cache(),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", REMOVALS)
async def test_what_is_filled_before_a_removal_by_name_is_not_listed_without_its_file(
    name: str, fails: bool, cache: Store | CachePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(GatedStore):
        armed = False

        async def after(self, operation: str, key: str, result: object) -> None:
            if self.armed and operation not in ("get", "exists", "getsize"):
                raise BrokenError

    source = Failing(SOURCE)
    store = CacheStore(source, cache_store=cache)
    backend = store._cache.backend
    removes = 0

    def fills_before(method: str) -> None:
        remove = getattr(backend, method)

        async def removed(*args: Any, **options: Any) -> None:
            nonlocal removes
            removes += 1
            source.armed = False
            for key in SOURCE:
                for request in RANGES[1:]:
                    await read(store, key, request)
            await drained(store)
            source.armed = fails
            await remove(*args, **options)

        monkeypatch.setattr(backend, method, removed)

    fills_before("remove_key")
    fills_before("remove_unlisted")
    source.armed = fails
    with contextlib.suppress(BrokenError):
        await REMOVALS[name](store)
    source.armed = False
    assert removes or not backend.removes_by_name
    await drained(store)
    await check_invariants_async(store)
    await same_as_source(store, source, *SOURCE)
    assert store.cache_stats()["damaged"] == 0


@pytest.mark.parametrize("name", [name for name in GATED if not name.endswith("sync")])
async def test_write_that_fails_drops_what_was_filled_meanwhile(
    name: str, cache: Store | CachePool
) -> None:
    """What they have filled in is from before its effect; and the next write is like any other."""

    class Failing(GatedStore):
        async def after(self, operation: str, key: str, result: object) -> None:
            if operation not in ("get", "exists", "getsize") and not followed:
                raise BrokenError

    followed = False
    source = Failing(SOURCE)
    store = CacheStore(source, cache_store=cache)
    for operation in ("set", "set_if_not_exists", "delete", "delete_dir", "clear"):
        source.shut[operation] = math.inf
    task = asyncio.ensure_future(WRITES[name].do(store))
    await reached(source)
    await same_as_source(store, source, *SOURCE, "n")
    source.release()
    with pytest.raises(BrokenError):
        await task
    await others_ended()
    await same_as_source(store, source, *SOURCE, "n")
    followed = True
    key = "a" if name == "clear" else WRITES[name].key
    await write(store, key, NEW)
    asked = source.counts["get"]
    assert await read(store, key) == NEW
    assert source.counts["get"] == asked


@pytest.mark.parametrize("gate", ["shut", "late"])
@pytest.mark.parametrize("name", [name for name in GATED if not name.endswith("sync")])
async def test_write_that_is_cancelled_leaves_nothing_stale(
    name: str, gate: str, cache: Store | CachePool
) -> None:
    """Cancelled, it goes on by itself: what is on the wire cannot be called back."""
    source = GatedStore(SOURCE)
    store = CacheStore(source, cache_store=cache)
    for key in SOURCE:
        await read(store, key)
    for operation in ("set", "set_if_not_exists", "delete", "delete_dir", "clear"):
        getattr(source, gate)[operation] = math.inf
    task = asyncio.ensure_future(WRITES[name].do(store))
    await reached(source)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # A reader now may fill the cache with what is about to go.
    await same_as_source(store, source, *SOURCE, "n")
    source.release()
    await others_ended()
    await same_as_source(store, source, *SOURCE, "n")
    await drained(store)
    assert in_flight(store) == (0, 0)


async def others_ended() -> None:
    """Wait for what goes on by itself."""
    await until(lambda: len(asyncio.all_tasks()) == 1)


class ThreadedStore(SyncDictStore):
    """Changes its values in a thread, which cannot be cancelled, and only when it is told to.

    Attributes
    ----------
    released : threading.Event
        Lets all changes go on.
    under_way : list of Future
        The changes.
    """

    def __init__(self, values: dict[str, bytes], pool: ThreadPoolExecutor) -> None:
        super().__init__(values)
        self.released = threading.Event()
        self.under_way: list[Future[Any]] = []
        self._pool = pool

    async def _do(self, operation: str, key: str, effect: Callable[[], Any]) -> Any:
        if operation in ("get", "exists", "getsize"):
            return await super()._do(operation, key, effect)

        def work() -> Any:
            assert self.released.wait(60)
            return effect()

        self.under_way.append(self._pool.submit(work))
        return await asyncio.wrap_future(self.under_way[-1])


@pytest.mark.parametrize("name", [name for name in GATED if not name.endswith("sync")])
def test_write_whose_loop_ended_leaves_nothing_stale(
    name: str, cache: Store | CachePool, caplog: pytest.LogCaptureFixture
) -> None:
    """`asyncio.run` cancels everything at its end, while a thread writes on."""

    async def give_up(store: CacheStore) -> None:
        for key in SOURCE:
            await read(store, key)
        for _ in range(2):
            before = len(source.under_way)
            writing = asyncio.ensure_future(WRITES[name].do(store))
            await until(lambda: len(source.under_way) > before)  # noqa: B023 - it ends here
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing

    with ThreadPoolExecutor(2) as pool:
        source = ThreadedStore(SOURCE, pool)
        store = CacheStore(source, cache_store=cache, source_id="one")
        asyncio.run(give_up(store))
        # Old values, and nothing of what is being written may stay in the cache.
        asyncio.run(same_as_source(store, source, *SOURCE, "n"))
        if isinstance(cache, LocalStore):
            # A store that opens the directory anew sees it as well.
            del store
            gc.collect()
            store = CacheStore(source, cache_store=LocalStore(cache.root), source_id="one")
            asyncio.run(same_as_source(store, source, *SOURCE, "n"))
        # A value that was read before is served until its fill is refused.
        drained_sync(store)
        source.released.set()
        wait(source.under_way)
        asyncio.run(same_as_source(store, source, *SOURCE, "n"))
        asyncio.run(store.set("elsewhere", buf(NEW)))
        drained_sync(store)
    assert [record.levelname for record in logged(caplog)] == ["WARNING"]
    # What it was not about is cached as ever.
    asked = source.counts["get"]
    if name != "clear":
        assert asyncio.run(read(store, "elsewhere")) == NEW
        assert asyncio.run(read(store, "gg/a")) == OLD
        assert source.counts["get"] == asked


@pytest.mark.parametrize("kind", ["directory", "pool"])
def test_write_whose_loop_ended_may_land_as_long_as_its_process_lives(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its store is gone: no other participant of the index caches what it is about."""
    never_ended: list[Any] = []
    monkeypatch.setattr(writing, "_never_ended", never_ended)
    source = StoreDouble(SyncDictStore({"a": OLD, "b": OLD}))

    def opened() -> CacheStore:
        path = tmp_path / "cache"
        cache = CachePool(path) if kind == "pool" else LocalStore(path)
        return CacheStore(source, cache_store=cache, source_id="source")

    def cached() -> set[str]:
        gc.collect()
        store = opened()
        for key in ("a", "b"):
            assert value_sync(store, key) == OLD
        assert store.drain_sync()
        return set(stored_sizes(store))

    async def write_and_end() -> None:
        store = opened()
        gate = source.block("set", times=1)
        task = asyncio.ensure_future(store.set("a", buf(NEW)))
        await gate.entered_async()
        # The loop ends, and cancels it.
        del store, task

    asyncio.run(write_and_end())
    assert cached() == {"b"}
    # As if the process had ended.
    never_ended.clear()
    assert cached() == {"a", "b"}


@pytest.mark.parametrize("lands", [False, True])
def test_fill_whose_loop_ended_never_replaces_a_newer_value(lands: bool) -> None:
    """What it has sent to the cache store may replace what is there by then: nothing is there."""
    source = DictStore({"k": OLD, "other": OLD})
    with ThreadPoolExecutor(2) as pool:
        cache = ThreadedStore({}, pool)
        store = CacheStore(source, cache_store=cache, max_size=2 * len(OLD))

        async def begin() -> None:
            task = asyncio.create_task(read(store, "k"))
            await until(lambda: cache.under_way)
            del task

        asyncio.run(begin())
        first = list(cache.under_way)
        if lands:
            cache.released.set()
            wait(first)
        asyncio.run(store.set("k", buf(OLD[::-1])))
        cache.released.set()
        wait(first)
        for key in ("k", "other", "k", "other"):
            assert asyncio.run(read(store, key)) == source.values[key]
            drained_sync(store)
        assert cache.total <= store.cache_info()["current_size"] == cache.peak == 2 * len(OLD)


@pytest.mark.parametrize("name", [name for name in GATED if not name.endswith("sync")])
@pytest.mark.filterwarnings("error")
async def test_write_cancelled_before_it_begins_changes_nothing(
    name: str, cache: Store | CachePool
) -> None:
    """It never began; no coroutine is reported as never awaited."""
    source = SyncDictStore(SOURCE)
    store = CacheStore(source, cache_store=cache)
    await same_as_source(store, source, *SOURCE)
    everybody = asyncio.all_tasks()
    for turns in range(12):
        task = asyncio.ensure_future(WRITES[name].do(store))
        for _ in range(turns):
            await asyncio.sleep(0)
        others = asyncio.all_tasks() - everybody
        for other in others:
            other.cancel()
        await asyncio.wait({task, *others})
        await asyncio.sleep(0)
    gc.collect()
    await same_as_source(store, source, *SOURCE, "n")


@pytest.mark.parametrize("seed", range(4))
async def test_overlapping_writers_leave_nothing_stale(seed: int, cache: Store | CachePool) -> None:
    """Tasks and threads, with readers among them: either nothing is cached or what the source has."""
    chance = np.random.default_rng(seed)

    class Slow(GatedStore):
        async def before(self, operation: str, key: str) -> None:
            await asyncio.sleep(chance.integers(3) / 1000)

        async def after(self, operation: str, key: str, result: object) -> None:
            await self.before(operation, key)

    source = Slow(SOURCE)
    store = CacheStore(source, cache_store=cache, max_size=1000)
    for _ in range(5):
        writes = [store.set("a", buf(bytes([65 + n]) * (n + 1))) for n in range(8)]
        reads = [read(store, "a", RANGES[n % 4]) for n in range(8)]
        sync = [
            asyncio.to_thread(store.set_sync, "a", buf(bytes([97 + n]) * (n + 1)))
            for n in range(4 if store._supports_sync_io else 0)
        ]
        await asyncio.gather(*writes, *reads, *sync, store.delete("a"))
        await same_as_source(store, source, "a")
    await check_invariants_async(store)


# ----------------------------------------------------------------- buffers


async def test_write_from_a_reused_buffer_caches_what_was_written(cache: Store | CachePool) -> None:
    source = DictStore()
    store = CacheStore(source, cache_store=cache)
    array = np.frombuffer(bytearray(OLD), dtype="u1").copy()
    await store.set("a", cpu.Buffer.from_array_like(array))
    array[:] = 0
    assert await read(store, "a") == OLD
    assert source.counts["get"] == 0


@pytest.mark.parametrize("request_", RANGES)
async def test_buffer_changed_by_its_reader_changes_no_later_read(
    cache: Store | CachePool, request_: Any
) -> None:
    source = DictStore(SOURCE)
    store = CacheStore(source, cache_store=cache)
    await store.set("b", buf(NEW))
    for key in ("a", "b"):
        for _ in range(3):
            value = await store.get(key, PROTOTYPE, request_)
            assert value is not None
            array = value.as_numpy_array()
            if array.flags.writeable:
                array[:] = 0
            assert await read(store, key) == source.values[key]
            assert await read(store, key, request_) == await read(source, key, request_)


ALIASES = ["./a", "a/", "g/../a", "g//a", "g/./a", "/a", "a\0", "\ud800"]


@pytest.mark.parametrize("alias", ALIASES)
async def test_write_by_an_alias_is_seen_under_the_key(
    alias: str, cache: Store | CachePool, tmp_path: Path
) -> None:
    """On a file system they name the same file: what one changes, the other reads."""
    source = LocalStore(tmp_path / "source")
    store = CacheStore(source, cache_store=cache)
    for key in ("a", "g/a"):
        await store.set(key, buf(OLD))
        assert await read(store, key) == OLD
    try:
        await source.set(alias, buf(NEW))
    except (OSError, ValueError):
        changes: list[Callable[[], Awaitable[None]]] = []
    else:
        changes = [lambda: store.set(alias, buf(NEW)), lambda: store.delete(alias)]
    for change in changes:
        if not alias.startswith("/"):
            await change()
            await same_as_source(store, source, "a", "g/a")
            assert await read(store, alias) == await read(source, alias)
    assert not [key for key, *_ in entries(store) if key not in ("a", "g/a")]


class FutureStore(SyncDictStore):
    """A source that begins to `set` before the coroutine is awaited."""

    def __init__(self, values: dict[str, bytes], pool: ThreadPoolExecutor) -> None:
        super().__init__(values)
        self.pool = pool
        self.released = threading.Event()
        self.sent: list[Future[None]] = []

    def set(self, key: str, value: Buffer) -> Any:
        data = value.to_bytes()

        def work() -> None:
            assert self.released.wait(30)
            self.values[key] = data

        self.sent.append(self.pool.submit(work))
        return asyncio.wrap_future(self.sent[-1])


@pytest.mark.parametrize("turns", range(4))
def test_write_at_work_before_it_is_awaited_leaves_nothing_stale(turns: int) -> None:
    async def begin(store: CacheStore) -> None:
        task = asyncio.ensure_future(store.set("k", buf(NEW)))
        for _ in range(turns):
            await asyncio.sleep(0)
        assert not task.done()

    with ThreadPoolExecutor(1) as pool:
        source = FutureStore({"k": OLD}, pool)
        store = CacheStore(source)
        asyncio.run(begin(store))
        asyncio.run(read(store, "k"))
        source.released.set()
        wait(source.sent)
        assert asyncio.run(read(store, "k")) == source.values["k"]


@pytest.mark.parametrize("name", ["set", "delete_dir"])
async def test_write_refused_at_once_leaves_the_cache_in_use(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises: what the change was about is cached as ever afterwards."""
    source = SyncDictStore({"a/k": OLD})
    store = CacheStore(source)

    def refuse(*_: object) -> Any:
        raise asyncio.CancelledError

    monkeypatch.setattr(source, name, refuse)
    with pytest.raises(asyncio.CancelledError):
        await (store.set("a/k", buf(NEW)) if name == "set" else store.delete_dir("a"))
    monkeypatch.undo()
    for _ in range(2):
        assert await read(store, "a/k") == OLD
    assert store.cache_stats()["hits"] == 1


@pytest.mark.parametrize(
    "alias", [".zcache/../k", "g/../k", ".zcache/./../k", "./k", ".zcache//../k"]
)
@pytest.mark.parametrize("how", ["set", "delete"])
async def test_write_by_an_alias_through_the_reserved_prefix_is_seen(
    tmp_path: Path, alias: str, how: str, cache: Store | CachePool
) -> None:
    source = LocalStore(tmp_path / "source")
    store = CacheStore(source, cache_store=cache)
    await store.set("k", buf(OLD))
    assert await read(store, "k") == OLD
    await (store.set(alias, buf(NEW)) if how == "set" else store.delete(alias))
    assert await read(store, "k") == await read(source, "k")
