"""Many ranges in one call, and sharded arrays, which are read by range."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core import codec_pipeline
from zarr.storage import LocalStore, MemoryStore

from doubles import DictStore, GatedStore, SyncDictStore, reached
from pools import POOLS, within_bound
from support import PROTOTYPE, RANGES, buf, count_turns, cut, drained, read, read_through
from zcache import CachePool, CacheStore
from zcache._byte_ranges import from_text, to_text
from zcache.testing import StoreDouble, check_invariants_async, in_flight, stored_sizes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer

VALUES = {"a": b"0123456789", "empty": b"", "g/x": bytes(range(256)) * 3, "one": b"z"}
READS = {"get", "get_partial_values", "get_ranges", "get_sync", "get_ranges_sync"}
has_ranges = pytest.mark.skipif(
    not hasattr(Store, "get_ranges"), reason="zarr before 3.3 has no get_ranges"
)


def make(kind: str, path: Path) -> Store | CachePool:
    if kind in POOLS:
        return POOLS[kind](path / kind)
    return MemoryStore() if kind == "memory" else LocalStore(path / kind)


def test_from_text_is_the_inverse_of_to_text() -> None:
    for asked in (None, (1, 0, 1), (1, 7, 7), (2, 0, 0), (2, 2**63 - 1, 0), (3, 0, 0), (3, 12, 0)):
        assert from_text(to_text(asked)) == asked


def data(value: Buffer | None) -> bytes | None:
    return None if value is None else value.to_bytes()


# ------------------------------------------------------------------------- side by side


def any_request(chance: random.Random) -> ByteRequest | None:
    """Sensible ones, empty ones, ones past the end, and some with the end before the start."""
    first = chance.choice([0, 0, 1, 3, 9, 10, 11, 767, 768, 1000])
    last = first + chance.choice([0, 1, 2, 10, 1000])
    if chance.random() < 0.1:
        last = max(0, first - chance.randrange(1, 4))
    kinds: list[ByteRequest | None] = [
        None,
        *[RangeByteRequest(first, last)] * 4,
        *[OffsetByteRequest(first), SuffixByteRequest(first)] * 2,
    ]
    return chance.choice(kinds)


def kinds_of(error: BaseException) -> set[str]:
    if isinstance(error, BaseExceptionGroup):
        return {"group"}.union(*map(kinds_of, error.exceptions))
    return {type(error).__name__}


async def outcome(work: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await work()
    except Exception as error:  # noqa: BLE001 - whatever the store raises
        return kinds_of(error)


async def ranges(store: Any, key: str, asked: Any, **options: Any) -> dict[int, bytes | None]:
    found: dict[int, bytes | None] = {}
    async for group in store.get_ranges(key, asked, prototype=PROTOTYPE, **options):
        for number, value in group:
            assert number not in found
            found[number] = data(value)
    return found


def ways(chance: random.Random) -> list[Callable[[Any], Awaitable[Any]]]:
    """The same requests by all the ways that there are."""
    key = chance.choice([*VALUES, "missing", "g", "a/", "../a", ".zcache/a"])
    asked = [any_request(chance) for _ in range(chance.choice([0, 1, 2, 5]))]
    asked += asked[: chance.randrange(3)]
    requests = [(chance.choice([key, *VALUES]), request) for request in asked]
    one = any_request(chance)

    async def get(store: Any) -> Any:
        return data(await store.get(key, PROTOTYPE, one))

    async def partial(store: Any) -> Any:
        try:
            return [data(v) for v in await store.get_partial_values(PROTOTYPE, requests)]
        except Exception:  # noqa: BLE001 - of several, the store raises what happens to come first
            return "an error"

    async def many(store: Any) -> Any:
        triples = [(key, PROTOTYPE, request) for key, request in requests]
        return sorted([(key, data(v)) async for key, v in store._get_many(triples)], key=repr)

    async def get_sync(store: Any) -> Any:
        return data(store.get_sync(key, byte_range=one))

    async def get_ranges(store: Any) -> Any:
        return await ranges(store, key, asked)

    async def get_ranges_one_by_one(store: Any) -> Any:
        return await ranges(store, key, asked, max_gap_bytes=0, max_concurrency=1)

    async def get_ranges_sync(store: Any) -> Any:
        found = store.get_ranges_sync(key, asked, prototype=PROTOTYPE)
        return sorted((number, data(value)) for number, value in found)

    found = [get, partial, many, lambda store: store.exists(key), lambda store: store.getsize(key)]
    if hasattr(MemoryStore, "get_sync"):
        found += [get_sync]
    if hasattr(Store, "get_ranges"):
        found += [get_ranges, get_ranges_one_by_one]
    if hasattr(Store, "get_ranges_sync"):
        found += [get_ranges_sync]
    return found


@pytest.mark.parametrize("max_size", [None, 300, 12, 0])
@pytest.mark.parametrize("cache", ["memory", "cache", *POOLS])
@pytest.mark.parametrize("source", ["memory", "source"])
async def test_reads_of_every_kind_equal_the_bare_stores(
    source: str, cache: str, max_size: int | None, tmp_path: Path
) -> None:
    """Whatever is asked, and whatever is cached by then, the answer is the bare store's."""
    bare = make(source, tmp_path)
    for key, value in VALUES.items():
        await bare.set(key, buf(value))
    store = within_bound(CacheStore(bare, cache_store=make(cache, tmp_path), max_size=max_size))
    chance = random.Random(f"{source} {cache} {max_size}")
    for _ in range(40):
        if chance.random() < 0.1:
            await store.clear_cache()
        todo = ways(chance)
        chance.shuffle(todo)
        for way in todo:
            expected = await outcome(lambda: way(bare))  # noqa: B023 - it ends here
            for _ in range(2):
                assert await outcome(lambda: way(store)) == expected  # noqa: B023
    await drained(store)
    await check_invariants_async(store)
    assert in_flight(store) == (0, 0)


