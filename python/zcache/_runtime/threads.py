"""Daemon threads for calls that may block, and the way back from them to an event loop.

They are not the event loop's own threads, so they neither wait for those nor end with the loop. They
are daemons, so a file system that never answers cannot keep the process from ending.

Each place has `Threads` of its own, so that one that hangs stops no other, and work in the background has others still. A
call in a thread of a place waits for no other thread; work in the background may wait for such calls.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from zcache._runtime.coroutines import NoAnswerError, report
from zcache._runtime.fork import at_fork
from zcache._runtime.latch import Latch, Outcome
from zcache._runtime.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

THREADS: Final = 8
"""Threads of one place that read, delete and write: as many requests as one disk serves well at once."""
BACKGROUND: Final = 256
"""Works in the background at once. A place has one of each kind, so that many places have to hang before others wait."""
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
    """Start with threads of our own: the parent's have stayed with it."""
    global _all_completions, _spare
    _spare = threading.Semaphore(SPARE)
    for threads in _all_threads.snapshot():
        threads.after_fork()
    _all_completions = weakref.WeakKeyDictionary()


at_fork(_after_fork)
