"""A pool in memory in other processes: all that comes of it there is one pool, under one bound."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import logging
import os
import pickle
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import LocalStore, MemoryStore

import forks
import zcache
from agent import run_script
from pools import source_of
from support import TESTS, buf, read, read_through, said, write
from zcache import CachePool, CacheStore
from zcache._runtime import lingering
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BOUND = 4000
SIZE = 1000
USE = """
import asyncio, gc, json, pickle, sys, threading
import zcache
from zcache import CachePool, CacheStore
from support import read, read_through, write

def load(packed):
    return pickle.loads(bytes.fromhex(packed))

def fill(*stores):
    async def use():
        for store in stores:
            for key in "abc":
                assert await read_through(store, key) == key.encode() * 1000
    asyncio.run(use())

def held(stores):
    # Each keeps its values in one dict or another.
    dicts = {id(store._cache_store._store_dict): store for store in stores}
    return sum(store.cache_info()["current_size"] for store in dicts.values())

def tell(**told):
    print(json.dumps(told))

given = sys.argv[1:]
"""


def in_forked_server(script: str, *given: str) -> Any:
    done = run_script(f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{USE}{script}", *given)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def spawned(script: str, *given: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE + script, *given],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def packed(what: object) -> str:
    return pickle.dumps(what).hex()


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Directories with three values each."""
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    for folder in folders:
        folder.mkdir()
        for key in "abc":
            (folder / key).write_bytes(key.encode() * SIZE)
    return folders


def over_a_pool(sources: list[Path]) -> list[CacheStore]:
    pool = CachePool(max_size=BOUND)
    return [CacheStore(LocalStore(source), cache_store=pool) for source in sources]


def opened(sources: list[Path]) -> list[CacheStore]:
    return [zcache.open(source, cache="memory", max_size=BOUND) for source in sources]


@pytest.mark.parametrize("process", [spawned, in_forked_server])
@pytest.mark.parametrize("make", [over_a_pool, opened])
@pytest.mark.parametrize("how", ["together", "apart"])
def test_stores_that_come_of_one_pool_in_memory_have_one_bound(
    sources: list[Path], make: Callable[..., list[CacheStore]], process: Callable, how: str
) -> None:
    stores = make(sources)
    given = [packed(stores)] if how == "together" else [packed([store]) for store in stores]
    script = """
stores = [store for each in given for store in load(each)]
fill(*stores)
tell(held=held(stores), sizes=[store.cache_info()["current_size"] for store in stores],
     bounds=[store.cache_info()["max_size"] for store in stores])
"""
    assert process(script, *given) == {"held": BOUND, "sizes": [BOUND] * 4, "bounds": [BOUND] * 4}


@pytest.mark.parametrize("process", [spawned, in_forked_server])
@pytest.mark.parametrize("how", ["together", "apart", "pool last"])
def test_pool_in_memory_that_comes_with_its_stores_is_theirs(
    sources: list[Path], process: Callable, how: str
) -> None:
    pool = CachePool(max_size=10 * SIZE)
    stores = [CacheStore(LocalStore(source), cache_store=pool) for source in sources[:2]]
    given = {
        "together": [packed((pool, stores))],
        "apart": [packed(pool), packed(stores)],
        "pool last": [packed((stores, pool))],
    }
    script = """
come = load(given[0]) if len(given) == 1 else map(load, given)
pool, stores = sorted(come, key=lambda one: isinstance(one, list))
before = pool.cache_info()["entries"]
fill(*stores)
names = [info.name for info in pool.sources()]
entries = pool.cache_info()["entries"]
pool.forget(names[0])
more = CacheStore(stores[0]._store, cache_store=pool)
tell(before=before, entries=entries, sources=len(names), left=pool.cache_info()["entries"],
     cached=sorted(store.is_cached("a") for store in stores), shares=more.is_cached("a") is stores[0].is_cached("a"))
"""
    assert process(script, *given[how]) == {
        "before": 0,
        "entries": 6,
        "sources": 2,
        "left": 3,
        "cached": [False, True],
        "shares": True,
    }


