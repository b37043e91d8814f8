"""How coroutines are run: without an event loop, for a store that may cancel itself, to the end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

T = TypeVar("T")


def drive(steps: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, without an event loop."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    steps.close()
    raise RuntimeError("a synchronous call had to wait for an event loop")


async def guarded(work: Awaitable[T]) -> T:
    """Await what a cache store does; a cancellation that nobody has asked for is its failure.

    Libraries end what takes too long by cancelling it, and sometimes that gets out.
    """
    try:
        return await work
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError("the cache store has cancelled itself") from error


class CutOffError(asyncio.CancelledError):
    """Work was cut off in the middle by somebody else: what it has sent may land at any time."""

    def __init__(self) -> None:
        super().__init__("cut off in the middle, it may land at any time")


async def settle(work: Callable[[], Awaitable[T]], late: Callable[[T | BaseException], None]) -> T:
    """Do `work`; if the caller is cancelled, let it go on and tell `late` how it ended.

    A write that was sent cannot be called back: a thread goes on writing, a request is on the wire.
    Until it has ended nobody knows what is there, so it is never cut off in the middle by us. Others
    can do that, `asyncio.run` at its end among them: upon that `late` gets a `CutOffError`.
    """
    sent = _Sent(work, late)
    task = asyncio.ensure_future(sent.steps())
    try:
        return await asyncio.shield(task)
    except Exception:
        raise
    except BaseException:
        sent.leave(task)
        raise


class _Sent(Generic[T]):
    """Work that goes on without its caller."""

    def __init__(
        self, work: Callable[[], Awaitable[T]], late: Callable[[T | BaseException], None]
    ) -> None:
        # Called when its turn comes: what it gives may be at work already, as a future is.
        self._work = work
        self._late = late
        self._begun = self._left = self._told = False
        self._process = _process

    async def steps(self) -> T:
        self._begun = True
        # Told in the very step in which it ends: nobody runs in between.
        try:
            result = await self._work()
        except BaseException as error:
            if self._left:
                # Nobody runs it where it is collected with its event loop.
                collected = isinstance(error, GeneratorExit)
                self._tell(self._ending(error, None if collected else asyncio.current_task()))
            raise
        if self._left:
            self._tell(result)
        return result

    def leave(self, task: asyncio.Task[T]) -> None:
        self._left = True
        if task.done():
            self._ended(task)
        else:
            _unfinished.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[T]) -> None:
        _unfinished.discard(task)
        self._tell(self._outcome(task))

    def _outcome(self, task: asyncio.Task[T]) -> T | BaseException:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        return task.result() if error is None else self._ending(error, task)

    def _ending(self, error: BaseException, task: asyncio.Task[T] | None) -> BaseException:
        """How it ended: on its own account, or cut off."""
        own = isinstance(error, (Exception, asyncio.CancelledError))
        own = own and task is not None and not task.cancelling()
        return error if own or not self._begun else CutOffError()

    def _tell(self, outcome: T | BaseException) -> None:
        # What a child of a fork ends goes on in its parent.
        if not self._told and self._process is _process:
            self._told = True
            self._late(outcome)


# The event loop itself keeps only weak references to its tasks.
_unfinished: set[asyncio.Task[Any]] = set()
_left_behind: list[object] = []
# Another one after a fork.
_process = object()


def after_fork() -> None:
    """What was under way has stayed with the parent; it is kept, for to drop it would end it here."""
    global _process
    _process = object()
    _left_behind.append(set(_unfinished))
    _unfinished.clear()
