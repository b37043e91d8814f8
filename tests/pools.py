"""The kinds of cache store; pools that other sources use as well."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from support import buf, drained, read
from zcache import CachePool, CacheStore
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from zarr.abc.store import Store

KEYS = ("a", "k", "foo", "c/0", "foo/zarr.json", "zarr.json", "foo/c/0/0", "foo/c/0.0")
"""Keys of which the neighbours have values: those of most suites."""
NEIGHBOURS = ("neighbour", "another neighbour")
CACHES: dict[str, Callable[[Path], Store | CachePool]] = {
    "memory": lambda _: MemoryStore(),
    "directory": LocalStore,
    "pool": CachePool,
    "memory pool": lambda _: CachePool(),
}
"""Cache stores of each kind that knows what it holds, by name; they get a folder."""
ON_DISK = ("directory", "pool")
"""Those of them that several processes use."""
STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda _: MemoryStore(),
    "directory": LocalStore,
    "store": lambda _: StoreDouble(MemoryStore()),
}
"""Those of one source, by name: also one that has to be listed. They get a folder."""


def one_of(makers: Mapping[str, Callable[[Path], Any]]) -> Any:
    """A fixture of a cache store of each kind."""

    @pytest.fixture(params=makers)
    def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        return makers[request.param](tmp_path / "cache")

    return cache


def cache_at(path: Path) -> Store | CachePool:
    """A cache directory, or a pool where `ZCACHE_TEST_POOL` says so, for tests with several processes."""
    return CachePool(path) if os.environ.get("ZCACHE_TEST_POOL") else LocalStore(path)


def within_bound(store: CacheStore) -> CacheStore:
    """The store, once what its neighbours had beyond its bound is gone; fills meanwhile would evict for that as well."""
    while store.cache_info()["current_size"] > (store.max_size or math.inf):
        time.sleep(0.001)
    return store


def source_of(**values: bytes) -> StoreDouble:
    """A source in memory that counts."""
    return StoreDouble(MemoryStore({key: buf(value) for key, value in values.items()}))


def neighbour(pool: CachePool, name: str, keys: tuple[str, ...] = KEYS) -> CacheStore:
    """Another source of a pool; its values are its name and their key, all of them cached."""
    source = MemoryStore({key: buf(neighbours_value(name, key)) for key in keys})
    store = CacheStore(source, cache_store=pool, source_id=name)

    async def warm() -> None:
        for key in keys:
            await read(store, key)
        await drained(store)

    sync(warm())
    return store


def neighbours_value(name: str, key: str) -> bytes:
    """What a neighbour has under a key."""
    return f"{name}: {key}".encode()


async def check_neighbour(store: CacheStore, name: str) -> None:
    """Assert that a neighbour is served its own values."""
    for key in KEYS:
        assert await read(store, key) == neighbours_value(name, key)
    # Where its pool was left alone, it is filled anew.
    await drained(store)


def pool_with_neighbours(path: Path | None = None, **options: Any) -> CachePool:
    """A pool in which two other sources have values of their own."""
    pool = CachePool(path, **options)
    for name in NEIGHBOURS:
        neighbour(pool, name)
    return pool


POOLS: dict[str, Callable[[Path], CachePool]] = {
    "pool": pool_with_neighbours,
    "memory pool": lambda _: pool_with_neighbours(),
}
"""Pools that two other sources use as well, by name; they get a folder."""
POOL_PATHS: dict[str, Callable[[Path], Path | None]] = {
    "directory": lambda path: path,
    "memory": lambda _: None,
}
"""Paths of pools: that of a folder, and None in memory."""
BESIDE_OTHERS = {**CACHES, **POOLS}
"""`CACHES`, of which the pools are `POOLS`."""
