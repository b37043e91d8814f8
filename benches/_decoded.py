"""Decoded chunks: what a repeated read costs beside a copy, and what they cost where nothing is read again.

Beside the aims stand the same reads without decoded chunks, from a bare `MemoryStore`, and, where they are installed, through
the pipeline of `zarrs` and by `tensorstore` with its cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.dtype import UInt8
from zarr.storage import LocalStore, MemoryStore, StorePath

from _measure import Row, interleave
from _setup import PIPELINES, pipelines
from zcache import CacheStore, DecodedCodecPipeline
from zcache._decoded.outputs import Outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from _measure import Times, Work
    from _setup import Scale

ERA_INTERIM = Path(__file__).resolve().parents[2] / "shared" / "data" / "era_interim.zarr"
ZARRS = "zarrs.ZarrsCodecPipeline"
ROUND = 8
"""Selections that one round reads: less, and what a round costs by itself counts."""


def rows(scale: Scale) -> list[Row]:
    """All that issue and docs/decoded.md speak of."""
    found = []
    for name in pipelines():
        with zarr.config.set({"codec_pipeline.path": PIPELINES[name]}):
            found += [
                *_slices(scale, name),
                *_patches(scale, name),
                *_points(scale, name),
                *_no_reuse(scale, name),
                _small(scale, name),
            ]
    return [*found, *_each_chunk(scale), _memory(scale)]


def _values(shape: tuple[int, ...]) -> Any:
    """Numbers that compress to about a third, as measurements do."""
    return np.round(np.random.default_rng(0).standard_normal(shape), 2).astype("f4")


def _filled(store: Any, values: Any, **more: Any) -> Any:
    array = zarr.create_array(store, shape=values.shape, dtype=values.dtype, **more)
    array[:] = values
    return array


def _opened(source: Any, size: int | str = "2 GiB") -> dict[str, Any]:
    """The same array with decoded chunks, without, and from the source itself."""
    stores = {
        "zcache": CacheStore(source, source_id="bench", decoded_size=size),
        "encoded": CacheStore(source, source_id="bench"),
        "memory": source,
    }
    return {name: zarr.open_array(store, mode="r") for name, store in stores.items()}


def _reads(read: Callable[[Any], object], selections: Sequence[Any]) -> Work:
    """Some selections in each round, on and on."""
    those = itertools.cycle(selections)

    async def work() -> int:
        for selection in itertools.islice(those, ROUND):
            read(selection)
        return ROUND

    return work


def _compare(contestants: dict[str, Work], rounds: int) -> Times:
    return asyncio.run(interleave(contestants, rounds, quiet=False))


def _beside(times: Times, others: Sequence[str], to: str = "bare") -> str:
    """How the others compare with the bare operation, for a note."""
    known = [(name, times.ratio(name, to)) for name in others]
    return "; ".join(f"{name} {ratio:.3g}" for name, ratio in known if ratio is not None)


class _Nothing:
    """A pipeline that does nothing: what is left is what zarr needs for a read."""

    async def read(self, batch_info: Any, out: Any, drop_axes: Any = ()) -> Any:
        return ({"status": "present"},) * len(list(batch_info))


class _Copies(_Nothing):
    """A pipeline that copies from chunks in a dict: zarr's own part, and the copies.

    With `outputs`, into memory that earlier outputs have left, as zcache does.
    """

    def __init__(
        self, values: Any, chunks: tuple[int, int], outputs: Outputs | None = None
    ) -> None:
        self._outputs = outputs
        rows, columns = chunks
        self._chunks = {
            f"c/{i}/{j}": values[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].copy()
            for i in range(values.shape[0] // rows)
            for j in range(values.shape[1] // columns)
        }

    async def read(self, batch_info: Any, out: Any, drop_axes: Any = ()) -> Any:
        batch = list(batch_info)
        outputs = self._outputs
        target = out.as_numpy_array() if outputs is None else outputs.renew(out, batch)
        for getter, _, selection, place, _ in batch:
            target[place] = self._chunks[getter.path][selection]
        return await super().read(batch, out)


def _with_pipeline(source: Any, pipeline: Any) -> Any:
    array = zarr.open_array(source, mode="r")
    object.__setattr__(array._async_array, "codec_pipeline", pipeline)
    return array


def _slices(scale: Scale, pipeline: str) -> Iterator[Row]:
    chunks = (512, 1024)
    values = _values((4096, 4096))
    source = MemoryStore()
    _filled(source, values, chunks=chunks)
    floor = {
        "zarr and the copies alone": _with_pipeline(source, _Copies(values, chunks)),
        "the same into memory used again": _with_pipeline(
            source, _Copies(values, chunks, Outputs(2**31))
        ),
    }
    with _others(values, chunks) as more:
        arrays = {**_opened(source), **more}
        for array in arrays.values():
            array[:]
        for side, others in ((1024, arrays), (2048, {"zcache": arrays["zcache"]})):
            parts = [np.s_[16 * n : 16 * n + side, 32 * n : 32 * n + side] for n in range(64)]
            read = {
                name: _reads(array.__getitem__, parts)
                for name, array in {**others, **floor}.items()
            }
            read["bare"] = _reads(lambda part: values[part].copy(), parts)
            times = _compare(read, scale.of(16, 2))
            note = _beside(times, [name for name in read if name not in ("zcache", "bare")])
            mebibytes = side * side // 2**18
            yield times.row(
                f"64 overlapping slices of {mebibytes} MiB / copies, {pipeline}", 2, note
            )


def _patches(scale: Scale, pipeline: str) -> Iterator[Row]:
    side = scale.of(256, 128)
    values = _values((side,) * 3)
    source = MemoryStore()
    _filled(source, values, chunks=(64, 64, 64))
    corners = np.random.default_rng(1).integers(0, side - 64, (64, 3))
    parts = [tuple(slice(n, n + 64) for n in map(int, corner)) for corner in corners]
    with _others(values, (64, 64, 64)) as more:
        arrays = {**_opened(source), **more}
        for array in arrays.values():
            array[:]
        contestants = {name: _reads(array.__getitem__, parts) for name, array in arrays.items()}
        contestants["bare"] = contestants.pop("encoded")
        times = _compare(contestants, scale.of(16, 2))
    note = _beside(times, ["memory", *more])
    yield times.row(f"random patches of 64³ / encoded hits, {pipeline}", 0.2, note)


def _points(scale: Scale, pipeline: str) -> Iterator[Row]:
    """Time series at a point, of all points one by one."""
    if not ERA_INTERIM.exists():
        return
    for name in ("u", "v"):
        store = LocalStore(ERA_INTERIM, read_only=True)
        arrays = {
            "zcache": CacheStore(store, decoded_size="2 GiB"),
            "bare": CacheStore(store),
        }
        opened = {key: zarr.open_array(at, path=name, mode="r") for key, at in arrays.items()}
        shape = opened["bare"].shape
        points = [
            (slice(None), slice(None), y, x)
            for y in range(0, shape[2], scale.of(1, 16))
            for x in range(0, shape[3], scale.of(1, 16))
        ]
        for array in opened.values():
            array[:]
        contestants = {key: _reads(array.__getitem__, points) for key, array in opened.items()}
        times = _compare(contestants, scale.of(40, 2))
        yield times.row(f"ERA-Interim `{name}` at a point / encoded hits, {pipeline}")


def _no_reuse(scale: Scale, pipeline: str) -> Iterator[Row]:
    """One pass of a new store over an array that is larger than its cache of decoded chunks."""
    side = scale.of(4096, 2048)
    values = _values((side, side))
    parts = [
        np.s_[row : row + 1024, column : column + 1024]
        for row in range(0, side, 1024)
        for column in range(0, side, 1024)
    ]
    for what, more in {
        "chunks of 2 MiB": {"chunks": (512, 1024)},
        "chunks of 256 KiB": {"chunks": (256, 256)},
        "inner chunks of 256 KiB": {"chunks": (256, 256), "shards": (1024, 1024)},
        "inner chunks of 16 KiB": {"chunks": (64, 64), "shards": (1024, 1024)},
    }.items():
        source = MemoryStore()
        _filled(source, values, **more)
        for times_larger in (4, 64):
            size = values.nbytes // times_larger
            times = _compare(
                {
                    "zcache": _pass(source, parts, size),
                    "bare": _pass(source, parts, None),
                },
                scale.of(12, 2),
            )
            what_of = f"one pass over {times_larger} times the cache, {what}"
            yield times.row(f"{what_of} / without, {pipeline}", 1.05)


def _pass(source: Any, parts: Sequence[Any], size: int | None) -> Work:
    async def work() -> int:
        store = CacheStore(source, source_id="bench", max_size=0, decoded_size=size)
        array = zarr.open_array(store, mode="r")
        for part in parts:
            array[part]
        return len(parts)

    return work


def _small(scale: Scale, pipeline: str) -> Row:
    source = MemoryStore()
    _filled(source, _values((100,)), chunks=(10,))
    array = _opened(source)["zcache"]
    nothing = _with_pipeline(source, _Nothing())
    array[:]
    contestants = {
        "zcache": _reads(array.__getitem__, [3]),
        "bare": _reads(nothing.__getitem__, [3]),
    }
    times = _compare(contestants, scale.of(400, 10))
    pairs = zip(times.seconds["zcache"], times.seconds["bare"], strict=True)
    more = sorted(one - other for one, other in pairs)
    return Row(
        f"decoded hit of a small chunk, beyond what zarr needs, {pipeline}",
        zcache=more[len(more) // 2],
        bare=times.median("bare"),
        aim=15e-6,
        disturbed=times.disturbed,
    )


class _Assigns:
    """A pipeline to which every chunk is the same, at once: what a read takes beside it is the wrapper's."""

    # As zarr's own, it only assigns to its output.
    __module__ = "zarr.core.codec_pipeline"

    def __init__(self, chunk: Any) -> None:
        self._chunk = cpu.NDBuffer(chunk)

    async def read(self, batch_info: Any, out: Any, drop_axes: Any = ()) -> Any:
        for _, _, selection, place, _ in batch_info:
            out[place] = self._chunk[selection]
        return ({"status": "present"},) * len(batch_info)


