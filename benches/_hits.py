"""Hits and misses through `get`, against the bare read."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import statistics
from typing import TYPE_CHECKING, Any

from _measure import Row, interleave, watch
from _setup import (
    batches,
    chunk_keys,
    drained,
    local_store,
    memory_store,
    mounted,
    only_hits,
    read_all,
    read_at_once,
    temporary_directory,
    zarr_store,
    zcache_store,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from _measure import Work
    from _setup import Scale

_SIZES = {4096: "4 KiB", 65536: "64 KiB", 1 << 20: "1 MiB"}
# The aims of issue 6, one by one and 64 at once alike.
_DISK_AIMS = {4096: 4.0, 65536: 2.0, 1 << 20: 1.3}


async def memory_hit(scale: Scale) -> list[Row]:
    """A hit over a MemoryStore, with ~100 MB of objects behind each contestant."""
    count = scale.of(200_000, 20_000)
    keys = chunk_keys(count)
    stores = {
        "bare": memory_store(keys, 100),
        "zcache": zcache_store(memory_store(keys, 100)),
        "zarr": zarr_store(memory_store(keys, 100)),
    }
    for store in stores.values():
        await read_all(store, keys)
        await read_all(store, keys)
    # In another order than that in which they were stored and kept.
    random.Random(5).shuffle(keys)
    rows = []
    # The large set, then one that stays in the caches: there instructions count, not memory.
    for work, chosen in (("memory hit", keys), ("memory hit, 1,000 keys", keys[:1000])):
        contestants = {name: _read(store, chosen) for name, store in stores.items()}
        with only_hits(stores["zcache"]):
            times = await interleave(contestants, scale.of(800, 100))
        rows.append(times.row(work, 1.1))
    return rows


def _read(store: object, keys: list[str], at_once: int = 1) -> Work:
    slices = batches(keys, 100 if at_once == 1 else at_once)

    async def work() -> int:
        if at_once == 1:
            return await read_all(store, next(slices))
        return await read_at_once(store, next(slices), at_once)

    return work


async def first_hit(scale: Scale) -> list[Row]:
    """The first hit of each value in a process; on disk it compares the bytes with their checksum."""
    rows = []
    for size, name in ((100, "100 B"), (1 << 20, "1 MiB")):
        step = 100 if size == 100 else 4
        keys = chunk_keys(scale.of(200, 40) * step)
        stores = {"bare": memory_store(keys, size, distinct=64)}
        stores |= {
            kind: make(memory_store(keys, size, distinct=64))
            for kind, make in (("zcache", zcache_store), ("zarr", zarr_store))
        }
        for store in stores.values():
            await read_all(store, keys)
        random.Random(5).shuffle(keys)
        rows.append(await _first_hit(f"first hit in memory, {name}", stores, keys, step, scale))
    with temporary_directory(scale) as root:
        keys = chunk_keys(scale.of(2048, 512))
        source = memory_store(keys, 4096)
        filled = zcache_store(source, local_store(root / "zcache"), source_id="x")
        await read_at_once(filled, keys)
        await drained(filled)
        del filled
        gc.collect()
        for key in keys:
            path = root / "bare" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(4096))
        stores = {"zcache": zcache_store(source, local_store(root / "zcache"), source_id="x")}
        bare = _read_files(str(root / "bare"), keys, 4096, 16, 1)
        rows.append(await _first_hit("first hit on disk, 4 KiB", stores, keys, 16, scale, bare))
    return rows


async def _first_hit(
    work: str,
    stores: dict[str, Any],
    keys: list[str],
    step: int,
    scale: Scale,
    bare: Work | None = None,
) -> Row:
    contestants = {} if bare is None else {"bare": bare}
    contestants |= {kind: _read_slices(store, keys, step, 1) for kind, store in stores.items()}
    # Not repeated where it is disturbed: a second hit of the same value would be no first one.
    times = await interleave(contestants, scale.of(50, 10), quiet=False)
    stats = stores["zcache"].cache_stats()
    assert stats["hits"] <= len(keys), stats
    return times.row(work)


async def miss_evict(scale: Scale) -> list[Row]:
    """Each read misses, fills and evicts one value."""
    return [
        await _miss_evict("miss + fill + evict", 100, scale.of(100_000, 10_000), scale, 3.0),
        await _miss_evict("miss + fill + evict, 64 KiB", 65536, scale.of(4000, 800), scale, None),
    ]


async def _miss_evict(work: str, size: int, count: int, scale: Scale, aim: float | None) -> Row:
    keys = chunk_keys(count)
    bound = count // 4 * size
    sources = [memory_store(keys, size, count) for _ in range(3)]
    # In another order than that in which they were stored.
    random.Random(5).shuffle(keys)
    stores = {
        "bare": sources[0],
        "zcache": zcache_store(sources[1], max_size=bound),
        "zarr": zarr_store(sources[2], max_size=bound),
    }
    contestants = {}
    for name, store in stores.items():
        await read_all(store, keys)
        contestants[name] = _read(store, keys)
    times = await interleave(contestants, scale.of(800, 60))
    stats = stores["zcache"].cache_stats()
    assert stats["hits"] == stats["refusals"] == 0, stats
    assert stats["evictions"] == stats["misses"] - count // 4, stats
    assert stores["zarr"]._state.hits == 0
    return times.row(work, aim)


async def disk_hit(scale: Scale) -> list[Row]:
    """Hits on a local disk whose pages are in the page cache."""
    rows = []
    with temporary_directory(scale) as directory:
        for size, name in _SIZES.items():
            # Filling takes milliseconds a value where others use the disk too, hence so few small ones.
            count = scale.of(
                min(2048, max(64, (32 << 20) // size)), min(128, max(16, (8 << 20) // size))
            )
            rows += await _disk_hit(scale, directory / str(size), size, name, count)
    return rows


async def hit_elsewhere(scale: Scale) -> list[Row]:
    """The same on the file systems of containers, which cannot read without waiting."""
    rows = []
    for kind in ("overlayfs", "tmpfs"):
        with temporary_directory(scale) as directory, mounted(kind, directory) as where:
            name = f"4 KiB on {kind}"
            if where is None:
                rows.append(Row(f"disk hit, {name}", note="not measured: it takes root to mount"))
            else:
                rows += await _disk_hit(scale, where, 4096, name, scale.of(2048, 128))
    return rows


async def _disk_hit(scale: Scale, root: Path, size: int, name: str, count: int) -> list[Row]:
    keys = chunk_keys(count)
    for key in keys:
        path = root / "bare" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    source = memory_store(keys, size, distinct=16)
    stores = {
        "zcache": zcache_store(source, local_store(root / "zcache")),
        "zarr": zarr_store(source, local_store(root / "zarr")),
    }
    for store in stores.values():
        await read_at_once(store, keys)
        await drained(store)
        # The first hit of each value, which compares checksums.
        await read_at_once(store, keys)
    random.Random(5).shuffle(keys)
    assert stores["zcache"].cache_stats()["hits"] == count
    rows = []
    for at_once in (1, 64):
        step = min(at_once, count) if at_once > 1 else min(100, count // 4)
        contestants = {"bare": _read_files(str(root / "bare"), keys, size, step, at_once)}
        for kind, store in stores.items():
            contestants[kind] = _read_slices(store, keys, step, at_once)
        with only_hits(stores["zcache"]):
            times = await interleave(contestants, scale.of(100, 15))
        how = "one by one" if at_once == 1 else f"{step} at once"
        rows.append(times.row(f"disk hit, {name}, {how}", _DISK_AIMS[size]))
    return rows


def _read_slices(store: object, keys: list[str], step: int, at_once: int) -> Work:
    slices = batches(keys, step)
    read: Callable = read_all if at_once == 1 else read_at_once

    async def work() -> int:
        return await read(store, next(slices))

    return work


def _read_files(root: str, keys: list[str], size: int, step: int, at_once: int) -> Work:
    slices = batches([f"{root}/{key}" for key in keys], step)

    def read(path: str) -> bytes:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(file, size, 0)
        os.close(file)
        return data

    async def work() -> int:
        # What is read at once is there at once: the memory for that is part of the work.
        if at_once == 1:
            for path in next(slices):
                read(path)
        else:
            [read(path) for path in next(slices)]
        return step

    return work


async def loop_lag(scale: Scale) -> list[Row]:
    """How long another task of the loop waits at worst while 64 readers hit the disk without pause."""
    size, count = 1 << 20, scale.of(64, 16)
    with temporary_directory(scale) as root:
        keys = chunk_keys(count)
        source = memory_store(keys, size, distinct=16)
        stores = {
            "zcache": zcache_store(source, local_store(root / "zcache")),
            "zarr": zarr_store(source, local_store(root / "zarr")),
        }
        worst = {}
        for name, store in stores.items():
            await read_at_once(store, keys)
            await drained(store)
            await read_at_once(store, keys)
            longest = []
            for _ in range(scale.of(15, 3)):
                lags: list[float] = []
                watcher = asyncio.ensure_future(watch(lags))
                await asyncio.sleep(0)
                await read_at_once(store, keys)
                await asyncio.sleep(0)
                watcher.cancel()
                longest.append(max(lags, default=0.0))
            worst[name] = statistics.median(longest)
    return [
        Row(
            "event loop's longest lag, 64 disk hits of 1 MiB at once",
            zcache=worst["zcache"],
            zarr=worst["zarr"],
            note="from one turn of another task to its next, median of passes; no aim",
        )
    ]
