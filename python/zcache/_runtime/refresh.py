"""What is brought up to date for all who ask, also inside a finalizer."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from zcache._runtime.fork import at_fork
from zcache._runtime.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable


class Refresh:
    """Runs work for all who ask, one at a time, and once more where someone has asked meanwhile.

    A finalizer does not wait: the garbage collector may run it while its thread holds any lock, and who is at work here may
    wait for that one.
    """

    __slots__ = ("__weakref__", "_asked", "_lock")

    def __init__(self) -> None:
        self._asked = object()
        self.renew()
        _all.add(self)

    def renew(self) -> None:
        """In a forked child: no thread is at work."""
        # Reentrant: inside it the garbage collector, or a signal, may ask again.
        self._lock = threading.RLock()

    def run(self, work: Callable[[], None], *, waits: bool) -> None:
        """Have `work` run after this call has begun.

        Parameters
        ----------
        work : callable
            Does the same in each call.
        waits : bool
            Whether it has run when this returns; else the thread that is at work now runs it once more.
        """
        self._asked = object()
        done: object = None
        while done is not self._asked and self._lock.acquire(blocking=waits):
            try:
                done = None
                while done is not self._asked:
                    done = self._asked
                    work()
            finally:
                self._lock.release()


_all: Registry[Refresh] = Registry()


def _after_fork() -> None:
    for one in _all.snapshot():
        one.renew()


at_fork(_after_fork)
