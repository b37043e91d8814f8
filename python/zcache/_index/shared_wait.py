"""What one thread does for all who wait for it, and since when they wait."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from zcache._runtime.latch import Latch
from zcache._runtime.printable import shown_seconds
from zcache._runtime.thread_calls import run_in_background
from zcache._runtime.threads import NoThreadError, Threads
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from zcache._runtime.io import IO

LOCK_TIMEOUT: Final = 1.0
"""Seconds that a caller waits for the lock of an index, and for its opening."""
RETRY: Final = 0.01
"""Seconds between two tries where no thread can be started to wait."""
_LOST: Final = 0.1
"""Seconds after which work that no thread has begun is claimed anew."""


class SharedWait:
    """One thing that is done for all who wait for it.

    Parameters
    ----------
    lock : RLock
        Held while it is noted who waits, and never over the work.
    threads : Threads
        Do it.

    Attributes
    ----------
    pending : Latch or None
        What to wait for while it is being done.
    since : float
        When the first of those who wait began to, on the clock of `time.monotonic`; -inf where none waits.
    last : float
        When it was last asked for, or begun: as who uses it notes it.
    """

    def __init__(self, lock: threading.RLock, threads: Threads) -> None:
        self.lock = lock
        self._threads = threads
        self.pending: Latch | None = None
        self._claimed, self._has_begun = -math.inf, False
        self.since = self.last = -math.inf

    def left(self, timeout: float) -> float:
        """Seconds left for all who wait, counted from the first of them."""
        since = self.since
        # It may have ended in this moment.
        return timeout if since == -math.inf else since + timeout - time.monotonic()

    def awaited(self) -> Latch | None:
        """With the lock held, what to wait for; None where it has to be claimed.

        What a handler of a signal raises may end the caller that has claimed it before a thread has the work. Then the next
        one claims it anew.
        """
        is_lost = not self._has_begun and time.monotonic() - self._claimed > _LOST
        return None if is_lost else self.pending

    def claim(self) -> Latch:
        """Note, with the lock held, that it is being done: before the thread runs, which takes that away."""
        self._claimed, self._has_begun = time.monotonic(), False
        # Others may wait for one that was lost.
        self.pending = done = self.pending or Latch()
        return done

    def run(self, done: Latch, work: Callable[[bool], bool]) -> Latch | None:
        """Do what was claimed in a thread, or as much of it as needs no waiting here where none can be started.

        Parameters
        ----------
        done : Latch
            Answer of `claim`.
        work : callable
            Takes whether it may wait; returns whether it is done.

        Returns
        -------
        done : Latch or None
            What to wait for; None where it has to be tried again.
        """
        try:
            run_in_background(partial(self._run, done, work, True), self._threads)
        except NoThreadError:
            pass
        else:
            return done
        return done if self._run(done, work, False) else None

    def _run(self, done: Latch, work: Callable[[bool], bool], may_wait: bool) -> bool:
        with self.lock:
            if self._has_begun or self.pending is not done:
                return True  # It was claimed twice: the thread was late.
            self._has_begun = True
        is_done = True
        try:
            is_done = work(may_wait)
        finally:
            with self.lock:
                if self.pending is done:
                    self.pending = None
                if is_done:
                    self.since = -math.inf
            # Where it is not done, others who wait for it by now look again.
            done.set()
        return is_done


async def wait_for(io: IO, done: Latch | None, seconds: float) -> bool:
    """Wait for the answer of `SharedWait.run`; False where it takes longer than so many seconds."""
    if done is None:
        await io.pause(min(RETRY, seconds))
        return True
    return await io.until(done, None if seconds == math.inf else seconds)


def timed_out(name: str, timeout: float) -> IndexLockTimeout:
    """The error for who has waited in vain; `name` is that of the cache store."""
    return IndexLockTimeout(
        f"the lock of the index of the cache {name} is held by another process for more than {shown_seconds(timeout)}. "
        "Is a process that uses the cache stopped?"
    )
