"""How a source is reached and what is waited for: from an event loop, or from a thread that may block.

What is done with it is written once, as coroutines. With `SyncIO` they never suspend, so they run without an
event loop (`run_without_loop`).
"""

from __future__ import annotations

import asyncio
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from zarr.abc.store import Store, SupportsSyncStore
from zarr.storage import MemoryStore

from zcache._runtime.coroutines import NoAnswerError, report, shield_to_completion, within
from zcache._runtime.thread_calls import in_thread, in_thread_sync
from zcache._runtime.threads import NoThreadError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._runtime.latch import Latch
    from zcache._runtime.threads import Threads

    class Waitable(Protocol):
        """What can be waited for from an event loop and from a thread."""

        async def wait(self) -> bool: ...
        def wait_sync(self) -> bool: ...


T = TypeVar("T")
AT_ONCE: Final = 64
"""Hits of one call that are read at once: more would only wait for threads or connections."""
ASIDE: Final = 2**20
"""Bytes from which on to copy or to add up takes longer than the way to a thread and back."""
_ASIDE_IN_A_SECOND: Final = 2**28
"""Bytes for which a thread has a second; fewer have a second too."""


class IO:
    """From an event loop.

    Parameters
    ----------
    source : Store or None
        The source; None for who only waits.
    threads : Threads, optional
        Run what waits for the cache store. Default is None: those of no place.
    """

    __slots__ = ("source", "threads")

    def __init__(self, source: Store | None, threads: Threads | None = None) -> None:
        self.source: Any = source
        self.threads = threads

    loop: Callable[[], asyncio.AbstractEventLoop | None] = staticmethod(asyncio.get_running_loop)
    """The event loop that a read depends on; called for each miss."""

    def read(
        self, key: str, prototype: BufferPrototype, request: ByteRequest | None
    ) -> Awaitable[Buffer | None]:
        """Read from the source."""
        found: Awaitable[Buffer | None] = self.source.get(key, prototype, request)
        return found

    async def change(
        self,
        work: Callable[[], Awaitable[None]],
        on_detached_result: Callable[[BaseException | None], None],
    ) -> None:
        """Change the source; see `shield_to_completion`."""
        if type(self.source) is MemoryStore:
            # It never suspends, so it cannot be cut off either.
            await _change_now(work, on_detached_result)
        else:
            await shield_to_completion(work, on_detached_result)

    async def wait(self, flight: Waitable) -> bool:
        """Wait for a flight; False asks the caller to lead in place of its leader."""
        return await flight.wait()

    async def until(self, done: Latch, seconds: float | None = None) -> bool:
        """Wait for what is done elsewhere, at most so many seconds; whether it is done."""
        return await done.wait_in_loop(seconds)

    async def in_thread(
        self,
        work: Callable[[], T],
        on_detached_result: Callable[[T | BaseException], object] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
        progress: Callable[[], int] | None = None,
    ) -> T:
        """Do what may block out of the way of the event loop; see `in_thread`."""
        return await in_thread(work, on_detached_result, timeout, progress, self.threads)

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """Do what only computes with so many bytes out of the way of the event loop, if they are many.

        Here after all where no thread has done it in time, for others may never release theirs.
        """
        if size < ASIDE:
            return work()
        try:
            return await in_thread(work, None, max(1.0, size / _ASIDE_IN_A_SECOND), None)
        except (NoThreadError, NoAnswerError):
            return work()

    async def call(
        self,
        timeout: float,  # noqa: ASYNC109
        coroutine: Callable[[], Awaitable[T]],
        blocking: Callable[[], T],  # noqa: ARG002
    ) -> T:
        """Read from a store, within `timeout` seconds: by `coroutine` here, by `blocking` in a thread."""
        return await within(timeout, coroutine())

    async def send(
        self,
        timeout: float,  # noqa: ASYNC109
        coroutine: Callable[[], Awaitable[T]],
        blocking: Callable[[], T],  # noqa: ARG002
        on_detached_result: Callable[[T | BaseException], None],
    ) -> T:
        """Change a store: as `call`, but what was begun goes on, and its end is reported."""
        return await shield_to_completion(coroutine, on_detached_result, timeout)

    async def gather(self, works: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        """Do several things, some at once; if one fails, the others are cancelled.

        Nothing of it goes on once this has returned.
        """
        if len(works) < 2:
            return [await work() for work in works]
        left = iter(enumerate(works))
        done: dict[int, T] = {}

        async def some() -> None:
            for number, work in left:
                done[number] = await work()

        tasks = [asyncio.ensure_future(some()) for _ in works[:AT_ONCE]]
        try:
            await asyncio.gather(*tasks)
            return [done[number] for number in range(len(works))]
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def pause(self, seconds: float = 0) -> None:
        """Let others have their turn."""
        await asyncio.sleep(seconds)


class SyncIO(IO):
    """From a thread that may block."""

    __slots__ = ()

    loop = staticmethod(lambda: None)

    async def read(
        self, key: str, prototype: BufferPrototype, request: ByteRequest | None
    ) -> Buffer | None:
        found: Buffer | None = self.source.get_sync(key, prototype=prototype, byte_range=request)
        return found

    async def change(
        self,
        work: Callable[[], Awaitable[None]],
        on_detached_result: Callable[[BaseException | None], None],
    ) -> None:
        await _change_now(work, on_detached_result)

    async def wait(self, flight: Waitable) -> bool:
        return flight.wait_sync()

    async def until(self, done: Latch, seconds: float | None = None) -> bool:
        return done.wait(seconds)

    async def in_thread(
        self,
        work: Callable[[], T],
        on_detached_result: Callable[[T | BaseException], object] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
        progress: Callable[[], int] | None = None,
    ) -> T:
        if on_detached_result is None or timeout is None:
            return work()
        # What may go on without its caller.
        return in_thread_sync(work, on_detached_result, timeout, progress, self.threads)

    async def aside(self, size: int, work: Callable[[], T]) -> T:  # noqa: ARG002
        return work()

    async def call(
        self,
        timeout: float,  # noqa: ASYNC109
        coroutine: Callable[[], Awaitable[T]],  # noqa: ARG002
        blocking: Callable[[], T],
    ) -> T:
        return in_thread_sync(blocking, None, timeout, threads=self.threads)

    async def send(
        self,
        timeout: float,  # noqa: ASYNC109
        coroutine: Callable[[], Awaitable[T]],  # noqa: ARG002
        blocking: Callable[[], T],
        on_detached_result: Callable[[T | BaseException], None],
    ) -> T:
        return in_thread_sync(blocking, on_detached_result, timeout, threads=self.threads)

    async def gather(self, works: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        return [await work() for work in works]

    async def pause(self, seconds: float = 0) -> None:
        if seconds:
            time.sleep(seconds)  # noqa: ASYNC251 - its caller may block, and it never suspends


def is_sync(store: Store) -> bool:
    """Whether a store can do without an event loop now, as zarr's codec pipeline asks.

    Its type is asked: a wrapper may pass the methods of what it wraps on, and show other values by its own.
    """
    is_able = issubclass(type(store), SupportsSyncStore)
    return is_able and bool(getattr(store, "_supports_sync_io", True))


def keeps_sync(store: Store) -> bool:
    """Whether a cache store can: then it gives out by each way what it was given by the other.

    A subclass that has overridden the coroutines alone, also inside a wrapper, may keep values in another form than the
    methods that it has inherited beside them.
    """
    kind, inner = type(store), getattr(store, "_store", None)
    if (agree := _agree.get(kind)) is None:
        agree = _agree[kind] = all(_has_both(kind, *pair) for pair in _PAIRS)
    return agree and is_sync(store) and (not isinstance(inner, Store) or keeps_sync(inner))


_PAIRS: Final = (("get", "get_sync"), ("set", "set_sync"), ("delete", "delete_sync"))
# By class, whether its synchronous methods are as new as its coroutines.
_agree: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _has_both(kind: type, coroutine: str, blocking: str) -> bool:
    for base in kind.__mro__:
        if blocking in vars(base):
            return True
        if coroutine in vars(base):
            return False
    return True


async def _change_now(
    work: Callable[[], Awaitable[None]],
    on_detached_result: Callable[[BaseException | None], None],
) -> None:
    try:
        await work()
    except Exception:
        raise
    except BaseException as interrupt:
        report(on_detached_result, interrupt)
        raise
