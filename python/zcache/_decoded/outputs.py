"""Memory of large outputs, used again once no one has it.

zarr makes the output of a read in the thread of its event loop. Where the allocator gives that back to the system with
each output, the pages of the next one cost ten times as much as the copies into it. So large outputs that no one else can
know yet get memory that earlier ones have left, or huge pages.
"""

from __future__ import annotations

import mmap
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from zarr.core.buffer import cpu

from zcache._decoded.buffers import HUGE, mapped
from zcache._decoded.layout import is_tiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zcache._decoded.layout import Array

LARGEST: Final = 2**26
"""Bytes of unused memory that are kept at most."""


class Outputs:
    """Memory for the outputs of reads.

    Parameters
    ----------
    limit : int
        Bytes that are kept at most while no one uses them.
    """

    def __init__(self, limit: int) -> None:
        self._limit = min(limit, LARGEST)
        # No one waits for it: inside it the garbage collector may end an output, and a forked child may inherit it.
        self._lock = threading.Lock()
        self._free: dict[int, deque[mmap.mmap]] = {}
        self._size = 0

    def renew(self, out: Any, batch: Iterable[Any]) -> Array:
        """The array of an output, which may be replaced by one in other memory first.

        That is done to a large array that only `out` has, if the batch that is read into it takes the place of all that it
        holds. So zarr's own are; a user who passes an output has its array as well, or finds the new one in `out`.
        """
        is_large = out._data.nbytes >= HUGE <= self._limit
        if is_large and _counts_exactly() and _references(out) == _ALONE:
            array: Array = out._data
            if (
                array.base is None
                and array.flags.forc
                and not array.dtype.hasobject
                and is_tiled(array.shape, [item[3] for item in batch])
            ):
                out._data = self._array(array)
        found: Array = out._data
        return found

    def _array(self, like: Array) -> Array:
        size = -(-like.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = self._take(size)
        if memory is None:
            try:
                memory = mapped(size)
            except OSError:  # There may only be so many.
                return like
        # All arrays that come of it have this one as their base: numpy goes on to the base of a base only where
        # that is an array as well.
        root: Any = np.frombuffer(memory, "u1", count=like.nbytes)
        order: Any = "C" if like.flags.c_contiguous else "F"
        weakref.finalize(root, self._give_back, memory).atexit = False
        array: Array = root.view(like.dtype).reshape(like.shape, order=order)
        return array

    def clear(self) -> None:
        """Give the memory that no output has back to the system."""
        if self._lock.acquire(blocking=False):
            try:
                self._free.clear()
                self._size = 0
            finally:
                self._lock.release()

    def _take(self, size: int) -> mmap.mmap | None:
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return self._pop(size) if size in self._free else None
        finally:
            self._lock.release()

    def _give_back(self, memory: mmap.mmap) -> None:
        size = len(memory)
        if size > self._limit // 2 or not self._lock.acquire(blocking=False):
            return
        try:
            while self._size + size > self._limit:
                # The largest first: it makes room for many.
                self._pop(max(self._free))
            self._free.setdefault(size, deque()).append(memory)
            self._size += size
        finally:
            self._lock.release()

    def _pop(self, size: int) -> mmap.mmap:
        free = self._free[size]
        self._size -= size
        memory = free.pop()
        if not free:
            del self._free[size]
        return memory


def _references(out: Any) -> int:
    return sys.getrefcount(out._data)


def _counts_exactly() -> bool:
    """Whether references are counted in one place: not where threads run without the global lock."""
    is_locked: Callable[[], bool] | None = getattr(sys, "_is_gil_enabled", None)
    return is_locked is None or is_locked()


_ALONE: Final = _references(cpu.NDBuffer.empty((1,), "u1"))
"""References to the array of an output that no one else has."""
