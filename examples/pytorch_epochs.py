"""Show what a cache serves of the epochs of a PyTorch-style loader: LRU beside "adaptive".

    python examples/pytorch_epochs.py

The epochs are sequential and shuffled, and the cache holds 50 % or 90 % of the samples. PyTorch is used where it is
installed.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from _epochs import EPOCHS, WORKERS, compare_policies, context, make_samples
from pytorch_loader import DataLoader, Samples

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from zcache import CacheStore


class CountedSamples(Samples):
    """The samples, each with whether it came from the source."""

    def __init__(self, store: CacheStore) -> None:
        super().__init__(store)
        self.store = store

    def __getitem__(self, index: int) -> tuple[np.ndarray, bool]:
        misses = self.store.cache_stats()["misses"]
        return super().__getitem__(index), self.store.cache_stats()["misses"] > misses


def epochs_of(store: CacheStore, kind: str, *, expected: int) -> Iterator[int]:
    # Not all systems tell those that this process may use.
    may_use = getattr(os, "sched_getaffinity", None)
    processors = len(may_use(0)) if may_use else os.cpu_count() or 1
    loader = DataLoader(
        CountedSamples(store),
        batch_size=4,
        shuffle=kind == "shuffled",
        # PyTorch warns of more than there are processors.
        num_workers=min(WORKERS, processors),
        multiprocessing_context=context(),
        persistent_workers=True,
    )
    for _ in range(EPOCHS):
        results = [(int(batch.sum()), int(missed.sum())) for batch, missed in loader]
        if sum(total for total, _ in results) != expected:
            raise SystemExit("wrong values")
        yield sum(missed for _, missed in results)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="zcache-loader-") as folder:
        expected = make_samples(str(Path(folder, "samples")))
        compare_policies(folder, partial(epochs_of, expected=expected))


if __name__ == "__main__":
    main()
