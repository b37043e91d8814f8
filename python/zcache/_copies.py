"""What a copy of a store shares with it, and what it leaves behind."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING

from zarr.abc.store import Store
from zarr.storage import MemoryStore

from zcache._identity import TRANSIENT, innermost

if TYPE_CHECKING:
    from zcache._engine import Engine


def without_contents(cache: Store) -> Store:
    """The cache store itself, unless it keeps its values in memory: then one like it, but empty."""
    if isinstance(cache, MemoryStore):
        return type(cache)()
    inner = getattr(cache, "_store", None)
    if not isinstance(inner, Store) or not isinstance(innermost(inner), MemoryStore):
        return cache
    emptied = copy.copy(cache)
    vars(emptied)["_store"] = without_contents(inner)
    return emptied


def source_of_copy(engine: Engine, store: Store) -> Store | None:
    """What a copy of a `CacheStore` reads from that came with this source and meets this engine.

    The copy of a source in memory is other data, and must not share a cache with it: at home the copy
    reads the original, elsewhere one that is still equal. None where there is none.
    """
    inner, mine = innermost(store), innermost(engine.source)
    if isinstance(inner, MemoryStore):
        equal = isinstance(mine, MemoryStore) and mine._store_dict == inner._store_dict
        if engine.home != os.getpid() and not equal:
            return None
    elif not engine.identity.startswith(TRANSIENT) or engine.home != os.getpid():
        return store
    # A user's own that has no name may keep its values in memory as well.
    source = engine.source
    if source.read_only == store.read_only:
        return source
    try:
        return source.with_read_only(store.read_only)
    except NotImplementedError:
        return store


def same_cache(one: Engine, other: Engine) -> bool:
    if one.token == other.token:
        return True
    mine, theirs = one.cache, other.cache
    if isinstance(mine, MemoryStore) and isinstance(theirs, MemoryStore):
        # What they hold at the moment says nothing about what they are.
        return type(mine) is type(theirs) and mine.read_only == theirs.read_only
    return mine == theirs
