"""Pools below what people read with: icechunk's snapshots, and dask's workers. Skipped where these are not installed."""

from __future__ import annotations

import pickle
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

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
