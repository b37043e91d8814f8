"""Whether a chunk that no one has read before is worth its room."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection

EVICTIONS: Final = 64
"""Chunks that must have been evicted for nothing, at least, unless they are large."""
LARGE: Final = 2**22
"""Bytes of few chunks that are enough."""
SHARE: Final = 32
"""One in so many chunks that are read for the first time is kept while nothing is read again."""

ABSENT: Final = 65_536
"""Chunks of which it is known at most that the store had none when they were last read."""


class Admission:
    """Keeps a pass over everything from paying for what is never read again.

    Once a 16th of `max_size`, and `EVICTIONS` chunks or `LARGE` bytes, have been evicted since the last hit, a chunk
    is kept when it is read for the second time, and one in `SHARE` at once, until there is a hit. As many names are
    remembered as chunks are kept, and at most twice as many. Threads may call it at once: what they miscount does not
    matter.

    Parameters
    ----------
    max_size : int
        Bytes that the cache holds at most.
    is_open : bool, optional
        Keep everything: the policy of eviction decides by itself, and has to see all that is read. Default is False.
    """

    def __init__(self, max_size: int, *, is_open: bool = False) -> None:
        self._is_always_open = is_open
        self._enough = max_size // 16
        self._bytes = self._chunks = self._turn = 0
        # The latest names, and those before them.
        self._refused: set[str] = set()
        self._earlier: set[str] = set()
        # Those that the store had not when they were last read: they take no room before they are there.
        self.absent: set[str] = set()

    def hit(self) -> None:
        """Say that a chunk was of use."""
        self._bytes = self._chunks = 0
        if self._refused or self._earlier:
            self._refused, self._earlier = set(), set()

    def evicted(self, size: int, chunks: int = 1) -> None:
        """Say that chunks of so many bytes had to go."""
        self._bytes += size
        self._chunks += chunks

    def note_absent(self, names: Collection[str]) -> None:
        """Say that the store has no such chunks."""
        if len(self.absent) + len(names) > ABSENT:
            self.absent.clear()
        self.absent.update(itertools.islice(names, ABSENT))

    @property
    def _is_open(self) -> bool:
        """Whether everything is kept."""
        is_little = self._chunks < EVICTIONS and self._bytes < LARGE
        return self._is_always_open or is_little or self._bytes < self._enough

    def admits(self, name: str, kept: int) -> bool:
        """Whether this chunk is kept beside so many others."""
        return bool(self.admitted([name], kept))

    def admitted(self, names: list[str], kept: int) -> list[str]:
        """Those of these chunks that are kept beside so many others."""
        if self._is_open:
            return names
        admitted = []
        refused, earlier = self._refused, self._earlier
        turn, limit = self._turn, max(EVICTIONS, kept)
        for name in names:
            turn += 1
            if turn >= SHARE or name in refused or name in earlier:
                turn %= SHARE
                refused.discard(name)
                earlier.discard(name)
                admitted.append(name)
                continue
            if len(refused) >= limit:
                self._earlier = earlier = refused
                self._refused = refused = set()
            refused.add(name)
        self._turn = turn
        return admitted
