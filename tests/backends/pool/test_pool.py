"""Pools: sources apart, one bound, one pool for each directory, and what they tell of themselves."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from zarr.storage import LocalStore, MemoryStore

import forks
import tracing
import zcache
from agent import run_script
from directories import closed, usage
from mounts import formatted
from pools import (
    KEYS,
    NEIGHBOURS,
    ON_DISK,
    POOL_PATHS,
    POOLS,
    check_neighbour,
    neighbour,
    one_of,
    pool_with_neighbours,
    source_of,
)
from support import TESTS, buf, check_quiet, fill, read, read_through, write
from zcache import (
    CacheOwnershipError,
    CachePool,
    CacheStore,
    CacheUnreachableError,
    OfflineError,
    OptionTypeError,
    OptionValueError,
)
from zcache._backends.ownership import POOL_STAMP_FORMAT, STAMP_FORMAT
from zcache._core import Index
from zcache.testing import (
    FakeClock,
    StoreDouble,
    cache_store_of,
    check_invariants,
    entries,
    set_block_size,
    shares_index,
)

PAGE = 4096


where = one_of(POOL_PATHS)


# ---------------------------------------------------------------------------- sources


async def test_sources_with_the_same_keys_are_served_their_own_values(where: Path | None) -> None:
    pool = pool_with_neighbours(where)
    stores = [neighbour(pool, name) for name in NEIGHBOURS]
    for store, name in zip(stores, NEIGHBOURS, strict=True):
        await check_neighbour(store, name)
        assert store.cache_stats()["hits"] >= len(KEYS)
    await write(stores[0], "k", b"other")
    await stores[0].delete("a")
    assert await read(stores[0], "k") == b"other"
    assert await read(stores[0], "a") is None
    await check_neighbour(stores[1], NEIGHBOURS[1])
    await stores[0].clear_cache()
    await check_neighbour(stores[1], NEIGHBOURS[1])
    assert {info.name: info.entries for info in pool.sources()}[NEIGHBOURS[1]] == len(KEYS)
    await check_quiet(stores[0])


HOSTILE = (
    "",
    "/",
    "..",
    "../k",
    "a/../../k",
    "/etc/passwd",
    "a//b",
    "./k",
    ".zcache/segments/0",
    "K",
    "\ud800",
    "k\0",
    "x" * 2**20,
    "x/" * 2**12 + "x",
)


@pytest.mark.parametrize("key", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_key_never_leads_to_values_of_others(where: Path | None, key: str) -> None:
    """Also the name of another source's folder in the index."""
    pool = pool_with_neighbours(where)
    labels = [
        entry.key.partition("/")[0] for entry in entries(neighbour(pool, "x"), everything=True)
    ]
    values = dict.fromkeys((key, f"../{labels[0]}/k", f"{labels[0]}/k"), b"mine")
    source = StoreDouble(MemoryStore({name: buf(value) for name, value in values.items()}))
    store = CacheStore(source, cache_store=pool, source_id="mine")
    for _ in range(2):
        for name in values:
            assert await read_through(store, name) == b"mine"
    for name in values:
        await store.delete(name)
        assert await read(store, name) is None
    for name in NEIGHBOURS:
        await check_neighbour(neighbour(pool, name), name)
    await check_quiet(store)


async def test_source_without_a_name_is_another_one_each_time(where: Path | None) -> None:
    pool = CachePool(where)
    one, two = source_of(k=b"one"), source_of(k=b"two")
    stores = [CacheStore(source, cache_store=pool) for source in (one, two)]
    for _ in range(2):
        assert await read_through(stores[0], "k") == b"one"
        assert await read_through(stores[1], "k") == b"two"
    assert not shares_index(*stores)
    again = CacheStore(one, cache_store=pool)
    assert await read(again, "k") == b"one"
    assert again.cache_stats()["hits"] == 1


async def test_source_that_is_gone_leaves_nothing_in_a_pool_in_memory() -> None:
    pool = CachePool()
    kept = source_of(k=b"kept")
    for _ in range(3):
        for source in (kept, source_of(k=b"gone")):
            await read_through(CacheStore(source, cache_store=pool), "k")
        del source
        gc.collect()
        # Asked for, or when another source comes, whichever is first.
        assert len(pool.sources()) == 1
        assert pool.cache_info()["entries"] == 1
    for _ in range(3):
        store = CacheStore(source_of(k=b"gone"), cache_store=pool)
        await read_through(store, "k")
        gc.collect()
        assert len(pool._pool.names) <= 3
    # One that lives is served from the pool, though no store over it did.
    store = CacheStore(kept, cache_store=pool)
    assert await read(store, "k") == b"kept"
    assert store.cache_stats()["hits"] == 1
    await check_quiet(store)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_child_that_was_forked_keeps_what_its_stores_have_in_a_pool_in_memory() -> None:
    pool = CachePool()
    store = CacheStore(MemoryStore(), cache_store=pool)
    store.set_sync("k", buf(b"1"))

    def child() -> None:
        held = pool.cache_info()["entries"]
        other = CacheStore(MemoryStore(), cache_store=pool)
        other.set_sync("k", buf(b"2"))
        assert pool.cache_info()["entries"] == held + 1

    assert forks.run(child) == 0


