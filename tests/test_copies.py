"""Copies that travel, and processes that fork: configuration goes along, contents stay."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import LocalStore, LoggingStore, MemoryStore, WrapperStore

from coherence_support import CacheStore, DictStore, SyncDictStore, buf, index_of, read
from process_scripts import VALUES, arrive

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

SCRIPT = Path(__file__).with_name("process_scripts.py")


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    for key, value in VALUES.items():
        store.set_sync(key, buf(value))
    return store


@pytest.fixture(params=["memory", "directory"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "cache")


async def test_a_copy_is_small_and_travels_empty(source: LocalStore) -> None:
    store = CacheStore(source, max_size=10**6, max_age_seconds=60)
    empty = len(pickle.dumps(store))
    for key in VALUES:
        await read(store, key)
    packed = pickle.dumps(store)
    assert store.cache_info()["current_size"] > 500
    assert len(packed) == empty
    assert len(packed) - len(pickle.dumps(source)) < 700


class Values(DictStore):
    """A source of the user's own that keeps its values in memory, as its copies do."""


@pytest.mark.parametrize("make", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
async def test_a_copy_of_a_source_of_ones_own_reads_the_original(make: Callable) -> None:
    store = CacheStore(Values({"k": b"v1"}))
    assert await read(store, "k") == b"v1"
    other = make(store)
    await other.set("k", buf(b"v2"))
    assert (
        await read(store, "k") == await read(other, "k") == await read(store._store, "k") == b"v2"
    )


async def test_copies_of_a_source_of_ones_own_elsewhere_read_their_own() -> None:
    """In a worker nobody knows which of them is newer."""
    store = CacheStore(Values({"k": b"v1"}))
    first = pickle.dumps(store)
    await store.set("other", buf(b"v2"))
    second = pickle.dumps(store)
    del store
    gc.collect()
    one, two = pickle.loads(first), pickle.loads(second)
    assert await read(one, "k") == b"v1"
    assert await read(two, "other") == b"v2"


class Labelled(CacheStore):
    """A subclass with an attribute of its own."""

    def __init__(self, *args: Any, label: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label = label


def test_what_a_subclass_adds_goes_along(source: LocalStore) -> None:
    store = Labelled(source, label="mine")
    for other in (
        copy.copy(store),
        copy.deepcopy(store),
        pickle.loads(pickle.dumps(store)),
        store.with_read_only(True),
    ):
        assert type(other) is Labelled
        assert other.label == "mine"
        assert other._engine is store._engine
    assert store.with_read_only(True).read_only


async def test_a_memory_behind_wrappers_travels_empty(source: LocalStore) -> None:
    inner = MemoryStore()
    store = CacheStore(source, cache_store=WrapperStore(LoggingStore(inner, log_level="ERROR")))
    for key in VALUES:
        await read(store, key)
    packed = pickle.dumps(store)
    assert len(packed) - len(pickle.dumps(source)) < 1000
    assert len(inner._store_dict) == len(VALUES)
    assert pickle.loads(packed) == copy.copy(store) == store
    assert pickle.loads(packed).cache_info()["cached_keys"] == len(VALUES)
    # As in another process: nobody there knows the original.
    token = store._engine.token
    elsewhere = pickle.loads(packed.replace(token.encode(), token[::-1].encode()))
    assert elsewhere.cache_info()["cached_keys"] == 0
    assert type(elsewhere._cache._store) is LoggingStore
    for _ in range(2):
        assert await read(elsewhere, "1") == VALUES["1"]
    assert elsewhere.cache_stats()["hits"] == 1


async def test_copies_in_one_process_are_one_cache(source: LocalStore, cache: Store) -> None:
    store = CacheStore(source, cache_store=cache, max_size=10**6, max_age_seconds=60)
    await read(store, "1")
    copies = [pickle.loads(pickle.dumps(store)) for _ in range(3)]
    copies += [pickle.loads(pickle.dumps(copies[0])), copy.copy(store)]
    for other in copies:
        assert other == store
        assert other.cache_info() == store.cache_info()
        assert other.cache_stats() == store.cache_stats()
        assert (other.max_size, other.max_age_seconds) == (10**6, 60)
    await copies[0].set("1", buf(b"changed"))
    for other in (store, *copies):
        assert await read(other, "1") == b"changed"
    assert store.cache_stats()["hits"] == len(copies) + 1
    # They outlive the original.
    info = store.cache_info()
    del store
    assert copies[0].cache_info() == info
    assert pickle.loads(pickle.dumps(copies[1])).cache_info() == info


async def test_views_and_settings_travel(source: LocalStore) -> None:
    store = CacheStore(source, cache_set_data=False, max_size=None)
    view = store.with_read_only(read_only=True)
    again = pickle.loads(pickle.dumps(view))
    assert again == view
    assert again.read_only
    assert not again.cache_set_data
    assert again._engine is store._engine
    assert await read(again, "1") == VALUES["1"]


def test_a_hundred_tasks_are_one_cache(source: LocalStore, cache: Store) -> None:
    """As dask does it: each task unpacks its own copy, in one of the threads of a worker."""
    store = CacheStore(source, cache_store=cache, max_size=10**6)
    packed = pickle.dumps(store)
    del store

    def task(_: int) -> CacheStore:
        mine: CacheStore = pickle.loads(packed)
        for key in VALUES:
            assert asyncio.run(read(mine, key)) == VALUES[key]
        return mine

    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(task, range(100)))
    assert len({id(each._engine) for each in copies}) == 1
    stats = copies[0].cache_stats()
    assert index_of(copies[0]).current_size == sum(map(len, VALUES.values()))
    assert stats["total_requests"] >= 100 * len(VALUES)
    # Whoever wanted a key while it was read waited for that.
    assert stats["misses"] < 10 * len(VALUES)


class Counted(DictStore):
    """All copies of this count together."""

    reads = 0

    async def before(self, operation: str, key: str) -> None:
        Counted.reads += 1
        await asyncio.sleep(0.001)


def test_copies_that_meet_read_each_key_once() -> None:
    packed = pickle.dumps(CacheStore(Counted(VALUES)))
    with ThreadPoolExecutor(8) as pool:
        copies: list[CacheStore] = list(pool.map(lambda _: pickle.loads(packed), range(100)))
        found = list(pool.map(lambda store: asyncio.run(read(store, "7")), copies))
    assert found == [VALUES["7"]] * 100
    assert Counted.reads == 1


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_another_process(source: LocalStore, cache: Store, start: str) -> None:
    """Copies arrive with their settings and without contents (unless they share a directory)."""
    store = CacheStore(source, cache_store=cache, max_size=300, max_age_seconds=60)
    asyncio.run(read(store, "1"))
    held = store.cache_info()["current_size"]
    packed = pickle.dumps(store)
    context = multiprocessing.get_context(start)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        found = [pool.submit(arrive, packed, 5) for _ in range(4)]
        results = [each.result(120) for each in found]
    for result in results:
        assert result["engines"] == 1
        assert result["equal"]
        assert result["options"] == [(300, 60, True, False)] * 5
        assert result["stats"][0]["hits"] > 0
    if isinstance(cache, MemoryStore):
        assert 0 in [result["held"] for result in results]
        assert store.cache_info()["current_size"] == held
    assert asyncio.run(read(store, "1")) == VALUES["1"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "directory", "another"])
