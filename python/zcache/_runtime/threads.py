"""Daemon threads for calls that may block, and the way back from them to an event loop.

They are not the event loop's own threads, so they neither wait for those nor end with the loop. They
are daemons, so a file system that never answers cannot keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from zcache._runtime.coroutines import NoAnswerError, report
from zcache._runtime.fork import at_fork

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

THREADS: Final = 8
"""Threads that read, delete and scan: as many requests as one disk serves well at once."""


class NoThreadError(RuntimeError):
    """There is no thread, and the system lets none be started."""


class _Pool:
    """Threads that run what they are given, in order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._calls: deque[Callable[[], None]] = deque()
        # Reentrant: inside it the garbage collector may end a coroutine that starts another call.
        self._changed = threading.Condition(threading.RLock())
        self._threads = self._idle = 0

    def submit(self, call: Callable[[], None]) -> None:
        """Run `call`, which must not raise.

        Raises
        ------
        NoThreadError
            If there is no thread and none can be started. The call is not run then.
        """
        with self._changed:
            if self._idle <= len(self._calls) and self._threads < self._size:
                try:
                    self._start()
                except RuntimeError as error:
                    if not self._threads:
                        raise NoThreadError(str(error)) from error
            self._calls.append(call)
            self._changed.notify()

    def _start(self) -> None:
        threading.Thread(target=self._run, name="zcache-io", daemon=True).start()
        self._threads += 1

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._calls:
                    self._changed.wait()
                self._idle -= 1
                call = self._calls.popleft()
            call()
            del call


_pool = _Pool(THREADS)


