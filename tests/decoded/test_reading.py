"""Reads through decoded chunks give what zarr gives, whatever is selected, and count what they came to."""

from __future__ import annotations

import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.core import codec_pipeline
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.registry import register_pipeline
from zarr.storage import MemoryStore

from zcache import CacheStore, DecodedCodecPipeline
from zcache._decoded import jobs, turns
from zcache._decoded.chunk import OVERHEAD
from zcache._decoded.jobs import COALESCES, InnerChunks, WantedElements
from zcache._decoded.layout import boxes_of, coords_in
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Iterator


class Elsewhere(BatchedCodecPipeline):
    """A pipeline of another package, which may write into the memory of its output."""


register_pipeline(Elsewhere)
HAS_FUSED = hasattr(codec_pipeline, "FusedCodecPipeline")
PIPELINES = {
    "batched": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "elsewhere": f"{Elsewhere.__module__}.Elsewhere",
}
if HAS_FUSED:
    PIPELINES["fused"] = "zarr.core.codec_pipeline.FusedCodecPipeline"


@pytest.fixture(params=sorted(PIPELINES))
def pipeline(request: pytest.FixtureRequest) -> Iterator[str]:
    with zarr.config.set({"codec_pipeline.path": PIPELINES[request.param]}):
        yield request.param


def decoded_store(size: int | str = "1MB", **options: Any) -> CacheStore:
    return CacheStore(MemoryStore(), decoded_size=size, **options)


def counts(store: CacheStore) -> tuple[int, int]:
    stats = store.cache_stats()
    return stats["decoded_hits"], stats["decoded_misses"]


