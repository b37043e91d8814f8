"""The place of stores that keep no bytes, over one source: its index only knows what changes.

Stores over one source share one. Those over a part of another one's source tell each other what they change, by name.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from zarr.storage import MemoryStore

from zcache._backends.memory import MemoryBackend
from zcache._core import Index
from zcache._index.handle import ignore
from zcache._runtime.fork import at_fork
from zcache._source.identity import identify
from zcache._source.location import innermost, location_here, unwrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zarr.abc.store import Store

    from zcache._backends.base import Victim
    from zcache._index.shared import SharedIndex
    from zcache._runtime.io import IO


class SourcePlace(MemoryStore):
    """Stands for a source in this process; to be a cache store of `max_size=0`. See `place_of`.

    Parameters
    ----------
    name : str
        Of the source.
    is_ephemeral : bool
        Whether that is a name in this process only: then copies that are pickled one by one are of other values.
    """

    def __init__(self, name: str, is_ephemeral: bool) -> None:
        super().__init__()
        self._name = name
        self._is_ephemeral = is_ephemeral

    def emptied(self) -> SourcePlace:
        """Itself: see `without_contents`."""
        return self

    def __reduce__(self) -> Any:
        return SourcePlace if self._is_ephemeral else _named, (self._name, self._is_ephemeral)


# Reentrant: inside it the garbage collector may end a place.
_lock = threading.RLock()
_places: weakref.WeakValueDictionary[str, SourcePlace] = weakref.WeakValueDictionary()
_backends: weakref.WeakSet[SourceBackend] = weakref.WeakSet()


def place_of(source: Store) -> SourcePlace:
    """The one place in this process of all stores that show this source, as a path that was opened twice."""
    source_id = identify(source)
    return _named(source_id.name, source_id.is_ephemeral)


def _named(name: str, is_ephemeral: bool) -> SourcePlace:
    with _lock:
        place = _places.get(name)
        if place is None:
            place = _places[name] = SourcePlace(name, is_ephemeral)
        return place


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

    removes_by_name: ClassVar[bool] = True

    def __init__(self, store: SourcePlace, shared: SharedIndex, source: Store) -> None:
        super().__init__(store, shared)
        self._location = location_here(source)
        # A wrapper of a user's own may have other names for what it wraps.
        self._has_its_names = innermost(source) is unwrapped(source)
        with _lock:
            _backends.add(self)

    @property
    def tells_by_name(self) -> bool:
        # docstring inherited
        return True

    async def remove_key(
        self, io: IO, key: str, victims: Sequence[Victim], *, begins: bool
    ) -> None:
        # docstring inherited
        await super().remove_key(io, key, victims, begins=begins)
        self.tell_overlapping(key)

    async def remove_unlisted(
        self,
        io: IO,  # noqa: ARG002 - nothing waits
        prefix: str,
        *,
        begins: bool | None = None,  # noqa: ARG002 - the same before and after
    ) -> None:
        # docstring inherited
        self.tell_overlapping(prefix)

    def tell_later(self, prefix: str) -> None:
        # docstring inherited
        self.tell_overlapping(prefix)

    def tell_overlapping(self, prefix: str) -> None:
        # docstring inherited
        with _lock:
            others = [one for one in _backends if one.shared is not self.shared]
        for other in others:
            if (scope := self._scope_in(other, prefix)) is not None:
                handle = other.shared.handle
                handle.call_later(ignore, Index.invalidate, scope)
                handle.call_later(ignore, _drain_absences, scope)

    def _scope_in(self, other: SourceBackend, prefix: str) -> str | None:
        """What another place calls the keys at and below a prefix of this one; None if it has none of them."""
        if not self._location.overlaps(other._location):
            return None
        if not self._has_its_names or not other._has_its_names:
            return ""
        changed, root = self._location.below(prefix), other._location.below()
        if root.startswith(changed):
            return ""
        return changed[len(root) : -1] if changed.startswith(root) else None


def _drain_absences(index: Index, prefix: str) -> None:
    while index.drain_absences(prefix):
        pass


def _after_fork() -> None:
    """Start with a lock of our own: the thread that held the parent's may not exist here."""
    global _lock
    _lock = threading.RLock()


at_fork(_after_fork)
