"""Arrays and groups through the cache: real data, and what zarr itself changes and removes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import LocalStore, MemoryStore

from support import CountingStore, check_books, everything, held
from zcache import CacheStore

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

READS = {"get", "get_partial_values", "get_ranges", "get_sync", "get_ranges_sync"}


@pytest.fixture(params=["memory", "local"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "cache")


@pytest.mark.parametrize("name", ["z", "u", "v"])
def test_era_interim(era_interim: Path, cache: Store, name: str) -> None:
    """Chunked or sharded, whole or in part: the second time the source is not asked."""
    source = CountingStore(LocalStore(era_interim, read_only=True))
    store = CacheStore(source, cache_store=cache)
    expected = zarr.open_array(era_interim / name, mode="r")
    assert (expected.shards is not None) == (name == "v")
    for part in (np.s_[0, 0, 100:140, 50:200], np.s_[:]):
        for turn in range(2):
            array = zarr.open_array(store, path=name, mode="r")
            np.testing.assert_array_equal(array[part], expected[part])
            # zarr asks for documents of other formats too, and nobody keeps what is not there.
            asked = [call for call in source.calls if call.method in READS]
            payload = [call for call in asked if "/c/" in str(call.key)]
            assert bool(payload) is (turn == 0), payload
            source.calls.clear()
    check_books(store)
    assert store.cache_info()["current_size"] > 800_000


def test_era_interim_as_a_dataset(era_interim: Path, cache: Store) -> None:
    source = CountingStore(LocalStore(era_interim, read_only=True))
    store = CacheStore(source, cache_store=cache, max_size="1 MB")
    expected = xr.open_zarr(era_interim, chunks=None)
    for _ in range(2):
        with xr.open_zarr(store, chunks=None) as dataset:
            xr.testing.assert_identical(dataset.load(), expected)
    assert store.cache_stats()["evictions"] > 0
    check_books(store)


def both(cache: Store) -> tuple[MemoryStore, CacheStore]:
    source = MemoryStore()
    return source, CacheStore(source, cache_store=cache)


def create(store: Store, path: str, value: int, **options: Any) -> zarr.Array[Any]:
    options = {"shape": (8,), "chunks": (2,), "dtype": "i4", **options}
    array = zarr.create_array(store, name=path, **options)
    array[:] = value
    return array


@pytest.mark.parametrize("shards", [None, (4,)])
def test_overwrite(cache: Store, shards: tuple[int] | None) -> None:
    """What is made anew has nothing of the old array, cached chunks included."""
    source, store = both(cache)
    create(store, "a", 1, shards=shards)
    assert zarr.open_array(store, path="a")[:].tolist() == [1] * 8
    new = zarr.create_array(
        store, name="a", shape=(8,), chunks=(2,), shards=shards, dtype="i4", overwrite=True
    )
    assert new[:].tolist() == [0] * 8
    new[:2] = 5
    assert zarr.open_array(store, path="a")[:].tolist() == [5, 5, 0, 0, 0, 0, 0, 0]
    assert zarr.open_array(source, path="a")[:].tolist() == [5, 5, 0, 0, 0, 0, 0, 0]
    check_books(store)


def test_delete_member(cache: Store) -> None:
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
    assert held(cache).keys() <= {key for key in held(source) if key.startswith(("xx", "zarr.j"))}
    check_books(store)


def test_resize_and_append(cache: Store) -> None:
    source, store = both(cache)
    array = create(store, "a", 1)
    assert array[:].tolist() == [1] * 8
    array.resize((3,))
    array.resize((8,))
    # What was cut off is gone: only within the chunk that was kept it may still be there.
    assert array[4:].tolist() == [0] * 4
    array.append(np.full(2, 7, "i4"))
    for store_ in (store, source):
        again = zarr.open_array(store_, path="a")
        assert again.shape == (10,)
        assert again[-2:].tolist() == [7, 7]
        assert again[:].tolist() == array[:].tolist()
    check_books(store)


def test_chunks_that_become_empty_are_deleted(cache: Store) -> None:
    source, store = both(cache)
    array = create(store, "a", 1)
    array[:4] = 0
    assert array[:].tolist() == [0] * 4 + [1] * 4
    assert "a/c/0" not in held(source)
    assert "a/c/0" not in held(cache)
    check_books(store)


def test_attributes(cache: Store) -> None:
    source, store = both(cache)
    create(store, "a", 1).attrs["unit"] = "K"
    array = zarr.open_array(store, path="a")
    assert array.attrs["unit"] == "K"
    array.attrs["unit"] = "degC"
    assert zarr.open_array(store, path="a").attrs["unit"] == "degC"
    assert zarr.open_array(source, path="a").attrs["unit"] == "degC"


def test_cached_part_is_readable_as_zarr(cache: Store) -> None:
    """A full value lies under its own key, byte for byte."""
    source, store = both(cache)
    create(store, "a", 1)
    assert {key: value.to_bytes() for key, value in source._store_dict.items()} == dict(
        everything(store)
    )
    assert held(cache) == held(source)
    assert zarr.open_array(cache, path="a", mode="r")[:].tolist() == [1] * 8


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_consolidated(cache: Store, zarr_format: Any) -> None:
    _, store = both(cache)
    root = zarr.create_group(store, zarr_format=zarr_format)
    root.create_array("a", shape=(4,), dtype="i4")[:] = 1
    zarr.consolidate_metadata(store)
    assert list(zarr.open_consolidated(store).array_keys()) == ["a"]
    root.create_array("b", shape=(4,), dtype="i4")
    zarr.consolidate_metadata(store)
    assert sorted(zarr.open_consolidated(store).array_keys()) == ["a", "b"]
    check_books(store)