def run_in_background(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread without waiting for it.

    Once the future is done the thread keeps nothing of `work`.

    Raises
    ------
    NoThreadError
        If no thread can be started.
    """
    future: Future[T] = Future()
    left = [work]

    def call() -> None:
        try:
            result = left.pop()()
        except BaseException as error:  # noqa: BLE001 - it is raised where the future is asked
            future.set_exception(error)
        else:
            future.set_result(result)

    _pool.submit(call)
    return future


async def in_thread(
    work: Callable[[], T],
    on_detached_result: Callable[[T | BaseException], object] | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - the work goes on, which no cancel scope can say
    progress: Callable[[], int] | None = None,
) -> T:
    """Run `work` in a thread, out of the way of the event loop.

    Parameters
    ----------
    work : callable
        Takes nothing; may block.
    on_detached_result : callable, optional
        Is given the result or the error of `work` if the caller does not wait for it any more.
    timeout : float, optional
        Seconds that the caller waits. Default is None: as long as it takes.
    progress : callable, optional
        Gives a number that grows as the work gets on; the caller waits again after `timeout` where it has grown.

    Raises
    ------
    NoAnswerError
        After `timeout`; the work goes on.
    NoThreadError
        If no thread can be started.
    """
    loop = asyncio.get_running_loop()
    completions = _completions(loop)
    completions.rearm()
    call = ThreadCall(work, loop.create_future(), completions)
    _pool.submit(call.run)
    try:
        if timeout is not None:
            await _within(call.future, timeout, progress)
        done: T = await call.future
    except BaseException as error:
        # A cancellation may come when the result is back already, before this coroutine has its turn.
        if error is not call.error:
            call.detach(on_detached_result)
        # Else the event loop complains of an error that came too late.
        if not call.future.cancel() and not call.future.cancelled():
            call.future.exception()
        raise
    return done


async def _within(
    future: asyncio.Future[Any],
    timeout: float,  # noqa: ASYNC109
    progress: Callable[[], int] | None,
) -> None:
    seen = None if progress is None else progress()
    while not (await asyncio.wait((future,), timeout=timeout))[0]:
        now = None if progress is None else progress()
        if now == seen:
            raise NoAnswerError(timeout)
        seen = now


def in_thread_sync(
    work: Callable[[], T],
    on_detached_result: Callable[[T | BaseException], object] | None = None,
    timeout: float | None = None,
    progress: Callable[[], int] | None = None,
) -> T:
    """Run `work` in a thread for a caller that blocks; see `in_thread`."""
    future = run_in_background(work)
    try:
        seen = None if progress is None else progress()
        while progress is not None and not wait((future,), timeout).done:
            now = progress()
            if now == seen:
                break
            seen = now
        done = future.result(timeout if progress is None else 0)
    except BaseException as error:
        # The work may have ended since the caller stopped waiting; what it raised itself is no news.
        is_its_own = future.done() and future.exception() is error
        if on_detached_result is not None and not is_its_own:
            future.add_done_callback(
                lambda f: report(on_detached_result, f.exception() or f.result())
            )
        if isinstance(error, TimeoutError) and not is_its_own:
            raise NoAnswerError(timeout) from None
        raise
    return done


class ThreadCall(Generic[T]):
    """A call in a thread on behalf of a coroutine."""

    __slots__ = (
        "_completions",
        "_lock",
        "_on_detached",
        "_over",
        "_work",
        "error",
        "future",
        "result",
    )

    def __init__(
        self, work: Callable[[], T], future: asyncio.Future[T], completions: _LoopCompletions
    ) -> None:
        self._work: Callable[[], T] | None = work
        self._completions = completions
        # Reentrant: a signal may come in between, and its handler reads as well.
        self._lock = threading.RLock()
        self._on_detached: Callable[[T | BaseException], object] | None = None
        self.future = future
        self._over = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do the work, in whatever thread this is."""
        work, self._work = self._work, None
        assert work is not None
        try:
            self.result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the call is awaited
            self.error = error
        # Those who get the result may expect that what it was made of is gone with the last other user.
        del work
        with self._lock:
            self._over = True
            detached = self._on_detached
        if detached is None:
            self._completions.add(self)
        else:
            report(detached, self._outcome())

    def detach(self, on_detached_result: Callable[[T | BaseException], object] | None) -> None:
        """Take the result elsewhere: the coroutine does not wait for it any more."""
        if on_detached_result is None:
            return
        with self._lock:
            if not self._over:
                self._on_detached = on_detached_result
                return
        report(on_detached_result, self._outcome())

    def _outcome(self) -> Any:
        return self.result if self.error is None else self.error


class _LoopCompletions:
    """Calls that are done, on their way back to an event loop, which is woken once for all of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._done: deque[ThreadCall[Any]] = deque()
        # Whether the loop will look into the queue after whatever is in it now.
        self._woken = False

    def add(self, call: ThreadCall[Any]) -> None:
        self._done.append(call)
        if self._woken:
            return
        self._woken = True
        loop = self._loop()
        # A closed loop has no waiters left.
        with contextlib.suppress(RuntimeError):
            if loop is not None:
                loop.call_soon_threadsafe(self._collect)

    def rearm(self) -> None:
        """Have the next call that is done wake the loop; to be called in its thread before a call begins.

        An interrupt may have come between a wake-up and its look at the queue, which is lost then.
        """
        self._woken = False
        if self._done and (loop := self._loop()) is not None:
            self._woken = True
            loop.call_soon(self._collect)

    def _collect(self) -> None:
        # First, so that a call that comes too late for this look wakes the loop again.
        self._woken = False
        try:
            while self._done:
                # It leaves the queue last: an interrupt may come between any two of these lines.
                call = self._done[0]
                if not call.future.done():
                    if call.error is None:
                        call.future.set_result(call.result)
                    else:
                        call.future.set_exception(call.error)
                self._done.popleft()
        finally:
            # An interrupt came in between: the others must not wait forever.
            if self._done and (loop := self._loop()) is not None:
                self._woken = True
                loop.call_soon(self._collect)


# Guards the table below; reentrant like the lock of the pool.
_lock = threading.RLock()
_all_completions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopCompletions] = (
    weakref.WeakKeyDictionary()
)


def _completions(loop: asyncio.AbstractEventLoop) -> _LoopCompletions:
    found = _all_completions.get(loop)
    if found is None:
        with _lock:
            found = _all_completions.setdefault(loop, _LoopCompletions(loop))
    return found


def _after_fork() -> None:
    """Start with threads and locks of our own: the parent's have stayed with it."""
    global _pool, _lock, _all_completions
    _lock = threading.RLock()
    _pool = _Pool(THREADS)
    _all_completions = weakref.WeakKeyDictionary()


at_fork(_after_fork)
