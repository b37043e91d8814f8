"""Caches below what people read with. Skipped where that is not installed; CI has all (the extra `clients`)."""

from __future__ import annotations

import pickle
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

import zcache
from zcache import CachePool, CacheStore

if TYPE_CHECKING:
    from pathlib import Path

DATA = np.arange(100).reshape(10, 10)


@pytest.mark.once
def test_snapshots_of_icechunk_are_sources_of_one_pool(tmp_path: Path) -> None:
    """Each is a source, warm in the next session over it, and none is served what another one has."""
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "r")))
    expected = {}
    for number in range(3):
        session = repository.writable_session("main")
        group = zarr.open_group(session.store, mode="a")
        data = DATA + 1000 * number
        if number == 0:
            group.create_array("x", data=data, chunks=(5, 5))
        group["x"][:] = data
        expected[session.commit(f"number {number}")] = data
    pool = CachePool(tmp_path / "pool", max_size="10 MiB")
    for turn in range(2):
        for snapshot, data in expected.items():
            session = repository.readonly_session(snapshot_id=snapshot)
            store = CacheStore(session.store, cache_store=pool)
            assert (zarr.open_group(store, mode="r")["x"][:] == data).all()
            assert store.drain_sync()
            assert (store.cache_stats()["misses"] == 0) == (turn == 1)
    assert [info.entries for info in pool.sources()] == [6] * len(expected)


@pytest.mark.slow
@pytest.mark.once
def test_workers_of_dask_share_a_pool(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    array = pytest.importorskip("dask.array")
    zarr.create_array(LocalStore(tmp_path / "source"), data=DATA, chunks=(2, 2))
    store = zcache.open(tmp_path / "source", cache=tmp_path / "pool", max_size="10 MiB")
    pickle.dumps(store)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as some,
        distributed.Client(some),
    ):
        for _ in range(2):
            found = array.from_zarr(zarr.open_array(store, mode="r")).sum().compute()
            assert found == DATA.sum()
    # Without a value in the source, all that is read comes from the pool that the workers filled.
    shutil.rmtree(tmp_path / "source" / "c")
    again = zcache.open(tmp_path / "source", cache=tmp_path / "pool")
    assert (np.asarray(zarr.open_array(again, mode="r")[:]) == DATA).all()


@pytest.mark.once
@pytest.mark.parametrize("in_memory", [True, False])
def test_virtual_dataset_is_read_from_a_pool(tmp_path: Path, in_memory: bool) -> None:
    """Its chunks are ranges of a file that is no Zarr at all."""
    manifests = pytest.importorskip("virtualizarr.manifests")
    utils = pytest.importorskip("virtualizarr.manifests.utils")
    registry = pytest.importorskip("obspec_utils.registry")
    files = pytest.importorskip("obstore.store")
    xarray = pytest.importorskip("xarray")
    path = tmp_path / "old.bin"
    path.write_bytes(b"header" + DATA.tobytes())
    row = DATA[0].nbytes
    metadata = utils.create_v3_array_metadata(
        shape=DATA.shape,
        data_type=DATA.dtype,
        chunk_shape=(1, DATA.shape[1]),
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}],
        fill_value=0,
        dimension_names=("y", "x"),
    )
    chunks = manifests.ChunkManifest(
        {
            f"{y}.0": {"path": f"file://{path}", "offset": 6 + y * row, "length": row}
            for y in range(len(DATA))
        }
    )
    source = manifests.ManifestStore(
        manifests.ManifestGroup(arrays={"v": manifests.ManifestArray(metadata, chunks)}),
        registry=registry.ObjectStoreRegistry({"file://": files.LocalStore()}),
    )
    pool = CachePool(None if in_memory else tmp_path / "pool", max_size="10 MiB")
    # Nothing names what the manifests mean, so a pool on disk keeps it for this process alone, unless it is named.
    store = CacheStore(source, cache_store=pool, source_id="old.bin")
    first = xarray.open_zarr(store, consolidated=False)["v"].to_numpy()
    assert (first == DATA).all()
    assert store.drain_sync()
    misses = store.cache_stats()["misses"]
    # Chunks are read from the cache: the file itself has gone.
    path.unlink()
    again = xarray.open_zarr(store, consolidated=False)["v"].to_numpy()
    assert (again == DATA).all()
    assert store.cache_stats()["misses"] == misses


