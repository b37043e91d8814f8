"""Unfinished files of a cache directory, below ``.zcache/tmp/``, and unfinished folders; and who may remove them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from typing import TYPE_CHECKING, Final

from zcache._core import open_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNFINISHED: Final = re.compile(r"\.zcache-[0-9a-f]{16}")
"""Names of folders that have not got theirs yet (`rust/shared/own.rs`)."""
_LONGEST_WRITE: Final = 3600.0
"""Seconds after which a file of a process without a slot counts as left behind."""


class TemporaryFiles:
    """The folder of unfinished files. Their names begin with the slot of their participant (``s3-``).

    Parameters
    ----------
    reserved : str
        The folder ``.zcache``.
    index_root : str
        The folder of the index, where each participant locks its slot.
    """

    def __init__(self, reserved: str, index_root: str) -> None:
        self._reserved = reserved
        self.path = os.path.join(reserved, "tmp")
        self._index_root = index_root

    def sweep(self, own: int | None = None) -> None:
        """Remove what participants that are gone have left behind.

        `own` is the slot of this process: who had it before is gone.
        """
        try:
            folder = open_folder(os.path.dirname(self._reserved), ".zcache/tmp")
        except OSError as error:
            # A link or a mount leads to others' files.
            if error.errno in (errno.ELOOP, errno.EXDEV):
                return
            raise
        try:
            self._sweep(folder, own)
        finally:
            os.close(folder)

    def _sweep(self, folder: int, own: int | None) -> None:
        by_slot: dict[str, list[str]] = {}
        for name in os.listdir(folder):
            by_slot.setdefault(name.partition("-")[0], []).append(name)
        for slot, names in by_slot.items():
            if slot == "own":
                _remove_old(folder, names)
            elif slot == f"s{own}":
                _remove(folder, names)
            else:
                with self._if_free(slot) as free:
                    if free:
                        _remove(folder, names)

    @contextlib.contextmanager
    def _if_free(self, slot: str) -> Iterator[bool]:
        """Whether no live process has this slot; it stays free meanwhile."""
        try:
            file = os.open(
                os.path.join(self._index_root, slot), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except OSError:
            yield False
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            try:
                yield True
            finally:
                # A child that was forked meanwhile has it as well.
                fcntl.flock(file, fcntl.LOCK_UN)
        finally:
            os.close(file)


def is_unfinished(name: str) -> bool:
    """Whether zcache gives such a name to a folder that it has just made."""
    return _UNFINISHED.fullmatch(name) is not None


def remove_unfinished_folders(root: str) -> None:
    """Remove the folders in ``.zcache`` that could neither be finished nor removed, as far as that is possible now.

    They never counted. A process that was about to finish one makes another.
    """
    with contextlib.suppress(OSError):
        folder = open_folder(root, ".zcache")
        try:
            for name in filter(is_unfinished, os.listdir(folder)):
                # One that is not empty is not unfinished.
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=folder)
        finally:
            os.close(folder)


def _remove(folder: int, names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def _remove_old(folder: int, names: list[str]) -> None:
    """Remove those that are too old to be written still: without an index nothing tells who lives."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if status.st_ctime < time.time() - _LONGEST_WRITE:
                os.unlink(name, dir_fd=folder)
