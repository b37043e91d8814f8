"""Rebuilds of the index of a cache directory, in the background."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Final

from zcache._index.shared_wait import LOCK_TIMEOUT
from zcache._runtime.latch import Outcome
from zcache._runtime.thread_calls import run_in_background

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
        self.after_fork()

    def after_fork(self) -> None:
        """Begin anew in a forked child: the thread that fills the index is the parent's."""
        self._work: Outcome[None] | None = None

    def here(self, why: str) -> None:
        """Fill the index in this thread."""
        handle = self._handle
        self._layout.scanner.rebuild(lambda: _usable(handle()), why)

    def begin(self, why: str) -> Outcome[None] | None:
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
        is_running = self._work is not None and not self._work.is_set
        return not is_running and not index.is_complete and index.adopt([])

    def go_on(self) -> None:
        """Begin again what has stopped."""
        self.begin_watched(self.why)

    def wait(self, work: Outcome[None], seconds: float | None) -> None:
        """Wait for a rebuild; after `seconds` it goes on in the background."""
        if work.wait(seconds):
            work.result()
        else:
            self.watch(work)

    def watch(self, work: Outcome[None]) -> None:
        """Let a rebuild go on in the background, and do without the directory where it fails."""
        handle = self._handle

        def ended() -> None:
            if work.error is not None and (found := handle()) is not None:
                found.abandon(work.error)

        work.call_when_set(ended)


def _done(work: Callable[[], None]) -> Outcome[None]:
    """Do it here; what it raises is raised where the outcome is asked."""
    outcome: Outcome[None] = Outcome()
    try:
        work()
    except Exception as failure:  # noqa: BLE001
        outcome.fail(failure)
    else:
        outcome.succeed(None)
    return outcome


def _usable(handle: IndexHandle | None) -> IndexHandle | None:
    return handle if handle is not None and handle.usable else None
