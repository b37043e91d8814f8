"""A volume without space or inodes, a process without descriptors or threads: who can be served is."""

from __future__ import annotations

import _thread
import asyncio
import gc
import os
import resource
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest

from directories import closed
from doubles import SyncDictStore
from forks import run
from pools import cache_at
from support import PROTOTYPE, buf, listed, read
from zcache import CachePool, CacheStore
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VALUES = {f"a/c/{n}": bytes([n]) * 1000 for n in range(8)}


@pytest.fixture(params=["directory", pytest.param("pool", marks=pytest.mark.once)], autouse=True)
def is_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the cache is a pool; see `cache_at`."""
    is_so: bool = request.param == "pool"
    monkeypatch.setenv("ZCACHE_TEST_POOL", "1" if is_so else "")
    return is_so


def source() -> StoreDouble:
    return StoreDouble(SyncDictStore(dict(VALUES)))


def open_store(where: Path, behind: StoreDouble) -> CacheStore:
    cache = cache_at(where)
    return CacheStore(behind, cache_store=cache, source_id="source", min_free_space=0)


async def warmed(where: Path) -> None:
    store = open_store(where, source())
    for key in VALUES:
        await read(store, key)
    assert await store.drain()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A volume of a megabyte and 100 inodes."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=100", "small", path]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", path], check=True)


def fill_up(volume: Path, what: str) -> None:
    try:
        for number in range(10_000):
            with (volume / f"fill-{number}").open("wb") as file:
                if what == "space":
                    file.write(bytes(4096))
    except OSError:
        return
    pytest.fail("it is never full")


@pytest.mark.parametrize("lose", [None, "index", "stamp.json", "tmp"])
@pytest.mark.parametrize("what", ["space", "inodes"])
async def test_full_volume_at_the_opening_is_read_from(
    small: Path, what: str, lose: str | None
) -> None:
    where = small / "cache"
    await warmed(where)
    await closed(small)
    if lose is not None:
        subprocess.run(["rm", "-r", where / ".zcache" / lose], check=True)  # noqa: ASYNC221
    fill_up(small, what)
    behind = source()
    store = open_store(where, behind)
    for key, value in VALUES.items():
        assert await read(store, key) == value
    assert behind.calls["get"] == 0
    # Its values can be removed, so it can be written through.
    await store.set("a/c/1", buf(b"new"))
    await store.delete("a/c/2")
    await store.set("b", buf(bytes(5000)))
    assert await store.drain()
    assert await read(store, "a/c/1") == b"new"
    assert await read(store, "a/c/2") is None
    assert await read(store, "b") == bytes(5000)
    del store
    await closed(small)
    store = open_store(where, behind)
    assert await read(store, "a/c/1") == b"new"
    assert await read(store, "a/c/2") is None


@pytest.mark.parametrize("lose", ["index", "tmp"])
@pytest.mark.parametrize("what", ["space", "inodes"])
async def test_volume_that_was_full_at_the_opening_is_filled_once_it_is_not(
    small: Path, what: str, lose: str, *, is_pool: bool
) -> None:
    where = small / "cache"
    await warmed(where)
    await closed(small)
    shutil.rmtree(where / ".zcache" / lose)
    fill_up(small, what)
    behind = source()
    store = open_store(where, behind)
    await behind.inner.set("b", buf(b"more"))
    for _ in range(2):
        assert await read(store, "b") == b"more"
        assert await store.drain()
    assert not store.is_cached("b")
    assert store.cache_stats()["refusals"] == 2
    await store.set("a/c/1", buf(b"new"))
    empty(small)
    await until_cached(store, "b")
    assert await read(store, "a/c/1") == b"new"
    assert await store.drain()
    if is_pool:
        assert [info.name for info in CachePool(where).sources()] == ["source"]
    del store
    await closed(small)
    store = open_store(where, behind)
    behind.take()
    assert await read(store, "a/c/1") == b"new"
    assert await read(store, "b") == b"more"
    assert behind.take() == {}


async def test_new_directory_without_inodes_is_filled_once_there_are_some(small: Path) -> None:
    """There are enough for the stamp, not for the index."""
    fill_up(small, "inodes")
    for number in range(8):
        (small / f"fill-{number}").unlink()
    store = open_store(small / "cache", source())
    assert await read(store, "a/c/1") == VALUES["a/c/1"]
    assert await store.drain()
    assert not store.is_cached("a/c/1")
    assert store.cache_stats()["refusals"] == 1
    empty(small)
    await until_cached(store, "a/c/1")


async def test_child_of_who_has_found_the_volume_full_fills_it_once_it_is_not(small: Path) -> None:
    where = small / "cache"
    await warmed(where)
    await closed(small)
    shutil.rmtree(where / ".zcache/index")
    fill_up(small, "space")
    behind = source()
    store = open_store(where, behind)
    await behind.inner.set("b", buf(b"more"))

    def child() -> None:
        fresh = threading.Thread(target=lambda: asyncio.run(child_fills(small, store)))
        fresh.start()
        fresh.join()
        assert store.is_cached("b")

    assert run(child) == 0
    await until_cached(store, "b")


async def child_fills(small: Path, store: CacheStore) -> None:
    empty(small)
    await until_cached(store, "b")


def empty(volume: Path) -> None:
    for path in volume.glob("fill-*"):
        path.unlink()


async def until_cached(store: CacheStore, key: str) -> None:
    async with asyncio.timeout(20):
        while not store.is_cached(key):
            await read(store, key)
            assert await store.drain()


@pytest.mark.parametrize("what", ["space", "inodes"])
async def test_what_is_cached_is_kept_where_all_of_it_would_not_make_room(
    small: Path, what: str, *, is_pool: bool
) -> None:
    behind = source()
    cache = cache_at(small / "cache")
    store = CacheStore(behind, cache_store=cache, source_id="source", min_free_space=2**18)
    kept = list(VALUES)[:4]
    for key in kept:
        await read(store, key)
    assert await store.drain()
    fill_up(small, what)
    await read(store, "a/c/7")
    assert await store.drain()
    # A value of a pool needs no inode.
    is_taken = is_pool and what == "inodes"
    assert store.is_cached("a/c/7") == is_taken
    counts = store.cache_stats()
    assert (counts["evictions"], counts["refusals"]) == (0, not is_taken)
    behind.take()
    for key in kept:
        assert await read(store, key) == VALUES[key]
    assert behind.take() == {}
    empty(small)
    await until_cached(store, "a/c/7")


# ------------------------------------------------------- descriptors and threads

METHODS: dict[str, Callable[[CacheStore], Any]] = {
    "get": lambda s: read(s, "a/c/1"),
    "get_cold": lambda s: read(s, "a/c/7"),
    "get_range": lambda s: read(s, "a/c/7", RangeByteRequest(1, 5)),
    "get_partial_values": lambda s: s.get_partial_values(
        PROTOTYPE, [("a/c/1", None), ("a/c/7", RangeByteRequest(0, 4))]
    ),
    "exists": lambda s: s.exists("a/c/1"),
    "getsize": lambda s: s.getsize("a/c/1"),
    "set": lambda s: s.set("a/c/1", buf(b"new")),
    "set_if_not_exists": lambda s: s.set_if_not_exists("n", buf(b"new")),
    "delete": lambda s: s.delete("a/c/2"),
    "delete_dir": lambda s: s.delete_dir("a/c"),
    "list": lambda s: listed(s.list()),
    "list_dir": lambda s: listed(s.list_dir("a")),
    "clear": lambda s: s.clear(),
    "clear_cache": lambda s: s.clear_cache(),
    "drain": lambda s: s.drain(timeout=5),
}


@pytest.fixture
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    try:
        yield
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)


async def check_method(tmp_path: Path, method: str, limit: Callable[[], object]) -> None:
    """The same answer as from the source alone, within a time that is not for ever."""
    behind = source()
    store = open_store(tmp_path, behind)
    for key in list(VALUES)[:4]:
        await read(store, key)
    assert await store.drain()
    limit()
    answer = await asyncio.wait_for(METHODS[method](store), 30)
    if method in ("get", "get_cold"):
        assert answer == VALUES["a/c/1" if method == "get" else "a/c/7"]
    elif method == "get_range":
        assert answer == VALUES["a/c/7"][1:5]
    elif method == "get_partial_values":
        assert [value.to_bytes() for value in answer] == [VALUES["a/c/1"], VALUES["a/c/7"][:4]]
    elif method == "exists":
        assert answer is True
    elif method == "getsize":
        assert answer == 1000
    for key in VALUES:
        assert await asyncio.wait_for(read(store, key), 30) == await read(behind.inner, key)


@pytest.mark.parametrize("method", METHODS)
async def test_without_descriptors_everybody_is_served(
    tmp_path: Path, method: str, request: pytest.FixtureRequest
) -> None:
    await check_method(tmp_path, method, lambda: request.getfixturevalue("no_descriptors"))


@pytest.mark.parametrize("is_pool", ["pool"], indirect=True)
async def test_segments_that_are_open_make_room_for_others_where_no_descriptor_is_left(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    behind = StoreDouble(SyncDictStore({f"a/{n}": bytes([n]) * 50_000 for n in range(20)}))
    store = CacheStore(
        behind, cache_store=CachePool(tmp_path / "pool", max_size=4_000_000), source_id="source"
    )
    for n in range(20):
        await read(store, f"a/{n}")
    assert await store.drain()
    store._cache.shared.place.layout.scanner.files.close()
    assert await read(store, "a/0") == bytes(50_000)
    behind.take()
    request.getfixturevalue("no_descriptors")
    for n in range(20):
        assert await read(store, f"a/{n}") == bytes([n]) * 50_000
    assert behind.take()["get"] == 0


@pytest.mark.parametrize("method", METHODS)
async def test_without_threads_everybody_is_served(
    tmp_path: Path, method: str, request: pytest.FixtureRequest
) -> None:
    await check_method(tmp_path, method, lambda: request.getfixturevalue("no_threads"))


@pytest.mark.parametrize("is_pool", ["pool"], indirect=True)
async def test_pool_without_inodes_keeps_what_it_has_and_appends(small: Path) -> None:
    """A value in a segment has no inode: evictions would win none."""
    behind = source()
    pool = CachePool(small / "pool", max_size=2**19)
    store = CacheStore(behind, cache_store=pool, source_id="source", min_free_space=0)
    for key in VALUES:
        await read(store, key)
    assert await store.drain()
    fill_up(small, "inodes")
    await behind.inner.set("later", buf(b"more"))
    behind.take()
    for _ in range(2):
        for key, value in {**VALUES, "later": b"more"}.items():
            assert await read(store, key) == value
        assert await store.drain()
    assert behind.take() == {"get": 1}
    assert store.cache_stats()["evictions"] == 0
    del store, pool
