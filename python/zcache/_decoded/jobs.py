"""What the wrapped pipeline is asked for, and what becomes of its answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Protocol

from zarr.abc.store import Store

from zcache._decoded.layout import (
    box_around,
    chunk_in,
    coords_in,
    elements_of,
    halves_of,
    is_in,
    scatter,
    size_of,
    slices_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from zcache._decoded.chunk import Decoding
    from zcache._decoded.layout import Array, Box, Coords
    from zcache._decoded.parts import Part, ShardPart

COALESCES: Final = hasattr(Store, "get_ranges")
"""Whether zarr reads parts of a shard together: before 3.3 each is a request, but a whole shard is only one."""
MOST_BOXES: Final = 4
"""Boxes in which what is missing of a shard is asked for; one, of inner chunks of few elements."""
FEW_ELEMENTS: Final = 2**12
"""Elements of an inner chunk, the indices of which take less than another request."""
MOST_ELEMENTS: Final = 2**14
"""Elements of the largest inner chunk that is asked for by elements: of more, their indices take more than many requests."""


class Job(Protocol):
    """What is asked of the wrapped pipeline.

    Attributes
    ----------
    part : Part
        What the read wants.
    selection : tuple
        Which part of the chunk or shard.
    shape : tuple of int
        Of that part.
    """

    @property
    def part(self) -> Part: ...

    @property
    def selection(self) -> Any: ...

    @property
    def shape(self) -> Coords: ...

    def arrived(self, array: Array) -> None:
        """Take in what was decoded."""

    def was_missing(self, fill: Any) -> None:
        """Take in that it is not there."""


class AsAsked:
    """A part of a shard that no one keeps."""

    def __init__(self, part: ShardPart) -> None:
        self.part = part
        self.selection = part.item[2]
        # It goes to the output at once.
        part.scratch = None

    def arrived(self, array: Array) -> None:
        output = self.part.output
        scatter(output.target, self.part.item[3], array, ..., output.drop_axes)
        self.part.is_absent = False

    def was_missing(self, fill: Any) -> None:
        self.part.output.target[self.part.item[3]] = fill


class InnerChunks:
    """Inner chunks of a shard that are missing, in a box.

    Parameters
    ----------
    part : ShardPart
        What the read wants of the shard.
    box : tuple
        Holds them.
    coords : sequence of tuple of int, optional
        Them, if the box holds others too.
    is_all : bool, optional
        Whether no others are missing.
    """

    def __init__(
        self,
        part: ShardPart,
        box: Box,
        coords: Sequence[Coords] | None = None,
        *,
        is_all: bool = False,
    ) -> None:
        self.part = part
        inner = part.layout.inner
        assert inner is not None
        self.box = box
        self.inner = inner
        self._missing = coords
        self._is_all = is_all
        self.selection: Any = slices_of(box, inner)
        self.shape: Coords = tuple(one.stop - one.start for one in self.selection)

    @property
    def _coords(self) -> Iterable[Coords]:
        return coords_in(self.box) if self._missing is None else self._missing

    def _names(self) -> list[str] | None:
        return None if self._is_all else self.part.names(self._coords)

    def _place(self, array: Array) -> bool:
        """Copy out what is wanted at once, if that can be done."""
        return self.part.place_box(self.box, array)

    def _chunk(self, array: Array, at: Coords) -> Array:
        """One of them, in what was decoded."""
        return array[chunk_in(self.box[0], at, self.inner)]

    def arrived(self, array: Array) -> None:
        part, decodings, cache = self.part, self.part.decodings, self.part.output.cache
        part.is_absent = False
        is_placed = self._place(array)
        late: Collection[str] = ()
        single: dict[str, Decoding] = {}
        if decodings is not None:
            late, single = decodings.late, decodings.single
            if not late:
                cache.pass_over(decodings, self._names())
        if is_placed and not single and not late:
            return
        if not is_placed:
            for at in self._coords:
                part.place(at, self._chunk(array, at))
        if late and decodings is not None:
            # One by one: what one of them has no use for is room for the next.
            coords = list(self._coords)
            for at, name in zip(coords, part.names(coords), strict=True):
                late_one = cache.room.admit_late(decodings, name, part.layout.size)
                if (decoding := late_one or single.get(name)) is not None:
                    part.land([(decoding, self._chunk(array, at))], decodings)
            cache.pass_over(decodings, self._names())
            return
        decoded = part.among(single, None if self._is_all else self._coords)
        part.land([(one, self._chunk(array, at)) for at, one in decoded], decodings)

    def was_missing(self, fill: Any) -> None:
        part, coords = self.part, list(self._coords)
        for at in coords:
            part.fill(at, fill)
        if part.decodings is not None:
            part.output.cache.give_up_absent(part.decodings, part.names(coords))


class ScatteredChunks(InnerChunks):
    """All inner chunks of a shard that are missing, by their elements: no others are decoded, and zarr coalesces the reads."""

    def __init__(self, part: ShardPart, coords: Sequence[Coords]) -> None:
        # In the order of chunks, as zarr wants elements: else it sorts them.
        coords = sorted(coords)
        super().__init__(part, box_around(coords), coords, is_all=True)
        self.selection = elements_of(coords, self.inner)
        self.shape = self.selection[0].shape
        self._numbers = {at: n for n, at in enumerate(coords)}

    def _place(self, array: Array) -> bool:  # noqa: ARG002 - they lie in many places
        return False

    def _chunk(self, array: Array, at: Coords) -> Array:
        found: Array = array.reshape(-1, *self.inner)[self._numbers[at]]
        return found


def jobs_of(part: ShardPart) -> Sequence[Job | AsAsked]:
    """What is to be asked of the wrapped pipeline for one shard.

    Each job reads the index of the shard and its chunks by itself. So what would take many boxes is asked for by elements,
    which zarr indexes one by one; of large inner chunks as the box around them, though up to half of it is not missing.
    """
    wanted = part.boxes()
    if wanted is None:
        return [AsAsked(part)]
    boxes, is_all = wanted
    elements = math.prod(part.layout.shape)
    if len(boxes) > (1 if COALESCES and elements <= FEW_ELEMENTS else MOST_BOXES):
        coords = [at for box in boxes for at in coords_in(box)]
        if COALESCES and elements <= MOST_ELEMENTS:
            return [ScatteredChunks(part, coords)]
        around = box_around(coords)
        if 2 * len(coords) >= size_of(around):
            # Halves are never all of the shard: its bytes as a new value would make void what is kept.
            halves = halves_of(around) if COALESCES else [around]
            parted = [(half, [at for at in coords if is_in(half, at)]) for half in halves]
            return [InnerChunks(part, half, some) for half, some in parted if some]
    return [InnerChunks(part, box, is_all=is_all) for box in boxes]
