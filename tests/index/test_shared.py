"""Several stores over one cache store, in one process."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from directories import flip, is_in_use
from doubles import GatedStore, SyncDictStore, WatchedDict, reached
from forks import run
from pools import CACHES, ON_DISK
from support import buf, check_quiet, fill, logged, read, read_through
from zcache import CacheOwnershipError, CachePool, CacheStore
from zcache._index import shared
from zcache._runtime import lingering
from zcache._source.location import Location
from zcache.testing import (
    FakeClock,
    StoreDouble,
    check_invariants_async,
    shares_index,
    stored_sizes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store


@pytest.fixture(params=["memory", "local"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The kinds of cache store over which several stores share an index."""
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "cache")


async def test_stores_over_one_cache_store_have_one_index(cache: Store) -> None:
    source = StoreDouble(MemoryStore())
    one, other = (CacheStore(source, cache_store=cache, max_size=100) for _ in range(2))
    await fill(one, a=bytes(60))
    assert other.cache_info() == one.cache_info()
    source.take()
    assert await read_through(other, "a") == bytes(60)
    assert source.take() == {}
    # What is written through one is not served old by the other, and they have one bound.
    await fill(other, a=bytes(50), b=bytes(50))
    assert await read_through(one, "a") == bytes(50)
    await fill(one, c=bytes(50))
    assert stored_sizes(one) == {"a": 50, "c": 50}
    await other.delete("a")
    assert await read_through(one, "a") is None
    await one.clear_cache()
    assert stored_sizes(one) == {}
    await check_quiet(one)
    await check_quiet(other)


async def test_stores_over_one_cache_store_share_a_pending_value(tmp_path: Path) -> None:
    source, cache = StoreDouble(MemoryStore({"k": buf(b"1")})), StoreDouble(MemoryStore())
    one, other = (CacheStore(source, cache_store=cache) for _ in range(2))
    gate = cache.block("set")
    assert await read(one, "k") == b"1"
    assert await read(other, "k") == b"1"
    assert source.take() == {"get": 1}
    assert not await other.drain(timeout=0)
    gate.release()
    assert await other.drain()
    assert stored_sizes(one) == {"k": 1}


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
async def test_many_stores_over_one_directory_take_no_descriptors_more(tmp_path: Path) -> None:
    source = StoreDouble(MemoryStore({"k": buf(b"1")}))
    cache = LocalStore(tmp_path / "cache")
    first = CacheStore(source, cache_store=cache)
    assert await read_through(first, "k") == b"1"
    before = open_descriptors()
    stores = [CacheStore(source, cache_store=LocalStore(cache.root)) for _ in range(300)]
    assert open_descriptors() <= before + 2
    source.take()
    for store in stores:
        assert await read(store, "k") == b"1"
    assert source.take() == {}
    assert [store.cache_stats()["hits"] for store in stores] == [1] * 300


@pytest.mark.parametrize("second", [40, None, 200])
async def test_bounds_of_several_stores_the_smallest_is_in_force(
    cache: Store, second: int | None
) -> None:
    source = MemoryStore()
    one = CacheStore(source, cache_store=cache, max_size=100)
    await fill(one, a=bytes(40), b=bytes(40))
    other = CacheStore(source, cache_store=cache, max_size=second)
    await fill(one, c=bytes(40))
    await fill(other, d=bytes(40))
    assert sorted(stored_sizes(one)) == (["d"] if second == 40 else ["c", "d"])
    await check_quiet(one)
    await check_quiet(other)


async def test_limits_of_a_store_that_is_gone_are_in_force_no_more(
    cache: Store, clock: FakeClock
) -> None:
    source = StoreDouble(MemoryStore())
    store = CacheStore(source, cache_store=cache, max_size=100, clock=clock)
    strict = CacheStore(source, cache_store=cache, max_size=10, max_age_seconds=0, clock=clock)
    await fill(store, a=bytes(20))
    assert store.cache_info()["cached_keys"] == 0
    del strict
    gc.collect()
    await fill(store, a=bytes(20))
    clock.advance(1)
    source.take()
    assert await read_through(store, "a") == bytes(20)
    assert source.take() == {}
    await check_quiet(store)


