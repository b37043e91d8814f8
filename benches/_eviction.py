"""Hits under other policies than LRU, and with a plan."""

from __future__ import annotations

import random
from itertools import chain, cycle, repeat
from typing import TYPE_CHECKING

from _measure import interleave
from _setup import batches, chunk_keys, drained, memory_store, only_hits, read_all, zcache_store

if TYPE_CHECKING:
    from _measure import Row, Work
    from _setup import Scale

_PASSES = 40  # Of the plan: more than are measured.


async def hits(scale: Scale) -> list[Row]:
    """Hits of a full cache in memory, one by one, and between misses; "bare" is the same under LRU and without a plan."""
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
    counts = (64, 1000, scale.of(20_000, 5000))
    return [*rows, *[await _between_misses(count, scale.of(400, 40)) for count in counts]]


async def _between_misses(count: int, rounds: int) -> Row:
    """Reads of a full cache, where each 16th one is a miss that pushes a value out."""
    keys = chunk_keys(2 * count)
    source = memory_store(keys, 100)
    own = keys[:count]
    random.Random(5).shuffle(own)
    contestants = {}
    for name, eviction in (("bare", "lru"), ("zcache", "adaptive")):
        store = zcache_store(source, max_size=100 * (count + count // 8), eviction=eviction)
        contestants[name] = _read(store, _reads(own, keys[count:]))
        for _ in range(max(16, 6 * count // 1000)):
            await contestants[name]()
    times = await interleave(contestants, rounds)
    note = "bare: the same under LRU"
    return times.row(f"15 hits and a miss under adaptive, {count:,} keys", None, note)


def _reads(own: list[str], others: list[str]) -> list[str]:
    """A while of it, so long that no other key comes twice before all have come."""
    hit, missed = cycle(own), cycle(others)
    return [next(hit) if n % 16 else next(missed) for n in range(16 * max(1000, len(others)))]


def _read(store: object, keys: list[str]) -> Work:
    slices = batches(keys, 1000)

    async def work() -> int:
        return await read_all(store, next(slices))

    return work
