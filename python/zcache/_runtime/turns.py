"""How much work of one kind an event loop does in one turn, before others have theirs.

Ten thousand tasks that are started at once all run in one turn of the loop. What each of them does takes
little, all of it together does not.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

BUDGET: Final = 0.01
"""Seconds of one turn; as many pieces of work as fit into it."""
FEWEST: Final = 8
"""Pieces that go on in each turn, however long they take."""


class Turns(threading.local):
    """Lets pieces of work begin in the event loop that runs in a thread, or has them wait for a later turn.

    Each is let in at once while the turn is young. Those that wait are let in in their order, each turn as
    many as take `BUDGET` seconds by what those before them took.
    """

    def __init__(self) -> None:
        self._loop: Callable[[], asyncio.AbstractEventLoop | None] = lambda: None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._began = 0.0
        self._count = 0
        self._is_due = False

    def begins(self) -> bool:
        """Whether a piece of work may begin now; if not, `wait` comes first."""
        loop = asyncio._get_running_loop()
        if loop is None:
            return True  # A thread that may block.
        if self._loop() is not loop:
            self._loop = weakref.ref(loop)
            # Waiters of a loop that has ended end with it.
            self._waiting = deque()
            self._is_due = False
        if not self._is_due:
            self._is_due = True
            self._began, self._count = time.perf_counter(), 0
            loop.call_soon(self._end, loop)
        if self._waiting or time.perf_counter() - self._began > BUDGET:
            return False
        self._count += 1
        return True

    async def wait(self) -> None:
        """Wait for a turn in which the work may begin."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        """The turn is over: let in some of those who wait."""
        if self._loop() is not loop:
            return
        now = time.perf_counter()
        each = (now - self._began) / max(1, self._count)
        # Not many more than before: one quick turn says little about the next.
        many = max(FEWEST, min(2 * self._count, int(BUDGET / max(each, 1e-7))))
        self._began, self._count, self._is_due = now, 0, bool(self._waiting)
        try:
            while self._waiting and self._count < many:
                waiter = self._waiting.popleft()
                if not waiter.done():
                    self._count += 1
                    waiter.set_result(None)
        finally:
            # Behind those who were let in, so that the next look knows what they took; and also after an
            # interrupt, which leaves no waiter behind.
            if self._is_due:
                loop.call_soon(self._end, loop)


turns = Turns()
