"""No read returns decoded values that are older than what the byte cache would give."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import multiprocessing
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.core.sync import sync
from zarr.registry import register_pipeline
from zarr.storage import LocalStore, MemoryStore

from decoding import ROOM, check_decoded, check_decoded_quiet
from support import buf, drained_sync, until
from zcache import CacheStore, with_decoded_cache
from zcache._backends.directory.layout import Layout
from zcache._core import POLICIES
from zcache._decoded import lapsed
from zcache._decoded.chunk import OVERHEAD, Decoding, Decodings
from zcache._decoded.origins import Origins
from zcache.testing import FakeClock, StoreDouble, recency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from zcache.testing import Gate


def create(store: Any, **more: Any) -> Any:
    array = zarr.create_array(
        store,
        **{"name": "v", "shape": (16,), "chunks": (4,), "dtype": "i4", "fill_value": -1, **more},
    )
    array[:] = np.arange(16)
    return array


def decoded(store: CacheStore, what: str) -> int:
    found: int = store.cache_stats()[f"decoded_{what}"]
    return found


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CacheStore:
    return CacheStore(
        MemoryStore(),
        cache_store=MemoryStore() if request.param == "memory" else tmp_path / "cache",
        source_id="source",
        decoded_size=10_000,
    )


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers wait for others, however slow the machine is."""
    monkeypatch.setattr("zcache._decoded.reading.PATIENCE", 60.0)


shards = pytest.mark.parametrize("more", [{}, {"shards": (8,)}], ids=["chunks", "shards"])


@shards
def test_read_after_any_change_through_the_store_sees_it(
    store: CacheStore, more: dict[str, Any]
) -> None:
    array = create(store, **more)
    other = zarr.open_array(store, path="v")
    values = np.arange(16)

    def same() -> None:
        for opened in (array, other):
            np.testing.assert_array_equal(opened[:], values)

    same()
    for at, value in [(14, 101), (3, 100)]:
        other[at] = values[at] = value
        same()
    chunks = [key for key in sync(_keys(store)) if key.startswith("v/c/")]
    before = sync(store._store.get(chunks[0], _PROTOTYPE))
    assert before is not None
    values[: 8 if more else 4] = -1
    sync(store.delete(chunks[0]))
    same()
    values[: 8 if more else 4] = [0, 1, 2, 100, 4, 5, 6, 7][: 8 if more else 4]
    sync(store.set(chunks[0], before))
    same()
    array.resize((8,))
    array.resize((16,))
    values[8:] = -1
    same()
    sync(store.delete_dir("v/c"))
    values[:] = -1
    same()
    create(store, overwrite=True, dtype="f8")[:] = values = np.linspace(0, 1, 16)
    np.testing.assert_array_equal(zarr.open_array(store, path="v")[:], values)
    sync(store.clear_cache())
    assert decoded(store, "size") == 0
    check_decoded_quiet(store)


def test_array_in_place_of_another_one_is_not_served_its_chunks() -> None:
    """A chunk and an inner chunk of a shard must not have one name: versions of two keys are equal by chance."""
    for writes, later in product(range(6), range(1, 5)):
        store = CacheStore(MemoryStore(), source_id="s", decoded_size=100_000, cache_set_data=False)

        def make(store: CacheStore = store, **more: Any) -> Any:
            return zarr.create_array(store, name="a", dtype="i4", overwrite=True, **more)

        old = make(shape=(1, 8), chunks=(1, 4))
        old[:]  # Changes count from the first decode on.
        for _ in range(writes):
            old[:] = 1
        old[:]
        new = make(shape=(16,), chunks=(4,), shards=(16,))
        for _ in range(later):
            new[:] = np.arange(16)
        np.testing.assert_array_equal(new[:], np.arange(16))


async def _keys(store: CacheStore) -> list[str]:
    return sorted([key async for key in store.list()])


_PROTOTYPE: Any = zarr.core.buffer.default_buffer_prototype()


@shards
def test_write_through_another_store_on_the_cache_is_seen(
    store: CacheStore, more: dict[str, Any]
) -> None:
    array = create(store, **more)
    array[:]
    other = CacheStore(
        store._store, cache_store=store._cache_store, source_id="source", decoded_size=100_000
    )
    writer = zarr.open_array(other, path="v")
    writer[2] = 7
    assert array[2] == 7
    array[2] = 8
    assert writer[2] == 8
    sync(other.clear_cache())
    misses = decoded(store, "misses")
    assert array[2] == 8
    assert decoded(store, "misses") == misses + 1


_OTHER = """
import sys, zarr
from zarr.storage import LocalStore
from zcache import CacheStore
store = CacheStore(LocalStore(sys.argv[1]), cache_store=sys.argv[2], decoded_size=100_000)
array = zarr.open_array(store, path="v")
for line in sys.stdin:
    what, value = line.split()
    if what == "write":
        array[2] = int(value)
    elif what == "delete":
        zarr.core.sync.sync(store.delete_dir("v/c"))
    elif what == "clear":
        zarr.core.sync.sync(store.clear_cache())
    print(array[2], flush=True)
"""


@contextlib.contextmanager
def another_process(where: Path) -> Iterator[Callable[[str], int]]:
    """A process on the same source and cache; it does what it is told, and says what it reads then."""
    command = [sys.executable, "-c", _OTHER, str(where / "source"), str(where / "cache")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout

        def ask(what: str) -> int:
            print(what, file=process.stdin, flush=True)
            assert process.stdout
            return int(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.slow
@shards
def test_change_by_another_process_is_seen_at_once(tmp_path: Path, more: dict[str, Any]) -> None:
    store = CacheStore(
        LocalStore(tmp_path / "source"), cache_store=tmp_path / "cache", decoded_size=100_000
    )
    array = create(store, **more)
    with another_process(tmp_path) as ask:
        for value in (5, 6):
            array[2]
            assert ask(f"write {value}") == value
            assert array[2] == value
            array[2] = value + 10
            assert ask("read 0") == value + 10
        hits = decoded(store, "hits")
        assert array[2] == 16
        assert ask("clear 0") == 16
        misses = decoded(store, "misses")
        assert array[2] == 16
        assert (decoded(store, "hits"), decoded(store, "misses")) == (hits, misses + 1)
        assert ask("delete 0") == -1
        assert array[2] == -1


@pytest.mark.slow
@shards
@pytest.mark.parametrize("why", ["read-only", "not shared"])
def test_index_of_its_own_serves_no_decoded_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, more: dict[str, Any]
) -> None:
    """It would not hear of what another process writes."""
    source, cache = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "cache")
    create(source, **more)
    with CacheStore(source, cache_store=cache) as warm:
        zarr.open_array(warm, path="v")[:]
        assert warm.drain_sync()
    del warm
    gc.collect()

    def refuse(*_: Any) -> Any:
        raise OSError(errno.ENOSYS, "no locks here")

    with monkeypatch.context() as patch:
        if why == "read-only":
            cache = LocalStore(cache.root, read_only=True)
        else:
            patch.setattr(Layout, "open_index", refuse)
        store = CacheStore(source, cache_store=cache, decoded_size=100_000)
    array = zarr.open_array(store, path="v")
    with another_process(tmp_path) as ask:
        for value in (5, 6):
            assert array[1] == array[1] == 1
            assert ask(f"write {value}") == value
            assert array[2] == value
        assert ask("delete 0") == -1
        assert array[2] == -1
    assert (decoded(store, "hits"), decoded(store, "size")) == (0, 0)


