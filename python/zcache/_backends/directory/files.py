"""Files of values in a cache directory: how they are read, and which of them are zcache's.

The core writes them (`rust/disk/value_file.rs`): each to a file of its own below ``.zcache/tmp/``, which
is then linked to its name, so that half a value is never seen, and a name that exists is never
overwritten. The modification time is the time of the fetch in milliseconds, and below that a
signature. So a scan of the directory tells what zcache wrote, and when; and nothing without the
signature is ever removed. Until the index has committed a value its file has another signature
(pending).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

import numpy as np

from zcache._core import PENDING, SIGNATURE, leads_outside, remove_file
from zcache._runtime.buffers import to_buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zarr.core.buffer import Buffer, BufferPrototype

_MILLI: Final = 1_000_000


def is_ours(status: os.stat_result) -> bool:
    """Whether zcache wrote this file."""
    signature = status.st_mtime_ns % _MILLI
    return signature in (SIGNATURE, PENDING) and stat.S_ISREG(status.st_mode)


def is_pending(status: os.stat_result) -> bool:
    """Whether zcache wrote this file and never committed it."""
    return status.st_mtime_ns % _MILLI == PENDING and stat.S_ISREG(status.st_mode)


def sign(path: str, status: os.stat_result) -> None:
    """Take a file over as zcache's, and keep its modification time to the millisecond."""
    time = status.st_mtime_ns // _MILLI * _MILLI + SIGNATURE
    os.utime(path, ns=(time, time), follow_symlinks=False)


def remove(path: str) -> bool:
    """Remove a file if it is zcache's. False if there is one that is not; it stays.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    return remove_file(path)


def read_value(
    path: str, prototype: BufferPrototype, total: int, start: int, size: int
) -> Buffer | None:
    """Read `size` bytes from `start` on of a regular file of `total` bytes; None if it is not that.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    try:
        # A pipe in its place must not block.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO):
            return None
        raise
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size != total:
            return None
        array = np.empty(size, "u1")
        done = 0
        while done < size:
            count = os.preadv(file, (array.data[done:],), start + done)
            if not count:
                return None
            done += count
    finally:
        os.close(file)
    return to_buffer(array, prototype)


def walk(
    root: str, pending: Callable[[str], object], below: str | None = None
) -> Iterator[tuple[int, int, str]]:
    """Find all values that zcache wrote below `root`.

    Parameters
    ----------
    root : str
        The cache directory.
    pending : callable
        Gets the paths of those that were never committed.
    below : str, optional
        Name of the one folder to look into, with a slash at its end. Default is all.

    Yields
    ------
    tuple of int, int, str
        Fetch time in milliseconds since 1970, size in bytes, and name in the cache store.
    """
    reserved = os.path.join(root, ".zcache")
    todo = [(root, ""), (os.path.join(reserved, "ranges"), ".zcache/ranges/")]
    if below is not None:
        todo = [] if leads_outside(root, f"{below}*") else [(os.path.join(root, below), below)]
    while todo:
        directory, prefix = todo.pop()
        try:
            entries = os.scandir(directory)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.path != reserved:
                        todo.append((entry.path, f"{prefix}{entry.name}/"))
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                milli, signature = divmod(status.st_mtime_ns, _MILLI)
                if signature == SIGNATURE and stat.S_ISREG(status.st_mode):
                    yield milli, status.st_size, prefix + entry.name
                elif is_pending(status):
                    pending(entry.path)
