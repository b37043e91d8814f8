"""Values that are too old, in place of what a source does not give because it raises an error."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Literal

from zcache._backends.base import ABSENT
from zcache._core import Index, is_cacheable_key
from zcache._runtime.fork import at_fork
from zcache._source.missing import says_missing
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._byte_ranges import ByteRange
    from zcache._protocol.hits import Hits
    from zcache._runtime.io import IO

logger = logging.getLogger("zcache")

QUIET: Final = 60.0
"""Seconds in which it is said once that a source fails."""


class StaleValues:
    """What the cache still has of values that the source was to be asked for again.

    Parameters
    ----------
    hits : Hits
        What one cache holds.
    seconds : float
        Past its age, for which a value is served; 0 for never.
    source_name : str
        For the log.
    """

    def __init__(self, hits: Hits, seconds: float, source_name: str) -> None:
        self._hits = hits
        self._seconds = seconds
        self._source_name = source_name
        self._said = -math.inf

    def __bool__(self) -> bool:
        return self._seconds > 0

    async def or_stale(
        self,
        work: Awaitable[Buffer | None],
        io: IO,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRange | None,
    ) -> Buffer | None:
        """What `work` reads from the source; a stale value where that raises, if there is one."""
        try:
            return await work
        except Exception as error:
            is_answer, value = await self.instead_of(error, io, key, prototype, byte_range)
            if not is_answer:
                raise
            return value

    async def instead_of(
        self,
        error: Exception,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRange | None,
    ) -> tuple[bool, Buffer | None]:
        """Whether there is a stale value in place of this error of the source, and the value.

        That is None for a key that was missing. The read was counted as a miss; with a value it is a hit.
        """
        if not self._may_replace(error, key):
            return False, None
        hits = self._hits
        found = await self._ask(io, Index.lookup, key, byte_range)
        if found is None:
            return False, None
        if found is ABSENT:
            hits.recount_as_negative_hit(key, byte_range)
            self.note(error)
            return True, None
        # What could not be read is counted as a miss again.
        hits.recount_as_hit()
        value = await hits.serve_found(io, key, prototype, found)
        if value is not None:
            hits.brought(key, byte_range, len(value), hit=True)
            self.note(error)
        return value is not None, value

    async def size(self, error: Exception, io: IO, key: str) -> int | Literal[False] | None:
        """Bytes of a stale value that is cached as a whole, or `ABSENT`, in place of this error of the source."""
        if not self._may_replace(error, key):
            return None
        size: int | Literal[False] | None = await self._ask(io, Index.peek, key, None)
        if size is not None:
            self.note(error)
        return size

    def is_about(self, error: Exception) -> bool:
        """Whether something else may take the place of this error of the source."""
        return bool(self) and not _says_missing(error)

    def _may_replace(self, error: Exception, key: str) -> bool:
        return self.is_about(error) and self._hits.breaker.allows() and is_cacheable_key(key)

    def _max_age(self, key: str) -> float | None:
        return self._longer(self._hits.ages.of(key))

    def _longer(self, age: float | None) -> float | None:
        return None if age is None or self._seconds == math.inf else age + self._seconds

    async def _ask(self, io: IO, step: Any, key: str, byte_range: ByteRange | None) -> Any:
        hits = self._hits
        own, node = hits.missing_ages(key)
        # An age of 0 says that nothing is fresh; who remembers no absence has none to be stale.
        own = own + self._seconds if hits.missing_max_age else 0.0
        asked = (key, byte_range, hits.now(), self._max_age(key), (own, self._longer(node)))
        try:
            return await hits.handle.call(io, step, *asked)
        except IndexLockTimeout:
            return None

    def note(self, error: Exception) -> None:
        """Count that something took the place of this error of the source, and say so now and then."""
        self._hits.counters.count("stale")
        now = time.monotonic()
        with _lock:
            is_known = now - self._said < QUIET
            if not is_known:
                self._said = now
        if not is_known:
            # Not the error itself: it may show what no one is to see.
            seconds = self._seconds
            logger.warning(
                "the source %s raised %s: values that are older than max_age_seconds are served in its place, %s "
                "(stale_if_error). This is said once a minute.",
                self._source_name,
                type(error).__name__,
                "of any age" if seconds == math.inf else f"up to {seconds:g} s past their age",
            )


# Guards the time of the last word; never held while anything waits.
_lock = threading.RLock()


def _after_fork() -> None:
    """Start with a lock of our own: the thread that held the parent's may not exist here."""
    global _lock
    _lock = threading.RLock()


at_fork(_after_fork)


def _says_missing(error: BaseException) -> bool:
    """Whether an error is the answer that there is no such key."""
    if isinstance(error, BaseExceptionGroup):
        return all(_says_missing(one) for one in error.exceptions)
    return isinstance(error, KeyError) or says_missing(error)
