"""Unfinished files of a cache directory, below ``.zcache/tmp/``, and who may remove them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST_WRITE: Final = 3600.0
"""Seconds after which a file of a process without a slot counts as left behind."""


class TemporaryFiles:
    """The folder of unfinished files. Their names begin with the slot of their participant (``p3-``).

    Parameters
    ----------
    reserved : str
        The folder ``.zcache``.
    index_root : str
        The folder of the index, where each participant locks its slot.
    """

    def __init__(self, reserved: str, index_root: str) -> None:
        self.path = os.path.join(reserved, "tmp")
        self._index_root = index_root

    def sweep(self, own: int | None = None) -> None:
        """Remove what participants that are gone have left behind.

        `own` is the slot of this process: who had it before is gone.
        """
        if os.path.islink(self.path):
            return
        by_slot: dict[str, list[str]] = {}
        for name in os.listdir(self.path):
            by_slot.setdefault(name.partition("-")[0], []).append(os.path.join(self.path, name))
        for slot, paths in by_slot.items():
            if slot == "own":
                _remove_old(paths)
            elif slot == f"p{own}":
                _remove(paths)
            else:
                with self._if_free(slot) as free:
                    if free:
                        _remove(paths)

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
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(file)


def _remove(paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _remove_old(paths: list[str]) -> None:
    """Remove those that are too old to be written still: without an index nothing tells who lives."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ctime < time.time() - _LONGEST_WRITE:
                os.unlink(path)
