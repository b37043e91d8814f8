"""Load samples in worker processes, as PyTorch does, through one cache directory.

    python examples/pytorch_loader.py
    python examples/pytorch_loader.py /nfs/samples.zarr /scratch/samples-cache

Without arguments it generates samples, and prints for sequential and shuffled epochs, with a cache for 50 % and 90 % of
them, what LRU serves of each and how long that takes, beside "adaptive". With a Zarr array and a directory for the
cache it reads that array once.

PyTorch is used where it is installed; else a small stand-in for its ``DataLoader``, which has the same arguments.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from _epochs import EPOCHS, WORKERS, compare_policies, context, make_samples
from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import Iterator


class Samples:
    """A map-style dataset. It is pickled with its store, so that all workers share the cache."""

    def __init__(self, store: CacheStore) -> None:
        self.store = store
        self.array = zarr.open_array(store, mode="r")

    def __len__(self) -> int:
        return self.array.shape[0]

    def __getitem__(self, index: int) -> tuple[np.ndarray, bool]:
        """A sample, and whether it came from the source."""
        misses = self.store.cache_stats()["misses"]
        return self.array[index], self.store.cache_stats()["misses"] > misses


try:
    from torch.utils.data import DataLoader
except ImportError:
    _dataset: dict[str, Samples] = {}

    def _start(dataset: Samples) -> None:
        _dataset["here"] = dataset

    def _load(indices: list[int]) -> tuple[np.ndarray, ...]:
        items = [_dataset["here"][index] for index in indices]
        return tuple(np.stack(part) for part in zip(*items, strict=True))

    class DataLoader:  # type: ignore[no-redef]
        """Stands in for that of PyTorch: batches of a dataset, by workers that live as long as it does."""

        def __init__(
            self,
            dataset: Samples,
            batch_size: int = 1,
            *,
            shuffle: bool = False,
            num_workers: int = 1,
            multiprocessing_context: Any = None,
            persistent_workers: bool = True,
        ) -> None:
            assert persistent_workers
            self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
            self.workers = ProcessPoolExecutor(
                num_workers, multiprocessing_context, _start, (dataset,)
            )

        def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
            indices = list(range(len(self.dataset)))
            if self.shuffle:
                random.shuffle(indices)
            n = self.batch_size
            batches = [indices[start : start + n] for start in range(0, len(indices), n)]
            return self.workers.map(_load, batches)


def loader_of(store: CacheStore, *, shuffle: bool = False) -> DataLoader:
    # Not all systems tell those that this process may use.
    may_use = getattr(os, "sched_getaffinity", None)
    processors = len(may_use(0)) if may_use else os.cpu_count() or 1
    return DataLoader(
        Samples(store),
        batch_size=4,
        shuffle=shuffle,
        # PyTorch warns of more than there are processors.
        num_workers=min(WORKERS, processors),
        multiprocessing_context=context(),
        persistent_workers=True,
    )


def epochs_of(store: CacheStore, kind: str, *, expected: int) -> Iterator[int]:
    loader = loader_of(store, shuffle=kind == "shuffled")
    for _ in range(EPOCHS):
        results = [(int(batch.sum()), int(missed.sum())) for batch, missed in loader]
        if sum(total for total, _ in results) != expected:
            raise SystemExit("wrong values")
        yield sum(missed for _, missed in results)


def main() -> None:
    if arguments := sys.argv[1:]:
        source, directory = arguments
        store = CacheStore(
            LocalStore(source, read_only=True), cache_store=LocalStore(directory), max_size="20GB"
        )
        print("sum of all values:", sum(float(batch.sum()) for batch, _ in loader_of(store)))
        return
    with tempfile.TemporaryDirectory(prefix="zcache-loader-") as folder:
        expected = make_samples(str(Path(folder, "samples")))
        compare_policies(folder, partial(epochs_of, expected=expected))


if __name__ == "__main__":
    main()
