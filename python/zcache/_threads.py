"""Threads of our own, for what may block: they neither wait for an event loop's own threads nor end with it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

THREADS: Final = 8
"""Threads that move bytes to and from a disk, which is what a disk serves well at once."""

_executor: ThreadPoolExecutor | None = None
# Reentrant, for inside it the garbage collector may end a coroutine that leaves work behind.
_lock = threading.RLock()


def _pool() -> ThreadPoolExecutor:
    global _executor
    if _executor is None:
        with _lock:
            if _executor is None:
                _executor = ThreadPoolExecutor(THREADS, thread_name_prefix="zcache")
    return _executor


def background(work: Callable[[], T]) -> Future[T]:
    """Do something without waiting for it."""
    return _pool().submit(work)


def in_background(work: Callable[[], object]) -> None:
    """Do the same; here and now where there is no thread left, as at the end of a process."""
    try:
        background(work)
    except RuntimeError:
        work()


async def in_thread(work: Callable[[], T], late: Callable[[T | BaseException], object]) -> T:
    """Do what may take long, out of the way of the event loop.

    If the caller is cancelled meanwhile, the work goes on, and `late` is told what came of it.
    """
    loop = asyncio.get_running_loop()
    errand = Errand(work, loop.create_future(), _returns(loop))
    _pool().submit(errand.run)
    try:
        done: T = await errand.future
    except Exception:
        raise
    except BaseException:
        errand.leave(late)
        raise
    return done


class Errand(Generic[T]):
    """Work in a thread on behalf of a coroutine."""

    __slots__ = ("_late", "_lock", "_returns", "_work", "error", "future", "over", "result")

    def __init__(self, work: Callable[[], T], future: asyncio.Future[T], returns: _Returns) -> None:
        self._work = work
        self._returns = returns
        self._lock = threading.Lock()
        self._late: Callable[[T | BaseException], object] | None = None
        self.future = future
        self.over = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do the work, in whatever thread this is."""
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the work is awaited
            self.error = error
        with self._lock:
            self.over = True
            late = self._late
        if late is None:
            self._returns.hand_over(self)
        else:
            late(self._outcome())

    def leave(self, late: Callable[[T | BaseException], object]) -> None:
        """Nobody awaits the work any more: tell `late` what comes of it."""
        with self._lock:
            if not self.over:
                self._late = late
                return
        late(self._outcome())

    def _outcome(self) -> Any:
        return self.result if self.error is None else self.error


class _Returns:
    """Work that is done and goes back to an event loop, which is woken once for all of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._done: deque[Errand[Any]] = deque()
        # Whether the loop will look into the queue after whatever is in it now.
        self._woken = False

    def hand_over(self, errand: Errand[Any]) -> None:
        self._done.append(errand)
        if self._woken:
            return
        self._woken = True
        loop = self._loop()
        # A loop that is closed has taken with it everyone who waited there.
        with contextlib.suppress(RuntimeError):
            if loop is not None:
                loop.call_soon_threadsafe(self._take_in)

    def _take_in(self) -> None:
        # First, so that whoever is too late for this look wakes the loop again.
        self._woken = False
        while self._done:
            errand = self._done.popleft()
            if errand.future.done():
                continue
            if errand.error is None:
                errand.future.set_result(errand.result)
            else:
                errand.future.set_exception(errand.error)


_all_returns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Returns] = (
    weakref.WeakKeyDictionary()
)


def _returns(loop: asyncio.AbstractEventLoop) -> _Returns:
    found = _all_returns.get(loop)
    if found is None:
        with _lock:
            found = _all_returns.setdefault(loop, _Returns(loop))
    return found


def after_fork() -> None:
    """The threads have stayed with the parent, and so have its event loops."""
    global _executor, _lock, _all_returns
    _lock = threading.RLock()
    _executor = None
    _all_returns = weakref.WeakKeyDictionary()
