"""Which pool a cache store stands for, and the backend of one source over it."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from zcache._backends.access import Access
from zcache._backends.directory import files
from zcache._backends.listings import MemoryListings
from zcache._backends.pool.backend import MemoryPoolBackend, PoolBackend
from zcache._backends.pool.listings import SourceListings
from zcache._backends.pool.place import DirectoryPool, MemoryPool, Pool
from zcache._backends.pool.stores import PoolMemoryStore, PoolStore
from zcache._index.shared import SharedIndex, find_or_make
from zcache._runtime.apart import OneForEach
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


_pools: OneForEach[Pool] = OneForEach()


def pool_of(store: PoolStore | PoolMemoryStore, *, adopt: bool = False) -> Pool:
    """The pool of this process that a store stands for; it is opened if it is not in use yet.

    A store is asked where its path leads once: after that it stands for the same pool.

    Raises
    ------
    CacheOwnershipError
        If the directory is no pool, or another user's.
    """
    if store.pool is not None:
        found: Pool = store.pool
        return found
    own = _own_key(store)
    identity = None
    with _pools.making(own):
        if isinstance(store, PoolStore):
            identity = files.identity(str(store.root))
        # One that is mounted in two places is one directory. Always in this order.
        with _pools.making(("identity", identity or own)):
            pool = _find(store, own, identity)
            is_new = pool is None
            if pool is None:
                if isinstance(store, PoolStore):
                    pool = DirectoryPool(store, adopt=adopt)
                else:
                    pool = MemoryPool(store)
                pool.key = own
                pool.go_by(store)
                _pools.add(own, pool)
    if not is_new:
        pool.join(store)
    # In memory its values live as long as a store over it does.
    store.pool = pool
    pool.wait_for_bound()
    return pool


def _own_key(store: PoolStore | PoolMemoryStore) -> Hashable:
    if isinstance(store, PoolStore):
        return ("directory", os.path.realpath(store.root), store.read_only)
    return ("memory", store.token)


def of_copy(store: PoolStore | PoolMemoryStore) -> PoolStore | PoolMemoryStore:
    """What a copy of a `CachePool` stands for, where this has come with it.

    In the process that made a pool in memory, all its copies stand for one other pool, empty at first.
    """
    if isinstance(store, PoolMemoryStore) and store.has_come:
        found = _pools.get(_own_key(store))
        if found is not None and found.home == os.getpid():
            return PoolMemoryStore(store.options, f"copy of {store.token}", has_come=True)
    return store


def _find(store: PoolStore | PoolMemoryStore, own: Hashable, identity: object) -> Pool | None:
    """The pool that is in use and that this stands for."""
    # The same path may lead to another directory by now, which the pool takes up.
    found = _pools.get(own)
    if identity is None or found is not None:
        return found
    for pool in _pools.snapshot():
        directory = pool.directory
        if (
            directory is not None
            and pool.read_only is store.read_only
            and files.identity(directory.root) == identity
        ):
            return pool
    return None


def open_pool(opening: Opening) -> Backend:
    """Open a pool for one source.

    Raises
    ------
    CacheOwnershipError
        If the directory is no pool, or another user's.
    """
    store = opening.cache
    pool = pool_of(store, adopt=opening.adopt)
    name = opening.source_id.name
    make = partial(_new, pool, opening, name)
    shared = find_or_make(("pool", pool.key), make, source=name)
    source = cast("PoolSource", shared.place)
    if pool.directory is None:
        return MemoryPoolBackend(store, shared, source.label)
    return PoolBackend(store, shared)


def _new(pool: Pool, opening: Opening, name: str) -> SharedIndex:
    source = pool.source(name, describe(opening.source), opening.limits, opening.clock)
    shared = SharedIndex(
        source.handle, opening.source, opening.source_id, source.clock, pool.breaker
    )
    shared.place = source
    shared.threads = pool.threads
    directory = pool.directory
    if directory is None:
        shared.listings = source.listings = MemoryListings()
        return shared
    layout = directory.layout
    shared.listings = source.listings = SourceListings(
        layout.index_root, name, only_reads=pool.read_only
    )
    if directory.layout.access is Access.FILLS and directory.handle.usable:
        directory.register.add(pool.names[source.label])
    return shared


def _after_fork() -> None:
    for pool in _pools.snapshot():
        pool.after_fork()


at_fork(_after_fork)
