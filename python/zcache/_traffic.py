"""How the protocol reaches the source and the cache store, with an event loop or without one."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Final, TypeVar

from zarr.storage import MemoryStore

from zcache._coroutines import settle
from zcache._threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from concurrent.futures import Future

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._flights import Flight
    from zcache._ports import Port


T = TypeVar("T")
AT_ONCE: Final = 64
"""Reads or fills of one call that go on at once: more would wait for threads or connections anyhow."""


class Traffic:
    """How the protocol reaches a source and the cache store: this one from an event loop."""

    __slots__ = ("port", "source")

    def __init__(self, source: Store, port: Port) -> None:
        self.source: Any = source
        self.port = port

    loop: Callable[[], asyncio.AbstractEventLoop | None] = staticmethod(asyncio.get_running_loop)
    """The event loop that a read depends on; called for each miss."""

    def read(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Awaitable[Buffer | None]:
        """Read from the source."""
        found: Awaitable[Buffer | None] = self.source.get(key, prototype, byte_range)
        return found

    async def change(
        self, work: Callable[[], Awaitable[None]], late: Callable[[BaseException | None], None]
    ) -> None:
        """Change the source; see `settle`."""
        if type(self.source) is MemoryStore:
            await _now(work, late)  # It never suspends, so it cannot be cut off either.
        else:
            await settle(work, late)

    async def wait(self, flight: Flight) -> bool:
        """Wait for a flight; False asks the caller to read in its place."""
        return await flight.wait()

    async def until(self, done: Future[None], seconds: float | None = None) -> bool:
        """Wait for what is done elsewhere, but no longer than so many seconds; whether it is done."""
        if seconds is not None and seconds <= 0:
            return done.done()
        # Which is not cancelled with its waiter, for others wait for the same.
        ended, _ = await asyncio.wait({asyncio.wrap_future(done)}, timeout=seconds)
        return bool(ended)

    async def block(self, work: Callable[[], None]) -> None:
        """Do what may take long, out of the way of everybody else."""
        await in_thread(work, lambda _: None)

    async def together(self, works: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        """Do several things that may wait, some at once; where one fails, the others are given up.

        Nothing of it goes on once this has returned.
        """
        if self.port.immediate or len(works) < 2:  # Nothing waits, or not for each other.
            return [await work() for work in works]
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
            async with limit:
                return await work()

        tasks = [asyncio.ensure_future(one(work)) for work in works]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def pause(self) -> None:
        """Let others have their turn."""
        await asyncio.sleep(0)

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that may suspend."""
        await work


async def _now(
    work: Callable[[], Awaitable[None]], late: Callable[[BaseException | None], None]
) -> None:
    try:
        await work()
    except Exception:
        raise
    except BaseException as interrupt:
        late(interrupt)
        raise


class SyncTraffic(Traffic):
    """The same from a thread that may block."""

    __slots__ = ()

    loop = staticmethod(lambda: None)

    async def read(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        found: Buffer | None = self.source.get_sync(key, prototype=prototype, byte_range=byte_range)
        return found

    async def change(
        self, work: Callable[[], Awaitable[None]], late: Callable[[BaseException | None], None]
    ) -> None:
        await _now(work, late)

    async def wait(self, flight: Flight) -> bool:
        return flight.wait_sync()

    async def until(self, done: Future[None], seconds: float | None = None) -> bool:
        return bool(wait([done], seconds).done)

    async def block(self, work: Callable[[], None]) -> None:
        work()

    async def together(self, works: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        return [await work() for work in works]

    async def pause(self) -> None:
        pass

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        # A thread that has no event loop, and whose caller may run in one.
        with ThreadPoolExecutor(1, thread_name_prefix="zcache") as thread:
            thread.submit(asyncio.run, work).result()
