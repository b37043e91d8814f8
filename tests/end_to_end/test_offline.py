"""A dataset that was opened and read once opens and reads again with the source gone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

from support import PROTOTYPE, drained_sync, fill, read
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


def by_xarray_of(consolidated: bool | None) -> Callable[[CacheStore, dict[str, Any]], Any]:
    def look(store: CacheStore, told: dict[str, Any]) -> Any:
        xarray = pytest.importorskip("xarray")
        options = {"chunks": None, "mask_and_scale": False, "consolidated": consolidated}
        with xarray.open_zarr(store, **options, **told) as dataset:
            return dataset["x"].values[:2].tolist()

    return look


def by_members(use_consolidated: bool | None) -> Callable[[CacheStore, dict[str, Any]], Any]:
    def look(store: CacheStore, told: dict[str, Any]) -> Any:
        group = zarr.open_group(store, mode="r", use_consolidated=use_consolidated, **told)
        return group["x"][:2].tolist()

    return look


def by_array(store: CacheStore, told: dict[str, Any]) -> Any:
    return zarr.open_array(store, path="x", mode="r", **told)[:2].tolist()


def by_open(store: CacheStore, told: dict[str, Any]) -> Any:
    zarr.open(store, mode="r", **told)
    return zarr.open(store, path="x", mode="r", **told)[:2].tolist()


# Online by a call that reads the documents of the group and of the array themselves.
ONLINE = {"open": by_open, "group": by_members(False)}
OFFLINE = {**ONLINE, "array": by_array, "consolidated": by_members(None)}


@pytest.mark.parametrize("online", ONLINE)
@pytest.mark.parametrize("offline", OFFLINE)
@pytest.mark.parametrize("cache_missing", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_offline_by_another_call_than_online(
    where: Path,
    tmp_path: Path,
    zarr_format: Any,
    online: str,
    offline: str,
    cache_missing: bool,
    told: bool,
) -> None:
    source = StoreDouble(LocalStore(where, read_only=True))
    options: dict[str, Any] = {
        "cache_store": tmp_path / "cache",
        "source_id": "source",
        "cache_missing": cache_missing,
    }
    formats = {"zarr_format": zarr_format}
    first = CacheStore(source, **options)
    assert ONLINE[online](first, formats if told else {}) == [1, 2]
    drained_sync(first)
    store = CacheStore(source, offline=True, **options)
    source.take()
    assert OFFLINE[offline](store, {} if told else formats) == [1, 2]
    assert OFFLINE[offline](store, {}) == [1, 2]
    assert source.take() == {}
    assert store.cache_stats()["misses"] == 0


@pytest.mark.parametrize("consolidated", [None, False])
def test_offline_by_xarray_of_what_zarr_has_read(
    where: Path, tmp_path: Path, consolidated: bool | None
) -> None:
    source = StoreDouble(LocalStore(where, read_only=True))
    options: dict[str, Any] = {"cache_store": tmp_path / "cache", "source_id": "source"}
    first = CacheStore(source, **options)
    by_group(first)
    by_array(first, {})
    by_xarray_of(False)(first, {})
    drained_sync(first)
    store = CacheStore(source, offline=True, **options)
    source.take()
    assert by_xarray_of(consolidated)(store, {}) == [1, 2]
    assert source.take() == {}


@pytest.mark.parametrize("offline", OFFLINE)
@pytest.mark.parametrize("how", ["rebuilt", "copied"])
def test_offline_over_a_cache_without_its_index(
    where: Path, tmp_path: Path, offline: str, how: str
) -> None:
    source = LocalStore(where, read_only=True)
    code = (
        "import sys, zarr\n"
        "from zarr.storage import LocalStore\n"
        "from zcache import CacheStore\n"
        "source = LocalStore(sys.argv[1], read_only=True)\n"
        "store = CacheStore(source, cache_store=sys.argv[2], source_id='source')\n"
        "zarr.open(store, mode='r'), zarr.open(store, path='x', mode='r')[:2]\n"
        "store.close()\n"
    )
    cache = tmp_path / "cache"
    subprocess.run([sys.executable, "-c", code, where, cache], check=True, timeout=300)
    if how == "copied":
        shutil.copytree(cache, cache := tmp_path / "copy")
    else:
        shutil.rmtree(cache / ".zcache" / "index")
    store = CacheStore(source, cache_store=cache, source_id="source", offline=True)
    assert OFFLINE[offline](store, {}) == [1, 2]


@pytest.mark.parametrize("node", ["zarr.json", ".zarray", ".zgroup"])
async def test_offline_a_document_says_which_others_there_are_not(
    tmp_path: Path, node: str
) -> None:
    source = StoreDouble(MemoryStore())
    options: dict[str, Any] = {"cache_store": tmp_path / "cache", "source_id": "source"}
    online = CacheStore(source, **options)
    await fill(online, **{f"g/{node}": b"{}"})
    store = CacheStore(source, offline=True, **options)
    source.take()
    missing = {"zarr.json", ".zarray", ".zgroup", ".zmetadata"} - {node}
    if node == "zarr.json":
        missing.add(".zattrs")
    for name in sorted(missing):
        key = f"g/{name}"
        assert await read(store, key) is None
        assert not await store.exists(key)
        with pytest.raises(FileNotFoundError):
            await store.getsize(key)
        assert await store.get_partial_values(PROTOTYPE, [(key, None)]) == [None]
    assert store.cache_stats()["misses"] == 0
    assert store.cache_stats()["negative_hits"] == 2 * len(missing)
    unknown = ["g/c/0", "zarr.json", "g/h/zarr.json"]
    for key in unknown if node == "zarr.json" else [*unknown, "g/.zattrs"]:
        with pytest.raises(OfflineError, match=key):
            await read(store, key)
        with pytest.raises(OfflineError, match=key):
            await store.exists(key)
        with pytest.raises(OfflineError, match=key):
            await store.get_partial_values(PROTOTYPE, [(key, None)])
    assert source.take() == {}
