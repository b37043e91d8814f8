"""How coroutines are run: without an event loop, within a time limit, shielded to their completion."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import zarr.core.sync

from zcache._runtime.fork import at_fork
from zcache._runtime.printable import shown_seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Self

logger = logging.getLogger("zcache")
T = TypeVar("T")


class NoAnswerError(TimeoutError):
    """No answer came in time. What was begun goes on, unlike after a time-out of a library's own."""

    def __init__(self, seconds: float | None) -> None:
        within = "" if seconds is None else f" within {shown_seconds(seconds)}"
        super().__init__(f"no answer{within}")


def run_without_loop(steps: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    steps.close()
    raise RuntimeError("a synchronous call had to wait for an event loop")


def is_loop_of_zarr() -> bool:
    """Whether this is called in the event loop of zarr, where `zarr.core.sync.sync` can wait for nothing."""
    here = asyncio._get_running_loop()
    return here is not None and here is zarr.core.sync.loop[0]


async def guarded(work: Awaitable[T]) -> T:
    """Await an operation of a cache store; a cancellation that did not come from outside is its failure.

    Libraries end what takes too long by cancelling it, and sometimes that gets out.
    """
    try:
        return await work
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("the cache store has cancelled itself") from error


async def within(seconds: float, work: Awaitable[T], progress: Callable[[], int] = lambda: 0) -> T:
    """Await `work` for at most so many seconds without `progress`, also if it ignores cancellation.

    Raises
    ------
    NoAnswerError
        After that; the work is cancelled but not waited for.
    """
    task = asyncio.ensure_future(work)
    try:
        done, before = False, -1
        while not done and before != (before := progress()):
            done = bool((await asyncio.wait((task,), timeout=seconds))[0])
    except GeneratorExit:
        # The garbage collector ends it: mostly once its event loop is closed, where nothing can be cancelled.
        with contextlib.suppress(RuntimeError):
            task.cancel()
        raise
    except BaseException:
        task.cancel()
        _keep_until_done(task)
        raise
    if not done:
        task.cancel()
        _keep_until_done(task)
        raise NoAnswerError(seconds)
    if task.cancelled():
        # By itself, for here it was waited for.
        raise RuntimeError("the cache store has cancelled itself")
    return task.result()


class OutcomeUnknown(asyncio.CancelledError):
    """Work was cut off in the middle from outside: what it has sent may take effect at any time."""

    def __init__(self) -> None:
        super().__init__("cut off in the middle; it may still take effect")


async def shield_to_completion(
    work: Callable[[], Awaitable[T]],
    on_detached_result: Callable[[T | BaseException], None],
    timeout: float | None = None,  # noqa: ASYNC109 - the work goes on, which no cancel scope can say
) -> T:
    """Do `work`; if the caller stops waiting, let it go on and report its end.

    A write that was sent cannot be called back: a thread goes on writing, a request is on the wire.
    Until it has ended nothing is known about the outcome, so it is never cut off in the middle from
    here. Others can do that, `asyncio.run` at its end among them: then `on_detached_result` gets an
    `OutcomeUnknown`.

    Raises
    ------
    NoAnswerError
        After `timeout` seconds, if that is given; the work goes on.
    """
    sent = _Sent(work, on_detached_result)
    task = asyncio.ensure_future(sent.steps())
    try:
        if timeout is not None and not (await asyncio.wait((task,), timeout=timeout))[0]:
            sent.detach(task)
            raise NoAnswerError(timeout)  # noqa: TRY301
        return await asyncio.shield(task)
    except Exception:
        raise
    except BaseException:
        sent.detach(task)
        raise


def report(to: Callable[[T], object] | None, outcome: T) -> None:
    """Tell of an outcome that no caller waits for. What that raises is logged, and takes the place of no other error."""
    if to is None:
        return
    try:
        to(outcome)
    except Exception as error:  # noqa: BLE001 - whatever it is
        # As text: a log record is kept for long by some, and with it the frames of an exception.
        logger.warning("what had ended without its caller could not be taken note of: %r", error)


class _Sent(Generic[T]):
    """Work that goes on without its caller."""

    def __init__(
        self,
        work: Callable[[], Awaitable[T]],
        on_detached_result: Callable[[T | BaseException], None],
    ) -> None:
        # Called when its turn comes: what it returns may have begun already, as a future has.
        self._work = work
        self._on_detached_result = on_detached_result
        self._begun = self._detached = self._reported = False
        self._process = _process

    async def steps(self) -> T:
        self._begun = True
        # Reported in the very step in which it ends: nothing else runs in between.
        try:
            result = await self._work()
        except BaseException as error:
            if self._detached:
                # One that is collected with its event loop has no task that runs it.
                collected = isinstance(error, GeneratorExit)
                self._report(self._ending(error, None if collected else asyncio.current_task()))
            raise
        if self._detached:
            self._report(result)
        return result

    def detach(self, task: asyncio.Task[T]) -> None:
        self._detached = True
        if task.done():
            self._ended(task)
        else:
            _keep_until_done(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[T]) -> None:
        self._report(self._outcome(task))

    def _outcome(self, task: asyncio.Task[T]) -> T | BaseException:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        return task.result() if error is None else self._ending(error, task)

    def _ending(self, error: BaseException, task: asyncio.Task[T] | None) -> BaseException:
        """How it ended: by itself, or cut off."""
        own = isinstance(error, (Exception, asyncio.CancelledError))
        own = own and task is not None and not task.cancelling()
        return error if own or not self._begun else OutcomeUnknown()

    def _report(self, outcome: T | BaseException) -> None:
        # What ends in a forked child goes on in its parent.
        if not self._reported and self._process is _process:
            self._reported = True
            report(self._on_detached_result, outcome)


# The event loop itself keeps only weak references to its tasks.
_unfinished: set[asyncio.Task[Any]] = set()
_parents: list[object] = []
# Another one after a fork.
_process = object()


def _keep_until_done(task: asyncio.Task[Any]) -> None:
    if task.get_loop().is_closed():
        return  # It is being collected with its event loop, and is never done.
    _unfinished.add(task)
    task.add_done_callback(_forget)


def _forget(task: asyncio.Task[Any]) -> None:
    _unfinished.discard(task)
    if not task.cancelled():
        task.exception()  # Its error was reported, or is of no interest any more.


class Handover(Generic[T]):
    """What some work hands over, item by item, as it comes; the work has a task of its own.

    It goes on while its caller does something else. However it ends, its caller gets all items, and then its error.
    What cancels its task, as a `TaskGroup` does that is left open by a generator, cancels nothing else.

    With a queue of asyncio's, a reader cannot be collected once its event loop is closed: it cancels what it waits for.

    Parameters
    ----------
    work : callable
        Takes a function that it calls with each item.
    seconds : float
        How long the end of the block waits for work that was not done, and is cancelled.
    """

    def __init__(
        self, work: Callable[[Callable[[T], None]], Coroutine[Any, Any, None]], seconds: float
    ) -> None:
        self._work = work
        self._seconds = seconds
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.ensure_future(self._run())
        self._task.add_done_callback(self._wake)
        return self

    async def __aexit__(self, *_: object) -> None:
        task = self._task
        # Its error has the frames of those who asked for items, and so this.
        del self._task
        if not task.done():
            await _stop(task, self._seconds)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._task.done():
                self._task.result()
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self._work(self._put)
        except StopAsyncIteration as error:
            # It would pass for the end of the items. Python does the same in a generator.
            raise RuntimeError(f"{self._work!r} raised StopAsyncIteration") from error
        except Exception:
            if not loop.is_closed():  # Else the garbage collector ends it, and there is no caller.
                raise

    def _put(self, item: T) -> None:
        self._items.append(item)
        self._wake()

    def _wake(self, ended: asyncio.Task[None] | None = None) -> None:
        if ended is not None and not ended.cancelled():
            ended.exception()  # Else asyncio complains where no caller asks any more.
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def _stop(task: asyncio.Task[Any], seconds: float) -> None:
    """Cancel a task and wait for its end, for so many seconds at most, if its event loop is the one that runs."""
    loop = task.get_loop()
    if loop is asyncio._get_running_loop():
        task.cancel()
        # Not for ever: what it does may ignore it.
        await asyncio.wait((task,), timeout=seconds)
        return
    # The garbage collector ends the caller, of another loop: nothing here can be awaited.
    with contextlib.suppress(RuntimeError):  # It is closed, and so the task has ended.
        loop.call_soon_threadsafe(task.cancel)


def _after_fork() -> None:
    """Keep the parent's tasks, for to drop them would end them here."""
    global _process
    _process = object()
    _parents.append(set(_unfinished))
    _unfinished.clear()


at_fork(_after_fork)