def create(store: Any, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zarr.create_array(
            store, **{"shape": (17, 23), "chunks": (4, 5), "dtype": "i4", "fill_value": -1, **more}
        )


LAYOUTS: dict[str, dict[str, Any]] = {
    "format 3": {},
    "format 2 in order F": {"zarr_format": 2, "order": "F"},
    "shards": {"shards": (8, 10)},
    "big-endian": {"dtype": ">i4"},
    "uncompressed": {"compressors": None},
    "uncompressed shards": {"shards": (8, 10), "compressors": None},
    "transposed": {"filters": [zarr.codecs.TransposeCodec(order=(1, 0))]},
    "floats": {"dtype": "f8", "fill_value": "NaN", "shards": (8, 10)},
    "times": {"dtype": "M8[s]", "fill_value": 0},
    "one chunk": {"chunks": (17, 23)},
    "shards with an index at the start": {
        "chunks": (8, 10),
        "serializer": zarr.codecs.ShardingCodec(
            chunk_shape=(4, 5), index_codecs=[zarr.codecs.BytesCodec()], index_location="start"
        ),
        "compressors": None,
    },
    "shards in shards": {
        "chunks": (8, 10),
        "serializer": zarr.codecs.ShardingCodec(
            chunk_shape=(4, 10), codecs=[zarr.codecs.ShardingCodec(chunk_shape=(2, 5))]
        ),
        "compressors": None,
    },
}


def selections(rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """Ways to index, and what."""
    i, j = rng.integers(0, 17, 2), rng.integers(0, 23, 2)
    yield "[]", (slice(min(i), max(i) + 1, int(rng.integers(1, 3))), slice(min(j), max(j) + 1))
    yield "[]", (int(i[0]), slice(None))
    yield "[]", (int(i[0]), int(j[0]))
    yield "[]", ...
    yield "oindex", ([1, 5, 9], slice(None))
    yield "oindex", ([1, 5, 9], [2, 3, 8, 20])
    yield "oindex", (int(i[0]), [2, 8, 20])
    yield "oindex", (slice(2, 9), rng.random(23) < 0.3)
    yield "vindex", ([1, 5, 9, 1], [2, 3, 8, 22])
    yield "vindex", rng.random((17, 23)) < 0.2
    yield "blocks", (slice(0, 1), 0)


def take(array: Any, how: str, what: Any) -> Any:
    return array[what] if how == "[]" else getattr(array, how)[what]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_of_any_selection_gives_what_zarr_gives(pipeline: str, layout: str) -> None:
    store = decoded_store()
    array = create(store, **LAYOUTS[layout])
    rng = np.random.default_rng(0)
    values = np.arange(17 * 23).reshape(17, 23).astype(array.dtype)
    values[3:9, 4:16] = array.fill_value  # Some chunks are not there.
    array[:] = values
    bare = zarr.open_array(store._store)
    assert isinstance(array._async_array.codec_pipeline, DecodedCodecPipeline)
    assert not isinstance(bare._async_array.codec_pipeline, DecodedCodecPipeline)
    for _ in range(3):
        for how, what in selections(rng):
            np.testing.assert_array_equal(take(array, how, what), take(bare, how, what))
        at = rng.integers(0, 17)
        array[at] = values[at] = rng.integers(0, 9, 23)
        np.testing.assert_array_equal(array[:], values)
    before = counts(store)
    array[:9], array[9:]
    hits, misses = np.subtract(counts(store), before)
    assert hits > misses
    check(store)


def any_selection(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[str, Any, Any]:
    """A way to index, what is selected, and the same for numpy; arrays may lie beside slices and integers."""
    how = str(rng.choice(["[]", "vindex", "mask", "blocks", *["oindex"] * 6]))
    if how == "mask":
        mask = rng.random(shape) < rng.choice([0.1, 0.9])
        return "vindex", mask, mask
    if how == "vindex":
        at = tuple(rng.integers(0, n, 7) for n in shape)
        return how, at, at
    if how == "blocks":
        what = tuple(slice(b := int(rng.integers(0, 2)), b + 1) for _ in shape)
        return how, what, None
    what, expected = [], []
    for n in shape:
        low, high = sorted(int(k) for k in rng.integers(0, n + 1, 2))
        kind = rng.choice(
            ["slice", "all", "all", "step", "integer", "indices", "unsorted", "mask", "ones"]
        )
        if how == "[]" and kind in ("indices", "unsorted", "mask", "ones"):
            kind = "slice"
        one: Any = {
            "slice": slice(low, high),
            "all": slice(None),
            "step": slice(low, high, 2),
            "integer": int(rng.integers(0, n)),
            "indices": np.unique(rng.integers(0, n, 6)),
            "unsorted": rng.integers(0, n, 6),
            "mask": rng.random(n) < 0.4,
            "ones": np.ones(n, bool),
        }[kind]
        what.append(one)
        expected.append(one)
    return how, tuple(what), expected


def taken_by_numpy(values: Any, how: str, what: Any, expected: Any, blocks: tuple[int, ...]) -> Any:
    if how == "vindex":
        return values[expected]
    if how == "blocks":
        expected = [slice(b.start * n, b.stop * n) for b, n in zip(what, blocks, strict=True)]
    # One axis after the other; from the last on, because integers drop theirs.
    for axis in reversed(range(values.ndim)):
        values = values[(*[slice(None)] * axis, expected[axis])]
    return values


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "kind", ["chunks", "shards", "by elements", "in halves", "in turns", "in turns without room"]
)
def test_read_of_any_selection_gives_what_numpy_gives_however_much_is_kept(
    pipeline: str, monkeypatch: pytest.MonkeyPatch, kind: str, order: Any
) -> None:
    is_sharded = kind != "chunks"
    # An inner chunk takes more than the elements of it that are wanted.
    decoded_size = {"in turns": 8 * (OVERHEAD + 100), "in turns without room": 0}.get(kind, 10**6)
    if kind.startswith("in turns"):
        monkeypatch.setattr(jobs, "PER_INDEX", 0)
        monkeypatch.setattr(turns, "limit_of", lambda *_: 100)
    elif is_sharded and kind != "shards":
        monkeypatch.setattr(jobs, "MOST_BOXES", 1)
        monkeypatch.setattr(jobs, "FEW_ELEMENTS", 0)
        monkeypatch.setattr(jobs, "MOST_ELEMENTS", 100 if kind == "by elements" else 0)
    rng = np.random.default_rng(18)
    for shape, chunks, shards in [
        ((13,), (2,), (6,)),
        ((16, 16), (4, 4), (8, 8)),
        ((9, 11, 7), (2, 3, 2), (4, 6, 4)),
    ]:
        source = MemoryStore()
        sizes: Any = {"chunks": chunks, "shards": shards if is_sharded else None}
        values = np.arange(1, 1 + np.prod(shape), dtype="i4").reshape(shape)
        values[: chunks[0]] = -1  # Some chunks are not there.
        create(source, shape=shape, **sizes)[:] = values
        for _ in range(20):
            with zarr.config.set({"array.order": order}):
                array: Any = zarr.open_array(
                    CacheStore(source, decoded_size=decoded_size), mode="r"
                )
            assert array.order == order
            for _ in range(int(rng.integers(0, 3))):  # cold, or warm in part
                array[tuple(int(n) for n in rng.integers(0, shape))]
            # Each of them keeps more.
            for _ in range(2):
                how, what, expected = any_selection(rng, shape)
                wanted = taken_by_numpy(
                    values, how, what, expected, shards if is_sharded else chunks
                )
                found = take(array, how, what)
                np.testing.assert_array_equal(found, wanted, f"{how}[{what}]")
            check(array.store)


def check(store: CacheStore) -> None:
    """Assert that the books of decoded chunks are those of what is kept."""
    cache: Any = store._decoded
    cache._index.validate()
    assert cache._index.in_flight == (0, 0)
    kept = cache._values.values()
    assert (
        sum(k.array.nbytes + OVERHEAD for k in kept if k.memory is not None)
        == cache._index.current_size
    )
    assert not any(k.pins or k.array.flags.writeable for k in kept)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "fill", "kept"),
    [
        ("i2", 0, True),
        ("c16", 0, True),
        ("S7", b"", True),
        ("U5", "", True),
        (np.dtype([("a", "i4"), ("b", ">f8")]), None, True),
        ("bool", False, True),
        (str, "", False),
    ],
)
def test_read_of_any_type_gives_what_was_written(
    pipeline: str, dtype: Any, fill: Any, kept: bool, zarr_format: int
) -> None:
    store = decoded_store()
    if isinstance(dtype, np.dtype) and zarr_format == 3:
        fill = np.zeros((), dtype)[()]
    array = create(
        store, shape=(10,), chunks=(4,), dtype=dtype, zarr_format=zarr_format, fill_value=fill
    )
    if isinstance(dtype, np.dtype):
        values = np.array([(n, n / 3) for n in range(10)], dtype=dtype)
    elif dtype is str:
        values = np.array([f"text {n}" * n for n in range(10)], dtype=object)
    else:
        values = np.arange(10).astype(dtype)
    array[:] = values
    for _ in range(2):
        np.testing.assert_array_equal(array[1:9], values[1:9])
    assert counts(store) == ((3, 3) if kept else (0, 0))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_read_of_an_array_without_axes(pipeline: str, zarr_format: int) -> None:
    store = decoded_store()
    array = create(store, shape=(), chunks=(), zarr_format=zarr_format)
    assert array[()] == -1
    array[()] = 7
    assert [array[()], array[...]] == [7, 7]
    assert counts(store) == (1, 2)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["S5", "U5", ">i4", ">M8[s]"])
