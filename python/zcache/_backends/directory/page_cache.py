"""Reading a file on the spot, without a suspension, where its pages are in the page cache.

Such a hit costs a few microseconds; a thread or a second coroutine would cost more than the read. So
these reads never wait: where they would have to, they return None, and a thread reads.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import weakref
from typing import TYPE_CHECKING, Final

import numpy as np

from zcache._byte_ranges import is_encodable
from zcache._core import open_cached
from zcache._runtime.buffers import to_buffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.core.buffer import Buffer, BufferPrototype

LARGEST: Final = 4 * 2**20
"""Bytes that are read on the spot in one turn of an event loop: more would hold it up for long."""
TURNS: Final = 64
"""Turns of the event loop that a read waits for one that is not full."""
COUNTED: Final = 2**16
"""Bytes from which on a read counts towards that by itself, and smaller ones together: to count takes as
long as to read a page."""


def is_supported() -> bool:
    """Whether this system can read without waiting."""
    return hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")


class _Turn(threading.local):
    """What was read in this turn of the event loop that runs in a thread."""

    def __init__(self) -> None:
        self._loop: Callable[[], asyncio.AbstractEventLoop | None] = lambda: None
        self._read = 0
        self._full = False
        self._cold: Callable[[], asyncio.AbstractEventLoop | None] | None = None

    @property
    def is_full(self) -> bool:
        """Whether something was too much for this turn."""
        return self._full and self._loop() is asyncio._get_running_loop()

    def is_over(self, size: int) -> bool:
        """Whether so many bytes more are too many for this turn."""
        loop = asyncio._get_running_loop()
        if loop is None or self._loop() is not loop:
            return False  # A thread that may block, or nothing was read yet.
        return self._full or self._read + size > LARGEST

    def begins(self, size: int) -> bool:
        """Count so many bytes, unless they are too many for this turn."""
        loop = asyncio._get_running_loop()
        if loop is None:
            return True  # A thread that may block.
        if self._loop() is not loop:
            self._loop, self._read, self._full = weakref.ref(loop), 0, False
        read = self._read
        if read + size > LARGEST:
            self._full = True
            return False
        if read == 0:
            loop.call_soon(self._end)
        self._read = read + size
        return True

    def was_cold(self) -> None:
        """Something was not in the page cache: even to ask costs time, for the kernel begins to read."""
        loop = asyncio._get_running_loop()
        if loop is not None:  # A thread may ask as often as it likes.
            self._cold = weakref.ref(loop)
            loop.call_soon(self._end)

    @property
    def is_cold(self) -> bool:
        """Whether something was not in the page cache in this turn."""
        if self._cold is None:
            return False
        loop = asyncio._get_running_loop()
        return loop is not None and self._cold() is loop

    def _end(self) -> None:
        self._read = 0
        self._full = False
        self._cold = None


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
    """Reads files whose pages are in memory already; only the kernel knows which."""

    def __init__(self, root: str) -> None:
        self._root = root + os.sep
        self._works = True
        self._turn = _Turn()
        self._small = 0
        self._open = _open if is_encodable(root) else _open_waiting

    def __call__(
        self, name: str, prototype: BufferPrototype, total: int, start: int, size: int, /
    ) -> Buffer | None:
        if size > LARGEST or size == 0 or not self._works or not self._begins(size):
            return None
        # One byte more than there should be: a value that has grown is not the one of the entry.
        at_end = start + size == total
        array = np.empty(size + at_end, "u1")
        try:
            file = self._open(self._root + name)
            try:
                count = os.preadv(file, (array.data,), start, os.RWF_NOWAIT)
                if not at_end and os.fstat(file).st_size != total:
                    return None
            finally:
                os.close(file)
        except BlockingIOError:
            self._turn.was_cold()
            return None
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                # Not on this file system.
                self._works = False
            return None
        except ValueError:
            return None
        return to_buffer(array[:size], prototype) if count == size else None

    def _begins(self, size: int) -> bool:
        """Count a read, unless it is too much for this turn, or may have to wait as others had to."""
        turn = self._turn
        if turn.is_cold:
            return False
        if size >= COUNTED:
            return turn.begins(size)
        if turn.is_full:
            return False
        # Of several threads some may go uncounted.
        small = self._small = self._small + size
        if small < COUNTED:
            return True
        self._small = 0
        return turn.begins(small)

    async def turn(self, size: int) -> bool:
        """Wait for a turn of the event loop in which so many bytes may be read.

        Returns
        -------
        bool
            False where that was not why they were not read in this one.
        """
        if size > LARGEST or not self._turn.is_over(size):
            return False
        for _ in range(TURNS):
            await asyncio.sleep(0)
            if not self._turn.is_over(size):
                return True
        return False  # Others are always first: a thread reads it at once.
