"""Files of values in a cache directory: how they are read, and which of them are zcache's.

The core writes them (`rust/disk/value_file.rs`): each to a file of its own below ``.zcache/tmp/``, which
is then linked to its name, so that half a value is never seen, and a name that exists is never
overwritten. The modification time is the time of the fetch in milliseconds, and below that a
signature. So a scan of the directory tells what zcache wrote, and when. Until the index has committed a
value its file has another signature (pending).

Copies, archives and ``touch`` change that time. So there are two more proofs: a note in an extended
attribute, where the file system has those and the copy keeps them, and the index itself, which knows size
and CRC32C of each value. What is not proved to be zcache's is never removed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import unicodedata
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from zcache._backends.directory.temporary import is_unfinished
from zcache._backends.tombstones import RANGES
from zcache._byte_ranges import is_encodable
from zcache._core import (
    PENDING,
    SIGNATURE,
    file_holds,
    file_owner,
    open_folder,
    open_value,
    read_record,
    remove_empty_folder,
    remove_files,
    sign_file,
)
from zcache._runtime.buffers import to_buffer
from zcache._source.folders import identity as identity  # noqa: PLC0414 - one of the tools for files here

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from zarr.core.buffer import Buffer, BufferPrototype

logger = logging.getLogger("zcache")

_MILLI: Final = 1_000_000
_PART: Final = 2**20
"""Bytes that are read at once where a copy is made of them."""
_BLOCK: Final = 512
"""Bytes of a block in ``st_blocks``, whatever the file system has."""
_OWN_FOLDERS: Final = (".zcache", ".zcache/tmp", ".zcache/dropped", ".zcache/missing")
"""Folders of zcache's own that count, whatever they hold."""
_UNKNOWN_SOURCE: Final = bytes(8)
_NOTHING_THERE: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ELOOP, errno.EXDEV}
)
"""What a file system says of a name that leads to no file of the directory."""
TOLERATED: Final = frozenset(
    {"lost+found", "Thumbs.db", "desktop.ini", "System Volume Information", "$RECYCLE.BIN"}
)
"""Names that systems and file managers put into a directory on their own, ..."""
_TOLERATED_BEGINNINGS: Final = (
    *(
        ".DS_Store",
        "._",
        ".nfs",
        ".Trash",
        ".snapshot",
        ".fuse_hidden",
        ".Spotlight-",
        ".fseventsd",
    ),
    *(".directory", ".smbdelete", ".__afs", ".TemporaryItems", ".apdisk", ".lustre", ".zfs"),
)
"""... and how such names begin."""


def is_tolerated(name: str) -> bool:
    """Whether a system or a file manager puts such a name into a directory on its own."""
    return name in TOLERATED or name.startswith(_TOLERATED_BEGINNINGS)