def test_array_without_axes_is_kept_whatever_its_type(
    pipeline: str, dtype: str, zarr_format: int
) -> None:
    store = decoded_store()
    options = {"dtype": dtype, "fill_value": None, "zarr_format": zarr_format}
    array = create(store, shape=(), chunks=(), **options)
    value = np.array(7, "i4").astype(dtype)
    for _ in range(2):
        array[()] = value
        assert [array[()], array[()]] == [value, value]
    assert counts(store) == (2, 2)


@pytest.mark.skipif(not hasattr(zarr.config, "get") or not HAS_FUSED, reason="since zarr 3.4")
def test_read_of_chunks_of_many_sizes(pipeline: str) -> None:
    store = decoded_store()
    with zarr.config.set({"array.rectilinear_chunks": True}):
        array = create(store, shape=(10,), chunks=[[3, 5, 2]])
        array[:] = np.arange(10)
        for _ in range(2):
            np.testing.assert_array_equal(array[1:9], np.arange(1, 9))
    assert counts(store) == (3, 3)


def test_chunks_that_are_not_there_take_no_memory(pipeline: str) -> None:
    store = decoded_store()
    whole = create(store, name="whole")
    shards = create(store, name="shards", shards=(8, 10))
    for array in (whole, shards):
        for _ in range(2):
            assert (array[:] == -1).all()
    assert store.cache_stats()["decoded_size"] == 0
    # In a shard that is there, what is not in it is known as well.
    shards[0, 0] = 1
    for _ in range(2):
        assert (shards[:8, :10] == -1).sum() == 79
    assert store.cache_stats()["decoded_size"] == 4 * 5 * 4 + OVERHEAD
    assert store.cache_stats()["decoded_hits"] == 4


