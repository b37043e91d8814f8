"""zcache: the cache between a slow Zarr store and the people who read it.

>>> import zarr
>>> from zcache import CacheStore
>>> source = zarr.storage.MemoryStore()  # or S3, GCS, HTTP, NFS
>>> store = CacheStore(source, max_size="2 GiB")

`CacheStore` takes the place of `zarr.experimental.cache_store.CacheStore` without a change at the
call site.
"""

from zcache._advice.advice import Advice, Curve
from zcache._advice.recording import Recording
from zcache._advice.replay import replay
from zcache._core import __version__
from zcache._decoded.pipeline import DecodedCodecPipeline
from zcache._index.keys import CachedKeys
from zcache._open import open  # noqa: A004 - called `zcache.open`, like `zarr.open`
from zcache.decoded import with_decoded_cache
from zcache.exceptions import (
    CacheOwnershipError,
    CacheUnreachableError,
    IndexLockTimeout,
    IndexRebuildTimeout,
    MissingClientError,
    NoSuchSourceError,
    OfflineError,
    OptionTypeError,
    OptionValueError,
    RecordingError,
    RecordingExistsError,
    SyncNotSupportedError,
    UsageError,
    ZcacheError,
)
from zcache.pool import CachePool, PoolSourceInfo
from zcache.store import CacheStore

__all__ = [
    "Advice",
    "CacheOwnershipError",
    "CachePool",
    "CacheStore",
    "CacheUnreachableError",
    "CachedKeys",
    "Curve",
    "DecodedCodecPipeline",
    "IndexLockTimeout",
    "IndexRebuildTimeout",
    "MissingClientError",
    "NoSuchSourceError",
    "OfflineError",
    "OptionTypeError",
    "OptionValueError",
    "PoolSourceInfo",
    "Recording",
    "RecordingError",
    "RecordingExistsError",
    "SyncNotSupportedError",
    "UsageError",
    "ZcacheError",
    "__version__",
    "open",
    "replay",
    "with_decoded_cache",
]
