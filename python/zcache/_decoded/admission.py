"""Whether a chunk that no one has read before is worth its room."""

from __future__ import annotations

import contextlib
from typing import Final

EVICTIONS: Final = 64
"""Chunks that must have been evicted for nothing, at least, unless they are large."""
LARGE: Final = 2**24
"""Bytes of few chunks that are enough."""
SHARE: Final = 32
"""One in so many chunks that are read for the first time is kept while nothing is read again."""


class Admission:
    """Keeps a pass over everything from paying for what is never read again.

    Once a quarter of `max_size`, and `EVICTIONS` chunks or `LARGE` bytes, have been evicted since the last hit, a chunk
    is kept when it is read for the second time, and one in `SHARE` at once, until there is a hit. As many names are
    remembered as chunks are kept. Threads may call it at once: what they miscount does not matter.

    Parameters
    ----------
    max_size : int
        Bytes that the cache holds at most.
    """

    def __init__(self, max_size: int) -> None:
        self._enough = max_size // 4
        self._bytes = self._chunks = self._turn = 0
        self._refused: dict[str, None] = {}

    def hit(self) -> None:
        """Say that a chunk was of use."""
        self._bytes = self._chunks = 0
        if self._refused:
            self._refused.clear()

    def evicted(self, size: int) -> None:
        """Say that a chunk of so many bytes had to go."""
        self._bytes += size
        self._chunks += 1

    def admits(self, name: str, kept: int) -> bool:
        """Whether this chunk is kept beside so many others."""
        is_little = self._chunks < EVICTIONS and self._bytes < LARGE
        if is_little or self._bytes < self._enough:
            return True
        self._turn = (self._turn + 1) % SHARE
        refused = self._refused
        if self._turn == 0 or name in refused:
            refused.pop(name, None)
            return True
        refused[name] = None
        # Another thread may be at it.
        with contextlib.suppress(RuntimeError, StopIteration):
            while len(refused) > max(EVICTIONS, kept):
                refused.pop(next(iter(refused)), None)
        return False
