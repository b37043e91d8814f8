"""Load samples in worker processes, as PyTorch does, through one cache directory.

python examples/pytorch_loader.py /nfs/samples.zarr /scratch/samples-cache
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import zarr
from zarr.storage import LocalStore

from zcache import CacheStore


class Samples:
    """A map-style dataset. It is pickled with its store, so that all workers share the cache."""

    def __init__(self, source: str, directory: str) -> None:
        cache = LocalStore(directory)
        store = CacheStore(LocalStore(source, read_only=True), cache_store=cache, max_size="20GB")
        self.array = zarr.open_array(store, mode="r")

    def __len__(self) -> int:
        return self.array.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        return self.array[index]


def load(samples: Samples) -> Iterator:
    spawn = get_context("spawn")
    try:
        from torch.utils.data import DataLoader
    except ImportError:  # The same with the standard library.
        with ProcessPoolExecutor(2, spawn) as pool:
            yield from pool.map(samples.__getitem__, range(len(samples)), chunksize=8)
    else:
        yield from DataLoader(samples, 8, num_workers=2, multiprocessing_context=spawn)


if __name__ == "__main__":
    print("sum of all values:", sum(float(batch.sum()) for batch in load(Samples(*sys.argv[1:]))))
