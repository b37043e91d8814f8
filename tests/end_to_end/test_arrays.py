"""Arrays and groups through the cache: real data, and what zarr itself changes and removes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import LocalStore, MemoryStore

from pools import BESIDE_OTHERS, NEIGHBOURS, one_of
from support import check_quiet_sync, drained_sync, everything, sizes_of
from zcache import CachePool, CacheStore
from zcache.testing import StoreDouble, stored_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

READS = {"get", "get_partial_values", "get_ranges", "get_sync", "get_ranges_sync"}


cache = one_of(BESIDE_OTHERS)


@pytest.mark.parametrize("name", ["z", "u", "v"])
def test_era_interim_read_again_asks_no_source(
    era_interim: Path, cache: Store | CachePool, name: str
) -> None:
    """Chunked or sharded, whole or in part: the second time the source is not asked."""
    source = StoreDouble(LocalStore(era_interim, read_only=True))
    store = CacheStore(source, cache_store=cache)
    expected = zarr.open_array(era_interim / name, mode="r")
    assert (expected.shards is not None) == (name == "v")
    for part in (np.s_[0, 0, 100:140, 50:200], np.s_[:]):
        for turn in range(2):
            array = zarr.open_array(store, path=name, mode="r")
            np.testing.assert_array_equal(array[part], expected[part])
            # zarr asks for documents of other formats too, and absent ones are not cached.
            asked = [each for each in source.take_requests() if each.operation in READS]
            payload = [each for each in asked if "/c/" in each.key]
            assert bool(payload) is (turn == 0), payload
    check_quiet_sync(store)
    assert store.cache_info()["current_size"] > 800_000


def test_era_interim_dataset_reads_as_the_source(
    era_interim: Path, cache: Store | CachePool
) -> None:
    source = StoreDouble(LocalStore(era_interim, read_only=True))
    store = CacheStore(source, cache_store=cache, max_size="1 MB")
    expected = xr.open_zarr(era_interim, chunks=None)
    for _ in range(2):
        with xr.open_zarr(store, chunks=None) as dataset:
            xr.testing.assert_identical(dataset.load(), expected)
        store.drain_sync()
    assert store.cache_stats()["evictions"] > 0
    check_quiet_sync(store)


def both(cache: Store | CachePool) -> tuple[MemoryStore, CacheStore]:
    source = MemoryStore()
    return source, CacheStore(source, cache_store=cache)


def create(store: Store, path: str, value: int, **options: Any) -> zarr.Array[Any]:
    options = {"shape": (8,), "chunks": (2,), "dtype": "i4", **options}
    array = zarr.create_array(store, name=path, **options)
    array[:] = value
    return array


def test_group_member_deleted_is_gone(cache: Store | CachePool) -> None:
    source, store = both(cache)
    group = zarr.create_group(store)
    create(store, "x", 1)
    create(store, "sub/y", 2)
    create(store, "xx", 3)
    assert group["x"][:].tolist() == [1] * 8
    assert group["sub/y"][:].tolist() == [2] * 8
    del group["x"]
    del group["sub"]
    for gone in ("x", "sub", "sub/y"):
        assert gone not in group
        with pytest.raises(KeyError):
            group[gone]
    assert sorted(group.keys()) == ["xx"]
    assert group["xx"][:].tolist() == [3] * 8
    assert stored_sizes(store).keys() <= {
        key for key in sizes_of(source) if key.startswith(("xx", "zarr.j"))
    }
    check_quiet_sync(store)


def test_chunks_become_empty_are_deleted(cache: Store | CachePool) -> None:
    source, store = both(cache)
    array = create(store, "a", 1)
    array[:4] = 0
    assert array[:].tolist() == [0] * 4 + [1] * 4
    assert "a/c/0" not in sizes_of(source)
    assert "a/c/0" not in stored_sizes(store)
    check_quiet_sync(store)


def exported(pool: CachePool) -> MemoryStore:
    """What a pool holds of the source under test."""
    store = MemoryStore()
    (name,) = {info.name for info in pool.sources()} - {*NEIGHBOURS}
    pool.export(str(name), store)
    return store


def test_cache_store_filled_is_readable_as_zarr(cache: Store | CachePool) -> None:
    """A full value lies under its own key, byte for byte."""
    source, store = both(cache)
    create(store, "a", 1)
    assert {key: value.to_bytes() for key, value in source._store_dict.items()} == dict(
        everything(store)
    )
    drained_sync(store)
    assert stored_sizes(store) == sizes_of(source)
    if isinstance(cache, CachePool):
        cache = exported(cache)
    assert zarr.open_array(cache, path="a", mode="r")[:].tolist() == [1] * 8
