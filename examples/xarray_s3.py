"""Read a dataset on S3 with xarray, and keep what was read on the local disk.

    python examples/xarray_s3.py s3://bucket/weather.zarr /scratch/weather-cache

Credentials, region and endpoint (`AWS_ENDPOINT_URL`) come from the environment, as for any S3
client. Run it twice: the second run reads from the disk.
"""

from __future__ import annotations

import sys
import time

import xarray as xr

import zcache


def main(url: str, directory: str) -> None:
    # Leaving the block waits until everything that was read is in the cache directory.
    with zcache.open(url, cache=directory, max_size="20GB", read_only=True) as store:
        start = time.perf_counter()
        with xr.open_zarr(store) as dataset:
            for name, mean in dataset.mean().compute().items():
                print(f"{name}: mean {mean.item():.4f}")
        stats = store.cache_stats()
        print(
            f"{time.perf_counter() - start:.2f} s, {stats['hits']} hits, {stats['misses']} misses"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
