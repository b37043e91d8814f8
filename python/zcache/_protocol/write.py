"""Writes and deletes of the source, and what they invalidate.

Nothing here raises because of the cache store: only the source's own errors, and cancellations, leave
these methods; and, before the source is touched, `IndexLockTimeout`, where the others on a directory could
not be told of the change because one of them keeps the lock of the index, and `CacheUnreachableError`, where
others who use the cache store would never see the change.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from zcache._backends.base import FillJob
from zcache._byte_ranges import RESERVED, is_encodable, is_plain, is_reserved, is_too_long
from zcache._core import Index, is_cacheable_key
from zcache._index.calls import is_complete
from zcache._index.handle import ignore
from zcache._protocol.drain import Drain
from zcache._protocol.single_flight import Flight
from zcache._runtime.buffers import to_cpu_buffer
from zcache._runtime.coroutines import OutcomeUnknown
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from zcache._backends.base import Backend, Victim
    from zcache._protocol.listing import Lister
    from zcache._runtime.io import IO


logger = logging.getLogger("zcache")

# They say to other processes what may still be changed in a source: as long as this one lives.
_never_ended: list[Index] = []


class Writer:
    """Writes and deletes through one cache.

    Parameters
    ----------
    backend : Backend
        The cache store, with its index.
    lister : Lister
        Hears of what changes.
    source_name : str
        For the log.
    sampling : bool
        Whether what is written goes into the sample of the index.
    """

    def __init__(
        self, backend: Backend, lister: Lister, source_name: str, *, sampling: bool
    ) -> None:
        self.backend = backend
        self.sampling = sampling
        self.handle = backend.shared.handle
        self.fills = backend.shared.fills
        self.now = backend.shared.clock
        self.lister = lister
        self._source_name = source_name
        self._drain = Drain(backend)
        self._warned = False

    async def write(
        self, io: IO, key: str, work: Callable[[], Awaitable[None]], data: bytes | None
    ) -> None:
        """Write one key of the source by `work`, and cache `data` where that is safe."""
        if not is_cacheable_key(key):
            await self.change(io, key, work)
            return
        self.backend.begin(io)
        write = _KeyWrite(self, io, key)
        try:
            await write.begin()
            await write.change_source(work)
            await write.end(data)
        except BaseException:
            write.interrupted()
            raise
        finally:
            write.close()

    async def fill(self, io: IO, key: str, data: bytes, ticket: int, fetched: float) -> bool:
        """Hand a written value over to the cache."""
        fill_now = self.backend.fill_now
        if fill_now is not None:
            buffer = to_cpu_buffer(data)
            return fill_now(key, None, data, buffer, ticket, fetched) is not None
        job = FillJob(key, None, data, ticket, fetched, self.backend)
        taken: bool = await self.fills.put(io, job)
        return taken

    async def _remove_below(self, io: IO, prefix: str, *, begins: bool) -> int:
        """Drop what is below a prefix, whatever the index knows of it; how many entries it knew."""
        count = await self._drain.drain(io, prefix)
        if self.backend.removes_by_name:
            await self.backend.remove_unlisted(io, prefix, begins=begins)
        else:
            await self.remove_unlisted(io, prefix)
        return count

    async def remove_unlisted(self, io: IO, prefix: str) -> None:
        """Drop what an index that is not complete may not know yet."""
        if not self.handle.usable:
            return
        try:
            knows_all = await self.handle.call(io, is_complete)
        except IndexLockTimeout:
            knows_all = False
        if not knows_all:
            await self.backend.remove_unlisted(io, prefix)

    async def change(self, io: IO, prefix: str, work: Callable[[], Awaitable[None]]) -> None:
        """Change the source below a prefix by `work`; nothing below it stays cached."""
        await self.lister.forget_below(io, prefix)
        try:
            await self._change(io, prefix, work)
        finally:
            await self.lister.forget_below(io, prefix)

    async def _change(self, io: IO, prefix: str, work: Callable[[], Awaitable[None]]) -> None:
        scope = _scope(prefix)
        if scope is None:
            await io.change(work, lambda _: None)
            return
        prefix, handle = scope, self.handle
        tried = ended = False

        def late(_: BaseException | None) -> None:
            nonlocal ended
            ended = True
            self._drain.later(prefix, begins=False)
            end_elsewhere()
            if tried:
                self.backend.tell_later(prefix)

        await handle.call(io, Index.invalidate, prefix, True, alone=True)
        end_elsewhere = self.backend.begin_change(prefix)
        try:
            await self._remove_below(io, prefix, begins=True)
        except BaseException as interrupt:
            late(interrupt)
            raise

        async def end() -> None:
            end_elsewhere()
            # It was emptied before the change, and nothing was filled since: the rest may come later.
            with contextlib.suppress(IndexLockTimeout):
                try:
                    # Before the end is told, as in `write`.
                    await self._remove_below(io, prefix, begins=False)
                except BaseException as interrupt:
                    late(interrupt)
                    raise
                await handle.call_shielded(
                    io, lambda _: self._drain.later(prefix), Index.invalidate, prefix, False
                )
                await self._drain.drain(io, prefix)

        tried = True
        try:
            await io.change(work, self.unless_unknown(late))
        except Exception:
            if not ended:
                await end()
            raise
        await end()

    def unless_unknown(
        self, late: Callable[[BaseException | None], None]
    ) -> Callable[[BaseException | None], None]:
        """The same, but for a change that was cut off: as it may land at any time, it never ends."""

        def ended(outcome: BaseException | None) -> None:
            if not isinstance(outcome, OutcomeUnknown):
                late(outcome)
                return
            index = self.handle.index
            if index.shared and index not in _never_ended:
                _never_ended.append(index)
            if not self._warned:
                self._warned = True
                logger.warning(
                    "a write to %s was cut off in the middle, and may land at any time: what it was about "
                    "is not cached any more until this process ends. To avoid that, let writes end before "
                    "the event loop does.",
                    self._source_name,
                )

        return ended

    @contextlib.asynccontextmanager
    async def _unfilled(self, io: IO, prefix: str) -> AsyncIterator[None]:
        """Invalidate what is at and below a prefix, to be removed.

        Nothing is filled there before this ends, so no newer value goes by its name.
        """
        await self.handle.call(io, Index.invalidate, prefix, True, alone=True)
        try:
            yield
        finally:
            self.handle.call_later(ignore, Index.invalidate, prefix, False)

    async def invalidate(self, io: IO, prefix: str) -> int:
        """Forget what is cached at and below a prefix; how many entries. The source stays as it is."""
        self.backend.check_drops()
        scope = _scope(prefix)
        await self.lister.forget_below(io, prefix)
        if scope is None:
            return 0
        async with self._unfilled(io, scope):
            self.backend.forget_elsewhere(scope)
            return await self._remove_below(io, scope, begins=True)

    async def clear(self, io: IO) -> None:
        """Empty the cache; the source stays as it is."""
        self.backend.check_drops()
        await self.lister.forget_below(io, "")
        async with self._unfilled(io, ""):
            await self._drain.drain(io, "")
            if self.backend.removes_by_name and not self.backend.tells_by_name:
                # Also what a damaged index hides.
                await self.backend.remove_unlisted(io, "", begins=True)
            else:
                await self.remove_unlisted(io, "")
            self.backend.forget_elsewhere("")
        self.backend.release_unknown()
        victims = await self.handle.call_shielded(
            io, self.backend.remove_later, Index.failed_deletes, 2**31
        )
        if victims:
            await self.backend.remove(io, victims)


class _KeyWrite:
    """One write of a key, from its beginning to its end; the index hears of both, whatever interrupts it.

    Parameters
    ----------
    writer : Writer
        Writes.
    io : IO
        How to reach the source.
    key : str
        The key.
    """

    def __init__(self, writer: Writer, io: IO, key: str) -> None:
        self._writer = writer
        self._handle = writer.handle
        self._backend = writer.backend
        self._io = io
        self._key = key
        # Asked now: by its end there may be no event loop any more.
        loop = io.loop()
        self._is_blocking = loop is None
        # Its value is older than its write.
        self._flight = Flight(loop, writer.now())
        self._ticket: int | None = None
        self._has_begun = self._is_changing = self._is_handed_over = False
        # Whether the source may have changed.
        self._is_tried = False
        # A caller that is cancelled while it waits has ended it all the same. Once too often would be the end
        # of another write.
        self._has_ended = False
        self._end_elsewhere: Callable[[], object] = ignore

    async def begin(self) -> None:
        """Invalidate what is cached of the key, and what is on its way."""
        io, key, backend, writer = self._io, self._key, self._backend, self._writer
        victims = await self._handle.call(io, Index.begin_write, key, alone=True)
        self._has_begun = True
        self._end_elsewhere = backend.begin_change(key, is_key=True)
        await backend.remove_key(io, key, victims, begins=True)
        await writer.remove_unlisted(io, key)
        await writer.lister.forget(io, key)

    async def change_source(self, work: Callable[[], Awaitable[None]]) -> None:
        """Write the source by `work`; where that fails, the write has ended, and nothing stays cached."""
        io, key, backend, writer = self._io, self._key, self._backend, self._writer
        self._is_tried = self._is_changing = True
        try:
            await io.change(work, writer.unless_unknown(self._end_late))
        except Exception:
            self._is_changing = False
            self._end_elsewhere()
            await writer.lister.forget(io, key)
            if not self._has_ended:
                await backend.remove_key(io, key, (), begins=False)
                # Its end is told later where the index does not answer, and the key stays uncached until that.
                with contextlib.suppress(IndexLockTimeout):
                    victims, self._ticket = await self._tell_end(keeps=False)
                    if victims:
                        await backend.remove(io, victims)
            raise
        self._is_changing = False

    async def end(self, data: bytes | None) -> None:
        """End a write that has succeeded, and hand `data` over to the cache."""
        io, key, backend, writer = self._io, self._key, self._backend, self._writer
        self._end_elsewhere()
        # Before its end is told, for until then nothing is filled that this would remove.
        await backend.remove_key(io, key, (), begins=False)
        if data is not None:
            self._flight.deliver(data)
        keeps = data is not None and not backend.tells_by_name
        try:
            size = len(data) if data is not None and writer.sampling else None
            victims, self._ticket = await self._tell_end(keeps=keeps, size=size)
        except IndexLockTimeout:
            # The source has it. Its end is told later, and the key stays uncached until that.
            return
        await writer.lister.forget(io, key)
        if victims:
            await backend.remove(io, victims)
        ticket = self._ticket
        if ticket is not None and data is not None and not backend.tells_by_name:
            fetched = self._flight.fetched
            self._is_handed_over = await writer.fill(io, key, data, ticket, fetched)

    def interrupted(self) -> None:
        """Tell the end of a write that has failed or was interrupted, unless it was told."""
        # A change that goes on without its caller reports its end; without an event loop none does.
        goes_on = self._is_changing and not self._is_blocking
        if self._has_begun and not self._has_ended and not goes_on:
            self._end_late(None)

    def close(self) -> None:
        """Close the flight of a value that was not handed over."""
        if self._ticket is not None and not self._is_handed_over:
            self._handle.call_later(ignore, Index.complete_flight, self._key, self._ticket)

    def _tell_end(
        self, *, keeps: bool, size: int | None = None
    ) -> Awaitable[tuple[list[Victim], int | None]]:
        """Tell the index; of a value that is handed over, `size` is what the sample learns of it."""
        self._has_ended = True
        return self._handle.call_shielded(
            self._io, self._ended_alone, Index.end_write, self._key, keeps, self._flight, size
        )

    def _end_late(self, _: BaseException | None) -> None:
        """End it without its caller, with no value that may be kept."""
        self._has_ended = True
        self._handle.call_later(self._ended_alone, Index.end_write, self._key, False)
        self._end_elsewhere()
        if self._is_tried:
            self._backend.tell_later(self._key)

    def _ended_alone(self, outcome: tuple[list[Victim], int | None]) -> None:
        victims, ticket = outcome
        self._backend.remove_later(victims)
        if ticket is not None:
            self._handle.call_later(ignore, Index.complete_flight, self._key, ticket)


def _scope(prefix: str) -> str | None:
    """The keys that a change at and below a prefix concerns, as a prefix; None where none can be cached."""
    prefix = prefix.rstrip("/")
    if is_cacheable_key(prefix):
        return prefix
    if not is_encodable(prefix) or (is_plain(prefix) and _has_nothing_cached(prefix)):
        return None
    # It may name anything, by another name.
    return ""


def _has_nothing_cached(prefix: str) -> bool:
    """Whether neither a plain key nor any key below it can be cached: one part is too long, say."""
    if is_reserved(prefix) or is_too_long(prefix):
        return True
    parts = prefix.split("/")
    return any(part != RESERVED and not is_cacheable_key(part) for part in parts)
