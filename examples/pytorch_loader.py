"""Load samples in worker processes, as PyTorch does, through one cache directory.

python examples/pytorch_loader.py /nfs/samples.zarr /scratch/samples-cache
"""

import sys

import zarr
from zarr.storage import LocalStore

from zcache import CacheStore

try:
    from torch.utils.data import DataLoader
except ImportError:
    from _loader import DataLoader


class Samples:
    """A map-style dataset. It is pickled with its store, so that all workers share the cache."""

    def __init__(self, store: CacheStore) -> None:
        self.array = zarr.open_array(store, mode="r")

    def __len__(self) -> int:
        return self.array.shape[0]

    def __getitem__(self, index: int) -> object:
        return self.array[index]


def main(source: str, directory: str) -> None:
    store = CacheStore(LocalStore(source), cache_store=LocalStore(directory), max_size="20GB")
    workers = {"num_workers": 2, "multiprocessing_context": "forkserver"}
    loader = DataLoader(Samples(store), batch_size=4, shuffle=True, **workers)
    print("sum of all values:", sum(float(batch.sum()) for batch in loader))


if __name__ == "__main__":
    main(*sys.argv[1:])
