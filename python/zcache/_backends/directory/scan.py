"""How an empty index is filled again: by a scan of the directory for files that zcache wrote."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from zcache._backends.directory import files
from zcache._backends.tombstones import DROPPED, buried, key_of, tombstone
from zcache._byte_ranges import is_encodable
from zcache._core import Index, is_cacheable_key, leads_outside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zcache._index.handle import IndexHandle

logger = logging.getLogger("zcache")

_BATCH: Final = 4096


class Scanner:
    """Finds the values in a cache directory, whether or not the index knows them.

    Parameters
    ----------
    root : str
        The directory.
    reserved : str
        The folder ``.zcache`` in it.
    """

    def __init__(self, root: str, reserved: str) -> None:
        self._root = root
        self._reserved = reserved
        # What was removed while a scan is on its way, which may have found it before.
        self._removed: list[str] = []
        self._scans = 0
        self._newest = 0

    def rebuild(self, handle_of_now: Callable[[], IndexHandle | None], why: str) -> None:
        """Fill an empty index.

        Parameters
        ----------
        handle_of_now : callable
            Gives the index to fill, or None once it is not wanted any more.
        why : str
            For the log.

        Raises
        ------
        OSError
            If the index cannot grow.
        """
        self._scans += 1
        self._newest += 1
        newest = self._newest
        try:
            self._rebuild(lambda: handle_of_now() if newest == self._newest else None, why)
        finally:
            self._scans -= 1

    def outdate(self) -> None:
        """Have scans that are on their way enter nothing more: the index is emptied."""
        self._newest += 1

    def _rebuild(self, handle_of_now: Callable[[], IndexHandle | None], why: str) -> None:
        found, stay = self._without_buried(self._cacheable())
        for start in range(0, len(found), _BATCH):
            batch = found[start : start + _BATCH]
            handle = handle_of_now()
            # Or it was emptied once more, and another process fills it.
            if handle is None or not handle.call_blocking(Index.adopt, batch, timeout=None):
                return
        if (handle := handle_of_now()) is None:
            return
        for name in stay:
            victims = handle.call_blocking(Index.drop_missing, key_of(name), timeout=None)
            cells = [cell for cell, _ in victims]
            handle.call_blocking(Index.confirm_deletes, [], cells, timeout=None)
        if found:
            # Before others may go on, so that this line comes before theirs.
            logger.warning(
                "the index of the cache directory %s was rebuilt (%s): %d values, %d bytes",
                self._root,
                why,
                len(found),
                sum(size for _, size, _ in found),
            )
        if (handle := handle_of_now()) is None:
            return
        handle.call_blocking(Index.finish_rebuild, timeout=None)
        while self._removed:
            self._drop_below(handle, self._removed.pop())

    def _cacheable(self) -> list[tuple[int, int, str]]:
        """All values that can be entries, by age; others of zcache's files are removed."""
        found = []
        for value in sorted(files.walk(self._root, _remove_quietly)):
            if is_encodable(value[2]) and is_cacheable_key(key_of(value[2])):
                found.append(value)
            else:
                _remove_quietly(self.path(value[2]))
        return found

    def _drop_below(self, handle: IndexHandle, prefix: str) -> None:
        while victims := handle.call_blocking(Index.drain_prefix, prefix, timeout=None):
            dropped, failed = [], []
            for cell, name in victims:
                try:
                    files.remove(self.path(name))
                    dropped.append(cell)
                except OSError:
                    failed.append(cell)
            handle.call_blocking(Index.confirm_deletes, dropped, failed, timeout=None)

    def path(self, name: str) -> str:
        """The file of a value."""
        return os.path.join(self._root, *name.split("/"))

    def remove_below(self, prefix: str) -> None:
        """Remove the files of a key and of all keys below it, whether the index knows them or not.

        Raises
        ------
        OSError
            If the file system refuses.
        """
        if self._scans:
            self._removed.append(prefix)
        if prefix:
            above, _, tail = prefix.rpartition("/")
            ranges = os.path.join(self._reserved, "ranges", *above.split("/"))
            try:
                names = os.listdir(ranges)
            except (FileNotFoundError, NotADirectoryError):
                names = []
            for name in names:
                if name.rpartition("@")[0] == tail:
                    files.remove(os.path.join(ranges, name))
            if not leads_outside(self._root, prefix):
                files.remove(self.path(prefix))
            prefix += "/"
        for below in (prefix, f".zcache/ranges/{prefix}"):
            for _, _, name in files.walk(self._root, files.remove, below):
                files.remove(self.path(name))

    def bury(self, names: Iterable[str]) -> None:
        """Leave tombstones for values that are not valid any more but could not be deleted."""
        for name in names:
            path = os.path.join(self._root, tombstone(name))
            # On a volume that takes nothing it cannot be told.
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                Path(path).touch()

    def _without_buried(
        self, found: list[tuple[int, int, str]]
    ) -> tuple[list[tuple[int, int, str]], list[str]]:
        """Delete what has a tombstone; returns what is left, and of that what is not valid."""
        where = os.path.join(self._root, DROPPED)
        try:
            tombstones = os.listdir(where)
        except OSError:
            return found, []
        dropped = set(buried(tombstones, (name for _, _, name in found)))
        stay = []
        for name in dropped:
            try:
                files.remove(self.path(name))
            except OSError:
                stay.append(name)
        kept = {tombstone(name).rpartition("/")[2] for name in stay}
        for name in tombstones:
            if name not in kept:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(where, name))
        gone = dropped.difference(stay)
        return [value for value in found if value[2] not in gone], stay


def _remove_quietly(path: str) -> None:
    try:
        files.remove(path)
    except OSError as error:
        # Of no use, but not in the way either until its key is written.
        logger.debug("the unfinished file %s cannot be removed: %r", path, error)
