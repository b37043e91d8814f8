"""What to do about a cache store that fails: count, say so once, leave it alone, try again."""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import Final, Literal, TypeAlias

logger = logging.getLogger("zcache")

Operation: TypeAlias = Literal["read", "write", "delete", "list"]

FAILURES_TO_OPEN: Final = 5
"""Failures in a row after which the cache store is left alone."""
KEY_FAILURES_TO_OPEN: Final = 50
"""The same for errors that concern one key: where no key at all goes through, it is the store."""
FIRST_PAUSE: Final = 1.0
"""Seconds that it is then left alone; twice as long after each further failure."""
LONGEST_PAUSE: Final = 60.0
QUIET: Final = 60.0
"""Seconds after a warning in which none follows: a disk that is full now and then says so once."""

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

_LONGEST: Final = 255
"""Bytes of a part of a path in most file systems, ..."""
_LONGEST_PATH: Final = 1024
"""... and of a whole one, wherever it begins: no more than some stores of objects take, too."""


def concerns_key(error: BaseException) -> bool:
    """Whether an error means that the store cannot hold this one key."""
    if isinstance(error, OSError):
        return error.errno in _KEY_ERRORS
    return isinstance(error, (UnicodeError, ValueError))


def is_too_long(name: str, *errors: BaseException) -> bool:
    """Whether a store can have nothing of this name: so the errors say, and so it looks."""
    says = all(isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG for error in errors)
    sizes = [len(part.encode(errors="replace")) for part in name.split("/")]
    return says and (max(sizes) > _LONGEST or sum(sizes) > _LONGEST_PATH)


class _Kind:
    """How one sort of operation fares."""

    __slots__ = ("closed_from", "in_a_row", "keys_in_a_row", "pause")

    def __init__(self) -> None:
        self.in_a_row = 0
        self.keys_in_a_row = 0
        self.pause = FIRST_PAUSE
        self.closed_from = 0.0

    @property
    def failing(self) -> bool:
        return self.in_a_row >= FAILURES_TO_OPEN or self.keys_in_a_row >= KEY_FAILURES_TO_OPEN


class Breaker:
    """Lets traffic to the cache store through, or not.

    Reads, writes, deletes and the listing each have a pause of their own: a disk that is full is
    still good to read from, and a delete that works says nothing about it.

    Attributes
    ----------
    failures : int
        Operations of the cache store that raised.
    skipped : int
        Times that the cache store was left alone because it kept failing.
    in_trouble : bool
        Whether the last read raised, not only because of its key.
    kinds : dict
        Operations that have raised since they last went through: where there are none, everything
        is allowed.
    """

    def __init__(self, store: object) -> None:
        self._store = store
        # Held for no longer than it takes to count; reentrant, for inside it the garbage collector
        # may end a reader, and with it an operation.
        self._lock = threading.RLock()
        self.kinds: dict[Operation, _Kind] = {}
        self._warned = False
        self._quiet_until = 0.0
        self.failures = 0
        self.skipped = 0
        self.in_trouble = False

    def allows(self, operation: Operation = "read") -> bool:
        """Whether the cache store may be used now. After a pause one failure opens it again."""
        kind = self.kinds.get(operation)
        if kind is None or not kind.failing or time.monotonic() >= kind.closed_from:
            return True
        with self._lock:
            self.skipped += 1
        return False

    def succeeded(self, operation: Operation = "read") -> None:
        """An operation went through."""
        if operation not in self.kinds:
            return
        with self._lock:
            kind = self.kinds.pop(operation, None)
            again = self._warned and not any(kind.failing for kind in list(self.kinds.values()))
            again = again and kind is not None and kind.failing
            if again:
                self._warned = False
            if operation == "read":
                self.in_trouble = False
        if again:
            logger.info("the cache store %s works again", self._store)

    def failed(self, error: BaseException, operation: Operation = "read") -> None:
        """An operation raised."""
        with self._lock:
            self.failures += 1
            kind = self.kinds.setdefault(operation, _Kind())
            if about_key := operation != "list" and concerns_key(error):
                kind.keys_in_a_row += 1
            else:
                kind.in_a_row += 1
                self.in_trouble |= operation == "read"
            now = time.monotonic()
            # What was under way when the pause began, and fails now, says nothing new.
            if kind.failing and now >= kind.closed_from:
                kind.closed_from = now + kind.pause
                kind.pause = min(2 * kind.pause, LONGEST_PAUSE)
            warn = not self._warned and (kind.failing or not about_key)
            warn = warn and now >= self._quiet_until
            if warn:
                self._warned = True
                self._quiet_until = now + QUIET
        if warn:
            logger.warning(
                "the cache store %s failed: %r. Reads are served by the source; the cache is used "
                "again when it works.",
                self._store,
                error,
            )
        elif about_key:
            logger.debug("the cache store %s cannot hold a key: %r", self._store, error)
