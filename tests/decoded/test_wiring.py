"""Which arrays keep decoded chunks: those on a store with `decoded_size`, whatever is configured, and no others."""

from __future__ import annotations

import asyncio
import functools
import gc
import multiprocessing
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.core import codec_pipeline
from zarr.core.array import AsyncArray
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.registry import get_pipeline_class, register_pipeline
from zarr.storage import FsspecStore, LocalStore, LoggingStore, MemoryStore, WrapperStore

from agent import start_reader
from decoding import ROOM
from support import until
from zcache import CacheStore, DecodedCodecPipeline, with_decoded_cache
from zcache.exceptions import OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Configured(BatchedCodecPipeline):
    """What a user has configured."""


register_pipeline(Configured)
PATH = f"{Configured.__module__}.Configured"


def pipeline_of(array: Any) -> Any:
    return array._async_array.codec_pipeline


def create(store: Any, **more: Any) -> Any:
    array = zarr.create_array(store, shape=(8,), chunks=(4,), dtype="i4", **more)
    array[:] = np.arange(8)
    return array


def hits(array: Any) -> int:
    """Decoded hits of two reads of everything, by an array of two chunks."""
    before = array.store.cache_stats()["decoded_hits"]
    for _ in range(2):
        np.testing.assert_array_equal(array[:], np.arange(8))
    found: int = array.store.cache_stats()["decoded_hits"] - before
    return found


def test_option_alone_is_enough_and_other_stores_stay_as_they_are() -> None:
    path, kind = zarr.config.get("codec_pipeline.path"), get_pipeline_class()
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    assert hits(create(store)) == 2
    assert (zarr.config.get("codec_pipeline.path"), get_pipeline_class()) == (path, kind)
    for other in (MemoryStore(), CacheStore(MemoryStore())):
        assert type(pipeline_of(create(other))) is kind


@pytest.mark.parametrize("more", [{}, {"shards": (8,)}, {"zarr_format": 2}])
def test_array_has_one_token_of_dask_however_it_was_opened(more: dict[str, Any]) -> None:
    tokenize = pytest.importorskip("dask.base").tokenize
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    arrays = [create(store, **more), zarr.open_array(store, mode="r+")]
    arrays += pickle.loads(pickle.dumps(arrays))
    for _ in range(2):
        assert len({tokenize(pipeline_of(array)) for array in arrays}) == 1
        assert len({tokenize(array) for array in arrays[:2]}) == 1
        # What it keeps of its codecs makes no difference.
        assert hits(arrays[1]) > 0
    other = create(CacheStore(MemoryStore(), decoded_size="1MB"), compressors=None)
    assert tokenize(pipeline_of(other)) != tokenize(pipeline_of(arrays[0]))


class Forwarding(WrapperStore[Any]):
    """Shows what is below a prefix, and passes the attributes of what it wraps on."""

    def __init__(self, store: Any, prefix: str) -> None:
        super().__init__(store)
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._store, name)

    async def get(self, key: str, *args: Any, **more: Any) -> Any:
        return await self._store.get(self._prefix + key, *args, **more)


def test_wrapper_that_passes_attributes_on_is_no_cache_store() -> None:
    source = MemoryStore()
    for n, name in enumerate("xy"):
        create(source, name=f"{name}/a")[:] = n + 1
    store = CacheStore(source, decoded_size="1MB")
    for n, name in enumerate("xy"):
        array: Any = zarr.open_array(Forwarding(store, f"{name}/"), path="a", mode="r+")
        assert (array[:] == n + 1).all()


class Labelled(CacheStore):
    """Adds nothing to how values are read."""

    label = "mine"


class Renames:
    """Shows a part of its source."""

    prefix = ""

    async def get(self, key: str, *args: Any, **more: Any) -> Any:
        return await CacheStore.get(self, self.prefix + key, *args, **more)  # type: ignore[arg-type]

    async def set(self, key: str, *args: Any, **more: Any) -> None:
        await CacheStore.set(self, self.prefix + key, *args, **more)  # type: ignore[arg-type]


class Renaming(CacheStore):
    """The same, by methods of its own."""

    prefix = ""
    get = Renames.get
    set = Renames.set