async def test_listing_of_a_source_has_its_own_keys_only(where: Path | None) -> None:
    pool = pool_with_neighbours(where)
    store = CacheStore(source_of(mine=b"1"), cache_store=pool, source_id="mine")
    await read_through(store, "mine")
    assert [key async for key in store.cached_keys()] == ["mine"]


def test_slicing_of_one_source_is_not_that_of_another() -> None:
    index = Index(flat_namespace=True, complete=False)
    index.adopt([(0, 3, "one/k"), (0, 3, "two/k")])
    slices, raises = index.within("one", True), index.within("two", False)
    for _ in range(2):
        assert slices.peek("k", (1, 5, 9), 0) == 0
        assert raises.peek("k", (1, 5, 9), 0) is None


# -------------------------------------------------------------------------- the pool


async def test_pool_opened_by_another_path_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    one = CachePool(tmp_path / "pool", max_size="1 MiB")
    other = CachePool(tmp_path / "link" / "." / "pool", max_size="1 GiB")
    assert one == other
    assert other.cache_info()["max_size"] == 2**20
    source = source_of(k=b"1")
    first = CacheStore(source, cache_store=one, source_id="s")
    second = CacheStore(source, cache_store=other, source_id="s")
    await write(first, "k", b"2")
    assert await read(second, "k") == b"2"
    assert source.take()["get"] == 0


async def test_pool_is_warm_after_a_restart(tmp_path: Path) -> None:
    for round_ in range(3):
        pool = CachePool(tmp_path / "pool")
        stores = [
            CacheStore(source_of(k=name.encode()), cache_store=pool, source_id=name)
            for name in ("one", "two")
        ]
        for store, value in zip(stores, (b"one", b"two"), strict=True):
            assert await read_through(store, "k") == value
            assert store.cache_stats()["hits"] == (round_ > 0)
        infos = pool.sources()
        assert {info.name for info in infos} == {"one", "two"}
        assert all(info.bytes == 3 and info.entries == 1 and info.last_used for info in infos)
        del pool, stores, store
        await closed(tmp_path, "pool")


async def test_forget_drops_one_source(where: Path | None) -> None:
    pool = pool_with_neighbours(where)
    stores = [neighbour(pool, name) for name in NEIGHBOURS]
    pool.forget(NEIGHBOURS[0])
    held = {info.name: info.entries for info in pool.sources()}
    assert held.get(NEIGHBOURS[0], 0) == 0
    assert held[NEIGHBOURS[1]] == len(KEYS)
    for store, name in zip(stores, NEIGHBOURS, strict=True):
        await check_neighbour(store, name)
    await check_quiet(stores[0])
    # What is filled anew has its name again.
    held = {info.name: info.entries for info in pool.sources()}
    assert held == dict.fromkeys(NEIGHBOURS, len(KEYS))


async def test_forget_drops_what_is_known_to_be_missing_and_what_was_listed(
    where: Path | None,
) -> None:
    pool, source = CachePool(where), source_of(**{"g/a": b"1"})
    store = CacheStore(source, cache_store=pool, source_id="mine")
    assert await read(store, "g/b") is None
    assert [name async for name in store.list_dir("g")] == ["a"]
    await source.set("g/b", buf(b"2"))
    pool.forget("mine")
    offline = CacheStore(source, cache_store=pool, source_id="mine", offline=True)
    with pytest.raises(OfflineError):
        [name async for name in offline.list_dir("g")]
    with pytest.raises(OfflineError):
        await read(offline, "g/b")
    assert await read(store, "g/b") == b"2"


async def test_sources_without_a_store_are_told_by_name(where: Path | None) -> None:
    pool = pool_with_neighbours(where)
    gc.collect()
    assert {info.name: info.entries for info in pool.sources()} == dict.fromkeys(
        NEIGHBOURS, len(KEYS)
    )


