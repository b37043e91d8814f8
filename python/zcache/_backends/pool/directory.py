"""The directory of a pool."""

from __future__ import annotations

import errno
import weakref
from typing import TYPE_CHECKING, Any, Final

from zcache._backends.directory.index import CacheDirectory
from zcache._backends.pool.layout import PoolLayout
from zcache._backends.pool.register import Register

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._backends.pool.filler import PoolFiller
    from zcache._core import Index

_CANNOT_DELETE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


class Fillers:
    """The fillers of all sources of a pool, as `CacheDirectory` and `Recovery` see them."""

    def __init__(self) -> None:
        self.reads_only = False
        self.all: weakref.WeakSet[PoolFiller] = weakref.WeakSet()
        self._index: Index | None = None

    def add(self, filler: PoolFiller) -> None:
        filler.reads_only = self.reads_only
        self.all.add(filler)
        if self._index is not None:
            filler.start(self._index)

    def start(self, index: Index) -> None:
        """Begin to take jobs for this index."""
        self._index = index
        for filler in list(self.all):
            filler.start(index)

    def abandon(self) -> None:
        """Drop, in a forked child, the jobs of the parent."""
        self._index = None
        for filler in list(self.all):
            filler.abandon()


class PoolDirectory(CacheDirectory):
    """The directory of a pool."""

    layout_of = PoolLayout

    def _make_filler(self, clock: Callable[[], float]) -> Any:  # noqa: ARG002
        return Fillers()

    def _remove(self, names: list[str], known: Any) -> list[Any]:  # noqa: ARG002
        found: list[Any] = self.layout.scanner.files.delete(names)
        return found

    def _open_alone(self, until: float) -> None:
        super()._open_alone(until)
        if (numbers := self._hold_more_than_counted()) and self._is_alone():
            try:
                self.layout.scanner.give_back_unlisted(self.handle, numbers)
            except OSError:
                self.handle.mark_corrupt()

    def _hold_more_than_counted(self) -> list[int]:
        """Segments with blocks of which the index does not know: those of another copy, or with holes that were filled."""
        handle = self.handle
        if handle.limits.get("unit", 1) <= 1:
            return []
        # In this order: what is being written is counted before.
        held = self.layout.scanner.bytes_held()
        counted = handle.call_opened(_sizes_of_complete)
        if counted is None:
            return []
        return [number for number, size in held.items() if size > counted.get(number, 0)]

    def _read_from(self, error: OSError) -> None:
        # Nothing can be deleted from segments that cannot be written to; those of a full volume can be.
        self.layout.is_read_only |= error.errno in _CANNOT_DELETE
        super()._read_from(error)

    @property
    def register(self) -> Register:
        """The names of its sources."""
        return Register(self.layout.index_root, self.handle.limits.get("max_size"))


def _sizes_of_complete(index: Index) -> dict[int, int] | None:
    return dict(index.segment_sizes()) if index.is_complete else None