class RenamingLabelled(Labelled, Renaming):
    """The same, by those of its second base."""


class RenamingMixed(Renames, CacheStore):
    """The same, by those of a mixin."""


class RenamingLater(CacheStore):
    """The same, by one that it is given afterwards."""

    prefix = ""


@pytest.mark.parametrize("kind", [Renaming, RenamingLabelled, RenamingMixed, RenamingLater])
def test_subclass_that_reads_in_another_way_keeps_no_decoded_chunks(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MemoryStore()
    create(source, name="x/a")
    assert hits(zarr.open_array(Labelled(source, decoded_size="1MB"), path="x/a")) == 2
    store = kind(source, decoded_size="1MB")
    if kind is RenamingLater:
        monkeypatch.setattr(kind, "get", Renames.get)
        monkeypatch.setattr(kind, "set", Renames.set)
    store.prefix = "x/"
    array: Any = zarr.open_array(store, path="a", mode="r+")
    assert hits(array) == 0
    array[2] = 7
    assert array[2] == 7


@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_pipeline_that_is_configured_is_wrapped(when: str) -> None:
    with zarr.config.set({"codec_pipeline.path": PATH} if when == "before" else {}):
        store = CacheStore(MemoryStore(), decoded_size="1MB")
        create(store)
    with zarr.config.set({"codec_pipeline.path": PATH} if when != "never" else {}):
        array = zarr.open_array(store)
        assert (type(pipeline_of(array).wrapped) is Configured) == (when != "never")
        assert hits(array) == 2


def test_config_that_is_reset_makes_no_difference() -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    create(store)
    with zarr.config.set({}):
        zarr.config.reset()
        assert hits(zarr.open_array(store)) == 2


def test_pipeline_by_name_wraps_what_is_named() -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    named = {"codec_pipeline.path": "zcache.DecodedCodecPipeline"}
    with zarr.config.set(named):
        assert get_pipeline_class() is DecodedCodecPipeline
        array = create(store)
        assert type(pipeline_of(array).wrapped) is BatchedCodecPipeline
        assert hits(array) == 2
        # Elsewhere it does nothing.
        other = create(MemoryStore(), shards=(8,))
        np.testing.assert_array_equal(other[:], np.arange(8))
    with zarr.config.set({**named, "zcache.codec_pipeline": PATH}):
        array = zarr.open_array(store)
        assert type(pipeline_of(array).wrapped) is Configured
        assert hits(array) == 2
    for wrong in ("no.such.Class", "builtins.dict", ".x.Y", "", 5):
        with (
            zarr.config.set({**named, "zcache.codec_pipeline": wrong}),
            pytest.raises(OptionValueError, match=re.escape(repr(wrong))),
        ):
            zarr.open_array(store)


def multiplying(factor: int) -> type[BatchedCodecPipeline]:
    """A pipeline that decodes to other values; all of them have one name."""

    class Multiplying(BatchedCodecPipeline):
        async def decode_batch(self, chunks: Any) -> Any:
            found = []
            for one in await super().decode_batch(chunks):
                # Not the index of a shard, which is unsigned.
                is_value = one is not None and one.dtype.kind == "i"
                found.append(type(one)(factor * one.as_numpy_array()) if is_value else one)
            return found

    return Multiplying


@pytest.mark.parametrize("more", [{}, {"shards": (8,)}], ids=["chunks", "shards"])
def test_pipelines_that_may_decode_differently_share_no_chunks(more: dict[str, Any]) -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    create(store, **more)
    opened: list[Any] = []
    for factor in (1, -1, 2):
        kind = multiplying(factor)
        register_pipeline(kind)
        with zarr.config.set({"codec_pipeline.path": f"{kind.__module__}.{kind.__qualname__}"}):
            opened.append(zarr.open_array(store))
            before = store.cache_stats()["decoded_hits"]
            for _ in range(2):
                np.testing.assert_array_equal(opened[-1][:], factor * np.arange(8))
            assert store.cache_stats()["decoded_hits"] == before + 2
            np.testing.assert_array_equal(zarr.open_array(store._store)[:], factor * np.arange(8))
    # What is in shards, zarr decodes by the pipeline that is configured when it is read.
    for array, factor in zip(opened, (1, 1, 1) if more else (1, -1, 2), strict=True):
        np.testing.assert_array_equal(array[:], factor * np.arange(8))


def test_pipelines_of_zarr_share_their_chunks() -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    assert hits(create(store)) == 2
    for name in ("BatchedCodecPipeline", "FusedCodecPipeline"):
        if hasattr(codec_pipeline, name):
            with zarr.config.set({"codec_pipeline.path": f"{codec_pipeline.__name__}.{name}"}):
                array = zarr.open_array(store)
            before = store.cache_stats()["decoded_misses"]
            array[:]
            assert store.cache_stats()["decoded_misses"] == before


def test_array_equal_to_another_one() -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    array = create(store)
    other = zarr.open_array(store, mode="r+")
    assert array == other
    assert hash(pipeline_of(array)) == hash(pipeline_of(other))
    assert pipeline_of(array).batch_size == pipeline_of(array).wrapped.batch_size


def test_copies_share_their_chunks() -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    array = create(store)
    assert hits(array) == 2
    for copy in (
        pickle.loads(pickle.dumps(array)),
        zarr.open_array(store.with_read_only(True), mode="r"),
        zarr.open_array(pickle.loads(pickle.dumps(store))),
    ):
        assert hits(copy) == 4


def _in_worker(pickled: bytes) -> tuple[int, int]:
    array = pickle.loads(pickled)
    return hits(array), array.store.cache_stats()["decoded_size"]


@pytest.mark.slow
def test_worker_that_unpickles_keeps_chunks_of_its_own(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    store = CacheStore(source, cache_store=tmp_path / "cache", decoded_size="1MB")
    array = create(store)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for what in (array, with_decoded_cache(zarr.open_array(source), "1MB")):
            assert pool.apply(_in_worker, (pickle.dumps(what),)) == (2, 2 * ROOM)


KINDS = ["directory", "memory", "one array", "one array of a cache"]


def _array(kind: str, tmp_path: Path) -> Any:
    """An array with decoded chunks over a source that outlives it."""
    source = LocalStore(tmp_path / "source")
    if kind.startswith("one"):
        below = create(CacheStore(source) if kind.endswith("cache") else source)
        return with_decoded_cache(below, "1MB")
    cache_store = tmp_path / "cache" if kind == "directory" else MemoryStore()
    return create(CacheStore(source, cache_store=cache_store, decoded_size="1MB"))


@pytest.mark.parametrize("kind", KINDS)
def test_next_copy_finds_the_chunks_of_the_last_one(kind: str, tmp_path: Path) -> None:
    array = _array(kind, tmp_path)
    pickled = pickle.dumps(array)
    del array
    gc.collect()
    for expected in (2, 4, 4):
        copy = pickle.loads(pickled)
        assert hits(copy) == expected
        misses = copy.store.cache_stats()["misses"]
        del copy
        gc.collect()
    # Nor does it read a value once more that is cached in memory.
    copy = pickle.loads(pickled)
    copy[:]
    assert copy.store.cache_stats()["misses"] == misses


@pytest.mark.parametrize("kind", KINDS)
def test_next_copy_sees_what_was_written_while_there_was_none(kind: str, tmp_path: Path) -> None:
    array = _array(kind, tmp_path)
    pickled = pickle.dumps(array)
    source = LocalStore(tmp_path / "source")
    del array
    gc.collect()
    hits(pickle.loads(pickled))
    gc.collect()
    # By another store of this process, which the cache that is not in use must hear of.
    if kind == "directory":
        other = zarr.open_array(CacheStore(source, cache_store=tmp_path / "cache"))
    elif kind == "one array":
        other = with_decoded_cache(zarr.open_array(source), "1MB")
    else:
        other = pickle.loads(pickled)
    other[2] = 50
    del other
    gc.collect()
    assert pickle.loads(pickled)[2] == 50


@pytest.mark.parametrize("kind", KINDS)
def test_copy_that_is_sent_after_a_change_is_not_served_what_was_before(
    kind: str, tmp_path: Path
) -> None:
    array = _array(kind, tmp_path)
    values = list(range(8))
    ours, worker = start_reader()

    def ask() -> Any:
        ours.send_bytes(pickle.dumps(array))
        assert ours.poll(60)
        return ours.recv()

    assert ask() == (values, 0)
    assert ask() == (values, 2)
    array[2] = values[2] = 50
    assert ask()[0] == values
    assert ask() == (values, 2)
    if kind != "directory":
        # What others write around the cache is seen once it is told to forget.
        zarr.open_array(LocalStore(tmp_path / "source"))[2] = values[2] = 60
        array.store.invalidate_sync()
        assert ask()[0] == values
    ours.send_bytes(b"")
    worker.join(60)
    assert worker.exitcode == 0


def test_store_in_place_of_one_that_nobody_has_goes_by_its_own_policy(tmp_path: Path) -> None:
    array = _array("directory", tmp_path)
    pickled = pickle.dumps(array)
    del array
    gc.collect()
    hits(pickle.loads(pickled))
    # A warning would be an error.
    CacheStore(LocalStore(tmp_path / "source"), cache_store=tmp_path / "cache", eviction="adaptive")


OTHER_POLICY = """
import sys
from zarr.storage import LocalStore
from zcache import CacheStore
from zcache.testing import set_block_size
set_block_size(1)
CacheStore(LocalStore(sys.argv[1]), cache_store=sys.argv[2], eviction=sys.argv[3])
"""


@pytest.mark.slow
def test_store_that_nobody_has_holds_no_other_process_to_its_policy(tmp_path: Path) -> None:
    array = _array("directory", tmp_path)
    pickled = pickle.dumps(array)
    del array
    gc.collect()
    assert hits(pickle.loads(pickled)) == 2
    gc.collect()
    command = [sys.executable, "-W", "error", "-c", OTHER_POLICY]
    places = [str(tmp_path / "source"), str(tmp_path / "cache")]
    subprocess.run([*command, *places, "adaptive"], check=True, timeout=60)
    # The next copy does, by the policy that is in force by now, and finds what was decoded.
    again = pickle.loads(pickled)
    assert hits(again) == 4
    asking = [*command, *places, "lru"]
    done = subprocess.run(asking, check=False, timeout=60, capture_output=True)
    assert b"is in use with eviction='adaptive'" in done.stderr


def test_xarray_reads_decoded_chunks() -> None:
    source = MemoryStore()
    xr.Dataset({"v": ("x", np.arange(8))}).to_zarr(
        source, zarr_format=3, encoding={"v": {"chunks": (4,)}}
    )
    store = CacheStore(source, decoded_size="1MB")
    dataset = xr.open_zarr(store, chunks=None)
    for _ in range(2):
        np.testing.assert_array_equal(dataset["v"][2:6].values, np.arange(2, 6))
    assert store.cache_stats()["decoded_hits"] == 2


def test_forked_child_starts_empty_and_goes_on() -> None:
    store = CacheStore(MemoryStore(), decoded_size="1MB")
    create(store)
    cache: Any = store._decoded
    array = zarr.open_array(store)
    assert hits(array) == 2
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        theirs.send((len(cache._values), cache._index.current_size, cache.stats()["decoded_hits"]))

    process: Any = context.Process(target=child)
    process.start()
    assert ours.poll(60)
    assert ours.recv() == (0, 0, 2)
    process.join(60)
    assert hits(array) == 4


# ------------------------------------------------------------------ one array


@pytest.mark.parametrize("is_cached", [False, True])
def test_one_array_keeps_its_chunks(is_cached: bool) -> None:
    source = MemoryStore()
    below = CacheStore(source) if is_cached else source
    plain = create(below)
    array = with_decoded_cache(plain, "1MB")
    assert hits(array) == 2
    array[2] = 7
    assert array[2] == 7
    array[2] = 2
    array.resize((4,))
    array.resize((8,))
    assert (array[4:] == 0).all()
    array[4:] = np.arange(4, 8)
    assert hits(array) == 2
    assert type(pipeline_of(zarr.open_array(below))) is BatchedCodecPipeline
    if is_cached:
        # It shares the index of its store.
        plain[1] = 9
        assert array[1] == 9


class Viewed(zarr.Array):  # type: ignore[type-arg]
    """With an attribute that is made of the others."""

    @functools.cached_property
    def view(self) -> Any:
        return zarr.Array(self._async_array)


def test_what_an_array_has_computed_is_computed_anew_for_its_copy() -> None:
    plain = Viewed(create(MemoryStore())._async_array)
    assert plain.view.store is plain.store
    array = with_decoded_cache(plain, "1MB")
    assert array.view.store is array.store is not plain.store
    array[:] = 1
    np.testing.assert_array_equal(array[:], 1)
    array.view[:] = 2
    np.testing.assert_array_equal(array[:], 2)


def test_arrays_over_one_store_see_what_is_written_through_each_other() -> None:
    plain = create(MemoryStore())
    one = with_decoded_cache(plain, "1MB")
    for _ in range(2):
        other = with_decoded_cache(plain, "1MB")
        hits(one)
        assert hits(other) == 2
        one[2] = 7
        assert other[2] == 7
        other[2] = 2
        assert one[2] == 2
        del other
        gc.collect()


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_arrays_over_two_stores_of_one_source_see_what_is_written_through_each_other(
    kind: str, tmp_path: Path
) -> None:
    source: Any = MemoryStore() if kind == "memory" else LocalStore(tmp_path)
    plain = create(source)
    twin = source.with_read_only(read_only=True)
    writing = with_decoded_cache(plain, "1MB")
    reading = with_decoded_cache(zarr.open_array(twin, mode="r"), "1MB")
    assert reading.store.read_only
    assert hits(reading) == 2
    writing[2] = 7
    assert reading[2] == 7
    writing.resize((4,))
    writing.resize((8,))
    assert (reading[4:] == 0).all()
    elsewhere = with_decoded_cache(create(MemoryStore()), "1MB")
    elsewhere[2] = 9
    assert reading[2] == 7


def parts_of_directory(where: Path) -> list[Any]:
    """Stores of one source, and where the array is in them."""
    (where / "link").symlink_to(where / "data")
    return [
        (LocalStore(where / "data"), "g/a"),
        (LocalStore(where / "link" / "g" / "a"), ""),
        (FsspecStore.from_url(f"file://{where}/data/g", storage_options={"auto_mkdir": True}), "a"),
    ]


def parts_of_memory(where: Path) -> list[Any]:
    """The same, of which one is at the root of its memory."""
    made: Any = getattr(zarr.storage, "ManagedMemoryStore", None)
    if made is None:
        pytest.skip("since zarr 3.2")
    name = where.name
    return [(made(name), "g/a"), (made(name, path="g"), "a"), (made(name, path="g/a"), "")]


def parts_of_filesystem(where: Path) -> list[Any]:
    """The same, of a file system in memory."""
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").rm("/", recursive=True)
    return [("memory://", "g/a"), ("memory://g", "a"), ("memory://g/a", "")]


def parts_of_folder(where: Path) -> list[Any]:
    """The same, of which two are below folders of that file system."""
    dirfs = pytest.importorskip("fsspec.implementations.dirfs").DirFileSystem
    wrap = pytest.importorskip("fsspec.implementations.asyn_wrapper").AsyncFileSystemWrapper
    parts_of_filesystem(where)
    memory = pytest.importorskip("fsspec").filesystem("memory")

    def below(*folders: str, path: str) -> FsspecStore:
        filesystem = memory
        for folder in folders:
            filesystem = dirfs(path=folder, fs=filesystem)
        return FsspecStore(wrap(filesystem, asynchronous=True), path=path)

    return [
        (below(path="/r"), "g/a"),
        (below("/r", path="g"), "a"),
        (below("/r", "g", path="a"), ""),
    ]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize(
    "parts", [parts_of_directory, parts_of_memory, parts_of_filesystem, parts_of_folder]
)
def test_arrays_over_parts_of_one_source_see_what_is_written_through_each_other(
    parts: Callable[[Path], list[Any]], first: int, tmp_path: Path
) -> None:
    ways = parts(tmp_path)
    store, path = ways[0]
    create(store, name=path)
    ways = ways[first:] + ways[:first]
    arrays = [zarr.open_array(store, path=path, mode="r+") for store, path in ways]
    arrays = [with_decoded_cache(array, "1MB") for array in arrays]

    def values() -> list[int]:
        assert all((array[:] == arrays[0][:]).all() for array in arrays)
        return list(arrays[0][:])

    expected = list(range(8))
    assert values() == expected
    for n, writing in enumerate(arrays):
        expected[2] = writing[2] = 50 + n
        assert values() == expected
        zarr.core.sync.sync(writing.store.delete_dir(f"{writing.path}/c".lstrip("/")))
        assert values() == [0] * 8
        writing[:] = expected
        assert values() == expected
    # Another one beside them keeps its chunks.
    beside = with_decoded_cache(create(store, name="g/ab"), "1MB")
    assert hits(beside) == 2
    arrays[0][2] = 7
    assert hits(beside) == 4


@pytest.mark.parametrize("what", ["invalidate", "clear_cache"])
@pytest.mark.parametrize("writing", [0, 1, 2])
def test_arrays_over_parts_of_one_source_forget_what_one_of_them_is_told_to_forget(
    what: str, writing: int, tmp_path: Path
) -> None:
    parts = parts_of_directory(tmp_path)
    raw = create(parts[0][0], name=parts[0][1])
    arrays = [
        with_decoded_cache(zarr.open_array(store, path=path, mode="r+"), "1MB")
        for store, path in parts
    ]
    assert all(hits(array) == 2 for array in arrays)
    raw[2] = 7
    zarr.core.sync.sync(getattr(arrays[writing].store, what)())
    assert [array[2] for array in arrays] == [7, 7, 7]


@pytest.mark.parametrize("kind", [WrapperStore, LoggingStore])
def test_arrays_below_a_wrapper_of_zarr_around_such_a_store_see_what_is_written_through_each_other(
    kind: Any,
) -> None:
    source = MemoryStore()
    inner = with_decoded_cache(create(source), "1MB")
    arrays = [inner]
    for _ in range(2):
        wrapped: Any = kind(arrays[-1].store)
        arrays.append(with_decoded_cache(zarr.open_array(wrapped, mode="r+"), "1MB"))
    arrays.append(with_decoded_cache(zarr.open_array(source, mode="r+"), "1MB"))
    assert [hits(array) for array in arrays[1:-1]] == [2, 2]
    for n, writing in enumerate(arrays):
        for reading in arrays:
            reading[:]
        writing[2] = 50 + n
        assert [reading[2] for reading in arrays] == [50 + n] * len(arrays)
    copies = pickle.loads(pickle.dumps(arrays))
    copies[2][2] = 60
    assert [copy[2] for copy in copies] == [60] * len(copies)


class Hanging(LocalStore):
    """Its next write of a chunk has no end."""

    is_reached = hangs = False

    async def set(self, key: str, value: Any) -> None:
        if self.hangs and "/c/" in key:
            self.is_reached = True
            await asyncio.Event().wait()
        await super().set(key, value)


@pytest.mark.parametrize("end", ["cancelled", "closed"])
def test_arrays_over_parts_of_one_source_see_a_write_that_lands_after_its_event_loop(
    end: str, tmp_path: Path
) -> None:
    source = Hanging(tmp_path)
    raw = create(LocalStore(tmp_path), name="g/a")
    writing = with_decoded_cache(zarr.open_array(source, path="g/a", mode="r+"), "1MB")
    inside = with_decoded_cache(zarr.open_array(tmp_path / "g", path="a", mode="r+"), "1MB")
    assert hits(inside) == 2
    source.hangs = True
    buffer = zarr.core.buffer.default_buffer_prototype().buffer

    async def begin() -> asyncio.Task[None]:
        task = asyncio.ensure_future(writing.store.set("g/a/c/0", buffer.from_bytes(b"new")))
        await until(lambda: source.is_reached)
        return task

    if end == "cancelled":
        asyncio.run(begin())
    else:
        loop = asyncio.new_event_loop()
        task = loop.run_until_complete(begin())
        loop.close()
    later = with_decoded_cache(zarr.open_array(tmp_path / "g" / "a", mode="r+"), "1MB")
    # The other chunk is kept.
    assert [hits(array) for array in (inside, later)] == [2, 1]
    raw[2] = 7
    assert [array[2] for array in (writing, inside, later)] == [7, 7, 7]
    if end == "closed":
        del task
        gc.collect()


def test_write_that_has_ended_is_told_to_parts_of_its_source(tmp_path: Path) -> None:
    source = Hanging(tmp_path)
    create(source, name="g/a")
    writing = with_decoded_cache(zarr.open_array(source, path="g/a", mode="r+"), "1MB")
    inside = with_decoded_cache(zarr.open_array(tmp_path / "g", path="a", mode="r+"), "1MB")
    for n in range(3):
        writing[2] = n
        assert inside[2] == n
        zarr.core.sync.sync(writing.store.delete_dir("g/a/c"))
        assert inside[2] == 0
        writing[:] = np.arange(8)
        assert hits(inside) == 2


def test_writes_by_many_threads_through_parts_of_one_source_all_end(tmp_path: Path) -> None:
    parts = parts_of_directory(tmp_path)
    create(parts[0][0], name=parts[0][1])

    def make(n: int) -> Any:
        store, path = parts[n % 3]
        return with_decoded_cache(zarr.open_array(store, path=path, mode="r+"), "1MB")

    def write(n: int) -> None:
        for at in range(4):
            # Some are made while others are written through. None is read: a file may be half written.
            make(n + at)[:4] = at

    arrays = [make(n) for n in range(3)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    arrays[0][:] = np.arange(8)
    assert [hits(array) for array in arrays] == [2, 2, 2]


def test_arrays_below_a_wrapper_with_other_names_see_what_is_written_around_it(
    tmp_path: Path,
) -> None:
    source = LocalStore(tmp_path)
    create(source, name="x/a")
    wrapped: Any = Forwarding(source, "x/")
    reading = with_decoded_cache(zarr.open_array(wrapped, path="a", mode="r+"), "1MB")
    writing = with_decoded_cache(zarr.open_array(source, path="x/a"), "1MB")
    assert hits(reading) == 2
    writing[2] = 7
    assert reading[2] == 7


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_arrays_over_one_source_see_each_other_where_they_are_unpickled(
    kind: str, tmp_path: Path
) -> None:
    source: Any = MemoryStore() if kind == "memory" else LocalStore(tmp_path)
    create(source)
    stores = [source, source.with_read_only(read_only=False)]
    arrays = [with_decoded_cache(zarr.open_array(store), "1MB") for store in stores]
    pickled = [pickle.dumps(array) for array in arrays]
    together = pickle.dumps(arrays)
    del arrays
    gc.collect()
    found = pickle.loads(together)
    if kind == "directory":
        found += [*map(pickle.loads, pickled), with_decoded_cache(zarr.open_array(source), "1MB")]
    for n, writing in enumerate(found):
        for reading in found:
            reading[:]
        writing[2] = 50 + n
        assert [reading[2] for reading in found] == [50 + n] * len(found)


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_copies_of_one_array_share_their_chunks(kind: str, tmp_path: Path) -> None:
    source: Any = MemoryStore() if kind == "memory" else LocalStore(tmp_path)
    array = with_decoded_cache(create(source), "1MB")
    pickled = pickle.dumps(array)
    assert hits(array) == 2
    assert hits(pickle.loads(pickled)) == 4
    del array
    gc.collect()
    first, second = pickle.loads(pickled), pickle.loads(pickled)
    assert hits(first) == 2
    # Without the original each copy of a dict is a dict of its own.
    assert hits(second) == (2 if kind == "memory" else 4)
    other = with_decoded_cache(zarr.open_array(first.store._store), "1MB")
    assert hits(other) == 2


def test_one_array_keeps_its_pipeline() -> None:
    with zarr.config.set({"codec_pipeline.path": PATH}):
        plain = create(MemoryStore())
    array = with_decoded_cache(plain, "1MB")
    for one in (array, with_decoded_cache(array, "25%"), pickle.loads(pickle.dumps(array))):
        assert type(pipeline_of(one)) is DecodedCodecPipeline
        assert type(pipeline_of(one).wrapped) is Configured
        assert hits(one) >= 2


class Bound(BatchedCodecPipeline):
    """Reads its store by itself, and takes no others."""

    bound_to: Any = None

    @classmethod
    def from_array_metadata_and_store(cls, array_metadata: Any, store: Any) -> Any:
        if not isinstance(store, MemoryStore):
            raise NotImplementedError
        made = cls.from_codecs(array_metadata.codecs)
        object.__setattr__(made, "bound_to", store)
        return made


register_pipeline(Bound)


def test_pipeline_that_is_bound_to_its_store_stays_there() -> None:
    with zarr.config.set({"codec_pipeline.path": f"{Bound.__module__}.Bound"}):
        plain = create(MemoryStore())
    array = with_decoded_cache(plain, "1MB")
    assert type(pipeline_of(array).wrapped) is BatchedCodecPipeline
    assert hits(array) == 2


def test_pipeline_by_name_binds_what_is_named_to_other_stores() -> None:
    named = {"codec_pipeline.path": "zcache.DecodedCodecPipeline"}
    with zarr.config.set({**named, "zcache.codec_pipeline": f"{Bound.__module__}.Bound"}):
        plain = create(MemoryStore())
        assert pipeline_of(plain).wrapped.bound_to is plain.store
        assert (plain[:] == np.arange(8)).all()
        array = create(CacheStore(MemoryStore(), decoded_size="1MB"))
        for one in (array, with_decoded_cache(plain, "1MB")):
            assert type(pipeline_of(one).wrapped) is Bound
            assert pipeline_of(one).bound_to is None
            assert hits(one) == 2


class Own(zarr.Array[Any]):
    """An array of a user's own, with an attribute."""

    label = ""


class OwnAsync(AsyncArray[Any]):
    """The same of the arrays below."""


@pytest.mark.parametrize("is_labelled", [False, True])
@pytest.mark.parametrize("kind", [AsyncArray, OwnAsync])
def test_one_array_of_a_class_of_a_user_is_of_that_class(kind: Any, is_labelled: bool) -> None:
    inner = create(MemoryStore())._async_array
    given = Own(kind(inner.metadata, inner.store_path, inner.config))
    if is_labelled:
        object.__setattr__(given, "label", "mine")
    array = with_decoded_cache(given, "1MB")
    assert (type(array), array.label) == (Own, given.label)
    assert type(array._async_array) is kind
    assert type(with_decoded_cache(given._async_array, "1MB")) is kind
    assert hits(array) == 2
    array[2] = 7
    assert array[2] == given[2] == 7
    assert given.store is inner.store_path.store


def test_one_array_with_another_config_keeps_its_chunks() -> None:
    array = with_decoded_cache(create(MemoryStore()), "1MB")
    assert hits(array) == 2
    # In another order it keeps chunks of its own.
    assert hits(array.with_config({"order": "F"})) == 2


async def test_one_array_without_a_loop_of_zarr_keeps_its_chunks() -> None:
    plain = await zarr.api.asynchronous.create_array(
        MemoryStore(), shape=(8,), chunks=(4,), dtype="i4", fill_value=3
    )
    await plain.setitem(slice(0, 8), 5)
    array = with_decoded_cache(plain, 10_000)
    assert type(array) is type(plain)
    for _ in range(2):
        found: Any = await array.getitem(slice(None))
        assert (found == 5).all()
    store: Any = array.store
    assert store.cache_stats()["decoded_hits"] == 2


def test_bad_input_is_refused() -> None:
    array = create(MemoryStore())
    with pytest.raises(OptionTypeError, match="invalid array: MemoryStore"):
        with_decoded_cache(MemoryStore(), "1MB")
    with pytest.raises(OptionTypeError, match="invalid size: None"):
        with_decoded_cache(array, None)  # type: ignore[arg-type]
    with pytest.raises(OptionValueError, match="invalid size: -1"):
        with_decoded_cache(array, -1)
    with pytest.raises(OptionValueError, match="invalid size: '125%'"):
        with_decoded_cache(array, "125%")
    with pytest.raises(OptionValueError, match="invalid decoded_size: 'much'"):
        CacheStore(MemoryStore(), decoded_size="much")
