"""The bound of a store without fills: what is above it is evicted where the store is used."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from zcache._core import Index
from zcache._runtime.coroutines import run_without_loop
from zcache._runtime.io import IO, SyncIO, keeps_sync
from zcache._runtime.latch import Latch
from zcache._runtime.thread_calls import run_in_background
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from zcache._backends.base import Backend
    from zcache._index.handle import IndexHandle


class StoreBound:
    """Evicts what is above the bound, from the next operation on: a store may need the event loop of that.

    Parameters
    ----------
    handle : IndexHandle
        The index of the store.
    clock : callable
        Seconds; what ages are counted by.

    Attributes
    ----------
    is_due : bool
        Whether there may be anything above it.
    """

    def __init__(self, handle: IndexHandle, clock: Callable[[], float]) -> None:
        self._handle = handle
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._done: Latch | None = None
        self.is_due = False

    def begin(self, io: IO, backend: Backend) -> None:
        """Evict in the background, unless that is under way, or the store does not delete."""
        if self.under_way is not None:
            return
        if not (self._handle.usable and backend.breaker.allows("delete")):
            return
        done = Latch()
        self._done, self._loop = done, io.loop()
        try:
            if self._loop is not None:
                self._task = self._loop.create_task(self._run(io, backend, done))
            elif keeps_sync(backend.store):
                work = partial(self._run, SyncIO(io.source, io.threads), backend, done)
                run_in_background(lambda: run_without_loop(work()))
            else:
                work = partial(self._run, IO(io.source, io.threads), backend, done)
                run_in_background(lambda: asyncio.run(work()))
        except RuntimeError:  # No thread now; the next operation begins it.
            done.set()

    @property
    def under_way(self) -> Latch | None:
        """Set when the eviction ends that goes on now; None where there is none."""
        done, loop = self._done, self._loop
        has_ended = done is None or done.is_set or (loop is not None and loop.is_closed())
        return None if has_ended else done

    async def _run(self, io: IO, backend: Backend, done: Latch) -> None:
        try:
            await self._evict(io, backend)
        except IndexLockTimeout:
            pass
        finally:
            done.set()

    async def _evict(self, io: IO, backend: Backend) -> None:
        before: int | None = None
        while True:
            # A bound that becomes smaller meanwhile sets it again.
            self.is_due = False
            excess = await self._handle.call(io, _excess)
            if not excess:
                return
            self.is_due = True
            if before is not None and excess >= before:
                # Deletes fail: the next operation tries again, as the circuit breaker has it.
                return
            before = excess
            victims = await self._handle.call_shielded(
                io, backend.remove_later, Index.evict, excess, self._clock()
            )
            if not victims:
                # What could not be deleted is tried again by the next fill.
                self.is_due = False
                return
            await backend.remove(io, victims)

    def after_fork(self) -> None:
        """Start over in a forked child: what is under way goes on in the parent."""
        self._loop = self._task = self._done = None


def evict_from(
    values: MutableMapping[str, Any], handle: IndexHandle, clock: Callable[[], float]
) -> None:
    """Evict from a dict what is above the bound."""
    call = handle.call_blocking
    while (excess := call(_excess)) and (victims := call(Index.evict, excess, clock())):
        for _, name in victims:
            values.pop(name, None)
        call(Index.confirm_deletes, [cell for cell, _ in victims], [])


def _excess(index: Index) -> int:
    return index.excess
