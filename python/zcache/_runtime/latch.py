"""What happens once in one thread, and is waited for in others.

`threading.Event` and `concurrent.futures.Future` guard theirs by a lock that each waiter takes in Python code. What the handler
of a signal raises there leaves it locked, and the thread that would say that it has happened waits for good. Here a waiter has a lock
of its own, which others only release.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Latch:
    """Is set once. Each step of it is one of a dict, which neither another thread nor an interrupt sees half done.

    Attributes
    ----------
    is_set : bool
        Whether it has happened.
    """

    __slots__ = ("_callbacks", "_waiters", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._waiters: dict[Callable[[], None], None] = {}
        self._callbacks: dict[Callable[[], object], None] = {}

    @property
    def is_awaited(self) -> bool:
        """Whether anyone waits for it now."""
        return bool(self._waiters)

    def set(self) -> None:
        """Say that it has happened, upon which all who wait go on."""
        self.is_set = True
        for wake in list(self._waiters):
            # Two may say it at once.
            with contextlib.suppress(RuntimeError):
                wake()
            # Last: after an interrupt the next one who says it goes on from there.
            self._waiters.pop(wake, None)
        for callback in list(self._callbacks):
            self._call(callback)

    def call_when_set(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, now or by the thread that sets it; it must not raise."""
        self._callbacks[callback] = None
        # Asked last: who sets it in between has not seen the callback.
        if self.is_set:
            self._call(callback)

    def _call(self, callback: Callable[[], object]) -> None:
        if self._callbacks.pop(callback, callback) is None:
            callback()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait in a thread, at most so many seconds; whether it has happened."""
        if self.is_set or (seconds is not None and seconds <= 0):
            return self.is_set
        lock = _thread.allocate_lock()
        lock.acquire()
        wake = lock.release
        self._waiters[wake] = None
        try:
            if not self.is_set:
                lock.acquire(timeout=-1 if seconds is None else seconds)
        finally:
            self._waiters.pop(wake, None)
        return self.is_set

    async def wait_in_loop(self, seconds: float | None = None) -> bool:
        """Wait in a coroutine, at most so many seconds; whether it has happened."""
        if self.is_set or (seconds is not None and seconds <= 0):
            return self.is_set
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            wake_up(waiter)

        self._waiters[wake] = None
        try:
            if not self.is_set:
                await asyncio.wait((waiter,), timeout=seconds)
        finally:
            self._waiters.pop(wake, None)
        return self.is_set


class Outcome(Latch, Generic[T]):
    """Is set to what some work brings, a result or an error."""

    __slots__ = ("_result", "error")

    _result: T

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def succeed(self, result: T) -> None:
        """Say that the work has brought this."""
        self._result = result
        self.set()

    def fail(self, error: BaseException) -> None:
        """Say that the work has raised this."""
        self.error = error
        self.set()

    def result(self, seconds: float | None = None) -> T:
        """Wait in a thread, at most so many seconds, for the result, or raise the error.

        Raises
        ------
        TimeoutError
            After that.
        """
        if not self.wait(seconds):
            raise TimeoutError
        if self.error is None:
            return self._result
        try:
            raise self.error
        finally:
            # The traceback has this frame.
            del self


def wake_up(waiter: asyncio.Future[None]) -> None:
    """Let a coroutine go on, in whatever event loop."""
    loop = waiter.get_loop()
    if loop is asyncio._get_running_loop():
        _end(waiter)
    else:
        # A closed loop has no waiters left.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_end, waiter)


def _end(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
