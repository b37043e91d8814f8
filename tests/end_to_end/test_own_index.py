"""A process that cannot share the index of a directory, beside one that can, and beside one that cannot either."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore

from agent import SOURCE_ID, Agent
from support import PROTOTYPE, buf, read, read_through, until
from zcache import CacheStore
from zcache.testing import StoreDouble, index_slot, without_shared_index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["shares", "has its own"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Agent]:
    """Another process on the directory."""
    with Agent(tmp_path, shares_index=request.param == "shares") as agent:
        yield agent


@pytest.fixture
def source(tmp_path: Path) -> StoreDouble:
    return StoreDouble(LocalStore(tmp_path / "source"))


@pytest.fixture
def store(tmp_path: Path, source: StoreDouble, other: Agent) -> CacheStore:
    """With an index of its own, opened after the other process was."""
    assert other
    return open_alone(tmp_path, source)


def open_alone(where: Path, source: StoreDouble) -> CacheStore:
    with without_shared_index():
        store = CacheStore(source, cache_store=LocalStore(where / "cache"), source_id=SOURCE_ID)
    assert index_slot(store) is None
    return store


async def read_twice(store: CacheStore, key: str, how: str) -> list[bytes | None]:
    """Read a key and another one, alone or in one call."""
    if how == "alone":
        return [await read(store, key), await read(store, key)]
    if how == "range":
        request = RangeByteRequest(0, 1)
        return [await read(store, key, request), await read(store, key, request)]
    found: list[Any] = await store.get_partial_values(PROTOTYPE, [(key, None), (key, None)])
    return [value and value.to_bytes() for value in found]


@pytest.mark.parametrize(
    ("what", "how"),
    [(what, how) for what in ("set", "delete", "delete_dir") for how in ("alone", "range")]
    # A local store raises for a missing key here.
    + [("set", "batch")],
)
async def test_read_after_a_change_elsewhere_joins_none_that_began_before(
    store: CacheStore, source: StoreDouble, other: Agent, what: str, how: str
) -> None:
    """Neither while that reads the source, nor while what it has read is on its way into the cache."""
    expected = b"2" if what == "set" else None
    for _ in range(5):
        other("set", "a/b", "1")
        gate = source.block("get", times=1, after=True)
        request = RangeByteRequest(0, 1) if how == "range" else None
        early = asyncio.ensure_future(read(store, "a/b", request))
        await asyncio.to_thread(gate.wait_entered)
        other(what, "a" if what == "delete_dir" else "a/b", "2")
        late = asyncio.ensure_future(read_twice(store, "a/b", how))
        done, _ = await asyncio.wait({late}, timeout=30)
        assert done, "it waits for the read that began before"
        assert late.result() == [expected] * 2
        gate.release()
        assert await early == b"1"
        for _ in range(3):
            assert await read_through(store, "a/b") == expected
        # Pending, then.
        other("set", "a/b", "3")
        assert await read(store, "a/b") == b"3"
        other(what, "a" if what == "delete_dir" else "a/b", "2")
        assert await read_twice(store, "a/b", how) == [expected] * 2
    assert other("get", "a/b") == (None if expected is None else "2")


async def test_what_others_do_not_know_of_is_not_cached(
    tmp_path: Path, source: StoreDouble
) -> None:
    """Who shares an index would not remove it with what is below a prefix."""
    with Agent(tmp_path) as other:
        store = open_alone(tmp_path, source)
        other("set", "a/b", "1")
        other("set", "c", "1")
        assert other("drain")
        assert other("invalidate", "") == 2
        # The first fill after a change elsewhere is void in any case.
        for _ in range(3):
            assert await read_through(store, "a/b") == b"1"
        assert not (tmp_path / "cache/a/b").exists()
        other("delete_dir", "a")
        assert await read_through(store, "a/b") is None
        other.end()
    # Once they have ended, there is no process to be told.
    for _ in range(2):
        assert await read_through(store, "c") == b"1"
    assert (tmp_path / "cache/c").exists()
    hits = store.cache_stats()["hits"]
    assert await read(store, "c") == b"1"
    assert store.cache_stats()["hits"] == hits + 1


async def test_what_others_have_cached_is_served(tmp_path: Path, source: StoreDouble) -> None:
    with Agent(tmp_path) as other:
        other("set", "a", "1")
        assert other("drain")
        store = open_alone(tmp_path, source)
        await until(lambda: store.is_cached("a"))
        source.take()
        assert await read(store, "a") == b"1"
        assert source.take() == {}
        await store.set("a", buf(b"2"))
        assert other("get", "a") == "2"
        assert await read(store, "a") == b"2"
