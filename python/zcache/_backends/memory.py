"""A cache in memory: the dict of a `MemoryStore`. Nothing here waits, and nothing can fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from zcache._backends.base import Backend
from zcache._runtime.buffers import array_of, to_buffer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zarr.core.buffer import Buffer, BufferPrototype
    from zarr.storage import MemoryStore

    from zcache._backends.base import FillNow, TryRead, Victim
    from zcache._byte_ranges import ByteRange
    from zcache._index.shared import SharedIndex
    from zcache._runtime.io import IO


class MemoryBackend(Backend):
    """A dict of this process.

    Its values are buffers over immutable bytes: of what `MemoryStore.set` keeps, zarr 3.4 gives out
    memory that readers can write to.
    """

    store: MemoryStore
    owns_what_it_reads: ClassVar[bool] = False
    works_in_background: ClassVar[bool] = False
    verify: ClassVar[str | None] = "never"

    def __init__(self, store: MemoryStore, shared: SharedIndex) -> None:
        super().__init__(store, shared)
        self._values: Any = store._store_dict
        self.try_read = _reader(self._values)
        self.fill_now = _filler(self._values, shared)

    async def read(
        self,
        io: IO,  # noqa: ARG002 - nothing waits
        name: str,
        prototype: BufferPrototype,
        total: int,
        start: int,
        size: int,
    ) -> Buffer | None:
        value = self._values.get(name)
        if value is None or len(value) != total:
            return None
        return prototype.buffer.from_bytes(value.to_bytes()[start : start + size])

    async def remove(self, io: IO, victims: Sequence[Victim]) -> None:  # noqa: ARG002 - nothing waits
        try:
            for _, name in victims:
                self._values.pop(name, None)
        except BaseException:  # An interrupt: what is gone already is no error for the next delete.
            self.remove_later(victims)
            raise
        self.index.confirm_deletes([cell for cell, _ in victims], [])


# Closures, for a hit and a miss: an attribute that is looked up less.
def _reader(values: Mapping[str, Buffer]) -> TryRead:
    def try_read(
        name: str, prototype: BufferPrototype, total: int, start: int, size: int, /
    ) -> Buffer | None:
        value = values.get(name)
        if value is None:
            return None
        try:
            array = array_of(value)
        except AttributeError:
            return None  # Not put there by zcache.
        # What others have put there may be in memory that its readers could write to.
        if array.size != total or array.flags.writeable:
            return None
        # A view: of the array itself a reader could change the shape, for all others as well.
        part = array.view() if size == total else array[start : start + size]
        return to_buffer(part, prototype)

    return try_read


def _filler(values: Any, shared: SharedIndex) -> FillNow:
    handle, clock = shared.handle, shared.clock

    def fill_now(
        key: str,
        byte_range: ByteRange | None,
        data: bytes,
        buffer: Buffer,
        ticket: int,
        fetched: float,
        /,
    ) -> bool | None:
        return handle.index.fill_memory(
            values, key, byte_range, data, buffer, ticket, clock(), fetched
        )

    return fill_now