@pytest.mark.once
# anndata and pandas warn each other.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decoded_size", [None, "1 MiB"])
def test_anndata_is_the_same_and_read_once(tmp_path: Path, decoded_size: str | None) -> None:
    """Sparse matrices, categories, texts and a dense layer, whole and lazily."""
    anndata = pytest.importorskip("anndata")
    pandas = pytest.importorskip("pandas")
    sparse = pytest.importorskip("scipy.sparse")
    cells, genes = 50, 20
    names = [f"cell {number}" for number in range(cells)]
    kinds = pandas.Categorical(["a", "b"] * (cells // 2))
    dense = np.arange(cells * genes, dtype="f8").reshape(cells, genes)
    written = anndata.AnnData(
        X=sparse.csr_matrix(dense * (dense % 7 == 0)),
        obs=pandas.DataFrame({"kind": kinds, "text": names[::-1]}, index=names),
        layers={"dense": dense},
    )
    written.write_zarr(tmp_path / "cells.zarr")
    store = CacheStore(
        LocalStore(tmp_path / "cells.zarr"), cache_store=MemoryStore(), decoded_size=decoded_size
    )
    for turn in range(2):
        before = store.cache_stats()["misses"]
        found = anndata.io.read_zarr(zarr.open_group(store, mode="r"))
        assert (found.X != written.X).nnz == 0
        assert found.obs.equals(written.obs)
        assert (found.layers["dense"] == dense).all()
        assert store.drain_sync()
        assert (store.cache_stats()["misses"] == before) == (turn == 1)
    lazy = anndata.experimental.read_lazy(zarr.open_group(store, mode="r"))
    part = lazy[5:15].to_memory()
    assert (part.layers["dense"] == dense[5:15]).all()
    assert list(part.obs["text"]) == names[::-1][5:15]


ZARRS = "zarrs.ZarrsCodecPipeline"


@pytest.mark.once
@pytest.mark.parametrize("decoded_size", [None, "1 MiB"])
@pytest.mark.parametrize(
    "config",
    [
        {"codec_pipeline.path": ZARRS},
        {"codec_pipeline.path": "zcache.DecodedCodecPipeline", "zcache.codec_pipeline": ZARRS},
    ],
    ids=["itself", "wrapped"],
)
def test_pipeline_of_zarrs_leaves_a_cache_to_zarr(
    tmp_path: Path, config: dict[str, str], decoded_size: str | None
) -> None:
    """It reads files by itself and takes no other stores. What reads in its place is wrapped."""
    pytest.importorskip("zarrs")
    files = LocalStore(tmp_path / "x.zarr")
    zarr.create_array(files, data=DATA, chunks=(5, 5))
    store = CacheStore(files, cache_store=MemoryStore(), decoded_size=decoded_size)
    with zarr.config.set(config):
        array = zarr.open_array(store, mode="r+")
        assert (array[:] == DATA).all()
        assert store.drain_sync()
        assert (array[:] == DATA).all()
        stats = store.cache_stats()
        # Four chunks, from the one cache or the other.
        assert (stats["hits"], stats.get("decoded_hits")) == (
            (4, 0) if decoded_size is None else (0, 4)
        )
        # Through zarrs' pipeline itself, which writes the file.
        plain = zarr.open_array(files, mode="r+")
        pipeline: Any = plain._async_array.codec_pipeline
        assert type(getattr(pipeline, "wrapped", pipeline)).__name__ == "ZarrsCodecPipeline"
        assert (plain[:] == DATA).all()
        plain[:5] = 7
        array[5:] = 8
        store.invalidate_sync()
        assert (array[:5] == 7).all()
        assert (array[5:] == 8).all()
