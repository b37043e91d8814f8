"""What a read wants of one shard, and which of its chunks the wrapped pipeline is asked for."""

from __future__ import annotations

import asyncio
import math
from itertools import product
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from zarr.storage import MemoryStore, StorePath

from zcache._decoded.chunk import Decodings
from zcache._decoded.layout import boxes_of, is_basic, scatter

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from zcache._decoded.cache import DecodedCache
    from zcache._decoded.chunk import Decoding, Kept
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
    has_values : bool
        Whether chunks other than of the fill value were kept, or had been.
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
        self.has_values = False
        self.loop = asyncio.get_running_loop()

    def copy(self, part: Part, at: Coords, kept: Kept) -> None:
        """Copy from a chunk that is pinned."""
        self.has_values |= kept.memory is not None
        try:
            part.place(at, kept.array)
        finally:
            self.cache.room.unpin(kept)


class Part:
    """What a read wants of one chunk or shard."""

    def __init__(self, output: Output, number: int, item: Any, layout: Layout) -> None:
        self.output = output
        self.number = number
        self.item = item
        self.layout = layout
        # What others decode of it.
        self.followed: dict[Coords, Decoding] = {}

    def place(self, at: Coords, array: Array) -> None:
        """Copy out what is wanted of a chunk."""
        raise NotImplementedError

    def leave(self) -> None:
        """Do without what others decode."""
        for decoding in self.followed.values():
            self.output.cache.leave(decoding)

    def land(
        self,
        arrived: Iterable[tuple[Decoding, Array]],
        decodings: Decoding | Decodings | None = None,
    ) -> None:
        """Keep chunks that have been decoded here."""
        layout, cache = self.layout, self.output.cache
        landing = []
        for decoding, array in arrived:
            if decoding.is_ended or (not decoding.is_admitted and cache.passes_over(decoding)):
                continue
            if array.shape != layout.shape or array.nbytes != layout.size:
                cache.give_up(decoding)
                continue
            fill = layout.only_fill(array)
            self.output.has_values |= fill is None
            landing.append((decoding, array, fill))
        if landing:
            cache.landing.land(landing, decodings if isinstance(decodings, Decodings) else None)


