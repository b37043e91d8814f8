"""Daemon threads for calls that may block; see `thread_calls` for what is given to them.

They are not the event loop's own threads, so they neither wait for those nor end with the loop. They
are daemons, so a file system that never answers cannot keep the process from ending.

Each place has `Threads` of its own, so that one that hangs stops no other.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from zcache._runtime.coroutines import report
from zcache._runtime.fork import at_fork
from zcache._runtime.latch import Latch
from zcache._runtime.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

THREADS: Final = 8
"""Threads of one place that read, delete and write: as many requests as one disk serves well at once."""
IDLE: Final = 10.0
"""Seconds after which a thread ends that has nothing to do, ..."""
SPARE: Final = 16
"""... and how many of the process wait for that; others end at once."""


class NoThreadError(RuntimeError):
    """There is no thread, and the system lets none be started."""


class Life:
    """Held by a thread as long as it lives, also if that ends before its first line; see `start_thread`.

    Attributes
    ----------
    starter : int or None
        The thread that is starting it; None afterwards.
    """

    __slots__ = ("__weakref__", "reference", "starter")

    def __init__(self, on_end: Callable[[weakref.ref[Life]], object] | None = None) -> None:
        self.reference = weakref.ref(self, on_end)
        self.starter: int | None = _thread.get_ident()


def start_thread(held: list[Life], run: Callable[[Life], object]) -> None:
    """Start a thread without waiting for it.

    `held` has its life alone. It is the caller's to clear: the error of an interrupt, which someone may keep, has the frames
    of both.

    `threading.Thread` waits until it runs: for ever, where it dies at its start for want of memory.

    Raises
    ------
    NoThreadError
        If none can be started.
    """
    try:
        _thread.start_new_thread(run, (held[0],))
    except (RuntimeError, MemoryError) as error:
        raise NoThreadError(str(error)) from error


class Call(ABC, Generic[T]):
    """Work for a thread, which is done once or never.

    Attributes
    ----------
    error : BaseException or None
        What it has raised.
    is_left : bool
        Whether it is work in the background that was not taken yet, and for which no caller waits.
    """

    __slots__ = ("_work",)

    error: BaseException | None
    is_left = False

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = [work]

    def take(self) -> Callable[[], T] | None:
        """Take the work, to do it or to have it not be done; None if it was taken."""
        try:
            return self._work.pop()
        except IndexError:
            return None

    @abstractmethod
    def run(self) -> None:
        """Do the work, in whatever thread this is, unless it was taken. Must not raise."""

    @abstractmethod
    def detach(self, on_detached_result: Callable[[T | BaseException], object] | None) -> None:
        """Take the result elsewhere: the caller does not wait for it any more."""

    def leave(
        self,
        threads: Threads,
        error: BaseException,
        on_detached_result: Callable[[T | BaseException], object] | None,
        *,
        is_submitted: bool,
    ) -> None:
        """See to what becomes of it where its caller has met an error; its own is no news."""
        if error is self.error:
            return
        # An interrupt may have come before a thread was told of it.
        goes_on = is_submitted and on_detached_result is not None
        if not goes_on and threads.withdraw(self):
            report(on_detached_result, error)
        else:
            self.detach(on_detached_result)


class Threads:
    """Threads that run what they are given, in order. They are started when they are needed, and end when they are not.

    Parameters
    ----------
    most : int
        How many there are at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.after_fork()
        _all_threads.add(self)

    def after_fork(self) -> None:
        """Start over in a forked child: the parent's threads have stayed with it."""
        self._calls: deque[Call[Any]] = deque()
        # Of threads that have nothing to do.
        self._waiters: deque[Latch] = deque()
        # By places, of which there are `most`: those that were not seen to end. One may have died without a word.
        self._lives: dict[int, weakref.ref[Life]] = {}

    def are_behind(self, most: int) -> bool:
        """Whether so many works of `run_in_background` have not begun, for which no caller waits."""
        calls = self._calls
        return len(calls) >= most and sum(call.is_left for call in calls.copy()) >= most

    def submit(self, call: Call[Any]) -> None:
        """Run a call. After an interrupt it may be run or not, until it is withdrawn.

        Raises
        ------
        NoThreadError
            If there is no thread and none can be started. The call was withdrawn then.
        """
        # No lock: the handler of a signal, which may come between any two steps, may submit a call and wait for its end.
        # Who finds no place free leaves the call to those who have them: each looks for calls once it has left its own.
        self._calls.append(call)
        while self._waiters:
            with contextlib.suppress(IndexError):
                waiter = self._waiters[0]
                # It leaves the queue last: an interrupt may come before. Of two that have set one, the other goes on to the next.
                waiter.set()
                if self._dismiss(waiter):
                    return
        try:
            self._start(starts_again=True)
        except NoThreadError:
            if not self._lives and self.withdraw(call):
                raise

    def withdraw(self, call: Call[Any]) -> bool:
        """Take back a call, unless it has begun or was withdrawn; whether that is so."""
        is_taken = call.take() is not None
        with contextlib.suppress(ValueError):
            self._calls.remove(call)
        return is_taken

    def _start(self, *, starts_again: bool) -> None:
        """Start a thread, if there is a place for one; whether another one follows that dies before its first line.

        Raises
        ------
        NoThreadError
            If none can be started.
        """
        held = [Life(partial(self._died, starts_again))]
        own = held[0].reference
        try:
            if self._enter(own) or self._is_starting():
                start_thread(held, self._run)
        except NoThreadError:
            self._leave(own)
            raise
        finally:
            # A life that no thread has got ends here.
            held.clear()
            if (life := own()) is not None:
                life.starter = None

    def _is_starting(self) -> bool:
        """Whether this is the handler of a signal that came in here: its caller may have the last place, and goes on only afterwards."""
        here = _thread.get_ident()
        lives = (own() for own in self._lives.copy().values())
        return any(life is not None and life.starter == here for life in lives)

    def _enter(self, own: weakref.ref[Life]) -> bool:
        """Take a place; whether there was one. An interrupt right afterwards ends the life, which gives it back."""
        if len(self._lives) >= self._most:
            return False
        setdefault = self._lives.setdefault
        return any(setdefault(place, own) is own for place in range(self._most))

    def _leave(self, own: weakref.ref[Life]) -> bool:
        """Give a place back; whether it was taken."""
        places = [place for place, one in self._lives.copy().items() if one is own]
        return any(self._lives.pop(place, None) is not None for place in places)

    def _died(self, starts_again: bool, own: weakref.ref[Life]) -> None:
        """A thread has ended. If it has done so before its first line, what waits for it needs another one."""
        # Not for ever: where there is no memory, the next call tries again.
        if self._leave(own) and starts_again and self._calls:
            with contextlib.suppress(NoThreadError):
                self._start(starts_again=False)

    def _run(self, life: Life) -> None:
        life.starter = None
        while (call := self._next(life.reference)) is not None:
            call.run()
            del call

    def _next(self, own: weakref.ref[Life]) -> Call[Any] | None:
        """What is to be run next; None where the thread ends, for there was nothing for a while."""
        while True:
            with contextlib.suppress(IndexError):
                return self._calls.popleft()
            waiter = Latch()
            self._waiters.append(waiter)
            may_come = self._wait(waiter)
            self._dismiss(waiter)
            if may_come:
                continue
            with contextlib.suppress(IndexError):
                return self._calls.popleft()
            self._leave(own)
            # What has just come may have found no place free.
            if not self._calls or not self._enter(own):
                return None

    def _dismiss(self, waiter: Latch) -> bool:
        """Take a waiter out of the queue; whether it was there."""
        try:
            self._waiters.remove(waiter)
        except ValueError:
            return False
        return True

    def _wait(self, waiter: Latch) -> bool:
        """Wait for a call, unless enough others do so; whether one may have come."""
        spare = _spare
        # One may have come before there was a waiter.
        if self._calls or not spare.acquire(blocking=False):
            return bool(self._calls)
        try:
            return waiter.wait(IDLE)
        finally:
            spare.release()


_spare = threading.Semaphore(SPARE)
# Those that start over in a forked child.
_all_threads: Registry[Threads] = Registry()


def _after_fork() -> None:
    """Start with threads of our own: the parent's have stayed with it."""
    global _spare
    _spare = threading.Semaphore(SPARE)
    for threads in _all_threads.snapshot():
        threads.after_fork()


at_fork(_after_fork)
