"""What a user does with a store: read, write and read parts, with zarr and with xarray.

Both readers reduce what they read to digests, so that a pass over a large dataset is compared
with the truth without keeping two copies of it.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import xarray as xr
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zarr.abc.store import Store

__all__ = [
    "ArrayPlan",
    "Digests",
    "NoArraysError",
    "Plan",
    "Reader",
    "XarrayReader",
    "ZarrReader",
    "make_plan",
]

Selection = tuple[slice, ...]
"""One box of an array: a slice for each axis."""

Digests = dict[str, str]
"""Which read, and a digest of what it returned."""


@dataclass(frozen=True)
class ArrayPlan:
    """What is read and written of one array.

    Attributes
    ----------
    selection
        The part that a whole read takes: all of it, or its first rows where there is a limit.
    cell
        One chunk, or one inner chunk of a sharded array: what a write replaces.
    parts
        Boxes that a partial read takes; empty unless the array is sharded.
    """

    name: str
    selection: Selection
    cell: Selection
    parts: Sequence[Selection]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What the demo does with a node: `path` in the store, its format, and its arrays by name."""

    path: str
    zarr_format: Literal[2, 3]
    is_array: bool
    arrays: Mapping[str, ArrayPlan]

    @property
    def sharded(self) -> ArrayPlan | None:
        """The first sharded array, if there is one."""
        return next((array for array in self.arrays.values() if array.parts), None)

    @property
    def written(self) -> list[ArrayPlan]:
        """What the write phase changes: the largest chunked array, and the sharded one."""
        chunked = [array for array in self.arrays.values() if not array.parts]
        largest = max(chunked, key=lambda array: array.nbytes, default=None)
        return [array for array in (largest, self.sharded) if array is not None]


class NoArraysError(Exception):
    """There is nothing to read at a place; the text says what is there."""


class Reader(Protocol):
    """A library that reads and writes through a store."""

    name: str

    def read(self, store: Store, *, repeats: int = 1) -> Digests:
        """Open the node, read each array `repeats` times in a row, return digests of the values."""
        ...

    def new_cells(self, store: Store) -> dict[str, Any]:
        """Return values to write: each written cell of `store`, rolled along its last axis."""
        ...

    def write(self, store: Store, cells: Mapping[str, Any]) -> None:
        """Write `cells`, as `new_cells` returned them."""
        ...


def make_plan(source: Store, path: str, read_limit: int | None) -> Plan:
    """Look at the node at `path` and decide what is read.

    Parameters
    ----------
    source
        Where to look.
    path
        Slash-separated names from the root; empty for the root.
    read_limit
        Bytes of decoded values to read in one pass over all arrays; None reads everything.

    Raises
    ------
    NoArraysError
        If there is no node at `path`, or a group without arrays of its own.
    """
    zarr_format = _zarr_format(source, path)
    node = zarr.open(source, path=path, mode="r", zarr_format=zarr_format)
    if isinstance(node, zarr.Array):
        arrays = {path.rsplit("/", 1)[-1] or "array": node}
    else:
        arrays = dict(sorted(node.arrays()))
        if not arrays:
            groups = ", ".join(sorted(name for name, _ in node.groups())) or "none"
            raise NoArraysError(f"a group without an array of its own; groups in it: {groups}")
    # Each array gets an equal share, so that a small one behind a huge one is read too.
    share = None if read_limit is None else read_limit // len(arrays)
    return Plan(
        path,
        zarr_format,
        isinstance(node, zarr.Array),
        {name: _array_plan(name, array, share) for name, array in arrays.items()},
    )


def _zarr_format(source: Store, path: str) -> Literal[2, 3]:
    """Return the format of the node at `path`.

    It asks for one key after another. `zarr.open` asks for several at once, and if the source
    cannot be reached, the others are left behind and fail noisily when the process ends.
    """
    names: tuple[tuple[str, Literal[2, 3]], ...] = (
        ("zarr.json", 3),
        (".zgroup", 2),
        (".zarray", 2),
    )
    for name, zarr_format in names:
        key = f"{path}/{name}" if path else name
        if sync(source.get(key, default_buffer_prototype())) is not None:
            return zarr_format
    raise NoArraysError(f"no {', '.join(name for name, _ in names)} is there")


