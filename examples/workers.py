"""Share one cache directory between worker processes that read the same samples in epochs.

    python examples/workers.py

The cache holds 50 % or 90 % of the samples, and the source takes a few milliseconds for each. LRU serves nothing of
epochs in the same order, and little of shuffled ones; "adaptive" comes close to the share that fits, after an epoch
or two, whichever process has read a sample.
"""

from __future__ import annotations

import functools
import pickle
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import zarr

from _epochs import WORKERS, compare_policies, context, make_samples, orders

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zcache import CacheStore


@functools.cache
def opened(pickled: bytes) -> tuple[CacheStore, zarr.Array]:
    """A store as it comes to a worker: it shares index, bound and values with all others."""
    store = pickle.loads(pickled)
    return store, zarr.open_array(store, mode="r")


def read(pickled: bytes, sample: int) -> tuple[int, bool]:
    """Return the sum of a sample, and whether it came from the source."""
    store, array = opened(pickled)
    misses = store.cache_stats()["misses"]
    total = int(array[sample].sum())
    return total, store.cache_stats()["misses"] > misses


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="zcache-workers-") as folder,
        ProcessPoolExecutor(WORKERS, context()) as workers,
    ):
        expected = make_samples(str(Path(folder, "samples")))

        def epochs_of(store: CacheStore, kind: str) -> Iterator[int]:
            pickled = pickle.dumps(store)
            for order in orders(kind):
                results = list(workers.map(functools.partial(read, pickled), order))
                if sum(total for total, _ in results) != expected:
                    raise SystemExit("wrong values")
                yield sum(missed for _, missed in results)

        compare_policies(folder, epochs_of)


if __name__ == "__main__":
    main()
