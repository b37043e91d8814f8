"""A pool whose disk hangs, or refuses: the source serves, within a second, and all bytes stay counted."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from agent import refuse_to_share
from pools import NEIGHBOURS, check_neighbour, neighbour, pool_with_neighbours, source_of
from support import buf, check_quiet, largest_file, read, read_through, until
from zcache import CachePool, CacheStore
from zcache._backends.pool.layout import PoolLayout
from zcache.testing import check_invariants_async, entries, index_slot

if TYPE_CHECKING:
    from collections.abc import Iterator
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


async def test_write_without_the_index_of_a_pool_waits_while_the_headers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large pool: to find the values of a key by their headers takes longer than an answer may."""
    source = source_of(a=b"old", b=b"other")
    with monkeypatch.context() as patch:
        patch.setattr(PoolLayout, "open_index", refuse_to_share)
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
