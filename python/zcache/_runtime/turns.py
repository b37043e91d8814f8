"""How much work of one kind an event loop does in one turn, before others have theirs.

Ten thousand tasks that are started at once all run in one turn of the loop. What each of them does takes
little, all of it together does not.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from typing import Final, Generic, TypeVar

BUDGET: Final = 0.01
"""Seconds of one turn; as many pieces of work as fit into it."""
FEWEST: Final = 8
"""Pieces that go on in each turn, however long they take."""


class _Turn(ABC):
    """A turn of one event loop, the turns after it while there is work, and those who wait for one, in their order.

    Only its loop holds it, by what is called where the turn ends: it goes with the loop, also where that stops for good.

    Attributes
    ----------
    loop : weak reference to AbstractEventLoop
        The event loop.
    is_over : bool
        Whether it has ended, and no other one has followed.
    waiting : deque of (Future, int)
        Those who wait, and what each counts for.
    queued : int
        What they count for together.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)
        self.waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self.queued = 0
        self.is_over = False
        loop.call_soon(self._end, loop)

    async def wait(self, loop: asyncio.AbstractEventLoop, size: int) -> None:
        """Wait until the work is let in; `size` is what it counts for."""
        waiter: asyncio.Future[None] = loop.create_future()
        self.waiting.append((waiter, size))
        self.queued += size
        await waiter

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        """The turn is over: let in some of those who wait."""
        # So it is after an interrupt, which leaves no waiter behind.
        goes_on = True
        try:
            goes_on = bool(self.waiting)
            self.reset()
            while self.waiting:
                waiter, size = self.waiting[0]
                if not waiter.done():
                    if not self.lets_in(size):
                        break
                    waiter.set_result(None)
                self.waiting.popleft()
                self.queued -= size
        finally:
            # Behind those who were let in, so that the next look knows what they took.
            if goes_on:
                loop.call_soon(self._end, loop)
            else:
                self.is_over = True

    @abstractmethod
    def reset(self) -> None:
        """Begin a turn in which nothing was done yet."""

    @abstractmethod
    def lets_in(self, size: int) -> bool:
        """Count one who has waited, unless there is no room for it in this turn."""


T = TypeVar("T", bound=_Turn)


class _Turns(ABC, Generic[T]):
    """The turns of all event loops, for one kind of work. Two loops may take turns in one thread."""

    def __init__(self) -> None:
        # By the identity of the loop, which another one may have later.
        self._turns: weakref.WeakValueDictionary[int, T] = weakref.WeakValueDictionary()

    def _of(self, loop: asyncio.AbstractEventLoop | None) -> T | None:
        """The turn of this loop, if one has begun."""
        turn = self._turns.get(id(loop))
        return None if turn is None or turn.is_over or turn.loop() is not loop else turn

    def _begun(self, loop: asyncio.AbstractEventLoop) -> T:
        """The turn of this loop, which begins here if none has."""
        turn = self._of(loop)
        if turn is None:
            turn = self._turns[id(loop)] = self._new(loop)
        return turn

    @abstractmethod
    def _new(self, loop: asyncio.AbstractEventLoop) -> T:
        """A turn that begins."""


