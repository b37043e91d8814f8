"""A dataset that was opened and read once opens and reads again with the source gone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import zarr
from zarr.storage import LocalStore

from support import drained_sync
from zcache import CacheStore, OfflineError
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture(params=[2, 3])
def zarr_format(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "consolidated"])
def where(request: pytest.FixtureRequest, tmp_path: Path, zarr_format: Any) -> Path:
    """A group with two arrays, one of them sparse, and a group in it."""
    path = tmp_path / "source"
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format, attributes={"title": "t"})
    for name in ("x", "y"):
        options: dict[str, Any] = {} if zarr_format == 2 else {"dimension_names": ("n",)}
        array = group.create_array(
            name, shape=(4,), chunks=(2,), dtype="i4", fill_value=7, **options
        )
        if zarr_format == 2:
            array.attrs["_ARRAY_DIMENSIONS"] = ["n"]
        array[:2] = [1, 2]
    inner = group.create_group("inner")
    inner.create_array("z", shape=(2,), dtype="f8")[:] = [1, 2]
    if request.param:
        zarr.consolidate_metadata(path)
    return path


def by_group(store: CacheStore) -> Any:
    group = zarr.open_group(store, mode="r")
    return {
        "attributes": dict(group.attrs),
        "members": {
            name: node[...].tolist() if isinstance(node, zarr.Array) else sorted(node.keys())
            for name, node in group.members(max_depth=None)
        },
        "arrays": sorted(group.array_keys()),
        "groups": sorted(group.group_keys()),
    }


def by_path(store: CacheStore) -> Any:
    array, group = zarr.open(store, path="x", mode="r"), zarr.open(store, mode="r")
    assert isinstance(array, zarr.Array)
    assert isinstance(group, zarr.Group)
    return array[...].tolist(), zarr.open_array(store, path="inner/z", mode="r")[...].tolist()


def by_xarray(store: CacheStore) -> Any:
    xarray = pytest.importorskip("xarray")
    with xarray.open_zarr(store, chunks=None, mask_and_scale=False) as dataset:
        return dataset.load().to_dict()


@pytest.mark.parametrize("look", [by_group, by_path, by_xarray])
def test_offline_what_was_looked_at_once_is_seen_again(
    where: Path, tmp_path: Path, look: Callable[[CacheStore], Any]
) -> None:
    source = StoreDouble(LocalStore(where, read_only=True))
    options: dict[str, Any] = {"cache_store": tmp_path / "cache", "source_id": "source"}
    online = CacheStore(source, **options)
    expected = look(online)
    drained_sync(online)
    del online
    # Ages, of values and of absences, do not count.
    store = CacheStore(
        source, max_age_seconds=0, missing_max_age_seconds=0, offline=True, **options
    )
    source.take()
    assert look(store) == expected
    assert source.take() == {}
    assert store.cache_stats()["misses"] == 0


def test_offline_what_was_never_looked_at_raises(where: Path, tmp_path: Path) -> None:
    source = LocalStore(where)
    online = CacheStore(source, cache_store=tmp_path / "cache")
    by_path(online)
    drained_sync(online)
    store = CacheStore(source, cache_store=tmp_path / "cache", offline=True)
    assert by_path(store)
    with pytest.raises(OfflineError, match="y"):
        zarr.open_array(store, path="y", mode="r")[...]
    with pytest.raises(OfflineError):
        zarr.open_group(store, mode="r+").create_group("new")
