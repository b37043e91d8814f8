"""Read a dataset in epochs, as training does, through a cache that holds a part of it: LRU beside adaptive.

    python examples/epochs.py

The source takes a few milliseconds for each sample. LRU serves little of shuffled epochs and nothing of
sequential ones; "adaptive" comes close to the share of the data that fits, after an epoch or two.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore
from zarr.testing.store import LatencyStore

from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLES, EPOCHS, WORKERS = 200, 5, 8
SIZE = 10_000


def orders(kind: str) -> Iterator[list[int]]:
    """The samples of each epoch, in their order."""
    random = np.random.default_rng(0)
    for _ in range(EPOCHS):
        order = np.arange(SAMPLES)
        yield (order if kind == "sequential" else random.permutation(order)).tolist()


async def read(store: CacheStore, order: list[int]) -> None:
    """Read an epoch, several samples at once, as the workers of a loader do."""
    left = iter(order)

    async def work() -> None:
        for sample in left:
            await store.get(f"c/{sample}", default_buffer_prototype())

    await asyncio.gather(*(work() for _ in range(WORKERS)))


async def main() -> None:
    values = MemoryStore()
    for sample in range(SAMPLES):
        data = default_buffer_prototype().buffer.from_bytes(bytes(SIZE))
        await values.set(f"c/{sample}", data)
    source = LatencyStore(values, get_latency=0.002)
    print("epochs      cache  policy    hits, and seconds, of each epoch")
    for kind in ("sequential", "shuffled"):
        for share in (0.5, 0.9):
            for eviction in ("lru", "adaptive"):
                size = int(SAMPLES * SIZE * share)
                store = CacheStore(source, max_size=size, eviction=eviction)
                results = []
                for order in orders(kind):
                    hits, begun = store.cache_stats()["hits"], time.perf_counter()
                    await read(store, order)
                    ratio = (store.cache_stats()["hits"] - hits) / SAMPLES
                    results.append(f"{ratio:.2f} {time.perf_counter() - begun:.2f} s")
                print(f"{kind:10}  {share:4.0%}   {eviction:8}", "  ".join(results))


if __name__ == "__main__":
    asyncio.run(main())
