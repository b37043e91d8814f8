"""What a copy of a store shares with it, and what it leaves behind."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from zarr.abc.store import Store
from zarr.storage import MemoryStore

from zcache._identity import innermost

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


def same_data(one: Store, other: Store) -> bool:
    one, other = innermost(one), innermost(other)
    return (
        isinstance(one, MemoryStore)
        and isinstance(other, MemoryStore)
        and one._store_dict == other._store_dict
    )


def same_cache(one: Engine, other: Engine) -> bool:
    if one.token == other.token:
        return True
    mine, theirs = one.cache, other.cache
    if isinstance(mine, MemoryStore) and isinstance(theirs, MemoryStore):
        # What they hold at the moment says nothing about what they are.
        return type(mine) is type(theirs) and mine.read_only == theirs.read_only
    return mine == theirs
