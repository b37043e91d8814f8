"""A delete of one chunk beside very many others of its array that are cached."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from _measure import Row, settle_memory
from _setup import (
    chunk_keys,
    drained,
    index_of,
    memory_store,
    read_at_once,
    temporary_directory,
    zarr_store,
    zcache_store,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from _setup import Scale

_SIZE = 100
_DELETES = 300


async def siblings(scale: Scale) -> list[Row]:
    """The cost of one delete when its array has 1,000 and 100,000 cached chunks."""
    counts = [1000, scale.of(100_000, 20_000)]
    rows = []
    for where in ("memory", "a pool"):
        costs = []
        for count in counts:
            with temporary_directory(scale) as path:
                mine = await _cost(where, path, count)
                theirs = await _cost("zarr", path, count) if where == "memory" else None
            costs.append((mine, theirs))
        (few, their_few), *_ = costs
        for count, (mine, theirs) in zip(counts, costs, strict=True):
            rows.append(
                Row(
                    f"delete one of {count:,} cached chunks, {where}",
                    zcache=mine,
                    zarr=theirs,
                    bare=few,
                    ratio=mine / few,
                    zarr_ratio=theirs / their_few if theirs and their_few else None,
                    aim=2.0,
                )
            )
    rows[0].note = "bare: zcache with 1,000 chunks; the ratios are to the same store with 1,000"
    return rows


async def _cost(where: str, path: Path, count: int) -> float:
    """Seconds for one delete: the median of some."""
    from zcache import CachePool

    keys = chunk_keys(count)
    source = memory_store(keys, _SIZE, 1)
    store: Any
    if where == "zarr":
        store = zarr_store(source)
    elif where == "memory":
        store = zcache_store(source)
    else:
        store = zcache_store(source, CachePool(path / str(count)), source_id="source")
    await read_at_once(store, keys)
    await drained(store)
    settle_memory()
    seconds = await _delete(store, keys[:_DELETES])
    if where != "zarr":
        assert len(index_of(store)) == count - _DELETES
        store.close()
    return seconds


async def _delete(store: Any, keys: Sequence[str]) -> float:
    seconds = []
    for key in keys:
        start = time.perf_counter()
        await store.delete(key)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