@shards
def test_renamed_directory_is_noticed_by_the_next_read(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    """Who has made another one in its place is not heard of."""
    source = MemoryStore()
    create(source, **more)
    values = source._store_dict
    before = dict(values)
    zarr.open_array(source, path="v")[2] = 50
    after = dict(values)
    where = tmp_path / "cache"
    store = CacheStore(source, cache_store=where, source_id="source", decoded_size=100_000)
    array = zarr.open_array(store, path="v")
    for n in range(5):
        values.update(before)
        sync(store.clear_cache())

        def is_hit() -> bool:
            hits = decoded(store, "hits")
            assert array[2] == 2
            return decoded(store, "hits") > hits

        # The index of the directory before is abandoned in the background.
        while not is_hit():
            time.sleep(0.001)
        # What is still on its way into the cache is served from memory.
        assert store.drain_sync()
        where.rename(tmp_path / f"gone{n}")
        values.update(after)
        assert array[2] == 50


@shards
@pytest.mark.parametrize("ages", [10, {"v/c/**": 10}])
def test_chunk_expires_with_its_bytes(clock: FakeClock, more: dict[str, Any], ages: Any) -> None:
    source = MemoryStore()
    create(source, **more)
    store = CacheStore(source, max_age_seconds=ages, clock=clock, decoded_size=100_000)
    array = zarr.open_array(store, path="v")
    assert array[2] == 2
    clock.advance(6)
    assert array[2] == 2
    # Another part of the shard is younger, and what is decoded with it is not served for longer.
    assert array[7] == 7
    zarr.open_array(source, path="v")[2] = 50
    assert array[2] == 2
    assert decoded(store, "hits") == 2
    clock.advance(4)
    assert array[2] == 50
    # What has taken the place of stale bytes is kept from its first read on.
    hits = decoded(store, "hits")
    assert array[2] == 50
    assert decoded(store, "hits") == hits + 1


@pytest.mark.parametrize("revalidate", [False, True])
@pytest.mark.parametrize("where", [slice(None), [0, 2, 4, 6]], ids=["block", "elements"])
def test_whole_shard_is_of_one_value_where_others_have_rewritten_it(
    tmp_path: Path, clock: FakeClock, where: Any, revalidate: bool
) -> None:
    """As without decoded chunks: to read what is not decoded yet by the cached index would give what no value ever was."""
    source = LocalStore(tmp_path)
    others = zarr.create_array(
        source,
        name="v",
        shape=(8,),
        chunks=(2,),
        shards=(8,),
        dtype="i4",
        fill_value=0,
        compressors=None,
    )
    others[:] = 1
    store = CacheStore(
        source, max_age_seconds=60, revalidate=revalidate, clock=clock, decoded_size=100_000
    )
    array = zarr.open_array(store, path="v")
    assert array[0] == 1
    drained_sync(store)
    clock.advance(1)
    # The first inner chunk is not stored any more, so all others have moved.
    others[:] = values = np.array([0, 0, 2, 2, 3, 3, 4, 4])
    for _ in range(2):
        np.testing.assert_array_equal(array[where], values[where])
        drained_sync(store)
    hits = decoded(store, "hits")
    assert [array[n] for n in range(8)] == values.tolist()
    assert decoded(store, "hits") == hits + 8
    check_decoded_quiet(store)


@pytest.mark.parametrize("size", [None, 0])
def test_whole_shard_is_not_put_together_of_parts_that_were_decoded_apart(
    clock: FakeClock, size: int | None
) -> None:
    source = MemoryStore()
    others = create(source, shards=(16,))
    others[:] = 1
    store = CacheStore(source, max_age_seconds=60, max_size=size, clock=clock, decoded_size=100_000)
    array = zarr.open_array(store, path="v")

    def decode(part: slice) -> None:
        # The second time its bytes are there, so it is kept.
        for _ in range(2):
            array[part]
            drained_sync(store)

    decode(slice(8))
    others[:] = 2
    clock.advance(1)
    decode(slice(8, 16))
    cache: Any = store._decoded
    assert len(cache._values) == 4
    hits = decoded(store, "hits")
    assert array[:].tolist() == [2] * 16
    assert decoded(store, "hits") == hits
    # What is decoded together is served together; where some of it is gone, all of it is read at once.
    drained_sync(store)
    assert array[:].tolist() == [2] * 16
    assert decoded(store, "hits") == hits + 4
    cache._discard(*next(iter(cache._values.items())))
    for _ in range(2):
        assert array[:].tolist() == [2] * 16
        drained_sync(store)
    assert decoded(store, "hits") == hits + 8
    check_decoded_quiet(store)


@shards
@pytest.mark.parametrize("age", ["infinity", 10])
@pytest.mark.parametrize("now", [0.0, 1e-4, -5.0])
def test_chunk_is_kept_whatever_the_clock_says(more: dict[str, Any], age: Any, now: float) -> None:
    source = MemoryStore()
    create(source, **more)
    store = CacheStore(source, max_age_seconds=age, clock=lambda: now, decoded_size=100_000)
    array = zarr.open_array(store, path="v")
    # With shards, a chunk is kept if its bytes are there already.
    for _ in range(3):
        assert array[2] == 2
    assert decoded(store, "hits") == 2


@pytest.mark.parametrize("was_missing", [False, True])
def test_chunk_of_a_value_past_its_age_is_not_kept(clock: FakeClock, was_missing: bool) -> None:
    source = StoreDouble(MemoryStore())
    create(source)
    store = CacheStore(
        source,
        source_id="s",
        max_age_seconds=10,
        stale_if_error=100,
        clock=clock,
        decoded_size=100_000,
    )
    array = zarr.open_array(store, path="v")
    if was_missing:
        # Such a chunk has no room before it is there.
        value = sync(source.get("v/c/0", _PROTOTYPE))
        sync(source.delete("v/c/0"))
        assert array[2] == -1
        clock.advance(20)
        sync(source.set("v/c/0", value))
        sync(store.get("v/c/0", _PROTOTYPE))
    else:
        assert array[2] == 2
    clock.advance(20)
    zarr.open_array(source, path="v")[2] = 50
    source.fail("get", OSError("unreachable"), times=1)
    assert array[2] == 2
    assert store.cache_stats()["stale_hits"] == 1
    assert array[2] == 50
    check_decoded_quiet(store)


def test_chunk_whose_bytes_were_read_anew_is_decoded_anew(clock: FakeClock) -> None:
    source = MemoryStore()
    create(source)
    store = CacheStore(source, clock=clock, decoded_size=100_000)
    array = zarr.open_array(store, path="v")
    assert array[2] == 2
    zarr.open_array(source, path="v")[2] = 50
    clock.advance(1)
    # Evicted from the byte cache alone, and read again.
    index = store._cache.shared.handle.index
    victims, _ = index.drain_prefix("v/c")
    for _, name in victims:
        del store._cache_store._store_dict[name]  # type: ignore[attr-defined]
    index.confirm_deletes([cell for cell, _ in victims], [])
    sync(store.get("v/c/0"))
    assert array[2] == 50


def test_chunk_outlives_its_bytes_and_a_write_ends_it() -> None:
    store = CacheStore(MemoryStore(), max_size=0, decoded_size=100_000)
    array = create(store)
    array[:]
    misses = store.cache_stats()["misses"]
    np.testing.assert_array_equal(array[:], np.arange(16))
    assert decoded(store, "hits") == 4
    assert store.cache_stats()["misses"] == misses
    array[2] = 9
    assert array[2] == 9


@shards
def test_hit_keeps_the_bytes_warm(clock: FakeClock, more: dict[str, Any]) -> None:
    store = CacheStore(MemoryStore(), clock=clock, decoded_size=100_000, cache_set_data=False)
    array = create(store, **more)
    array[:4]
    array[12:]
    warmest = "v/c/1" if more else "v/c/3"
    assert recency(store)[-1][0] == warmest
    clock.advance(1)
    hits = store.cache_stats()["hits"]
    array[0]
    assert store.cache_stats()["hits"] == hits
    assert recency(store)[-1][0] == "v/c/0"


# ------------------------------------------------------------- many readers at once


@shards
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("age", ["infinity", 3600])
def test_many_readers_decode_a_chunk_once(more: dict[str, Any], age: Any) -> None:
    source = StoreDouble(MemoryStore())
    create(source, **more)
    store = CacheStore(source, source_id="s", max_age_seconds=age, decoded_size=100_000)
    array = zarr.open_array(store, path="v")

    def total() -> int:
        found: int = array[:].sum()
        return found

    gate = source.block("get", times=1)
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(total) for _ in range(8)]
        gate.wait_entered()
        gate.release()
        assert {read.result(60) for read in reads} == {120}
    assert (decoded(store, "hits"), decoded(store, "misses")) == (28, 4)
    check_decoded_quiet(store)


