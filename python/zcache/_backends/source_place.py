"""The place of stores that keep no bytes, over one source: its index only knows what changes.

Stores over one source share one. Those over a part of another one's source tell each other what they change, by name:
when it begins, and when it ends.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from zarr.storage import MemoryStore

from zcache._backends.memory import MemoryBackend
from zcache._core import Index
from zcache._index.calls import drain_absences
from zcache._index.handle import ignore
from zcache._runtime.fork import at_fork
from zcache._runtime.registry import Registry
from zcache._source.identity import identify, name_after_fork
from zcache._source.location import innermost, layers, location_here, unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

    from zcache._index.shared import SharedIndex


class SourcePlace(MemoryStore):
    """Stands for a source in this process; to be a cache store of `max_size=0`. See `place_of`.

    What is unpickled stands for none: each process names its sources itself.
    """

    def __reduce__(self) -> Any:
        return SourcePlace, ()


# Reentrant: inside it the garbage collector may end a place.
_lock = threading.RLock()
# By the name of the source, and how many places are below.
_places: weakref.WeakValueDictionary[tuple[str, int], SourcePlace] = weakref.WeakValueDictionary()
_backends: Registry[SourceBackend] = Registry()
# Those that have not ended. One that is cut off may land at any time, and never ends.
_changes: set[_Change] = set()


def place_of(source: Store) -> SourcePlace:
    """The one place in this process of all stores that show this source, as a path that was opened twice."""
    # A store around one that has a place gets another: with one index a read would wait for itself.
    above = sum(
        isinstance(getattr(one, "_cache_store", None), SourcePlace) for one in layers(source)
    )
    name = identify(source).name
    with _lock:
        place = _places.get((name, above))
        if place is None:
            place = _places[name, above] = SourcePlace()
        return place


class _Change:
    """A change of a source through one place, told to the others.

    Parameters
    ----------
    backend : SourceBackend
        Of that place, which knows of it.
    prefix : str
        What changes there.
    is_key : bool
        Whether that is one key.
    """

    def __init__(self, backend: SourceBackend, prefix: str, *, is_key: bool) -> None:
        self._count = backend.shared.changes.count
        backend.shared.changes.begin(prefix, is_key=is_key)
        self._is_key = is_key
        self._location, self._has_its_names = backend.location, backend.has_its_names
        self._prefix = prefix
        # Each index is told once; or, by two threads at a time, twice. It hears of the end as often.
        self._known = Registry([backend.shared])
        self._told: list[tuple[weakref.ref[SharedIndex], str]] = []

    def tell(self, backend: SourceBackend) -> None:
        """Have another place keep nothing of it until it ends."""
        scope = self._scope_in(backend)
        if scope is None or backend.shared in self._known:
            return
        self._known.add(backend.shared)
        backend.shared.handle.call_later(ignore, Index.invalidate, scope, True)
        # Where names differ it may be any of its keys.
        backend.shared.changes.begin(scope, is_key=self._is_key and scope != "")
        self._told.append((weakref.ref(backend.shared), scope))
        # Another thread, or the garbage collector, may have ended it meanwhile.
        if self not in _changes:
            self._tell_end()

    def end(self) -> None:
        """Tell those that it has ended."""
        with _lock:
            _changes.discard(self)
        self._count()
        self._tell_end()

    def _tell_end(self) -> None:
        while True:
            try:
                shared, scope = self._told.pop()
            except IndexError:
                return
            if (one := shared()) is not None:
                one.changes.count()
                one.handle.call_later(ignore, Index.invalidate, scope, False)
                one.handle.call_later(ignore, _drain_absences, scope)

    def _scope_in(self, other: SourceBackend) -> str | None:
        """What another place calls the keys that change; None if it has none of them."""
        if not self._location.overlaps(other.location):
            return None
        if not self._has_its_names or not other.has_its_names:
            return ""
        changed, root = self._location.below(self._prefix), other.location.below()
        if root.startswith(changed):
            return ""
        return changed[len(root) : -1] if changed.startswith(root) else None


class SourceBackend(MemoryBackend):
    """Tells the places of other parts of its source what changes.

    Parameters
    ----------
    store : SourcePlace
        The place.
    shared : SharedIndex
        Its index.
    source : Store
        What changes.
    """

    def __init__(self, store: SourcePlace, shared: SharedIndex, source: Store) -> None:
        super().__init__(store, shared)
        self.location = location_here(source)
        # A wrapper of a user's own may have other names for what it wraps.
        self.has_its_names = innermost(source) is unwrapped(source)
        with _lock:
            _backends.add(self)
            changes = list(_changes)
        for change in changes:
            change.tell(self)

    def begin_change(self, prefix: str, *, is_key: bool = False) -> Callable[[], None]:
        # docstring inherited
        change = _Change(self, prefix, is_key=is_key)
        with _lock:
            _changes.add(change)
            others = _backends.snapshot()
        for other in others:
            change.tell(other)
        return change.end


def _drain_absences(index: Index, prefix: str) -> None:
    drain_absences(index.drain_absences, prefix)


def _after_fork() -> None:
    """Start with a lock of our own: the thread that held the parent's may not exist here."""
    global _lock, _places
    _lock = threading.RLock()
    places, _places = _places, weakref.WeakValueDictionary()
    for (name, above), place in places.items():
        _places[name_after_fork(name), above] = place
    # They end in the parent, and the indexes here know of none.
    _changes.clear()


at_fork(_after_fork)
