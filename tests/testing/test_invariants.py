"""`check_invariants` finds each way in which the index and the cache store may differ."""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

from doubles import DictStore
from support import buf, drained, fill, quiet, read, read_through, threads
from zcache import CachePool, CacheStore, OptionTypeError, UsageError
from zcache.testing import (
    Entry,
    InvariantError,
    StoreDouble,
    _invariants,
    cache_store_of,
    check_index,
    check_invariants,
    check_invariants_async,
    entries,
    in_flight,
    index_slot,
    is_complete,
    missing_keys,
    recency,
    record_steps,
    set_block_size,
    shares_index,
    source_of,
    stored_sizes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store


@pytest.fixture(params=["memory", "directory", "double", "listed"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "directory":
        return LocalStore(tmp_path / "cache")
    inner = MemoryStore() if request.param == "double" else LocalStore(tmp_path / "cache")
    return StoreDouble(inner)


@pytest.fixture
async def store(cache: Store) -> CacheStore:
    source = DictStore({"a": b"0123456789", "b": b"12345"})
    store = CacheStore(source, cache_store=cache, max_size=100, source_id="s")
    await drained(store)  # What has to be listed first takes nothing in before.
    await read_through(store, "b")
    await read_through(store, "a", RangeByteRequest(2, 4))
    return store


async def check(store: CacheStore) -> None:
    """By both functions, and from a thread without an event loop."""
    await check_invariants_async(store)
    check_invariants(store)
    with threads(lambda: check_invariants(store)):
        pass
    check_index(store)


async def differs(store: CacheStore, message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        check_invariants(store)
    with pytest.raises(AssertionError, match=message):
        await check_invariants_async(store)
    check_index(store)


async def put(cache: Store, name: str, data: bytes | None) -> None:
    """Change what a cache store holds; in a directory as a file that zcache seems to have written."""
    if isinstance(cache, StoreDouble):
        cache = cache.inner
    if not isinstance(cache, LocalStore):
        await (cache.delete(name) if data is None else cache.set(name, buf(data)))
        return
    path = Path(cache.root) / name
    if data is None:
        path.unlink()
        return
    like = Path(cache.root) / "b"
    times = like.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


async def test_index_that_equals_its_cache_store_passes(store: CacheStore) -> None:
    await check(store)
    assert stored_sizes(store) == {"b": 5, ".zcache/ranges/a@2-4": 2}


async def test_value_that_vanished_is_named(store: CacheStore) -> None:
    await put(cache_store_of(store), "b", None)
    await differs(store, "not in the cache store: 'b'")


async def test_value_of_another_size_is_named(store: CacheStore) -> None:
    await put(cache_store_of(store), "b", b"1234")
    await differs(store, "of another size in the cache store: 'b' 4 not 5")


async def test_value_that_is_not_counted_is_named(store: CacheStore) -> None:
    await put(cache_store_of(store), "c", b"123")
    await differs(store, "not in the index: 'c'")


async def test_files_of_others_in_a_directory_are_left_out(tmp_path: Path) -> None:
    store = CacheStore(MemoryStore(), cache_store=LocalStore(tmp_path))
    await fill(store, a=b"1")
    (tmp_path / "notes").write_bytes(b"mine")
    await check(store)
    assert stored_sizes(store) == {"a": 1}


async def test_given_sizes_are_compared_instead(store: CacheStore) -> None:
    check_invariants(store, held={"b": 5, ".zcache/ranges/a@2-4": 2})
    with pytest.raises(InvariantError, match="the cache store holds 8 bytes, current_size is 7"):
        check_invariants(store, held={"b": 5, ".zcache/ranges/a@2-4": 2, "c": 1})


async def test_value_being_written_is_counted_and_no_difference(tmp_path: Path) -> None:
    for inner in (MemoryStore(), LocalStore(tmp_path)):
        cache = StoreDouble(inner)
        store = CacheStore(DictStore({"a": b"12345"}), cache_store=cache, max_size=10)
        await read_through(store, "missing")
        for after in (False, True):
            await store.clear_cache()
            gate = cache.block("set", key="a", times=1, after=after)
            task = asyncio.ensure_future(read(store, "a"))
            await gate.entered_async()
            assert in_flight(store).reservations == 1
            assert [(entry.key, entry.state) for entry in entries(store)] == [("a", "filling")]
            await check_invariants_async(store)
            gate.release()
            assert await task == b"12345"
            await quiet(store)
            await check(store)


async def test_value_that_could_not_be_deleted_stays_counted() -> None:
    cache = StoreDouble(MemoryStore())
    store = CacheStore(DictStore({"a": b"12345"}), cache_store=cache)
    await read_through(store, "a")
    cache.fail("delete", OSError)
    await store.delete("a")
    assert [(entry.key, entry.state) for entry in entries(store)] == [("a", "delete-failed")]
    assert store.cache_info()["current_size"] == 5
    await check(store)


async def test_views_show_what_the_index_says(store: CacheStore) -> None:
    part = RangeByteRequest(2, 4)
    assert sorted(entries(store), key=lambda entry: entry.key) == [
        Entry("a", part, 2, ".zcache/ranges/a@2-4", "live"),
        Entry("b", None, 5, "b", "live"),
    ]
    assert recency(store) == [("b", None), ("a", part)]
    await read(store, "b")
    assert recency(store) == [("a", part), ("b", None)]
    assert in_flight(store) == (0, 0)
    assert is_complete(store)
    is_directory = isinstance(cache_store_of(store), LocalStore)
    assert (index_slot(store) is not None) == is_directory
    assert isinstance(source_of(store), DictStore)
    assert shares_index(store, copy.copy(store))


async def test_recorded_steps_are_told_in_their_order(store: CacheStore) -> None:
    told: list[str] = []
    with record_steps(store, lambda step: told.append(step.name)) as steps:
        await read(store, "b")
        await read_through(store, "a")
    assert [step.name for step in steps] == told
    assert {"lookup", "join"} <= set(told)
    assert steps[0].args[0] == "b"
    seen = len(told)
    await read(store, "b")
    assert len(told) == seen


CALLS: list[Callable[[Any], Any]] = [
    cache_store_of,
    check_index,
    check_invariants,
    lambda store: asyncio.run(check_invariants_async(store)),
    entries,
    in_flight,
    index_slot,
    is_complete,
    missing_keys,
    recency,
    lambda store: record_steps(store).__enter__(),
    lambda store: shares_index(store, store),
    source_of,
    stored_sizes,
]


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_cache_store_is_named(call: Callable[[Any], Any]) -> None:
    with pytest.raises(
        OptionTypeError, match=r"invalid store: MemoryStore\. Give a zcache\.CacheStore"
    ):
        call(MemoryStore())


@pytest.mark.parametrize("max_size", [0, 1, 4096, 16_383, 32_767])
@pytest.mark.parametrize("is_pool", [False, True])
async def test_bound_below_what_folders_take_keeps_nothing_and_passes(
    tmp_path: Path, is_pool: bool, max_size: int
) -> None:
    """A directory without values was said to be beyond such a bound."""
    before = set_block_size(None)
    try:
        cache = CachePool(tmp_path) if is_pool else LocalStore(tmp_path)
        source = DictStore({"a": bytes(40_000)})
        store = CacheStore(source, cache_store=cache, max_size=max_size, source_id="s")
        await check(store)
        await read_through(store, "a")
        await store.set("b", buf(bytes(40_000)))
        assert await store.drain()
        await check(store)
        assert entries(store) == []
    finally:
        set_block_size(before)


async def test_invariants_of_an_index_that_always_changes_raise(
    store: CacheStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = _invariants._snapshot
    sizes = itertools.count()
    monkeypatch.setattr(
        _invariants, "_snapshot", lambda of: look(of)._replace(current_size=next(sizes))
    )
    with pytest.raises(UsageError, match="check_index"):
        check_invariants(store)
    with pytest.raises(UsageError, match="check_index"):
        await check_invariants_async(store)
    check_index(store)