@pytest.mark.skipif(not HAS_FUSED, reason="since zarr 3.4")
@pytest.mark.parametrize("more", [{}, {"shards": (8, 10)}])
def test_chunk_that_is_missing_is_an_error_where_zarr_is_asked_for_one(
    pipeline: str, more: dict[str, Any]
) -> None:
    store = decoded_store()
    array = create(store, config={"read_missing_chunks": False}, **more)
    array[:8, :10] = 1
    for _ in range(2):
        assert (array[:8, :10] == 1).all()
        with pytest.raises(zarr.errors.ChunkNotFoundError):
            array[:]


def test_zeros_of_either_sign_are_kept_apart() -> None:
    store = decoded_store()
    array = create(store, shape=(4,), chunks=(2,), shards=(4,), dtype="f4", fill_value=0.0)
    array[:] = np.array([-0.0, -0.0, 1.0, 1.0])
    for _ in range(2):
        assert np.signbit(array[:2]).all()


def test_what_a_user_gets_is_a_copy(pipeline: str) -> None:
    store = decoded_store()
    array = create(store, compressors=None, chunks=(17, 23))
    values = np.arange(17 * 23, dtype="i4").reshape(17, 23)
    array[:] = values
    values[:] = 0
    first = array[:]
    first[:] = 5
    np.testing.assert_array_equal(array[:], np.arange(17 * 23).reshape(17, 23))


@pytest.mark.parametrize("kind", ["buffer", "nd_buffer"])
def test_buffers_of_another_kind_pass_through(kind: str) -> None:
    from zarr.core.buffer import BufferPrototype, cpu

    class OtherBuffer(cpu.Buffer):
        pass

    class OtherNDBuffer(cpu.NDBuffer):
        pass

    store = decoded_store()
    array = create(store)
    array[:] = 3
    other = BufferPrototype(
        buffer=OtherBuffer if kind == "buffer" else cpu.Buffer,
        nd_buffer=OtherNDBuffer if kind == "nd_buffer" else cpu.NDBuffer,
    )
    for _ in range(2):
        assert (array.get_basic_selection(..., prototype=other) == 3).all()
    assert counts(store) == (0, 0)
    # Other reads of the array are kept all the same.
    for _ in range(2):
        assert (array[:] == 3).all()
    hits, misses = counts(store)
    assert hits == misses > 0


