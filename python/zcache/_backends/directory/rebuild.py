"""Rebuilds of the index of a cache directory, in the background."""

from __future__ import annotations

import contextlib
import weakref
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Final

from zcache._index.shared_wait import LOCK_TIMEOUT
from zcache._runtime.threads import run_in_background

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._backends.directory.layout import Layout
    from zcache._core import Index
    from zcache._index.handle import IndexHandle

REBUILD_PATIENCE: Final = LOCK_TIMEOUT
"""Seconds that the opening of a directory waits in all, for the lock of its index, a rebuild, or another
process that takes the directory over. Then that goes on in the background, and nothing is cached meanwhile."""


class Rebuild:
    """Has an empty index filled from a scan; until that is done it takes nothing in.

    Parameters
    ----------
    layout : Layout
        The directory.
    handle : IndexHandle
        The index.

    Attributes
    ----------
    why : str
        What made it necessary, for the log.
    """

    def __init__(self, layout: Layout, handle: IndexHandle) -> None:
        self._layout = layout
        # A rebuild keeps nothing alive: once all stores are gone it comes to nothing, and the next process
        # that opens the directory sees that its rebuild owner is gone.
        self._handle = weakref.ref(handle)
        self.why = ""
        self._work: Future[None] | None = None

    def here(self, why: str) -> None:
        """Fill the index in this thread."""
        handle = self._handle
        self._layout.scanner.rebuild(lambda: _usable(handle()), why)

    def begin(self, why: str) -> Future[None] | None:
        """Fill the index in the background.

        None where no thread can be started: `Recovery` tries again, unless there is so little to scan that it is
        done here.
        """
        self.why = why
        scanner, handle = self._layout.scanner, self._handle
        try:
            self._work = run_in_background(lambda: scanner.rebuild(lambda: _usable(handle()), why))
        except RuntimeError:  # No thread, or the process is about to end.
            self._work = None
            with contextlib.suppress(OSError):
                if self._layout.stamp.is_foreign or self._layout.is_empty():
                    self._work = _done(lambda: self.here(why))
        return self._work

    def begin_watched(self, why: str) -> None:
        """Fill the index in the background, and do without the directory where that fails."""
        work = self.begin(why)
        if work is not None:
            self.watch(work)

    def is_stopped(self, index: Index) -> bool:
        """Whether the index is this process's to fill, and nothing fills it.

        No thread could be started, or the scan was ended because the index was about to be emptied.
        """
        is_running = self._work is not None and not self._work.done()
        return not is_running and not index.is_complete and index.adopt([])

    def go_on(self) -> None:
        """Begin again what has stopped."""
        self.begin_watched(self.why)

    def wait(self, work: Future[None], seconds: float | None) -> None:
        """Wait for a rebuild; after `seconds` it goes on in the background."""
        wait([work], seconds)
        if work.done():
            work.result()
        else:
            self.watch(work)

    def watch(self, work: Future[None]) -> None:
        """Let a rebuild go on in the background, and do without the directory where it fails."""
        handle = self._handle

        def ended(work: Future[None]) -> None:
            failure = work.exception()
            if failure is not None and (found := handle()) is not None:
                found.abandon(failure)

        work.add_done_callback(ended)


def _done(work: Callable[[], None]) -> Future[None]:
    """Do it here; what it raises is raised where the future is asked."""
    future: Future[None] = Future()
    try:
        work()
    except Exception as failure:  # noqa: BLE001
        future.set_exception(failure)
    else:
        future.set_result(None)
    return future


def _usable(handle: IndexHandle | None) -> IndexHandle | None:
    return handle if handle is not None and handle.usable else None