async def test_values_of_a_source_are_not_too_old_by_the_ages_of_another(
    where: Path | None, clock: FakeClock
) -> None:
    """A source with a closed store has not said how old its values may be."""
    pool = CachePool(where, max_size=100)
    ageless = CacheStore(source_of(a=bytes(50)), cache_store=pool, source_id="1", clock=clock)
    await read_through(ageless, "a")
    del ageless
    gc.collect()
    aged = CacheStore(
        source_of(b=bytes(20), c=bytes(20), d=bytes(20)),
        cache_store=pool,
        source_id="2",
        clock=clock,
        max_age_seconds=10,
    )
    await read_through(aged, "b")
    clock.advance(100)
    source = source_of(a=bytes(50))
    again = CacheStore(source, cache_store=pool, source_id="1", clock=clock)
    await read_through(again, "a")
    assert source.take() == {}
    del again
    gc.collect()
    await read_through(aged, "c")
    await read_through(aged, "d")
    again = CacheStore(source, cache_store=pool, source_id="1", clock=clock)
    await read_through(again, "a")
    assert source.take() == {}
    await check_quiet(again)


async def test_bound_that_has_become_smaller_is_kept_at_once(where: Path | None) -> None:
    pool = pool_with_neighbours(where)
    strict = CacheStore(source_of(), cache_store=pool, source_id="1", max_size=50)
    assert (pool.max_size, pool.cache_info()["max_size"]) == (None, 50)
    assert pool.cache_info()["current_size"] <= 50
    assert pool.cache_info()["entries"] > 0
    await check_quiet(strict)


async def test_bound_of_a_store_or_pool_that_is_gone_is_in_force_no_more(
    where: Path | None,
) -> None:
    pool = CachePool(where, max_size=100)
    store = CacheStore(source_of(), cache_store=pool, source_id="1", max_size=50)
    other = CacheStore(source_of(), cache_store=pool, source_id="2", max_size=70)
    assert pool.cache_info()["max_size"] == 50
    store.close()
    del store
    gc.collect()
    assert pool.cache_info()["max_size"] == 70
    await fill(other, k=bytes(60))
    del other
    gc.collect()
    assert pool.cache_info()["max_size"] == 100
    if where is not None:
        again = CachePool(where, max_size=80)
        # What a pool was opened with counts as long as a store over it is in use.
        over = CacheStore(source_of(), cache_store=again, source_id="3")
        del again
        gc.collect()
        assert pool.cache_info()["max_size"] == 80
        del over
        gc.collect()
        assert pool.cache_info()["max_size"] == 100
    check = CacheStore(source_of(), cache_store=pool, source_id="2")
    await check_quiet(check)


@pytest.mark.parametrize("strictest", ["store", "pool"])
async def test_least_free_space_is_that_of_all_stores_of_a_pool(
    tmp_path: Path, strictest: str
) -> None:
    pool = CachePool(tmp_path / "pool", min_free_space=0)
    source = source_of(a=b"1", b=b"2")
    store = CacheStore(source, cache_store=pool, source_id="one", min_free_space=0)
    # More than any volume has.
    if strictest == "store":
        strict = CacheStore(source_of(), cache_store=pool, source_id="two", min_free_space=2**60)
    else:
        strict = CachePool(tmp_path / "pool", min_free_space=2**60)
    await read_through(store, "a")
    assert entries(store) == []
    del strict
    gc.collect()
    await read_through(store, "b")
    assert {entry.key for entry in entries(store)} == {"b"}
    await check_quiet(store)


def test_bound_of_zcache_open_is_that_of_its_stores(tmp_path: Path) -> None:
    pool = CachePool(tmp_path / "pool")
    store = zcache.open(source_of(), cache=tmp_path / "pool", max_size=50)
    copy = zcache.open(source_of(), cache=tmp_path / "pool")
    del store
    gc.collect()
    assert (copy.max_size, pool.cache_info()["max_size"]) == (50, 50)
    del copy
    gc.collect()
    assert pool.cache_info()["max_size"] is None


SMALLER = """
import sys
from support import set_block_size
from zcache import CachePool

set_block_size(None)
print(CachePool(sys.argv[1], max_size=50 * 4096).cache_info()["current_size"])
"""


@pytest.mark.parametrize("who", ["pool", "store", "forked child", "process"])
async def test_opening_with_a_smaller_bound_returns_when_the_disk_holds_no_more(
    tmp_path: Path, who: str
) -> None:
    set_block_size(None)
    path, bound = tmp_path / "pool", 50 * PAGE
    pool = CachePool(path, max_size=20 * bound)
    values = {f"c/{n}": bytes([n]) * 50_000 for n in range(60)}
    store = CacheStore(source_of(**values), cache_store=pool, source_id="s")
    for key in values:
        await read(store, key)
    assert await store.drain()
    assert usage(path) > 10 * bound
    kept: list[object] = []

    def smaller() -> None:
        CachePool(path, max_size=bound)
        assert usage(path) <= bound

    if who == "store":
        kept += [CacheStore(source_of(), cache_store=pool, source_id="2", max_size=bound)]
    elif who == "pool":
        kept += [CachePool(path, max_size=bound)]
    elif who == "process":
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", SMALLER, path],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
            capture_output=True,
            check=True,
        )
        assert int(done.stdout) <= bound
    else:
        child = forks.fork(smaller)
        assert await asyncio.to_thread(forks.wait, [child]) == [0]
    assert usage(path) <= bound
    assert pool.cache_info()["current_size"] <= bound
    await check_quiet(store)


