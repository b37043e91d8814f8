"""A pool as a cache store of one source."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from zcache._backends.base import Backend, read_timeout
from zcache._backends.directory.backend import DirectoryBackend
from zcache._backends.memory import MemoryBackend
from zcache._backends.pool.reader import PagesInMemory
from zcache._backends.tombstones import RANGES
from zcache._core import VALUE_HEADER, CorruptIndexError, Index
from zcache._index.calls import is_complete
from zcache._runtime.buffers import to_buffer
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._backends.base import Victim
    from zcache._backends.pool.source import PoolSource
    from zcache._backends.pool.stores import PoolMemoryStore, PoolStore
    from zcache._core import SegmentReader
    from zcache._index.shared import SharedIndex
    from zcache._runtime.io import IO

T = TypeVar("T")


class PoolBackend(DirectoryBackend):
    """Values of one source in the segments of a pool."""

    value_header = VALUE_HEADER

    def __init__(self, store: PoolStore, shared: SharedIndex) -> None:
        Backend.__init__(self, store, shared)
        self._source = source = cast("PoolSource", shared.place)
        self._directory = source  # type: ignore[assignment]
        self._root = source.root
        self._segments: SegmentReader | None = None
        self._page_cache = self._pages = PagesInMemory(self._root)
        self.try_read = self._pages
        self.filler = source.filler
        shared.handle.watch(self)

    @property
    def folder(self) -> str:  # type: ignore[override]
        # In a forked child it may be another one.
        return f"{self._source.label}/"

    def use_index(self, _: Index) -> None:
        """Read what the index of now finds."""
        source = self._source
        self._segments = self._pages.use(source.handle.view, source.files)

    @property
    def asks_for_entries(self) -> bool:
        # What is read where it is looked up is told as its bytes.
        return True

    def lookup_in(self, index: Any) -> Callable[..., Any]:
        if self.shared.handle.tells_steps:
            return super().lookup_in(index)
        return self._pages.lookup_in(index, self._source.files)

    async def read(
        self, io: IO, name: str, prototype: BufferPrototype, total: int, start: int, size: int
    ) -> Buffer | None:
        array = np.empty(size, "u1")
        is_read = await self._in_segments(
            io, size, lambda segments: segments.read(name, array, total, start, size, True)
        )
        return to_buffer(array, prototype) if is_read else None

    async def _in_segments(self, io: IO, size: int, read: Callable[[SegmentReader], T]) -> T | None:
        """Read so many bytes from the segments, in a thread. The index says where, so it is a step of that.

        Raises
        ------
        OSError
            If the file system refuses, or the index is damaged.
        """

        def step(_: Index) -> T | None:
            # Of the index of now: it was put here together with that.
            segments = self._segments
            try:
                return None if segments is None else read(segments)
            except CorruptIndexError as error:
                # No reader waits for its recovery, which the step begins that drops this entry.
                raise OSError(str(error)) from None

        call = partial(self.shared.handle.call_blocking, step)
        return await io.in_thread(call, timeout=read_timeout(size))

    async def remove_key(
        self, io: IO, key: str, victims: Sequence[Victim], *, begins: bool
    ) -> None:
        if victims:
            await self.remove(io, victims)
        if self.tells_by_name:
            await self._remove_by_name(io, key, lambda: self._remove_below(key), begins=begins)
            return
        await self._remove_in_progress(io, key)

    async def _remove_in_progress(self, io: IO, prefix: str) -> None:
        """Delete what another participant has dropped, and may have stopped before it deleted the bytes."""
        with contextlib.suppress(IndexLockTimeout):
            others = await self.shared.handle.call(io, Index.in_progress_below, prefix)
            if others:
                await self.remove(io, others)

    async def remove_unlisted(self, io: IO, prefix: str, *, begins: bool | None = None) -> None:
        if begins is None or self.tells_by_name:
            await super().remove_unlisted(io, prefix, begins=begins)
            return
        # An index that is complete knows of all values: there is no need to read all headers.
        await self._remove_in_progress(io, prefix)
        knows_all = False
        with contextlib.suppress(IndexLockTimeout):
            knows_all = await self.shared.handle.call(io, is_complete)
        if not knows_all:
            await super().remove_unlisted(io, prefix)

    def _remove_in_thread(self, victims: Sequence[Victim]) -> list[OSError | None]:
        return self._source.files.delete([name for _, name in victims])

    async def recorded_size_and_checksum(self, io: IO, name: str) -> tuple[int, int] | None:
        return await self._in_segments(io, 0, lambda segments: segments.recorded(name))

    async def intact_size(self, io: IO, name: str) -> int | None:  # noqa: ARG002 - a header that is not right is none
        return None


class MemoryPoolBackend(MemoryBackend):
    """Values of one source in the dict of a pool in memory."""

    def __init__(self, store: PoolMemoryStore, shared: SharedIndex, label: str) -> None:
        super().__init__(store, shared)
        self.folder = folder = f"{label}/"
        in_dict = self.try_read
        assert in_dict is not None

        def try_read(
            name: str, prototype: BufferPrototype, total: int, start: int, size: int, /
        ) -> Buffer | None:
            return in_dict(_in_folder(folder, name), prototype, total, start, size)

        self.try_read = try_read

    async def read(
        self, io: IO, name: str, prototype: BufferPrototype, total: int, start: int, size: int
    ) -> Buffer | None:
        read = partial(super().read, io, _in_folder(self.folder, name))
        return await read(prototype, total, start, size)


def _in_folder(folder: str, name: str) -> str:
    if name.startswith(RANGES):
        return f"{RANGES}{folder}{name.removeprefix(RANGES)}"
    return folder + name
