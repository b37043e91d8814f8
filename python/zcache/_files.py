"""Files of values in a cache directory: written whole or not at all, and known as ours.

A value is written to a file of its own below ``.zcache/tmp/`` and then linked to its name, so nobody
ever sees half of it, and a name that exists already is never overwritten. Its modification time is
the time of the fetch in milliseconds, and below that a signature. So a walk of the directory tells
what zcache wrote, and when; and nothing without the signature is ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNATURE: Final = 271_828
"""Nanoseconds below the millisecond of each file that zcache wrote."""

_MILLI: Final = 1_000_000
_NO_LINKS: Final = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}
)
_numbers = itertools.count()


def fetch_time(seconds: float) -> int:
    """Nanoseconds that a file gets which was fetched at this time (seconds since 1970)."""
    return int(seconds * 1000) * _MILLI + SIGNATURE


def is_ours(status: os.stat_result) -> bool:
    """Whether zcache wrote this file."""
    return stat.S_ISREG(status.st_mode) and status.st_mtime_ns % _MILLI == SIGNATURE


def sign(path: str, status: os.stat_result) -> None:
    """Take a file over as ours, and keep its modification time to the millisecond."""
    time = status.st_mtime_ns // _MILLI * _MILLI + SIGNATURE
    os.utime(path, ns=(time, time), follow_symlinks=False)


def write_new(path: str, data: bytes, tmp: str, seconds: float) -> None:
    """Write a file that is not there yet.

    Parameters
    ----------
    path : str
        Its name; missing directories are made.
    data : bytes
        Its contents.
    tmp : str
        Beginning of the names of unfinished files, in a directory of the same file system.
    seconds : float
        Time of the fetch, in seconds since 1970.

    Raises
    ------
    FileExistsError
        If there is a file of this name that zcache did not write. It stays as it is.
    OSError
        If the file system refuses. Nothing is left behind.
    """
    unfinished = f"{tmp}{next(_numbers)}"
    file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
            time = fetch_time(seconds)
            os.utime(file, ns=(time, time))
        finally:
            os.close(file)
        _publish(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # Renamed, for want of links.
            os.unlink(unfinished)


def _publish(unfinished: str, path: str) -> None:
    for _ in range(8):
        try:
            os.link(unfinished, path)
            return
        except FileNotFoundError:
            # Somebody may remove empty directories meanwhile, hence the loop.
            os.makedirs(os.path.dirname(path), exist_ok=True)
        except FileExistsError:
            if not remove(path):
                raise
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(path):
                raise
            os.rename(unfinished, path)
            return
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)


def remove(path: str) -> bool:
    """Remove a file, if it is ours. False if there is one that is not; it stays.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    try:
        status = os.lstat(path)
        if not is_ours(status):
            return False
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    return True


def walk(root: str) -> Iterator[tuple[int, int, str]]:
    """Find all values that zcache wrote below `root`.

    Yields
    ------
    tuple of int, int, str
        Fetch time in milliseconds since 1970, size in bytes, and name in the cache store.
    """
    reserved = os.path.join(root, ".zcache")
    todo = [(root, ""), (os.path.join(reserved, "ranges"), ".zcache/ranges/")]
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
                if is_ours(status):
                    yield status.st_mtime_ns // _MILLI, status.st_size, prefix + entry.name
