"""Writes and deletes of the source, and what they invalidate.

Nothing here raises because of the cache store: only the source's own errors, and cancellations, leave
these methods; and, before the source is touched, `IndexLockTimeout`, where the others on a directory could
not be told of the change because one of them keeps the lock of the index, and `CacheUnreachableError`, where
others who use the cache store would never see the change.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from zcache._backends.base import FillJob
from zcache._byte_ranges import RESERVED, is_encodable, is_plain, is_reserved, is_too_long
from zcache._core import Index, is_cacheable_key
from zcache._index.calls import is_complete
from zcache._index.handle import ignore
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

TURN: Final = 0.01
"""Seconds after which a change of very many values gives others of its event loop their turn. Not much
less: a thread that releases the interpreter more often than others ask for it keeps them waiting."""

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
    """

    def __init__(self, backend: Backend, lister: Lister, source_name: str) -> None:
        self.backend = backend
        self.handle = backend.shared.handle
        self.fills = backend.shared.fills
        self._now = backend.shared.clock
        self._lister = lister
        self._source_name = source_name
        self._warned = False

    async def write(  # noqa: C901 - one protocol: its steps share what an interrupt has to undo
        self, io: IO, key: str, work: Callable[[], Awaitable[None]], data: bytes | None
    ) -> None:
        """Write one key of the source by `work`, and cache `data` where that is safe."""
        if not is_cacheable_key(key):
            await self.change(io, key, work)
            return
        self.backend.begin(io)
        handle = self.handle
        begun = tried = changing = ended = is_handed_over = False
        blocking = io.loop() is None
        ticket: int | None = None
        end_elsewhere: Callable[[], None] | None = None
        # Its value is older than its write.
        flight = Flight(io.loop(), self._now())

        def late(_: BaseException | None) -> None:
            nonlocal ended
            ended = True
            handle.call_later(lost, Index.end_write, key, False)
            if end_elsewhere is not None:
                end_elsewhere()
            if tried:
                self.backend.tell_later(key)

        def lost(outcome: tuple[list[Victim], int | None]) -> None:
            victims, ticket = outcome
            self.backend.remove_later(victims)
            if ticket is not None:
                handle.call_later(ignore, Index.complete_flight, key, ticket)

        try:
            victims = await handle.call(io, Index.begin_write, key, alone=True)
            begun = True
            end_elsewhere = self.backend.begin_change(key, is_key=True)
            await self.backend.remove_key(io, key, victims, begins=True)
            await self._remove_unlisted(io, key)
            await self._lister.forget(io, key)
            tried = changing = True
            try:
                await io.change(work, self._unless_unknown(late))
            except Exception:
                changing = False
                end_elsewhere()
                await self._lister.forget(io, key)
                if not ended:
                    await self.backend.remove_key(io, key, (), begins=False)
                    ended = True
                    # Its end is told later, then, and the key stays uncached until that.
                    with contextlib.suppress(IndexLockTimeout):
                        victims, _ = await handle.call_shielded(
                            io, lost, Index.end_write, key, False
                        )
                        if victims:
                            await self.backend.remove(io, victims)
                raise
            changing = False
            end_elsewhere()
            # Before its end is told, for until then nothing is filled that this would remove.
            await self.backend.remove_key(io, key, (), begins=False)
            # A caller that is cancelled while it waits has ended it all the same. Once too often would be
            # the end of another write.
            ended = True
            if data is not None:
                flight.deliver(data)
            try:
                victims, ticket = await handle.call_shielded(
                    io, lost, Index.end_write, key, data is not None, flight
                )
            except IndexLockTimeout:
                # The source has it. Its end is told later, and the key stays uncached until that.
                return
            await self._lister.forget(io, key)
            if victims:
                await self.backend.remove(io, victims)
            if ticket is not None and data is not None and not self.backend.tells_by_name:
                is_handed_over = await self._fill(io, key, data, ticket, flight.fetched)
        except BaseException as error:
            # A change that goes on without its caller reports its end; without an event loop none does.
            if begun and not ended and (not changing or blocking):
                late(error)
            raise
        finally:
            if ticket is not None and not is_handed_over:
                handle.call_later(ignore, Index.complete_flight, key, ticket)

    async def _fill(self, io: IO, key: str, data: bytes, ticket: int, fetched: float) -> bool:
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
        count = await self.drain_prefix(io, prefix)
        if self.backend.removes_by_name:
            await self.backend.remove_unlisted(io, prefix, begins=begins)
        else:
            await self._remove_unlisted(io, prefix)
        return count

    async def _remove_unlisted(self, io: IO, prefix: str) -> None:
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
        await self._lister.forget_below(io, prefix)
        try:
            await self._change(io, prefix, work)
        finally:
            await self._lister.forget_below(io, prefix)

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
            self._drain_later(prefix, begins=False)
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
                    io, lambda _: self._drain_later(prefix), Index.invalidate, prefix, False
                )
                await self.drain_prefix(io, prefix)

        tried = True
        try:
            await io.change(work, self._unless_unknown(late))
        except Exception:
            if not ended:
                await end()
            raise
        await end()

    def _unless_unknown(
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

    async def drain_prefix(self, io: IO, prefix: str) -> int:
        """Drop everything below a prefix; how many entries that was, not counting absences."""
        begun = time.monotonic()
        count = 0

        async def turn() -> None:
            nonlocal begun
            if time.monotonic() - begun >= TURN:
                await io.pause()
                begun = time.monotonic()

        try:
            while victims := await self.handle.call(io, Index.drain_prefix, prefix):
                count += len(victims)
                await self.backend.remove(io, victims)
                await turn()
            while await self.handle.call(io, Index.drain_absences, prefix):
                await turn()
        except BaseException:
            self._drain_later(prefix)
            raise
        return count

    def _drain_later(self, prefix: str, *, begins: bool | None = None) -> None:
        """Drop everything below a prefix at once, and leave the bytes to later deletes.

        Where the index has to be waited for, that happens in the background.
        """

        def drain(_: object) -> None:
            self._repeat_later(self.backend.remove_later, Index.drain_prefix, prefix)
            self._repeat_later(ignore, Index.drain_absences, prefix)

        self.handle.call_later(drain, Index.invalidate, prefix, begins)

    def _repeat_later(
        self, then: Callable[[Any], object], step: Callable[[Index, str], Any], prefix: str
    ) -> None:
        """Take a step until its answer is empty; `then` gets the others."""
        here, is_running, goes_on = threading.get_ident(), True, True

        def take(answer: Any) -> None:
            nonlocal goes_on
            if not answer:
                return
            then(answer)
            if is_running and threading.get_ident() == here:
                goes_on = True  # In the loop below: there may be many.
            else:
                self._repeat_later(then, step, prefix)

        while goes_on:
            goes_on = False
            self.handle.call_later(take, step, prefix)
        is_running = False

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
        await self._lister.forget_below(io, prefix)
        if scope is None:
            return 0
        async with self._unfilled(io, scope):
            self.backend.forget_elsewhere(scope)
            return await self._remove_below(io, scope, begins=True)

    async def clear(self, io: IO) -> None:
        """Empty the cache; the source stays as it is."""
        self.backend.check_drops()
        await self._lister.forget_below(io, "")
        async with self._unfilled(io, ""):
            await self.drain_prefix(io, "")
            if self.backend.removes_by_name and not self.backend.tells_by_name:
                # Also what a damaged index hides.
                await self.backend.remove_unlisted(io, "", begins=True)
            else:
                await self._remove_unlisted(io, "")
            self.backend.forget_elsewhere("")
        self.backend.release_unknown()
        victims = await self.handle.call_shielded(
            io, self.backend.remove_later, Index.failed_deletes, 2**31
        )
        if victims:
            await self.backend.remove(io, victims)


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
