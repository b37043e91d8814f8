"""Reading a hit on the spot, without a suspension, where the bytes are at hand.

A hit in memory, or on a local disk whose pages are in the page cache, costs a few microseconds; a
thread or a second coroutine would cost more than the read. So these readers never wait: where they
would have to, they return None and the ordinary way is taken.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import weakref
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from zarr.storage import LocalStore, MemoryStore

from zcache._buffers import array_of, to_buffer
from zcache._core import open_cached
from zcache._spans import is_encodable

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer, BufferPrototype

LARGEST: Final = 4 * 2**20
"""Bytes that are read on the spot in one turn of an event loop: more would hold it up for long."""
TURNS: Final = 64
"""Turns of the event loop that a read waits for one that is not full."""
COUNTED: Final = 2**16
"""Bytes from which on a read counts towards that by itself, and smaller ones together: to count takes as
long as to read a page."""


class QuickReader(Protocol):
    """Reads `size` bytes from `start` on of the value `name`, which has `total` bytes, or nothing."""

    def __call__(
        self, name: str, prototype: BufferPrototype, total: int, start: int, size: int, /
    ) -> Buffer | None: ...


def quick_reader(store: Store) -> QuickReader | None:
    """A reader for this cache store, if there is one."""
    if type(store) is MemoryStore:
        return _memory_reader(store)
    if type(store) is LocalStore and hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT"):
        return FileReader(os.path.abspath(store.root))
    return None


def _memory_reader(store: MemoryStore) -> QuickReader:
    values = store._store_dict

    def read(
        name: str, prototype: BufferPrototype, total: int, start: int, size: int, /
    ) -> Buffer | None:
        value = values.get(name)
        if value is None:
            return None
        try:
            array = array_of(value)
        except AttributeError:
            return None  # Somebody else has put it there.
        # What somebody else has put there may be in memory that its readers could write to.
        if array.size != total or array.flags.writeable:
            return None
        # Of the array itself its reader could change the shape, for all others as well.
        part = array.view() if size == total else array[start : start + size]
        return to_buffer(part, prototype)

    return read


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
        """Take note of so many bytes, unless they are too many for this turn."""
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
        """Something was not at hand: even to ask for it costs time, for the kernel begins to read."""
        loop = asyncio._get_running_loop()
        if loop is not None:  # A thread may ask as often as it likes.
            self._cold = weakref.ref(loop)
            loop.call_soon(self._end)

    @property
    def is_cold(self) -> bool:
        """Whether something was not at hand in this turn."""
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
    return _open_anyhow(path)


def _open_anyhow(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class FileReader:
    """Reads files whose pages are in memory already; only the kernel knows which."""

    def __init__(self, root: str) -> None:
        self._root = root + os.sep
        self._works = True
        self._turn = _Turn()
        self._small = 0
        self._open = _open if is_encodable(root) else _open_anyhow

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
        """Take note of a read, unless it is too much for this turn, or may have to wait as others had."""
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

    async def has_its_turn(self, size: int) -> bool:
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
        return False  # Others are always first: in a thread it is read at once.
