"""Ten million keys: memory, pauses of growth, and a large delete beside readers.

python benches/_capacity.py "adaptive, directory"    # ten million in one of FULL, under one policy; minutes
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from _measure import Row, percentile, watch
from _setup import index_of, zcache_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _setup import Scale

_HASH = "0123456789abcdef" * 4

# By name: the key of number n. Ten million of each are different.
KEYS: dict[str, Callable[[int], str]] = {
    "era5": lambda n: f"era5/2m_temperature/c/{n // 5000}/{n // 100 % 50}/{n % 100}",
    "resolved": lambda n: f"resolved/s0/c/{n // 100_000}/{n // 200 % 500}/{n % 200}",
    "long directory": lambda n: (
        "cmip6/ScenarioMIP/NCAR/CESM2-WACCM/ssp585/r1i1p1f1/day/tas/gn/v20200702"
        f"/c/{n // 5000}/{n // 100 % 50}/{n % 100}"
    ),
    "long name": lambda n: f"blobs/{n:08x}{_HASH[8:]}",
}
_STEP = 64
_AIM = 64.0
_POOL_AIM = 72.0
_SHORT = 31  # Characters of the keys that the aim was set for.


def memory(scale: Scale) -> list[Row]:
    """Bytes for each key, by the growth of a fresh process, and the longest pause on the way there."""
    full = scale.of(10_000_000, 200_000)
    pauses: list[float] = []
    rows = []
    for name in KEYS:
        count = full if name in ("era5", "resolved") else full // 8
        mine = _child(name, "zcache", count)
        # A quarter of the keys: the tables are then as full as with all of them.
        theirs = _child(name, "zarr", count // 4) if name == "era5" else None
        length = mine["length"]
        rows.append(
            Row(
                f"index, {count:,} keys like {KEYS[name](count // 2)[:36]}",
                unit="B",
                zcache=mine["bytes"],
                zarr=theirs["bytes"] if theirs else None,
                bare=length,
                aim=_AIM + max(0.0, length - _SHORT),
            )
        )
        if count == full:
            pauses.append(mine["pause"])
    rows[
        0
    ].note = "by key, text included, from RSS; bare: the key's own length; zarr: at a quarter of the keys"
    rows.append(
        Row(
            f"longest pause while growing to {full:,} keys",
            zcache=max(pauses),
            aim=0.05,
            note=f"of a call that enters {_STEP} keys",
        )
    )
    return rows


def pool_memory(scale: Scale) -> list[Row]:
    """Bytes for each key of a pool of three sources: of memory, and of the files of its index."""
    count = scale.of(10_000_000, 200_000)
    mine = _child("era5", "pool", count)
    what = f"pool of 3 sources, {count:,} keys like {KEYS['era5'](count // 2)[:36]}"
    note = "by key, text included, from RSS; bare: the key's own length"
    return [
        Row(what, unit="B", zcache=mine["bytes"], bare=mine["length"], aim=_POOL_AIM, note=note),
        Row(
            f"{what}: files of the index",
            unit="B",
            zcache=mine["files"],
            note="in blocks, with what they have grown ahead by",
        ),
    ]


FULL = ("memory", "directory", "pool of 3 sources")


def adaptive_memory(scale: Scale) -> list[Row]:
    """Bytes for each key under "adaptive", in memory, in a directory and in a pool, all of them full."""
    count = scale.of(1_000_000, 200_000)
    note = "by key, text included, from RSS, after a twentieth as many evictions; bare: the same under LRU"
    rows = []
    for kind in FULL:
        mine, lru = (
            _child("era5", f"{eviction}, {kind}", count) for eviction in ("adaptive", "lru")
        )
        rows.append(
            Row(
                f"adaptive, {kind}, {count:,} keys",
                unit="B",
                zcache=mine["bytes"],
                bare=lru["bytes"],
                aim=_POOL_AIM,
                note=note,
            )
        )
    return rows


def _child(name: str, kind: str, count: int) -> dict[str, float]:
    code = f"import _capacity; _capacity.measure({name!r}, {kind!r}, {count})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(name: str, kind: str, count: int) -> None:
    """Grow an index in this process, and print what that took."""
    with tempfile.TemporaryDirectory(dir="/var/tmp" if Path("/var/tmp").is_dir() else None) as path:
        _measure(name, kind, count, path)


def _measure(name: str, kind: str, count: int, path: str) -> None:
    eviction, _, place = kind.partition(", ")
    held, enter = (
        _enter_pool(path)
        if kind == "pool"
        else _enter_zcache()
        if kind == "zcache"
        else _enter_zarr()
        if kind == "zarr"
        else _enter_full(path, eviction, place, count)
    )
    key = KEYS[name]
    # Chunks are read in the order of some user, not in theirs.
    numbers = _permuted(count)
    length = sum(len(key(n)) for n in range(0, count, 1000)) / len(range(0, count, 1000))
    before = _resident()
    pause = 0.0
    batch = []
    for n in numbers:
        batch.append(key(n))
        if len(batch) == _STEP:
            # Time of the processor: that of the clock is other processes' as well, and the longer a pause
            # is, the likelier they come in between.
            start = time.thread_time()
            enter(batch)
            pause = max(pause, time.thread_time() - start)
            batch = []
    if batch:
        enter(batch)
    if place:
        for n in range(count, count + count // 20):
            enter([key(n)])
    after = _resident()
    if len(held) != count and not place:
        raise RuntimeError(f"{len(held)} of {count} keys are held")
    files = sum(file.stat().st_blocks * 512 for file in Path(path).iterdir()) / count
    found = {
        "bytes": (after - before) / count,
        "files": files,
        "pause": pause,
        "length": length,
    }
    print(json.dumps(found))


def _enter_zcache() -> tuple[Any, Callable[[list[str]], object]]:
    from zcache._core import Index

    index = Index(flat_namespace=True)
    return index, lambda keys: index.adopt([(1, 8, key) for key in keys])


def _enter_pool(path: str) -> tuple[Any, Callable[[list[str]], object]]:
    """The steps of fills into a pool, by three sources in turn; only the values are not written."""
    from zcache._core import Index

    index, _ = Index.open(path, unit=4096, holes=True, flat_namespace=True)
    index.finish_rebuild()
    sources = itertools.cycle([index.within(f"{number:032x}", True) for number in range(3)])

    def enter(keys: list[str]) -> None:
        for key, source in zip(keys, sources, strict=False):
            ticket = source.join(key, None, object(), 1.0, False)
            granted = source.reserve(key, None, 100, ticket, 1.0)
            source.commit(granted.reservation, 1, 1.0)

    return index, enter


def _enter_full(
    path: str, eviction: str, place: str, count: int
) -> tuple[Any, Callable[[list[str]], object]]:
    """The steps of fills into a cache with room for so many; only the values are not written."""
    from zcache._core import Index, NeedsEviction

    options = {"flat_namespace": True, "max_size": 100 * count, "eviction": eviction}
    if place == "memory":
        index = Index(**options)
    else:
        holes = True if place.startswith("pool") else None
        index, _ = Index.open(path, holes=holes, **options)
        index.finish_rebuild()
    sources = itertools.cycle([index])
    if place.startswith("pool"):
        sources = itertools.cycle([index.within(f"{number:032x}", True) for number in range(3)])

    def enter(keys: list[str]) -> None:
        for key, source in zip(keys, sources, strict=False):
            ticket = source.join(key, None, object(), 1.0, False)
            answer = source.reserve(key, None, 100, ticket, 1.0)
            while isinstance(answer, NeedsEviction):
                gone = [cell for cell, _ in answer.victims]
                answer = source.advance(answer.reservation, gone, [], 1.0)
            source.commit(answer.reservation, 1, 1.0)

    return index, enter


def _enter_zarr() -> tuple[Any, Callable[[list[str]], object]]:
    from _index import _track
    from _setup import zarr_store

    store = zarr_store(MemoryStore())
    return store._state.cache_order, lambda keys: _track(store, keys)


def _permuted(count: int) -> Iterator[int]:
    """All numbers below `count` in an order that looks random, without a list of them."""
    step = int(count * 0.6180339887) | 1
    while any(step % factor == 0 and count % factor == 0 for factor in (3, 5, 7)):
        step += 2
    at = 0
    for _ in range(count):
        yield at
        at = (at + step) % count


def _resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def sweep(scale: Scale) -> list[Row]:
    """`delete_dir` of an array of 1,000,000 chunks among 10,000,000 keys, beside a thread that reads."""
    arrays, chunks = 10, scale.of(1_000_000, 50_000)
    value = cpu.Buffer.from_bytes(b"12345678")
    doomed = "era5/array0"
    keys = {n: f"c/{n // 5000}/{n // 100 % 50}/{n % 100}" for n in range(chunks)}
    held = {f"{doomed}/{key}": value for key in keys.values()}
    store = zcache_store(MemoryStore(), MemoryStore(held), adopt=True)
    index = index_of(store)
    # The bytes of the others never matter here, and would take ten times as much memory.
    for array in range(1, arrays):
        for start in range(0, chunks, 10_000):
            index.adopt(
                [
                    (1, 8, f"era5/array{array}/{keys[n]}")
                    for n in range(start, min(start + 10_000, chunks))
                ]
            )
    assert len(index) == arrays * chunks
    other = [
        f"era5/array{1 + n % 9}/{keys[n % chunks]}" for n in random.sample(range(chunks), 20_000)
    ]
    idle, busy, lags = [], [], []
    await asyncio.to_thread(_look, index, other, idle, None)
    stop = threading.Event()
    reader = threading.Thread(target=_look, args=(index, other, busy, stop))
    reader.start()
    watcher = asyncio.ensure_future(watch(lags, 0.001))
    await asyncio.sleep(0.05)
    before = len(busy)
    start = time.perf_counter()
    await store.delete_dir(doomed)
    elapsed = time.perf_counter() - start
    during = busy[before:]
    # What has held it up to the very end it can tell only now.
    await asyncio.sleep(0.01)
    stop.set()
    reader.join()
    watcher.cancel()
    assert len(index) == (arrays - 1) * chunks
    assert not held
    what = f"delete_dir of {chunks:,} chunks among {arrays * chunks:,} keys"
    return [
        Row(what, zcache=elapsed, note="zarr's class leaves deleted values in the cache"),
        Row(f"{what}: event loop's longest lag", zcache=max(lags, default=elapsed)),
        *(
            Row(
                f"{what}: lookup in another thread, {part:.2%}",
                zcache=percentile(during, part) if during else None,
                bare=percentile(idle, part),
                note=f"{len(during):,} lookups meanwhile; bare: with nothing else to do"
                * (part == 0.5),
            )
            for part in (0.5, 0.99, 0.9999)
        ),
    ]


def _look(index: Any, keys: list[str], times: list[float], stop: threading.Event | None) -> None:
    while True:
        for key in keys:
            start = time.perf_counter()
            index.lookup(key, None, 1.0)
            times.append(time.perf_counter() - start)
            if stop is not None and stop.is_set():
                return
        if stop is None:
            return


if __name__ == "__main__":
    measure("era5", sys.argv[1], 10_000_000)
