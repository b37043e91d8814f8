"""Writes and deletes of a cache directory, out of the way of an event loop.

They are done by threads of the core, which need no interpreter: a thread of Python's that comes back
from the disk waits for the GIL, for milliseconds where the event loop is busy. What is done lies on a
desk of the event loop, which watches its bell.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from zcache._core import Desk, Workers
from zcache._threads import in_background

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

THREADS: Final = 4
"""Threads that write and delete: a local file system lets no more than a few go on at once."""

# Reentrant, for inside it the garbage collector may end a coroutine that leaves work behind.
_lock = threading.RLock()
_workers: Workers | None = None
_counters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Counter | None] = (
    weakref.WeakKeyDictionary()
)
_left_behind: list[object] = []


class Counter:
    """Where the coroutines of one event loop hand work in and wait for it.

    Attributes
    ----------
    desk : Desk
        Takes the work; each method that does returns the number of its result.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, workers: Workers) -> None:
        self.desk = Desk(workers)
        self._waiting: dict[int, tuple[asyncio.Future[Any], Callable[[Any], object]]] = {}
        # Results that met nobody, and callers who have left and met no result: whoever comes second
        # finds the other here.
        self._met: dict[int, Any] = {}
        self._results: deque[tuple[int, Any]] = deque()
        # Whether a thread waits for work whose callers have left while it went on.
        self._waits = False
        # After a fork: desk, threads and callers are the parent's.
        self.foreign = False
        loop.add_reader(self.desk.fileno(), self._collect, loop)

    async def result(
        self, number: int, late: Callable[[Any], object], loop: asyncio.AbstractEventLoop
    ) -> Any:
        """Wait for a result; if the caller is cancelled meanwhile, `late` is told what came of it."""
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting[number] = future, late
        try:
            return await future
        except Exception:
            raise
        except BaseException:
            self._leave(number)
            raise
        finally:
            self._waiting.pop(number, None)

    def give_up(self) -> None:
        """The event loop is closed: nobody collects any more, and nobody goes on."""
        for number in list(self._waiting):
            self._leave(number)
        while self._results:
            number, result = self._results.popleft()
            self._meet(number, (result,))

    def _collect(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.foreign:
            return
        try:
            self._results.extend(self.desk.collect())
            while self._results:
                self._hand_out(*self._results.popleft())
        finally:
            # Only an interrupt gets here; the others must not wait for ever.
            if self._results:
                loop.call_soon(self._collect, loop)

    def _hand_out(self, number: int, result: Any) -> None:
        future, _ = self._waiting.get(number, (None, None))
        if future is None or future.done():
            self._meet(number, (result,))
        elif isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _leave(self, number: int) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is None or self.foreign:
            return
        future, late = waiting
        if future.done() and not future.cancelled():
            late(future.exception() or future.result())
            return
        pending, result = self.desk.leave(number)
        if result is not None:
            late(result)
            return
        self._meet(number, late)
        if pending:
            self._wait_soon()

    def _wait_soon(self) -> None:
        with _lock:
            begins, self._waits = not self._waits, True
        if begins:
            # One of its own: those that serve reads wait for nobody's writes. At the end of a process
            # there is none left, and some versions of Python wait for one that never starts.
            with contextlib.suppress(RuntimeError):
                if not sys.is_finalizing():
                    threading.Thread(target=self._wait, name="zcache-wait").start()
                    return
            in_background(self._wait)

    def _wait(self) -> None:
        """Wait for all whose callers have gone while it went on: one thread is enough."""
        try:
            self._collect_left()
        finally:
            with _lock:
                self._waits = False
        # Those who left while it seemed that somebody waits.
        self._collect_left()

    def _collect_left(self) -> None:
        while (found := self.desk.wait()) is not None:
            number, result = found
            with contextlib.suppress(Exception):
                self._meet(number, (result,))

    def _meet(self, number: int, one: Any) -> None:
        other = self._met.setdefault(number, one)
        if other is not one:
            del self._met[number]
            late, (result,) = (one, other) if callable(one) else (other, one)
            late(result)


def counter(loop: asyncio.AbstractEventLoop) -> Counter | None:
    """The counter of the event loop that runs here; None where it cannot watch a bell."""
    try:
        return _counters[loop]
    except KeyError:
        return _open(loop)


def see_to_closed() -> None:
    """Tell what has become of the work of event loops that are closed.

    Until then their room is taken, and their keys are being filled.
    """
    if not _counters:
        return
    with _lock:
        closed = [other for other in list(_counters) if other.is_closed()]
        left = [_counters.pop(other, None) for other in closed]
    for found in left:
        if found is not None:
            with contextlib.suppress(Exception):
                found.give_up()


def _open(loop: asyncio.AbstractEventLoop) -> Counter | None:
    global _workers
    made: Counter | None = None
    # Not this sort of event loop; or no thread or descriptor is left.
    with contextlib.suppress(Exception):
        workers = _workers or Workers(THREADS)
        with _lock:
            workers = _workers = _workers or workers
        made = Counter(loop, workers)
    # Nobody else has opened one for this loop meanwhile, for it runs in this thread.
    with _lock:
        _counters[loop] = made
    return made


def after_fork() -> None:
    """The threads have stayed with the parent, and with them whatever lock they held."""
    global _lock, _workers, _counters
    inherited = _counters
    # Kept, for to let go of the last handle would ask for such a lock.
    _left_behind.append((_workers, inherited))
    _lock = threading.RLock()
    _workers = None
    _counters = weakref.WeakKeyDictionary()
    for loop, found in list(inherited.items()):
        # What an event loop of the parent watches, it watches in both processes.
        _counters[loop] = None
        if found is not None:
            found.foreign = True
