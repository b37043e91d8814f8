"""Share one cache directory between worker processes, and count the reads that reach the source.

    python examples/workers.py
    python examples/workers.py --epochs

Each epoch starts new processes and shuffles the samples. The first epoch reads every sample from
the source once; later epochs find all of them in the directory, whichever process read them.

With ``--epochs`` the cache holds 50 % or 90 % of the samples, and the same workers read them in
their order or shuffled: what LRU serves in each epoch, and how long that takes, beside "adaptive".
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore
from zarr.testing.store import LatencyStore

from zcache import CacheStore

SAMPLES, SIZE, WORKERS, EPOCHS = 64, 12_288, 3, 3
worker: dict[str, Any] = {}
"""What a worker process keeps between samples."""


def start_worker(store: CacheStore) -> None:
    worker.update(store=store, array=zarr.open_array(store, mode="r"))


def read(sample: int) -> tuple[int, int]:
    """Return the sum of a sample, and how often it had to be read from the source."""
    misses = worker["store"].cache_stats()["misses"]
    total = int(worker["array"][sample * SIZE : (sample + 1) * SIZE].sum())
    return total, worker["store"].cache_stats()["misses"] - misses


def workers(store: CacheStore) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(WORKERS, get_context("spawn"), start_worker, (store,))


def read_epoch(pool: ProcessPoolExecutor, order: list[int], expected: int) -> int:
    """Read all samples, and return how many reads reached the source."""
    results = list(pool.map(read, order))
    if sum(total for total, _ in results) != expected:
        raise SystemExit("wrong values")
    return sum(misses for _, misses in results)


def share_a_directory(source: LocalStore, folder: Path, expected: int) -> None:
    with CacheStore(source, cache_store=LocalStore(folder), max_size="1GB") as store:
        for epoch in range(EPOCHS):
            order = random.Random(epoch).sample(range(SAMPLES), SAMPLES)
            with workers(store) as pool:
                reads = read_epoch(pool, order, expected)
            print(f"epoch {epoch + 1}: {SAMPLES} samples, {reads} reads of the source")


def compare_policies(source: LocalStore, folder: Path, expected: int) -> None:
    slow = LatencyStore(source, get_latency=0.005)
    print("epochs      cache  policy    hits, and seconds, of each epoch")
    for kind in ("sequential", "shuffled"):
        for share in (0.5, 0.9):
            for eviction in ("lru", "adaptive"):
                size = int(SAMPLES * SIZE * share) + 3 * 4096  # Metadata and folders.
                cache = LocalStore(folder / f"{kind}-{share}-{eviction}")
                results = []
                with (
                    CacheStore(slow, cache_store=cache, max_size=size, eviction=eviction) as store,
                    workers(store) as pool,
                ):
                    for epoch in range(2 * EPOCHS):
                        order = list(range(SAMPLES))
                        if kind == "shuffled":
                            random.Random(epoch).shuffle(order)
                        begun = time.perf_counter()
                        hits = 1 - read_epoch(pool, order, expected) / SAMPLES
                        results.append(f"{hits:.2f} {time.perf_counter() - begun:.2f} s")
                print(f"{kind:10}  {share:4.0%}   {eviction:8}", "  ".join(results), flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="zcache-workers-") as folder:
        source = LocalStore(Path(folder, "samples"))
        values = np.random.default_rng(0).integers(0, 256, SAMPLES * SIZE, "u1")
        zarr.create_array(source, data=values, chunks=(SIZE,), compressors=None)
        show = compare_policies if "--epochs" in sys.argv[1:] else share_a_directory
        show(source, Path(folder, "cache"), int(values.sum()))


if __name__ == "__main__":
    main()