def test_a_hundred_forks_of_a_busy_process(kind: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "fork", kind, "100", tmp_path / "cache"],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.stdout == "0 of 100 failed\n", done.stdout + done.stderr
    assert done.returncode == 0


def test_what_a_forked_child_inherits() -> None:
    """A cache in memory goes on with what it holds; what was in flight starts afresh."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "inherit", "memory", "1", "unused"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "0 of 1 failed\n", done.stdout + done.stderr


def test_what_a_forked_child_ends_is_not_its_parents(tmp_path: Path) -> None:
    """A child ends the coroutines that it has inherited, but not what they had begun in the directory."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "unwind", "directory", "2", tmp_path / "cache"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "0 of 2 failed\n", done.stdout + done.stderr


def test_the_sync_surface_is_there_when_both_stores_have_it() -> None:
    plain, sync = DictStore(), SyncDictStore()
    assert CacheStore(sync, cache_store=SyncDictStore())._supports_sync_io
    assert not CacheStore(plain, cache_store=SyncDictStore())._supports_sync_io
    assert not CacheStore(sync, cache_store=DictStore())._supports_sync_io
    for store in (CacheStore(plain), CacheStore(sync, cache_store=DictStore())):
        with pytest.raises(TypeError, match="synchronous"):
            store.get_sync("k")
        with pytest.raises(TypeError, match="synchronous"):
            store.set_sync("k", buf(b""))
        with pytest.raises(TypeError, match="synchronous"):
            store.delete_sync("k")
