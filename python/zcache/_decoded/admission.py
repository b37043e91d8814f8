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
"""Chunks of which it is known at most that the store had none when they were last read, ..."""
PER_ABSENT: Final = 2**12
"""... and bytes of the bound for each of them: it takes 130, which are not counted."""


class Admission:
    """Keeps a pass over everything from paying for what is never read again.

    Once a 16th of `max_size`, and `EVICTIONS` chunks or `LARGE` bytes, have been evicted since the last hit, a chunk
    is kept when it is read for the second time, and one in `SHARE` at once, until there is a hit. As many names are
    remembered as chunks are kept, and at most twice as many: by their hashes, which are of one size however long the name
    is. Threads may call it at once: what they miscount, or take for another one, does not matter.

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
        self._refused: set[int] = set()
        self._earlier: set[int] = set()
        # Those that the store had not when they were last read: they take no room before they are there.
        self._absent: set[int] = set()
        self._most_absent = min(ABSENT, max(EVICTIONS, max_size // PER_ABSENT))

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
        if len(self._absent) + len(names) > self._most_absent:
            self._absent.clear()
        self._absent.update(map(hash, itertools.islice(names, self._most_absent)))

    def note_present(self, name: str) -> None:
        """Say that the store has such a chunk."""
        if self._absent:
            self._absent.discard(hash(name))

    def forget_absent(self) -> None:
        """Say that any chunk may be there."""
        self._absent.clear()

    def is_absent(self, name: str) -> bool:
        """Whether the store had no such chunk when it was last read."""
        return bool(self._absent) and hash(name) in self._absent

    def divide(self, names: list[str]) -> tuple[list[str], list[str]]:
        """Those that the store had not when they were last read, and the others."""
        absent = self._absent
        early = [name for name in names if hash(name) in absent] if absent else []
        return early, [name for name in names if hash(name) not in absent] if early else names

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
            short = hash(name)
            if turn >= SHARE or short in refused or short in earlier:
                turn %= SHARE
                refused.discard(short)
                earlier.discard(short)
                admitted.append(name)
                continue
            if len(refused) >= limit:
                self._earlier = earlier = refused
                self._refused = refused = set()
            refused.add(short)
        self._turn = turn
        return admitted
