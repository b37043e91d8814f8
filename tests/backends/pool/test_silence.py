"""A pool on a disk that hangs, or refuses: the source serves, within a second, and all bytes stay counted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import MemoryStore

from pools import NEIGHBOURS, check_neighbour, neighbour, pool_with_neighbours, source_of
from support import (
    PROTOTYPE,
    buf,
    check_quiet,
    drained,
    largest_file,
    listed,
    read,
    read_through,
    until,
)
from zcache import CachePool, CacheStore
from zcache._backends.directory import backend
from zcache._core import CorruptIndexError, IndexBusyError
from zcache.testing import check_invariants_async, entries, index_slot, without_shared_index

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

LARGE = 5 * 2**20
"""More than is read on the spot."""


class Hanging:
    """Stands before what reads or deletes in segments, and holds up some of its calls until `go` is set."""

    def __init__(self, inner: Any, *names: str) -> None:
        self.inner = inner
        self.names = names
        self.go = threading.Event()
        self.held = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in self.names:
            return found

        def call(*args: Any) -> Any:
            self.held += 1
            assert self.go.wait(60)
            return found(*args)

        return call


@pytest.fixture
def hanging() -> Iterator[list[Hanging]]:
    """All that is held up; it goes on in the end."""
    made: list[Hanging] = []
    yield made
    for one in made:
        one.go.set()


async def test_read_that_never_ends_costs_a_second_once(
    tmp_path: Path, hanging: list[Hanging]
) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    value = os.urandom(LARGE)
    source = source_of(a=value)
    store = CacheStore(source, cache_store=pool, source_id="mine")
    assert await read_through(store, "a") == value
    source.take()
    backend: Any = store._cache.backend
    backend._segments = Hanging(backend._segments, "read")
    hanging.append(backend._segments)
    for _ in range(20):
        assert await asyncio.wait_for(read(store, "a"), 30) == value
    assert source.take()["get"] >= 1
    assert 1 <= hanging[0].held <= 2
    assert store.cache_stats()["cache_failures"] <= 2


async def test_delete_that_never_ends_holds_up_no_write_and_its_bytes_stay_counted(
    tmp_path: Path, hanging: list[Hanging]
) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    source = source_of(a=bytes(60))
    store = CacheStore(source, cache_store=pool, source_id="mine")
    await read_through(store, "a")
    before = pool.cache_info()["current_size"]
    scanner: Any = pool._pool.directory.layout.scanner  # type: ignore[union-attr]
    scanner.files = Hanging(scanner.files, "delete", "delete_below")
    hanging.append(scanner.files)
    await asyncio.wait_for(store.set("a", buf(b"new")), 30)
    assert await read(source.inner, "a") == b"new"
    assert await read(store, "a") == b"new"
    assert pool.cache_info()["current_size"] >= before
    await check_invariants_async(store)
    scanner.files.go.set()
    scanner.files = scanner.files.inner
    await until(lambda: all(entry.state == "live" for entry in entries(store)))
    await check_quiet(store)


async def test_no_write_waits_for_deletes_that_were_not_answered_before(
    tmp_path: Path, hanging: list[Hanging], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    source = source_of(**{f"c/{n}": bytes(60) for n in range(9)})
    store = CacheStore(source, cache_store=pool, source_id="mine")
    for n in range(9):
        await read_through(store, f"c/{n}")
    scanner: Any = pool._pool.directory.layout.scanner  # type: ignore[union-attr]
    scanner.files = Hanging(scanner.files, "delete", "delete_below")
    hanging.append(scanner.files)
    await store.set("c/0", buf(b"new"))
    # Now the pool is known to be ill. A write that waits for it would not end.
    monkeypatch.setattr(backend, "DELETE_TIMEOUT", 3600)
    await asyncio.wait_for(_write_all(store), BOUNDED)
    assert await read(source.inner, "c/7") is None
    scanner.files.go.set()
    scanner.files = scanner.files.inner
    await until(lambda: all(entry.state == "live" for entry in entries(store)))
    await check_quiet(store)
    assert pool.cache_info()["current_size"] > 0
    await until(lambda: _is_filled(store))


async def _write_all(store: CacheStore) -> None:
    """Write keys that are cached, in each way."""
    for n in range(1, 5):
        await store.set(f"c/{n}", buf(b"new"))
        assert await read(store, f"c/{n}") == b"new"
    # A thread that may block; its time-out ends a wait that would not.
    await asyncio.to_thread(store.set_sync, "c/5", buf(b"new"))
    assert await read(store, "c/5") == b"new"
    await store.delete("c/6")
    await store.delete_dir("c/7")
    await store.delete("c/7")
    await store.invalidate("c/8")


class Slow:
    """Stands before the segments: deletes by name get on for a long time."""

    def __init__(self, inner: Any, looks: int) -> None:
        self.inner = inner
        self.looks = looks
        self.go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def walked(self) -> int:
        self.looks -= 1
        if self.looks < 0:
            self.go.set()
        return int(self.inner.walked) - self.looks

    def delete_below(self, *args: Any) -> Any:
        assert self.go.wait(60)
        return self.inner.delete_below(*args)


@pytest.mark.slow
async def test_write_without_the_index_of_a_pool_waits_while_the_headers_are_read(
    tmp_path: Path,
) -> None:
    """A large pool: to find the values of a key by their headers takes longer than an answer may."""
    source = source_of(a=b"old", b=b"other")
    with without_shared_index():
        store = CacheStore(source, cache_store=CachePool(tmp_path / "pool"), source_id="mine")
    assert index_slot(store) is None
    for key, value in (("a", b"old"), ("b", b"other")):
        assert await read_through(store, key) == value
    scanner: Any = store._cache.backend._directory.layout.scanner
    scanner.files = slow = Slow(scanner.files, looks=2)
    await store.set("a", buf(b"new"))
    assert slow.go.is_set()
    assert await read(store, "a") == b"new"
    assert await read(store, "b") == b"other"
    assert store.cache_stats()["cache_failures"] == 0


async def test_write_that_is_refused_leaves_nothing_and_costs_no_read(tmp_path: Path) -> None:
    """A full disk: segments cannot grow."""
    pool = pool_with_neighbours(tmp_path / "pool")
    values = {f"c/{n}": bytes([n]) * 5000 for n in range(5)}
    store = CacheStore(source_of(**values), cache_store=pool, source_id="mine")
    # As long as the map before the values is.
    with largest_file(65 * 4096):
        for key, value in values.items():
            assert await read_through(store, key) == value
            assert await read_through(store, key) == value
        assert entries(store) == []
        await check_invariants_async(store)
    assert store.cache_stats()["cache_failures"] >= 1
    for name in NEIGHBOURS:
        await check_neighbour(neighbour(pool, name), name)
    await until(lambda: _is_filled(store))
    await check_quiet(store)


def _is_filled(store: CacheStore) -> bool:
    """Whether a value is cached again, once the cache store is no longer left alone."""
    store.get_sync("c/1")
    store.drain_sync()
    return store.is_cached("c/1")


# ------------------------------------------------------------------ every method, every call

BOUNDED = 60
"""Seconds far above every documented limit."""
ERRNOS = ("EIO", "ENOSPC", "EACCES", "EROFS", "EMFILE", "ESTALE")
ERRORS: dict[str, Callable[[], Exception]] = {
    **{
        name: lambda name=name: OSError(getattr(errno, name), os.strerror(getattr(errno, name)))  # type: ignore[misc]
        for name in ERRNOS
    },
}
OF_INDEX: dict[str, Callable[[], Exception]] = {
    "busy": lambda: IndexBusyError("taken"),
    "corrupt": lambda: CorruptIndexError("a number that cannot be"),
}
RAISES = {
    "read": ERRORS | OF_INDEX,
    "recorded": OF_INDEX,
    "delete": ERRORS,
    "all": ERRORS,
}
"""What each call can raise."""
OF_DISK = ("read", "delete")
REQUESTS = (None, RangeByteRequest(2, 7), OffsetByteRequest(4), SuffixByteRequest(3))
VALUES = {
    **{f"{d}{n}": bytes([n]) * (10 + n) for d in ("", "d/") for n in range(3)},
    "large": os.urandom(LARGE),
}


class Disk:
    """Stands before what reads and deletes in segments; some of its calls do what `fault` does, which may raise."""

    def __init__(self, inner: Any, fault: Callable[[str], object]) -> None:
        self.inner = inner
        self.fault = fault

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not callable(found):
            return found

        def call(*args: Any) -> Any:
            try:
                self.fault(name)
            except OSError as error:
                if name != "delete":
                    raise
                # It says of each value what the file system has said.
                return [error] * len(args[0])
            return found(*args)

        return call


@contextlib.contextmanager
def faulty(pool: CachePool, store: CacheStore, fault: Callable[[str], object]) -> Iterator[None]:
    """Have all calls of one store to the disk of a pool go by `fault` first."""
    backend: Any = store._cache.backend
    hits: Any = store._hits
    # All reads are calls of these.
    at_once, alone = hits._look_up, hits._look_up_alone
    hits._look_up = alone
    scanner: Any = pool._pool.directory.layout.scanner  # type: ignore[union-attr]
    before = backend._segments, backend._pages._segments, scanner.files
    backend._segments = Disk(before[0], fault)
    backend._pages._segments = Disk(before[1], fault)
    scanner.files = Disk(before[2], fault)
    try:
        yield
    finally:
        backend._segments, backend._pages._segments, scanner.files = before
        if hits._look_up is alone:
            hits._look_up = at_once


async def check_reads(store: CacheStore, source: MemoryStore) -> None:
    """Assert that each method that reads answers as the source does."""
    for key in VALUES:
        for request in REQUESTS:
            assert await read(store, key, request) == await read(source, key, request)
        assert await store.exists(key) == await source.exists(key)
        if await source.exists(key):
            assert await store.getsize(key) == await source.getsize(key)
        found = await store.get_partial_values(PROTOTYPE, [(key, one) for one in REQUESTS])
        expected = [await read(source, key, one) for one in REQUESTS]
        assert [value and value.to_bytes() for value in found] == expected
    for prefix in ("", "d"):
        assert await listed(store.list_dir(prefix)) == await listed(source.list_dir(prefix))
        assert await listed(store.list_prefix(prefix)) == await listed(source.list_prefix(prefix))
    assert await listed(store.list()) == await listed(source.list())


async def use(store: CacheStore, source: MemoryStore) -> None:
    """Call each method that reads or writes; assert that it does what the source alone would do."""
    await check_reads(store, source)
    for key in ("1", "d/2", "large"):
        await store.set(key, buf(b"new" * 10))
    await check_reads(store, source)
    await store.delete("0")
    await store.delete_dir("d")
    await store.set_if_not_exists("1", buf(b"unused"))
    await store.set_if_not_exists("new", buf(b"new"))
    await store.invalidate("2")
    await check_reads(store, source)
    await store.clear_cache()
    await check_reads(store, source)
    await store.clear()
    await check_reads(store, source)


@contextlib.asynccontextmanager
async def warm(path: Path) -> AsyncIterator[tuple[CachePool, CacheStore, MemoryStore]]:
    """A pool that two neighbours use as well, and a warm store over it, which are sound in the end."""
    pool = pool_with_neighbours(path)
    source = MemoryStore({key: buf(value) for key, value in VALUES.items()})
    store = CacheStore(source, cache_store=pool, source_id="mine")
    for key in VALUES:
        await read(store, key)
    await drained(store)
    yield pool, store, source
    await drained(store)
    await check_invariants_async(store)
    for name in NEIGHBOURS:
        await check_neighbour(neighbour(pool, name), name)
    # What could not be deleted is deleted, or counted.
    states = {entry.state for entry in entries(store)}
    assert states <= {"live", "delete-failed"}
    await check_reads(store, source)
    await drained(store)
    await check_quiet(store)


async def test_no_change_reads_all_headers_where_the_index_is_complete(tmp_path: Path) -> None:
    """That would take time in proportion to all that the pool holds, other sources included."""
    calls: list[str] = []
    async with warm(tmp_path / "pool") as (pool, store, source):
        with faulty(pool, store, calls.append):
            await use(store, source)
    assert {"read", "delete"} <= set(calls)
    assert not {"delete_below", "scan", "values"} & set(calls)


@pytest.mark.once
@pytest.mark.parametrize("operation", RAISES)
async def test_call_that_raises_any_error_costs_no_method(tmp_path: Path, operation: str) -> None:
    for name, error in RAISES[operation].items():
        async with warm(tmp_path / name) as (pool, store, source):

            def fault(call: str, error: Callable[[], Exception] = error) -> None:
                if operation == call or (operation == "all" and call in OF_DISK):
                    raise error()

            with faulty(pool, store, fault):
                await asyncio.wait_for(use(store, source), BOUNDED)
        del pool, store


@pytest.mark.once
@pytest.mark.parametrize("operation", ["read", "recorded"])
async def test_call_that_never_answers_costs_no_method(tmp_path: Path, operation: str) -> None:
    go = threading.Event()

    def fault(call: str) -> None:
        if operation == call and threading.current_thread() is not threading.main_thread():
            assert go.wait(2 * BOUNDED)

    async with warm(tmp_path / "pool") as (pool, store, source):
        try:
            with faulty(pool, store, fault):
                await asyncio.wait_for(use(store, source), BOUNDED)
        finally:
            go.set()
        await until(lambda: all(one.state in ("live", "delete-failed") for one in entries(store)))
