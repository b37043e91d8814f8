"""Several stores over one cache store, in one process."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from coherence_support import GatedStore, SyncDictStore, reached
from support import CountingStore, WatchedDict, buf, check_books, fill, held, read
from zcache import CacheStore, _sharing

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

    from support import Clock


@pytest.fixture(params=["memory", "local"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The cache stores whose index several stores share."""
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "cache")


async def test_one_index(cache: Store) -> None:
    source = CountingStore(MemoryStore())
    one, other = (CacheStore(source, cache_store=cache, max_size=100) for _ in range(2))
    await fill(one, a=bytes(60))
    assert other.cache_info() == one.cache_info()
    source.take()
    assert await read(other, "a") == bytes(60)
    assert source.take() == {}
    # What is written through one is not served old by the other, and they have one bound.
    await fill(other, a=bytes(50), b=bytes(50))
    assert await read(one, "a") == bytes(50)
    await fill(one, c=bytes(50))
    assert held(cache) == {"a": 50, "c": 50}
    await other.delete("a")
    assert await read(one, "a") is None
    await one.clear_cache()
    assert held(cache) == {}
    check_books(one)
    check_books(other)


@pytest.mark.parametrize("second", [40, None, 200])
async def test_the_smallest_bound_is_in_force(cache: Store, second: int | None) -> None:
    source = MemoryStore()
    one = CacheStore(source, cache_store=cache, max_size=100)
    await fill(one, a=bytes(40), b=bytes(40))
    other = CacheStore(source, cache_store=cache, max_size=second)
    await fill(one, c=bytes(40))
    await fill(other, d=bytes(40))
    assert sorted(held(cache)) == (["d"] if second == 40 else ["c", "d"])
    check_books(one)
    check_books(other)


async def test_nobody_gets_what_is_too_old_for_it(cache: Store, clock: Clock) -> None:
    source = CountingStore(MemoryStore())
    strict = CacheStore(source, cache_store=cache, max_age_seconds=10)
    await fill(strict, a=b"1")
    lenient = CacheStore(source, cache_store=cache)
    assert await read(lenient, "a") == b"1"
    clock.advance(10)
    source.take()
    assert await read(strict, "a") == b"1"
    assert source.take() == {"get": 1}


async def test_bounds_of_one_that_is_gone(cache: Store, clock: Clock) -> None:
    """In force is what those want who are there."""
    source = CountingStore(MemoryStore())
    store = CacheStore(source, cache_store=cache, max_size=100)
    strict = CacheStore(source, cache_store=cache, max_size=10, max_age_seconds=0)
    await fill(store, a=bytes(20))
    assert store.cache_info()["cached_keys"] == 0
    del strict
    gc.collect()
    store._engine.books._last_reap = 0.0  # Else it looks at most once a second.
    await fill(store, a=bytes(20))
    clock.advance(1)
    source.take()
    assert await read(store, "a") == bytes(20)
    assert source.take() == {}
    check_books(store)


def test_each_source_has_its_own(cache: Store) -> None:
    first = CacheStore(MemoryStore(), cache_store=cache)
    with pytest.raises(ValueError, match=r"Give (each source|another)"):
        CacheStore(MemoryStore(), cache_store=cache)
    assert first == CacheStore(first._store, cache_store=cache)


async def test_what_is_not_ours_is_refused_or_adopted() -> None:
    inside = WatchedDict()
    cache, source = MemoryStore(inside), CountingStore(MemoryStore())
    await cache.set("a", buf(b"12345"))
    with pytest.raises(ValueError, match=r"not empty .*'a'.* adopt=True"):
        CacheStore(source, cache_store=cache)
    store = CacheStore(source, cache_store=cache, adopt=True, max_size=8)
    assert store.cache_info()["current_size"] == 5
    assert await read(store, "a") == b"12345"
    assert source.take() == {}
    await fill(store, b=b"12345")
    assert held(cache) == {"b": 5}
    assert inside.peak == 5
    check_books(store)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
async def test_copies_share_a_source_in_memory(how: str) -> None:
    """They share the cache, so they must read the same data: at home, the original."""
    store = CacheStore(MemoryStore())
    await fill(store, a=b"1")
    copied = copy.deepcopy(store) if how == "deepcopy" else pickle.loads(pickle.dumps(store))
    await fill(copied, a=b"2")
    assert await read(store, "a") == await read(copied, "a") == b"2"
    await copied.delete("a")
    assert await read(store, "a") is await read(copied, "a") is None


