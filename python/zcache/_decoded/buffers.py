"""Memory of decoded chunks, used again for the next ones.

What codecs give lies in the memory of whichever thread decoded it. If that were kept, the allocator would hold a multiple of
what is kept for these threads. So chunks are copied, into memory that is given back to the system when it is not needed.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from zcache._decoded.layout import Array

HUGE: Final = 2**21
"""Bytes of a huge page. Memory comes in these where the system has them: to touch a page for the first time costs more than
to copy into it."""
LEAST: Final = 2**10
"""Bytes below which memory is the allocator's."""
SLAB: Final = 2**25
"""Bytes at most that are mapped at once, for many pieces."""
ALIGNMENT: Final = 64
"""Bytes of a line of the processor's caches."""


class Buffers:
    """Memory that is not in use now. To be called under a lock.

    Parameters
    ----------
    max_size : int
        Bytes that are in use at most. Beside them the system fills in a huge page of what is mapped ahead.
    """

    def __init__(self, max_size: int) -> None:
        self._free: dict[int, deque[Array]] = {}
        self._size = 0
        self._slab_size = 0
        if max_size >= 8 * HUGE:
            self._slab_size = max(4 * HUGE, min(SLAB, max_size // 16 // HUGE * HUGE))
        self._slab: Array | None = None

    def take(self, size: int, limit: int) -> Array:
        """Memory of this size, after which at most `limit` bytes stay unused."""
        found = self._free.get(size)
        if not found:
            self._trim(limit)
            return self._new(size)
        self._size -= size
        return found.pop()

    def give_back(self, memory: Array, limit: int) -> None:
        """Keep memory that is not read any more, if at most `limit` bytes are unused then."""
        size = memory.nbytes
        self._free.setdefault(size, deque()).append(memory)
        self._size += size
        if self._size > limit:
            self._trim(limit)

    def _trim(self, limit: int) -> None:
        # The largest first: they are the likelier to be of a size that is not wanted any more.
        while self._size > limit:
            size = max(self._free)
            if self._free[size]:
                _release(self._free[size].popleft())
                self._size -= size
            else:
                del self._free[size]

    def _new(self, size: int) -> Array:
        if size < LEAST or not self._slab_size:
            return np.empty(size, "u1")
        step = -(-size // ALIGNMENT) * ALIGNMENT
        try:
            if step > self._slab_size // 2:
                return np.frombuffer(mapped(size), "u1")[:]
            if self._slab is None or len(self._slab) < step:
                if self._slab is not None:
                    _release(self._slab)
                self._slab = np.frombuffer(mapped(self._slab_size), "u1")[:]
        except OSError:  # There may only be so many.
            return np.empty(size, "u1")
        piece, self._slab = self._slab[:size], self._slab[step:]
        return piece


def copy_into(memory: Array, array: Array) -> Array:
    """A copy of an array in memory of its size, which cannot be written to."""
    flags = array.flags
    order: Any = "F" if flags.f_contiguous and not flags.c_contiguous else "C"
    copy: Array = np.ndarray(array.shape, array.dtype, memory, order=order)
    copy[...] = array
    copy.setflags(write=False)
    return copy


def mapped(size: int) -> mmap.mmap:
    """New memory, in huge pages where the system has them."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _release(piece: Array) -> None:
    """Give pages of a slab back to the system: the rest of it may be in use for long."""
    slab: Any = piece.base
    memory = None if slab is None else slab.base
    memory = getattr(memory, "obj", memory)
    if not isinstance(memory, mmap.mmap):
        return
    first, last = (array.__array_interface__["data"][0] for array in (slab, piece))
    start = -(-(last - first) // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (last - first + piece.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        memory.madvise(mmap.MADV_DONTNEED, start, stop - start)
