"""What the wrapped pipeline is asked for, and what becomes of its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from zcache._decoded.layout import chunk_in, chunks_in, coords_in, scatter, slices_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from zcache._decoded.chunk import Decoding
    from zcache._decoded.layout import Array, Box, Coords
    from zcache._decoded.parts import Part, ShardPart


class Job(Protocol):
    """What is asked of the wrapped pipeline.

    Attributes
    ----------
    part : Part
        What the read wants.
    selection : tuple
        Which part of the chunk or shard.
    shape : tuple of int or None
        Of that part; None where it is not plain.
    """

    @property
    def part(self) -> Part: ...

    @property
    def selection(self) -> Any: ...

    @property
    def shape(self) -> Coords | None: ...

    def arrived(self, array: Array) -> None:
        """Take in what was decoded."""

    def is_missing(self, fill: Any) -> None:
        """Take in that it is not there."""

    def was_read(self, *, is_missing: bool) -> None:
        """It is in the output already."""


class AsAsked:
    """A part of a shard that no one keeps."""

    shape = None

    def __init__(self, part: ShardPart) -> None:
        self.part = part
        self.selection = part.item[2]

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


class InnerChunks:
    """Inner chunks of a shard that lie side by side; with `is_all`, all that are missing."""

    def __init__(self, part: ShardPart, box: Box, *, is_all: bool = False) -> None:
        self.part = part
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
        first, inner = self.box[0], self.inner
        if not is_placed:
            for at, place in zip(coords_in(self.box), chunks_in(self.box, inner), strict=True):
                part.place(at, array[place])
        if late and decodings is not None:
            # One by one: what one of them has no use for is room for the next.
            coords = list(coords_in(self.box))
            for at, name in zip(coords, part.names(coords), strict=True):
                late_one = cache.room.admit_late(decodings, name, part.layout.size)
                if (decoding := late_one or single.get(name)) is not None:
                    part.land([(decoding, array[chunk_in(first, at, inner)])], decodings)
            cache.pass_over(decodings, self._names())
            return
        decoded = part.among(single, None if self._is_all else coords_in(self.box))
        part.land([(one, array[chunk_in(first, at, inner)]) for at, one in decoded], decodings)

    def is_missing(self, fill: Any) -> None:
        part = self.part
        for at in coords_in(self.box):
            part.fill(at, fill)
        if part.decodings is not None:
            names = part.names(coords_in(self.box))
            part.output.cache.are_absent(part.decodings, names)

    def was_read(self, *, is_missing: bool) -> None:
        """Nothing: it is never read into the output at once."""


def jobs_of(part: ShardPart) -> list[Job]:
    """What is to be asked of the wrapped pipeline for one shard."""
    wanted = part.boxes()
    if wanted is None:
        return [AsAsked(part)]
    boxes, is_all = wanted
    return [InnerChunks(part, box, is_all=is_all) for box in boxes]
