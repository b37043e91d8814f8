"""Arrays that are mostly missing: what a second pass over one asks the source, and how long it takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from _measure import Row
from _setup import SlowStore, temporary_directory, zarr_store, zcache_store

if TYPE_CHECKING:
    from _setup import Scale

_LATENCY = 0.001
"""Seconds that the source takes to answer."""


def sparse(scale: Scale) -> list[Row]:
    """The second pass over an array of 100,000 chunks of which 1 % exist."""
    side = scale.of(316, 64)
    source = MemoryStore()
    array = zarr.create_array(
        source, shape=(side * 8, side * 8), chunks=(8, 8), dtype="f4", compressors=None
    )
    chance = np.random.default_rng(0)
    there = chance.choice(side**2, side**2 // 100, replace=False)
    for at in there:
        row, column = divmod(int(at), side)
        array[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 1
    expected = len(there) * 64
    seconds: dict[str, float] = {}
    reads: dict[str, int] = {}
    with temporary_directory(scale) as root:
        stores: dict[str, Any] = {
            "bare": lambda slow: slow,
            "zcache": zcache_store,
            "disk": lambda slow: zcache_store(slow, zarr.storage.LocalStore(root / "cache")),
            "zarr": zarr_store,
        }
        for name, make in stores.items():
            slow = SlowStore(source, _LATENCY)
            opened = zarr.open_array(make(slow), mode="r+")
            first = opened[:]
            if hasattr(opened.store, "drain_sync"):
                assert opened.store.drain_sync()
            slow.reads = 0
            start = time.perf_counter()
            second = opened[:]
            seconds[name], reads[name] = time.perf_counter() - start, slow.reads
            assert first.sum() == second.sum() == expected
    chunks = f"{side**2:,} chunks of which 1 % exist"
    note = f"the source takes {_LATENCY * 1000:.0f} ms; one pass each"
    return [
        row
        for where, name in (("memory", "zcache"), ("disk", "disk"))
        for row in (
            Row(
                f"second pass over {chunks}, {where} cache: source requests",
                unit="",
                zcache=reads[name],
                zarr=reads["zarr"],
                bare=reads["bare"],
                aim=0,
                note="",
            ),
            Row(
                f"second pass over {chunks}, {where} cache",
                zcache=seconds[name],
                zarr=seconds["zarr"],
                bare=seconds["bare"],
                ratio=seconds[name] / seconds["bare"],
                zarr_ratio=seconds["zarr"] / seconds["bare"],
                note=note,
            ),
        )
    ]
