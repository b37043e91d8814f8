"""Single flight: one source read for all tasks, threads and event loops that ask for the same bytes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from zcache._runtime.fork import at_fork
from zcache._runtime.latch import Latch, wake_up

if TYPE_CHECKING:
    from types import TracebackType

    from zarr.core.buffer import Buffer

# Guards the end of a flight, so that of two who end it one does. Nothing is called inside it: there the handler of a signal could
# come in, and wait for a thread that ends another one. Reentrant: the garbage collector may end a reader of a closed event loop, and
# that ends a flight.
_lock = threading.RLock()

PATIENCE: Final = 1.0
"""Seconds after which a waiter asks whether the leader can still make progress."""
YOUNG: Final = 1.0
"""Seconds that a source read under way may have taken already for one who joins it, however short the age."""
PAUSE: Final = 0.05
"""Seconds between two looks at the queue of a thread pool that the leader may need."""
LONGEST: Final = 30.0
"""Seconds that a thread waits at most for a coroutine: what else that waits for is unknown."""

Waiter: TypeAlias = "Latch | asyncio.Future[None]"
LoopReference: TypeAlias = "weakref.ref[asyncio.AbstractEventLoop]"


class HasLeader:
    """Something that a leader has begun and is to end, perhaps in an event loop."""

    __slots__ = ()

    # Weak: an index holds this, a loop its tasks, and the task of the leader ends this. So what is abandoned together with
    # its loop goes with it.
    _loop: LoopReference | None

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of the leader; None where it has none, or that is gone."""
        return None if self._loop is None else self._loop()

    @property
    def is_cut_off(self) -> bool:
        """Whether the leader cannot go on: its event loop is closed, or gone."""
        return self._loop is not None and ((loop := self._loop()) is None or loop.is_closed())


class Flight(HasLeader):
    """One source read, its leader, and those who wait for it.

    It ends once, in one of three ways: delivered (bytes, or None for a missing key), failed (the
    source's error), or abandoned (its leader was cancelled, or cannot go on), upon which every waiter
    starts over and one of them becomes the next leader. A delivered flight stays open in the index until
    its value is in the cache store: so a pending fill serves reads.

    Attributes
    ----------
    fetched : float
        When the source was asked, in seconds on the clock of the index.
    begun : bool
        Whether its leader has come so far that it ends the flight, whatever happens. An interrupt may
        come before.
    kind : type or None
        Of one that has failed: the class of the buffers that its leader asked for.
    """

    # On the class: each miss makes a flight, and few have anything else to say.
    done = False
    data: bytes | None = None
    error: Exception | None = None
    trace: TracebackType | None = None
    abandoned = False
    begun = False
    kind: type[Buffer] | None = None
    # Of a leader without an event loop: the number of its thread.
    _thread: int | None = None
    _loop = None
    _waiters: deque[Waiter] | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop | None, fetched: float = 0.0) -> None:
        self.fetched = fetched
        if loop is None:
            self._thread = threading.get_ident()
        else:
            self._loop = weakref.ref(loop)

    def deliver(self, data: bytes | None) -> None:
        """End with the value."""
        with _lock:
            if not self.done:
                self.data = data
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

    def must_ask_again(self, kind: type[Buffer]) -> bool:
        """Whether a waiter that wants buffers of this class has to start over, once it has ended."""
        # Perhaps only the buffers of its leader fail.
        return self.abandoned or (self.error is not None and self.kind is not kind)

    def may_be_joined(self, now: float, max_age: float | None) -> bool:
        """Whether a reader that comes now may wait for it, or take what it has brought."""
        if self.done:
            # That there was no such key is the index's to remember.
            is_young = max_age is None or 0 <= now - self.fetched < max_age
            return is_young and self.data is not None
        return not self.is_cut_off and not self._is_too_old(now, max_age)

    def _is_too_old(self, now: float, max_age: float | None) -> bool:
        """Whether what it is to bring would be older than a reader that comes now may get."""
        return max_age is not None and now - self.fetched >= max(max_age, YOUNG)

    def _wake_all(self) -> None:
        waiters = self._waiters
        # Each goes once it is woken: an interrupt may come in between, and the next one who ends the
        # flight goes on from there. Not more than there are now: late ones see that it is done.
        for _ in range(0 if waiters is None else len(waiters)):
            # Two threads may be at it at once.
            with contextlib.suppress(IndexError, ValueError):
                waiter = waiters[0]  # type: ignore[index]
                _wake(waiter)
                waiters.remove(waiter)  # type: ignore[union-attr]

    def _enlist(self, waiter: Waiter) -> bool:
        waiters = self._waiters
        if waiters is None:
            # One step, of which another thread sees all or nothing.
            waiters = self.__dict__.setdefault("_waiters", deque())
        waiters.append(waiter)
        # Asked last: who ends it in between has not seen the waiter.
        return not self.done

    async def wait(self) -> bool:
        """Wait from a coroutine.

        Returns
        -------
        bool
            False if the flight cannot end, because its leader's event loop has stopped or is
            blocked, perhaps by a caller that waits for this one; or because its leader has never begun.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if not self._enlist(waiter):
            return True
        if self.loop is loop:
            # Nothing runs between a leader of this event loop and its beginning.
            if not self.begun:
                return self.done
            await waiter
            return True
        if self.is_cut_off:
            return self.done
        pulse: Latch | None = None
        while not (await asyncio.wait((waiter,), timeout=PATIENCE))[0]:
            if self.done or not self.begun:
                return self.done
            if self._loop is not None:
                leaders = self._loop()
                if leaders is None or not leaders.is_running():
                    return self.done
                if not (pulse is None or pulse.is_set) or (pulse := _pulse(leaders)) is None:
                    return self.done
        return True

    def wait_sync(self) -> bool:
        """Wait from a thread.

        Returns
        -------
        bool
            False if the flight cannot end, because its leader is a coroutine of an event loop that has
            stopped, is blocked, or needs the very thread that would wait; or is this very thread; or
            has never begun.
        """
        waiter = Latch()
        if not self._enlist(waiter):
            return True
        if self._loop is None:
            if self._thread == threading.get_ident():
                return self.done  # It came here from inside its own read.
            # Its leader is a thread, which depends on no event loop.
            while not waiter.wait(PATIENCE):
                if self.done or not self.begun:
                    return self.done
            return True
        loop = self._loop()
        if loop is None or loop is asyncio._get_running_loop():
            return self.done
        pool: Any = getattr(loop, "_default_executor", None)
        belongs = threading.current_thread() in getattr(pool, "_threads", ())
        pause = PAUSE if belongs else PATIENCE
        # Other kinds of event loops do not show their pool.
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
                if total >= longest or not pulse.is_set or self.done or not self.begun:
                    break
                pulse, waited = _pulse(loop), 0.0
        return self.done


def _pulse(loop: asyncio.AbstractEventLoop) -> Latch | None:
    """A latch that a loop sets unless it is blocked; None if it is closed."""
    pulse = Latch()
    try:
        loop.call_soon_threadsafe(pulse.set)
    except RuntimeError:
        return None
    return pulse


def _wake(waiter: Waiter) -> None:
    if isinstance(waiter, Latch):
        waiter.set()
    else:
        wake_up(waiter)


def _after_fork() -> None:
    """Start with a lock of our own: the thread that held the parent's may not exist here."""
    global _lock
    _lock = threading.RLock()


at_fork(_after_fork)
