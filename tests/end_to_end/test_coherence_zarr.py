"""Read your writes as zarr's users see it: arrays and groups; and ranges of every sort."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import zarr
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.storage import LocalStore, MemoryStore

from doubles import DictStore, GatedStore, SyncDictStore, reached
from pools import BESIDE_OTHERS, one_of
from support import PROTOTYPE, buf
from zcache import CachePool, CacheStore
from zcache.testing import check_invariants_async, in_flight

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["memory", "directory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "source")


cache = one_of({**BESIDE_OTHERS, "another": lambda _: SyncDictStore()})


@pytest.fixture
def store(cache: Store | CachePool, source: Store) -> CacheStore:
    return CacheStore(source, cache_store=cache, max_size=100_000)


Format = Literal[2, 3]
formats = pytest.mark.parametrize("zarr_format", [2, 3])


def numbers(count: int, first: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.arange(first, first + count, dtype="i4")


def create(store: Store, name: str, length: int, zarr_format: Format, **more: Any) -> Any:
    return zarr.create_array(
        store,
        name=name,
        shape=(length,),
        chunks=(4,),
        dtype="i4",
        zarr_format=zarr_format,
        fill_value=-1,
        **more,
    )


def both(store: CacheStore, source: Store, name: str) -> tuple[Any, Any]:
    """An array as it is through the cache, twice, and as it is in the source."""
    opened = [zarr.open_array(at, path=name, mode="r") for at in (store, store, source)]
    found = [array[:] for array in opened]
    assert opened[0].attrs.asdict() == opened[2].attrs.asdict()
    np.testing.assert_array_equal(found[0], found[1])
    return found[1], found[2]


@pytest.mark.parametrize(
    ("zarr_format", "shards"), [(2, None), (3, None), (3, (8,))], ids=["2", "3", "3-shards"]
)
def test_array_overwritten_reads_as_the_source(
    store: CacheStore, source: Store, zarr_format: Format, shards: tuple[int] | None
) -> None:
    create(store, "x", 16, zarr_format, shards=shards)[:] = numbers(16)
    np.testing.assert_array_equal(*both(store, source, "x"))
    # Nothing is written into the new one: it has its fill value everywhere.
    create(store, "x", 16, zarr_format, shards=shards, overwrite=True)
    cached, there = both(store, source, "x")
    np.testing.assert_array_equal(there, np.full(16, -1))
    np.testing.assert_array_equal(cached, there)


@formats
def test_array_resized_reads_as_the_source(
    store: CacheStore, source: Store, zarr_format: Format
) -> None:
    array = create(store, "x", 16, zarr_format)
    array[:] = numbers(16)
    both(store, source, "x")
    array.resize((6,))
    np.testing.assert_array_equal(*both(store, source, "x"))
    # What was cut off does not come back.
    array.resize((16,))
    cached, there = both(store, source, "x")
    np.testing.assert_array_equal(there[8:], np.full(8, -1))
    np.testing.assert_array_equal(cached, there)


@formats
def test_array_appended_to_reads_as_the_source(
    store: CacheStore, source: Store, zarr_format: Format
) -> None:
    array = create(store, "x", 6, zarr_format)
    array[:] = numbers(6)
    for first in (6, 9, 12):
        both(store, source, "x")
        array.append(numbers(3, first))
    cached, there = both(store, source, "x")
    np.testing.assert_array_equal(there, numbers(15))
    np.testing.assert_array_equal(cached, there)


@formats
def test_array_parts_of_chunks_and_shards_read_as_the_source(
    store: CacheStore, source: Store, zarr_format: Format
) -> None:
    shards = (8,) if zarr_format == 3 else None
    array = create(store, "x", 32, zarr_format, shards=shards)
    expected = np.full(32, -1, dtype="i4")
    for first in (1, 6, 13, 30, 5, 0):
        array[first : first + 2] = expected[first : first + 2] = first
        np.testing.assert_array_equal(zarr.open_array(store, path="x")[first], first)
        np.testing.assert_array_equal(both(store, source, "x")[0], expected)
    # Chunks that have become empty are deleted.
    array[:] = -1
    np.testing.assert_array_equal(both(store, source, "x")[0], np.full(32, -1))


@formats
def test_group_members_deleted_are_gone(
    store: CacheStore, source: Store, zarr_format: Format
) -> None:
    group = zarr.create_group(store, zarr_format=zarr_format)
    for name in ("x", "y/z"):
        array = group.create_array(name, shape=(4,), chunks=(2,), dtype="i4")
        array[:] = 7
        assert array[0] == 7
    del group["x"]
    del group["y"]
    assert "x" not in group
    assert "y/z" not in group
    for path in ("x", "y", "y/z"):
        with pytest.raises(FileNotFoundError):
            zarr.open(store, path=path, mode="r")
    assert sorted(zarr.open_group(store, mode="r").keys()) == []
    # Another one of the same name has nothing of the old one.
    again = group.create_array("x", shape=(4,), chunks=(2,), dtype="i4")
    np.testing.assert_array_equal(again[:], np.zeros(4))


@formats
def test_attributes_consolidated_are_the_newest(
    store: CacheStore, source: Store, zarr_format: Format
) -> None:
    group = zarr.create_group(store, zarr_format=zarr_format)
    array = group.create_array("x", shape=(4,), chunks=(2,), dtype="i4")
    for n in range(3):
        group.attrs["n"] = array.attrs["n"] = n
        zarr.consolidate_metadata(store)
        again = zarr.open_group(store, mode="r")
        assert again.attrs["n"] == again["x"].attrs["n"] == n
        assert again.metadata.consolidated_metadata is not None


def test_view_read_only_sees_writes_of_the_other(source: Store) -> None:
    """One reads only, one writes; they share what is cached."""
    store = CacheStore(source)
    view = store.with_read_only(read_only=True)
    array = create(store, "x", 8, 3)
    for n in range(3):
        array[:] = n
        np.testing.assert_array_equal(zarr.open_array(view, path="x", mode="r")[:], n)
    hits = store.cache_stats()["hits"]
    np.testing.assert_array_equal(zarr.open_array(store, path="x", mode="r")[:], n)
    assert view.cache_stats()["hits"] > hits


# ----------------------------------------------------------------------- ranges

VALUE = bytes(range(1, 11))
REQUESTS: list[ByteRequest | None] = [
    None,
    *(RangeByteRequest(a, b) for a in (0, 3, 9, 10, 12) for b in (0, 3, 5, 10, 11, 15)),
    *(OffsetByteRequest(n) for n in (0, 4, 9, 10, 11)),
    *(SuffixByteRequest(n) for n in (0, 1, 9, 10, 11, 20)),
]
MALFORMED: list[ByteRequest] = [
    RangeByteRequest(-3, 5),
    RangeByteRequest(2, -1),
    OffsetByteRequest(-2),
    SuffixByteRequest(-2),
]


async def answer(store: Store, key: str, request: ByteRequest | None) -> bytes | str | None:
    """What a store makes of a request: bytes, nothing, or the name of an error."""
    try:
        value = await store.get(key, PROTOTYPE, request)
    except (ValueError, OSError, IndexError) as error:
        return type(error).__name__
    return None if value is None else value.to_bytes()


@pytest.mark.parametrize("warm", ["cold", "whole", "this", "others"])
async def test_range_of_any_form_reads_as_the_source(
    store: CacheStore, source: Store, warm: str
) -> None:
    """Empty, past the end, the wrong way round; of a value, an empty one, and a missing one."""
    await source.set("full", buf(VALUE))
    await source.set("empty", buf(b""))
    for key in ("full", "empty", "missing"):
        for request in (*REQUESTS, *MALFORMED):
            expected = await answer(source, key, request)
            await store.clear_cache()
            if warm == "whole":
                await answer(store, key, None)
            elif warm == "others":
                for other in (RangeByteRequest(2, 8), OffsetByteRequest(3), SuffixByteRequest(6)):
                    await answer(store, key, other)
            for _ in range(2 if warm == "this" else 1):
                assert await answer(store, key, request) == expected, (key, request)
            if warm != "cold":
                # Once more, for what this very read has left behind.
                assert await answer(store, key, request) == expected, (key, request)
    await check_invariants_async(store)


@pytest.mark.parametrize("whole", [True, False])
async def test_range_following_a_flight_reads_as_the_source(whole: bool, tmp_path: Path) -> None:
    """Those who wait for a read of the whole value cut their part out of it."""
    plain = DictStore({"k": VALUE})
    for request in (*REQUESTS, *MALFORMED):
        source = GatedStore({"k": VALUE})
        store = CacheStore(source)
        source.shut["get"] = 1
        leader = asyncio.create_task(answer(store, "k", None if whole else request))
        await reached(source)
        followers = [asyncio.create_task(answer(store, "k", request)) for _ in range(3)]
        await asyncio.sleep(0)
        source.release()
        expected = await answer(plain, "k", request)
        assert await asyncio.gather(*followers) == [expected] * 3, request
        assert await leader == (VALUE if whole else expected)


async def test_get_ranges_suspended_the_same_key_can_be_read(source: Store) -> None:
    """A reader of the groups of `get_ranges` never waits for what it has to bring itself."""
    if not hasattr(Store, "get_ranges"):
        pytest.skip("zarr before 3.3 has no get_ranges")
    await source.set("k", buf(VALUE))
    store = CacheStore(source)
    # Too far apart to be joined, so that they come one by one.
    requests = [RangeByteRequest(n, n + 1) for n in range(0, 10, 3)]
    options: dict[str, Any] = {"prototype": PROTOTYPE, "max_gap_bytes": 0, "max_concurrency": 1}
    async for group in store.get_ranges("k", requests, **options):
        for number, value in group:
            assert value is not None
            assert value.to_bytes() == VALUE[number * 3 : number * 3 + 1]
        for request in requests:
            assert await asyncio.wait_for(answer(store, "k", request), 30)
    groups: Any = store.get_ranges("k", [OffsetByteRequest(n) for n in range(5)], **options)
    async for _ in groups:
        break
    # Left in the middle: no reader waits for what does not come any more.
    for n in range(5):
        assert await asyncio.wait_for(answer(store, "k", OffsetByteRequest(n)), 30) == VALUE[n:]
    await groups.aclose()
    assert in_flight(store) == (0, 0)
