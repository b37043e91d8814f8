"""What keeps the steps of an index from being taken: its lock is waited for, and damage is mended."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from zcache._core import CorruptIndexError, IndexBusyError
from zcache._index.shared_wait import LOCK_TIMEOUT, SharedWait

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from zcache._index.calls import Handle
    from zcache._runtime.latch import Latch
    from zcache._runtime.threads import Threads

    class Recoverable(Handle, Protocol):
        """The handle of an index that may be damaged."""

        recover: Callable[[Exception], None] | None


RETRYABLE: Final = (IndexBusyError, CorruptIndexError)
"""What a step of the index raises if it was not taken, and may be once something was done about it."""
RECOVERIES: Final = 20
"""Times that one step may find the index damaged before this process does without it."""


class Resolution:
    """Does something about it, once for all steps that were not taken.

    It knows no handle, which would else live until the garbage collector comes, and with it the index.

    Parameters
    ----------
    lock : RLock
        That of the handle.
    threads : Threads
        Wait for the lock of the index, and mend.
    """

    def __init__(self, lock: threading.RLock, threads: Threads) -> None:
        self._shared = SharedWait(lock, threads)

    def left(self, timeout: float) -> float:
        """Seconds left for all who wait; see `SharedWait.left`."""
        return self._shared.left(timeout)

    def begin(self, handle: Recoverable, error: Exception, *, last: bool = False) -> Latch | None:
        """Wait for the lock of the index, or recover an index that is damaged.

        Parameters
        ----------
        handle : Recoverable
            Supplies the index.
        error : Exception
            What a step has raised, one of `RETRYABLE`.
        last : bool, optional
            Whether it was recovered often enough. Default is False.

        Returns
        -------
        done : Latch or None
            See `SharedWait.run`.
        """
        shared = self._shared
        with shared.lock:
            now = time.monotonic()
            # Where no thread waits, none says when it is free: it was if no caller has asked for a while.
            pending = shared.awaited()
            known = pending is not None or now - shared.last < LOCK_TIMEOUT
            shared.last = now
            # What is damaged was found with the lock held: it is not that one that is waited for any more.
            was_free = isinstance(error, CorruptIndexError)
            if was_free or not known or shared.since == -math.inf:
                shared.since = now
            if pending is not None:
                return pending
            done = shared.claim()
        return shared.run(done, partial(_resolve, handle, error, last))


def _resolve(handle: Recoverable, error: Exception, last: bool, may_wait: bool) -> bool:
    try:
        if last:
            handle.abandon(error)
        elif isinstance(error, CorruptIndexError):
            (handle.recover or handle.abandon)(error)
        elif may_wait:
            handle.index.wait_unlocked()
        else:
            return False
    except Exception as failure:  # noqa: BLE001 - reads must go on, whatever it is
        handle.abandon(failure)
    return True
