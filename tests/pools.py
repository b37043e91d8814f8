"""Pools that other sources use as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zarr.core.sync import sync
from zarr.storage import MemoryStore

from support import buf, drained, read
from zcache import CachePool, CacheStore
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("a", "k", "foo", "c/0", "foo/zarr.json", "zarr.json", "foo/c/0/0", "foo/c/0.0")
"""Keys of which the neighbours have values: those of most suites."""
NEIGHBOURS = ("neighbour", "another neighbour")


def source_of(**values: bytes) -> StoreDouble:
    """A source in memory that counts."""
    return StoreDouble(MemoryStore({key: buf(value) for key, value in values.items()}))


def neighbour(pool: CachePool, name: str, keys: tuple[str, ...] = KEYS) -> CacheStore:
    """Another source of a pool, whose values are its name and their key, all of them cached."""
    source = MemoryStore({key: buf(f"{name}: {key}".encode()) for key in keys})
    store = CacheStore(source, cache_store=pool, source_id=name)

    async def warm() -> None:
        for key in keys:
            await read(store, key)
        await drained(store)

    sync(warm())
    return store


async def check_neighbour(store: CacheStore, name: str) -> None:
    """Assert that a neighbour is served its own values."""
    for key in KEYS:
        assert await read(store, key) == f"{name}: {key}".encode()


def pool_with_neighbours(path: Path | None, **options: Any) -> CachePool:
    """A pool in which two other sources have values of their own."""
    pool = CachePool(path, **options)
    for name in NEIGHBOURS:
        neighbour(pool, name)
    return pool