# --------------------------------------------------------------------------- one call


class Recorder(StoreDouble):
    """Notes what `get_ranges` is asked for, and how."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.asked: list[tuple[str, list[Any], dict[str, Any]]] = []

    async def get_ranges(  # type: ignore[override]
        self, key: str, byte_ranges: Sequence[Any], **options: Any
    ) -> AsyncIterator[Any]:
        self.asked.append((key, list(byte_ranges), options))
        async for group in self.inner.get_ranges(key, byte_ranges, **options):
            yield group


@has_ranges
async def test_get_ranges_asks_for_missing_ranges_in_one_call() -> None:
    source = Recorder(MemoryStore())
    await source.set("k", buf(VALUES["g/x"]))
    store = CacheStore(source)
    parts = [RangeByteRequest(n, n + 5) for n in range(0, 50, 10)]
    options = {"max_concurrency": 3, "max_gap_bytes": 7, "max_coalesced_bytes": 100}
    await ranges(store, "k", parts[1:3])
    source.asked.clear()
    seen: list[int] = []
    groups: Any = store.get_ranges("k", parts, prototype=PROTOTYPE, **options)
    async for group in groups:
        # The cached ones come before the source is asked.
        assert seen or not source.asked
        seen += [number for number, _ in group]
    assert seen[:2] == [1, 2]
    assert sorted(seen) == [0, 1, 2, 3, 4]
    [(key, asked, given)] = source.asked
    assert (key, asked) == ("k", [parts[0], parts[3], parts[4]])
    assert given == {"prototype": PROTOTYPE, **options}
    source.asked.clear()
    await ranges(store, "k", parts, **options)
    assert source.asked == []


@pytest.mark.parametrize("max_size", [None, 0])
async def test_duplicate_requests_are_read_once(max_size: int | None) -> None:
    """Even where nothing can be cached; and what lies in the whole value is cut out of it."""
    source = DictStore({"k": VALUES["g/x"]})
    store = CacheStore(source, max_size=max_size)
    part, inner = RangeByteRequest(0, 10), RangeByteRequest(3, 4)
    asked = [("k", request) for request in (part, part, None, inner, None, part)]
    found = await store.get_partial_values(PROTOTYPE, asked)
    assert [data(value) for value in found] == [await read(source, *one) for one in asked]
    assert source.counts["get"] == 2 + len(asked)
    arrays = [value.as_numpy_array() for value in found if value is not None]
    for array in (array for array in arrays if array.flags.writeable):
        array[:] = 0
    assert await read(store, "k", part) == VALUES["g/x"][:10]


@has_ranges
async def test_source_error_in_a_batch_keeps_what_did_come(tmp_path: Path) -> None:
    """One of its reads fails while another is being cached: that is no cancellation of the reader."""

    class Source(MemoryStore):
        async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
            if byte_range.start >= 100:
                await kept.wait()
                raise OSError("lost")
            return await super().get(key, prototype, byte_range)

        get_ranges = Store.get_ranges
        _supports_sync_io = False

    class Cache(DictStore):
        async def before(self, operation: str, key: str) -> None:
            if operation == "set":
                kept.set()
                await asyncio.sleep(0.05)

    kept = asyncio.Event()
    source = Source()
    await source.set("k", buf(VALUES["g/x"]))
    store = CacheStore(source, cache_store=Cache())
    asyncio.get_running_loop().call_later(0.05, kept.set)
    asked = [RangeByteRequest(0, 5), RangeByteRequest(100, 105)]
    for _ in range(2):
        with pytest.raises(BaseExceptionGroup) as caught:
            await ranges(store, "k", asked, max_gap_bytes=0)
        assert "OSError" in kinds_of(caught.value)
    await drained(store)
    assert in_flight(store) == (0, 0)
    # What did come is kept.
    assert store.cache_info()["cached_keys"] == 1


async def test_source_that_ends_like_a_generator_has_failed() -> None:
    """What it raises is no end of the values, by which all would seem to be missing."""

    class Source(MemoryStore):
        async def get_partial_values(self, *_: Any, **__: Any) -> Any:
            raise StopAsyncIteration

    source = Source()
    await source.set("k", buf(VALUES["g/x"]))
    store = CacheStore(source)
    for asked in ([None], [None, RangeByteRequest(0, 2)]):
        with pytest.raises(RuntimeError, match="StopAsyncIteration"):
            await store.get_partial_values(PROTOTYPE, [("k", one) for one in asked])
    assert await read(store, "k") == VALUES["g/x"]


@pytest.mark.parametrize("kind", ["local", "pool"])
async def test_ranges_of_one_call_are_read_on_the_spot_however_many(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = random.Random(1).randbytes(20_000)
    store = CacheStore(SyncDictStore({"shard": value}), cache_store=make(kind, tmp_path))
    assert await read_through(store, "shard") == value
    backend, elsewhere = type(store._cache.backend), []
    read_elsewhere = backend.read

    def counted(self: Any, *args: Any) -> Any:
        elsewhere.append(args)
        return read_elsewhere(self, *args)

    monkeypatch.setattr(backend, "read", counted)
    ranges = [RangeByteRequest(at, at + 50) for at in range(3_000)]
    expected = {at: value[at : at + 50] for at in range(3_000)}

    async def in_groups() -> dict[int, bytes | None]:
        found = store.get_ranges("shard", ranges, prototype=PROTOTYPE)
        return {at: data(value) async for group in found for at, value in group}

    if hasattr(store, "get_ranges"):
        assert await in_groups() == expected
    asked = [("shard", one) for one in ranges]
    values = await store.get_partial_values(PROTOTYPE, asked)
    assert dict(enumerate(map(data, values))) == expected
    if hasattr(store, "get_ranges_sync"):
        found = await asyncio.to_thread(store.get_ranges_sync, "shard", ranges, prototype=PROTOTYPE)
        assert {at: data(value) for at, value in found} == expected
    assert elsewhere == []


@pytest.mark.parametrize("kind", ["memory", "local", "pool"])
async def test_one_call_for_many_values_leaves_turns_to_other_tasks(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn is long enough at once, whatever the machine."""
    monkeypatch.setattr("zcache._runtime.turns.BUDGET", -1.0)
    keys = [f"c/{number}" for number in range(640)]
    source = StoreDouble(SyncDictStore({key: key.encode() for key in keys}))
    store = CacheStore(source, cache_store=make(kind, tmp_path))
    for _ in range(2):
        turns: list[None] = []
        watcher = asyncio.ensure_future(count_turns(turns))
        values = await store.get_partial_values(PROTOTYPE, [(key, None) for key in keys])
        watcher.cancel()
        assert [data(value) for value in values] == [key.encode() for key in keys]
        assert len(turns) >= len(keys) // 64 - 1
        await drained(store)
    # What was missing was asked for in one call.
    assert source.calls["get_partial_values"] == 1


