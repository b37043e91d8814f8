"""What the wrapped pipeline is asked for, and what becomes of its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zcache._decoded.chunk import Decodings
from zcache._decoded.layout import chunks_in, coords_in, scatter, slices_of
from zcache._decoded.parts import MISSING, ChunkPart

if TYPE_CHECKING:
    from collections.abc import Collection

    from zcache._decoded.chunk import Decoding
    from zcache._decoded.layout import Array, Box, Coords
    from zcache._decoded.parts import Part, ShardPart


class Job:
    """What is asked of the wrapped pipeline.

    Attributes
    ----------
    selection : tuple
        Which part of the chunk or shard.
    shape : tuple of int or None
        Of that part; None where it is not plain.
    """

    selection: Any
    shape: Coords | None

    def __init__(self, part: Part) -> None:
        self.part = part

    def arrived(self, array: Array) -> None:
        raise NotImplementedError

    def is_missing(self, fill: Any) -> None:
        raise NotImplementedError

    def was_read(self, *, is_missing: bool) -> None:
        """It is in the output already."""


class WholeChunk(Job):
    """A chunk that is kept, or that many wait for."""

    part: ChunkPart

    def __init__(self, part: ChunkPart) -> None:
        super().__init__(part)
        self.selection = part.layout.whole
        self.shape = part.layout.shape

    def arrived(self, array: Array) -> None:
        part = self.part
        part.place((), array)
        decodings, cache = part.decodings, part.output.cache
        if decodings is None:
            return
        if isinstance(decodings, Decodings) and decodings.late:
            cache.room.admit_late(decodings, part.name, part.layout.size)
        if decodings.pass_over(part.name):
            return
        if (decoding := cache.one(decodings, part.name)) is not None:
            part.land(decoding, array)

    def is_missing(self, fill: Any) -> None:
        part = self.part
        part.output.target[part.item[3]] = fill
        part.output.results[part.number] = MISSING
        if part.decodings is not None:
            part.output.cache.are_absent(part.decodings, [part.name])


class AsAsked(Job):
    """A part of a shard that no one keeps."""

    part: ShardPart

    def __init__(self, part: ShardPart) -> None:
        super().__init__(part)
        self.selection = part.item[2]
        self.shape = None

    def arrived(self, array: Array) -> None:
        output = self.part.output
        scatter(output.target, self.part.item[3], array, ..., output.drop_axes)
        self.part.is_absent = False
        self.part.scratch = None

    def is_missing(self, fill: Any) -> None:
        self.part.output.target[self.part.item[3]] = fill
        self.part.scratch = None

    def was_read(self, *, is_missing: bool) -> None:
        self.part.is_absent = is_missing
        self.part.scratch = None


class InnerChunks(Job):
    """Inner chunks of a shard that lie side by side; with `is_all`, all that are missing."""

    part: ShardPart

    def __init__(self, part: ShardPart, box: Box, *, is_all: bool = False) -> None:
        super().__init__(part)
        inner = part.layout.inner
        assert inner is not None
        self.box = box
        self.inner = inner
        self.selection = slices_of(box, inner)
        self.shape = tuple(one.stop - one.start for one in self.selection)
        self._is_all = is_all

    def _names(self) -> list[str] | None:
        return None if self._is_all else self.part.names(coords_in(self.box))

    def arrived(self, array: Array) -> None:
        part, decodings, cache = self.part, self.part.decodings, self.part.output.cache
        part.is_absent = False
        is_placed = part.place_box(self.box, array)
        late: Collection[str] = ()
        single: dict[str, Decoding] = {}
        if decodings is not None:
            late, single = decodings.late, decodings.single
            if not late:
                cache.pass_over(decodings, self._names())
        if is_placed and not single and not late:
            return
        coords, places = list(coords_in(self.box)), chunks_in(self.box, self.inner)
        for at, name, place in zip(coords, part.names(coords), places, strict=True):
            decoding = single.get(name)
            if late and decodings is not None:
                decoding = cache.room.admit_late(decodings, name, part.layout.size) or decoding
            if is_placed and decoding is None:
                continue
            chunk = array[place]
            if not is_placed:
                part.place(at, chunk)
            if decoding is not None:
                part.land(decoding, chunk)
        if late and decodings is not None:
            cache.pass_over(decodings, self._names())

    def is_missing(self, fill: Any) -> None:
        part = self.part
        for at in coords_in(self.box):
            part.fill(at, fill)
        if part.decodings is not None:
            names = part.names(coords_in(self.box))
            part.output.cache.are_absent(part.decodings, names)


def jobs_of(part: ChunkPart | ShardPart) -> list[Job]:
    """What is to be asked of the wrapped pipeline for one chunk or shard."""
    if isinstance(part, ChunkPart):
        return [] if part.followed else [WholeChunk(part)]
    wanted = part.boxes()
    if wanted is None:
        return [AsAsked(part)]
    boxes, is_all = wanted
    return [InnerChunks(part, box, is_all=is_all) for box in boxes]
