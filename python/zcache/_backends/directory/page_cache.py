"""Reading a file on the spot, without a suspension, where its pages are in the page cache.

Such a hit costs a few microseconds; a thread or a second coroutine would cost more than the read. So
these reads never wait: where they would have to, they return None, and a thread reads.
"""

from __future__ import annotations

import errno
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from zcache._byte_ranges import is_encodable
from zcache._core import open_cached, read_resident, tells_residency
from zcache._runtime.buffers import to_buffer
from zcache._runtime.turns import ReadTurns

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._backends.base import TryRead

    _Read: TypeAlias = "Callable[[PageCacheReader, str, Any, int, int, int], int]"

LARGEST: Final = 4 * 2**20
"""Bytes of the largest value that is read on the spot."""
A_TURN: Final = 16 * 2**20
"""Bytes that are read on the spot in one turn of an event loop: more would hold it up for long."""
TURNS: Final = 16
"""Turns of the event loop that large reads may be behind; more are read by threads."""
COUNTED: Final = 2**18
"""Bytes from which on a read counts towards that by itself, and smaller ones together: to count takes as
long as to read a page."""
LEAST: Final = 2**15
"""Bytes that each read counts for at least: to open and close a file takes as long as to read these."""
SLOW: Final = 0.01
"""Seconds that a read may take which should not have to wait, ..."""
PAUSE: Final = 100
"""... and how many times as long threads read after one that took longer, ..."""
LONGEST_PAUSE: Final = 60.0
"""... in seconds at most."""

_UNKNOWN_FLAG: Final = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def is_supported() -> bool:
    """Whether this system can read without waiting."""
    return hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")


def _open(path: str) -> int:
    try:
        return open_cached(path)
    except OSError as error:
        # Systems before Linux 5.12, and those that hide this call.
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
            raise
    return _open_waiting(path)


def _open_waiting(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)


class PageCacheReader:
    """Reads files that have all pages in memory already; only the kernel knows which.

    Most file systems read without waiting, or not at all (``RWF_NOWAIT``). Of tmpfs and overlayfs, which
    cannot, the kernel is asked before whether all pages are in memory. Should a read wait all the same, for
    more than `SLOW` seconds, threads read for a hundred times as long, at most a minute.

    Parameters
    ----------
    root : str
        The cache directory.
    clock : callable
        Seconds; what such pauses are counted by. Default is `time.monotonic`.
    """

    def __init__(self, root: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root + os.sep
        self._turn = ReadTurns(A_TURN)
        self._small = 0
        self._open = _open if is_encodable(root) else _open_waiting
        self._clock = clock
        # How a file is read; None where that may wait. Not bound: a reader that held itself would keep the directory
        # in use until the garbage collector comes.
        self._read: _Read | None = PageCacheReader._read_nowait
        # When it may be read on the spot again; None for never.
        self._resumes: float | None = None

    def __call__(
        self,
        name: str,
        prototype: BufferPrototype,
        total: int,
        start: int,
        size: int,
        /,
        *,
        counted: bool = False,
    ) -> Buffer | None:
        """See `Backend.try_read`; `counted` says that the bytes count for this turn already."""
        if size > LARGEST or size == 0 or not (counted or self._begins(size)):
            return None
        read = self._read or self._resume()
        if read is None:
            return None
        # One byte more than there should be: a value that has grown is not the one of the entry.
        array = np.empty(size + (start + size == total), "u1")
        try:
            count = read(self, self._root + name, array, total, start, size)
        except BlockingIOError:
            self._turn.note_cold()
            return None
        except (OSError, ValueError):
            return None
        return to_buffer(array[:size], prototype) if count == size else None

    def _read_nowait(self, path: str, array: Any, total: int, start: int, size: int) -> int:
        """Read into `array`, and return how many bytes that were; 0 where they are not as expected."""
        file = self._open(path)
        try:
            count = os.preadv(file, (array.data,), start, os.RWF_NOWAIT)
            if len(array) == size and os.fstat(file).st_size != total:
                return 0
            return count
        except OSError as error:
            if error.errno not in _UNKNOWN_FLAG:
                raise
            # Not on this file system: asked once.
            self._read = PageCacheReader._read_resident if tells_residency(file) else None
        finally:
            os.close(file)
        return 0 if self._read is None else self._read(self, path, array, total, start, size)

    def _read_resident(self, path: str, array: Any, total: int, start: int, size: int) -> int:
        """The same for file systems without ``RWF_NOWAIT``."""
        waited = read_resident(path, array, total, start, size)
        if waited is None:
            return 0
        if waited > SLOW:
            self._read = None
            self._resumes = self._clock() + min(waited * PAUSE, LONGEST_PAUSE)
        return size

    def _resume(self) -> _Read | None:
        """Read on the spot again once the pause after a slow read is over."""
        if self._resumes is not None and self._clock() >= self._resumes:
            self._resumes, self._read = None, PageCacheReader._read_resident
        return self._read

    def _begins(self, size: int) -> bool:
        """Count a read, unless it is too much for this turn, or may have to wait as others had to."""
        turn = self._turn
        if turn.is_closed or (self._read is None and self._resume() is None):
            return False
        if size >= COUNTED:
            return turn.begins(size)
        # Of several threads some may go uncounted.
        small = self._small = self._small + (max(LEAST, size))
        if small < COUNTED:
            return True
        self._small = 0
        return turn.begins(small)

    @property
    def is_turn_full(self) -> bool:
        """See `Backend.is_turn_full`."""
        turn = self._turn
        return self._read is not None and turn.is_full and not turn.is_cold

    async def turn(self, size: int) -> TryRead | None:
        """Wait for a turn of the event loop in which so many bytes may be read, after those before.

        Returns
        -------
        callable or None
            Reads on the spot, at once; None where that would have to wait as others had to in this turn.
        """
        turn, counted = self._turn, max(size, LEAST)
        if size > LARGEST or self._read is None or turn.is_cold:
            return None
        # Another turn than the one in which it did not fit, perhaps.
        if not turn.is_over(counted) and turn.begins(counted):
            return partial(self, counted=True)
        # A large value is read by a thread rather than very late. To have a small one read so takes
        # longer than to read it.
        if size >= COUNTED and turn.queued > TURNS * A_TURN:
            return None
        await turn.wait(counted)
        return partial(self, counted=True)