async def test_batch_joins_a_full_read_in_flight() -> None:
    source = GatedStore({"k": VALUES["g/x"]})
    store = CacheStore(source)
    source.shut["get"] = 1
    leader = asyncio.create_task(read(store, "k"))
    await reached(source)
    asked = [("k", request) for request in (RangeByteRequest(3, 9), SuffixByteRequest(4))]
    batch = asyncio.create_task(store.get_partial_values(PROTOTYPE, asked))
    await asyncio.sleep(0)
    source.release()
    assert await leader == VALUES["g/x"]
    assert [data(v) for v in await batch] == [VALUES["g/x"][3:9], VALUES["g/x"][-4:]]
    assert source.counts["get"] == 1


IO = Path("/proc/self/io")


@pytest.mark.skipif(not IO.exists(), reason="the system does not count what a process reads")
async def test_directory_read_of_a_range_reads_only_its_bytes(tmp_path: Path) -> None:
    value = bytes(8 << 20)
    source = DictStore({"k": value})
    store = CacheStore(source, cache_store=LocalStore(tmp_path), verify="never")
    await read_through(store, "k")

    def bytes_read() -> int:
        return int(IO.read_text().split()[1])

    before = bytes_read()
    for request in (
        RangeByteRequest(5, 9),
        OffsetByteRequest(len(value) - 8),
        SuffixByteRequest(7),
    ):
        assert await read(store, "k", request) == cut(value, request)
    assert bytes_read() - before < len(value) // 8
    assert source.counts["get"] == 1