class Together(BatchedCodecPipeline):
    """A pipeline of which nothing is taken before all that one read wants is there."""


register_pipeline(Together)


async def reads_of_two(
    source: StoreDouble, blocked: str, more: dict[str, Any]
) -> tuple[Any, Gate, asyncio.Task[Any]]:
    """An array with its bytes cached, but for a value; the source does not answer one who reads all of it."""
    await asyncio.to_thread(create, source, **more)
    store = CacheStore(source, source_id="s", decoded_size=100_000)
    path = f"{Together.__module__}.Together"
    with zarr.config.set({"codec_pipeline.path": path}):
        array: Any = await zarr.api.asynchronous.open_array(store=store, path="v")
    for key in [f"v/c/{n}" for n in range(4)]:
        if key != blocked:
            await store.get(key, default_buffer_prototype())
    await store.drain()
    gate = source.block("get", key=blocked)
    leader = asyncio.create_task(array.getitem(slice(None)))
    await asyncio.to_thread(gate.wait_entered)
    return array, gate, leader


@shards
async def test_reader_does_not_wait_for_what_else_another_one_reads(more: dict[str, Any]) -> None:
    array, gate, leader = await reads_of_two(StoreDouble(MemoryStore()), "v/c/1", more)
    reads = [array.getitem(slice(0, 4)) for _ in range(4)]
    for found in await asyncio.wait_for(asyncio.gather(*reads), 60):
        assert found.tolist() == [0, 1, 2, 3]
    # One of them has decoded it for all, and it is kept.
    assert not leader.done()
    before = decoded(array.store, "hits")
    assert before >= 3
    await asyncio.wait_for(array.getitem(slice(0, 4)), 60)
    assert decoded(array.store, "hits") == before + 1
    gate.release()
    assert (await leader).tolist() == list(range(16))
    check_decoded_quiet(array.store)


@shards
async def test_reader_waits_for_a_chunk_whose_bytes_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    asked: list[bool] = []

    def is_on_its_way(origins: Origins, origin: Any, ask: Any = Origins.is_on_its_way) -> bool:
        asked.append(ask(origins, origin))
        if len(asked) == 3:
            gate.release()
        # However slow the machine is then.
        return len(asked) >= 3 or asked[-1]

    monkeypatch.setattr("zcache._decoded.reading.ON_ITS_WAY", 600.0)
    monkeypatch.setattr(Origins, "is_on_its_way", is_on_its_way)
    array, gate, leader = await reads_of_two(StoreDouble(MemoryStore()), "v/c/1", more)
    follower = asyncio.create_task(array.getitem(slice(8 if more else 4, 16)))
    found = await asyncio.wait_for(follower, 60)
    assert found.tolist() == list(range(8 if more else 4, 16))
    assert (await leader).tolist() == list(range(16))
    assert asked[:3] == [True] * 3
    # Each was decoded once.
    assert decoded(array.store, "misses") == 4
    check_decoded_quiet(array.store)


async def test_reader_of_a_whole_shard_that_expires_takes_no_part_of_it_from_another_one() -> None:
    """By the index that the other one reads, it would read the rest."""
    source = StoreDouble(MemoryStore())
    await asyncio.to_thread(create, source, shards=(16,))
    store = CacheStore(source, source_id="s", max_age_seconds=3600, decoded_size=100_000)
    array: Any = await zarr.api.asynchronous.open_array(store=store, path="v")
    gate = source.block("get", key="v/c/0", times=1)
    leader = asyncio.create_task(array.getitem(slice(0, 4)))
    await asyncio.to_thread(gate.wait_entered)
    found = await asyncio.wait_for(array.getitem(slice(None)), 60)
    assert found.tolist() == list(range(16))
    assert not leader.done()
    gate.release()
    assert (await leader).tolist() == [0, 1, 2, 3]
    check_decoded_quiet(store)


