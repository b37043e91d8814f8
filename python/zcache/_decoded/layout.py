"""How the chunks of an array are decoded, and which parts of them a selection takes."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from zarr.abc.codec import ArrayBytesCodecPartialDecodeMixin
from zarr.codecs import ShardingCodec
from zarr.core import chunk_grids
from zarr.core.buffer import cpu
from zarr.core.indexing import get_indexer

from zcache._decoded.identity import identity_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from zarr.abc.codec import Codec
    from zarr.core.array_spec import ArraySpec

Array: TypeAlias = "np.ndarray[Any, Any]"
Coords: TypeAlias = "tuple[int, ...]"
Box: TypeAlias = "tuple[Coords, Coords]"
"""First inner chunk, and the one after the last, along each axis."""

AxisPart: TypeAlias = "tuple[int, int | slice, slice | None]"
"""Along one axis: an inner chunk, what is wanted of it, and where that goes, None for an axis that is dropped."""

_SLICES: Final = frozenset({slice})


class Layout:
    """One way of decoding chunks.

    Parameters
    ----------
    codecs : sequence of Codec
        Of the array.
    spec : ArraySpec
        Of its chunks.
    runs : hashable
        The codecs and what runs them, see `identity_of` and `kind_of`: where these differ, the same bytes may be decoded to
        something else.

    Attributes
    ----------
    identity : hashable
        Differs where the same bytes would be decoded to something else.
    number : int
        Stands for `identity` in the names of chunks, which begin with it. It says how many coordinates end them, so
        each of them is of one key, whatever that looks like.
    shape : tuple of int
        Of the unit that is kept: a chunk, or an inner chunk.
    whole : tuple of slice
        All of it.
    size : int
        Bytes of it.
    inner : tuple of int or None
        Shape of the inner chunks, where these are the unit.
    count : int
        Of these units, in a chunk or shard.
    """

    def __init__(self, codecs: Sequence[Codec], spec: ArraySpec, runs: Hashable) -> None:
        dtype = spec.dtype.to_native_dtype()
        self.dtype = dtype
        shard = _sharding(codecs)
        self.inner: Coords | None = None if shard is None else shard.chunk_shape
        self.shape: Coords = spec.shape if self.inner is None else self.inner
        self.whole = tuple(slice(0, n) for n in self.shape)
        self.size = math.prod(self.shape) * dtype.itemsize
        self.number = 0
        self._shard: Coords = spec.shape
        units = zip(spec.shape, self.shape, strict=True)
        self.count = math.prod([-(-whole // max(n, 1)) for whole, n in units])
        self._grid: Any = None if self.inner is None else _grid(spec.shape, self.inner)
        fill = spec.fill_value
        self._fill = None if fill is None else np.asarray(fill, dtype=dtype).tobytes()
        kind = identity_of(spec.dtype)
        self.identity: Hashable = (runs, spec.shape, kind, dtype, self._fill, spec.config.order)

    def projections(self, spec: ArraySpec, selection: Any) -> Any:
        """The indexer of a selection in a shard."""
        return get_indexer(selection, shape=spec.shape, chunk_grid=self._grid)

    def axes_of(self, selection: Any) -> list[list[AxisPart]] | None:
        """The inner chunks of a block of a shard, along each axis, or of indices; None if it is neither."""
        inner = self.inner
        if inner is None or not isinstance(selection, tuple) or len(selection) != len(inner):
            return None
        axes: list[list[AxisPart]] = []
        for wanted, n, size in zip(selection, inner, self._shard, strict=True):
            if type(wanted) is not slice:
                if not isinstance(wanted, (int, np.integer)) or not 0 <= wanted < size:
                    return None
                at = int(wanted) // n
                axes.append([(at, int(wanted) - at * n, None)])
                continue
            start, stop, step = wanted.indices(size)
            if step != 1 or start >= stop:
                return None
            begin = start // n
            if stop <= (begin + 1) * n:
                within = slice(start - begin * n, stop - begin * n)
                axes.append([(begin, within, slice(0, stop - start))])
                continue
            parts: list[AxisPart] = []
            for at in range(begin, -(-stop // n)):
                first, last = max(start, at * n), min(stop, at * n + n)
                parts.append(
                    (at, slice(first - at * n, last - at * n), slice(first - start, last - start))
                )
            axes.append(parts)
        return axes

    def only_fill(self, array: Array) -> Array | None:
        """The same with one element in memory, if all are the fill value, bit for bit; else None."""
        # Most chunks are told by their first element, or their last: as arrays, for text as a scalar is as long as its value.
        n, fill = array.ndim, self._fill
        first: Any = (*[0] * n, ...)
        last: Any = (*[-1] * n, ...)
        if fill is None or array[first].tobytes() != fill or array[last].tobytes() != fill:
            return None
        unit = math.gcd(array.itemsize, 8)
        words = array.itemsize // unit
        if words == 1:
            bits = array.view(f"u{unit}")
            is_same = bits == bits.flat[0]
        else:
            # Each element is like the one before it.
            bits = array.ravel("K").view(f"u{unit}")
            is_same = bits[words:] == bits[:-words]
        if not is_same.all():
            return None
        # One in memory for all chunks.
        return np.broadcast_to(np.frombuffer(fill, array.dtype).reshape(()), array.shape)


def layout_of(codecs: Sequence[Codec], spec: ArraySpec, runs: Hashable) -> Layout | None:
    """The layout of chunks; None where they are not kept.

    That are chunks of another memory than the host's, of elements that lie elsewhere (objects, strings of any
    length), or of codecs that decode parts of a chunk by themselves and are not zarr's shards.
    """
    prototype = spec.prototype
    if prototype.nd_buffer is not cpu.NDBuffer or prototype.buffer is not cpu.Buffer:
        return None
    dtype = spec.dtype.to_native_dtype()
    if dtype.hasobject or dtype.kind == "T" or not dtype.itemsize:
        return None
    partly = [codec for codec in codecs if isinstance(codec, ArrayBytesCodecPartialDecodeMixin)]
    if len(codecs) == 1 and partly and _sharding(codecs) is None:
        return None
    try:
        return Layout(codecs, spec, runs)
    except Exception:  # noqa: BLE001 - what zarr has that is not known here is decoded as ever
        return None


def _sharding(codecs: Sequence[Codec]) -> ShardingCodec | None:
    """The codec of the shards, where inner chunks can be read by themselves."""
    codec = codecs[0] if len(codecs) == 1 else None
    return codec if type(codec) is ShardingCodec else None


def _grid(shape: Coords, inner: Coords) -> Any:
    grids: Any = chunk_grids
    if hasattr(grids, "RegularChunkGrid") and not hasattr(grids.ChunkGrid, "from_sizes"):
        return grids.RegularChunkGrid(chunk_shape=inner)  # zarr 3.1
    return grids.ChunkGrid.from_sizes(shape, inner)


def boxes_of(coords: Iterable[Coords]) -> list[Box]:
    """Boxes that hold these inner chunks and no others."""
    boxes = [(at, tuple(n + 1 for n in at)) for at in sorted(coords)]
    for axis in reversed(range(len(boxes[0][0]) if boxes else 0)):
        joined: dict[tuple[Coords, ...], Box] = {}
        merged: list[Box] = []

        def others(at: Coords, axis: int = axis) -> Coords:
            return at[:axis] + at[axis + 1 :]

        for first, last in sorted(boxes, key=lambda box: box[0][axis]):
            key = (others(first), others(last))
            before = joined.get(key)
            if before is not None and before[1][axis] == first[axis]:
                joined[key] = (before[0], last)
                continue
            if before is not None:
                merged.append(before)
            joined[key] = (first, last)
        boxes = [*merged, *joined.values()]
    return boxes


def coords_in(box: Box) -> Iterable[Coords]:
    """The inner chunks of a box."""
    return product(*(range(first, last) for first, last in zip(*box, strict=True)))


def size_of(box: Box) -> int:
    """How many inner chunks a box holds."""
    return math.prod(last - first for first, last in zip(*box, strict=True))


def box_around(coords: Sequence[Coords]) -> Box:
    """The least box that holds these inner chunks."""
    axes = list(zip(*coords, strict=True))
    return tuple(map(min, axes)), tuple(max(axis) + 1 for axis in axes)


def halves_of(box: Box) -> list[Box]:
    """Two boxes that hold what this one holds."""
    first, last = box
    sizes = [stop - start for start, stop in zip(first, last, strict=True)]
    axis = sizes.index(max(sizes))
    middle = (first[axis] + last[axis]) // 2
    return [
        (first, (*last[:axis], middle, *last[axis + 1 :])),
        ((*first[:axis], middle, *first[axis + 1 :]), last),
    ]


def is_in(box: Box, at: Coords) -> bool:
    """Whether a box holds an inner chunk."""
    return all(first <= n < last for first, n, last in zip(box[0], at, box[1], strict=True))


def elements_of(coords: Sequence[Coords], inner: Coords) -> tuple[Array, ...]:
    """The indices of all elements of inner chunks, along each axis."""
    found = []
    for axis, (at, size) in enumerate(zip(zip(*coords, strict=True), inner, strict=True)):
        shape = [1] * len(inner)
        shape[axis] = size
        first = np.array(at).reshape(-1, *[1] * len(inner)) * size
        indices = first + np.arange(size).reshape(shape)
        found.append(np.broadcast_to(indices, (len(coords), *inner)).reshape(-1))
    return tuple(found)


def chunk_in(first: Coords, at: Coords, inner: Coords) -> tuple[slice, ...]:
    """Where an inner chunk lies in the elements of a box with this first one."""
    return tuple(
        [slice((n - m) * size, (n - m + 1) * size) for m, n, size in zip(first, at, inner)]  # noqa: B905 - of one length
    )


def slices_of(box: Box, inner: Coords) -> tuple[slice, ...]:
    """The elements of a box."""
    return tuple(
        slice(first * n, last * n) for first, last, n in zip(box[0], box[1], inner, strict=True)
    )


def shape_of(selection: Any, shape: Coords) -> Coords:
    """The shape of what is selected of an array of this one."""
    found: Coords = np.broadcast_to(np.empty((), "?"), shape)[selection].shape
    return found


def scatter(target: Array, place: Any, chunk: Array, selection: Any, drop: tuple[int, ...]) -> None:
    """Copy what is selected of a chunk into an array, as zarr does."""
    part = chunk[selection]
    if drop:
        part = np.squeeze(part, axis=drop)
    target[place] = part


def is_basic(place: Any) -> bool:
    """Whether this part of an array is a view of it."""
    return isinstance(place, tuple) and _SLICES.issuperset(map(type, place))


def is_tiled(shape: Coords, places: Sequence[Any]) -> bool:
    """Whether these parts of an array are blocks that make up all of it, in the order in which zarr reads them."""
    if not all(map(is_basic, places)):
        return False
    axes: list[list[slice]] = []
    stride = 1
    for axis in reversed(range(len(shape))):
        parts: list[slice] = []
        at = 0
        for place in places[::stride]:
            if at == shape[axis] or len(place) != len(shape):
                break
            part = place[axis]
            if part.start != at or part.step not in (None, 1):
                return False
            at = part.stop
            parts.append(part)
        if at != shape[axis]:
            return False
        axes.insert(0, parts)
        stride *= len(parts)
    return stride == len(places) and list(product(*axes)) == places
