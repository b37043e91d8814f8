"""The bound of a cache directory without fills: what is above it is evicted in the background."""

from __future__ import annotations

import contextlib
import time
import weakref
from typing import TYPE_CHECKING, Any, Final

from zcache._core import Index, take_folder_bytes
from zcache._index.handle import ignore
from zcache._runtime.threads import run_in_background
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._index.handle import IndexHandle

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
    """

    def __init__(
        self,
        handle: IndexHandle,
        clock: Callable[[], float],
        remove: Callable[[list[str], Any], list[Any]],
    ) -> None:
        self._remove = remove
        self._clock = clock
        self.handle = handle

    def enforce(self) -> None:
        """Evict in the background, as long as the directory is used."""
        this = weakref.ref(self)
        with contextlib.suppress(RuntimeError):  # No thread now; the next fill does it.
            run_in_background(lambda: _enforce(this))

    def evict_excess(self) -> bool:
        """Evict a batch; whether there may be more.

        Raises
        ------
        IndexLockTimeout
            If another process holds the lock of the index.
        """
        handle = self.handle
        excess, is_complete = handle.call_blocking(_excess)
        if not excess:
            return not is_complete
        victims = handle.call_blocking(Index.evict, excess, self._clock())
        if not victims:
            return not is_complete
        take_folder_bytes()
        cells = [cell for cell, _ in victims]
        known = handle.call_blocking(Index.expected, cells)
        outcome = self._remove([name for _, name in victims], known)
        failed = [cell for cell, error in zip(cells, outcome, strict=True) if error]
        gone = [cell for cell, error in zip(cells, outcome, strict=True) if not error]
        handle.call_later(ignore, Index.confirm_deletes, gone, failed)
        if folders := take_folder_bytes():
            handle.call_later(ignore, Index.count_folders, folders)
        # What cannot be deleted now is tried again by the next fill.
        return bool(gone)


def _enforce(reference: weakref.ref[Bound]) -> None:
    opening = 0
    for _ in range(_LOOKS):
        bound = reference()
        if bound is None or not bound.handle.usable:
            return
        is_open = bound.handle.is_open
        opening += not is_open
        if opening > _LOOKS_WHILE_OPENING:
            return
        try:
            if is_open and not bound.evict_excess():
                return
        except IndexLockTimeout:
            pass
        del bound
        time.sleep(_LOOK_AGAIN)


def _excess(index: Index) -> tuple[int, bool]:
    return index.excess, index.is_complete
