"""Which pool a cache store stands for, and the backend of one source over it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol, cast

from zcache._backends.directory import files
from zcache._backends.listings import MemoryListings
from zcache._backends.pool.backend import MemoryPoolBackend, PoolBackend
from zcache._backends.pool.listings import SourceListings
from zcache._backends.pool.place import DirectoryPool, MemoryPool, Pool
from zcache._backends.pool.stores import PoolMemoryStore, PoolStore
from zcache._index.shared import SharedIndex, find_or_make
from zcache._runtime.fork import at_fork
from zcache._source.describe import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from zarr.abc.store import Store

    from zcache._backends.base import Backend
    from zcache._backends.pool.source import PoolSource
    from zcache._source.identity import SourceId


class Opening(Protocol):
    """What a cache store is opened with; see `open_backend`."""

    cache: Any
    source: Store
    source_id: SourceId
    adopt: bool
    limits: dict[str, Any]
    clock: Callable[[], float] | None


# As long as they are in use.
_pools: weakref.WeakValueDictionary[Hashable, Pool] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def pool_of(
    store: PoolStore | PoolMemoryStore,
    *,
    adopt: bool = False,
    clock: Callable[[], float] | None = None,
) -> Pool:
    """The pool of this process that a store stands for; it is opened if it is not in use yet.

    A store is asked where its path leads once: after that it stands for the same pool.

    Raises
    ------
    CacheOwnershipError
        If the directory is no pool, or another user's.
    """
    with _lock:
        if store.pool is not None:
            found: Pool = store.pool
            return found
        key = _key(store)
        pool = _pools.get(key)
        if pool is None:
            if isinstance(store, PoolStore):
                pool = DirectoryPool(store, adopt=adopt, clock=clock or time.time)
            else:
                pool = MemoryPool(store, clock or time.monotonic)
            pool.key = key
            pool.go_by(store.options)
            _pools[key] = pool
        else:
            pool.join(store)
        # In memory its values live as long as the store does.
        store.pool = pool
    pool.wait_for_bound()
    return pool


def _key(store: PoolStore | PoolMemoryStore) -> Hashable:
    if not isinstance(store, PoolStore):
        return ("dict", id(store._store_dict))
    path = os.path.realpath(store.root)
    own: Hashable = ("directory", path, store.read_only)
    identity = files.identity(path)
    with _lock:
        # The same path may lead to another directory by now, which the pool takes up.
        if own in _pools or identity is None:
            return own
        # One that is mounted in two places is one directory.
        for pool in list(_pools.values()):
            directory = pool.directory
            if (
                directory is not None
                and pool.read_only is store.read_only
                and files.identity(directory.root) == identity
            ):
                return ("directory", directory.root, store.read_only)
    return own


def open_pool(opening: Opening) -> Backend:
    """Open a pool for one source.

    Raises
    ------
    CacheOwnershipError
        If the directory is no pool, or another user's.
    """
    store = opening.cache
    pool = pool_of(store, adopt=opening.adopt, clock=opening.clock)
    name = opening.source_id.name
    key = ("pool", pool.key, name)
    shared = find_or_make(key, lambda: _new(pool, opening, name))
    source = cast("PoolSource", shared.place)
    if pool.directory is None:
        return MemoryPoolBackend(store, shared, source.label)
    return PoolBackend(store, shared)


def _new(pool: Pool, opening: Opening, name: str) -> SharedIndex:
    source = pool.source(name, describe(opening.source), opening.limits, opening.clock)
    breaker_clock = opening.clock or time.monotonic
    shared = SharedIndex(
        source.handle, opening.source, opening.source_id, source.clock, breaker_clock
    )
    shared.place, shared.users, shared.threads = source, pool.users, pool.threads
    directory = pool.directory
    if directory is None:
        shared.listings = source.listings = MemoryListings()
        return shared
    layout = directory.layout
    shared.listings = source.listings = SourceListings(
        layout.index_root, source.label, name, only_reads=pool.read_only
    )
    if not directory.filler.reads_only and directory.handle.usable:
        directory.register.add(pool.names[source.label])
    return shared


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    for pool in list(_pools.values()):
        pool.after_fork()


at_fork(_after_fork)
