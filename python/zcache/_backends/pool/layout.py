"""What a pool keeps in its directory, and how its index is filled again from its segments."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any, Final

from zcache._backends.directory.layout import Layout
from zcache._backends.ownership import Kind
from zcache._core import Index, SegmentFiles, make_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from zcache._index.handle import IndexHandle

logger = logging.getLogger("zcache")

POOL_SOURCE: Final = "a pool"
"""In the stamp of a pool, where the name of the source of a cache directory is."""
_SEGMENT: Final = re.compile("[0-9a-f]{16}")
"""What a segment is called."""
_BLOCK: Final = 512
"""Bytes of a block in ``st_blocks``, whatever the file system has."""
_BATCH: Final = 4096
_TICK: Final = 100_000_000
"""Nanoseconds; all clocks of file systems go on within them."""
FOLDERS: Final = 8
"""Blocks of the folders of a pool and of its stamp, beside index and segments."""


class SegmentScanner:
    """Finds the values in the segments of a pool, whether or not the index knows them.

    The same as `Scanner` for a directory of files.

    Attributes
    ----------
    files : SegmentFiles
        The segments.
    only_looks : bool
        Whether nothing in the pool is changed.
    """

    def __init__(self, root: str, segments: str) -> None:
        self.strict = self.only_looks = self.folds_names = False
        self._root = root
        self._segments = segments
        self._newest = 0
        self.files = SegmentFiles(segments, holes=True)

    def bytes_held(self) -> dict[int, int]:
        """Bytes that each segment takes on the disk, by its number, in whole blocks."""
        held = {}
        with contextlib.suppress(OSError), os.scandir(self._segments) as found:
            for entry in found:
                if _SEGMENT.fullmatch(entry.name):
                    status = entry.stat(follow_symlinks=False)
                    held[int(entry.name, 16)] = _BLOCK * status.st_blocks
        return held

    def state(self) -> object:
        """Something else whenever values have come or gone; see `Scanner.state`."""
        found, newest = set(), 0
        now = time.time_ns()
        with contextlib.suppress(FileNotFoundError), os.scandir(self._segments) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
                    found.add((entry.name, status.st_ino, status.st_mtime_ns, status.st_ctime_ns))
        # What comes within the tick of the last change may not show: then the next look is to find another state.
        return (frozenset(found), now if newest > now - _TICK else 0)

    def give_back_unlisted(self, handle: IndexHandle, numbers: list[int]) -> None:
        """Give back what these segments hold beside the values that the index lists.

        Raises
        ------
        OSError
            If the file system refuses.
        """
        handle.call_opened(Index.give_back_unlisted, self.files, numbers, timeout=None)
        logger.warning(
            "%d segments of the pool %s held more than its index lists, such as those of an older copy. That was removed.",
            len(numbers),
            self._root,
        )

    def renew(self, *, holes: bool) -> None:
        """Use the segments through files that are opened anew."""
        self.files = SegmentFiles(self._segments, holes=holes)

    def outdate(self) -> None:
        """Have scans that are on their way enter nothing more: the index is emptied."""
        self._newest += 1

    def rebuild(self, handle_of_now: Callable[[], IndexHandle | None], why: str) -> None:
        """Fill an empty index; see `Scanner.rebuild`."""
        self._newest += 1
        newest = self._newest
        self._rebuild(lambda: handle_of_now() if newest == self._newest else None, why)

    def _rebuild(self, handle_of_now: Callable[[], IndexHandle | None], why: str) -> None:
        self.files.close()
        # Before it is known that no other rebuild has taken over: what that begins is not looked into, nor cleaned.
        numbers = self.files.numbers()
        handle = handle_of_now()
        if handle is None or not handle.call_opened(_owns_rebuild, timeout=None):
            return
        if handle.call_opened(_begins_empty, timeout=None):
            self._begin_empty(handle, numbers, why)
            return
        found = self.files.scan(numbers, not self.only_looks)
        handle = handle_of_now()
        if handle is None or not handle.call_opened(Index.adopt_segments, found, timeout=None):
            return
        for start in range(0, len(found), _BATCH):
            if (handle := handle_of_now()) is None:
                return
            stop = start + _BATCH
            refused = handle.call_opened(Index.adopt_found, found, start, stop, timeout=None)
            if refused is None:
                return
            if refused and not self.only_looks:
                self.files.delete(refused)
        if (handle := handle_of_now()) is None:
            return
        if len(found) and not self.only_looks:
            logger.warning(
                "the index of the pool %s was rebuilt (%s): %d values, %d bytes",
                self._root,
                why,
                len(found),
                found.size,
            )
        self._finish(handle, is_emptied=False)

    def _begin_empty(self, handle: IndexHandle, numbers: list[int], why: str) -> None:
        """Delete all values: a damaged index may not have found what a write had to remove."""
        for number in numbers:
            self.files.empty(number)
        logger.warning(
            "the index of the pool %s was damaged (%s), so what is cached may be out of date. The pool begins empty.",
            self._root,
            why,
        )
        self._finish(handle, is_emptied=True)

    def _finish(self, handle: IndexHandle, *, is_emptied: bool) -> None:
        unit = handle.limits.get("unit", 1)
        handle.call_opened(Index.count_folders, FOLDERS * unit, timeout=None)
        handle.call_opened(Index.finish_rebuild, is_emptied, timeout=None)

    @property
    def progress(self) -> int:
        """Grows while values are looked for or deleted by their names."""
        return self.files.walked

    def remove_below(self, prefix: str) -> None:
        """Delete the values of a key and of all keys below it, whether the index knows them or not.

        Raises
        ------
        OSError
            If the file system refuses.
        """
        self.files.delete_below(prefix)

    def names_below(self, prefix: str) -> Iterator[str]:
        """Something for each value that there is of a key and of all keys below it."""
        return iter([prefix] * self.files.delete_below(prefix, True))

    def say_in_the_way(self, count: int | None = None) -> None:
        """Nothing in a pool is others'."""

    def add_tombstones(self, names: Iterable[str]) -> None:
        """Have a rebuild ignore values that could not be deleted, named as victims are."""
        self.files.unseal(list(names))


