"""Writes and deletes of a cache directory, out of the way of an event loop.

They are done by threads of the core, which need no interpreter: a thread of Python's that comes back
from the disk waits for the GIL, for milliseconds where the event loop is busy. What is done lies on a
desk of the event loop, which watches its bell.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

from zcache._core import Desk, Workers
from zcache._threads import background

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

THREADS: Final = 4
"""Threads that write and delete: a local file system lets no more than a few go on at once."""

_lock = threading.Lock()
_workers: Workers | None = None
_counters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Counter] = (
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
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        # Results that met nobody, and callers who have left and met no result: whoever comes second
        # finds the other here.
        self._met: dict[int, Any] = {}
        loop.add_reader(self.desk.fileno(), self._collect)

    async def result(
        self, number: int, late: Callable[[Any], object], loop: asyncio.AbstractEventLoop
    ) -> Any:
        """Wait for a result; if the caller is cancelled meanwhile, `late` is told what came of it."""
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting[number] = future
        try:
            return await future
        except Exception:
            raise
        except BaseException:
            self._leave(number, future, late)
            raise

    def _collect(self) -> None:
        for number, result in self.desk.collect():
            future = self._waiting.pop(number, None)
            if future is None or future.done():
                self._meet(number, (result,))
            elif isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _leave(
        self, number: int, future: asyncio.Future[Any], late: Callable[[Any], object]
    ) -> None:
        if future.done() and not future.cancelled():
            late(future.exception() or future.result())
            return
        pending, result = self.desk.leave(number)
        if pending:
            del self._waiting[number]
            background(lambda: late(self.desk.wait(number)))
        elif result is not None:
            del self._waiting[number]
            late(result)
        else:
            self._meet(number, late)

    def _meet(self, number: int, one: Any) -> None:
        other = self._met.setdefault(number, one)
        if other is not one:
            del self._met[number]
            late, (result,) = (one, other) if callable(one) else (other, one)
            late(result)


def counter(loop: asyncio.AbstractEventLoop) -> Counter | None:
    """The counter of an event loop; None where it cannot watch a bell."""
    found = _counters.get(loop)
    if found is None:
        with _lock:
            found = _counters.get(loop) or _open(loop)
    return found


def _open(loop: asyncio.AbstractEventLoop) -> Counter | None:
    global _workers
    try:
        if _workers is None:
            _workers = Workers(THREADS)
        made = Counter(loop, _workers)
    except (NotImplementedError, OSError):
        return None  # Not this sort of event loop; or no thread or descriptor is left.
    _counters[loop] = made
    return made


def after_fork() -> None:
    """The threads have stayed with the parent, and with them whatever lock they held."""
    global _lock, _workers, _counters
    # Kept, for to let go of the last handle would ask for such a lock.
    _left_behind.append((_workers, _counters))
    _lock = threading.Lock()
    _workers = None
    _counters = weakref.WeakKeyDictionary()
