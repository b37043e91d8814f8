"""The keys of which something is cached, a batch at a time."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Self

from zcache._byte_ranges import is_encodable
from zcache._core import Index
from zcache._runtime.turns import turns

if TYPE_CHECKING:
    from zcache._ages import MaxAges
    from zcache._core import Ages
    from zcache._index.shared import SharedIndex
    from zcache._runtime.io import IO


class CachedKeys:
    """An iterator over keys, for ``for`` and for ``async for``.

    Parameters
    ----------
    shared : SharedIndex
        The index.
    ages : MaxAges
        How old a value may be that is served.
    io : IO
        How to wait for it in an event loop.
    prefix : str
        A key or a directory; "" for everything.
    """

    def __init__(self, shared: SharedIndex, ages: MaxAges, io: IO, prefix: str) -> None:
        self._ages = ages
        self._handle = shared.handle
        self._clock = shared.clock
        self._io = io
        self._prefix = prefix
        self._keys: deque[str] = deque()
        self._cursor: tuple[int, int] | None = None
        # No key that is cached has lone surrogates.
        self._is_done = not is_encodable(prefix)

    def _args(self) -> tuple[str, float, float | None, Ages | None, tuple[int, int] | None]:
        ages = self._ages
        return self._prefix, self._clock(), ages.single, ages.patterns, self._cursor

    def _take(self, found: tuple[list[str], tuple[int, int] | None]) -> None:
        self._keys.extend(found[0])
        self._cursor = found[1]
        self._is_done = self._cursor is None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while not self._keys:
            if self._is_done:
                raise StopIteration
            self._take(self._handle.call_blocking(Index.next_keys, *self._args()))
        return self._keys.popleft()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._keys:
            if self._is_done:
                raise StopAsyncIteration
            # The index answers at once, as a rule: others would wait for all of it.
            if turns.are_over():
                await self._io.pause()
            self._take(await self._handle.call(self._io, Index.next_keys, *self._args()))
        return self._keys.popleft()