def _begins_empty(index: Index) -> bool:
    return index.begins_empty


def _owns_rebuild(index: Index) -> bool:
    return index.owns_rebuild


class PoolLayout(Layout):
    """The folders of a pool, its stamp, and the files of its index and its segments."""

    kind = Kind.POOL

    def __init__(self, root: os.PathLike[str] | str, source: str | None) -> None:
        super().__init__(root, source)
        self.segments = os.path.join(self.reserved, "segments")
        self.scanner: Any = SegmentScanner(self.root, self.segments)
        self.holes = True

    def claim(self, *, adopt: bool) -> None:
        super().claim(adopt=adopt)
        try:
            # With blocks larger than a page, a hole of a page gives nothing back.
            self.holes = self._block_size <= _PAGE and SegmentFiles.can_punch(self.segments)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        self.scanner.renew(holes=self.holes)
        # Keys are no names of files here.
        self.folds_names = self.scanner.folds_names = False

    def note_block_size(self, *, only_looks: bool = False) -> None:
        super().note_block_size(only_looks=only_looks)
        if self._block_size > 1:
            # Values take whole pages, also where the blocks of the volume are smaller.
            self._block_size = max(self._block_size, _PAGE)

    def make_folders(self) -> None:
        super().make_folders()
        make_folder(self.segments)

    @property
    def segment_files(self) -> SegmentFiles:
        found: SegmentFiles = self.scanner.files
        return found

    def is_empty(self) -> bool:
        return not (os.path.isdir(self.segments) and os.listdir(self.segments))

    def own_limits(self) -> dict[str, Any]:
        return {**super().own_limits(), "holes": self.holes}


_PAGE: Final = 4096
