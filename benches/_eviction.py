"""Hits under other policies than LRU, and with a plan."""

from __future__ import annotations

import random
from itertools import chain, repeat
from typing import TYPE_CHECKING

from _measure import interleave
from _setup import batches, chunk_keys, drained, memory_store, only_hits, read_all, zcache_store

if TYPE_CHECKING:
    from _measure import Row, Work
    from _setup import Scale

_PASSES = 40  # Of the plan: more than are measured.


async def hits(scale: Scale) -> list[Row]:
    """Hits of a full cache in memory, one by one; "bare" is the same under LRU and without a plan."""
    rows = []
    for count in (1000, scale.of(20_000, 5000)):
        keys = chunk_keys(count)
        stores = {
            name: zcache_store(memory_store(keys, 100), max_size=100 * count, eviction=eviction)
            for name, eviction in (("lru", "lru"), ("adaptive", "adaptive"), ("plan", "lru"))
        }
        for store in stores.values():
            await read_all(store, keys)
            await drained(store)
        random.Random(5).shuffle(keys)
        stores["plan"].will_read(chain.from_iterable(repeat(keys, _PASSES)))
        for name, work, aim in (
            ("adaptive", "hit under adaptive", 1.1),
            ("plan", "hit with a plan", None),
        ):
            contestants = {"bare": _read(stores["lru"], keys), "zcache": _read(stores[name], keys)}
            with only_hits(stores[name]):
                times = await interleave(contestants, scale.of(20 * count // 1000, count // 1000))
            note = (
                "bare: the same under LRU" if name == "adaptive" else "bare: the same without one"
            )
            rows.append(times.row(f"{work}, {count:,} keys", aim, note))
    return rows


def _read(store: object, keys: list[str]) -> Work:
    slices = batches(keys, 1000)

    async def work() -> int:
        return await read_all(store, next(slices))

    return work
