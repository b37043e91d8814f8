"""Reading a hit on the spot, without a suspension, where the bytes are at hand.

A hit in memory, or on a local disk whose pages are in the page cache, costs a few microseconds; a
thread or a second coroutine would cost more than the read. So these readers never wait: where they
would have to, they return None and the ordinary way is taken.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from zarr.core.buffer import cpu
from zarr.storage import LocalStore, MemoryStore

if TYPE_CHECKING:
    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer, BufferPrototype

LARGEST: Final = 4 * 2**20
"""Bytes up to which a file is read on the spot: more would hold up the event loop for milliseconds."""


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
        return _FileReader(os.path.abspath(store.root))
    return None


def _memory_reader(store: MemoryStore) -> QuickReader:
    values = store._store_dict

    def read(
        name: str, prototype: BufferPrototype, total: int, start: int, size: int, /
    ) -> Buffer | None:
        value = values.get(name)
        if value is None or len(value) != total:
            return None
        if size != total:
            value = value[start : start + size]
        return prototype.buffer.from_buffer(value)

    return read


class _FileReader:
    """Reads files whose pages are in memory already; only the kernel knows which."""

    def __init__(self, root: str) -> None:
        self._root = root + os.sep
        self._works = True

    def __call__(
        self, name: str, prototype: BufferPrototype, total: int, start: int, size: int, /
    ) -> Buffer | None:
        if size > LARGEST or size == 0 or not self._works:
            return None
        # One byte more than there should be: a value that has grown is not the one of the entry.
        at_end = start + size == total
        array = np.empty(size + at_end, "u1")
        try:
            file = os.open(self._root + name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                count = os.preadv(file, (array.data,), start, os.RWF_NOWAIT)
                if not at_end and os.fstat(file).st_size != total:
                    return None
            finally:
                os.close(file)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                # Not on this file system.
                self._works = False
            return None
        except ValueError:
            return None
        return _to_buffer(prototype, array[:size]) if count == size else None


def _to_buffer(prototype: BufferPrototype, array: Any) -> Buffer:
    if issubclass(prototype.buffer, cpu.Buffer):
        return prototype.buffer.from_array_like(array)
    return prototype.buffer.from_bytes(array.tobytes())
