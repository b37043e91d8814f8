"""A cache store that raises a time-out of its own has ended what it was asked: nothing of it goes on."""

from __future__ import annotations

import pytest
from zarr.storage import MemoryStore

from support import buf, check_quiet, check_quiet_sync, fill, read, read_through, value_sync, write
from zcache import CacheStore
from zcache.testing import FakeClock, StoreDouble, in_flight, stored_sizes


@pytest.mark.parametrize("after", [False, True])
async def test_fill_cache_store_raises_timeout_nothing_stays_in_flight(
    clock: FakeClock, after: bool
) -> None:
    source, cache = MemoryStore(), StoreDouble(MemoryStore())
    store = CacheStore(source, cache_store=cache, max_size=10, clock=clock)
    await fill(source, k=b"value")
    cache.fail("set", TimeoutError("of a library"), times=1, after=after)
    assert await read_through(store, "k") == b"value"
    assert in_flight(store) == (0, 0)
    clock.advance(1000)
    assert await read_through(store, "k") == b"value"
    assert stored_sizes(store) == {"k": 5}
    await check_quiet(store)


async def test_delete_cache_store_raises_timeout_bytes_stay_counted_until_deleted(
    clock: FakeClock,
) -> None:
    cache = StoreDouble(MemoryStore())
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=10, clock=clock)
    await write(store, "k", b"value")
    cache.fail("delete", TimeoutError("of a library"), times=1)
    await write(store, "k", b"new")
    assert await read(store, "k") == b"new"
    await check_quiet(store)
    clock.advance(1000)
    await write(store, "j", bytes(10))
    await write(store, "k", b"1")
    await check_quiet(store)


def test_fill_sync_cache_store_raises_timeout_nothing_stays_in_flight(clock: FakeClock) -> None:
    source, cache = MemoryStore(), StoreDouble(MemoryStore())
    store = CacheStore(source, cache_store=cache, max_size=10, clock=clock)
    if not hasattr(source, "set_sync"):
        pytest.skip("this zarr reads only from event loops")
    cache.fail("set", TimeoutError("of a library"), times=1)
    store.set_sync("k", buf(b"value"))
    assert value_sync(store) == b"value"
    check_quiet_sync(store)
    assert in_flight(store) == (0, 0)
