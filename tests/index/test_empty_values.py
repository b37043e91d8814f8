"""Values without bytes are bounded too: a bound of so many bytes is one of so many entries."""

from __future__ import annotations

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import MemoryStore

from support import buf, read
from zcache import CacheStore
from zcache.testing import check_invariants_async, entries


@pytest.mark.parametrize("bound", [0, 1, 50])
async def test_empty_values_are_bounded(bound: int) -> None:
    source = MemoryStore({f"a/c/{n}": buf(b"") for n in range(200)})
    store = CacheStore(source, max_size=bound)
    for key in source._store_dict:
        assert await read(store, key) == b""
    assert store.drain_sync()
    # The last ones, as of any values.
    names = {entry.key for entry in entries(store)}
    assert names == {f"a/c/{n}" for n in range(200 - bound, 200)}
    await check_invariants_async(store)


async def test_ranges_of_nothing_are_bounded() -> None:
    source = MemoryStore({f"a/c/{n}": buf(b"value") for n in range(100)})
    store = CacheStore(source, max_size=20)
    for key in source._store_dict:
        await read(store, key, RangeByteRequest(2, 2))
    assert store.drain_sync()
    assert len(entries(store)) <= 20


async def test_values_with_bytes_are_not_counted_twice() -> None:
    source = MemoryStore({f"a/c/{n}": buf(b"1") for n in range(100)})
    store = CacheStore(source, max_size=100)
    for key in source._store_dict:
        await read(store, key)
    assert len(entries(store)) == 100