class ShardPart(Part):
    """A part of a shard."""

    # On the class: a hit needs none of it.
    decodings: Decodings | None = None
    scratch: Array | None = None
    is_absent = True
    # Whether its bytes are read once, as a whole, for several calls of the pipeline.
    is_held = False
    _held: Any = None
    _sel_shape: Any = None
    # By the coordinates of what is missing, its names.
    _misses: dict[Coords, str]
    _wanted: dict[Coords, Any]

    def __init__(self, output: Output, number: int, item: Any, layout: Layout) -> None:
        super().__init__(output, number, item, layout)
        _, spec, selection, place, _ = item
        self._axes = layout.axes_of(selection)
        shape: Coords
        if self._axes is not None:
            last = [axis[-1][2] for axis in self._axes]
            shape = tuple([out.stop for out in last if out is not None])
        else:
            indexer = layout.projections(spec, selection)
            self._wanted = {at: (part, out) for at, part, out, *_ in indexer}
            self._sel_shape, shape = getattr(indexer, "sel_shape", None), indexer.shape
        self._out = self._view(place, shape)
        if self._out is None:
            order = spec.config.order
            self._out = self.scratch = np.empty(shape, layout.dtype, order=order)

    def _view(self, place: Any, shape: Coords) -> Array | None:
        """Where the part lies in the output, if it is a view of that."""
        if self._sel_shape is not None or not is_basic(place):
            return None
        view = self.output.target[(*place, ...)]
        if self.output.drop_axes:
            view = np.expand_dims(view, self.output.drop_axes)
        return view if view.shape == shape else None

    async def hold(self) -> None:
        """Read its bytes, for all calls of the pipeline until `release`: so they are of one value, and cost one request."""
        getter, spec, *more = self.item
        value = await getter.get(spec.prototype)
        self._held = self.item
        # That it is not there holds for all of them as well.
        memory = MemoryStore({} if value is None else {getter.path: value}, read_only=True)
        self.item = (StorePath(memory, getter.path), spec, *more)

    def release(self) -> None:
        """Do without these bytes."""
        self.item, self._held = self._held or self.item, None

    def look_up(self, hits: list[Kept], *, is_missed: bool) -> bool:
        """Copy out what is kept, which is pinned in `hits` then; whether that is all. With `is_missed` nothing is."""
        output = self.output
        cache = output.cache
        key = self.item[0].path
        coords = self._coords()
        stem = f"{self.layout.number}/{key}"
        names = self._names(stem, coords)
        found: list[int] = []
        pinned = len(hits)
        hit = () if is_missed else cache.get_all(names, output.mark, output.now)
        for n, kept in hit:
            hits.append(kept)
            found.append(n)
        if found and not self._is_one_value(hits[pinned:], len(names)):
            useless = hits[pinned:]
            del hits[pinned:]
            cache.room.unpin(*useless)
            for n, kept in zip(found, useless, strict=True):
                cache.drop(names[n], kept)
            found = []
        for n, kept in zip(found, hits[pinned:], strict=True):
            self.place(coords[n], kept.array)
        if found:
            self.is_absent = False
        if len(found) == len(names):
            self.finish()
            return True
        self._misses = dict(zip(coords, names, strict=True))
        for n in found:
            del self._misses[coords[n]]
        return False

    def _is_one_value(self, decoded: Collection[Kept | Decoding], count: int) -> bool:
        """Whether a read of so many chunks may take these, and decode the others; one of a part of the shard always may.

        A read of the whole shard must be of one value, as it would be if none of them were there: parts that were decoded
        apart may be of two. So may the others, by an index that is cached, or that is read once more.
        """
        if count != self.layout.count or not self.output.cache.origins.expire(self.item[0].path):
            return True
        # Of one decode, which read all of it.
        return len(decoded) == count and len({id(one.origin) for one in decoded}) == 1

    def _coords(self) -> list[Coords]:
        if self._axes is None:
            return list(self._wanted)
        return list(product(*[[at for at, _, _ in axis] for axis in self._axes]))

    def _names(self, stem: str, coords: list[Coords]) -> list[str]:
        if self._axes is None:
            return ["/".join((stem, *map(str, at))) for at in coords]
        # In the order of the coordinates; the texts of each axis are made once.
        texts = [[f"/{at}" for at, _, _ in axis] for axis in self._axes]
        return list(map("".join, product((stem,), *texts)))

    def join(self) -> None:
        """Decode the chunks that are missing, or wait for who does."""
        output = self.output
        key, names = self.item[0].path, list(self._misses.values())
        (origin,) = output.cache.origins.begin([key], output.now)
        if origin is None:
            return
        self.decodings = Decodings(output.loop, dict.fromkeys(names, origin))
        followed = output.cache.join_all(self.decodings, self.layout.size)
        if not origin.is_dated:
            output.cache.give_up_all(self.decodings)
        if followed and not self._is_one_value(followed.values(), len(names)):
            for decoding in followed.values():
                output.cache.leave(decoding)
        elif followed:
            self.followed = {
                at: followed[name] for at, name in self._misses.items() if name in followed
            }

    @property
    def _leads(self) -> bool:
        """Whether others may want what is decoded here."""
        decodings = self.decodings
        return decodings is not None and bool(decodings.tickets or decodings.single)

    @property
    def wanted_count(self) -> int:
        """Inner chunks of which something is wanted."""
        return len(self._wanted) if self._axes is None else math.prod(map(len, self._axes))

    @property
    def missing(self) -> list[Coords]:
        """Inner chunks that are to be decoded here."""
        return [at for at in self._misses if at not in self.followed]

    def selections(self, at: Coords) -> Any:
        """What is wanted of a chunk, and where that goes."""
        if self._axes is None:
            return self._wanted[at]
        parts = [axis[n - axis[0][0]] for axis, n in zip(self._axes, at, strict=True)]
        return tuple([one for _, one, _ in parts]), tuple(
            [out for _, _, out in parts if out is not None]
        )

    def boxes(self) -> tuple[list[Box], bool] | None:
        """Blocks of inner chunks that are to be decoded, and whether they are all that is wanted.

        None where no one keeps any: of that, zarr reads as much as it wants to.
        """
        misses = list(self._misses)
        is_all = len(misses) == self.wanted_count and not self.followed
        if is_all and not self._leads:
            return None
        if is_all and self._axes is not None:
            last = tuple(n + 1 for n in misses[-1])
            return [(misses[0], last)], True
        return boxes_of(self.missing), False

    def place(self, at: Coords, array: Array) -> None:
        selection, place = self.selections(at)
        assert self._out is not None
        self._out[place] = array[selection]

    def place_wanted(self, at: Coords, array: Array) -> None:
        """The same where nothing else of the chunk is there."""
        assert self._out is not None
        self._out[self.selections(at)[1]] = array

    def place_box(self, box: Box, array: Array) -> bool:
        """Copy out what is wanted of many chunks at once; False where it is not one block of them."""
        inner = self.layout.inner
        if self.scratch is not None or inner is None:
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

    def names(self, coords: Iterable[Coords]) -> list[str]:
        """Of chunks that are missing."""
        return [self._misses[at] for at in coords]

    def among(
        self, decodings: dict[str, Decoding], coords: Iterable[Coords] | None
    ) -> list[tuple[Coords, Decoding]]:
        """Those of the chunks that are missing, or of these, that are among some decodes."""
        misses = self._misses
        names = misses.items() if coords is None else [(at, misses[at]) for at in coords]
        return [(at, decodings[name]) for at, name in names if name in decodings]

    def fill(self, at: Coords, value: Any) -> None:
        """The shard is not there."""
        assert self._out is not None
        self._out[self.selections(at)[1]] = value

    def finish(self) -> None:
        """Say that all is there."""
        if self.scratch is not None:
            array = self.scratch
            if self._sel_shape is not None:
                array = array.reshape(self._sel_shape)
            scatter(self.output.target, self.item[3], array, ..., self.output.drop_axes)
        if self.is_absent:
            self.output.results[self.number] = MISSING
