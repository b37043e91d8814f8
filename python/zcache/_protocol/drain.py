"""What is cached below a prefix is dropped, in steps that keep no one else waiting."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final

from zcache._core import Index
from zcache._index.calls import START

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._backends.base import Backend, Victim
    from zcache._index.calls import Rest
    from zcache._runtime.io import IO

TURN: Final = 0.01
"""Seconds after which a change of very many values gives others of its event loop their turn. Not much
less: a thread that releases the interpreter more often than others ask for it keeps them waiting."""


class Drain:
    """Drops what was invalidated.

    Parameters
    ----------
    backend : Backend
        The cache store, with its index.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._handle = backend.shared.handle

    async def drain(self, io: IO, prefix: str) -> int:
        """Drop everything below a prefix; how many entries that was, not counting absences."""
        begun = time.monotonic()
        count = 0

        async def turn() -> None:
            nonlocal begun
            if time.monotonic() - begun >= TURN:
                await io.pause()
                begun = time.monotonic()

        try:
            rest: Rest | None = START
            while rest is not None:
                victims, rest = await self._handle.call(io, Index.drain_prefix, prefix, rest)
                if victims:
                    count += len(victims)
                    await self._backend.remove(io, victims)
                await turn()
            rest = START
            while rest is not None:
                rest = await self._handle.call(io, Index.drain_absences, prefix, rest)
                await turn()
        except BaseException:
            self.later(prefix)
            raise
        return count

    def later(self, prefix: str, *, begins: bool | None = None) -> None:
        """Invalidate and drop everything below a prefix at once, and leave the bytes to later deletes.

        Where the index has to be waited for, that happens in the background.
        """

        def remove(answer: tuple[list[Victim], Rest | None]) -> Rest | None:
            victims, rest = answer
            if victims:
                self._backend.remove_later(victims)
            return rest

        def drain(_: object) -> None:
            self._repeat_later(remove, Index.drain_prefix, prefix, START)
            self._repeat_later(lambda rest: rest, Index.drain_absences, prefix, START)

        self._handle.call_later(drain, Index.invalidate, prefix, begins)

    def _repeat_later(
        self,
        then: Callable[[Any], Rest | None],
        step: Callable[[Index, str, Rest], Any],
        prefix: str,
        at: Rest,
    ) -> None:
        """Take a step until nothing is left; `then` gets each answer, and returns where to go on."""
        here, is_running, goes_on = threading.get_ident(), True, True

        def take(answer: Any) -> None:
            nonlocal goes_on, at
            rest = then(answer)
            if rest is None:
                return
            at = rest
            if is_running and threading.get_ident() == here:
                goes_on = True  # In the loop below: there may be many.
            else:
                self._repeat_later(then, step, prefix, at)

        while goes_on:
            goes_on = False
            self._handle.call_later(take, step, prefix, at)
        is_running = False
