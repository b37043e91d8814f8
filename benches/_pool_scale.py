"""A pool of many sources, of a million values, and over a slow source."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

from _measure import Row, interleave
from _pool import fill_all, inodes_below, pool_at
from _setup import (
    PROTOTYPE,
    SlowStore,
    chunk_keys,
    drained,
    memory_store,
    temporary_directory,
    zcache_store,
)

if TYPE_CHECKING:
    from pathlib import Path

    from _measure import Work
    from _setup import Scale

_PAGE = 4096
_AT_ONCE = 64


# ------------------------------------------------------------------------------ sources


async def sources(scale: Scale) -> list[Row]:
    """Hits of 4 KiB one by one, and fills that evict, over so many sources of one pool in turn."""
    counts = [1, 10, scale.of(1000, 100)]
    total = scale.of(4000, 1000)
    rows: list[Row] = []
    with temporary_directory(scale) as root:
        for what, size in (("hit", 4096), ("fill that evicts", 65536)):
            works = {}
            for count in counts:
                bound = None if what == "hit" else total // 2 * (size + _PAGE)
                pool = pool_at(root / f"{what} {count}", max_size=bound)
                stores = _stores(pool, count, total, size)
                for store, keys in stores:
                    await fill_all(store, keys)
                works[str(count)] = _in_turn(stores, 100, at_once=what != "hit")
            times = await interleave(works, scale.of(100 if what == "hit" else 40, 10))
            rows += [
                Row(
                    f"pool: {what}, {size // 1024} KiB, {count:,} sources in turn",
                    zcache=times.median(str(count)),
                    bare=times.median("1"),
                    ratio=times.ratio(str(count), "1"),
                    note="bare is one source of as many values",
                    disturbed=times.disturbed,
                )
                for count in counts[1:]
            ]
    return rows


def _stores(pool: Any, count: int, total: int, size: int) -> list[tuple[Any, list[str]]]:
    keys = chunk_keys(total // count)
    source = memory_store(keys, size, distinct=16)
    return [
        (zcache_store(source, pool, source_id=f"source {number}"), keys) for number in range(count)
    ]


def _in_turn(stores: list[tuple[Any, list[str]]], step: int, *, at_once: bool) -> Work:
    """Reads that go round all sources, each of which goes on where it was."""
    reads = [(store, itertools.cycle(keys)) for store, keys in stores]
    turns = itertools.cycle(reads)

    async def work() -> int:
        chosen = [(store, next(keys)) for store, keys in itertools.islice(turns, step)]
        if at_once:
            await asyncio.gather(*[store.get(key, PROTOTYPE) for store, key in chosen])
            for store in {id(store): store for store, _ in chosen}.values():
                await drained(store)
        else:
            for store, key in chosen:
                await store.get(key, PROTOTYPE)
        return step

    return work


# --------------------------------------------------------------------------- cold reads


async def cold(scale: Scale) -> list[Row]:
    """64 KiB values over a source that takes 20 ms, 64 workers at once, everything cold, into a pool."""
    keys = chunk_keys(scale.of(1024, 256))
    source = SlowStore(memory_store(keys, 65536, distinct=256), 0.02)
    numbers = itertools.count()
    with temporary_directory(scale) as root:
        stores: dict[str, Any] = {"bare": source}

        async def renew() -> None:
            if "zcache" in stores:
                await drained(stores["zcache"])
            stores["zcache"] = zcache_store(
                source, pool_at(root / f"pool-{next(numbers)}"), source_id="x"
            )

        def reads(name: str) -> Work:
            async def work() -> int:
                rest = iter(keys)

                async def worker() -> None:
                    for key in rest:
                        await stores[name].get(key, PROTOTYPE)

                await asyncio.gather(*[worker() for _ in range(_AT_ONCE)])
                return len(keys)

            return work

        times = await interleave(
            {name: reads(name) for name in ("bare", "zcache")},
            scale.of(15, 3),
            quiet=False,
            before={"zcache": renew},
        )
        await drained(stores["zcache"])
        assert stores["zcache"].cache_info()["cached_keys"] == len(keys)
    return [
        times.row(
            "pool: cold read of 64 KiB, source of 20 ms, 64 at once",
            1.03,
            "bare is the source alone",
        )
    ]


# --------------------------------------------------------------------- a million values


async def million(scale: Scale) -> list[Row]:
    """A million values of 100 bytes: inodes, opening up to the first hit, and a rebuild beside reading as many pages."""
    count = scale.of(1_000_000, 20_000)
    with temporary_directory(scale) as root:
        keys = chunk_keys(count)
        source = memory_store(keys, 100, distinct=64)
        store = zcache_store(source, pool_at(root / "pool"), source_id="x")
        await fill_all(store, keys)
        inodes = inodes_below(root / "pool")
        del store
        openings = [await _first_hit(source, root, keys[0]) for _ in range(scale.of(10, 3))]
        ratios, rebuilds, pages = [], [], []
        for _ in range(scale.of(3, 2)):
            pages.append(_read_pages(root / "pool/.zcache/segments", count))
            rebuilds.append(_rebuild(root / "pool", count))
            ratios.append(rebuilds[-1] / pages[-1])
    what = f"{count:,} values of 100 B"
    return [
        Row(f"pool: opening with {what}, to the first hit", zcache=min(openings), aim=0.005),
        Row(f"pool: inodes of {what}", unit="", zcache=inodes),
        Row(
            f"pool: rebuild of {what}",
            zcache=sorted(rebuilds)[len(rebuilds) // 2],
            bare=sorted(pages)[len(pages) // 2],
            ratio=sorted(ratios)[len(ratios) // 2],
            aim=3,
            note="bare reads as many pages, each by one pread, from the page cache as well",
        ),
    ]


def _rebuild(path: Path, count: int) -> float:
    """Seconds until the index of a pool that has lost it has so many entries again."""
    shutil.rmtree(path / ".zcache/index")
    begun = time.perf_counter()
    pool = pool_at(path)
    while pool.cache_info()["entries"] < count:
        time.sleep(0.005)
    return time.perf_counter() - begun


async def _first_hit(source: Any, root: Path, key: str) -> float:
    begun = time.perf_counter()
    store = zcache_store(source, pool_at(root / "pool"), source_id="x")
    await store.get(key, PROTOTYPE)
    seconds = time.perf_counter() - begun
    assert store.cache_stats()["hits"] == 1
    return seconds


def _read_pages(segments: Path, count: int) -> float:
    """Seconds for reading so many pages of values, one after the other."""
    files = [os.open(path, os.O_RDONLY) for path in sorted(segments.iterdir())]
    places = [
        (file, at)
        for file in files
        # The last page of a file ends with its value.
        for at in range(65 * _PAGE, os.fstat(file).st_size, _PAGE)
    ][:count]
    page, preadv = bytearray(_PAGE), os.preadv
    into = [page]
    begun = time.perf_counter()
    for file, at in places:
        preadv(file, into, at)
    seconds = time.perf_counter() - begun
    for file in files:
        os.close(file)
    assert len(places) == count
    return seconds
