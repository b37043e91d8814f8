"""Files of values in a cache directory: written whole or not at all, and known as ours.

A value is written to a file of its own below ``.zcache/tmp/`` and then linked to its name, so nobody
ever sees half of it, and a name that exists already is never overwritten. Its modification time is
the time of the fetch in milliseconds, and below that a signature. So a walk of the directory tells
what zcache wrote, and when; and nothing without the signature is ever removed.

Between the link and the step of the index that makes it valid a file has another signature: a write
may have overtaken it meanwhile, and if its process dies just then, nobody else would know.

Where the file system has extended attributes, length and checksum of the value are in one: an index
that was rebuilt then still finds what a loss of power has torn.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from typing import TYPE_CHECKING, Final

from zcache._core import (
    PENDING,
    SIGNATURE,
    create_file,
    leads_out,
    noted_file,
    publish_file,
    remove_file,
    remove_file_below,
    remove_pending,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zcache._core import NewFile

_MILLI: Final = 1_000_000
_numbers = itertools.count()


class UnknownValueError(FileExistsError):
    """A valid value is there of which the index knows nothing: it was emptied meanwhile, or is damaged."""


def is_ours(status: os.stat_result) -> bool:
    """Whether zcache wrote this file."""
    mark = status.st_mtime_ns % _MILLI
    return mark in (SIGNATURE, PENDING) and stat.S_ISREG(status.st_mode)


def is_pending(status: os.stat_result) -> bool:
    """Whether zcache wrote this file and never said that it is valid."""
    return status.st_mtime_ns % _MILLI == PENDING and stat.S_ISREG(status.st_mode)


def sign(path: str, status: os.stat_result) -> None:
    """Take a file over as ours, and keep its modification time to the millisecond."""
    time = status.st_mtime_ns // _MILLI * _MILLI + SIGNATURE
    os.utime(path, ns=(time, time), follow_symlinks=False)


def unfinished_name(tmp: str) -> str:
    """A name for a file that is not finished yet, after the beginning of such names."""
    return f"{tmp}{next(_numbers)}"


def pending_time(seconds: float) -> int:
    """Modification time of a file that is fetched then, in seconds since 1970, and not valid yet."""
    return int(seconds * 1000) * _MILLI + PENDING


def write_new(root: str, name: str, data: bytes, tmp: str, seconds: float) -> NewFile:
    """Write a file that is not there yet; it is pending until `seal` says otherwise.

    Parameters
    ----------
    root, name : str
        The cache directory and the name in it; missing directories are made.
    data : bytes
        Its contents.
    tmp : str
        Beginning of the names of unfinished files, in a directory of the same file system.
    seconds : float
        Time of the fetch, in seconds since 1970.

    Returns
    -------
    NewFile
        What tells the file from a later one of its name, to seal it by, and the CRC32C of what is in it.

    Raises
    ------
    FileExistsError
        If there is a file of this name that zcache did not write. It stays as it is.
    OSError
        If the file system refuses, or a link leads out of the directory. Nothing is left behind.
    """
    return _write(root, name, unfinished_name(tmp), data, pending_time(seconds))


def seal(root: str, name: str, file: NewFile) -> None:
    """Say of a new file that it is valid from now on, if it is still there."""
    file.seal(root, name)


def noted(path: str) -> tuple[int, int] | None:
    """Length and CRC32C that a file should have, where that is known."""
    return noted_file(path)


def _write(root: str, name: str, unfinished: str, data: bytes, time: int) -> NewFile:
    # In one call: whoever gives the GIL back may wait milliseconds until it is given again.
    try:
        return write_file(root, name, unfinished, data, time)
    except (FileNotFoundError, FileExistsError):
        # Somebody has tidied up, or a file is in the way.
        return write_in_steps(root, name, unfinished, data, time)


def write_in_steps(root: str, name: str, unfinished: str, data: bytes, time: int) -> NewFile:
    """Do the same where something has to be done about what is in the way."""
    if leads_out(root, name):
        # What lies there is not in the directory: no walk would find it.
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
    published = False
    try:
        file = _create(unfinished, data, time)
        _publish(unfinished, os.path.join(root, name))
        published = True
    finally:
        if not published:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)
    return file


def _create(unfinished: str, data: bytes, time: int) -> NewFile:
    try:
        return create_file(unfinished, data, time)
    except FileNotFoundError:
        # Somebody has tidied up.
        os.mkdir(os.path.dirname(unfinished))
        return create_file(unfinished, data, time)


def _publish(unfinished: str, path: str) -> None:
    try:
        publish_file(unfinished, path)
    except FileExistsError:
        if not remove_pending(path):
            if is_ours(os.lstat(path)):
                raise UnknownValueError(path) from None
            raise
        publish_file(unfinished, path)


def remove(path: str) -> bool:
    """Remove a file, if it is ours. False if there is one that is not; it stays.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    return remove_file(path)


def remove_below(root: str, name: str) -> None:
    """Remove the file of a value. What is there but is not ours stays, and does not count.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    remove_file_below(root, name)


def walk(
    root: str, pending: Callable[[str], object], below: str | None = None
) -> Iterator[tuple[int, int, str]]:
    """Find all values that zcache wrote below `root`.

    Those that were never committed are given to `pending`, by path. `below` is the name of the one
    directory to look into, with a slash at its end; default is all.

    Yields
    ------
    tuple of int, int, str
        Fetch time in milliseconds since 1970, size in bytes, and name in the cache store.
    """
    reserved = os.path.join(root, ".zcache")
    todo = [(root, ""), (os.path.join(reserved, "ranges"), ".zcache/ranges/")]
    if below is not None:
        todo = [] if leads_out(root, f"{below}*") else [(os.path.join(root, below), below)]
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
                milli, mark = divmod(status.st_mtime_ns, _MILLI)
                if mark == SIGNATURE and stat.S_ISREG(status.st_mode):
                    yield milli, status.st_size, prefix + entry.name
                elif is_pending(status):
                    pending(entry.path)
