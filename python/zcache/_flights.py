"""Waiting for a source read that somebody else makes: tasks, threads and event loops alike."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from types import TracebackType

    from zarr.core.buffer import Buffer

# Guards the short moments in which waiters come and go; never held while anything waits or runs.
# Reentrant, for inside one the garbage collector may end a reader whose event loop is gone, and that
# ends a flight.
_lock = threading.RLock()

PATIENCE: Final = 1.0
"""Seconds after which a waiter asks whether the reader can still make progress."""
PAUSE: Final = 0.05
"""Seconds between two looks at the queue of a thread pool that the reader may need."""
LONGEST: Final = 30.0
"""Seconds that a thread waits at most for a coroutine: nobody knows what else that waits for. And
seconds for which a value is handed on that is still being written."""


Waiter: TypeAlias = "threading.Event | asyncio.Future[None]"


class Flight:
    """One source read and those who wait for it.

    It ends once, in one of three ways: delivered (bytes, or None for a missing key), failed (the
    source's error), or abandoned (its reader was cancelled, or cannot go on), upon which every
    waiter starts over and one of them becomes the next reader.

    Attributes
    ----------
    begun : bool
        Whether its reader has come so far that it ends the flight, whatever happens. An interrupt may
        come before.
    kind : type or None
        Of one that has failed: the class of the buffers that its reader asked for.
    """

    # Of the class, for each miss makes a flight and few have anything else to say.
    done = False
    data: bytes | None = None
    error: Exception | None = None
    trace: TracebackType | None = None
    abandoned = False
    begun = False
    kind: type[Buffer] | None = None
    _ended = 0.0
    # Of a reader without an event loop: the number of its thread.
    _thread: int | None = None
    _waiters: deque[Waiter] | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        if loop is None:
            self._thread = threading.get_ident()

    def deliver(self, data: bytes | None) -> None:
        """End with the value."""
        with _lock:
            if not self.done:
                self.data = data
                self._ended = time.monotonic()
                self.done = True
        self._wake_all()

    def fail(self, error: Exception) -> None:
        """End with the source's error."""
        with _lock:
            if not self.done:
                self.error, self.trace = error, error.__traceback__
                self.done = True
        self._wake_all()

    def abandon(self) -> None:
        """End without a result, unless it has one; the waiters start over."""
        with _lock:
            if not self.done:
                self.abandoned = self.done = True
        self._wake_all()

    def is_void_for(self, kind: type[Buffer]) -> bool:
        """Whether one who asks for buffers of this class has to ask anew, of a flight that has ended."""
        # Perhaps only the buffers of its reader fail.
        return self.abandoned or (self.error is not None and self.kind is not kind)

    def has_answer(self, max_age: float | None) -> bool:
        """Whether one who comes now may take what it brings, or wait for it.

        One that has ended is open for as long as its value is being written, and for ever if its reader
        does not go on: its event loop has stopped, or an interrupt has cut it off.
        """
        if self.loop is not None and self.loop.is_closed():
            return False
        if not self.done:
            return True
        longest = LONGEST if max_age is None else min(max_age, LONGEST)
        is_young = time.monotonic() - self._ended <= longest
        return is_young and self.error is None and not self.abandoned

    def _wake_all(self) -> None:
        waiters = self._waiters
        # Each goes once it is woken: an interrupt may come in between, and whoever ends the flight
        # once more goes on here. Not more than there are now, for those who come too late go by
        # themselves, and come again.
        for _ in range(0 if waiters is None else len(waiters)):
            # Two may be at it at once.
            with contextlib.suppress(IndexError, ValueError):
                waiter = waiters[0]  # type: ignore[index]
                _wake(waiter)
                waiters.remove(waiter)  # type: ignore[union-attr]

    def _enlist(self, waiter: Waiter) -> bool:
        with _lock:
            waiters = self._waiters
            if waiters is None:
                waiters = self._waiters = deque()
            waiters.append(waiter)
            # Asked last: what the garbage collector ends in between has not seen the waiter.
            return not self.done

    async def wait(self) -> bool:
        """Wait from a coroutine.

        Returns
        -------
        bool
            False if the flight cannot end, because its reader's event loop has stopped or is blocked,
            perhaps by one who waits for this one; or because its reader has never begun.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if not self._enlist(waiter):
            return True
        if self.loop is loop:
            # Nobody comes between a reader of this event loop and its beginning.
            if not self.begun:
                return self.done
            await waiter
            return True
        if self.loop is not None and self.loop.is_closed():
            return self.done
        pulse: threading.Event | None = None
        while not (await asyncio.wait((waiter,), timeout=PATIENCE))[0]:
            if self.done or not self.begun:
                return self.done
            if self.loop is not None:
                if not self.loop.is_running() or not (pulse is None or pulse.is_set()):
                    return self.done
                if (pulse := _pulse(self.loop)) is None:
                    return self.done
        return True

    def wait_sync(self) -> bool:
        """Wait from a thread.

        Returns
        -------
        bool
            False if the flight cannot end, because its reader is a coroutine whose event loop has
            stopped, is blocked, or needs the very thread that would wait; or is this very thread; or
            has never begun.
        """
        waiter = threading.Event()
        if not self._enlist(waiter):
            return True
        loop = self.loop
        if loop is None:
            if self._thread == threading.get_ident():
                return self.done  # It came here from inside its own read.
            # For a thread, which needs nobody.
            while not waiter.wait(PATIENCE):
                if self.done or not self.begun:
                    return self.done
            return True
        if loop is asyncio._get_running_loop():
            return self.done
        pool: Any = getattr(loop, "_default_executor", None)
        belongs = threading.current_thread() in getattr(pool, "_threads", ())
        pause = PAUSE if belongs else PATIENCE
        # Of other sorts of event loops nobody can see the pool.
        longest = LONGEST if hasattr(loop, "_default_executor") else PATIENCE
        waited = total = 0.0
        pulse = _pulse(loop)
        while pulse is not None:
            if belongs and pool._work_queue.qsize():
                break
            if waiter.wait(pause):
                return True
            waited += pause
            total += pause
            if waited >= PATIENCE:
                if total >= longest or not pulse.is_set() or self.done or not self.begun:
                    break
                pulse, waited = _pulse(loop), 0.0
        return self.done


def _pulse(loop: asyncio.AbstractEventLoop) -> threading.Event | None:
    """An event that a loop sets unless it is blocked; None if it is closed."""
    pulse = threading.Event()
    try:
        loop.call_soon_threadsafe(pulse.set)
    except RuntimeError:
        return None
    return pulse


def _wake(waiter: Waiter) -> None:
    if isinstance(waiter, threading.Event):
        waiter.set()
        return
    loop = waiter.get_loop()
    if loop is asyncio._get_running_loop():
        _end(waiter)
    else:
        # A loop that is closed has taken with it everyone who waited there.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_end, waiter)


def _end(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def after_fork() -> None:
    """Start with a lock of our own: the thread that held the parent's may not exist here."""
    global _lock
    _lock = threading.RLock()
