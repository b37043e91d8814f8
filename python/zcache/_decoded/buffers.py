"""Memory of decoded chunks, used again for the next ones.

What codecs give lies in the memory of whichever thread decoded it. If that were kept, the allocator would hold a multiple of
what is kept for these threads. So chunks are copied, into memory that is given back to the system when it is not needed.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

if TYPE_CHECKING:
    from zcache._decoded.layout import Array

Memory = TypeVar("Memory", bound=mmap.mmap)

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
        # The one that pieces come from now, and how much of it is theirs.
        self._slab: _Slab | None = None
        self._array: Array = np.empty(0, "u1")
        self._used = 0

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

    def clear(self) -> None:
        """Give all memory that is not in use back to the system."""
        self._trim(0)
        if self._slab is not None:
            self._slab.release(self._used, self._slab_size - self._used)
            self._slab, self._array = None, np.empty(0, "u1")

    def _new(self, size: int) -> Array:
        if size < LEAST or not self._slab_size:
            return np.empty(size, "u1")
        step = -(-size // ALIGNMENT) * ALIGNMENT
        try:
            if step > self._slab_size // 2:
                return np.frombuffer(mapped(size), "u1")[:]
            slab = self._slab
            if slab is None or self._used + step > self._slab_size:
                if slab is not None:
                    # Huge pages bring more of it than was asked for.
                    slab.release(self._used, self._slab_size - self._used)
                slab = _slab(self._slab_size)
                self._slab, self._used = slab, 0
                self._array = np.frombuffer(slab, "u1")[:]
        except OSError:  # There may only be so many.
            return np.empty(size, "u1")
        start, self._used = self._used, self._used + step
        slab.count(start, size, 1)
        return self._array[start : start + size]


def copy_into(memory: Array, array: Array) -> Array:
    """A copy of an array in memory of its size, which cannot be written to."""
    flags = array.flags
    order: Any = "F" if flags.f_contiguous and not flags.c_contiguous else "C"
    copy: Array = np.ndarray(array.shape, array.dtype, memory, order=order)
    copy[...] = array
    copy.setflags(write=False)
    return copy


def mapped(size: int, kind: type[Memory] = mmap.mmap) -> Memory:  # type: ignore[assignment]
    """New memory, in huge pages where the system has them."""
    memory = kind(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class _Slab(mmap.mmap):
    """Memory that is mapped at once, for many pieces.

    A page goes back to the system once no piece that lies in it is left: the rest may be in use for long.
    """

    # By page: how many begin there, and how many end there. The pages between these two are of one piece.
    ends: bytearray
    address: int

    def count(self, start: int, size: int, change: int) -> None:
        """Note a piece, or that it is gone."""
        self.ends[start // mmap.PAGESIZE] += change
        self.ends[(start + size - 1) // mmap.PAGESIZE] += change

    def release(self, start: int, size: int) -> None:
        """Give these bytes, in which no piece lies, back to the system, but for pages in which others lie."""
        first, last = start // mmap.PAGESIZE, (start + size - 1) // mmap.PAGESIZE
        if size and self.ends[first]:
            first += 1
        if first <= last and self.ends[last]:
            last -= 1
        if first <= last:
            length = (last - first + 1) * mmap.PAGESIZE
            self.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, length)


def _slab(size: int) -> _Slab:
    slab = mapped(size, _Slab)
    slab.ends = bytearray(-(-size // mmap.PAGESIZE))
    slab.address = np.frombuffer(slab, "u1").__array_interface__["data"][0]
    return slab


def _release(piece: Array) -> None:
    """Give a piece of a slab back to the system; what is no such piece is its owner's."""
    base: Any = piece.base
    slab = None if base is None else base.base
    slab = getattr(slab, "obj", slab)
    if isinstance(slab, _Slab):
        start = piece.__array_interface__["data"][0] - slab.address
        slab.count(start, piece.nbytes, -1)
        slab.release(start, piece.nbytes)