def _array_plan(name: str, array: zarr.Array[Any], limit: int | None) -> ArrayPlan:
    shape = array.shape
    rows = shape[0] if shape else 1
    if shape and limit is not None and array.nbytes > limit:
        # A whole number of rows of chunks, at least one: less would read the same chunks.
        row_bytes = max(1, array.nbytes // rows)
        step = (array.shards or array.chunks)[0]
        rows = min(rows, max(step, limit // row_bytes // step * step))
    selection = (slice(0, rows), *(slice(0, n) for n in shape[1:])) if shape else ()
    cell = tuple(
        slice(0, min(chunk, part.stop)) for chunk, part in zip(array.chunks, selection, strict=True)
    )
    nbytes = array.dtype.itemsize * math.prod(part.stop for part in selection)
    parts = _parts(selection, array.chunks) if array.shards is not None else ()
    return ArrayPlan(name, selection, cell, parts, nbytes)


def _parts(selection: Selection, chunks: Sequence[int]) -> list[Selection]:
    """Return five boxes along the diagonal and one that spans the first axis.

    A box is a little over half a chunk wide, so it lies across borders of inner chunks as often
    as not; the spanning one crosses every border of shards along its axis.
    """
    sizes = [part.stop for part in selection]
    parts: list[Selection] = []
    for position in (0.0, 0.2, 0.45, 0.7, 1.0):
        box = []
        for size, chunk in zip(sizes, chunks, strict=True):
            width = min(size, chunk // 2 + 1)
            start = round((size - width) * position)
            box.append(slice(start, start + width))
        parts.append(tuple(box))
    parts.append((slice(0, sizes[0]), *parts[2][1:]))
    return parts


def _digest(values: Any) -> str:
    """Return a digest of an array's type, shape and bytes; equal only for equal values."""
    array = np.asarray(values)
    # Objects and variable-length strings have no bytes of their own in the array.
    plain = array.dtype.kind not in "OT"
    data = np.ascontiguousarray(array).tobytes() if plain else repr(array.tolist()).encode()
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.blake2b(head + data, digest_size=16).hexdigest()


class ZarrReader:
    """Reads with `zarr.open` and indexing."""

    name = "zarr"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def _open(self, store: Store, mode: Any) -> dict[str, zarr.Array[Any]]:
        plan = self._plan
        # The format is stated, so that zarr does not ask for the keys of the other format, which
        # do not exist, each time: those are requests that no cache of values can save.
        if plan.is_array:
            array = zarr.open_array(store, path=plan.path, mode=mode, zarr_format=plan.zarr_format)
            return dict.fromkeys(plan.arrays, array)
        group = zarr.open_group(store, path=plan.path, mode=mode, zarr_format=plan.zarr_format)
        opened = {name: group[name] for name in plan.arrays}
        return {name: node for name, node in opened.items() if isinstance(node, zarr.Array)}

    def read(self, store: Store, *, repeats: int = 1) -> Digests:
        """Read each array; see `Reader.read`."""
        digests: Digests = {}
        for name, array in self._open(store, "r").items():
            selection = self._plan.arrays[name].selection
            for repeat in range(repeats):
                digests[f"{name}, read {repeat + 1}"] = _digest(array[selection])
        return digests

    def read_parts(self, store: Store) -> Digests:
        """Read the parts of the sharded array, one after another."""
        sharded = self._plan.sharded
        assert sharded is not None
        array = self._open(store, "r")[sharded.name]
        return {f"{sharded.name}{_text(part)}": _digest(array[part]) for part in sharded.parts}

    def new_cells(self, store: Store) -> dict[str, Any]:
        """Return rolled cells; see `Reader.new_cells`."""
        arrays = self._open(store, "r")
        return {
            array.name: np.roll(np.asarray(arrays[array.name][array.cell]), 1, axis=-1)
            for array in self._plan.written
        }

    def write(self, store: Store, cells: Mapping[str, Any]) -> None:
        """Write cells; see `Reader.write`."""
        arrays = self._open(store, "r+")
        for name, values in cells.items():
            arrays[name][self._plan.arrays[name].cell] = values


class XarrayReader:
    """Reads with `xarray.open_dataset`, which decodes scales, fill values and times."""

    name = "xarray"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def _open(self, store: Store) -> xr.Dataset:
        plan = self._plan
        with warnings.catch_warnings():
            # Not a fault of the store: a dataset without consolidated metadata opens more slowly.
            warnings.filterwarnings("ignore", message="Failed to open Zarr store with consolid")
            return xr.open_dataset(
                store,  # type: ignore[arg-type]  # xarray takes a zarr store, its types do not
                engine="zarr",
                group=plan.path or None,
                chunks=None,
                zarr_format=plan.zarr_format,
            )

    def unreadable(self, store: Store) -> str:
        """Return why xarray cannot read the node; empty if it can."""
        if self._plan.is_array:
            return "--path names an array, and xarray reads groups"
        try:
            with self._open(store) as dataset:
                known = [name for name in self._plan.arrays if name in dataset.variables]
        except Exception as error:  # noqa: BLE001 - whatever it is, zarr may still read the node
            return f"{type(error).__name__}: {error}"
        return "" if known else "it finds no variable in the group"

    def _selected(self, dataset: xr.Dataset, name: str, part: Selection) -> xr.DataArray:
        variable = dataset[name]
        return variable.isel(dict(zip(variable.dims, part, strict=True)))

    def read(self, store: Store, *, repeats: int = 1) -> Digests:
        """Read each variable; see `Reader.read`."""
        digests: Digests = {}
        with self._open(store) as dataset:
            for name, array in self._plan.arrays.items():
                if name not in dataset.variables:
                    continue
                for repeat in range(repeats):
                    values = self._selected(dataset, name, array.selection).copy().values
                    digests[f"{name}, read {repeat + 1}"] = _digest(values)
        return digests

    def new_cells(self, store: Store) -> dict[str, Any]:
        """Return rolled cells; see `Reader.new_cells`."""
        with self._open(store) as dataset:
            cells: dict[str, Any] = {}
            for array in self._plan.written:
                cell = self._selected(dataset, array.name, array.cell).load()
                cells[array.name] = cell.copy(data=np.roll(cell.values, 1, axis=-1))
        return cells

    def write(self, store: Store, cells: Mapping[str, Any]) -> None:
        """Write cells as regions; see `Reader.write`."""
        for name, cell in cells.items():
            part = self._plan.arrays[name].cell
            region = dict(zip(cell.dims, part, strict=True))
            dataset = cell.drop_vars(list(cell.coords)).to_dataset(name=name)
            with warnings.catch_warnings():
                # Packed integers have no value for NaN; there is no NaN in what is written here.
                warnings.filterwarnings("ignore", category=xr.SerializationWarning)
                dataset.to_zarr(
                    store,
                    group=self._plan.path or None,
                    region=region,
                    mode="r+",
                    zarr_format=self._plan.zarr_format,
                )


def _text(part: Selection) -> str:
    return "[" + ", ".join(f"{one.start}:{one.stop}" for one in part) + "]"
