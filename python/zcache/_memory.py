"""The indexes of caches in memory: one for each store, whichever `CacheStore` uses it."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from zcache._core import Index
from zcache._identity import same_place

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.abc.store import Store
    from zarr.storage import MemoryStore

    from zcache._books import Books

# The indexes of caches in memory live as long as what they describe, by the number of its dict.
_memory: dict[int, tuple[weakref.ref[MemoryStore], Index, Store, weakref.WeakSet[Books]]] = {}
# Reentrant, for inside it the garbage collector may end a store.
_memory_lock = threading.RLock()


def memory_index(books: Books, source: Store, cache: MemoryStore) -> Index:
    """The index of a cache in memory.

    Raises
    ------
    ValueError
        If it belongs to another source, or holds what zcache did not write.
    """
    number = id(cache._store_dict)
    with _memory_lock:
        known = _memory.get(number)
        if (
            known is not None
            and (held := known[0]()) is not None
            and held._store_dict is cache._store_dict
        ):
            _, index, owner, sharing = known
            if not same_place(owner, source):
                raise ValueError(
                    f"cache_store={cache!r} holds the cache of {owner!r}, not of {source!r}. Give each "
                    "source a cache store of its own."
                )
            _share(index, sharing, books)
            return index
        if cache._store_dict and not books.adopt:
            first = next(iter(cache._store_dict))
            raise ValueError(
                f"cache_store={cache!r} is not empty and was not filled by zcache (it holds {first!r}, "
                "for instance). Give an empty one; or pass adopt=True if all that it holds is a cache "
                f"of {source!r}, which zcache may serve and delete."
            )
        index = Index(**books.options)
        # What cannot be dated is stale as soon as anything can be.
        index.adopt([(0, len(value), name) for name, value in cache._store_dict.items()])
        alone: weakref.WeakSet[Books] = weakref.WeakSet()
        _share(index, alone, books)
        _memory[number] = (weakref.ref(cache), index, source, alone)
        weakref.finalize(cache, _memory.pop, number, None)
        return index


def _share(index: Index, sharing: weakref.WeakSet[Books], books: Books) -> None:
    sharing.add(books)
    _rebound(index, sharing)
    weakref.finalize(books, _rebound, index, sharing).atexit = False


def _rebound(index: Index, sharing: weakref.WeakSet[Books]) -> None:
    """Put the strictest bounds in force: nobody's is broken because of somebody else."""
    with _memory_lock:
        if not (members := list(sharing)):
            return
        age = _strictest(members, "max_age")
        index.rebound(_strictest(members, "max_size"), age)
        for one in members:
            one.ageless = age is None


def _strictest(sharing: Iterable[Books], bound: str) -> Any:
    given = [books.options[bound] for books in sharing]
    return min((value for value in given if value is not None), default=None)


def after_fork() -> None:
    """Start with a lock of our own."""
    global _memory_lock
    _memory_lock = threading.RLock()