@pytest.mark.parametrize("make", [LocalStore, CachePool, lambda _: StoreDouble(MemoryStore())])
def test_pending_fills_are_bound_by_the_stores_that_live(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    source, cache = MemoryStore(), make(tmp_path / "cache")

    def opened(size: int | None) -> CacheStore:
        return CacheStore(source, cache_store=cache, source_id="s", max_pending_size=size)

    lax = opened(100 << 20)
    queue = lax._cache.shared.fills
    assert queue.max_pending_size == 100 << 20
    strict = opened(1)
    assert queue.max_pending_size == 1
    del strict
    gc.collect()
    assert queue.max_pending_size == 100 << 20
    other = opened(None)
    del lax
    gc.collect()
    assert queue.max_pending_size == 64 << 20
    del other


@pytest.mark.parametrize("make", [LocalStore, CachePool])
def test_space_is_left_free_for_the_stores_that_live(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    source, cache = MemoryStore(), make(tmp_path / "cache")

    def opened(size: int | None) -> CacheStore:
        return CacheStore(source, cache_store=cache, source_id="s", min_free_space=size)

    lax = opened(10)
    filler = lax._cache.shared.fills.filler
    strict = opened(20)
    assert filler.min_free_space == 20
    del strict
    gc.collect()
    assert filler.min_free_space == 10
    other = opened(None)
    del lax
    gc.collect()
    assert filler.min_free_space is None
    del other


def test_free_space_of_a_pool_is_the_most_that_those_who_use_it_ask_for(tmp_path: Path) -> None:
    path = tmp_path / "pool"

    def opened(name: str, free: int | None = None) -> CacheStore:
        cache = CachePool(path)
        return CacheStore(MemoryStore(), cache_store=cache, source_id=name, min_free_space=free)

    store = opened("one", 10)
    filler = store._cache.shared.fills.filler
    assert filler.min_free_space == 10
    pool = CachePool(path, min_free_space=30)
    other = opened("two", 20)
    assert {filler.min_free_space, other._cache.shared.fills.filler.min_free_space} == {30}
    del pool
    gc.collect()
    assert {filler.min_free_space, other._cache.shared.fills.filler.min_free_space} == {20}
    del other
    gc.collect()
    assert filler.min_free_space == 10


def test_a_cache_in_memory_of_another_source_is_refused() -> None:
    cache, source = MemoryStore(), MemoryStore()
    first = CacheStore(source, cache_store=cache)
    with pytest.raises(ValueError, match=r"Give each source"):
        CacheStore(MemoryStore(), cache_store=cache)
    assert first == CacheStore(source, cache_store=cache)


def test_a_directory_of_another_unnamed_source_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LocalStore(tmp_path / "cache")
    first = CacheStore(MemoryStore({"k": buf(b"1")}), cache_store=cache)
    assert sync(read_through(first, "k")) == b"1"
    caplog.clear()
    other = CacheStore(MemoryStore({"k": buf(b"2")}), cache_store=cache)
    assert len([record for record in logged(caplog) if record.levelname == "WARNING"]) <= 2
    for _ in range(2):
        assert sync(read_through(other, "k")) == b"2"
        assert sync(read_through(first, "k")) == b"1"
    assert other.cache_info()["cached_keys"] == 0
    assert first.cache_stats()["hits"] == 2


async def test_what_is_not_of_zcache_is_refused_or_adopted() -> None:
    inside = WatchedDict()
    cache, source = MemoryStore(inside), StoreDouble(MemoryStore())
    await cache.set("a", buf(b"12345"))
    with pytest.raises(ValueError, match=r"not empty .*'a'.* adopt=True"):
        CacheStore(source, cache_store=cache)
    store = CacheStore(source, cache_store=cache, adopt=True, max_size=8)
    assert store.cache_info()["current_size"] == 5
    assert await read_through(store, "a") == b"12345"
    assert source.take() == {}
    await fill(store, b=b"12345")
    assert stored_sizes(store) == {"b": 5}
    assert inside.peak == 5
    await check_quiet(store)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
async def test_copies_share_a_source_in_memory(how: str) -> None:
    """They share the cache, so they must read the same data: in its process, the original."""
    store = CacheStore(MemoryStore())
    await fill(store, a=b"1")
    copied = copy.deepcopy(store) if how == "deepcopy" else pickle.loads(pickle.dumps(store))
    await fill(copied, a=b"2")
    assert await read_through(store, "a") == await read(copied, "a") == b"2"
    await copied.delete("a")
    assert await read_through(store, "a") is await read(copied, "a") is None


COPIES = """
import pickle, sys
from zarr.abc.store import RangeByteRequest
from zarr.core.sync import sync
from support import read
first, second = pickle.loads(bytes.fromhex(sys.stdin.read()))
one, again, two = pickle.loads(first), pickle.loads(first), pickle.loads(second)
assert sync(read(one, "a")) is sync(read(again, "a")) is None
assert sync(read(two, "a")) == b"1"
assert one == again and one != two
"""


def test_copies_in_another_process_of_other_contents_are_other_sources() -> None:
    """What arrives later may hold newer data than what arrived first."""
    source = MemoryStore()
    store = CacheStore(source)
    first = pickle.dumps(store)
    sync(source.set("a", buf(b"1")))
    both = pickle.dumps((first, pickle.dumps(store)))
    done = subprocess.run(
        [sys.executable, "-c", COPIES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        input=both.hex(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def assert_shared(one: CacheStore, other: CacheStore) -> None:
    """Assert that two stores have one index."""
    assert shares_index(one, other)


def remote(where: Path, **options: Any) -> Store:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url(f"file://{where}", storage_options={"auto_mkdir": True}, **options)


class Elsewhere(SyncDictStore):
    """A store of the user's own."""


def in_memory() -> Store:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url("memory://test-one-cache")


@pytest.mark.parametrize("kind", ["listed", "listed, two objects", "memory of fsspec", "own"])
async def test_other_stores_of_one_place_have_one_index(tmp_path: Path, kind: str) -> None:
    make = {
        "listed": lambda: [remote(tmp_path / "cache")] * 2,
        "listed, two objects": lambda: [remote(tmp_path / "cache") for _ in range(2)],
        "memory of fsspec": lambda: [in_memory() for _ in range(2)],
        "own": lambda: [Elsewhere()] * 2,
    }
    held_in: list[Any] = make[kind]()
    source = GatedStore({"k": b"old"})
    one, other = (
        CacheStore(source, cache_store=cache, max_size=100, source_id="x") for cache in held_in
    )
    for store in (one, other):
        assert await read_through(store, "missing") is None
    # A fill of the one that has read the old value does not land after the other's write.
    source.late["get"] = 1
    task = asyncio.ensure_future(read(other, "k"))
    await reached(source)
    await one.set("k", buf(b"new"))
    source.release()
    await task
    for store in (other, one):
        assert await read_through(store, "k") == b"new"
        assert store.cache_stats()["damaged"] == 0
    for number in range(5):
        await fill(one, **{f"a{number}": bytes(20)})
        await fill(other, **{f"b{number}": bytes(20)})
    assert one.cache_info() == other.cache_info()
    assert 0 < one.cache_info()["current_size"] <= 100
    await check_invariants_async(one)


@pytest.mark.parametrize("kind", ["listed", "own"])
async def test_an_index_ends_with_the_last_store_that_uses_it(tmp_path: Path, kind: str) -> None:
    cache: Any = Elsewhere() if kind == "own" else remote(tmp_path / "cache")
    store = CacheStore(MemoryStore(), cache_store=cache)
    with pytest.raises(ValueError, match=r"holds the cache of .* source_id="):
        CacheStore(MemoryStore(), cache_store=cache)
    del store
    gc.collect()
    CacheStore(MemoryStore(), cache_store=cache)


async def test_verify_of_several_stores_the_strictest_is_in_force(tmp_path: Path) -> None:
    cache, source = LocalStore(tmp_path), StoreDouble(MemoryStore())
    one = CacheStore(source, cache_store=cache, verify="never", source_id="s")
    await fill(one, a=b"12345")
    await one.drain()
    other = CacheStore(source, cache_store=cache, verify="always", source_id="s")
    for _ in range(2):
        assert await read(other, "a") == b"12345"
    flip(tmp_path / "a", 4, 0)
    assert await read(one, "a") == b"12345"
    assert one.cache_stats()["damaged"] == 1


async def test_the_index_of_a_dict_outlives_the_store_that_it_was_made_for() -> None:
    values: dict[str, Any] = {}
    source = MemoryStore({"k": buf(b"old!")})
    first, second = MemoryStore(values), MemoryStore(values)
    one = CacheStore(source, cache_store=first, max_size=4)
    two = CacheStore(source, cache_store=second)
    assert await read(two, "k") == b"old!"
    del one, first
    gc.collect()
    three = CacheStore(source, cache_store=MemoryStore(values))
    assert shares_index(three, two)
    await three.set("k", buf(b"new!"))
    assert await read(two, "k") == b"new!"
    del two, three, second
    gc.collect()
    # Without a store over it, nothing is known of what the dict holds.
    with pytest.raises(ValueError, match=r"does not know what that is.* adopt=True") as refused:
        CacheStore(source, cache_store=MemoryStore(values))
    assert "not filled by zcache" not in str(refused.value)
    four = CacheStore(source, cache_store=MemoryStore(values), adopt=True)
    assert await read(four, "k") == b"new!"


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_what_would_be_refused_again_is_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "file").write_text("mine")
    caches: dict[str, Callable[[], Any]] = {
        "memory": lambda: MemoryStore({"k": buf(b"mine")}),
        "directory": lambda: LocalStore(tmp_path),
    }
    waits: list[None] = []
    monkeypatch.setattr(lingering, "make_way", lambda: waits.append(None))
    with pytest.raises(CacheOwnershipError, match="is not empty"):
        CacheStore(MemoryStore(), cache_store=caches[kind](), source_id="s")
    assert not waits
    # What is in use may go.
    cache = MemoryStore()
    used = CacheStore(MemoryStore(), cache_store=cache)
    with pytest.raises(CacheOwnershipError, match="holds the cache of another MemoryStore"):
        CacheStore(MemoryStore(), cache_store=cache)
    assert waits
    del used


def test_stores_inside_each_other_are_two_sources(tmp_path: Path) -> None:
    cache = MemoryStore()
    first = CacheStore(LocalStore(tmp_path / "data"), cache_store=cache)
    with pytest.raises(ValueError, match=r"holds the cache of file:"):
        CacheStore(LocalStore(tmp_path / "data/array"), cache_store=cache)
    with pytest.raises(ValueError, match=r"holds the cache of"):
        CacheStore(LocalStore(tmp_path / "other"), cache_store=cache, source_id="y")
    again = CacheStore(LocalStore(tmp_path / "data", read_only=True), cache_store=cache)
    assert_shared(first, again)


def test_one_source_for_reading_and_for_writing(tmp_path: Path) -> None:
    cache = MemoryStore()
    reader = CacheStore(remote(tmp_path, read_only=True), cache_store=cache)
    writer = CacheStore(remote(tmp_path), cache_store=cache)
    assert_shared(writer, reader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_they_have_one_index_in_a_forked_child_too() -> None:
    cache, source = Elsewhere(), SyncDictStore({"a": b"1"})
    one, other = (CacheStore(source, cache_store=cache) for _ in range(2))
    sync(read_through(one, "a"))

    def child() -> None:
        assert one.cache_info()["cached_keys"] == other.cache_info()["cached_keys"]
        # A thread's own way, for the event loop of zarr stayed with the parent.
        assert one.get_sync("a").to_bytes() == b"1"
        assert shares_index(other, one)

    assert run(child) == 0
    assert other.cache_info()["cached_keys"] == 1
    assert_shared(one, other)


def test_a_store_that_is_made_is_compared_only_with_those_that_its_place_may_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[Any] = []
    overlaps = Location.overlaps

    def noted(self: Location, other: Location) -> bool:
        compared.append((self, other))
        return overlaps(self, other)

    monkeypatch.setattr(Location, "overlaps", noted)
    gc.collect()
    before = len(shared._by_root)
    stores = [CacheStore(MemoryStore(), cache_store=MemoryStore()) for _ in range(20)]
    # Its cache store with its own source, and no other one.
    assert len(compared) <= len(stores)
    assert len(shared._by_root) == before + 20
    del stores
    gc.collect()
    assert len(shared._by_root) == before


def test_stores_are_collected_while_another_is_made() -> None:
    """The garbage collector ends them at any moment, in the middle of a look at who is there."""
    threshold = gc.get_threshold()
    collected = []
    try:
        for after in range(0, 200, 10):
            gc.disable()
            for _ in range(10):
                store: Any = CacheStore(SyncDictStore(), cache_store=Elsewhere())
                store.itself = store
            last = weakref.ref(store)
            del store
            # Not at once: later in each round, at another step of the making.
            gc.set_threshold(gc.get_count()[0] + after, 10, 10)
            gc.enable()
            kept = CacheStore(SyncDictStore({"k": b"1"}), cache_store=Elsewhere())
            collected.append(last() is None)
            for _ in range(2):
                assert sync(read_through(kept, "k")) == b"1"
            assert kept.cache_stats()["hits"] == 1
    finally:
        gc.enable()
        gc.set_threshold(*threshold)
    assert sum(collected) > 2


@pytest.mark.parametrize("kind", ["memory", "directory", "store"])
def test_store_without_references_is_gone_at_once(tmp_path: Path, kind: str) -> None:
    """Not only once the garbage collector runs: the next store of the place begins anew."""
    caches: dict[str, Any] = {
        "memory": MemoryStore,
        "directory": lambda: LocalStore(tmp_path),
        "store": SyncDictStore,
    }
    gc.collect()
    before = len(shared.live())
    gc.disable()
    try:
        store = CacheStore(SyncDictStore({"k": b"v"}), cache_store=caches[kind]())
        assert store.get_sync("k") is not None
        assert store.drain_sync()
        assert len(shared.live()) == before + 1
        handle = weakref.ref(store._cache.shared.handle)
        del store
        assert len(shared.live()) == before
        # It has the memory of the index.
        assert handle() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.parametrize("decoded_size", [None, 2**20])
async def test_directory_of_a_store_without_references_is_free_at_once(
    tmp_path: Path, kind: str, decoded_size: int | None
) -> None:
    """No thread that has worked for it keeps it in use, nor does anything wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            source = MemoryStore()
            for n in range(20):
                await source.set(f"c/{n}", buf(bytes(100)))
            cache = CACHES[kind](tmp_path)
            store = CacheStore(source, cache_store=cache, decoded_size=decoded_size)
            del cache
            for _ in range(2):
                await asyncio.gather(*[read(store, f"c/{n}") for n in range(30)])
                await store.drain()
            assert store.cache_stats()["hits"] >= 20
            assert await read(store, "c/0", RangeByteRequest(2, 4)) == bytes(2)
            await store.set("c/1", buf(b"1"))
            await store.delete("c/2")
            await store.drain()
            assert is_in_use(tmp_path)
            del store
            assert not is_in_use(tmp_path)
    finally:
        gc.enable()