@pytest.fixture
async def slow(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> Any:
    """An array, the same for others, what begins a read of a part of its shard, and a gate at which that waits with its bytes."""
    begun, gate = asyncio.Event(), asyncio.Event()
    read = Together.read

    async def read_slowly(self: Together, batch: Any, out: Any, drop_axes: Any = ()) -> Any:
        batch = list(batch)
        found = await read(self, batch, out, drop_axes)
        if batch[0][2] != (slice(0, 16),):
            begun.set()
            await gate.wait()
        return found

    monkeypatch.setattr(Together, "read", read_slowly)
    source = MemoryStore()
    others: Any = await asyncio.to_thread(create, source, shards=(16,))
    others = others._async_array
    await others.setitem(slice(None), 1)
    store = CacheStore(source, max_age_seconds=3600, clock=clock, decoded_size=100_000)
    with zarr.config.set({"codec_pipeline.path": f"{Together.__module__}.Together"}):
        array = await zarr.api.asynchronous.open_array(store=store, path="v")

    async def begin(part: slice) -> asyncio.Task[Any]:
        begun.clear()
        task = asyncio.create_task(array.getitem(part))
        await begun.wait()
        await store.drain()
        return task

    return array, others, begin, gate


@pytest.mark.usefixtures("patient")
async def test_reader_of_a_whole_shard_takes_no_parts_that_are_decoded_apart(
    slow: Any, clock: FakeClock
) -> None:
    array, others, begin, gate = slow
    parts = [await begin(slice(8))]
    await others.setitem(slice(None), 2)
    clock.advance(1)
    parts.append(await begin(slice(8, 16)))
    whole = asyncio.create_task(array.getitem(slice(None)))
    await until(lambda: decoded(array.store, "misses") == 8)
    gate.set()
    assert (await asyncio.wait_for(whole, 60)).tolist() == [2] * 16
    assert [(await part).tolist() for part in parts] == [[1] * 8, [2] * 8]
    check_decoded_quiet(array.store)


async def test_whole_shard_has_no_part_that_was_decoded_while_it_was_fetched(
    slow: Any, clock: FakeClock
) -> None:
    array, others, begin, gate = slow
    part = await begin(slice(4))
    await others.setitem(slice(None), 2)
    clock.advance(1)
    for n in range(4):
        assert (await array.getitem(slice(None))).tolist() == [2] * 16
        await array.store.drain()
        clock.advance(1)
        if n == 1:
            gate.set()
            assert (await part).tolist() == [1] * 4
    check_decoded_quiet(array.store)


def test_whole_shard_is_of_one_value_where_its_bytes_are_evicted_as_it_is_read(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they were all cached when it began does not help: what is not decoded yet would be read anew."""
    source = MemoryStore()
    others = create(source, shards=(16,))
    others[:] = 1
    store = CacheStore(source, max_age_seconds=60, clock=clock, decoded_size=100_000)
    with zarr.config.set({"codec_pipeline.path": f"{Together.__module__}.Together"}):
        array = zarr.open_array(store, path="v")
    sync(store.get("v/c/0", _PROTOTYPE))
    drained_sync(store)
    assert array[0] == 1
    others[:] = 2
    clock.advance(1)
    read = Together.read

    async def read_late(self: Together, *args: Any, **more: Any) -> Any:
        index = store._cache.shared.handle.index
        if (entry := index.handle_of("v/c/0", None, None, 0.0)) is not None:
            index.discard(entry)
        return await read(self, *args, **more)

    monkeypatch.setattr(Together, "read", read_late)
    assert array[:].tolist() == [2] * 16


async def test_reader_in_another_loop_waits_and_goes_on_if_the_leader_is_cancelled() -> None:
    source = StoreDouble(MemoryStore())
    await asyncio.to_thread(create, source)
    store = CacheStore(source, source_id="s", decoded_size=100_000)
    array: Any = await zarr.api.asynchronous.open_array(store=store, path="v")
    gate = source.block("get", times=1)
    leader = asyncio.create_task(array.getitem(slice(0, 4)))
    await asyncio.to_thread(gate.wait_entered)
    copy = zarr.Array(array)
    follower = asyncio.create_task(asyncio.to_thread(copy.__getitem__, slice(0, 4)))
    await until(lambda: decoded(store, "misses") == 2)
    leader.cancel()
    gate.release()
    found: Any = await asyncio.wait_for(follower, 60)
    assert found.tolist() == [0, 1, 2, 3]
    with pytest.raises(asyncio.CancelledError):
        await leader
    check_decoded_quiet(store)


@shards
def test_reader_that_is_cut_off_as_it_begins_to_decode_leaves_nothing_under_way(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    store = CacheStore(MemoryStore(), decoded_size=100_000)
    array = create(store, **more)

    def lead(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Decodings, "lead", lead)
        with pytest.raises(MemoryError):
            array[:]
    check_decoded_quiet(store)
    np.testing.assert_array_equal(array[:], np.arange(16))


@shards
@pytest.mark.usefixtures("patient")
async def test_reader_that_is_cancelled_while_it_waits_keeps_no_chunk_in_use(
    more: dict[str, Any],
) -> None:
    array, gate, leader = await reads_of_two(StoreDouble(MemoryStore()), "v/c/1", more)
    follower = asyncio.create_task(array.getitem(slice(8, 16)))
    await until(lambda: decoded(array.store, "misses") > 4)
    follower.cancel()
    with pytest.raises(asyncio.CancelledError):
        await follower
    gate.release()
    assert (await leader).tolist() == list(range(16))
    check_decoded_quiet(array.store)


@pytest.mark.parametrize("is_one", [True, False])
async def test_chunk_is_decoded_anew_whose_reader_was_in_an_event_loop_that_is_closed(
    is_one: bool,
) -> None:
    """Nothing ends such a reader while those who wait for it, perhaps in the same event loop, refer to it."""
    store = CacheStore(MemoryStore(), decoded_size=2 * ROOM)
    cache: Any = store._decoded
    origin, names = cache.origins.begin(["a"], 0.0)[0], ["a/0", "a/1"]
    loop, other = asyncio.get_running_loop(), asyncio.new_event_loop()
    if is_one:
        dead = [cache.join(name, origin, 16, other)[1] for name in names]
    else:
        decodings = Decodings(other, dict.fromkeys(names, origin))
        assert cache.join_all(decodings, 16) == {}
        dead = [decodings.single[name] for name in names]
    assert decoded(store, "size") == 2 * ROOM
    leads, following = cache.join("a/0", origin, 16, loop)
    assert not leads
    other.close()
    assert not await following.wait()
    # One that waits notices it, and so does one that comes later.
    cache.leave(following)
    assert decoded(store, "size") == ROOM
    for name in names:
        leads, decoding = cache.join(name, origin, 16, loop)
        assert leads
        assert decoding not in dead
        cache.landing.land([(decoding, np.arange(4, dtype="i4"), None)])
    for decoding in dead:
        cache.landing.land([(decoding, np.zeros(4, dtype="i4"), None)])
        cache.give_up(decoding)
    assert all(kept.array[3] == 3 for kept in cache._values.values())
    assert decoded(store, "size") == 2 * ROOM
    check_decoded_quiet(store)


@pytest.mark.parametrize("more", [{}, {"shards": (8,)}], ids=["chunks", "shards"])
def test_reader_in_an_event_loop_that_stops_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    source = StoreDouble(MemoryStore())
    create(source, **more)
    store = CacheStore(source, source_id="s", decoded_size=100_000)
    array = zarr.open_array(store, path="v")
    loop = asyncio.new_event_loop()
    gate = source.block("get")

    async def begin() -> asyncio.Task[Any]:
        reading = asyncio.ensure_future(array._async_array.getitem(slice(None)))
        await until(lambda: gate.entered)
        return reading

    monkeypatch.setattr("zcache._protocol.single_flight.PATIENCE", 0.05)
    reading = loop.run_until_complete(begin())
    runner = threading.Thread(target=loop.run_forever)
    runner.start()
    waits = []

    async def wait(decoding: Decoding, wait: Any = Decoding.wait) -> bool:
        if not decoding.done:
            waits.append(decoding)
            loop.call_soon_threadsafe(loop.stop)
            await asyncio.to_thread(runner.join)
            gate.release()
        return bool(await wait(decoding))

    monkeypatch.setattr(Decoding, "wait", wait)
    np.testing.assert_array_equal(array[:], np.arange(16))
    assert len(waits) == 1
    # Neither chunks nor room are left to it.
    check_decoded_quiet(store)
    for _ in range(2):
        np.testing.assert_array_equal(array[:], np.arange(16))
    assert (len(waits), decoded(store, "hits")) == (1, 4)
    # It goes on.
    found: Any = loop.run_until_complete(reading)
    np.testing.assert_array_equal(found, np.arange(16))
    loop.close()
    check_decoded_quiet(store)


@shards
@pytest.mark.parametrize("change", ["none", "write", "write a chunk", "invalidate", "clear"])
def test_event_loop_that_has_stopped_keeps_no_room(change: str, more: dict[str, Any]) -> None:
    source = StoreDouble(MemoryStore())
    create(source, **more)
    _other(source)
    store = CacheStore(source, source_id="s", decoded_size=4 * ROOM)
    array, other = (zarr.open_array(store, path=path) for path in "vw")
    loop = asyncio.new_event_loop()
    gate = source.block("get")

    async def begin() -> asyncio.Task[Any]:
        reading = asyncio.ensure_future(array._async_array.getitem(slice(None)))
        await until(lambda: gate.entered)
        return reading

    reading = loop.run_until_complete(begin())
    assert decoded(store, "size") == 4 * ROOM
    gate.release()
    wanted = other if change == "none" else array
    expected = np.arange(16)
    if change.startswith("write"):
        where = slice(4) if change.endswith("chunk") else slice(16)
        array[where] = expected[where] = 7
    elif change == "invalidate":
        store.invalidate_sync("v")
    elif change == "clear":
        sync(store.clear_cache())
        assert decoded(store, "size") == 0
    for _ in range(2):
        np.testing.assert_array_equal(wanted[:], expected)
    assert decoded(store, "hits") == 4
    check_decoded_quiet(store)
    # It goes on: nothing that it brings is kept, nor comes in place of what is.
    loop.run_until_complete(reading)
    loop.close()
    check_decoded_quiet(store)
    np.testing.assert_array_equal(wanted[:], expected)
    assert decoded(store, "hits") == 8


def test_error_of_the_source_reaches_each_reader_and_keeps_nothing() -> None:
    source = StoreDouble(MemoryStore())
    create(source)
    store = CacheStore(source, source_id="s", decoded_size=100_000)
    array = zarr.open_array(store, path="v")
    source.fail("get", OSError("unreachable"), times=1)
    with pytest.raises(OSError, match="unreachable"):
        array[:]
    check_decoded_quiet(store)
    np.testing.assert_array_equal(array[:], np.arange(16))


# ----------------------------------------------------------------------- the bound


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["BatchedCodecPipeline", "FusedCodecPipeline"])
def test_bound_holds_at_every_instant_over_many_threads(pipeline: str) -> None:
    if not hasattr(zarr.core.codec_pipeline, pipeline):
        pytest.skip("since zarr 3.4")
    with zarr.config.set({"codec_pipeline.path": f"zarr.core.codec_pipeline.{pipeline}"}):
        store = CacheStore(MemoryStore(), decoded_size=5 * (400 + OVERHEAD) + 50)
        array = zarr.create_array(store, name="v", shape=(40, 100), chunks=(1, 100), dtype="i4")
        sharded = zarr.create_array(
            store, name="s", shape=(40, 100), chunks=(1, 100), shards=(10, 100), dtype="i4"
        )
    values = np.arange(4000).reshape(40, 100) + 1
    array[:] = sharded[:] = values
    done = threading.Event()

    def look() -> int:
        looks = 0
        while not done.is_set():
            check_decoded(store)
            looks += 1
        return looks

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            first = rng.integers(0, 38)
            part = slice(first, first + rng.integers(1, 12))
            for opened in (array, sharded):
                np.testing.assert_array_equal(opened[part], values[part])

    with ThreadPoolExecutor(5) as pool:
        looking = pool.submit(look)
        try:
            list(pool.map(read, range(4)))
        finally:
            done.set()
        assert looking.result(60) > 5
    assert decoded(store, "hits") > 0
    assert store._decoded._index.stats().evictions > 0  # type: ignore[union-attr]
    check_decoded_quiet(store)


def test_chunk_that_is_evicted_while_it_is_looked_at_is_a_miss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = CacheStore(MemoryStore(), decoded_size=2 * ROOM)
    array = create(store)
    array[:4]
    cache: Any = store._decoded

    def is_current(origins: Origins, *args: Any, ask: Any = Origins.is_current) -> Any:
        current = ask(origins, *args)
        # Another reader needs its room.
        cache.clear()
        return current

    hits, misses = decoded(store, "hits"), decoded(store, "misses")
    with monkeypatch.context() as patched:
        patched.setattr(Origins, "is_current", is_current)
        assert cache.get("0/v/c/0", object(), cache.now()) is None
    assert (decoded(store, "hits"), decoded(store, "misses")) == (hits, misses + 1)
    assert decoded(store, "size") == 0
    check_decoded_quiet(store)


def test_chunk_that_is_copied_from_counts_until_it_is_copied() -> None:
    store = CacheStore(MemoryStore(), decoded_size=2 * ROOM)
    array = create(store)
    array[:8]
    cache: Any = store._decoded
    name = "0/v/c/0"
    kept = cache.get(name, object(), cache.now())
    array[4:8]
    # It has been used before the other one.
    array[8:12]
    assert name in cache._values
    assert decoded(store, "size") == 2 * ROOM
    cache.room.unpin(kept)
    assert name not in cache._values
    array[:]
    check_decoded_quiet(store)
    assert decoded(store, "size") == 2 * ROOM


@shards
def test_read_of_more_than_there_is_room_for_keeps_what_it_has_found(more: dict[str, Any]) -> None:
    store = CacheStore(MemoryStore(), decoded_size=2 * ROOM)
    array = create(store, **more)
    cache: Any = store._decoded
    kept: set[str] = set()
    for found in (0, 0, 2, 4):
        assert decoded(store, "hits") == found
        np.testing.assert_array_equal(array[:], np.arange(16))
        assert decoded(store, "size") == 2 * ROOM
        kept = kept or set(cache._values)
        assert set(cache._values) == kept
    # Each chunk takes the place of others nevertheless.
    for at in range(0, 16, 4):
        array[at : at + 4]
        found = decoded(store, "hits")
        array[at : at + 4]
        assert decoded(store, "hits") == found + 1
    check_decoded_quiet(store)


def test_output_of_a_read_is_released_with_its_last_user() -> None:
    store = CacheStore(MemoryStore(), decoded_size=100_000)
    arrays = [create(store, name=f"v{n}", **more) for n, more in enumerate([{}, {"shards": (8,)}])]
    gc.collect()
    gc.disable()
    try:
        for array in arrays:
            for _ in range(2):
                outputs = weakref.ref(array[:])
                assert outputs() is None
    finally:
        gc.enable()


async def test_reader_that_joins_a_chunk_as_it_is_evicted_decodes_it_itself() -> None:
    """Its memory is that of another chunk then."""
    store = CacheStore(MemoryStore(), decoded_size=ROOM)
    cache: Any = store._decoded
    loop = asyncio.get_running_loop()
    origin = cache.origins.begin(["a"], 0.0)[0]
    _, leading = cache.join("a/0", origin, 16, loop)
    index = cache._index

    class Slow:
        """Others go on while a reader joins."""

        def __getattr__(self, name: str) -> Any:
            return getattr(index, name)

        def join(self, *args: Any) -> Any:
            cache._index = index
            joined = index.join(*args)
            cache.landing.land([(leading, np.arange(4, dtype="i4"), None)])
            _, other = cache.join("b/0", cache.origins.begin(["b"], 0.0)[0], 16, loop)
            cache.landing.land([(other, np.zeros(4, dtype="i4"), None)])
            return joined

    cache._index = Slow()
    leads, decoding = cache.join("a/0", origin, 16, loop)
    assert leads
    assert decoding is not leading
    cache.give_up(decoding)
    check_decoded_quiet(store)


@pytest.mark.parametrize("step", ["handle_of", "discard"])
async def test_reader_that_finds_an_old_chunk_leaves_the_new_one_in_its_place(step: str) -> None:
    """Another one brings that as this one drops what it has found, of the same name and size."""
    store = CacheStore(MemoryStore(), decoded_size=100_000)
    cache: Any = store._decoded
    loop = asyncio.get_running_loop()

    def land(value: int) -> None:
        origin = cache.origins.begin(["a"], cache.now())[0]
        _, decoding = cache.join("a/0", origin, 16, loop)
        cache.landing.land([(decoding, np.full(4, value, dtype="i4"), None)])

    land(1)
    await store.set("a", buf(b"new"))
    index = cache._index

    class Slow:
        """Another reader goes on meanwhile."""

        def __getattr__(self, name: str) -> Any:
            if name != step:
                return getattr(index, name)
            cache._index = index
            entry = index.handle_of("a/0", None, None, 0.0)
            cache.room.remove(index.drop_missing("a/0"))
            land(2)
            return (lambda *_: entry) if step == "handle_of" else index.discard

    cache._index = Slow()
    assert cache.get("a/0", object(), cache.now()) is None
    kept = cache.get("a/0", object(), cache.now())
    assert kept is not None
    cache.room.unpin(kept)
    assert (decoded(store, "hits"), decoded(store, "misses")) == (1, 1)
    check_decoded_quiet(store)


@pytest.mark.parametrize("is_kept", [True, False])
async def test_reader_joins_one_of_many_chunks_that_another_one_begins_to_decode(
    is_kept: bool,
) -> None:
    store = CacheStore(MemoryStore(), decoded_size=100_000)
    cache: Any = store._decoded
    loop = asyncio.get_running_loop()
    index, origin = cache._index, cache.origins.begin(["a"], 0.0)[0]
    _, theirs = cache.join("a/3", origin, 16, loop)
    if not is_kept:
        cache._admission.admitted = lambda names, kept: []
    early: list[Any] = []

    class Slow:
        """Others go on while a reader begins."""

        def __getattr__(self, name: str) -> Any:
            return getattr(index, name)

        def lead_all(self, *args: Any) -> Any:
            cache._index = index
            tickets = index.lead_all(*args)
            early.append(cache.join("a/1", origin, 16, loop))
            return tickets

    cache._index = Slow()
    decodings = Decodings(loop, {f"a/{n}": origin for n in range(4)})
    assert cache.join_all(decodings, 16) == {"a/3": theirs}
    late = cache.join("a/2", origin, 16, loop)
    assert not early[0][0]
    assert not late[0]
    assert early[0][1] is decodings.single["a/1"]
    assert late[1] is decodings.single["a/2"]
    cache.pass_over(decodings)
    for decoding in decodings.single.values():
        cache.landing.land([(decoding, np.arange(4, dtype="i4"), None)])
    # Who comes now finds what is kept, or begins anew.
    leads, again = cache.join("a/0", origin, 16, loop)
    assert leads
    cache.give_up(again)
    for _, decoding in (*early, late):
        assert decoding.kept.array[3] == 3
        cache.leave(decoding)
    cache.leave(theirs)
    cache.give_up(theirs)
    assert decoded(store, "size") == (3 * ROOM if is_kept else 0)
    check_decoded_quiet(store)


async def test_chunk_that_was_passed_over_is_decoded_anew_while_its_reader_goes_on() -> None:
    store = CacheStore(MemoryStore(), decoded_size=100_000)
    cache: Any = store._decoded
    loop = asyncio.get_running_loop()
    origin = cache.origins.begin(["a"], 0.0)[0]
    cache._admission.admitted = lambda names, kept: []
    decodings = Decodings(loop, {f"a/{n}": origin for n in range(2)})
    assert cache.join_all(decodings, 16) == {}
    assert decodings.pass_over("a/0")
    leads, anew = cache.join("a/0", origin, 16, loop)
    assert leads
    cache.give_up_all(decodings)
    assert cache.join("a/0", origin, 16, loop) == (False, anew)
    cache.landing.land([(anew, np.arange(4, dtype="i4"), None)])
    assert anew.kept.array[3] == 3
    cache.leave(anew)
    check_decoded_quiet(store)


async def test_chunk_is_decoded_anew_that_a_thread_was_passing_over_as_its_reader_went() -> None:
    store = CacheStore(MemoryStore(), decoded_size=100_000)
    cache: Any = store._decoded
    loop = asyncio.get_running_loop()
    origin = cache.origins.begin(["a"], 0.0)[0]
    cache._admission.admitted = lambda names, kept: []
    decodings = Decodings(loop, {f"a/{n}": origin for n in range(2)})
    assert cache.join_all(decodings, 16) == {}
    # The thread stands in the middle of `Decodings.pass_over`.
    ticket = decodings.tickets.pop("a/0")
    cache.give_up_all(decodings)
    leads, anew = cache.join("a/0", origin, 16, loop)
    assert leads
    decodings.passed["a/0"] = ticket
    assert cache.join("a/0", origin, 16, loop) == (False, anew)
    cache.landing.land([(anew, np.arange(4, dtype="i4"), None)])
    assert anew.kept.array[3] == 3
    cache.leave(anew)
    check_decoded_quiet(store)


async def _landed() -> tuple[CacheStore, Any, Decodings, Callable[[str], Any]]:
    """A read of two chunks has kept the first of them, and goes on; another reader joins one."""
    store = CacheStore(MemoryStore(), decoded_size=100_000)
    cache: Any = store._decoded
    (origin,) = cache.origins.begin(["a"], 0.0)
    loop = asyncio.get_running_loop()
    decodings = Decodings(loop, {f"a/{n}": origin for n in range(2)})
    assert cache.join_all(decodings, 16) == {}
    cache.landing.land([(decodings.single["a/0"], np.arange(4, dtype="i4"), None)], decodings)
    return store, cache, decodings, lambda name: cache.join(name, origin, 16, loop)


async def test_chunk_is_served_before_the_rest_of_its_read_is_there() -> None:
    store, cache, decodings, join = await _landed()
    leads, decoding = join("a/0")
    assert not leads
    assert await decoding.wait()
    assert decoding.kept.array[3] == 3
    assert cache.get("a/0", object(), 0.0) is None
    cache.give_up_all(decodings)
    found = cache.get("a/0", object(), 0.0)
    assert found is decoding.kept
    cache.room.unpin(found, found)
    assert decoded(store, "size") == ROOM
    check_decoded_quiet(store)


async def test_chunk_is_not_kept_if_it_changes_before_the_rest_of_its_read_is_there() -> None:
    store, cache, decodings, join = await _landed()
    cache.clear()
    leads, decoding = join("a/0")
    assert leads
    cache.give_up(decoding)
    cache.give_up_all(decodings)
    assert decoded(store, "size") == 0
    check_decoded_quiet(store)


async def test_chunk_that_a_thread_decodes_after_the_end_of_its_read_is_kept_at_once() -> None:
    store, cache, decodings, _ = await _landed()
    late = decodings.single["a/1"]
    # The thread stands in the middle of it.
    late.is_ended = True
    cache.give_up_all(decodings)
    late.is_ended = False
    cache.landing.land([(late, np.arange(4, dtype="i4"), None)], decodings)
    assert decoded(store, "size") == 2 * ROOM
    check_decoded_quiet(store)


async def test_chunk_is_found_that_had_landed_when_the_event_loop_of_its_reader_was_closed() -> (
    None
):
    store = CacheStore(MemoryStore(), decoded_size=100_000)
    cache: Any = store._decoded
    (origin,) = cache.origins.begin(["a"], 0.0)
    other = asyncio.new_event_loop()
    decodings = Decodings(other, {f"a/{n}": origin for n in range(2)})
    assert cache.join_all(decodings, 16) == {}
    cache.landing.land([(decodings.single["a/0"], np.arange(4, dtype="i4"), None)], decodings)
    other.close()
    leads, decoding = cache.join("a/0", origin, 16, asyncio.get_running_loop())
    assert leads
    cache.give_up(decoding)
    found = cache.get("a/0", object(), 0.0)
    assert found.array[3] == 3
    cache.room.unpin(found)
    cache.give_up_all(decodings)
    check_decoded_quiet(store)


async def test_chunk_gets_no_late_room_once_its_reader_has_gone() -> None:
    """A thread of the pipeline may go on without it."""
    store = CacheStore(MemoryStore(), decoded_size=2 * ROOM)
    cache: Any = store._decoded
    origin = cache.origins.begin(["a"], 0.0)[0]
    names = [f"a/{n}" for n in range(3)]
    decodings = Decodings(asyncio.get_running_loop(), dict.fromkeys(names, origin))
    assert cache.join_all(decodings, 16) == {}
    assert decoded(store, "size") == 2 * ROOM
    cache.room.postpone(decodings)
    assert (decoded(store, "size"), decodings.late) == (0, set(names))
    assert cache.room.admit_late(decodings, names[0], 16).is_admitted
    assert decoded(store, "size") == ROOM
    cache.give_up_all(decodings)
    for name in names:
        assert cache.room.admit_late(decodings, name, 16) is None
    check_decoded_quiet(store)


async def test_reader_does_not_join_a_decode_of_bytes_that_have_expired(clock: FakeClock) -> None:
    store = CacheStore(MemoryStore(), max_age_seconds=10, clock=clock, decoded_size=100_000)
    cache: Any = store._decoded
    loop = asyncio.get_running_loop()

    def join() -> Any:
        return cache.join("v/c/0/0", cache.origins.begin(["v/c/0"], clock())[0], 16, loop)

    leads, leading = join()
    assert leads
    clock.advance(9)
    leads, following = join()
    assert not leads
    assert following is leading
    cache.leave(following)
    clock.advance(1)
    leads, again = join()
    assert leads
    assert again is not leading
    for decoding in (leading, again):
        cache.give_up(decoding)
    check_decoded_quiet(store)


async def test_reader_of_bytes_on_their_way_joins_a_decode_but_begins_none(
    clock: FakeClock,
) -> None:
    store = CacheStore(MemoryStore(), max_age_seconds=10, clock=clock, decoded_size=100_000)
    cache: Any = store._decoded
    loop = asyncio.get_running_loop()
    key, index = "v/c/0", store._cache.shared.handle.index

    def join(name: str) -> Any:
        return cache.join(name, cache.origins.begin([key], clock())[0], 16, loop)

    leads, leading = join("v/c/0/0")
    assert leads
    ticket = index.join(key, None, object(), clock(), False)
    leads, following = join("v/c/0/0")
    assert not leads
    assert following is leading
    assert join("v/c/0/1") is None
    # A change ends that.
    index.invalidate(key)
    assert join("v/c/0/0") is None
    cache.leave(following)
    cache.give_up(leading)
    index.complete_flight(key, ticket)
    check_decoded_quiet(store)


def test_bound_is_kept_by_chunks_that_are_hardly_anything() -> None:
    """What they take beside their elements counts, and there are few that only hold the fill value."""
    store = CacheStore(MemoryStore(), decoded_size=64 * (1 + OVERHEAD))
    more: dict[str, Any] = {"chunks": (1,), "dtype": "u1", "fill_value": 0}
    array = zarr.create_array(store, name="v", shape=(200,), **more)
    array[:] = 1
    sparse = zarr.create_array(store, name="s", shape=(200,), shards=(100,), **more)
    sparse[::100] = 1
    cache: Any = store._decoded
    for opened in (array, sparse):
        for _ in range(2):
            opened[:]
        assert sum(kept.memory is not None for kept in cache._values.values()) <= 64
    fills = sum(kept.memory is None for kept in cache._values.values())
    assert 1 <= fills <= 64 * (1 + OVERHEAD) // 4096
    check_decoded_quiet(store)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("i4", 1), ("f8", np.nan), (">f8", 1), ("c16", 1j), ("U5", "a"), ("S3", b"a")],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_chunks_of_the_fill_value_take_no_memory_whatever_their_type(
    kind: str, value: Any, order: Any
) -> None:
    store = CacheStore(MemoryStore(), decoded_size=2**20)
    values = np.full((8, 6), value, kind)
    fill = values[0, 0]
    # One chunk has it as its first and last element, and in all bits but one.
    values.view("u1")[2, values.itemsize] ^= 1
    array = zarr.create_array(
        store,
        name="v",
        shape=(8, 6),
        chunks=(2, 3),
        shards=(8, 6),
        dtype=values.dtype,
        fill_value=fill,
        config={"order": order, "write_empty_chunks": True},
    )
    array[:] = values
    for _ in range(2):
        assert array[:].tobytes() == values.tobytes()
    kept = list(store._decoded._values.values())  # type: ignore[union-attr]
    assert [one.memory is None for one in kept].count(False) == 1
    check_decoded_quiet(store)


@pytest.mark.parametrize("more", [{}, {"shards": (64,)}], ids=["chunks", "shards"])
@pytest.mark.parametrize("length", [30, 100, 1000, 3500])
def test_kept_chunks_count_for_what_they_take_however_long_their_names_are(
    length: int, more: dict[str, Any]
) -> None:
    source = MemoryStore()
    path = "/".join(["p" * min(49, length - at) for at in range(0, length, 50)])
    array = zarr.create_array(source, name=path, shape=(4096,), chunks=(4,), dtype="u1", **more)
    array[:] = np.arange(4096) % 5
    array = with_decoded_cache(array, 2**26)
    array[:64]
    cache: Any = array.store._decoded
    gc.collect()
    before = cache.size
    tracemalloc.start()
    try:
        for at in range(64, 4096, 256):
            array[at : at + 256]
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(cache._values) == 1024
    assert cache.size - before >= taken
    check_decoded(array.store)


def test_least_recently_used_chunks_go_first() -> None:
    store = CacheStore(MemoryStore(), decoded_size=3 * ROOM)
    array = create(store)
    for at in (0, 4, 8, 0, 12):
        array[at]
    before = decoded(store, "hits")
    for at in (0, 8, 12):
        array[at]
    assert decoded(store, "hits") == before + 3


def _other(store: Any) -> Any:
    """Another array, of as many chunks."""
    array = zarr.create_array(store, name="w", shape=(16,), chunks=(4,), dtype="i4", fill_value=-1)
    array[:] = np.arange(16)
    return array


CHANGES: dict[str, Any] = {
    "delete": lambda store: sync(store.delete_dir("v")),
    "delete chunks": lambda store: sync(store.delete_dir("v/c")),
    "invalidate": lambda store: store.invalidate_sync("v"),
    "clear the cache": lambda store: sync(store.clear_cache()),
    "clear": lambda store: sync(store.clear()),
}


@shards
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_of_one_array", [False, True])
def test_chunks_that_a_change_ends_take_no_room(
    change: str, is_of_one_array: bool, more: dict[str, Any], tmp_path: Path
) -> None:
    if is_of_one_array:
        array = with_decoded_cache(create(LocalStore(tmp_path), **more), 100_000)
    else:
        array = create(CacheStore(MemoryStore(), decoded_size=100_000), **more)
    store: Any = array.store
    other = _other(store)
    for _ in range(2):
        array[:], other[:]
    assert decoded(store, "size") == 8 * ROOM
    CHANGES[change](store)
    assert decoded(store, "size") == (0 if change.startswith("clear") else 4 * ROOM)
    check_decoded_quiet(store)


def test_group_named_by_a_number_that_is_deleted_takes_its_chunks_along() -> None:
    store = CacheStore(MemoryStore(), decoded_size=100_000)
    array = zarr.create_array(store, name="2020/v", shape=(16,), chunks=(4,), dtype="i4")
    array[:] = 1
    for _ in range(2):
        array[:]
    assert decoded(store, "size") == 4 * ROOM
    sync(store.delete_dir("2020"))
    assert decoded(store, "size") == 0
    check_decoded_quiet(store)


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("how", ["expire", "by others", "write"])
def test_chunks_that_have_lapsed_go_before_all_others(
    how: str, eviction: str, clock: FakeClock, tmp_path: Path
) -> None:
    source = MemoryStore()
    create(source)
    _other(source)
    options: dict[str, Any] = {}
    if how == "expire":
        options = {"max_age_seconds": {"v/**": 10}, "clock": clock}
    elif how == "by others":
        options = {"cache_store": tmp_path / "cache"}
    store = CacheStore(source, source_id="s", decoded_size=6 * ROOM, eviction=eviction, **options)
    array, other = (zarr.open_array(store, path=path) for path in "vw")
    for part in (array, slice(None)), (other, slice(8)), (array, slice(None)):
        for _ in range(2):
            part[0][part[1]]
            store.drain_sync()
    # Used least recently are those that are of use.
    assert decoded(store, "size") == 6 * ROOM
    if how == "expire":
        clock.advance(20)
    elif how == "write":
        array[:] = 3
    else:
        process: Any = multiprocessing.get_context("fork").Process(
            target=store.invalidate_sync, args=("v",)
        )
        process.start()
        process.join(60)
        assert process.exitcode == 0
    other[8:]
    hits = decoded(store, "hits")
    other[:]
    assert decoded(store, "hits") == hits + 4
    check_decoded_quiet(store)


def test_chunks_that_have_lapsed_count_neither_hits_nor_misses_as_they_go() -> None:
    store = CacheStore(MemoryStore(), decoded_size=2 * ROOM)
    array = create(store)
    # Each is read once, and then written.
    for begin in range(0, 16, 4):
        array[begin]
        array[begin : begin + 4] = 3
    assert (decoded(store, "hits"), decoded(store, "misses")) == (0, 4)


def test_few_chunks_are_looked_at_each_time_room_is_needed(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lapsed, "STEP", 3)
    source = MemoryStore()
    create(source)
    store = CacheStore(source, decoded_size=4 * ROOM, max_age_seconds=10, clock=clock)
    cache: Any = store._decoded
    array = zarr.open_array(store, path="v")
    for _ in range(2):
        array[:]
    find = cache.room.lapsed.find
    clock.advance(20)
    assert [len(find(1)) for _ in range(6)] == [3, 1, 3, 1, 3, 1]
    clock.advance(-20)
    assert find(1) == []


def test_larger_than_the_bound_is_not_kept(store: CacheStore) -> None:
    array = zarr.create_array(store, name="large", shape=(5000,), chunks=(5000,), dtype="i4")
    array[:] = 1
    for _ in range(2):
        assert (array[:] == 1).all()
    assert (decoded(store, "hits"), decoded(store, "size")) == (0, 0)


def test_unused_room_is_not_taken_for_chunks_that_are_not_there() -> None:
    store = CacheStore(MemoryStore(), decoded_size=3 * ROOM)
    array = create(store)
    sparse = zarr.create_array(store, name="s", shape=(64,), chunks=(4,), dtype="i4")
    sparse[:]
    array[:12]
    hits = decoded(store, "hits")
    sparse[:]
    array[:12]
    assert decoded(store, "hits") == hits + 3


def test_drained_directory_serves_what_was_decoded(tmp_path: Path) -> None:
    """A hit reads nothing: neither the source nor the cache store."""
    source = StoreDouble(MemoryStore())
    cache = StoreDouble(MemoryStore())
    store = CacheStore(source, cache_store=cache, source_id="s", decoded_size=100_000)
    array = create(store)
    array[:]
    drained_sync(store)

    def counts() -> tuple[int, int]:
        return len(source.requests), len(cache.requests)

    before = counts()
    np.testing.assert_array_equal(array[:], np.arange(16))
    assert counts() == before