@pytest.mark.parametrize("kind", POOLS)
async def test_listings_of_each_source_are_its_own(kind: str, tmp_path: Path) -> None:
    pool = POOLS[kind](tmp_path / "pool")
    one = CacheStore(source_of(**{"g/a": b"1"}), cache_store=pool, source_id="1")
    two = CacheStore(source_of(**{"g/b": b"2"}), cache_store=pool, source_id="2")
    for store in (one, two):
        assert len([name async for name in store.list_dir("g")]) == 1
    for name, own in (("1", "a"), ("2", "b")):
        offline = CacheStore(MemoryStore(), cache_store=pool, source_id=name, offline=True)
        assert [name async for name in offline.list_dir("g")] == [own]
    pool.forget("1")
    offline = CacheStore(MemoryStore(), cache_store=pool, source_id="1", offline=True)
    with pytest.raises(OfflineError):
        _ = [name async for name in offline.list_dir("g")]
    offline = CacheStore(MemoryStore(), cache_store=pool, source_id="2", offline=True)
    assert [name async for name in offline.list_dir("g")] == ["b"]


def test_cache_info_tells_bytes_and_blocks(tmp_path: Path) -> None:
    set_block_size(None)
    pool = pool_with_neighbours(tmp_path / "pool", max_size="1 MB")
    info = pool.cache_info()
    assert info["entries"] == len(NEIGHBOURS) * len(KEYS)
    assert info["value_size"] == sum(len(f"{name}: {key}") for name in NEIGHBOURS for key in KEYS)
    assert info["max_size"] == 10**6
    assert info["current_size"] >= info["entries"] * PAGE


@pytest.mark.parametrize("block_size", [None, 1024])
async def test_bound_holds_for_all_sources_in_blocks(
    tmp_path: Path, block_size: int | None
) -> None:
    set_block_size(block_size)
    bound = 80 * PAGE
    pool = CachePool(tmp_path / "pool", max_size=bound)
    values = {f"c/{n}": bytes([n]) * (n * 97 % 9000) for n in range(60)}
    stores = [CacheStore(source_of(**values), cache_store=pool, source_id=str(n)) for n in range(3)]
    for store in stores:
        for key, value in values.items():
            assert await read_through(store, key) == value
            assert store.cache_info()["current_size"] <= bound
        # That the disk holds no more than is counted is part of it.
        await check_quiet(store)
    assert sum(info.entries for info in pool.sources()) > 20


@pytest.mark.parametrize("block_size", [1024, 2048])
async def test_bound_holds_on_a_volume_with_blocks_smaller_than_a_page(
    tmp_path: Path, block_size: int
) -> None:
    set_block_size(None)
    bound = 3 * 10**6
    with formatted(tmp_path, block_size) as volume:
        pool = CachePool(volume / "pool", max_size=bound)
        values = {f"k/{n}": bytes([n % 256]) * 100 for n in range(3000)}
        store = CacheStore(source_of(**values), cache_store=pool, source_id="s")
        keys = list(values)
        for start in range(0, len(keys), 16):
            await asyncio.gather(*(read(store, key) for key in keys[start : start + 16]))
            assert usage(volume / "pool") <= bound
        assert await store.drain()
        os.sync()
        assert usage(volume / "pool") <= pool.cache_info()["current_size"] <= bound
        await check_quiet(store)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_bound_holds_in_what_each_kind_of_file_system_allocates(
    tmp_path: Path, kind: str
) -> None:
    set_block_size(None)
    bound = 8 * 2**20
    with formatted(tmp_path, size=2**29, kind=kind) as volume:
        pool = CachePool(volume / "pool", max_size=bound)
        values = {f"k/{n}": bytes([n % 256]) * (20_000 + n * 7919 % 60_000) for n in range(400)}
        store = CacheStore(source_of(**values), cache_store=pool, source_id="s")
        keys = list(values)
        for start in range(0, len(keys), 16):
            await asyncio.gather(*(read(store, key) for key in keys[start : start + 16]))
            # A few that stay, between those that go.
            await asyncio.gather(*(read(store, key) for key in keys[::40]))
            assert usage(volume / "pool") <= bound
        assert await store.drain()
        os.sync()
        assert usage(volume / "pool") <= pool.cache_info()["current_size"] <= bound
        assert len(entries(store)) > 50
        await check_quiet(store)


