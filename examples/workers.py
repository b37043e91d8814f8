"""Share one cache directory between worker processes, and count the reads that reach the source.

    python examples/workers.py

Each epoch starts new processes and shuffles the samples. The first epoch reads every sample from
the source once; later epochs find all of them in the directory, whichever process read them.
"""

from __future__ import annotations

import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from zcache import CacheStore

SAMPLES, WORKERS, EPOCHS = 64, 3, 3
worker: dict[str, Any] = {}
"""What a worker process keeps between samples."""


def start_worker(store: CacheStore) -> None:
    worker.update(store=store, array=zarr.open_array(store, mode="r"))


def read(sample: int) -> tuple[int, int]:
    """Return the sum of a sample, and how often it had to be read from the source."""
    misses = worker["store"].cache_stats()["misses"]
    total = int(worker["array"][sample].sum())
    return total, worker["store"].cache_stats()["misses"] - misses


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="zcache-workers-") as folder:
        source = LocalStore(Path(folder, "samples"))
        values = np.random.default_rng(0).integers(0, 256, (SAMPLES, 10_000), "u1")
        zarr.create_array(source, data=values, chunks=(1, 10_000))
        cache = LocalStore(Path(folder, "cache"))
        with CacheStore(source, cache_store=cache, max_size="1GB") as store:
            for epoch in range(EPOCHS):
                order = random.Random(epoch).sample(range(SAMPLES), SAMPLES)
                spawn = get_context("spawn")
                with ProcessPoolExecutor(WORKERS, spawn, start_worker, (store,)) as pool:
                    results = list(pool.map(read, order))
                if sum(total for total, _ in results) != values.sum():
                    raise SystemExit(f"epoch {epoch + 1}: wrong values")
                reads = sum(misses for _, misses in results)
                print(f"epoch {epoch + 1}: {SAMPLES} samples, {reads} reads of the source")


if __name__ == "__main__":
    main()
