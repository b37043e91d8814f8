"""Reading a value from a segment on the spot, where its pages are in the page cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from zcache._backends.directory.page_cache import LARGEST, PageCacheReader
from zcache._core import CorruptIndexError, IndexBusyError, SegmentReader
from zcache._runtime.buffers import to_buffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._core import Index, SegmentFiles


class PagesInMemory(PageCacheReader):
    """Reads values with pages in memory already, as `PageCacheReader` does files."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._segments: SegmentReader | None = None

    def use(self, index: Index, files: SegmentFiles) -> SegmentReader:
        """Read what this index finds, from these segments."""
        self._segments = SegmentReader(index, files)
        return self._segments

    def lookup_in(self, index: Index, files: SegmentFiles) -> Callable[..., Any]:
        """What looks a key up in a view of the index, and reads its value where that is in memory."""
        turn = self._turn
        reader = SegmentReader.on_the_spot(index, files, turn.goes_on, turn.note_cold, LARGEST)
        return reader.lookup

    def __call__(
        self,
        name: str,
        prototype: BufferPrototype,
        total: int,
        start: int,
        size: int,
        /,
        *,
        counted: bool = False,
    ) -> Buffer | None:
        segments = self._segments
        if segments is None or size > LARGEST or size == 0 or not (counted or self._begins(size)):
            return None
        array = np.empty(size, "u1")
        try:
            is_read = segments.read(name, array, total, start, size, False)
        except (OSError, IndexBusyError, CorruptIndexError):
            return None
        if is_read:
            return to_buffer(array, prototype)
        if is_read is False:
            self._turn.note_cold()
        return None
