"""What to do about a cache store that fails: count, say so once, leave it alone, try again."""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import Final

logger = logging.getLogger("zcache")

FAILURES_TO_OPEN: Final = 5
"""Failures in a row after which the cache store is left alone."""
FIRST_PAUSE: Final = 1.0
"""Seconds that it is then left alone; twice as long after each further failure."""
LONGEST_PAUSE: Final = 60.0

# Errors that say something about one key, not about the store: a name too long, a directory where a
# file should be, characters that a file system does not take.
_KEY_ERRORS: Final = frozenset(
    {
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.EINVAL,
        errno.EILSEQ,
        errno.ELOOP,
        errno.ENOTEMPTY,
    }
)


def concerns_key(error: BaseException) -> bool:
    """Whether an error means that the store cannot hold this one key."""
    if isinstance(error, OSError):
        return error.errno in _KEY_ERRORS
    return isinstance(error, (UnicodeError, ValueError))


class Breaker:
    """Lets traffic to the cache store through, or not.

    Attributes
    ----------
    failures : int
        Operations of the cache store that raised.
    skipped : int
        Times that the cache store was left alone because it kept failing.
    """

    def __init__(self, store: object) -> None:
        self._store = store
        # Held for no longer than it takes to count; reentrant, for inside it the garbage collector
        # may end a reader, and with it an operation.
        self._lock = threading.RLock()
        self._in_a_row = 0
        self._pause = FIRST_PAUSE
        self._closed_from = 0.0
        self._warned = False
        self.failures = 0
        self.skipped = 0

    @property
    def in_trouble(self) -> bool:
        """Whether the last operation raised."""
        return self._in_a_row > 0

    def allows(self) -> bool:
        """Whether the cache store may be used now. After a pause one failure opens it again."""
        if self._in_a_row < FAILURES_TO_OPEN or time.monotonic() >= self._closed_from:
            return True
        with self._lock:
            self.skipped += 1
        return False

    def succeeded(self) -> None:
        """An operation went through."""
        if self._in_a_row == 0:
            return
        with self._lock:
            again = self._in_a_row >= FAILURES_TO_OPEN
            if again:
                self._pause = FIRST_PAUSE
                self._warned = False
            self._in_a_row = 0
        if again:
            logger.info("the cache store %s works again", self._store)

    def failed(self, error: BaseException) -> None:
        """An operation raised."""
        if concerns_key(error):
            with self._lock:
                self.failures += 1
            logger.debug("the cache store %s cannot hold a key: %r", self._store, error)
            return
        with self._lock:
            self.failures += 1
            self._in_a_row += 1
            now = time.monotonic()
            # What was under way when the pause began, and fails now, says nothing new.
            if self._in_a_row >= FAILURES_TO_OPEN and now >= self._closed_from:
                self._closed_from = now + self._pause
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
            warn = not self._warned
            self._warned = True
        if warn:
            logger.warning(
                "the cache store %s failed: %r. Reads are served by the source; the cache is used "
                "again when it works.",
                self._store,
                error,
            )

    def after_fork(self) -> None:
        """Start with a lock of our own: a thread that stayed with the parent may hold the other."""
        self._lock = threading.RLock()
