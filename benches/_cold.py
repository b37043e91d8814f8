"""Cold reads: what filling the cache adds to reading a slow source, and how fast it can be filled."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from _measure import Row, interleave
from _setup import (
    PROTOTYPE,
    SlowStore,
    chunk_keys,
    local_store,
    memory_store,
    temporary_directory,
    zarr_store,
    zcache_store,
)

if TYPE_CHECKING:
    from pathlib import Path

    from _measure import Times, Work
    from _setup import Scale

_AT_ONCE = 64


async def one_flight(_scale: Scale) -> list[Row]:
    """200 tasks, and then 8 threads with 25 tasks each, want one cold key at the same moment."""
    reads: dict[str, list[int]] = {}
    for name, make in (
        ("bare", lambda store: store),
        ("zcache", zcache_store),
        ("zarr", zarr_store),
    ):
        source = SlowStore(memory_store(["key"], 1000), 0.02)
        store = make(source)
        await asyncio.gather(*[store.get("key", PROTOTYPE) for _ in range(200)])
        reads[name] = [source.reads]
        source = SlowStore(memory_store(["key"], 1000), 0.05)
        store = make(source)
        reads[name].append(await asyncio.to_thread(_from_threads, store, source))
    return [
        Row(
            f"source reads when {who} want one cold key",
            unit="",
            zcache=reads["zcache"][at],
            zarr=reads["zarr"][at],
            bare=reads["bare"][at],
            aim=1,
        )
        for at, who in enumerate(("200 tasks", "200 tasks in 8 threads"))
    ]


def _from_threads(store: Any, source: SlowStore) -> int:
    barrier = threading.Barrier(8)

    async def read() -> None:
        await asyncio.gather(*[store.get("key", PROTOTYPE) for _ in range(25)])

    def work() -> None:
        barrier.wait()
        asyncio.run(read())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return source.reads


async def cold_reads(scale: Scale) -> list[Row]:
    """64 KiB values over a source that takes 20 ms, 64 workers at once, everything cold."""
    keys = chunk_keys(scale.of(1024, 256))
    source = SlowStore(memory_store(keys, 65536, distinct=256), 0.02)
    with temporary_directory(scale) as root:
        times = await _fill(source, keys, root, scale.of(5, 2))
    rows = []
    for where, aim in (("memory", 1.05), ("disk", 1.15)):
        rows.append(
            Row(
                f"cold read of 64 KiB, source of 20 ms, 64 at once, {where} cache",
                zcache=times.median(f"zcache {where}"),
                zarr=times.median(f"zarr {where}"),
                bare=times.median("bare"),
                ratio=times.ratio(f"zcache {where}"),
                zarr_ratio=times.ratio(f"zarr {where}"),
                aim=aim,
            )
        )
    return rows


async def fill_rate(scale: Scale) -> list[Row]:
    """The same over a source that answers at once: the most fills a second."""
    rows = []
    for size, name in ((100, "100 B"), (4096, "4 KiB"), (65536, "64 KiB")):
        for where, count, rounds in (("memory", 2048, 9), ("disk", 256, 5)):
            keys = chunk_keys(count if not scale.quick else count // 4)
            source = SlowStore(memory_store(keys, size, distinct=64), 0.0)
            with temporary_directory(scale) as root:
                times = await _fill(source, keys, root, rounds if not scale.quick else 2, where)
            mine, theirs = (times.median(f"{kind} {where}") for kind in ("zcache", "zarr"))
            rows.append(
                Row(
                    f"fills a second, {name}, 64 at once, {where} cache",
                    unit="/s",
                    zcache=1 / mine if mine else None,
                    zarr=1 / theirs if theirs else None,
                    bare=1 / (times.median("bare") or 1),
                    note="bare: reads of the source alone" if not rows else "",
                )
            )
    return rows


async def _fill(
    source: SlowStore, keys: list[str], root: Path, rounds: int, only: str = ""
) -> Times:
    stores = {
        "bare": source,
        "zcache memory": zcache_store(source),
        "zcache disk": zcache_store(source, local_store(root / "zcache")),
        "zarr memory": zarr_store(source),
        "zarr disk": zarr_store(source, local_store(root / "zarr")),
    }
    stores = {name: store for name, store in stores.items() if name.endswith(("bare", only))}
    before = {
        name: store.clear_cache for name, store in stores.items() if hasattr(store, "clear_cache")
    }
    contestants = {name: _by_workers(store, keys) for name, store in stores.items()}
    # The memory and the directories that the first round needs are not part of a fill.
    await interleave(contestants, 1, quiet=False, before=before)
    times = await interleave(contestants, rounds, quiet=False, before=before)
    for name in stores:
        if not name.startswith("zcache"):
            continue
        # A value that was not kept costs nothing.
        info, stats = stores[name].cache_info(), stores[name].cache_stats()
        assert info["cached_keys"] == len(keys), (name, info, stats)
        assert stats["hits"] == stats["refusals"] == stats["cache_failures"] == 0, (name, stats)
    return times


def _by_workers(store: Any, keys: list[str]) -> Work:
    async def work() -> int:
        rest = iter(keys)

        async def worker() -> None:
            for key in rest:
                await store.get(key, PROTOTYPE)

        await asyncio.gather(*[worker() for _ in range(_AT_ONCE)])
        return len(keys)

    return work
