"""The circuit breaker of a cache store: count failures, log once, leave it alone, try again."""

from __future__ import annotations

import errno
import logging
import threading
import time
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("zcache")

Operation: TypeAlias = Literal["read", "write", "delete", "list"]

FAILURES_TO_OPEN: Final = 5
"""Failures in a row that open the breaker. A time-out opens it at once."""
FIRST_PAUSE: Final = 1.0
"""Seconds that the cache store is then left alone; twice as long after each further failure."""
LONGEST_PAUSE: Final = 60.0
QUIET: Final = 60.0
"""Seconds after a warning in which no other follows."""

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
        errno.EXDEV,
        errno.ENOTEMPTY,
    }
)

_LONGEST_PART: Final = 255
"""Bytes of one part of a path in most file systems."""
_LONGEST_PATH: Final = 1024
"""Bytes of a whole key that some object stores take at most."""


def concerns_key(error: BaseException) -> bool:
    """Whether an error means that the store cannot hold this one key."""
    if isinstance(error, OSError):
        return error.errno in _KEY_ERRORS
    return isinstance(error, (UnicodeError, ValueError))


def is_name_too_long(name: str, *errors: BaseException) -> bool:
    """Whether a store can hold no value of this name: the errors say so, and its length agrees."""
    says = all(isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG for error in errors)
    sizes = [len(part.encode(errors="replace")) for part in name.split("/")]
    return says and (max(sizes) > _LONGEST_PART or sum(sizes) > _LONGEST_PATH)


class _Failures:
    """Failures of one kind of operation since it last succeeded."""

    __slots__ = ("in_a_row", "open_until", "pause", "timed_out")

    def __init__(self) -> None:
        self.in_a_row = 0
        self.timed_out = False
        self.pause = FIRST_PAUSE
        self.open_until = 0.0

    @property
    def is_open(self) -> bool:
        return self.timed_out or self.in_a_row >= FAILURES_TO_OPEN

    def begin_pause(self, now: float) -> None:
        """Begin the next pause if the last one has ended."""
        if now >= self.open_until:
            self.open_until = now + self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)


class CircuitBreaker:
    """Lets operations through to the cache store, or not.

    Reads, writes, deletes and listings each have a pause of their own: a full disk is still good to
    read from, and a delete that succeeds does not show it.

    Parameters
    ----------
    name : str
        Of the cache store, for the log.
    clock : callable
        Seconds; what pauses are counted by.
    show : callable
        The text of an error for the log. Default is `repr`.

    Attributes
    ----------
    failures : int
        Operations of the cache store that raised or did not answer in time.
    reads_fail : bool
        Whether the last read failed, other than because of its key.
    failing : dict
        Operations that have failed since they last succeeded. If it is empty, everything is allowed.
    """

    def __init__(
        self,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        show: Callable[[BaseException], str] = repr,
    ) -> None:
        self._name = name
        self._show = show
        self.clock = clock
        # Held while counting only. Reentrant: inside it the garbage collector may end a reader, and with
        # that an operation.
        self._lock = threading.RLock()
        self.failing: dict[Operation, _Failures] = {}
        self._warned = False
        self._quiet_until = 0.0
        self.failures = 0
        self.reads_fail = False

    def allows(self, operation: Operation = "read") -> bool:
        """Whether the cache store may be used now. After a pause one failure opens the breaker again."""
        failures = self.failing.get(operation)
        return failures is None or not failures.is_open or self.clock() >= failures.open_until

    def patience(self, operation: Operation, seconds: float) -> float:
        """How long to wait for an operation that goes on without its caller: `seconds`, or 0 where none was answered lately.

        Then a pause begins, and the end of that operation says whether it is the last one.
        """
        failures = self.failing.get(operation)
        if failures is None or not failures.timed_out:
            return seconds
        now = self.clock()
        with self._lock:
            failures.begin_pause(now)
        return 0.0

    def succeeded(self, operation: Operation = "read") -> None:
        """Note an operation that succeeded."""
        if operation not in self.failing:
            return
        with self._lock:
            failures = self.failing.pop(operation, None)
            recovered = self._warned and not any(f.is_open for f in list(self.failing.values()))
            recovered = recovered and failures is not None and failures.is_open
            if recovered:
                self._warned = False
            if operation == "read":
                self.reads_fail = False
        if recovered:
            logger.info("the cache store %s works again", self._name)

    def failed(self, error: BaseException, operation: Operation = "read") -> None:
        """Note an operation that raised, or did not answer in time (`TimeoutError`)."""
        now = self.clock()
        # However often: other keys may fare better.
        is_of_key = operation != "list" and concerns_key(error)
        with self._lock:
            self.failures += 1
            warn = not is_of_key and self._count(error, operation, now)
        if is_of_key:
            logger.debug("the cache store %s cannot hold a key: %s", self._name, self._show(error))
        if warn:
            logger.warning(
                "the cache store %s failed: %s. The source serves all reads; the cache is used again "
                "when it works.",
                self._name,
                # As text: a log record is kept for long by some, and with it the frames of an exception.
                self._show(error),
            )

    def _count(self, error: BaseException, operation: Operation, now: float) -> bool:
        """Count a failure, and say whether the log is to hear of it. To be called under the lock."""
        failures = self.failing.setdefault(operation, _Failures())
        failures.in_a_row += 1
        failures.timed_out |= isinstance(error, TimeoutError)
        self.reads_fail |= operation == "read"
        # What was under way when the pause began, and fails now, is no news.
        if failures.is_open:
            failures.begin_pause(now)
        if self._warned or now < self._quiet_until:
            return False
        self._warned = True
        self._quiet_until = now + QUIET
        return True

    def after_fork(self) -> None:
        """Start over in a forked child, to which nothing has failed yet; the count goes on."""
        self._lock = threading.RLock()
        self.failing = {}
        self._warned = self.reads_fail = False
        self._quiet_until = 0.0