# ---------------------------------------------------------------------- sharded arrays

PIPELINES = [
    f"zarr.core.codec_pipeline.{name}"
    for name in ("BatchedCodecPipeline", "FusedCodecPipeline")
    if hasattr(codec_pipeline, name)
]


@pytest.fixture(params=PIPELINES)
def pipeline(request: pytest.FixtureRequest) -> Any:
    with zarr.config.set({"codec_pipeline.path": request.param}):
        yield


def payload(source: StoreDouble) -> list[Any]:
    """Reads of shards since the last time; absent documents are not cached."""
    return [
        request
        for request in source.take_requests()
        if request.operation in READS and "/c/" in request.key
    ]


PARTS = (np.s_[3:5, 1:7], np.s_[0:8, 2], np.s_[6:12, 6:10], np.s_[11, 11])


@pytest.mark.parametrize("cache", ["memory", "cache", *POOLS])
def test_second_pass_over_shards_does_not_read_the_source(
    cache: str, tmp_path: Path, pipeline: None
) -> None:
    """Parts across the borders of shards; in a directory also after a restart."""
    bare = LocalStore(tmp_path / "source")
    sharded = {"shape": (12, 12), "chunks": (2, 2), "shards": (4, 4), "dtype": "i4"}
    zarr.create_array(bare, name="x", **sharded)[:] = np.arange(144).reshape(12, 12)
    expected = np.arange(144).reshape(12, 12)
    source = StoreDouble(bare)
    store = CacheStore(source, cache_store=make(cache, tmp_path))
    for turn in range(3):
        if turn == 2 and cache in ("cache", "pool"):
            store = CacheStore(source, cache_store=make(cache, tmp_path))
        array = zarr.open_array(store, path="x", mode="r")
        for part in PARTS:
            np.testing.assert_array_equal(array[part], expected[part])
        assert bool(payload(source)) is (turn == 0)
    assert store.drain_sync()
    assert any(name.startswith(RANGES) for name in stored_sizes(store))


@pytest.mark.parametrize("cache", ["memory", "cache", *POOLS])
def test_write_of_an_inner_chunk_drops_the_ranges_of_its_shard_only(
    cache: str, tmp_path: Path, pipeline: None
) -> None:
    bare = LocalStore(tmp_path / "source")
    sharded = {"shape": (16,), "chunks": (2,), "shards": (8,), "dtype": "i4"}
    zarr.create_array(bare, name="x", **sharded)[:] = expected = np.arange(16)
    store = CacheStore(bare, cache_store=make(cache, tmp_path), cache_set_data=False)
    array = zarr.open_array(store, path="x")
    for first in (0, 4, 8, 12):
        np.testing.assert_array_equal(array[first : first + 2], expected[first : first + 2])
    store.drain_sync()
    first, second = (
        {name for name in stored_sizes(store) if name.startswith(f"{RANGES}x/c/{shard}@")}
        for shard in (0, 1)
    )
    assert first
    assert second
    array[2:4] = expected[2:4] = (-1, -2)
    assert not first & stored_sizes(store).keys()
    assert second <= stored_sizes(store).keys()
    for part in (np.s_[2:3], np.s_[0:6], np.s_[:]):
        np.testing.assert_array_equal(zarr.open_array(store, path="x")[part], expected[part])
        np.testing.assert_array_equal(zarr.open_array(bare, path="x")[part], expected[part])


async def test_byte_ranges_are_evicted_in_one_order_with_values() -> None:
    source, cache = SyncDictStore({"a": bytes(100), "b": bytes(40)}), SyncDictStore()
    store = CacheStore(source, cache_store=cache, max_size=60)
    one, two = RangeByteRequest(0, 10), RangeByteRequest(10, 20)
    await read_through(store, "a", one)
    await read_through(store, "b")
    await read_through(store, "a", two)
    await read_through(store, "a", one)
    await read_through(store, "a", RangeByteRequest(50, 60))
    # The value of `b` is the oldest, though it came after the first range.
    assert set(cache.values) == {f"{RANGES}a@0-10", f"{RANGES}a@10-20", f"{RANGES}a@50-60"}
    assert cache.peak <= 60