def make_folders(path: str) -> None:
    """Make a folder of the user's and those above it, however deep: `os.makedirs` calls itself for each.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    missing, there = [path], ""
    while missing:
        try:
            os.mkdir(missing[-1])
        except FileNotFoundError:
            above = os.path.dirname(missing[-1])
            # One that is there may take none all the same, as that of the processes.
            if above in (missing[-1], there):
                raise
            missing.append(above)
            continue
        except FileExistsError:
            # `os.path.isdir` would not tell why it cannot be looked at.
            if not stat.S_ISDIR(os.stat(missing[-1]).st_mode):
                raise
        except OSError:
            # As of a volume that is read-only.
            if not os.path.isdir(missing[-1]):
                raise
        there = missing.pop()


def owner(path: str) -> Literal["ours", "pending", "foreign"]:
    """The owner of a file: zcache's, zcache's but never committed, or of another program.

    Raises
    ------
    OSError
        If there is none, or the file system refuses.
    """
    return file_owner(path)


def is_signed(status: os.stat_result) -> bool:
    """Whether the time of a file says that zcache wrote it."""
    return status.st_mtime_ns % _MILLI == SIGNATURE


def sign(root: str, name: str, status: os.stat_result) -> None:
    """Take a file over as zcache's, and keep its modification time to the millisecond."""
    sign_file(root, name, max(0, status.st_mtime_ns // _MILLI))


def remove_value(root: str, name: str) -> None:
    """Remove the value of this name, if it is zcache's, and the folders above it that are empty then.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    (error,) = remove_files(root, [name])
    if error is not None:
        raise error


def remove_empty_folders(root: str) -> None:
    """Remove the folders in a cache directory that hold nothing but empty folders."""
    for above in ("", RANGES):
        with contextlib.suppress(OSError), listed(root, above.rstrip("/")) as entries:
            inside = list(entries)
            for entry in inside:
                # Such as .zcache itself; others are the system's.
                is_hidden = entry.name.startswith(".") and not is_unfinished(entry.name)
                if is_hidden or entry.name in TOLERATED:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    remove_empty_folder(root, above + entry.name)


@contextlib.contextmanager
def listed(root: str, name: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    """What is in a folder of a cache directory; a link or a mount leads nowhere."""
    folder = open_folder(root, name)
    try:
        with os.scandir(folder) as entries:
            yield entries
    finally:
        os.close(folder)


def fold(name: str) -> str:
    """The one of all names that differ in case or normal form that stands for them."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def folds_names(folder: str) -> bool:
    """Whether names that differ in case are one file where this folder is.

    Nothing is made to find out, for nothing would remove it after a crash.
    """
    above, name = os.path.split(folder)
    return os.path.lexists(os.path.join(above, name.swapcase()))


def _read_at(file: int, into: memoryview, start: int) -> int:
    try:
        return os.preadv(file, (into,), start)
    except OSError as error:
        # Some sandboxes refuse new system calls.
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    part = os.pread(file, min(len(into), _PART), start)
    into[: len(part)] = part
    return len(part)


def count_folders(root: str, values: Iterable[str]) -> int:
    """Bytes of the folders that hold values of these names, and of what else zcache keeps in a cache directory.

    Other folders are others'. The files of the index count as nothing: they are kept beside the bound.
    """
    counted = {"", *_OWN_FOLDERS}
    for value in values:
        above = os.path.dirname(value)
        while above not in counted:
            counted.add(above)
            above = os.path.dirname(above)
    with contextlib.suppress(OSError), listed(root, ".zcache") as entries:
        counted.update(
            f".zcache/{entry.name}" for entry in entries if not entry.is_dir(follow_symlinks=False)
        )
    total = 0
    for name in counted:
        with contextlib.suppress(OSError):
            total += os.lstat(os.path.join(root, name)).st_blocks * _BLOCK
    return total


def block_size(folder: str) -> int:
    """Bytes of a block: what a file of one byte takes, with the record beside it.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    size = 0
    with contextlib.suppress(OSError, AttributeError):
        # Without a name, for nothing would remove it after a crash.
        file = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, b"1")
            # 0 where the file system has not made up its mind.
            size = os.fstat(file).st_blocks * _BLOCK
        finally:
            os.close(file)
    return size or os.statvfs(folder).f_frsize


def read_value(
    root: str, name: str, prototype: BufferPrototype, total: int, start: int, size: int
) -> Buffer | None:
    """Read `size` bytes from `start` on of the value of this name; None if it is no file of `total` bytes.

    Raises
    ------
    OSError
        If the file system refuses.
    """
    try:
        file = open_value(root, name)
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size != total:
            return None
        array = np.empty(size, "u1")
        done = 0
        while done < size:
            count = _read_at(file, array.data[done:], start + done)
            if not count:
                return None
            done += count
    finally:
        os.close(file)
    return to_buffer(array, prototype)


class Finder:
    """Finds the values that zcache wrote in a cache directory.

    Parameters
    ----------
    root : str
        The directory.
    source : bytes
        Short name of the source.

    Attributes
    ----------
    strict : bool
        Whether only values count of which is noted that they are those of the source.
    only_looks : bool
        Whether nothing is removed or signed.
    formerly : callable
        Fetch time, size and CRC32C of a value that an earlier index has listed, by its name: a proof where
        a copy of the directory has lost the others.
    foreign : int
        How many files it has come by that zcache did not write.
    """

    def __init__(self, root: str, source: bytes) -> None:
        self._root = root
        self._source = source
        self.strict = self.only_looks = False
        self.formerly: Callable[[str], tuple[int, int, int] | None] = _unknown
        self.foreign = 0

    def find(self, below: str | None = None) -> Iterator[tuple[int, int, str]]:
        """Find values, and remove what was never valid or is another source's.

        Parameters
        ----------
        below : str, optional
            Name of the one folder to look into, with a slash at its end. Default is all.

        Yields
        ------
        tuple of int, int, str
            Fetch time in milliseconds since 1970, size in bytes, and name in the cache store.
        """
        self.foreign = 0
        todo = ["", RANGES] if below is None else [below]
        while todo:
            prefix = todo.pop()
            try:
                with listed(self._root, prefix.rstrip("/")) as entries:
                    for entry in entries:
                        name = prefix + entry.name
                        if entry.is_dir(follow_symlinks=False):
                            if name != ".zcache":
                                todo.append(f"{name}/")
                        elif (found := self._examine(entry, name)) is not None:
                            yield (*found, name)
            except OSError as error:
                if error.errno not in _NOTHING_THERE and not isinstance(error, PermissionError):
                    raise

    def _examine(self, entry: os.DirEntry[str], name: str) -> tuple[int, int] | None:
        """Fetch time and size of a file, if it is a value of the source's."""
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        # No key has a name that is no text, whatever else may seem to prove it.
        if not stat.S_ISREG(status.st_mode) or not is_encodable(name):
            self.foreign += not is_tolerated(entry.name)
            return None
        path = os.path.join(self._root, name)
        fetched, signature = divmod(status.st_mtime_ns, _MILLI)
        size = status.st_size
        if signature == SIGNATURE:
            if self.strict and not self._is_of_source(path):
                self._remove(name)
                return None
            return fetched, size
        if signature == PENDING:
            self._remove(name)
            return None
        note = read_record(path)
        if note is not None and note[0] == size and note[4] in (self._source, _UNKNOWN_SOURCE):
            if not note[2] or (self.strict and note[4] != self._source):
                self._remove(name)
                return None
            return self._signed(name, note[3], size)
        former = self.formerly(name)
        if former is not None and former[1] == size and _holds(path, *former[1:]):
            return self._signed(name, former[0], size)
        self.foreign += not is_tolerated(entry.name)
        return None

    def _is_of_source(self, path: str) -> bool:
        note = read_record(path)
        return note is not None and note[4] == self._source

    def _signed(self, name: str, fetched: int, size: int) -> tuple[int, int]:
        # On a volume that takes nothing it is proved anew each time.
        if not self.only_looks:
            with contextlib.suppress(OSError):
                sign_file(self._root, name, fetched)
        return fetched, size

    def _remove(self, name: str) -> None:
        if self.only_looks:
            return
        try:
            remove_value(self._root, name)
        except OSError as error:
            # Of no use, but not in the way either until its key is written.
            logger.debug("the file %s of %s cannot be removed: %r", name, self._root, error)


def _unknown(name: str) -> None:  # noqa: ARG001
    return None


def _holds(path: str, size: int, checksum: int) -> bool:
    try:
        return file_holds(path, size, checksum)
    except OSError:
        return False