async def test_pool_on_btrfs_gives_the_disk_back_what_is_evicted(tmp_path: Path) -> None:
    set_block_size(None)
    bound = 32 * 2**20

    def used() -> int:
        os.sync()
        status = os.statvfs(volume)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    with formatted(tmp_path, size=2**29, kind="btrfs") as volume:
        pool = CachePool(volume / "pool", max_size=bound)
        values = {f"k/{n}": os.urandom(60_000) for n in range(1500)}
        store = CacheStore(source_of(**values), cache_store=pool, source_id="s")
        before = used()
        keys = list(values)
        for start in range(0, len(keys), 16):
            await asyncio.gather(*(read(store, key) for key in keys[start : start + 16]))
            # Those behind each of them are evicted.
            await asyncio.gather(*(read(store, key) for key in keys[:start:8][:200]))
        assert await store.drain()
        # What the file system notes of them, and the index, are beside it.
        assert used() - before <= 1.25 * bound
        await check_quiet(store)


async def test_one_order_of_eviction_for_all_sources(where: Path | None) -> None:
    pool = CachePool(where, max_size=30)
    one, two = (
        CacheStore(source_of(a=b"0123456789", b=b"0123456789"), cache_store=pool, source_id=name)
        for name in ("one", "two")
    )
    await read_through(one, "a")
    await read_through(two, "a")
    await read_through(one, "b")
    assert await read(one, "a")
    await read_through(two, "b")
    # The one that was used least recently is the other source's.
    held = {info.name: info.entries for info in pool.sources()}
    assert held == {"one": 2, "two": 1}
    assert pool.cache_stats()["evictions"] == 1
    assert one.cache_info()["current_size"] == 30


