"""How a directory is served that is only read from: by an index of this process's own, in memory."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING, Final

from zcache._backends.access import Access
from zcache._backends.directory.rebuild import REBUILD_PATIENCE
from zcache._core import Index
from zcache._index.calls import drain_absences, drained
from zcache._index.handle import IndexHandle
from zcache._runtime.thread_calls import run_in_background
from zcache.exceptions import CacheOwnershipError, CacheUnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._backends.directory.layout import Layout
    from zcache._runtime.latch import Outcome

logger = logging.getLogger("zcache")

LOOK_EVERY: Final = 1.0
"""Seconds between two looks for what others have added, ..."""
_SHARE: Final = 20
"""... and not before so many times as long has passed as the last one took."""
_MOST_CHANGES: Final = 1000
"""Changes of the source by this process after which it looks no more, for each of them has to be remembered."""


class PrivateIndex:
    """Serves what a directory holds that takes nothing, and adds nothing to it.

    Unless that was asked for, it may be over: the volume has room again, or permissions were mended. So each look tries
    first to use it as others do.

    What others add, and what they move, is found by a scan. Each one fills an index of its own, which then takes the
    place of the last one; nothing is lost by that, for such an index evicts nothing.

    Parameters
    ----------
    layout : Layout
        The directory.
    handle : IndexHandle
        Its index.

    Attributes
    ----------
    why : str
        Why it is only read from, and how to change that, for people.
    is_asked_for : bool
        Whether it is read from only because the user has said so.
    use_again : callable
        Uses the directory as others do, where that is possible by now; whether it is.
    """

    def __init__(self, layout: Layout, handle: IndexHandle) -> None:
        self._layout = layout
        self._handle = handle
        self.why = ""
        self.is_asked_for = False
        self.use_again: Callable[[], bool] = _cannot
        # What this process has changed: what is found of it may be older than the change.
        self._changed: set[str] = set()
        # Those of them of which others were told.
        self._told: set[str] = set()
        self.after_fork()

    def after_fork(self) -> None:
        """Begin anew in a forked child: the thread that looks is the parent's."""
        # Reentrant: inside it the garbage collector may end a change.
        self._lock = threading.RLock()
        self._work: Outcome[None] | None = None
        self._state: object = None
        self._next = 0.0

    def open(self) -> None:
        """Begin with what is there, within `REBUILD_PATIENCE` or else in the background."""
        handle = self._handle
        handle.index = Index(**handle.limits, complete=False)
        self._state = None
        self._next = 0.0
        self.look_again()
        if self._work is not None:
            self._work.wait(REBUILD_PATIENCE)

    def end(self) -> None:
        """Leave the directory to an index that takes values in."""
        with self._lock:
            self._changed.clear()
            self._told.clear()
            self._layout.set_access(Access.FILLS)

    def tell_changes(self, index: Index) -> None:
        """Tell who shares an index of what this process has changed, since the last call, while no one could be told.

        Raises
        ------
        OSError
            If the file system refuses.
        """
        with self._lock:
            changed = self._changed - self._told
            self._told |= changed
        try:
            for prefix in changed if len(changed) <= _MOST_CHANGES else [""]:
                index.invalidate(prefix)
                self._layout.scanner.remove_below(prefix)
                _drop(index, prefix)
        except BaseException:
            with self._lock:
                self._told -= changed
            raise

    def look_again(self) -> None:
        """Look in the background for what others have added, and for room, unless it is too early for that."""
        with self._lock:
            is_looking = self._work is not None and not self._work.is_set
            if is_looking or time.monotonic() < self._next:
                return
            this = weakref.ref(self)
            with contextlib.suppress(RuntimeError):  # No thread now; the next miss tries again.
                self._work = run_in_background(lambda: _look(this()))

    def look(self) -> None:
        """Serve what is there now."""
        # Not at the opening, which has just tried that.
        if self._next and not self.is_asked_for and self.use_again():
            return
        begun = time.monotonic()
        try:
            self._look()
        except CacheOwnershipError as error:
            self._layout.note_owner(error)
            if self._handle.usable:
                self._handle.abandon(error)
        except Exception as error:  # noqa: BLE001 - reads must go on, whatever it is
            if self._state is None:
                self._handle.abandon(error)
            else:
                logger.debug("the cache %s cannot be looked through: %r", self._layout.root, error)
        finally:
            ended = time.monotonic()
            self._next = ended + max(LOOK_EVERY, _SHARE * (ended - begun))

    def _look(self) -> None:
        layout, handle = self._layout, self._handle
        if len(self._changed) > _MOST_CHANGES:
            return
        is_there = layout.is_of_source()
        # Before the scan: what comes during it is another state.
        state = layout.scanner.state() if is_there else ()
        if state == self._state and handle.usable:
            return
        with contextlib.suppress(OSError):
            layout.note_block_size(only_looks=layout.access is Access.READS)
        handle.change_limits(layout.own_limits())
        limits = handle.limits
        index = Index(**limits, complete=False)
        found = IndexHandle(index, handle.name, limits)
        if is_there:
            layout.scanner.rebuild(lambda: found, "it is only read from")
        else:
            index.finish_rebuild()
        if not index.is_complete:
            return  # Another look was faster.
        # What a change that is noted after this has to drop, its end drops from this index.
        with self._lock:
            for prefix in self._changed:
                _drop(index, prefix)
            is_back = not handle.usable
            if is_back:
                handle.restore(index)
            else:
                handle.index = index
            layout.is_others = False
        if is_back:
            handle.say_restored()
        self._state = state
        handle.apply_limits()

    def look_anew(self) -> None:
        """Have the next look take in what has been there all the time, too."""
        self._state = object()

    def note_change(self, prefix: str) -> None:
        """Take in nothing any more of what this process changes in the source, from before the change."""
        if self._layout.access is not Access.FILLS:
            with self._lock:
                self._changed.add(prefix)
                self._told.discard(prefix)

    def refusal(self, what: str) -> CacheUnreachableError:
        """The error for what cannot be done here."""
        return CacheUnreachableError(
            f"the cache {self._layout.root} is only read from, so {what}: {self.why}"
        )


def _cannot() -> bool:
    return False


def _drop(index: Index, prefix: str) -> None:
    index.invalidate(prefix)
    for victims in drained(index.drain_prefix, prefix):
        index.confirm_deletes([cell for cell, _ in victims], [])
    drain_absences(index.drain_absences, prefix)


def _look(private_index: PrivateIndex | None) -> None:
    if private_index is not None:
        private_index.look()
