"""How much work of one kind an event loop does in one turn, before others have theirs.

Ten thousand tasks that are started at once all run in one turn of the loop. What each of them does takes
little, all of it together does not.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

BUDGET: Final = 0.01
"""Seconds of one turn; as many pieces of work as fit into it."""
FEWEST: Final = 8
"""Pieces that go on in each turn, however long they take."""


class _Turn(threading.local, ABC):
    """The turn of the event loop that runs in a thread, and those who wait for a later one, in their order."""

    def __init__(self) -> None:
        self._loop: Callable[[], asyncio.AbstractEventLoop | None] = lambda: None
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._queued = 0
        self._is_due = False

    @property
    def queued(self) -> int:
        """What those who wait count for together."""
        return self._queued

    def _use(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count for this loop from now on."""
        if self._loop() is not loop:
            self._loop = weakref.ref(loop)
            # Waiters of a loop that has ended end with it.
            self._waiting, self._queued = deque(), 0
            self._is_due = False
            self._reset()

    def _note_end(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have `_end` called where this turn ends."""
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._end, loop)

    async def _queue(self, size: int) -> None:
        """Wait until the work is let in; `size` is what it counts for."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiting.append((waiter, size))
        self._queued += size
        self._note_end(loop)
        await waiter

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        """The turn is over: let in some of those who wait."""
        if self._loop() is not loop:
            return
        had_waiters = bool(self._waiting)
        try:
            self._is_due = False
            self._reset()
            while self._waiting:
                waiter, size = self._waiting[0]
                if not waiter.done():
                    if not self._lets_in(size):
                        break
                    waiter.set_result(None)
                self._waiting.popleft()
                self._queued -= size
        finally:
            # Behind those who were let in, so that the next look knows what they took; and also after an
            # interrupt, which leaves no waiter behind.
            if had_waiters:
                self._note_end(loop)

    @abstractmethod
    def _reset(self) -> None:
        """Begin a turn in which nothing was done yet."""

    @abstractmethod
    def _lets_in(self, size: int) -> bool:
        """Count one who has waited, unless there is no room for it in this turn."""


class Turns(_Turn):
    """Lets pieces of work begin in a turn by the time that they take, or has them wait for a later one.

    Each is let in at once while the turn is young. Those that wait are let in in their order, each turn as
    many as take `BUDGET` seconds by what those before them took.
    """

    def __init__(self) -> None:
        super().__init__()
        self._began = 0.0
        self._count = self._most = 0

    def begins(self) -> bool:
        """Whether a piece of work may begin now; if not, `wait` comes first."""
        loop = asyncio._get_running_loop()
        if loop is None:
            return True  # A thread that may block.
        self._use(loop)
        if not self._is_due:
            self._began, self._count = time.perf_counter(), 0
            self._note_end(loop)
        if self._waiting or time.perf_counter() - self._began > BUDGET:
            return False
        self._count += 1
        return True

    async def wait(self) -> None:
        """Wait for a turn in which the work may begin."""
        await self._queue(1)

    def _reset(self) -> None:
        now = time.perf_counter()
        each = (now - self._began) / max(1, self._count)
        # Not many more than before: one quick turn says little about the next.
        self._most = max(FEWEST, min(2 * self._count, int(BUDGET / max(each, 1e-7))))
        self._began, self._count = now, 0

    def _lets_in(self, size: int) -> bool:
        if self._count >= self._most:
            return False
        self._count += size
        return True


class ReadTurns(_Turn):
    """Lets reads take place in a turn by their bytes, or has them wait for a later one.

    Parameters
    ----------
    most : int
        Bytes of one turn. A larger read takes a turn for itself.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._read = 0
        self._full = self._cold = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing is read in this turn any more: something was too much for it, or was cold."""
        if not (self._full or self._cold or self._waiting):
            return False
        loop = asyncio._get_running_loop()
        return loop is not None and self._loop() is loop

    @property
    def is_cold(self) -> bool:
        """Whether something was not in the page cache in this turn."""
        return self._cold and self.is_closed

    def note_cold(self) -> None:
        """Something was not in the page cache: even to ask costs time, for the kernel begins to read."""
        loop = asyncio._get_running_loop()
        if loop is not None:  # A thread may ask as often as it likes.
            self._use(loop)
            self._cold = True
            self._note_end(loop)

    def begins(self, size: int) -> bool:
        """Count so many bytes, unless they are too many for this turn: then `wait` comes first."""
        loop = asyncio._get_running_loop()
        if loop is None:
            return True  # A thread that may block.
        self._use(loop)
        self._note_end(loop)
        if self._waiting or not self._lets_in(size):
            self._full = True
            return False
        return True

    def goes_on(self, size: int) -> bool:
        """The same, where this turn is not closed either."""
        return not self.is_closed and self.begins(size)

    def is_over(self, size: int) -> bool:
        """Whether so many bytes are too many for this turn."""
        loop = asyncio._get_running_loop()
        if loop is None or self._loop() is not loop:
            return False  # A thread that may block, or nothing was read yet.
        return self._full or bool(self._waiting) or self._read + size > self._most

    async def wait(self, size: int) -> None:
        """Wait for a turn in which so many bytes may be read; they are counted then."""
        await self._queue(size)

    def _reset(self) -> None:
        self._read = 0
        self._full = self._cold = False

    def _lets_in(self, size: int) -> bool:
        if self._read and self._read + size > self._most:
            return False
        self._read += size
        return True


turns = Turns()
