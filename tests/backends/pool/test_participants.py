"""Other processes that use a pool, and stop in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from zarr.storage import MemoryStore

from agent import Agent
from directories import closed, complete, open_store
from forks import run
from pools import NEIGHBOURS, check_neighbour, neighbour, pool_with_neighbours, source_of
from support import TESTS, buf, check_quiet, read, read_through, until, write
from zcache import CachePool, CacheStore
from zcache._backends.pool.place import DirectoryPool, _forget_ended

if TYPE_CHECKING:
    from pathlib import Path

BOUND = 40_000
VALUES = {f"c/{n}": str(n % 10) * 5000 for n in range(12)}


@pytest.mark.parametrize("then", ["goes on", "is killed"])
async def test_participant_that_is_stopped_holds_up_no_other(
    tmp_path: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a segment of its own, and a read that waits for the source."""
    monkeypatch.setenv("ZCACHE_TEST_POOL", "1")
    pool = pool_with_neighbours(tmp_path / "cache", max_size=BOUND)
    store, source = open_store(tmp_path)
    for key, value in VALUES.items():
        await source.set(key, buf(value.encode()))
    with Agent(tmp_path, BOUND) as other:
        for key in list(VALUES)[:6]:
            assert other("get", key) == VALUES[key]
        assert other("drain")
        other("begin", "c/9", "get after")
        os.kill(other.process.pid, signal.SIGSTOP)
        for key, value in VALUES.items():
            assert await read_through(store, key) == value.encode()
            assert pool.cache_info()["current_size"] <= BOUND
        await write(store, "c/9", b"new")
        await store.delete("c/8")
        assert await read(store, "c/8") is None
        for name in NEIGHBOURS:
            await check_neighbour(neighbour(pool, name), name)
        assert pool.export("source", MemoryStore()) > 0
        pool.forget(NEIGHBOURS[1])
        assert {info.name for info in pool.sources()} == {"source", NEIGHBOURS[0]}
        if then == "goes on":
            os.kill(other.process.pid, signal.SIGCONT)
            other("end")
            # What it had read before the write is not kept.
            assert other("drain")
            assert other("get", "c/9") == "new"
            assert other("get", "c/8") is None
            other("check")
        else:
            other.kill()
        assert await read(store, "c/9") == b"new"
        await check_quiet(store)
    del store, pool
    await closed(tmp_path)
    again = CacheStore(source_of(), cache_store=CachePool(tmp_path / "cache"), source_id="source")
    await complete(again)
    assert await read(again, "c/9") in (b"new", None)
    assert await read(again, "c/8") is None
    await check_quiet(again)


@pytest.mark.slow
def test_bound_that_another_process_asks_for_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCACHE_TEST_POOL", "1")
    pool = CachePool(tmp_path / "cache", max_size=10 * BOUND)
    assert pool.max_size == pool.cache_info()["max_size"] == 10 * BOUND
    with Agent(tmp_path, BOUND) as other:
        assert other("drain")
        assert pool.cache_info()["max_size"] == BOUND
        assert pool.max_size == 10 * BOUND


UNNAMED = """
import sys
from zarr.storage import MemoryStore
from support import buf, value_sync
from zcache import CachePool, CacheStore

pool = CachePool(sys.argv[1], max_size=200_000, eviction="none")
store = CacheStore(MemoryStore({f"c/{n}": buf(bytes(10_000)) for n in range(30)}), cache_store=pool)
for n in range(30):
    value_sync(store, f"c/{n}")
assert store.drain_sync()
print(pool.cache_info()["entries"])
"""


@pytest.mark.slow
async def test_source_without_a_name_leaves_no_values_behind(tmp_path: Path) -> None:
    """They can never be served again once its process has ended; those of the living stay."""
    done = subprocess.run(  # noqa: ASYNC221
        [sys.executable, "-c", UNNAMED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        check=True,
        timeout=100,
    )
    assert int(done.stdout) > 10
    pool = CachePool(tmp_path, max_size=200_000, eviction="none")
    source = MemoryStore({f"c/{n}": buf(bytes(10_000)) for n in range(5)})
    store = CacheStore(source, cache_store=pool)
    await until(lambda: pool.cache_info()["entries"] == 0)
    for n in range(5):
        await read(store, f"c/{n}")
    assert await store.drain()
    # Opened again by the process that has the source.
    del store, pool
    pool = CachePool(tmp_path, max_size=200_000, eviction="none")
    store = CacheStore(source, cache_store=pool)
    await read(store, "c/0")
    assert (store.cache_stats()["hits"], pool.cache_info()["entries"]) == (1, 5)


@pytest.mark.slow
async def test_source_without_a_name_keeps_its_values_while_its_process_lives(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", f"{UNNAMED}sys.stdout.flush()\nsys.stdin.read()", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout
        entries = int(other.stdout.readline())
        assert entries > 10
        pool = CachePool(tmp_path, max_size=200_000, eviction="none")
        place = pool._pool
        assert isinstance(place, DirectoryPool)
        names = set(place.notes())
        assert names
        # As an opening does in the background.
        _forget_ended(lambda: place)
        assert pool.cache_info()["entries"] == entries
        assert set(place.directory.register.names()) == names
        other.communicate()
    # Once it was seen that it has ended.
    await until(lambda: (place.directory.recovery.reclaim_dead(), place.handle.index.is_alone)[1])
    _forget_ended(lambda: place)
    assert pool.cache_info()["entries"] == 0
    assert not place.directory.register.names()


def test_forked_child_opens_segments_for_itself(tmp_path: Path) -> None:
    """A thread of the parent may hold the lock of those that it has open."""
    pool = CachePool(tmp_path)
    scanner = pool._pool.directory.layout.scanner  # type: ignore[union-attr]
    files = scanner.files

    def child() -> None:
        assert scanner.files is not files

    assert run(child) == 0
