"""The half of the protocol that moves bytes into the cache store and out of its way.

Nothing here raises because of the cache store: only cancellations leave these methods.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from zcache._books import LateError
from zcache._core import CorruptIndexError, IndexBusyError, cache_key, crc32c
from zcache._coroutines import CutOffError
from zcache._files import UnknownValueError
from zcache._offload import see_to_closed

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.core.buffer import Buffer

    from zcache._books import Books
    from zcache._breaker import Breaker
    from zcache._core import Index, Reservation
    from zcache._ports import Outcome, Written
    from zcache._spans import Span
    from zcache._traffic import Traffic

Victim = tuple[int, str]
NOT_NOW: Final = (IndexBusyError, CorruptIndexError)
"""What a step of the index raises that `Books.step` and `Books.must` see to."""
RETRIES: Final = 4
"""Orphans (bytes whose delete failed) that one fill or write tries again to delete."""
DEFAULT_FREE_SPACE: Final = 2**30
"""Bytes of a volume that stay free unless `min_free_space` says otherwise, ..."""
DEFAULT_FREE_PART: Final = 20
"""... and the part of a small volume: one in so many bytes."""
ROOMY: Final = 2**30
"""Bytes more than must stay free with which nobody asks the volume again ..."""
ROOMY_FOR: Final = 0.05
"""... for so many seconds: to ask takes as long as to write, and no disk is filled in that time."""
_ROUNDS: Final = 16


def ignore(_: object) -> None:
    """Nothing is to be done about the outcome."""


@dataclass(slots=True)
class Writing:
    """A value on its way into the cache store, for which there is room.

    Attributes
    ----------
    io : Traffic
        The way there.
    key, name : str
        Its key, and its name in the cache store.
    data : bytes
        The value.
    ticket : int
        Whether it may be kept.
    reservation : Reservation
        Its room.
    now : float
        When it was read, in seconds on the clock of the index.
    """

    io: Traffic
    key: str
    name: str
    data: bytes
    ticket: int
    reservation: Reservation
    now: float

    def checksum(self, written: Written) -> int:
        """CRC32C of the value, which whoever has written it may know."""
        return crc32c(self.data) if written is None else written.checksum


class Fills:
    """Making room, writing and deleting.

    Attributes
    ----------
    books : Books
        The index.
    breaker : Breaker
        Whether the cache store may be used.
    min_free_space : int or None
        Bytes of the volume of a cache directory that stay free.
    """

    books: Books
    breaker: Breaker
    min_free_space: int | None
    _roomy_until = 0.0
    # What is there, where nothing can fail.
    _values: dict[str, Buffer] | None
    # Tickets that are seen to at the end of a write which goes on without its reader.
    _left: set[int]
    # Room of writes that may land at any time, for good.
    _cut_off: list[Reservation]

    @property
    def index(self) -> Index:
        """The index; another one after a fork."""
        index: Index = self.books.index
        return index

    def now(self) -> float:
        """Seconds on the clock that ages are counted by."""
        return self.books.now()

    def is_left(self, ticket: int) -> bool:
        """Whether the end of a write sees to the flight; to be asked once."""
        if ticket not in self._left:
            return False
        self._left.discard(ticket)
        return True

    async def forget(self, io: Traffic, key: str) -> None:
        """Drop what is cached of a key that the source does not have."""
        forget = self.books.sure
        with contextlib.suppress(LateError):
            victims = await forget(io, self._give_up, self.index.forget, key, for_ever=False)
            await self.drop(io, victims)

    async def fill(
        self, io: Traffic, key: str, span: Span | None, data: bytes, ticket: int
    ) -> bool:
        """Cache a value, if there is room for it and the ticket allows. Whether the flight has landed."""
        try:
            return await self._fill(io, key, span, data, ticket)
        except LateError:
            # Its reader has it. What was begun ends when the index answers again.
            return False

    async def _fill(
        self, io: Traffic, key: str, span: Span | None, data: bytes, ticket: int
    ) -> bool:
        # Without deletes no room can be made either; to try would cost entries that are still good.
        allows = self.breaker.allows
        if not (allows("write") and allows("delete") and self.books.usable):
            return False
        books, index, immediate = self.books, self.books.index, io.port.immediate
        now = self.now()
        if books.directory is not None:
            # The bound of one that has died counts until then.
            books.reap()
            see_to_closed()
        try:
            room = index.reserve(key, span, len(data), ticket, now)
        except NOT_NOW:
            again = partial(books.step, io, index.reserve, key, span, len(data), ticket, now)
            room = await again(for_ever=False)
        landed, orphaned = False, True
        while not isinstance(room, str):
            reservation, victims = room
            outcome: tuple[list[int], list[int]] = [], []
            fits = False
            gone = partial(self._fill_gone, key, ticket, reservation)
            try:
                if victims:
                    outcome = (
                        self._delete_now(io, victims)
                        if immediate
                        else await self._delete(io, victims, gone)
                    )
                else:
                    fits = (
                        books.directory is None
                        or time.monotonic() < self._roomy_until
                        or await self._has_space(io, len(data))
                    )
            except BaseException:
                if immediate:  # No delete goes on behind our back.
                    books.soon(ignore, index.abandon, reservation)
                else:
                    books.soon(self._give_up, index.abort, reservation)
                raise
            if victims:
                room = await books.sure(
                    io,
                    self._give_room_up,
                    index.settle,
                    reservation,
                    *outcome,
                    now,
                    for_ever=False,
                )
                continue
            if fits:
                name = key if span is None else cache_key(key, span)
                writing = Writing(io, key, name, data, ticket, reservation, now)
                landed, orphaned = await self._write(writing)
            else:
                abort = index.abort
                leftover = await books.sure(io, self._give_up, abort, reservation, for_ever=False)
                await self.drop(io, leftover)
            break
        if orphaned:
            retry = partial(books.sure, io, self._give_up, index.orphans, RETRIES)
            with contextlib.suppress(LateError):
                await self.drop(io, await retry(for_ever=False))
        return landed

    def _fill_gone(self, key: str, ticket: int, reservation: Reservation) -> None:
        """End a fill whose reader is gone, or will never go on, while it was making room."""
        self.books.soon(self._give_up, self.books.index.abort, reservation)
        self.books.soon(ignore, self.books.index.land, key, ticket)

    def _give_room_up(self, room: tuple[Reservation, list[Victim]] | str) -> None:
        if not isinstance(room, str):
            reservation, victims = room
            self._give_up(victims)
            self.books.soon(self._give_up, self.books.index.abort, reservation)

    async def _has_space(self, io: Traffic, size: int) -> bool:
        """Whether the volume stays as free as it should; makes room on it where that helps."""
        directory = self.books.directory
        if directory is None:
            return True
        for _ in range(_ROUNDS):
            try:
                free, volume = directory.free_space()
            except OSError as error:
                self.breaker.failed(error, "write")
                return False
            wanted = self.min_free_space
            if wanted is None:
                wanted = min(DEFAULT_FREE_SPACE, volume // DEFAULT_FREE_PART)
            lacking = wanted + size - free
            if lacking <= 0:
                if -lacking > ROOMY:
                    self._roomy_until = time.monotonic() + ROOMY_FOR
                return True
            evict = self.books.index.evict
            victims = await self.books.sure(
                io, self._give_up, evict, lacking, self.now(), for_ever=False
            )
            if not victims:
                break
            await self.drop(io, victims)
        return False

    async def _write(self, it: Writing) -> tuple[bool, bool]:
        """Write the bytes for which there is room.

        Returns whether the flight has landed, and whether there may be orphans.
        """
        io, books, index = it.io, self.books, self.books.index
        try:
            if io.port.immediate:
                written = io.port.write_now(it.name, it.data)
            else:
                written = await io.port.write(it.name, it.data, partial(self._written_late, it))
        except Exception as error:  # noqa: BLE001 - the value then stays uncached
            self._not_written(error)
            abort = partial(books.sure, io, self._give_up, index.abort, it.reservation)
            await self.drop(io, await abort(for_ever=False))
            return False, True
        except BaseException as interrupt:
            # The flight stays open until the write has ended, for so does its ticket.
            self._left.add(it.ticket)
            if io.port.immediate:
                self._written_late(it, interrupt)
            raise
        self.breaker.succeeded("write")
        checksum = it.checksum(written)
        # Its age counts from before it was written: that may take long.
        try:
            done = index.finish(it.reservation, checksum, it.now)
        except NOT_NOW:
            end = partial(self._finished_late, it, written)
            finish = partial(books.sure, io, end, index.finish, it.reservation, checksum, it.now)
            try:
                done = await finish(for_ever=False)
            except LateError:
                self._left.add(it.ticket)
                raise
        if done is None:
            # The index was emptied meanwhile, and knows nothing of these bytes.
            await self._give_back(io, it.name, written)
            return False, True
        victims, orphaned = done
        if victims:
            await self.drop(io, victims)
        elif written is not None:
            io.port.seal(it.name, written)
        return True, orphaned

    def _not_written(self, error: Exception) -> None:
        if isinstance(error, UnknownValueError):
            self.books.doubt()
        else:
            self.breaker.failed(error, "write")

    async def _give_back(self, io: Traffic, name: str, written: Written) -> None:
        """Delete bytes that no entry counts."""
        if written is not None:
            io.port.give_up(name, written)
            return
        try:
            outcome = await io.port.delete([name], ignore)
        except Exception as error:  # noqa: BLE001 - whatever it is, the user did not ask for it
            outcome = [error]
        for failure in outcome:
            if failure is not None:
                self.breaker.failed(failure, "delete")

    def _written_late(self, it: Writing, written: Written | BaseException) -> None:
        """End a write whose reader is gone, and its flight: the value is kept like another."""
        books, index = self.books, self.books.index
        if isinstance(written, CutOffError):
            # Until it lands, if ever, it has its room, and nothing else is written in its place.
            self._cut_off.append(it.reservation)
            self.breaker.failed(written, "write")
            books.soon(ignore, index.land, it.key, it.ticket)
            return
        if isinstance(written, BaseException):
            if isinstance(written, Exception):
                self._not_written(written)
            books.soon(self._give_up, index.abort, it.reservation)
            books.soon(ignore, index.land, it.key, it.ticket)
            return
        self.breaker.succeeded("write")
        end = partial(self._finished_late, it, written)
        books.soon(end, index.finish, it.reservation, it.checksum(written), it.now)

    def _finished_late(
        self, it: Writing, written: Written, done: tuple[list[Victim], bool] | None
    ) -> None:
        if done is None:
            it.io.port.give_up(it.name, written)
            self.books.soon(ignore, self.books.index.land, it.key, it.ticket)
        elif victims := done[0]:
            self._give_up(victims)
        else:
            it.io.port.seal(it.name, written)

    async def drop(self, io: Traffic, victims: list[Victim]) -> None:
        """Delete the bytes of entries that the index has dropped."""
        if not victims:
            return
        over = io.port.immediate
        try:
            dropped, failed = await self._delete(io, victims)
            over = True
            await self.books.sure(io, ignore, self.books.index.settled, dropped, failed)
        except BaseException:
            if over:  # Nobody else tells what has become of them.
                self._give_up(victims)
            raise
        if failed and self.breaker.allows("write"):
            # Whoever is cancelled here leaves a value without its mark, but counted.
            await io.port.remember(_names(victims, failed))

    async def _delete(
        self, io: Traffic, victims: list[Victim], gone: Callable[[], None] | None = None
    ) -> tuple[list[int], list[int]]:
        """Delete bytes; returns the cells of those that are gone and of those that may not be.

        `gone` is called where they are deleted after all, but nobody waits for that any more.
        """
        if io.port.immediate:
            return self._delete_now(io, victims)
        if not self._may_delete():
            return [], [cell for cell, _ in victims]

        def late(outcome: Outcome | BaseException) -> None:
            if isinstance(outcome, BaseException):
                self._give_up(victims)
            else:
                dropped, failed = self._sort(victims, outcome)
                if failed:
                    io.port.remember_late(_names(victims, failed))
                self.books.soon(ignore, self.books.index.settled, dropped, failed)
            if gone is not None:
                gone()

        try:
            outcome = await io.port.delete([name for _, name in victims], late)
        except Exception as error:  # noqa: BLE001 - whatever it is, the user did not ask for it
            outcome = [error] * len(victims)
        return self._sort(victims, outcome)

    def _delete_now(self, io: Traffic, victims: list[Victim]) -> tuple[list[int], list[int]]:
        """Do the same through a port that never suspends."""
        if not self._may_delete():
            return [], [cell for cell, _ in victims]
        try:
            outcome = io.port.delete_now([name for _, name in victims])
        except Exception as error:  # noqa: BLE001 - whatever it is, the user did not ask for it
            outcome = [error] * len(victims)
        except BaseException:
            self._give_up(victims)
            raise
        return self._sort(victims, outcome)

    def _may_delete(self) -> bool:
        # A file system tells at once. What is left in a directory could come back: to make room is not
        # even tried while deletes are left alone, so these are values that are not valid any more.
        return self.books.directory is not None or self.breaker.allows("delete")

    def _sort(self, victims: list[Victim], outcome: Outcome) -> tuple[list[int], list[int]]:
        dropped, failed = [], []
        for (cell, _), error in zip(victims, outcome, strict=True):
            if error is None:
                dropped.append(cell)
            else:
                failed.append(cell)
                self.breaker.failed(error, "delete")
        if not failed:
            self.breaker.succeeded("delete")
        return dropped, failed

    def _give_up(self, victims: list[Victim]) -> None:
        """Leave bytes to a later delete: they stay counted until then."""
        if victims:
            cells = [cell for cell, _ in victims]
            self.books.soon(ignore, self.books.index.settled, [], cells)


def _names(victims: list[Victim], cells: list[int]) -> list[str]:
    wanted = set(cells)
    return [name for cell, name in victims if cell in wanted]
