"""What the examples with workers share: samples, the order of each epoch, and a table of what each policy serves."""

from __future__ import annotations

import asyncio
import random
import time
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zarr
from zarr.storage import LocalStore, WrapperStore

from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.context import BaseContext

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

SAMPLES, SIZE, WORKERS, EPOCHS = 64, 12_288, 3, 6
SECONDS = 0.005
"""What the source takes for a sample."""
BLOCK = 4096


class SlowStore(WrapperStore[LocalStore]):
    """A store that is far away."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        await asyncio.sleep(SECONDS)
        return await self._store.get(key, prototype, byte_range)


def context() -> BaseContext:
    """How workers start: from a process that has imported what they need, so quickly, and with nothing of this one."""
    found = get_context("forkserver")
    found.set_forkserver_preload(["zarr", "zcache"])
    return found


def make_samples(folder: str) -> int:
    """Write the samples, each a chunk of its own; return the sum of all values."""
    values = np.random.default_rng(0).integers(0, 256, (SAMPLES, SIZE), "u1")
    zarr.create_array(LocalStore(folder), data=values, chunks=(1, SIZE), compressors=None)
    return int(values.sum())


def compare_policies(folder: str, epochs_of: Callable[[CacheStore, str], Iterator[int]]) -> None:
    """Print the share of hits and the seconds of each epoch, LRU beside "adaptive".

    ``epochs_of(store, kind)`` reads one epoch after the other, "sequential" or "shuffled", and yields how many samples
    came from the source.
    """
    samples = Path(folder, "samples")
    source = SlowStore(LocalStore(samples, read_only=True))
    print("epochs      cache  policy    hits, and seconds, of each epoch")
    for kind in ("sequential", "shuffled"):
        for share in (0.5, 0.9):
            for eviction in ("lru", "adaptive"):
                cache = LocalStore(Path(folder, f"{kind}-{share}-{eviction}"))
                # Each sample has a folder; and there are those of the cache, and the metadata.
                size = int(SAMPLES * (SIZE + BLOCK) * share) + 4 * BLOCK
                results = []
                # A store of one's own class has no name that other processes know, so it gets one.
                with CacheStore(
                    source,
                    cache_store=cache,
                    max_size=size,
                    eviction=eviction,
                    source_id=str(samples),
                ) as store:
                    begun = time.perf_counter()
                    for misses in epochs_of(store, kind):
                        seconds, begun = time.perf_counter() - begun, time.perf_counter()
                        results.append(f"{1 - misses / SAMPLES:.2f} {seconds:.2f} s")
                print(f"{kind:10}  {share:4.0%}   {eviction:8}", "  ".join(results), flush=True)


def orders(kind: str) -> Iterator[list[int]]:
    """The samples of each epoch, in their order."""
    for epoch in range(EPOCHS):
        order = list(range(SAMPLES))
        if kind == "shuffled":
            random.Random(epoch).shuffle(order)
        yield order
