"""Cold reads: what filling the cache adds to reading a slow source, and how fast it can be filled."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
from typing import TYPE_CHECKING, Any

from zarr.storage import MemoryStore

from _measure import Row, interleave
from _setup import (
    PROTOTYPE,
    SlowStore,
    SlowWrites,
    chunk_keys,
    drained,
    local_store,
    memory_store,
    temporary_directory,
    zarr_store,
    zcache_store,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from zarr.core.buffer import Buffer, BufferPrototype

    from _measure import Times, Work
    from _setup import Scale

_AT_ONCE = 64
_BARE = {
    "memory": "bare: reads of the source alone",
    "disk": "bare: values written by open, write and close, as the source brings them",
}


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
                note=""
                if where == "memory"
                else "to write the same values by one open, write and close each, as they come, takes "
                f"{times.ratio('files disk'):.2f} times as long as to read the source alone",
            )
        )
    return rows


async def slow_cache(scale: Scale) -> list[Row]:
    """The reader's time of a miss, where each write of the cache store takes 100 ms."""
    count = scale.of(32, 8)
    keys = chunk_keys(count * 16)
    source = SlowStore(memory_store(keys, 4096, distinct=64), 0.02)
    batches_of: dict[str, Any] = {name: iter(keys) for name in ("bare", "zcache", "zarr")}
    stores = {
        "bare": source,
        "zcache": zcache_store(source, SlowWrites(MemoryStore(), 0.1)),
        "zarr": zarr_store(source, SlowWrites(MemoryStore(), 0.1)),
    }

    def contestant(name: str) -> Work:
        async def work() -> int:
            for key in itertools.islice(batches_of[name], count):
                await stores[name].get(key, PROTOTYPE)
            return count

        return work

    times = await interleave(
        {name: contestant(name) for name in stores}, scale.of(5, 2), quiet=False
    )
    await drained(stores["zcache"])
    info = stores["zcache"].cache_info()
    assert info["cached_keys"] == stores["zcache"].cache_stats()["misses"], info
    return [
        times.row(
            "miss, source of 20 ms, one by one, each write of the cache store takes 100 ms",
            1.1,
            note="the reader's time; all values are in the cache store at the end",
        )
    ]


async def fill_rate(scale: Scale) -> list[Row]:
    """The same over a source that answers at once: the most fills a second."""
    rows = []
    for size, name in ((100, "100 B"), (4096, "4 KiB"), (65536, "64 KiB")):
        for where, count, rounds in (("memory", 2048, 9), ("disk", 256, 5)):
            keys = chunk_keys(count if not scale.quick else count // 4)
            source = SlowStore(memory_store(keys, size, distinct=64), 0.0)
            with temporary_directory(scale) as root:
                times = await _fill(
                    source, keys, root, rounds if not scale.quick else 2, where, drain=True
                )
            mine, theirs = (times.median(f"{kind} {where}") for kind in ("zcache", "zarr"))
            rows.append(
                Row(
                    f"fills a second, {name}, 64 at once, {where} cache",
                    unit="/s",
                    zcache=1 / mine if mine else None,
                    zarr=1 / theirs if theirs else None,
                    bare=1 / (times.median("bare" if where == "memory" else "files disk") or 1),
                    note=_BARE[where] if len(rows) < 2 else "",
                )
            )
    return rows


async def _fill(
    source: SlowStore,
    keys: list[str],
    root: Path,
    rounds: int,
    only: str = "",
    *,
    drain: bool = False,
) -> Times:
    numbers = itertools.count()
    makers: dict[str, Callable[[], Any]] = {
        "bare": lambda: source,
        "zcache memory": lambda: zcache_store(source),
        # A directory of its own for each round: to delete from one that is used again would slow down
        # what is written next, for ext4 looks at the inodes that were just deleted one by one.
        "zcache disk": lambda: zcache_store(source, local_store(root / f"zcache{next(numbers)}")),
        "zarr memory": lambda: zarr_store(source),
        "zarr disk": lambda: zarr_store(source, local_store(root / f"zarr{next(numbers)}")),
        # What the disk takes: the same values, each written by one open, write and close.
        "files disk": lambda: _Files(source, root / f"files{next(numbers)}"),
    }
    makers = {name: make for name, make in makers.items() if name.endswith(("bare", only))}
    stores: dict[str, Any] = {}

    async def renew(name: str) -> None:
        if name.startswith("zcache") and name in stores:
            await drained(stores[name])
            _check(stores[name], len(keys))
        stores[name] = makers[name]()

    before = {name: functools.partial(renew, name) for name in makers}
    contestants = {name: _by_workers(stores, name, keys, drain=drain) for name in makers}
    # The memory that the first round needs is not part of a fill.
    await interleave(contestants, 1, quiet=False, before=before)
    times = await interleave(contestants, rounds, quiet=False, before=before)
    for name, store in stores.items():
        if name.startswith("zcache"):
            await drained(store)
            _check(store, len(keys))
    return times


def _check(store: Any, count: int) -> None:
    """A value that was not kept costs nothing."""
    info, stats = store.cache_info(), store.cache_stats()
    assert info["cached_keys"] == count, (info, stats)
    assert stats["hits"] == stats["refusals"] == stats["cache_failures"] == 0, stats


class _Files:
    """A source whose values are written to a directory as they come, and nothing else."""

    def __init__(self, source: SlowStore, root: Path) -> None:
        self._source = source
        self._root = root

    async def get(self, key: str, prototype: BufferPrototype) -> Buffer | None:
        value = await self._source.get(key, prototype)
        assert value is not None
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.to_bytes())
        return value


def _by_workers(stores: dict[str, Any], name: str, keys: list[str], *, drain: bool) -> Work:
    async def work() -> int:
        store = stores[name]
        rest = iter(keys)

        async def worker() -> None:
            for key in rest:
                await store.get(key, PROTOTYPE)

        await asyncio.gather(*[worker() for _ in range(_AT_ONCE)])
        if drain:
            await drained(store)
        return len(keys)

    return work