def test_away_from_home_another_copy_is_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives later may hold newer data than what arrived first."""
    source = MemoryStore()
    store = CacheStore(source)
    first = pickle.dumps(store)
    sync(source.set("a", buf(b"1")))
    second = pickle.dumps(store)
    monkeypatch.setattr(store._engine, "home", 0)  # As in another process,
    monkeypatch.setattr(store._engine, "source", pickle.loads(pickle.dumps(MemoryStore())))
    assert pickle.loads(first)._engine is store._engine
    other = pickle.loads(second)
    assert other._engine is not store._engine
    assert sync(other.get("a")).to_bytes() == b"1"


def remote(where: Path, **options: Any) -> Store:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url(f"file://{where}", storage_options={"auto_mkdir": True}, **options)


class Elsewhere(SyncDictStore):
    """A store of the user's own."""


def in_memory() -> Store:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url("memory://test-one-cache")


@pytest.mark.parametrize("kind", ["listed", "listed, two objects", "memory of fsspec", "own"])
async def test_other_stores_have_one_index_as_well(tmp_path: Path, kind: str) -> None:
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
        assert await read(store, "missing") is None
    # A fill of the one that has read the old value does not land after the other's write.
    source.late["get"] = 1
    task = asyncio.ensure_future(read(other, "k"))
    await reached(source)
    await one.set("k", buf(b"new"))
    source.release()
    await task
    for store in (other, one):
        assert await read(store, "k") == b"new"
        assert store.cache_stats()["damaged"] == 0
    for number in range(5):
        await fill(one, **{f"a{number}": bytes(20)})
        await fill(other, **{f"b{number}": bytes(20)})
    assert one._engine.books.real() is other._engine.books.real()
    assert one.cache_info() == other.cache_info()
    assert one.cache_info()["current_size"] <= 100
    one._engine.index.validate()


@pytest.mark.parametrize("kind", ["listed", "own"])
async def test_an_index_ends_with_the_last_who_uses_it(tmp_path: Path, kind: str) -> None:
    cache: Any = Elsewhere() if kind == "own" else remote(tmp_path / "cache")
    store = CacheStore(MemoryStore(), cache_store=cache)
    with pytest.raises(ValueError, match=r"holds the cache of .* source_id="):
        CacheStore(MemoryStore(), cache_store=cache)
    del store
    gc.collect()
    CacheStore(MemoryStore(), cache_store=cache)


async def test_the_strictest_check_is_in_force() -> None:
    cache, source = MemoryStore(), CountingStore(MemoryStore())
    one = CacheStore(source, cache_store=cache, verify="never")
    await fill(one, a=b"12345")
    other = CacheStore(source, cache_store=cache, verify="always")
    for _ in range(2):
        assert await read(other, "a") == b"12345"
    cache._store_dict["a"] = buf(b"1234X")
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
    assert three._engine.index is two._engine.index
    await three.set("k", buf(b"new!"))
    assert await read(two, "k") == b"new!"
    del two, three, second
    gc.collect()
    assert id(values) not in _sharing._memory


def test_stores_inside_each_other_are_two_sources(tmp_path: Path) -> None:
    cache = MemoryStore()
    first = CacheStore(LocalStore(tmp_path / "data"), cache_store=cache)
    with pytest.raises(ValueError, match=r"holds the cache of file:"):
        CacheStore(LocalStore(tmp_path / "data/array"), cache_store=cache)
    with pytest.raises(ValueError, match=r"holds the cache of"):
        CacheStore(LocalStore(tmp_path / "other"), cache_store=cache, source_id="y")
    again = CacheStore(LocalStore(tmp_path / "data", read_only=True), cache_store=cache)
    assert again._engine.index is first._engine.index


def test_one_source_for_reading_and_for_writing(tmp_path: Path) -> None:
    cache = MemoryStore()
    reader = CacheStore(remote(tmp_path, read_only=True), cache_store=cache)
    writer = CacheStore(remote(tmp_path), cache_store=cache)
    assert reader._engine.index is writer._engine.index


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_they_have_one_index_in_a_forked_child_too() -> None:
    cache, source = Elsewhere(), SyncDictStore({"a": b"1"})
    one, other = (CacheStore(source, cache_store=cache) for _ in range(2))
    sync(read(one, "a"))
    child = os.fork()
    if child == 0:
        same = one._engine.index is other._engine.index
        os._exit(0 if same and one.cache_info()["cached_keys"] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert one._engine.index is other._engine.index
    assert other.cache_info()["cached_keys"] == 1


def test_stores_are_collected_while_another_is_made() -> None:
    """The garbage collector ends them at any moment, in the middle of a look at who is there."""
    threshold = gc.get_threshold()
    gc.disable()
    try:
        for _ in range(5000):
            store: Any = CacheStore(SyncDictStore(), cache_store=Elsewhere())
            store.itself = store
        assert len(_sharing._others) >= 5000
        # Not before it comes to those who are there.
        gc.set_threshold(gc.get_count()[0] + 1500, 10, 10)
        gc.enable()
        CacheStore(SyncDictStore(), cache_store=Elsewhere())
    finally:
        gc.enable()
        gc.set_threshold(*threshold)
    del store
    gc.collect()
    # Those of other tests may be held by what was logged.
    assert len(_sharing._others) < 1000
