"""The bound of a cache directory without fills: what is above it is evicted in a thread."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any, Final

from zcache._backends.directory.folders import counted
from zcache._core import Index
from zcache._index.handle import ignore
from zcache._runtime.latch import Latch
from zcache._runtime.thread_calls import run_in_background
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._index.handle import IndexHandle

BOUND_PATIENCE: Final = 5.0
"""Seconds that the opening of a directory or of a store waits for others' values above the bound to go."""
_LOOKS: Final = 100_000
"""Batches that one opening evicts at most."""
_LOOKS_WHILE_OPENING: Final = 1000
"""Looks of it at an index that is not open yet."""
_LOOK_AGAIN: Final = 0.005
"""Seconds between two looks."""


class Bound:
    """Evicts what is above the bound.

    Parameters
    ----------
    handle : IndexHandle
        The index of the directory.
    clock : callable
        Seconds since 1970.
    remove : callable
        Deletes the bytes of entries by their names, and what they should hold; returns an error or None for each.
    after : callable
        Called when the index has heard of that.
    """

    def __init__(
        self,
        handle: IndexHandle,
        clock: Callable[[], float],
        remove: Callable[[list[str], Any], list[Any]],
        after: Callable[[], object],
    ) -> None:
        self._remove = remove
        self._after = after
        self._clock = clock
        self.handle = handle
        self._kept = Latch()
        self._kept.set()

    def enforce(self) -> None:
        """Evict in the background, as long as the directory is used."""
        this, kept = weakref.ref(self), Latch()
        self._kept = kept

        def enforce() -> None:
            try:
                _enforce(this, kept)
            finally:
                kept.set()

        try:
            run_in_background(enforce)
        except RuntimeError:  # No thread now; the next fill does it.
            kept.set()

    def after_fork(self) -> None:
        """Wait for no thread of the parent."""
        self._kept = Latch()
        self._kept.set()

    def wait(self) -> None:
        """Wait until the bound is kept, or nothing can be evicted now: `BOUND_PATIENCE` seconds at most."""
        self._kept.wait(BOUND_PATIENCE)

    def evict_excess(self) -> tuple[bool, bool]:
        """Evict a batch; whether anything was, and whether there may be more.

        Raises
        ------
        IndexLockTimeout
            If another process holds the lock of the index.
        """
        handle = self.handle
        excess, is_complete = handle.call_blocking(_excess)
        if not excess:
            return False, not is_complete
        victims = handle.call_blocking(Index.evict, excess, self._clock())
        if not victims:
            return False, not is_complete
        cells = [cell for cell, _ in victims]
        known = handle.call_blocking(Index.expected, cells)
        # Folders are told before deletes are confirmed: until then the victims count, which leaves room for the folder of marks.
        with counted(handle):
            outcome = self._remove([name for _, name in victims], known)
        failed = [cell for cell, error in zip(cells, outcome, strict=True) if error]
        gone = [cell for cell, error in zip(cells, outcome, strict=True) if not error]
        handle.call_later(ignore, Index.confirm_deletes, gone, failed)
        self._after()
        # What cannot be deleted now is tried again by the next fill.
        return bool(gone), bool(gone)


def _enforce(reference: weakref.ref[Bound], kept: Latch) -> None:
    opening = 0
    for _ in range(_LOOKS):
        bound = reference()
        if bound is None or not bound.handle.usable:
            return
        opening += not bound.handle.is_open
        if opening > _LOOKS_WHILE_OPENING:
            return
        has_evicted = False
        try:
            has_evicted, has_more = bound.evict_excess()
            if not has_more:
                return
        except IndexLockTimeout:
            pass
        if not has_evicted:
            kept.set()
        del bound
        time.sleep(_LOOK_AGAIN)


def _excess(index: Index) -> tuple[int, bool]:
    return index.excess, index.is_complete
