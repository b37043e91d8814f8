"""What the wrapped pipeline is asked for, and what becomes of its answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from zarr.abc.store import Store

from zcache._decoded.layout import (
    box_around,
    boxes_of,
    chunk_in,
    coords_in,
    elements_of,
    halves_of,
    is_in,
    scatter,
    shape_of,
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
PER_INDEX: Final = 24
"""Bytes that each element takes along each axis where it is asked for by itself: its index, and what zarr makes of that."""


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
    cost : int
        Bytes that it takes until it has arrived, beyond what a read without decoded chunks would.
    """

    @property
    def cost(self) -> int: ...

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

    cost = 0

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

    @property
    def selection(self) -> Any:
        """See `Job`."""
        return slices_of(self.box, self.inner)

    @property
    def shape(self) -> Coords:
        """See `Job`."""
        return tuple((last - n) * m for n, last, m in zip(*self.box, self.inner, strict=True))

    @property
    def cost(self) -> int:
        """See `Job`."""
        return size_of(self.box) * self.part.layout.size

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
    """Inner chunks of a shard that are missing, by their elements: no others are decoded, and zarr coalesces the reads."""

    def __init__(self, part: ShardPart, coords: Sequence[Coords], *, is_all: bool = False) -> None:
        # In the order of chunks, as zarr wants elements: else it sorts them.
        coords = sorted(coords)
        super().__init__(part, box_around(coords), coords, is_all=is_all)
        self._numbers = {at: n for n, at in enumerate(coords)}

    @property
    def selection(self) -> Any:
        """See `Job`. The indices take much, so they are made when they are asked for."""
        return elements_of(list(self._numbers), self.inner)

    @property
    def shape(self) -> Coords:
        """See `Job`."""
        return (len(self._numbers) * math.prod(self.inner),)

    @property
    def cost(self) -> int:
        """See `Job`."""
        return len(self._numbers) * cost_of_elements(self.part, math.prod(self.inner))

    def _place(self, array: Array) -> bool:  # noqa: ARG002 - they lie in many places
        return False

    def _chunk(self, array: Array, at: Coords) -> Array:
        found: Array = array.reshape(-1, *self.inner)[self._numbers[at]]
        return found


class WantedElements(ScatteredChunks):
    """What is wanted of inner chunks that no one keeps, where others of the same part are kept."""

    def __init__(self, part: ShardPart, coords: Sequence[Coords]) -> None:
        super().__init__(part, coords)
        self._parts = [part.selections(at)[0] for at in self._numbers]
        self._shapes = [shape_of(one, self.inner) for one in self._parts]

    @property
    def selection(self) -> Any:
        """See `Job`."""
        found = []
        for axis, size in enumerate(self.inner):
            one = np.arange(size).reshape([-1 if n == axis else 1 for n in range(len(self.inner))])
            indices = np.broadcast_to(one, self.inner)
            of_each = zip(self._numbers, self._parts, strict=True)
            found.append(
                np.concatenate([indices[part].ravel() + at[axis] * size for at, part in of_each])
            )
        return tuple(found)

    @property
    def shape(self) -> Coords:
        """See `Job`."""
        return (sum(map(math.prod, self._shapes)),)

    @property
    def cost(self) -> int:
        """See `Job`."""
        return cost_of_elements(self.part, self.shape[0])

    def arrived(self, array: Array) -> None:
        # docstring inherited
        self.part.is_absent = False
        start = 0
        for at, shape in zip(self._numbers, self._shapes, strict=True):
            stop = start + math.prod(shape)
            self.part.place_wanted(at, array[start:stop].reshape(shape))
            start = stop

    def was_missing(self, fill: Any) -> None:
        # docstring inherited
        for at in self._numbers:
            self.part.fill(at, fill)


def cost_of_elements(part: ShardPart, count: int) -> int:
    """Bytes that so many elements take where they are asked for one by one."""
    dtype, shape = part.layout.dtype, part.layout.shape
    return count * (dtype.itemsize + PER_INDEX * len(shape))


def cost_of_wanted(part: ShardPart, at: Coords) -> int:
    """The same for what is wanted of an inner chunk."""
    return cost_of_elements(part, math.prod(shape_of(part.selections(at)[0], part.layout.shape)))


def jobs_of(part: ShardPart, some: Sequence[Coords] | None = None) -> Sequence[Job | AsAsked]:
    """What is to be asked of the wrapped pipeline for one shard, or for some of the inner chunks that are missing.

    Each job reads the index of the shard and its chunks by itself. So what would take many boxes is asked for by elements,
    which zarr indexes one by one; of large inner chunks as the box around them, though up to half of it is not missing.
    """
    wanted = part.boxes() if some is None else (boxes_of(some), False)
    if wanted is None:
        return [AsAsked(part)]
    boxes, is_all = wanted
    elements = math.prod(part.layout.shape)
    if len(boxes) > (1 if COALESCES and elements <= FEW_ELEMENTS else MOST_BOXES):
        coords = [at for box in boxes for at in coords_in(box)]
        if COALESCES and elements <= MOST_ELEMENTS:
            return [ScatteredChunks(part, coords, is_all=some is None)]
        around = box_around(coords)
        if 2 * len(coords) >= size_of(around):
            # Halves are never all of the shard: its bytes as a new value would make void what is kept.
            halves = halves_of(around) if COALESCES else [around]
            parted = [(half, [at for at in coords if is_in(half, at)]) for half in halves]
            return [InnerChunks(part, half, those) for half, those in parted if those]
    return [InnerChunks(part, box, is_all=is_all) for box in boxes]


def stacks_of(pairs: list[tuple[Any, Job]]) -> list[list[tuple[Any, Job]]]:
    """Those that can lie in one array: all of as many axes, unless they have none, or it would be more than half empty."""
    by_axes: dict[int, list[tuple[Any, Job]]] = {}
    for number, pair in enumerate(pairs):
        by_axes.setdefault(len(pair[1].shape) or -number, []).append(pair)
    stacks: list[list[tuple[Any, Job]]] = []
    for stack in by_axes.values():
        shapes = [job.shape for _, job in stack]
        rows = sum(shape[0] for shape in shapes if shape)
        if rows * math.prod(largest_of(shapes)) <= 2 * sum(map(math.prod, shapes)):
            stacks.append(stack)
            continue
        alike: dict[Coords, list[tuple[Any, Job]]] = {}
        for pair, shape in zip(stack, shapes, strict=True):
            alike.setdefault(shape[1:], []).append(pair)
        stacks += alike.values()
    return stacks


def largest_of(shapes: Sequence[Coords]) -> Coords:
    """The least that holds each of these, but for their first axis."""
    return tuple(max(sizes) for sizes in zip(*[shape[1:] for shape in shapes], strict=True))
