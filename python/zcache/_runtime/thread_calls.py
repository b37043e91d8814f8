"""Work that is done in a thread, for coroutines, for callers that block, or in the background, and the way back from there.

A call in a thread of a place waits for no other thread; work in the background has threads of its own, and may wait for
such calls.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from zcache._runtime.coroutines import NoAnswerError, report
from zcache._runtime.fork import at_fork
from zcache._runtime.latch import Outcome
from zcache._runtime.threads import THREADS, Call, Threads

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

BACKGROUND: Final = 256
"""Works in the background at once. A place has one of each kind, so that many places have to hang before others wait."""

_computing = Threads(THREADS)
_background = Threads(BACKGROUND)


def run_in_background(work: Callable[[], T], threads: Threads | None = None) -> Outcome[T]:
    """Run `work` in a thread without waiting for it.

    Once that is set the thread keeps nothing of `work`.

    Parameters
    ----------
    work : callable
        Takes nothing; may block.
    threads : Threads, optional
        Which run it. Default is None: those of the process for work that may wait for calls in other threads.

    Raises
    ------
    NoThreadError
        If no thread can be started.
    """
    call = _BackgroundCall(work)
    (_background if threads is None else threads).submit(call)
    return call.outcome


async def in_thread(
    work: Callable[[], T],
    on_detached_result: Callable[[T | BaseException], object] | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - the work goes on, which no cancel scope can say
    progress: Callable[[], int] | None = None,
    threads: Threads | None = None,
) -> T:
    """Run `work` in a thread, out of the way of the event loop.

    Parameters
    ----------
    work : callable
        Takes nothing; may block.
    on_detached_result : callable, optional
        Is given the result or the error of `work` if the caller does not wait for it any more. Without it, work that has
        not begun by then never does.
    timeout : float, optional
        Seconds that the caller waits. Default is None: as long as it takes.
    progress : callable, optional
        Gives a number that grows as the work gets on; the caller waits again after `timeout` where it has grown.
    threads : Threads, optional
        Which run it. Default is None: those of the process for what only computes.

    Raises
    ------
    NoAnswerError
        After `timeout`; what has begun goes on.
    NoThreadError
        If no thread can be started.
    """
    threads = _computing if threads is None else threads
    loop = asyncio.get_running_loop()
    completions = _completions(loop)
    completions.rearm()
    call = ThreadCall(work, loop.create_future(), completions)
    is_submitted = False
    try:
        threads.submit(call)
        is_submitted = True
        if timeout is not None:
            await _within(call.future, timeout, progress)
        done: T = await call.future
    except BaseException as error:
        # A cancellation may come when the result is back already, before this coroutine has its turn.
        call.leave(threads, error, on_detached_result, is_submitted=is_submitted)
        # Else the event loop complains of an error that came too late.
        if not call.future.cancel() and not call.future.cancelled():
            call.future.exception()
        raise
    finally:
        # An error has this frame.
        del call
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
    threads: Threads | None = None,
) -> T:
    """Run `work` in a thread for a caller that blocks; see `in_thread`."""
    threads = _computing if threads is None else threads
    call = _OutcomeCall(work)
    outcome = call.outcome
    is_submitted = False
    try:
        threads.submit(call)
        is_submitted = True
        seen = None if progress is None else progress()
        while progress is not None and not outcome.wait(timeout):
            now = progress()
            if now == seen:
                break
            seen = now
        done = outcome.result(timeout if progress is None else 0)
    except BaseException as error:
        # The work may have ended since the caller stopped waiting.
        call.leave(threads, error, on_detached_result, is_submitted=is_submitted)
        if isinstance(error, TimeoutError) and error is not call.error:
            raise NoAnswerError(timeout) from None
        raise
    finally:
        # An error has this frame.
        del outcome, call
    return done


class _OutcomeCall(Call[T]):
    """A call in a thread on behalf of those who wait for its outcome."""

    __slots__ = ("outcome",)

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(work)
        self.outcome: Outcome[T] = Outcome()

    @property
    def error(self) -> BaseException | None:  # type: ignore[override]
        return self.outcome.error

    def run(self) -> None:
        # docstring inherited
        work = self.take()
        if work is None:
            return
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the outcome is asked
            del work
            self.outcome.fail(error)
        else:
            del work
            self.outcome.succeed(result)
        # The frames of the error have this one.
        del self

    def detach(self, on_detached_result: Callable[[T | BaseException], object] | None) -> None:
        # docstring inherited
        if on_detached_result is not None:
            self.outcome.call_when_set(partial(_report, self.outcome, on_detached_result))


class _BackgroundCall(_OutcomeCall[T]):
    """A call that is done whether or not anyone waits for its outcome."""

    __slots__ = ()

    @property
    def is_left(self) -> bool:  # type: ignore[override]
        return bool(self._work) and not self.outcome.is_awaited


def _report(outcome: Outcome[T], to: Callable[[T | BaseException], object]) -> None:
    report(to, outcome.error or outcome.result())


class ThreadCall(Call[T]):
    """A call in a thread on behalf of a coroutine."""

    __slots__ = (
        "_completions",
        "_lock",
        "_on_detached",
        "_over",
        "error",
        "future",
        "result",
    )

    def __init__(
        self, work: Callable[[], T], future: asyncio.Future[T], completions: _LoopCompletions
    ) -> None:
        super().__init__(work)
        self._completions = completions
        # Reentrant: a signal may come in between, and its handler reads as well.
        self._lock = threading.RLock()
        self._on_detached: Callable[[T | BaseException], object] | None = None
        self.future = future
        self._over = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        # docstring inherited
        work = self.take()
        if work is None:
            return
        try:
            self.result = work()
        except StopIteration as error:
            # No future takes it, nor does a coroutine raise it: Python makes the same of it there.
            self.error = RuntimeError("work in a thread raised StopIteration")
            self.error.__cause__ = error
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
        # The frames of the error have this one.
        del self

    def detach(self, on_detached_result: Callable[[T | BaseException], object] | None) -> None:
        # docstring inherited
        if on_detached_result is None:
            return
        with self._lock:
            if not self._over:
                self._on_detached = on_detached_result
                return
        report(on_detached_result, self._outcome())

    def deliver(self) -> None:
        """Give its outcome to the coroutine; to be called in its event loop."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)

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
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._collect)
        except RuntimeError:
            # A closed loop has no waiters left, and what is done would keep it.
            self._done.clear()

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
                try:
                    call.deliver()
                except Exception:
                    # It would raise again, and keep the loop busy for ever.
                    call.future.cancel()
                    raise
                self._done.popleft()
        finally:
            # An interrupt came in between: the others must not wait forever.
            if self._done and (loop := self._loop()) is not None:
                self._woken = True
                loop.call_soon(self._collect)


_all_completions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopCompletions] = (
    weakref.WeakKeyDictionary()
)


def _completions(loop: asyncio.AbstractEventLoop) -> _LoopCompletions:
    found = _all_completions.get(loop)
    # Each is one step of a dict.
    return _all_completions.setdefault(loop, _LoopCompletions(loop)) if found is None else found


def _after_fork() -> None:
    """The parent's event loops have stayed with it."""
    global _all_completions
    _all_completions = weakref.WeakKeyDictionary()


at_fork(_after_fork)
