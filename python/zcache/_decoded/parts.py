"""What a read wants of one chunk or shard, and what the wrapped pipeline is asked for it."""

from __future__ import annotations

import asyncio
import math
from itertools import product
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from zcache._decoded.layout import boxes_of, chunk_in, coords_in, is_basic, scatter, slices_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zcache._decoded.cache import DecodedCache
    from zcache._decoded.chunk import Decoding, Kept, Origin
    from zcache._decoded.layout import Array, Box, Coords, Layout

PRESENT: Final = {"status": "present"}
MISSING: Final = {"status": "missing"}


class Output:
    """What one read fills.

    Parameters
    ----------
    cache : DecodedCache
        Decoded chunks.
    target : ndarray
        The output.
    drop_axes : tuple of int
        Axes that it does not have.
    size : int
        Chunks that are read.

    Attributes
    ----------
    results : list of dict
        Which of the chunks were there.
    """

    def __init__(
        self, cache: DecodedCache, target: Array, drop_axes: tuple[int, ...], size: int
    ) -> None:
        self.cache = cache
        self.target = target
        self.drop_axes = drop_axes
        self.now = cache.now()
        # Kept by what it has found current, so not this, which has the output.
        self.mark = object()
        self.results: list[dict[str, str]] = [PRESENT] * size
        self.loop = asyncio.get_running_loop()

    def copy(self, part: Part, at: Coords, kept: Kept) -> None:
        """Copy from a chunk that is pinned."""
        try:
            part.place(at, kept.array)
        finally:
            self.cache.unpin(kept)


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


class Part:
    """What a read wants of one chunk or shard."""

    def __init__(self, output: Output, number: int, item: Any, layout: Layout) -> None:
        self.output = output
        self.number = number
        self.item = item
        self.layout = layout
        self.leads: dict[Coords, Decoding] = {}
        self.followed: dict[Coords, Decoding] = {}

    def jobs(self) -> list[Job]:
        """What is to be asked of the wrapped pipeline."""
        raise NotImplementedError

    def place(self, at: Coords, array: Array) -> None:
        """Copy out what is wanted of a chunk."""
        raise NotImplementedError

    def finish(self) -> None:
        """Say that all is there."""

    def land(self, at: Coords, array: Array) -> None:
        """Keep a chunk that has been decoded here."""
        decoding = self.leads.get(at)
        layout = self.layout
        if decoding is None or decoding.is_ended:
            return
        if array.shape != layout.shape or array.nbytes != layout.size:
            self.output.cache.give_up(decoding)
            return
        self.output.cache.land(decoding, array, layout.only_fill(array))


class ChunkPart(Part):
    """A part of a chunk."""

    def join(self, name: str) -> None:
        """Decode the chunk, or wait for who does."""
        cache, key = self.output.cache, self.item[0].path
        origin = cache.begin(key, self.output.now)
        if origin is None:
            return
        joined = cache.join(name, key, origin, self.layout.size, self.output.loop)
        if joined is not None:
            leads, decoding = joined
            (self.leads if leads else self.followed)[()] = decoding

    def jobs(self) -> list[Job]:
        return [] if self.followed else [_WholeChunk(self)]

    def place(self, at: Coords, array: Array) -> None:  # noqa: ARG002 - there is only one
        _, _, selection, place, _ = self.item
        output = self.output
        scatter(output.target, place, array, selection, output.drop_axes)


class _WholeChunk(Job):
    """A chunk that is kept, or that many wait for."""

    part: ChunkPart

    def __init__(self, part: ChunkPart) -> None:
        super().__init__(part)
        self.selection = tuple(slice(0, n) for n in part.layout.shape)
        self.shape = part.layout.shape

    def arrived(self, array: Array) -> None:
        self.part.place((), array)
        self.part.land((), array)

    def is_missing(self, fill: Any) -> None:
        part = self.part
        part.output.target[part.item[3]] = fill
        part.output.results[part.number] = MISSING
        if () in part.leads:
            part.output.cache.give_up(part.leads[()], is_absent=True)


