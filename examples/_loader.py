"""What stands in for PyTorch's ``DataLoader`` where that is not installed."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.context import BaseContext

_dataset: dict[str, Any] = {}


def _start(dataset: Any) -> None:
    _dataset["here"] = dataset


def _load(indices: list[int]) -> Any:
    items = [_dataset["here"][index] for index in indices]
    if isinstance(items[0], tuple):
        return tuple(np.stack(part) for part in zip(*items, strict=True))
    return np.stack(items)


class DataLoader:
    """Batches of a dataset, by workers that live as long as it does, whether persistent or not."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        num_workers: int = 1,
        multiprocessing_context: str | BaseContext = "spawn",
        persistent_workers: bool = False,
    ) -> None:
        if isinstance(multiprocessing_context, str):
            multiprocessing_context = get_context(multiprocessing_context)
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.workers = ProcessPoolExecutor(num_workers, multiprocessing_context, _start, (dataset,))

    def __iter__(self) -> Iterator[Any]:
        indices = list(range(len(self.dataset)))
        if self.shuffle:
            random.shuffle(indices)
        n = self.batch_size
        batches = [indices[start : start + n] for start in range(0, len(indices), n)]
        return self.workers.map(_load, batches)