def test_copy_that_goes_on_to_another_process_is_of_the_same_pool(sources: list[Path]) -> None:
    script = "pool, stores = load(given[0]); fill(*stores); tell(packed=pickle.dumps(stores).hex())"
    pool = CachePool(max_size=BOUND)
    stores = [CacheStore(LocalStore(source), cache_store=pool) for source in sources]
    by_worker = in_forked_server(script, packed((pool, stores)))["packed"]
    script = """
pool, stores = load(given[0]), [*load(given[1]), *load(given[2])]
fill(*stores)
tell(held=held(stores), pool=pool.cache_info()["current_size"])
"""
    told = in_forked_server(script, packed(pool), by_worker, packed(stores))
    assert told == {"held": BOUND, "pool": BOUND}


def test_memory_is_the_pool_that_the_process_has_by_itself(sources: list[Path]) -> None:
    one, two = opened(sources[:2])
    script = """
import logging
said = []
logging.getLogger("zcache").addHandler(handler := logging.Handler())
handler.emit = lambda record: said.append(record.getMessage())
own = zcache.open(given[0], cache="memory", max_size=3000)
fill(own)
stores = [own, load(given[1]), load(given[2])]
kept = own.cache_info()["current_size"]
fill(*stores)
tell(kept=kept, held=held(stores), bounds=[store.max_size for store in stores], said=said,
     found=zcache.open(given[0], cache="memory", max_size=3000).max_size)
"""
    told = in_forked_server(script, str(sources[2]), packed(one), packed(two))
    (message,) = told.pop("said")
    assert "max_size=3000, in the place of max_size=4000" in message
    assert told == {"kept": 3000, "held": 3000, "bounds": [3000] * 3, "found": 3000}


def test_memory_that_has_come_is_found_by_who_opens_it(sources: list[Path]) -> None:
    (one,) = opened(sources[:1])
    script = """
come = load(given[1])
own = zcache.open(given[0], cache="memory")
fill(come, own)
try:
    zcache.open(given[0], cache="memory", max_size=5000)
except zcache.OptionValueError as error:
    refused = "is in use" in str(error)
tell(held=held([come, own]), bound=own.max_size, refused=refused)
"""
    told = in_forked_server(script, str(sources[1]), packed(one))
    assert told == {"held": BOUND, "bound": BOUND, "refused": True}


def test_copies_that_come_at_once_in_many_threads_are_of_one_pool(sources: list[Path]) -> None:
    pool = CachePool(max_size=BOUND)
    stores = [
        CacheStore(LocalStore(source), cache_store=pool, source_id=f"{source} {n}")
        for source in sources
        for n in range(3)
    ]
    script = """
for _ in range(20):
    stores, ready = [], threading.Barrier(len(given))
    def arrive(each):
        ready.wait()
        stores.append(load(each))
    threads = [threading.Thread(target=arrive, args=(each,)) for each in given]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    places = {id(store._cache_store.pool) for store in stores}
    assert len(stores) == len(given) and len(places) == 1
    del stores
tell(places=len(places))
"""
    assert in_forked_server(script, *map(packed, [*stores, *stores])) == {"places": 1}


def test_pool_that_has_come_goes_with_the_last_that_uses_it(sources: list[Path]) -> None:
    pool = CachePool(max_size=BOUND)
    store = CacheStore(LocalStore(sources[0]), cache_store=pool)
    script = """
import weakref
from zcache._runtime import lingering
pool, store = load(given[0])
fill(store)
gone = weakref.ref(store._cache_store.pool)
del store
lingering.make_way()
held = gone() is not None
del pool
lingering.make_way()
tell(held=held, gone=gone() is None, entries=load(given[0])[0].cache_info()["entries"])
"""
    told = in_forked_server(script, packed((pool, store)))
    assert told == {"held": True, "gone": True, "entries": 0}