class ShardPart(Part):
    """A part of a shard."""

    def __init__(self, output: Output, number: int, item: Any, layout: Layout) -> None:
        super().__init__(output, number, item, layout)
        _, spec, selection, place, _ = item
        self._axes = layout.axes_of(selection)
        self._sel_shape: Any = None
        self._wanted: dict[Coords, Any] = {}
        shape: Coords
        if self._axes is not None:
            shape = tuple(axis[-1][2].stop for axis in self._axes if axis[-1][2] is not None)
        else:
            indexer = layout.projections(spec, selection)
            self._wanted = {at: (part, out) for at, part, out, *_ in indexer}
            self._sel_shape, shape = getattr(indexer, "sel_shape", None), indexer.shape
        self._scratch: Array | None = None
        self._out = self._view(place, shape)
        if self._out is None:
            order = spec.config.order
            self._out = self._scratch = np.empty(shape, layout.dtype, order=order)
        self._misses: list[Coords] = []
        self.is_absent = True

    def _view(self, place: Any, shape: Coords) -> Array | None:
        """Where the part lies in the output, if it is a view of that."""
        if self._sel_shape is not None or not is_basic(place):
            return None
        view = self.output.target[(*place, ...)]
        if self.output.drop_axes:
            view = np.expand_dims(view, self.output.drop_axes)
        return view if view.shape == shape else None

    def look_up(self, hits: list[Kept]) -> bool:
        """Copy out what is kept, which is pinned in `hits` then; whether that is all."""
        output = self.output
        cache = output.cache
        key = self.item[0].path
        stem = f"{key}/{self.layout.number}/"
        names = []
        for at in self._coords():
            name = stem + "/".join(map(str, at))
            kept = cache.get(name, key, output.mark, output.now)
            if kept is not None:
                hits.append(kept)
                self.place(at, kept.array)
                self.is_absent = False
                continue
            self._misses.append(at)
            names.append(name)
        if names and (origin := cache.begin(key, output.now)) is not None:
            self._join(names, origin)
        if not names:
            self.finish()
        return not names

    def _count(self) -> int:
        return len(self._wanted) if self._axes is None else math.prod(map(len, self._axes))

    def _coords(self) -> Iterable[Coords]:
        if self._axes is None:
            return self._wanted
        return product(*([at for at, _, _ in axis] for axis in self._axes))

    def _join(self, names: list[str], origin: Origin) -> None:
        """Decode the chunks that are missing, or wait for who does."""
        cache, key = self.output.cache, self.item[0].path
        joined = cache.join_all(names, key, origin, self.layout.size, self.output.loop)
        for at, one in zip(self._misses, joined, strict=True):
            if one is not None:
                leads, decoding = one
                (self.leads if leads else self.followed)[at] = decoding

    def _selections(self, at: Coords) -> Any:
        """What is wanted of a chunk, and where that goes."""
        if self._axes is None:
            return self._wanted[at]
        parts = [axis[n - axis[0][0]] for axis, n in zip(self._axes, at, strict=True)]
        return tuple([one for _, one, _ in parts]), tuple(
            [out for _, _, out in parts if out is not None]
        )

    def jobs(self) -> list[Job]:
        # Of what no one keeps, zarr reads as much as it wants to.
        is_all = len(self._misses) == self._count()
        if is_all and not self.leads and not self.followed:
            return [_AsAsked(self)]
        if is_all and self._axes is not None and not self.followed:
            last = tuple(n + 1 for n in self._misses[-1])
            return [_InnerChunks(self, (self._misses[0], last))]
        missing = [at for at in self._misses if at not in self.followed]
        return [_InnerChunks(self, box) for box in boxes_of(missing)]

    def place(self, at: Coords, array: Array) -> None:
        selection, place = self._selections(at)
        assert self._out is not None
        self._out[place] = array[selection]

    def place_box(self, box: Box, array: Array) -> bool:
        """Copy out what is wanted of many chunks at once; False where it is not one block of them."""
        inner = self.layout.inner
        if self._scratch is not None or inner is None:
            return False
        taken: list[Any] = []
        place: list[slice] = []
        for wanted, first, last, n in zip(self.item[2], *box, inner, strict=True):
            if isinstance(wanted, (int, np.integer)):
                taken.append(wanted - first * n)
                continue
            # Indices and masks are placed chunk by chunk.
            if not isinstance(wanted, slice) or wanted.step not in (None, 1):
                return False
            start, stop = max(wanted.start, first * n), min(wanted.stop, last * n)
            taken.append(slice(start - first * n, stop - first * n))
            place.append(slice(start - wanted.start, stop - wanted.start))
        assert self._out is not None
        self._out[tuple(place)] = array[tuple(taken)]
        return True

    def fill(self, at: Coords, value: Any) -> None:
        """The shard is not there."""
        assert self._out is not None
        self._out[self._selections(at)[1]] = value
        if (decoding := self.leads.get(at)) is not None:
            self.output.cache.give_up(decoding, is_absent=True)

    def finish(self) -> None:
        if self._scratch is not None:
            array = self._scratch
            if self._sel_shape is not None:
                array = array.reshape(self._sel_shape)
            scatter(self.output.target, self.item[3], array, ..., self.output.drop_axes)
        if self.is_absent:
            self.output.results[self.number] = MISSING


class _AsAsked(Job):
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
        self.part._scratch = None

    def is_missing(self, fill: Any) -> None:
        self.part.output.target[self.part.item[3]] = fill
        self.part._scratch = None

    def was_read(self, *, is_missing: bool) -> None:
        self.part.is_absent = is_missing
        self.part._scratch = None


class _InnerChunks(Job):
    """Inner chunks of a shard that lie side by side."""

    part: ShardPart

    def __init__(self, part: ShardPart, box: Box) -> None:
        super().__init__(part)
        inner = part.layout.inner
        assert inner is not None
        self.box = box
        self.inner = inner
        self.selection = slices_of(box, inner)
        self.shape = tuple(one.stop - one.start for one in self.selection)

    def arrived(self, array: Array) -> None:
        part = self.part
        part.is_absent = False
        is_placed = part.place_box(self.box, array)
        coords = list(coords_in(self.box))
        part.output.cache.pass_over([part.leads[at] for at in coords if at in part.leads])
        first = self.box[0]
        for at in coords:
            is_kept = at in part.leads and not part.leads[at].is_ended
            if is_placed and not is_kept:
                continue
            chunk = array[tuple(chunk_in(first, at, self.inner))]
            if not is_placed:
                part.place(at, chunk)
            if is_kept:
                part.land(at, chunk)

    def is_missing(self, fill: Any) -> None:
        for at in coords_in(self.box):
            self.part.fill(at, fill)