def _each_chunk(scale: Scale) -> Iterator[Row]:
    """What a chunk of a read of many costs beside its decode and its copy to the output, by what becomes of it."""
    count, size = 128, 1024
    spec = ArraySpec((size,), UInt8(), 0, ArrayConfig.from_dict({}), default_buffer_prototype())
    whole, numbers = (slice(0, size),), itertools.count()
    wrapped: Any = _Assigns(np.arange(size, dtype="u1"))
    out = cpu.NDBuffer(np.zeros(count * size, "u1"))

    def read(pipeline: Any, store: Any, *, anew: bool = True) -> Work:
        async def work() -> int:
            stem = f"a/c/{next(numbers) if anew else 'again'}"
            places = [(slice(n * size, (n + 1) * size),) for n in range(count)]
            await pipeline.read(
                [
                    (StorePath(store, f"{stem}/{n}"), spec, whole, places[n], True)
                    for n in range(count)
                ],
                out,
            )
            return count

        return work

    for what, limit, anew in (
        ("not kept", 2 * count * size, True),
        ("kept", 2**30, True),
        ("found", 2**30, False),
    ):
        store = CacheStore(MemoryStore(), max_size=0, decoded_size=limit)
        mine = read(DecodedCodecPipeline(wrapped, [BytesCodec()]), store, anew=anew)

        async def begin(mine: Work = mine) -> None:
            for _ in range(8):
                await mine()

        asyncio.run(begin())
        contestants = {"zcache": mine, "bare": read(wrapped, store)}
        times = asyncio.run(interleave(contestants, scale.of(400, 10)))
        pairs = zip(times.seconds["zcache"], times.seconds["bare"], strict=True)
        more = sorted(one - other for one, other in pairs)
        yield Row(
            f"each of 128 chunks of a read that is {what}, beyond zarr's assignment",
            zcache=more[len(more) // 2],
            bare=times.median("bare"),
            disturbed=times.disturbed,
        )


def _memory(scale: Scale) -> Row:
    """Resident memory above the start under a random load, by the bound."""
    bound = scale.of(2**30, 2**25)
    values = _values((2048, 2048))
    source = MemoryStore()
    group = zarr.create_group(source)
    # Twice as much as there is room for.
    count = 2 * bound // values.nbytes
    for n in range(count):
        group.create_array(f"a{n}", data=values, chunks=(256, 512))
    store = CacheStore(source, source_id="bench", max_size=0, decoded_size=bound)
    gc.collect()
    opened = [zarr.open_array(store, path=f"a{n}", mode="r") for n in range(count)]
    start, peak = _resident(), 0
    rng = np.random.default_rng(2)
    for _ in range(scale.of(3000, 300)):
        row, column = (int(n) for n in rng.integers(0, 1536, 2))
        opened[rng.integers(count)][row : row + 512, column : column + 512]
        peak = max(peak, _resident())
    assert store.cache_stats()["decoded_size"] > 0.9 * bound
    return Row(
        "resident memory above the start / bound", unit="", zcache=(peak - start) / bound, aim=1.1
    )


def _resident() -> int:
    with Path("/proc/self/statm").open() as statm:
        return int(statm.read().split()[1]) * 4096


@contextlib.contextmanager
def _others(values: Any, chunks: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The same array by others, from files, which both of them need."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        _filled(LocalStore(directory), values, chunks=chunks)
        if importlib.util.find_spec("zarrs"):
            with zarr.config.set({"codec_pipeline.path": ZARRS}):
                found["zarrs"] = zarr.open_array(directory, mode="r")
        if importlib.util.find_spec("tensorstore"):
            found["tensorstore"] = _TensorStore(directory)
        yield found


class _TensorStore:
    """An array of tensorstore, whose cache holds decoded chunks."""

    def __init__(self, directory: str) -> None:
        import tensorstore

        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": directory},
            "recheck_cached_data": False,
            "context": {"cache_pool": {"total_bytes_limit": 2**31}},
        }
        self._array = tensorstore.open(spec).result()

    def __getitem__(self, selection: Any) -> Any:
        return self._array[selection].read().result()
