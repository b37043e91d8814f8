"""What the reads and writes of one store came to. Copies of a store share its counters."""

from __future__ import annotations

import threading
from typing import Literal

from zcache._core import ReadCounters


class Counters:
    """What happened to the reads of one cache, and to the values that it did not take.

    A forked child counts on from what its parent had counted.

    Attributes
    ----------
    reads : ReadCounters
        Hits, misses and negative hits, which the index counts itself where it answers at once.
    bypassed : int
        Reads of keys that are never cached.
    damaged : int
        Hits for which the bytes were gone, of another length, or against their checksum.
    stale : int
        Hits that were too old, in place of what the source did not give.
    skipped : int
        Reads and writes for which the cache store was left alone, because it kept failing or another
        process kept the lock of its index; and fills that were cut off with their event loop.
    """

    def __init__(self) -> None:
        self.reads = ReadCounters()
        self.bypassed = 0
        self.damaged = 0
        self.skipped = 0
        self.stale = 0
        # `+=` alone loses some without the GIL. Reentrant: inside it the garbage collector may end a read.
        self._lock = threading.RLock()

    def count(self, what: Literal["bypassed", "damaged", "skipped", "stale"], by: int = 1) -> None:
        """Count one more, or so many."""
        with self._lock:
            setattr(self, what, getattr(self, what) + by)

    def after_fork(self) -> None:
        """Start with a lock of our own."""
        self._lock = threading.RLock()