async def test_forget_that_the_index_is_lost_in_says_so(
    where: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = CachePool(where)
    store = CacheStore(source_of(k=b"1"), cache_store=pool, source_id="s")
    await read_through(store, "k")
    place = pool._pool
    delete = place._delete

    def lose(victims: list[tuple[int, str]]) -> None:
        delete(victims)
        place.handle.abandon(OSError("a test"))

    monkeypatch.setattr(place, "_delete", lose)
    with pytest.raises(CacheUnreachableError, match="nothing in it can be forgotten"):
        pool.forget("s")


def test_pool_pickles_by_its_path(tmp_path: Path) -> None:
    pool = CachePool(tmp_path / "pool", max_size=10**6, min_free_space=10)
    copy = pickle.loads(pickle.dumps(pool))
    assert copy == pool
    assert repr(copy) == repr(pool) == f"CachePool({str(tmp_path / 'pool')!r}, max_size=1000000)"


def test_pool_that_comes_where_its_directory_is_anothers_fails_at_its_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error as it is unpickled would end the worker that has it in a task."""
    where = tmp_path / "pool"
    packed = pickle.dumps({CachePool(where, max_size=10**6): 1})
    gc.collect()
    shutil.rmtree(where)
    where.mkdir()
    (where / "other").write_bytes(b"1")
    for _ in range(2):
        (copy,) = pickle.loads(packed)
    assert len([one for one in caplog.records if "copy of a CachePool" in one.getMessage()]) == 1
    assert copy == next(iter(pickle.loads(packed)))
    assert copy != CachePool()
    assert repr(copy) == f"CachePool({str(where)!r}, max_size=1000000)"
    for use in (
        copy.cache_info,
        copy.sources,
        lambda: CacheStore(source_of(), cache_store=copy),
        lambda: zcache.open(source_of(), cache=copy),
    ):
        with pytest.raises(CacheOwnershipError, match="was not made by zcache"):
            use()
    (where / "other").unlink()
    assert copy.cache_info()["entries"] == 0
    assert {copy: 1} == {CachePool(where): 1}


async def test_pool_in_memory_travels_empty() -> None:
    pool = CachePool(max_size=100)
    store = CacheStore(source_of(k=b"1"), cache_store=pool, source_id="s")
    await read_through(store, "k")
    copy = pickle.loads(pickle.dumps(pool))
    assert copy != pool
    assert copy.cache_info() == {
        **pool.cache_info(),
        "current_size": 0,
        "value_size": 0,
        "entries": 0,
    }


def test_store_over_a_pool_pickles_with_it(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/k").write_bytes(b"value")
    store = CacheStore(LocalStore(tmp_path / "source"), cache_store=CachePool(tmp_path / "pool"))
    assert asyncio.run(read_through(store, "k")) == b"value"
    script = (
        "import sys, pickle, asyncio; sys.path.insert(0, sys.argv[1]); from support import read\n"
        "store = pickle.loads(sys.stdin.buffer.read())\n"
        "assert asyncio.run(read(store, 'k')) == b'value'; print(store.cache_stats()['hits'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(TESTS)],
        input=pickle.dumps(store),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == b"1"


@pytest.mark.parametrize(("mode", "expected"), [(None, 0o700), (0o770, 0o2770), (0o750, 0o2750)])
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
async def test_directory_has_the_mode_that_was_asked_for(
    tmp_path: Path, mode: int | None, expected: int, umask: int
) -> None:
    """Whatever the umask says, and all that is in it as well."""
    before = os.umask(umask)
    try:
        pool = CachePool(tmp_path / "pool", mode=mode)
        store = CacheStore(MemoryStore(), cache_store=pool, source_id="x")
        await fill(store, k=b"value")
        assert await store.drain()
        found = [tmp_path / "pool", *(tmp_path / "pool").rglob("*")]
        assert len(found) > 12
        for path in found:
            permissions = expected if path.is_dir() else expected & 0o666
            assert stat.S_IMODE(path.stat().st_mode) == permissions, path
    finally:
        os.umask(before)


def use_as_a_group(path: Path) -> None:
    """Open a new pool, fill it, and remember a listing."""
    os.umask(0o077)
    source = MemoryStore({"a/b": buf(b"value")})
    store = CacheStore(source, cache_store=CachePool(path, mode=0o770), source_id="x")

    async def use() -> None:
        assert await read(store, "a/b") == b"value"
        assert [name async for name in store.list_dir("a")] == ["b"]
        assert await store.drain()

    asyncio.run(use())


@pytest.mark.once
@pytest.mark.slow
def test_pool_of_a_group_killed_at_each_system_call_shuts_no_member_out(tmp_path: Path) -> None:
    if (why := tracing.why_not()) is not None:
        pytest.skip(why)
    code, step = None, 0
    while code is None:
        step += 1
        path = tmp_path / str(step) / "pool"
        path.parent.mkdir()
        with tracing.Traced(partial(use_as_a_group, path), step) as traced:
            code = traced.go()
        for found in (path, *path.rglob("*")) if path.exists() else ():
            # A folder gets its name once all may use it.
            if not found.name.startswith(".zcache-"):
                expected = 0o2770 if found.is_dir() else 0o660
                assert stat.S_IMODE(found.stat().st_mode) == expected, (step, traced.at, found)
    assert (code, step > 40) == (0, True)
    assert list(path.rglob("listing-*"))


def test_pool_removed_while_in_use_is_made_anew_with_its_mode(tmp_path: Path) -> None:
    pool = CachePool(tmp_path / "pool", mode=0o770)
    shutil.rmtree(tmp_path / "pool")
    pool._pool.directory.layout.check()
    assert (tmp_path / "pool").stat().st_mode & 0o777 == 0o770


def test_pool_that_is_opened_leaves_the_permissions_of_what_is_there(tmp_path: Path) -> None:
    """Who may write into a folder may have moved a private file of its owner's there."""
    path = tmp_path / "pool"
    CachePool(path, mode=0o770)
    asyncio.run(closed(tmp_path, "pool"))
    reserved = path / ".zcache"
    (reserved / "index/notes").write_bytes(b"private")
    for found in (reserved / "index/notes", reserved / "index/sources", reserved / "stamp.json"):
        found.touch()
        found.chmod(0o600)
    (reserved / "segments").chmod(0o700)
    before = {found: found.stat().st_mode for found in path.rglob("*")}
    CachePool(path, mode=0o770)
    after = {found: found.stat().st_mode for found in path.rglob("*")}
    assert {found: after[found] for found in before} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(
    ("group", "mode", "is_refused"), [(50001, 0o1777, True), (0, 0o1777, False), (0, 0o3777, True)]
)
def test_pool_in_a_directory_that_all_may_write_is_a_members_or_refused(
    tmp_path: Path, group: int, mode: int, is_refused: bool
) -> None:
    """Where a new folder gets its group from the directory, that does not tell who has made it."""
    path = tmp_path / "pool"
    path.mkdir()
    path.chmod(mode)
    CachePool(path, mode=0o770)
    asyncio.run(closed(tmp_path, "pool"))
    os.chown(path / ".zcache", 50001, group)
    with pytest.raises(CacheOwnershipError) if is_refused else nullcontext():
        CachePool(path, mode=0o770)


MEMBER = """
import os, sys
from zarr.storage import MemoryStore
from support import buf, value_sync
from zcache import CachePool, CacheStore

path, user, mode, *keys = sys.argv[1], int(sys.argv[2]), int(sys.argv[3], 8), *sys.argv[4:]
os.umask(0o077)
# As the first group of the user, or as one more.
os.setgroups([54321])
os.setgid(54321 if user < 50010 else user)
os.setuid(user)
store = CacheStore(
    MemoryStore({f"{user}": buf(b"own")}), cache_store=CachePool(path, mode=mode), source_id="x"
)
found = [value_sync(store, key) for key in keys]
assert store.drain_sync()
stats = store.cache_stats()
print(found, stats["hits"], stats["cache_failures"])
"""


def member(path: Path, user: int, mode: str, *keys: str) -> subprocess.CompletedProcess[str]:
    """Use a pool as a user of its group."""
    return run_script(MEMBER, str(path), str(user), mode, *keys)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize(("one", "two"), [(50001, 50002), (50011, 50012)])
@pytest.mark.parametrize("made", ["by a user", "by root before", "by its owner before"])
def test_users_of_a_group_share_a_pool(one: int, two: int, made: str) -> None:
    where = Path(tempfile.mkdtemp())
    try:
        os.chown(where, 0, 54321)
        where.chmod(0o2777)
        path = where / "pool"
        if made != "by a user":
            path.mkdir()
            os.chown(path, one if made == "by its owner before" else 0, 54321)
            path.chmod(0o770)

        first = member(path, one, "770", f"{one}")
        assert first.stdout == "[b'own'] 0 0\n", first.stderr
        other = member(path, two, "770", f"{one}", f"{two}")
        assert other.stdout == "[b'own', b'own'] 1 0\n", other.stderr
        again = member(path, one, "770", f"{one}", f"{two}")
        assert again.stdout == "[b'own', b'own'] 2 0\n", again.stderr
        for one_of_it in (path / ".zcache").rglob("*"):
            found = one_of_it.stat()
            expected = 0o2770 if one_of_it.is_dir() else 0o660
            assert (stat.S_IMODE(found.st_mode), found.st_gid) == (expected, 54321), one_of_it
        # A process that has not asked for a group trusts no other user, wherever what he has made lies.
        assert "CacheOwnershipError" in member(path, two, "700").stderr
    finally:
        shutil.rmtree(where)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_pool_is_opened_to_a_group_later_by_its_owner() -> None:
    where = Path(tempfile.mkdtemp())
    try:
        where.chmod(0o777)
        first = member(where / "pool", 50011, "700", "50011")
        assert first.stdout == "[b'own'] 0 0\n", first.stderr
        for command in (("chgrp", "-R", "54321"), ("chmod", "-R", "g+rwX")):
            subprocess.run([*command, where / "pool"], check=True)
        other = member(where / "pool", 50012, "770", "50011", "50012")
        assert other.stdout == "[b'own', b'own'] 1 0\n", other.stderr
        again = member(where / "pool", 50011, "770", "50011", "50012")
        assert again.stdout == "[b'own', b'own'] 2 0\n", again.stderr
    finally:
        shutil.rmtree(where)


def test_options_without_a_meaning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionValueError, match="invalid mode: 0o70"):
        CachePool(tmp_path / "pool", mode=0o70)
    with pytest.raises(OptionTypeError, match="invalid mode"):
        CachePool(tmp_path / "pool", mode="rwx")  # type: ignore[arg-type]
    with pytest.raises(OptionValueError, match="invalid max_size: -1"):
        CachePool(tmp_path / "pool", max_size=-1)
    assert not (tmp_path / "pool").exists()
    with pytest.raises(OptionValueError, match="invalid read_only: True, but a pool in memory"):
        CachePool(read_only=True)
    pool = CachePool()
    with pytest.raises(OptionTypeError, match="invalid name: 5"):
        pool.forget(5)  # type: ignore[arg-type]
    with pytest.raises(OptionTypeError, match="invalid name: None"):
        pool.export(None, MemoryStore())  # type: ignore[arg-type]


