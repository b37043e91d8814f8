"""How an empty index is filled again: by a scan of the directory for files that zcache wrote."""

from __future__ import annotations

import contextlib
import logging
import os
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Final

from zcache._backends.directory import files
from zcache._backends.directory.folders import counted
from zcache._backends.tombstones import (
    DROPPED,
    MISSING,
    RANGES,
    key_of,
    tombstone,
    with_mark,
    with_tombstone,
)
from zcache._core import Index, is_cacheable_key, write_tombstone
from zcache._index.calls import drained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

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
    source : bytes
        Short name of the source.

    Attributes
    ----------
    source : bytes
        As given.
    strict : bool
        Whether the next rebuild takes in only what is noted to be the source's.
    folds_names : bool
        Whether names that differ in case are one file; then only folded ones are taken in.
    only_looks : bool
        Whether nothing in the directory is changed.
    """

    def __init__(self, root: str, reserved: str, source: bytes = bytes(8)) -> None:
        self.source = source
        self.strict = self.only_looks = self.folds_names = False
        # Grows while values are deleted by their names.
        self.progress = 0
        self._said = False
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

    def state(self) -> object:
        """Something else whenever values have come or gone; looks at each file.

        Raises
        ------
        OSError
            If the file system refuses.
        """
        finder = files.Finder(self._root, self.source)
        finder.only_looks = True
        state = hash((frozenset(self._notes(DROPPED)), frozenset(self._notes(MISSING).items())))
        for value in finder.find():
            state ^= hash(value)
        return state

    def outdate(self) -> None:
        """Have scans that are on their way enter nothing more: the index is emptied."""
        self._newest += 1

    def _rebuild(self, handle_of_now: Callable[[], IndexHandle | None], why: str) -> None:
        finder = files.Finder(self._root, self.source)
        finder.strict = self.strict
        finder.only_looks = self.only_looks
        finder.formerly = partial(_ask_formerly, handle_of_now)
        found, stay = self._without_tombstones(self._cacheable(finder))
        self.strict = False
        if finder.foreign:
            self.say_in_the_way(finder.foreign)
        # What an eviction has left behind where its process died before it went.
        if not self.only_looks:
            files.remove_empty_folders(self._root)
        for start in range(0, len(found), _BATCH):
            batch = found[start : start + _BATCH]
            handle = handle_of_now()
            # Or it was emptied once more, and another process fills it.
            if handle is None or not handle.call_opened(Index.adopt, batch, timeout=None):
                return
        if (handle := handle_of_now()) is None:
            return
        for name in stay:
            victims = handle.call_opened(Index.drop_missing, key_of(name), timeout=None)
            cells = [cell for cell, _ in victims]
            handle.call_opened(Index.confirm_deletes, [], cells, timeout=None)
        if found and not self.only_looks:
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
        if handle.limits.get("unit", 1) > 1:
            folders = files.count_folders(self._root, (name for _, _, name in found))
            handle.call_opened(Index.count_folders, folders, timeout=None)
        handle.call_opened(Index.finish_rebuild, timeout=None)
        while self._removed:
            self._drop_below(handle, self._removed.pop())

    def remove_unlisted(self, handle: IndexHandle) -> None:
        """Remove values that the index does not list, if it is complete: others have put them back.

        They count towards no bound, and are none of the values that have been written since.

        Raises
        ------
        IndexLockTimeout
            If another process holds the lock of the index.
        """
        finder = files.Finder(self._root, self.source)
        finder.only_looks = True
        names = (name for _, _, name in finder.find())
        removed = 0
        with counted(handle):
            while batch := list(islice(names, _BATCH)):
                listed = handle.call_blocking(Index.are_listed, batch)
                if listed is None:
                    break
                for name, is_listed in zip(batch, listed, strict=True):
                    if not is_listed:
                        self._remove_quietly(name)
                        removed += 1
        if removed:
            logger.warning(
                "the cache directory %s had %d values that its index does not list, such as those of a folder "
                "that was moved away and back. They were removed.",
                self._root,
                removed,
            )

    def _cacheable(self, finder: files.Finder) -> list[tuple[int, int, str]]:
        """All values that can be entries, by age; others of zcache's files are removed."""
        found = []
        for value in sorted(finder.find()):
            name = value[2]
            if is_cacheable_key(key_of(name)):
                if not self.folds_names or files.fold(name) == name:
                    found.append(value)
            elif not self.only_looks:
                self._remove_quietly(name)
        return found

    def _remove_quietly(self, name: str) -> None:
        try:
            files.remove_value(self._root, name)
        except OSError as error:
            logger.debug("the file %s in %s cannot be removed: %r", name, self._root, error)

    def _drop_below(self, handle: IndexHandle, prefix: str) -> None:
        step = partial(handle.call_opened, Index.drain_prefix, timeout=None)
        for victims in drained(step, prefix):
            dropped, failed = [], []
            for cell, name in victims:
                try:
                    files.remove_value(self._root, name)
                    dropped.append(cell)
                except OSError:
                    failed.append(cell)
            handle.call_opened(Index.confirm_deletes, dropped, failed, timeout=None)

    def remove_below(self, prefix: str) -> None:
        """Remove the files of a key and of all keys below it, whether the index knows them or not.

        Raises
        ------
        OSError
            If the file system refuses.
        """
        if self._scans:
            self._removed.append(prefix)
        for name in self.names_below(prefix):
            files.remove_value(self._root, name)
            self.progress += 1
        if prefix:
            # Also one that was never valid.
            files.remove_value(self._root, prefix)

    def names_below(self, prefix: str) -> Iterator[str]:
        """Names of all values that are stored of a key and of all keys below it."""
        finder = files.Finder(self._root, self.source)
        finder.only_looks = self.only_looks
        if prefix:
            above, _, tail = prefix.rpartition("/")
            folder = f"{RANGES}{above}".rstrip("/")
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for name in os.listdir(os.path.join(self._root, folder)):
                    if name.rpartition("@")[0] == tail:
                        yield f"{folder}/{name}"
            with contextlib.suppress(OSError):
                if files.owner(os.path.join(self._root, prefix)) != "foreign":
                    yield prefix
            prefix += "/"
        for below in (prefix, f"{RANGES}{prefix}"):
            for _, _, name in finder.find(below):
                yield name

    def say_in_the_way(self, count: int | None = None) -> None:
        """Warn once of files that zcache did not write, as far as it can tell."""
        if self._said:
            return
        self._said = True
        if count is None:
            finder = files.Finder(self._root, self.source)
            finder.only_looks = True
            for _ in finder.find():
                pass
            count = finder.foreign
        if not count:
            # What was in the way is gone by now, or known.
            self._said = False
            return
        logger.warning(
            "the cache directory %s holds %d files that zcache cannot show to be its own: they stay, count "
            "towards no bound, and keep values of their names uncached. Pass adopt=True if all that the "
            "directory holds is this cache, as after a copy that lost times and attributes; or remove them.",
            self._root,
            count,
        )

    def add_tombstones(self, names: Iterable[str]) -> None:
        """Leave tombstones for values that are not valid any more but could not be deleted."""
        for name in names:
            # On a volume that takes nothing it cannot be told.
            with contextlib.suppress(OSError):
                write_tombstone(self._root, name)

    def _without_tombstones(
        self, found: list[tuple[int, int, str]]
    ) -> tuple[list[tuple[int, int, str]], list[str]]:
        """Delete what has a tombstone or a mark; returns what is left, and of that what is not valid."""
        tombstones = list(self._notes(DROPPED))
        dropped = set(with_tombstone(tombstones, (name for _, _, name in found)))
        dropped.update(with_mark(self._notes(MISSING), found))
        if self.only_looks:
            return found, list(dropped)
        stay = []
        for name in dropped:
            try:
                files.remove_value(self._root, name)
            except OSError:
                stay.append(name)
        kept = {tombstone(name).rpartition("/")[2] for name in stay}
        for name in tombstones:
            # A mark stays: what it is about may come back at any time.
            if name not in kept:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self._root, DROPPED, name))
        gone = dropped.difference(stay)
        return [value for value in found if value[2] not in gone], stay

    def _notes(self, folder: str) -> dict[str, int]:
        """Names and times, in milliseconds since 1970, of the notes in a folder."""
        found = {}
        with contextlib.suppress(OSError), files.listed(self._root, folder.rstrip("/")) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    found[entry.name] = status.st_mtime_ns // 1_000_000
        return found


def _ask_formerly(
    handle_of_now: Callable[[], IndexHandle | None], name: str
) -> tuple[int, int, int] | None:
    handle = handle_of_now()
    return None if handle is None else handle.call_opened(Index.formerly, name, timeout=None)
