"""Programs of users, as `mypy --strict` sees them: it takes what is documented, and refuses what is not. Not run.

An "ignore" that is not needed is an error as well, so each of them is the test that its line is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from zarr.storage import LocalStore, StorePath

import zcache
from zcache import Advice, CachedKeys, CachePool, CacheStore

if TYPE_CHECKING:
    import zarr


class Mine(CacheStore):
    """A class of a user's own."""


def opens(path: StorePath) -> CacheStore:
    zcache.open("s3://bucket/key", storage_options={"anon": True}, max_size="2 GiB")
    zcache.open(LocalStore("a"), max_age_seconds={"**/zarr.json": 60, "**": None}, offline=None)
    zcache.open("a", max_age_secs=3)  # type: ignore[call-arg]
    zcache.open("a", eviction="wrong")  # type: ignore[arg-type]
    zcache.open("a", cache_store="b")  # type: ignore[call-arg]
    return zcache.open(path, revalidate="metadata", verify="never", eviction="adaptive")


def sizes() -> list[CacheStore]:
    given = np.int64(10**9)
    CachePool("a", max_size=1e9, min_free_space=given)
    stores = [CacheStore(LocalStore("a"), max_size=size) for size in (1e9, given, 1, "1 %")]
    stores[0].advise(sizes=[1e9, given, "2 GiB"])
    CacheStore(LocalStore("a"), max_size=b"1")  # type: ignore[arg-type]
    return [*stores, zcache.open("a", max_size=1e9, decoded_size=given)]


def policies(store: CacheStore, advice: Advice) -> CacheStore:
    CachePool(eviction=store.eviction, minimise=store.minimise)
    return CacheStore(LocalStore("a"), eviction=advice.best_policy)


def decoded(array: zarr.Array) -> zarr.Array:  # type: ignore[type-arg, unused-ignore]
    zcache.with_decoded_cache("no array", 3)  # type: ignore[type-var]
    return zcache.with_decoded_cache(array, 1e9)


def copies(store: Mine) -> Mine:
    return store.with_read_only(True)


def keys(store: CacheStore) -> CachedKeys:
    return store.cached_keys("a")