BY = r"\. Use it by zcache.CacheStore\(source, cache_store={}\), or give another one"


def test_cache_directory_is_no_pool_and_the_reverse(tmp_path: Path) -> None:
    source = MemoryStore()
    CacheStore(source, cache_store=LocalStore(tmp_path / "directory"), source_id="a pool")
    with pytest.raises(CacheOwnershipError, match="is no pool" + BY.format("path")):
        CachePool(tmp_path / "directory")
    CachePool(tmp_path / "pool")
    with pytest.raises(
        CacheOwnershipError, match="is a pool" + BY.format(r"zcache.CachePool\(path\)")
    ):
        CacheStore(source, cache_store=tmp_path / "pool", source_id="a pool")


@pytest.mark.parametrize("asked", ["directory", "pool"])
@pytest.mark.parametrize(
    ("made", "found", "read"),
    [
        case
        for by in (1, -1)
        for case in (
            (STAMP_FORMAT + by, f"has format {STAMP_FORMAT + by}", STAMP_FORMAT),
            (
                f"pool {POOL_STAMP_FORMAT + by}",
                f"is a pool of format {POOL_STAMP_FORMAT + by}",
                POOL_STAMP_FORMAT,
            ),
        )
    ],
)
def test_cache_of_another_format_is_refused_with_both_numbers(
    tmp_path: Path, made: object, found: str, read: int, asked: str
) -> None:
    CachePool(tmp_path)
    for name in ("stamp.json", "index/stamp.json"):
        (tmp_path / ".zcache" / name).write_text(json.dumps({"zcache": made, "source": "a pool"}))
    cache = Path if asked == "directory" else CachePool
    with pytest.raises(
        CacheOwnershipError, match=f"{found}, this zcache reads format {read}. Use the version"
    ):
        CacheStore(MemoryStore(), cache_store=cache(tmp_path), source_id="a pool", adopt=True)


