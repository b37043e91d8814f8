"""The indexes of caches that are no directory: one for each store, whichever `CacheStore` uses it."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from zcache._buffers import own
from zcache._core import Index
from zcache._identity import (
    TRANSIENT,
    innermost,
    outlives_process,
    place_in_process,
    same_source,
)
from zcache._standins import Unlisted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.abc.store import Store
    from zarr.storage import MemoryStore

    from zcache._books import Books
    from zcache._identity import Named

_BY_STRICTNESS: Final = ("never", "first", "always")


class Shared:
    """An index, and those who use it.

    Attributes
    ----------
    index : Index or Unlisted
        The index itself, or what stands for it until its store is listed.
    """

    def __init__(self, index: Index | Unlisted, source: Named) -> None:
        self.index = index
        self._source = source
        self._books: weakref.WeakSet[Books] = weakref.WeakSet()
        self._process = os.getpid()

    def join(self, books: Books) -> None:
        """Use it as well; the strictest bounds are in force, so nobody's is broken for another."""
        self._books.add(books)
        self._rebound()
        weakref.finalize(books, self._rebound).atexit = False

    @property
    def is_used(self) -> bool:
        """Whether somebody uses it."""
        return bool(list(self._books))

    def _rebound(self) -> None:
        with _lock:
            if not (members := list(self._books)):
                return
            age = _least(members, "max_age")
            verify = max((books.options["verify"] for books in members), key=_BY_STRICTNESS.index)
            index = self.index.within if isinstance(self.index, Unlisted) else self.index
            index.rebound(_least(members, "max_size"), age, verify)
            for one in members:
                one.ageless = age is None

    def check(self, cache: Store, source: Named) -> None:
        """See that it is the index of this source.

        Raises
        ------
        ValueError
            If it is another's.
        """
        if not same_source(self._source, source):
            raise ValueError(
                f"cache_store={cache!r} holds the cache of {_said(self._source)}, not of {_said(source)}. "
                "Give each source a cache store of its own; or, if both are the same data, pass the same "
                "source_id= to both."
            )

    def after_fork(self, options: dict[str, Any]) -> None:
        """Start over in a forked child, once for all who use it."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        index, fresh = self.index, Index(**options)
        if isinstance(index, Unlisted) and not index.listed:
            self.index = Unlisted(fresh, index.changed)
        else:
            self.index = fresh
        self._rebound()


# Those of caches in memory live as long as what they describe, by the number of its dict: until the last
# store over it is gone.
_memory: dict[int, tuple[list[weakref.ref[MemoryStore]], Shared]] = {}
_Key: TypeAlias = tuple[tuple["str | int", ...], str]
# Others as long as somebody uses them, by the name of the place or the number of the store, and the
# name of the source.
_others: dict[_Key, Shared] = {}
# Reentrant, for inside it the garbage collector may end a store.
_lock = threading.RLock()


def memory_index(books: Books, source: Named, cache: MemoryStore) -> Shared:
    """The index of a cache in memory.

    Raises
    ------
    ValueError
        If it belongs to another source, or holds what zcache did not write.
    """
    number = id(cache._store_dict)
    with _lock:
        holders, shared = _memory.get(number, ([], None))
        held = [store for holder in holders if (store := holder()) is not None]
        if shared is not None and any(store._store_dict is cache._store_dict for store in held):
            shared.check(cache, source)
        else:
            if cache._store_dict and not books.adopt:
                first = next(iter(cache._store_dict))
                raise ValueError(
                    f"cache_store={cache!r} is not empty and was not filled by zcache (it holds "
                    f"{first!r}, for instance). Give an empty one; or pass adopt=True if all that it "
                    f"holds is a cache of {source.store!r}, which zcache may serve and delete."
                )
            index = Index(**books.options)
            values = cache._store_dict
            for value in values.values():
                own(value)
            # What cannot be dated is stale as soon as anything can be.
            index.adopt([(0, len(value), name) for name, value in values.items()])
            shared, held = Shared(index, source), []
        if not any(store is cache for store in held):
            kept = [*map(weakref.ref, held), weakref.ref(cache)]
            _memory[number] = (kept, shared)
            weakref.finalize(cache, _let_go, number).atexit = False
        shared.join(books)
        return shared


def _let_go(number: int) -> None:
    with _lock:
        holders, _ = _memory.get(number, ([], None))
        if not any(holder() is not None for holder in holders):
            _memory.pop(number, None)


def other_index(books: Books, source: Named, cache: Store) -> Shared:
    """The index of a cache store that is neither in memory nor a directory.

    Raises
    ------
    ValueError
        If it belongs to another source.
    """
    outlives = outlives_process(innermost(cache))
    place = place_in_process(cache)
    with _lock:
        # Whose it is a stamp tells at the first use, but not of sources that have no name, and in a
        # user's own store there is none.
        # Keys alone: pairs have to be made, and the garbage collector may end a store meanwhile.
        for known in list(_others):
            where, whose = known
            unnamed = whose.startswith(TRANSIENT) or source.name.startswith(TRANSIENT)
            other = _others.get(known)
            if where == place and (unnamed or not outlives) and other is not None and other.is_used:
                other.check(cache, source)
        key = (place, source.name if outlives else "")
        shared = _others.get(key)
        if shared is None or not shared.is_used:
            index = Index(**books.options)
            # What a user's own store holds now is not ours.
            shared = Shared(Unlisted(index) if outlives else index, source)
            _others[key] = shared
        shared.check(cache, source)
        if isinstance(shared.index, Unlisted) and shared.index.listed:
            shared.index = shared.index.within
        shared.join(books)
        weakref.finalize(books, _leave, key, shared).atexit = False
        return shared


def _leave(key: _Key, shared: Shared) -> None:
    with _lock:
        if not shared.is_used and _others.get(key) is shared:
            del _others[key]


def _said(source: Named) -> str:
    return repr(source.store) if source.name.startswith(TRANSIENT) else source.name


def _least(sharing: Iterable[Books], bound: str) -> Any:
    given = [books.options[bound] for books in sharing]
    return min((value for value in given if value is not None), default=None)


def after_fork() -> None:
    """Start with a lock of our own."""
    global _lock
    _lock = threading.RLock()
