"""The part of the protocol that changes the source: writes, deletes, and what they make void.

Nothing here raises because of the cache store: only the source's own errors, and cancellations,
leave these methods.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from zcache._buffers import to_cpu_buffer
from zcache._core import is_known
from zcache._coroutines import CutOffError
from zcache._fills import Fills, Victim, ignore
from zcache._spans import is_encodable, is_plain, is_reserved

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from zarr.abc.store import Store

    from zcache._core import Index
    from zcache._traffic import Traffic


logger = logging.getLogger("zcache")

TURN: Final = 0.01
"""Seconds after which a change of very many values in memory gives others of its event loop their turn. Not
much less: whoever lets go of the interpreter more often than threads ask for it keeps them waiting."""

# They say what may still be changed in a source, to other processes too: as long as this one lives.
_never_ended: list[Index] = []


class Changes(Fills):
    """Writes and deletes."""

    source: Store
    # Whether it was said that a change was cut off.
    _warned = False

    async def write(
        self,
        io: Traffic,
        key: str,
        work: Callable[[], Awaitable[None]],
        data: bytes | None,
    ) -> None:
        """Write one key of the source by `work`, and cache `data` where that is safe."""
        if not is_known(key):
            await self.change(io, key, work)
            return
        books, index = self.books, self.index
        begun = changing = ended = landed = False
        blocking = io.loop() is None
        ticket: int | None = None

        def late(_: BaseException | None) -> None:
            nonlocal ended
            ended = True
            books.soon(lost, index.end_write, key, False)

        def lost(outcome: tuple[list[Victim], int | None]) -> None:
            victims, ticket = outcome
            self._give_up(victims)
            if ticket is not None:
                books.soon(ignore, index.land, key, ticket)

        try:
            victims = await books.step(io, index.begin_write, key)
            begun = True
            await self.drop(io, victims)
            await self._drop_unknown(io, key)
            changing = True
            try:
                await io.change(work, self._unless_cut_off(late))
            except Exception:
                if not ended:
                    ended = True
                    victims, _ = await books.sure(io, lost, index.end_write, key, False)
                    await self.drop(io, victims)
                raise
            changing = False
            # Whoever is cut off while it waits has it ended all the same. Once too often would be the
            # end of somebody else's write.
            ended = True
            victims, ticket = await books.sure(io, lost, index.end_write, key, data is not None)
            await self.drop(io, victims)
            if ticket is not None and data is not None:
                if (values := self._values) is not None:
                    own = to_cpu_buffer(data)
                    joined = books.index.keep(values, key, None, data, own, ticket, self.now())
                    landed = joined is not None
                else:
                    landed = await self.fill(io, key, None, data, ticket)
        except BaseException as error:
            # A change that goes on behind our back tells when it has ended; without an event loop none
            # does.
            if begun and not ended and (not changing or blocking):
                late(error)
            raise
        finally:
            if ticket is not None and not landed and not self.is_left(ticket):
                books.soon(ignore, index.land, key, ticket)

    async def _drop_unknown(self, io: Traffic, prefix: str) -> None:
        """Drop what an index that is being rebuilt may not know yet."""
        books, directory = self.books, self.books.directory
        # Of the index of that moment: the one of now may be another after the wait.
        if directory is not None and not await books.step(io, lambda: books.index.is_complete):
            try:
                await io.block(lambda: directory.remove_below(prefix))
            except OSError as error:
                self.breaker.failed(error, "delete")

    async def change(self, io: Traffic, prefix: str, work: Callable[[], Awaitable[None]]) -> None:
        """Change the source below a prefix by `work`; nothing below it stays cached."""
        prefix = prefix.rstrip("/")
        if not is_known(prefix):
            if (is_reserved(prefix) and is_plain(prefix)) or not is_encodable(prefix):
                # Nothing is ever cached below it.
                await io.change(work, lambda _: None)
                return
            # It may name anything, by another name.
            prefix = ""

        ended = False

        def late(_: BaseException | None) -> None:
            nonlocal ended
            ended = True
            self._sweep_now(prefix, begins=False)

        await self.books.step(io, self.index.void_prefix, prefix, True)
        try:
            await self._sweep(io, prefix)
            await self._drop_unknown(io, prefix)
        except BaseException as interrupt:
            late(interrupt)
            raise

        async def end() -> None:
            await self.books.sure(
                io, lambda _: self._sweep_now(prefix), self.index.void_prefix, prefix, False
            )
            await self._sweep(io, prefix)

        try:
            await io.change(work, self._unless_cut_off(late))
        except Exception:
            if not ended:
                await end()
            raise
        await end()

    def _unless_cut_off(
        self, late: Callable[[BaseException | None], None]
    ) -> Callable[[BaseException | None], None]:
        """The same, but for a change that was cut off: as it may land at any time, it never ends."""

        def ended(outcome: BaseException | None) -> None:
            if not isinstance(outcome, CutOffError):
                late(outcome)
                return
            if self.books.directory is not None and self.index not in _never_ended:
                _never_ended.append(self.index)
            if not self._warned:
                self._warned = True
                logger.warning(
                    "a write to %s was cut off in the middle, and may land at any time: what it was "
                    "about is not cached any more until this process ends. To avoid that, let writes "
                    "end before the event loop does.",
                    self.source,
                )

        return ended

    async def _sweep(self, io: Traffic, prefix: str) -> None:
        """Drop everything below a prefix."""
        begun = time.monotonic()
        try:
            while victims := await self.books.step(io, self.index.sweep, prefix):
                await self.drop(io, victims)
                if io.port.immediate and time.monotonic() - begun >= TURN:
                    await io.pause()
                    begun = time.monotonic()
        except BaseException:
            self._sweep_now(prefix)
            raise

    def _sweep_now(self, prefix: str, *, begins: bool | None = None) -> None:
        """Drop everything below a prefix at once, and leave the bytes to later deletes.

        Where the index has to be waited for, that happens in the background.
        """

        def sweep(_: object) -> None:
            self.books.soon(drop, self.index.sweep, prefix)

        def drop(victims: list[Victim]) -> None:
            if victims:
                self._give_up(victims)
                sweep(None)

        self.books.soon(sweep, self.index.void_prefix, prefix, begins)

    async def clear(self, io: Traffic) -> None:
        """Empty the cache; the source stays as it is."""
        await self.books.step(io, self.index.void_prefix, "")
        await self._sweep(io, "")
        await self._drop_unknown(io, "")
        orphans = await self.books.sure(io, self._give_up, self.index.orphans, 2**31)
        await self.drop(io, orphans)
