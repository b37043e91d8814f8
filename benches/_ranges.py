"""One key with very many cached ranges: a shard of so many inner chunks."""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING, Any

from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from _measure import Row, settle_memory
from _setup import PROTOTYPE, zarr_store, zcache_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _setup import Scale

_LENGTH = 16
_STRETCH = 100
_STEPS = ("read", "invalidate", "evict")


async def growth(scale: Scale) -> list[Row]:
    """The cost of one range when its key has 1,000, 10,000 and 100,000 of them."""
    counts = [1000, 10_000, 100_000][: scale.of(3, 2)]
    costs: dict[int, dict[str, dict[str, float]]] = {}
    for count in counts:
        costs[count] = {
            "zcache": await _costs(zcache_store, count),
            "zarr": await _costs(zarr_store, count),
        }
    rows = []
    for step in _STEPS:
        for count in counts:
            mine, theirs = (costs[count][kind][step] for kind in ("zcache", "zarr"))
            first = costs[counts[0]]
            rows.append(
                Row(
                    f"{step} one of {count:,} ranges of a key",
                    zcache=mine,
                    zarr=theirs,
                    bare=first["zcache"][step],
                    ratio=mine / first["zcache"][step],
                    zarr_ratio=theirs / first["zarr"][step],
                    # Linear in all, not quadratic: between 1,000 and 100,000 only caches fill up.
                    aim=3.0,
                )
            )
    rows[0].note = "bare: zcache with 1,000 ranges; the ratios are to the same store with 1,000"
    return rows


async def _costs(make: Any, count: int) -> dict[str, float]:
    """Seconds for one range of `count`, by step; the best of a few where it can be repeated."""
    size = count * _LENGTH
    source = MemoryStore({"shard": cpu.Buffer.from_bytes(bytes(size))})
    requests = [RangeByteRequest(at, at + _LENGTH) for at in range(0, size, _LENGTH)]
    # Across the borders of the others, so that none of them lies inside one that is cached.
    shifted = [
        RangeByteRequest(at, at + _LENGTH) for at in range(_LENGTH // 2, size - _LENGTH, _LENGTH)
    ]
    for some in (requests, shifted):
        random.Random(count).shuffle(some)
    store = make(source, max_size=size)
    settle_memory()
    await _read(store, requests)
    assert store.cache_info()["current_size"] == size
    # The first hit of each compares its checksum.
    await _read(store, requests)
    repeat = max(2, 20_000 // count)
    before = store.cache_stats()
    read = min([await _read(store, requests) for _ in range(repeat)])
    between = store.cache_stats()
    assert between["hits"] - before["hits"] == repeat * count, (before, between)
    # Each of these finds the cache full of others.
    evict = await _read(store, shifted)
    after = store.cache_stats()
    assert after["evictions"] - between["evictions"] == len(shifted), (between, after)
    invalidate = await _invalidate(store, count, requests)
    return {"read": read, "evict": evict, "invalidate": invalidate}


async def _read(store: Any, requests: Sequence[RangeByteRequest]) -> float:
    """Seconds for one request: the median of short stretches, which no other process spoils."""
    seconds = []
    for at in range(0, len(requests), _STRETCH):
        some = requests[at : at + _STRETCH]
        start = time.perf_counter()
        for request in some:
            await store.get("shard", PROTOTYPE, request)
        seconds.append((time.perf_counter() - start) / len(some))
    return statistics.median(seconds)


async def _invalidate(store: Any, count: int, requests: Sequence[RangeByteRequest]) -> float:
    """A write of the key, by cached range."""
    store.cache_set_data = False
    value = cpu.Buffer.from_bytes(b"x" * (count * _LENGTH))
    best = float("inf")
    for _ in range(max(1, 5_000 // count)):
        await _read(store, requests)
        start = time.perf_counter()
        await store.set("shard", value)
        best = min(best, (time.perf_counter() - start) / count)
        assert store.cache_info()["current_size"] == 0
    return best
