"""The directory of a pool."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Final

from zcache._backends.access import Access
from zcache._backends.directory.index import CacheDirectory
from zcache._backends.pool.layout import PoolLayout
from zcache._backends.pool.register import Register
from zcache._core import Index
from zcache._runtime.thread_calls import run_in_background
from zcache._runtime.threads import NoThreadError
from zcache.exceptions import IndexLockTimeout

_AT_ONCE: Final = 64
"""Segments that are removed between two steps of the index."""


class PoolDirectory(CacheDirectory):
    """The directory of a pool."""

    layout_of = PoolLayout

    def _remove(self, names: list[str], known: Any) -> list[Any]:  # noqa: ARG002
        found: list[Any] = self.layout.scanner.files.delete(names)
        return found

    def _prepare(self, *args: Any) -> None:
        super()._prepare(*args)
        self._register = Register(self.layout.index_root)
        this = weakref.ref(self)
        # Where they have appended no one does any more.
        self.recovery.on_reclaimed = lambda: _remove_empty_later(this())

    def note_deletes(self, emptied: bool) -> None:
        if emptied:
            _remove_empty_later(self)

    def after_evictions(self) -> None:
        self.remove_empty_segments()

    def remove_empty_segments(self) -> None:
        """Remove the files of all segments without values; what fails is tried with the next ones."""
        handle, files = self.handle, self.layout.scanner.files
        if self.layout.access is not Access.FILLS or not handle.usable:
            return
        with contextlib.suppress(IndexLockTimeout):
            while spent := handle.call_opened(Index.spent_segments, _AT_ONCE):
                gone = []
                for segment in spent:
                    with contextlib.suppress(OSError):
                        files.remove(segment[1])
                        gone.append(segment)
                if not gone:
                    return
                handle.call_opened(Index.segments_removed, gone)

    def _open_alone(self, until: float) -> None:
        super()._open_alone(until)
        self.remove_empty_segments()
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

    @property
    def register(self) -> Register:
        """The names of its sources."""
        self._register.limit(self.handle.limits.get("max_size"))
        return self._register


def _sizes_of_complete(index: Index) -> dict[int, int] | None:
    return dict(index.segment_sizes()) if index.is_complete else None


def _remove_empty_later(directory: PoolDirectory | None) -> None:
    if directory is not None:
        # Where there is no thread now, the next fill does it.
        with contextlib.suppress(NoThreadError):
            run_in_background(directory.remove_empty_segments)
