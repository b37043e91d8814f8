"""The opening of an index that could not be opened at once."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final, Protocol

from zcache._core import IndexBusyError
from zcache._index.shared_wait import LOCK_TIMEOUT, SharedWait, timed_out, wait_for
from zcache._runtime.coroutines import report

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from zcache._index.calls import Handle
    from zcache._runtime.io import IO
    from zcache._runtime.latch import Latch
    from zcache._runtime.threads import Threads

    class Openable(Handle, Protocol):
        """The handle of an index that is to be opened."""

        lock: threading.RLock
        opening: Opening | None


_RETRY: Final = 0.1
"""Seconds between two tries where no thread can be started: it takes longer than a step."""


class Opening:
    """Opens an index, once for all who wait for it. It is over once the handle has it no more.

    Parameters
    ----------
    handle : Openable
        Of the index.
    threads : Threads
        Open it.
    open_first : callable
        Opens the index. Takes the seconds that it may wait for the lock, and raises `IndexBusyError` after that.
    since : float, optional
        When the wait for it began, on the clock of `time.monotonic`. Default is -inf: with the first who waits.

    Attributes
    ----------
    open_first : callable
        As given.
    then : list of callable
        Called with the handle once the index is open.
    meets_lock : bool
        Whether another process kept the lock of the index when it was tried last.
    """

    def __init__(
        self,
        handle: Openable,
        threads: Threads,
        open_first: Callable[[float], None],
        since: float = -math.inf,
    ) -> None:
        self._handle = handle
        self._shared = SharedWait(handle.lock, threads)
        self._shared.since = since
        self.open_first = open_first
        self.then: list[Callable[[Handle], object]] = []
        self.meets_lock = False

    @property
    def is_over(self) -> bool:
        """Whether the index is open, or never will be."""
        return self._handle.opening is not self

    def begin(self) -> Latch | None:
        """Open the index in one thread for all who wait, or here where none can be started.

        Returns
        -------
        done : Latch or None
            What to wait for, unless it is over; None where it has to be tried again.
        """
        shared = self._shared
        with shared.lock:
            pending = shared.awaited()
            if self.is_over or pending is not None:
                return pending
            now = time.monotonic()
            if shared.since == -math.inf:
                shared.since = now
            if now - shared.last < _RETRY:
                return None
            shared.last = now
            done = shared.claim()
        return shared.run(done, self._open)

    async def wait(self, io: IO, timeout: float, *, alone: bool) -> None:  # noqa: ASYNC109
        """Wait until it is over, at most `timeout` seconds: counted from now if `alone`, else from the first who waits.

        Raises
        ------
        IndexLockTimeout
            After that.
        """
        begun = time.monotonic()
        while True:
            done = self.begin()
            left = (begun if alone else self._shared.since) + timeout - time.monotonic()
            if self.is_over:
                return
            if left <= 0 or not await wait_for(io, done, left):
                raise timed_out(self._handle.name, timeout)

    def _open(self, may_wait: bool) -> bool:
        try:
            while not self.is_over:
                try:
                    self.open_first(LOCK_TIMEOUT if may_wait else 0.0)
                except IndexBusyError:
                    self.meets_lock = True
                    if not may_wait:
                        return False  # The next caller tries again.
                else:
                    self._end()
        except Exception as failure:  # noqa: BLE001 - reads must go on, whatever it is
            self._handle.abandon(failure)
            self._end()
        return True

    def _end(self) -> None:
        with self._shared.lock:
            self._handle.opening = None
        for then in self.then:
            report(then, self._handle)