@pytest.mark.parametrize("bound", [10 * SIZE, None])
def test_worker_that_drops_each_store_finds_all_of_a_pool_again(
    sources: list[Path], bound: int | None
) -> None:
    """Also what sources without a name have there, which would be forgotten with their stores."""
    pool = CachePool(max_size=bound)
    stores = [
        CacheStore(StoreDouble(LocalStore(source)), cache_store=pool) for source in sources[:3]
    ]
    script = """
from zcache._runtime import lingering
lingering.OVERHEAD = 0  # Else it is more than these small values take.
hits = []
for each in given * 3:
    store = load(each)
    fill(store)
    hits.append(store.cache_stats()["hits"])
    del store
    gc.collect()
tell(hits=hits)
"""
    told = in_forked_server(script, *map(packed, stores))
    assert told == {"hits": [0, 0, 0, 3, 3, 3, 6, 6, 6]}


async def test_stores_that_come_back_are_over_the_original_pool(sources: list[Path]) -> None:
    """Also where the original of a store has gone: its pool has not."""
    pool = CachePool(max_size=BOUND)
    one, two = [CacheStore(LocalStore(source), cache_store=pool) for source in sources[:2]]
    await read_through(one, "a")
    sent = pickle.dumps(one)
    assert pickle.loads(sent).cache_info() == one.cache_info()
    gone = weakref.ref(one._cache)
    del one
    while gone() is not None:
        lingering.make_way()
        await asyncio.sleep(0.001)
    back = pickle.loads(sent)
    assert await read(back, "a") == b"a" * SIZE
    assert back.cache_stats()["hits"] == 1
    await read_through(two, "b")
    assert back.cache_info()["current_size"] == pool.cache_info()["current_size"] == 2 * SIZE


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))],
    ids=["deepcopy", "pickle"],
)
def test_pools_in_memory_that_come_back_are_one_other_pool(how: Callable) -> None:
    pool = CachePool(max_size=BOUND)
    one, two = how(pool), how(pool)
    assert one == two != pool
    assert copy.copy(pool) == pool
    assert how(one) == one
    store = CacheStore(source_of(k=b"1"), cache_store=one)
    store.set_sync("k", buf(b"2"))
    assert [each.cache_info()["entries"] for each in (pool, one, two)] == [0, 1, 1]
    del one, two, store
    gc.collect()
    assert how(pool).cache_info()["entries"] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("make", [over_a_pool, opened])
def test_what_comes_to_a_forked_child_is_of_the_pool_that_it_has(
    sources: list[Path], make: Callable[..., list[CacheStore]]
) -> None:
    one, two = make(sources[:2])
    asyncio.run(read_through(one, "a"))
    sent = pickle.dumps(two)

    def child() -> None:
        # What has come is made anew here, over the pool that the child has.
        vars(two).clear()
        come = pickle.loads(sent)
        asyncio.run(read_through(come, "b"))
        assert come.cache_info()["current_size"] == one.cache_info()["current_size"] == 2 * SIZE
        asyncio.run(read_through(one, "c"))
        assert come.cache_info()["current_size"] == one.cache_info()["current_size"] == 3 * SIZE

    assert forks.run(child) == 0


def test_values_that_come_with_copies_of_one_name_are_apart_in_the_pool() -> None:
    """As where each had a pool of its own: what one copy was written to, the next one was not."""
    store = CacheStore(MemoryStore(), cache_store=CachePool(max_size=BOUND), source_id="given")
    asyncio.run(write(store, "a", b"sent"))
    script = """
first, = load(given[0])
asyncio.run(write(first, "a", b"mine"))
second, = load(given[0])
told = [asyncio.run(read_through(one, "a")).decode() for one in (first, second) * 2]
tell(told=told, one=first._cache_store.pool is second._cache_store.pool)
"""
    told = in_forked_server(script, packed([store]))
    assert told == {"told": ["mine", "sent"] * 2, "one": True}


def test_copy_of_another_bound_raises_nothing_and_the_log_says_so_once(
    sources: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    (store,) = opened(sources[:1])
    sent = pickle.dumps(store)
    del store
    lingering.make_way()
    caplog.set_level(logging.WARNING, "zcache")
    own = zcache.open(sources[1], cache="memory", max_size=2 * SIZE)
    come = [pickle.loads(sent) for _ in range(3)]
    assert {one.max_size for one in come} == {own.max_size} == {2 * SIZE}
    assert len([line for line in said(caplog) if "a copy of a pool in memory" in line]) == 1
