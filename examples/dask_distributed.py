"""Compute on a dask cluster with workers that share one cache directory.

    python examples/dask_distributed.py /nfs/weather.zarr temperature /scratch/weather-cache

The store travels to the workers in the task graph, as a pickle. Each worker process opens the same
directory: what one has read, the others find there. In a cluster of several machines, each machine
has a directory of its own under this path.
"""

from __future__ import annotations

import sys
import time

import dask.array as da
import zarr
from dask.distributed import Client, LocalCluster
from zarr.storage import LocalStore

from zcache import CacheStore


def main(source: str, name: str, directory: str) -> None:
    store = CacheStore(
        LocalStore(source, read_only=True), cache_store=LocalStore(directory), max_size="20GB"
    )
    cluster = LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None)
    with store, cluster, Client(cluster):
        array = da.from_zarr(zarr.open_array(store, path=name, mode="r"))
        for number in (1, 2):
            start = time.perf_counter()
            mean = array.mean().compute()
            print(f"pass {number}: mean {mean:.4f}, {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
