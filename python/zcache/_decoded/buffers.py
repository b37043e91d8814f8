"""Memory of decoded chunks, used again for the next ones.

What codecs give lies in the memory of whichever thread decoded it. If that were kept, the allocator would hold a multiple of
what is kept for these threads. So chunks are copied, into memory that is given back to the system when it is not needed.
"""

from __future__ import annotations

import mmap
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from zcache._decoded.layout import Array

MAPPED: Final = 2**17
"""Bytes from which on memory is mapped by itself."""


class Buffers:
    """Memory that is not in use now. To be called under a lock."""

    def __init__(self) -> None:
        self._free: dict[int, deque[Array]] = {}
        self._size = 0

    def take(self, size: int, limit: int) -> Array:
        """Memory of this size, after which at most `limit` bytes stay unused."""
        found = self._free.get(size)
        if not found:
            self._trim(limit)
            return _new(size)
        self._size -= size
        return found.pop()

    def give_back(self, memory: Array, limit: int) -> None:
        """Keep memory that is not read any more, if at most `limit` bytes are unused then."""
        size = memory.nbytes
        self._free.setdefault(size, deque()).append(memory)
        self._size += size
        self._trim(limit)

    def _trim(self, limit: int) -> None:
        # The largest first: they are the likelier to be of a size that is not wanted any more.
        while self._size > limit:
            size = max(self._free)
            if self._free[size]:
                self._free[size].popleft()
                self._size -= size
            else:
                del self._free[size]


def copy_into(memory: Array, array: Array) -> Array:
    """A copy of an array in memory of its size, which cannot be written to."""
    is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    copy = memory.view(array.dtype).reshape(array.shape, order="F" if is_fortran else "C")
    copy[...] = array
    copy.flags.writeable = False
    return copy


def _new(size: int) -> Array:
    if size >= MAPPED:
        try:
            return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), "u1")
        except OSError:  # There may only be so many.
            pass
    return np.empty(size, "u1")