@pytest.mark.parametrize("most", [16, 0], ids=["small", "large"])
def test_much_that_is_missing_of_a_shard_takes_few_requests(
    pipeline: str, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(jobs, "MOST_ELEMENTS", most)
    source = StoreDouble(MemoryStore())
    values = np.arange(1, 1 + 64 * 64, dtype="i4").reshape(64, 64)
    values[20:24] = -1  # Some chunks are not there.
    create(source, shape=values.shape, chunks=(4, 4), shards=values.shape)[:] = values
    at = np.array([(i, j) for i in range(0, 64, 4) for j in range(0, 64, 4) if (i + j) % 8])

    def requests() -> int:
        return sum("c/" in request.key for request in source.requests)

    for is_cached in (True, False):
        store = CacheStore(source, max_size=None if is_cached else 0, decoded_size="1MB")
        array = zarr.open_array(store, mode="r")
        before = requests()
        i, j = at[:: 1 if is_cached else 3].T
        np.testing.assert_array_equal(array.vindex[i, j], values[i, j])
        if most and jobs.COALESCES:
            assert requests() - before <= 2
        for _ in range(2):
            before, kept = requests(), counts(store)
            np.testing.assert_array_equal(array[:], values)
            assert requests() - before <= 4
        # All that was there is kept now, also what was before.
        assert counts(store)[1] == kept[1]
        check(store)


def test_missing_chunks_are_decoded_in_one_call() -> None:
    calls: list[int] = []

    class Counting(BatchedCodecPipeline):
        async def read(self, batch_info: Any, out: Any, drop_axes: Any = ()) -> Any:
            batch = list(batch_info)
            calls.append(len(batch))
            return await super().read(batch, out, drop_axes)

    store = decoded_store()
    array = create(store, shards=(8, 10))
    array[:] = 5
    inner = array._async_array.codec_pipeline
    inner.wrapped = Counting(**{k: getattr(inner.wrapped, k) for k in inner.wrapped.__dict__})
    array[2, 3]
    array[:16, :20]  # of four shards, in one of which an inner chunk is kept
    # Of the shards by boxes and the one by elements, at once; or, before zarr 3.3, by two boxes.
    asked = [1, 1, 3] if COALESCES else [1, 5]
    assert calls == asked
    array[:16, :20]
    assert calls == asked


SPARSE: dict[str, tuple[dict[str, Any], Any]] = {
    "series": (
        {"shape": (64, 2**13), "chunks": (1, 2**13), "shards": (64, 2**13), "dtype": "f8"},
        np.s_[:, 7],
    ),
    "steps": (
        {"shape": (64, 2**13), "chunks": (1, 2**13), "shards": (16, 2**13), "dtype": "f8"},
        np.s_[::2, 7],
    ),
    "grid": (
        {"shape": (64, 64, 64), "chunks": (4, 8, 8), "shards": (64, 64, 64), "dtype": "u1"},
        np.s_[::8, ::16, ::16],
    ),
}


@pytest.mark.parametrize("sparse", SPARSE)
def test_read_of_a_little_of_many_chunks_takes_little_memory(
    pipeline: str, monkeypatch: pytest.MonkeyPatch, sparse: str
) -> None:
    monkeypatch.setattr(turns, "LEAST", 2**17)
    options, what = SPARSE[sparse]
    shape = options["shape"]
    source = MemoryStore()
    values = np.arange(1, 1 + np.prod(shape)).reshape(shape).astype(options["dtype"])
    create(source, **options, fill_value=0)[:] = values

    def peak_of(array: Any) -> int:
        tracemalloc.start()
        try:
            np.testing.assert_array_equal(array[what], values[what])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # How much zarr decodes at once is not the matter here, only what comes to it.
    with zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1}):
        bare = peak_of(zarr.open_array(source, mode="r"))
        for kept in (0, 2**18):
            store = CacheStore(source, decoded_size=kept)
            array = zarr.open_array(store, mode="r")
            for _ in range(3):
                assert peak_of(array) < bare + kept + 6 * 2**17
                check(store)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The jobs of each call of the wrapped pipeline."""
    seen: list[list[Any]] = []
    of = turns.Turns.of

    def noted(self: turns.Turns, *parts: Any) -> Iterator[list[Any]]:
        for call in of(self, *parts):
            seen.append(call)
            yield call

    monkeypatch.setattr(turns.Turns, "of", noted)
    return seen


@pytest.mark.parametrize("how", ["oindex", "vindex"])
def test_read_of_more_of_one_chunk_than_of_others_takes_what_it_may(
    pipeline: str, monkeypatch: pytest.MonkeyPatch, calls: list[list[Any]], how: str
) -> None:
    limit = 3 * 2**16
    monkeypatch.setattr(turns, "limit_of", lambda *_: limit)
    source = MemoryStore()
    shape = (2**10, 2**10)
    values = np.random.default_rng(0).integers(1, 256, shape, "u1")
    options: dict[str, Any] = {"dtype": "u1", "fill_value": 0}
    create(source, shape=shape, chunks=(2**7, 2**7), shards=shape, **options)[:] = values
    array = zarr.open_array(CacheStore(source, decoded_size=2**15), mode="r")
    # All of the last inner chunk; a row, a column or an element of the others.
    at = np.concatenate([np.arange(7) * 2**7, np.arange(7 * 2**7, 2**10)])
    what = (at, at) if how == "oindex" else (at[:, None], at)
    np.testing.assert_array_equal(take(array, how, what), values[np.ix_(at, at)])
    elements = [job for call in calls for job in call if isinstance(job, WantedElements)]
    assert elements
    for job in elements:
        assert sum(index.nbytes for index in job.selection) < job.cost
    assert all(sum(job.cost for job in call) <= limit for call in calls)
    # One for what is decoded in whole, and one for the others: each of these takes little.
    assert len(calls) == 2
    check(array.store)


def test_room_is_promised_until_what_it_is_for_is_there(
    pipeline: str, monkeypatch: pytest.MonkeyPatch, calls: list[list[Any]]
) -> None:
    size = 2**12
    monkeypatch.setattr(turns, "limit_of", lambda *_: 2 * size)
    values = np.random.default_rng(0).integers(1, 256, (10, size), "u1")
    source = MemoryStore()
    options: dict[str, Any] = {"dtype": "u1", "fill_value": 0}
    create(source, shape=values.shape, chunks=(1, size), shards=(5, size), **options)[:] = values
    array = zarr.open_array(CacheStore(source, decoded_size=4 * (size + OVERHEAD)), mode="r")
    # Of the first shard all four fit, in two calls; of the second one none does.
    rows = [0, 1, 2, 3, 5, 6, 7, 8]
    np.testing.assert_array_equal(array.oindex[rows, [7]], values[rows, 7:8])
    whole = [job for call in calls for job in call if type(job) is InnerChunks]
    assert sum(job.cost for job in whole) == 4 * size
    check(array.store)
    hits = counts(array.store)[0]
    np.testing.assert_array_equal(array[:4, 7], values[:4, 7])
    assert counts(array.store)[0] - hits == 4


@pytest.mark.parametrize("expires", [False, True])
def test_shard_that_is_read_in_turns_is_read_once(
    pipeline: str, monkeypatch: pytest.MonkeyPatch, expires: bool
) -> None:
    monkeypatch.setattr(turns, "LEAST", 2**12)
    values = np.arange(1, 1 + 64 * 512, dtype="i4").reshape(64, 512)
    source = StoreDouble(MemoryStore())
    create(source, shape=values.shape, chunks=(1, 512), shards=values.shape)[:] = values
    ages = {"max_age_seconds": 60} if expires else {}
    store = CacheStore(source, max_size=0, decoded_size=16 * (2048 + OVERHEAD), **ages)
    array = zarr.open_array(store, mode="r")
    before = sum("c/" in request.key for request in source.requests)
    np.testing.assert_array_equal(array[:, 7], values[:, 7])
    assert sum("c/" in request.key for request in source.requests) == before + 1
    check(store)
    hits = counts(store)[0]
    np.testing.assert_array_equal(array[:, 7], values[:, 7])
    assert expires or counts(store)[0] - hits == 16


def test_shard_that_is_not_there_is_asked_for_once(
    pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LEAST", 2**12)
    source = StoreDouble(MemoryStore())
    create(source, shape=(64, 512), chunks=(1, 512), shards=(64, 512))
    store = CacheStore(source, max_size=0, decoded_size=16 * (2048 + OVERHEAD), cache_missing=False)
    array = zarr.open_array(store, mode="r")
    before = sum("c/" in request.key for request in source.requests)
    assert (array[:, 7] == -1).all()
    assert sum("c/" in request.key for request in source.requests) == before + 1
    check(store)


def test_readers_of_a_little_of_the_same_chunks_at_once_all_get_it(
    pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "limit_of", lambda *_: 600)
    values = np.arange(1, 1 + 48 * 48, dtype="i4").reshape(48, 48)
    source = MemoryStore()
    create(source, shape=values.shape, chunks=(6, 6), shards=(24, 24))[:] = values
    store = CacheStore(source, decoded_size=20 * (144 + OVERHEAD))
    array = zarr.open_array(store, mode="r")

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            i, j = (int(n) for n in rng.integers(0, 6, 2))
            what = np.s_[i::6, j] if rng.random() < 0.5 else np.s_[i, j::6]
            np.testing.assert_array_equal(array[what], values[what])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))
    check(store)


def test_boxes_hold_what_they_are_made_of_and_no_more() -> None:
    rng = np.random.default_rng(0)
    for shape in [(), (9,), (5, 4), (3, 4, 3)]:
        for density in (0.3, 0.8, 1.0):
            wanted = [at for at in np.ndindex(*shape) if rng.random() < density]
            boxes = boxes_of(wanted)
            assert sorted(at for box in boxes for at in coords_in(box)) == wanted
            assert density < 1 or len(boxes) == 1
