"""zcache: the cache between a slow Zarr store and the people who read it.

>>> import zarr
>>> from zcache import CacheStore
>>> source = zarr.storage.MemoryStore()  # or S3, GCS, HTTP, NFS
>>> store = CacheStore(source, max_size="2 GiB")

`CacheStore` takes the place of `zarr.experimental.cache_store.CacheStore` without a change at the
call site.
"""

from zcache._core import __version__
from zcache._decoded.pipeline import DecodedCodecPipeline
from zcache._open import open  # noqa: A004 - called `zcache.open`, like `zarr.open`
from zcache.decoded import with_decoded_cache
from zcache.exceptions import (
    CacheOwnershipError,
    CacheUnreachableError,
    IndexLockTimeout,
    MissingClientError,
    NoSuchSourceError,
    OfflineError,
    OptionTypeError,
    OptionValueError,
    SyncNotSupportedError,
    ZcacheError,
)
from zcache.pool import CachePool, PoolSourceInfo
from zcache.store import CacheStore

__all__ = [
    "CacheOwnershipError",
    "CachePool",
    "CacheStore",
    "CacheUnreachableError",
    "DecodedCodecPipeline",
    "IndexLockTimeout",
    "MissingClientError",
    "NoSuchSourceError",
    "OfflineError",
    "OptionTypeError",
    "OptionValueError",
    "PoolSourceInfo",
    "SyncNotSupportedError",
    "ZcacheError",
    "__version__",
    "open",
    "with_decoded_cache",
]