class _TimedTurn(_Turn):
    """A turn that lasts for `BUDGET` seconds, and lets in as many as take so long by what those before them took."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._began = time.perf_counter()
        self._count = self._most = 0

    def begins(self) -> bool:
        """Count a piece of work, unless it has to wait."""
        if self.waiting or self.is_long:
            return False
        self._count += 1
        return True

    @property
    def is_long(self) -> bool:
        """Whether it has lasted for `BUDGET` seconds."""
        return time.perf_counter() - self._began > BUDGET

    def reset(self) -> None:
        now = time.perf_counter()
        each = (now - self._began) / max(1, self._count)
        # Not many more than before: one quick turn says little about the next.
        self._most = max(FEWEST, min(2 * self._count, int(BUDGET / max(each, 1e-7))))
        self._began, self._count = now, 0

    def lets_in(self, size: int) -> bool:
        if self._count >= self._most:
            return False
        self._count += size
        return True


class Turns(_Turns[_TimedTurn]):
    """Lets pieces of work begin in a turn by the time that they take, or has them wait for a later one.

    Each is let in at once while the turn is young. Those that wait are let in in their order.
    """

    def _new(self, loop: asyncio.AbstractEventLoop) -> _TimedTurn:
        return _TimedTurn(loop)

    def begins(self) -> bool:
        """Whether a piece of work may begin now; if not, `wait` comes first."""
        loop = asyncio._get_running_loop()
        # A thread that may block has no turns.
        return loop is None or self._begun(loop).begins()

    def are_over(self) -> bool:
        """Whether one call that does much is to let others have their turn; never where the thread may block."""
        loop = asyncio._get_running_loop()
        return loop is not None and self._begun(loop).is_long

    async def wait(self) -> None:
        """Wait for a turn in which the work may begin."""
        loop = asyncio.get_running_loop()
        await self._begun(loop).wait(loop, 1)


class _ReadTurn(_Turn):
    """A turn for so many bytes at most; a larger read takes one for itself.

    Attributes
    ----------
    is_full : bool
        Whether something was too much for it.
    is_cold : bool
        Whether something was not in the page cache.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int) -> None:
        super().__init__(loop)
        self._most = most
        self._read = 0
        self.is_full = self.is_cold = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing is read in it any more."""
        return self.is_full or self.is_cold or bool(self.waiting)

    def is_over_with(self, size: int) -> bool:
        """Whether so many bytes more are too many for it."""
        return self.is_full or bool(self.waiting) or self._read + size > self._most

    def begins(self, size: int) -> bool:
        """Count so many bytes, unless they have to wait."""
        if self.waiting or not self.lets_in(size):
            self.is_full = True
            return False
        return True

    def reset(self) -> None:
        self._read = 0
        self.is_full = self.is_cold = False

    def lets_in(self, size: int) -> bool:
        if self._read and self._read + size > self._most:
            return False
        self._read += size
        return True


class ReadTurns(_Turns[_ReadTurn]):
    """Lets reads take place in a turn by their bytes, or has them wait for a later one.

    Parameters
    ----------
    most : int
        Bytes of one turn. A larger read takes a turn for itself.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def _new(self, loop: asyncio.AbstractEventLoop) -> _ReadTurn:
        return _ReadTurn(loop, self._most)

    @property
    def _now(self) -> _ReadTurn | None:
        """The turn of the loop that runs here; None for a thread that may block, or where nothing was read yet."""
        return self._of(asyncio._get_running_loop()) if self._turns else None

    @property
    def queued(self) -> int:
        """What those who wait count for together."""
        turn = self._now
        return 0 if turn is None else turn.queued

    @property
    def is_closed(self) -> bool:
        """Whether nothing is read in this turn any more: something was too much for it, or was cold."""
        turn = self._now
        return turn is not None and turn.is_closed

    @property
    def is_full(self) -> bool:
        """Whether something was too much for this turn, or waits for a later one."""
        turn = self._now
        return turn is not None and (turn.is_full or bool(turn.waiting))

    @property
    def is_cold(self) -> bool:
        """Whether something was not in the page cache in this turn."""
        turn = self._now
        return turn is not None and turn.is_cold

    def note_cold(self) -> None:
        """Something was not in the page cache: even to ask costs time, for the kernel begins to read."""
        loop = asyncio._get_running_loop()
        if loop is not None:  # A thread may ask as often as it likes.
            self._begun(loop).is_cold = True

    def begins(self, size: int) -> bool:
        """Count so many bytes, unless they are too many for this turn: then `wait` comes first."""
        loop = asyncio._get_running_loop()
        # A thread that may block has no turns.
        return loop is None or self._begun(loop).begins(size)

    def goes_on(self, size: int) -> bool:
        """The same, where this turn is not closed either."""
        return not self.is_closed and self.begins(size)

    def is_over(self, size: int) -> bool:
        """Whether so many bytes are too many for this turn."""
        turn = self._now
        return turn is not None and turn.is_over_with(size)

    async def wait(self, size: int) -> None:
        """Wait for a turn in which so many bytes may be read; they are counted then."""
        loop = asyncio.get_running_loop()
        await self._begun(loop).wait(loop, size)


turns = Turns()