@pytest.mark.parametrize("kind", ON_DISK)
def test_folder_inside_another_cache_is_refused_and_not_made(tmp_path: Path, kind: str) -> None:
    cache = tmp_path if kind == "directory" else CachePool(tmp_path)
    store = CacheStore(source_of(), cache_store=cache, source_id="s")
    for below in ("sub/deeper", ".zcache/segments/sub"):
        for make in (
            CachePool,
            lambda path: zcache.open("memory://", cache=path),
            lambda path: CacheStore(source_of(), cache_store=path),
        ):
            with pytest.raises(CacheOwnershipError, match="lies inside the cache directory"):
                make(tmp_path / below)
    assert not (tmp_path / "sub").exists()
    assert not (tmp_path / ".zcache/segments/sub").exists()
    del store


def test_directory_with_files_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheOwnershipError, match="is not empty") as refused:
        CachePool(tmp_path)
    # A pool takes no such option.
    assert "adopt" not in str(refused.value)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_stamp_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    CachePool(tmp_path / "pool")
    asyncio.run(closed(tmp_path, "pool"))
    for stamp in tmp_path.rglob("stamp*"):
        stamp.write_text("half a st")
    with pytest.raises(CacheOwnershipError, match=r"cannot be read. Remove it") as refused:
        CachePool(tmp_path / "pool")
    assert "adopt" not in str(refused.value)


# -------------------------------------------------------------------------- read-only


def times_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


async def test_warm_pool_is_served_from_where_nothing_may_be_written(tmp_path: Path) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    before = times_below(tmp_path)
    reads = CachePool(tmp_path / "pool", read_only=True)
    assert reads != pool
    store = neighbour(reads, NEIGHBOURS[0])
    await check_neighbour(store, NEIGHBOURS[0])
    assert store.cache_stats()["hits"] >= len(KEYS)
    await read_through(store, "missing")
    assert times_below(tmp_path) == before
    with pytest.raises(CacheUnreachableError):
        await store.set("k", buf(b"new"))
    with pytest.raises(CacheUnreachableError, match="is only read from"):
        reads.forget(NEIGHBOURS[0])
    pool._pool.directory.layout.scanner.files.close()
    await check_neighbour(
        CacheStore(source_of(), cache_store=pool, source_id=NEIGHBOURS[0]), NEIGHBOURS[0]
    )


# ------------------------------------------------------------------------------- forks


def test_child_that_was_forked_uses_the_pool_as_a_participant_of_its_own(tmp_path: Path) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    store = neighbour(pool, NEIGHBOURS[0])

    # Of a source in memory each process has its own: they write different keys.
    async def use(name: str) -> None:
        await check_neighbour(store, NEIGHBOURS[0])
        await write(store, name, name.encode())
        assert await read(store, name) == name.encode()

    def in_child() -> None:
        asyncio.run(use("child"))
        check_invariants(store)

    child = forks.fork(in_child)
    asyncio.run(use("parent"))
    assert forks.wait([child]) == [0]
    asyncio.run(check_neighbour(store, NEIGHBOURS[0]))


def test_cache_store_of_a_pool_shows_itself(where: Path | None) -> None:
    store = CacheStore(MemoryStore(), cache_store=CachePool(where))
    assert repr(cache_store_of(store)).startswith("CachePool(")
