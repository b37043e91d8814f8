"""The Python side by group: zcache, zarr's CacheStore and the bare operation side by side.

    pytest benches/bench_store.py --benchmark-enable --benchmark-group-by=group

Small sets, so that it runs with the tests, timing off. `run.py` has the figures that are published.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.experimental.cache_store import CacheStore as ZarrCacheStore
from zarr.storage import LocalStore, MemoryStore

from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

PROTOTYPE = default_buffer_prototype()
KEYS = [f"era5/2m_temperature/c/{n // 20}/{n % 20}/0" for n in range(200)]
SIZE = 4096
MAKERS: dict[str, Any] = {"zcache": CacheStore, "zarr": ZarrCacheStore}


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture
def source() -> MemoryStore:
    return MemoryStore({key: cpu.Buffer.from_bytes(os.urandom(SIZE)) for key in KEYS})


async def read(store: Any) -> None:
    for key in KEYS:
        assert await store.get(key, PROTOTYPE) is not None


def stats(store: Any) -> tuple[int, int]:
    found = store.cache_stats()
    return found["hits"], found["misses"]


@pytest.mark.benchmark(group="hit in memory")
@pytest.mark.parametrize("kind", ["bare", *MAKERS])
def test_hit_in_memory(
    benchmark: BenchmarkFixture, loop: Any, source: MemoryStore, kind: str
) -> None:
    store = source if kind == "bare" else MAKERS[kind](source, cache_store=MemoryStore())
    loop.run_until_complete(read(store))
    benchmark(lambda: loop.run_until_complete(read(store)))
    if kind != "bare":
        hits, misses = stats(store)
        assert misses == len(KEYS)
        assert hits >= len(KEYS)


@pytest.mark.benchmark(group="miss, fill and evict in memory")
@pytest.mark.parametrize("kind", ["bare", *MAKERS])
def test_miss(benchmark: BenchmarkFixture, loop: Any, source: MemoryStore, kind: str) -> None:
    store: Any = source
    if kind != "bare":
        bound = len(KEYS) // 4 * SIZE
        store = MAKERS[kind](source, cache_store=MemoryStore(), max_size=bound)
    loop.run_until_complete(read(store))
    benchmark(lambda: loop.run_until_complete(read(store)))
    if kind != "bare":
        assert stats(store)[0] == 0


@pytest.mark.benchmark(group="hit on disk")
@pytest.mark.parametrize("kind", ["bare", *MAKERS])
def test_hit_on_disk(
    benchmark: BenchmarkFixture, loop: Any, source: MemoryStore, kind: str, tmp_path: Path
) -> None:
    if kind == "bare":
        for key in KEYS:
            path = tmp_path / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(SIZE))
        paths = [str(tmp_path / key) for key in KEYS]

        def read_files() -> None:
            for path in paths:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                assert len(os.pread(file, SIZE, 0)) == SIZE
                os.close(file)

        benchmark(read_files)
        return
    store = MAKERS[kind](source, cache_store=LocalStore(tmp_path))
    for _ in range(2):
        loop.run_until_complete(read(store))
        if kind == "zcache":
            # Else some would be served from the values on their way to the disk.
            assert store.drain_sync()
    benchmark(lambda: loop.run_until_complete(read(store)))
    assert stats(store)[1] == len(KEYS)


@pytest.mark.benchmark(group="range of a cached value")
@pytest.mark.parametrize("kind", ["bare", "zcache"])
def test_range(benchmark: BenchmarkFixture, loop: Any, source: MemoryStore, kind: str) -> None:
    store = source if kind == "bare" else CacheStore(source, cache_store=MemoryStore())
    loop.run_until_complete(read(store))
    request = RangeByteRequest(100, 200)

    async def read_ranges() -> None:
        for key in KEYS:
            found = await store.get(key, PROTOTYPE, request)
            assert found is not None
            assert len(found) == 100

    benchmark(lambda: loop.run_until_complete(read_ranges()))
    if isinstance(store, CacheStore):
        assert stats(store)[1] == len(KEYS)


@pytest.mark.benchmark(group="write")
@pytest.mark.parametrize("kind", ["bare", *MAKERS])
def test_write(benchmark: BenchmarkFixture, loop: Any, kind: str) -> None:
    store: Any = MemoryStore()
    if kind != "bare":
        store = MAKERS[kind](store, cache_store=MemoryStore())
    value = cpu.Buffer.from_bytes(os.urandom(SIZE))

    async def write() -> None:
        for key in KEYS:
            await store.set(key, value)

    benchmark(lambda: loop.run_until_complete(write()))
    if kind == "zcache":
        assert store.cache_info()["cached_keys"] == len(KEYS)
