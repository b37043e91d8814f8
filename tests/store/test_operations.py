"""Each operation of the surface through the cache: what it answers, and what it leaves cached."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    SuffixByteRequest,
)
from zarr.storage import LocalStore, MemoryStore

from doubles import WatchedStore
from support import PROTOTYPE, buf, check_quiet, drained, fill, listed, read, read_through, write
from zcache import CacheStore
from zcache.testing import FakeClock, StoreDouble, check_invariants_async, stored_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store


@pytest.fixture(params=["memory", "local"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> StoreDouble:
    """A source that counts what reaches it."""
    inner = MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "source")
    return StoreDouble(inner)


@pytest.fixture(params=["memory", "local", "wrapped"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Cache stores that take each their own way through the code."""
    if request.param == "local":
        return LocalStore(tmp_path / "cache")
    return MemoryStore() if request.param == "memory" else WatchedStore(MemoryStore())


async def agree(store: CacheStore, key: str) -> bytes | None:
    """Assert that the three ways to ask for a key agree; returns its value."""
    exists = await store.exists(key)
    try:
        size = await store.getsize(key)
    except FileNotFoundError:
        size = None
    value = await read_through(store, key)
    assert exists is (value is not None)
    assert size == (None if value is None else len(value))
    # And once more, now that it was read.
    assert await store.exists(key) is exists
    return value


async def test_exists_and_getsize_agree_with_get(source: StoreDouble, clock: FakeClock) -> None:
    behind = source.inner
    store = CacheStore(source, max_age_seconds=10, cache_set_data=False, clock=clock)
    assert await agree(store, "a") is None
    await behind.set("a", buf(b"123"))
    assert await agree(store, "a") is None
    clock.advance(10)
    assert await agree(store, "a") == b"123"
    # What others do to the source is not seen before the entry expires, by none of the three.
    await behind.set("a", buf(b"12345"))
    assert await agree(store, "a") == b"123"
    await behind.delete("a")
    assert await agree(store, "a") == b"123"
    clock.advance(10)
    assert await agree(store, "a") is None
    await behind.set("a", buf(b""))
    clock.advance(10)
    assert await agree(store, "a") == b""
    await store.delete("a")
    assert await agree(store, "a") is None
    # A range that is cached is not the value.
    await behind.set("b", buf(b"12345"))
    assert await read_through(store, "b", RangeByteRequest(0, 2)) == b"12"
    assert await store.getsize("b") == 5
    await behind.delete("b")
    assert not await store.exists("b")
    await check_quiet(store)


async def test_exists_and_getsize_of_what_is_cached_ask_nobody(source: StoreDouble) -> None:
    store = CacheStore(source)
    await fill(store, a=b"123")
    source.take()
    assert await store.exists("a")
    assert await store.getsize("a") == 3
    assert source.take() == {}
    assert not await store.exists("b")
    with pytest.raises(FileNotFoundError):
        await store.getsize("b")
    assert source.take() == {"exists": 1, "getsize": 1}


async def test_getsize_prefix(source: StoreDouble) -> None:
    store = CacheStore(source)
    await fill(store, **{"a/b": b"1", "a/c/d": b"22", "ab/c": b"333"})
    assert await store.getsize_prefix("a/") == 3
    assert await store.getsize_prefix("") == 6


async def test_listings_come_from_the_source(source: StoreDouble) -> None:
    store = CacheStore(source)
    await fill(store, **{"a/b": b"1", "a/c/d": b"22", "e": b"333"})
    await source.inner.delete("a/b")
    await source.inner.set("a/new", buf(b"1"))
    assert "a/b" in stored_sizes(store)
    assert await listed(store.list()) == ["a/c/d", "a/new", "e"]
    assert await listed(store.list_prefix("a/")) == ["a/c/d", "a/new"]
    assert await listed(store.list_dir("a")) == ["c", "new"]
    assert await listed(store.list_dir("")) == ["a", "e"]
    assert not await store.is_empty("a/c")
    assert await store.is_empty("b")
    await source.inner.delete_dir("a")
    assert await store.is_empty("a")


async def test_set_if_not_exists(source: StoreDouble) -> None:
    store = CacheStore(source)
    await store.set_if_not_exists("a", buf(b"1"))
    assert await read_through(store, "a") == b"1"
    await store.set_if_not_exists("a", buf(b"2"))
    assert await agree(store, "a") == b"1"
    # The source decides, not what is cached.
    await source.inner.delete("a")
    await store.set_if_not_exists("a", buf(b"3"))
    assert await agree(store, "a") == b"3"
    await source.inner.set("b", buf(b"4"))
    await store.set_if_not_exists("b", buf(b"5"))
    assert await agree(store, "b") == b"4"
    assert source.take()["set_if_not_exists"] == 4
    await check_quiet(store)


async def test_delete(source: StoreDouble, cache: Store) -> None:
    store = CacheStore(source, cache_store=cache)
    await fill(store, **{"a/b": b"1", "a/bc": b"2", "d": b"3"})
    await store.delete("a/b")
    assert await agree(store, "a/b") is None
    assert stored_sizes(store) == {"a/bc": 1, "d": 1}
    await store.delete("a/b")
    await store.delete("never there")
    assert await agree(store, "a/bc") == b"2"
    await check_quiet(store)


async def test_delete_dir(source: StoreDouble, cache: Store) -> None:
    store = CacheStore(source, cache_store=cache)
    names = ["a/x", "a/b/x", "a/b/c/x", "ab/x", "a b/x", "x"]
    await fill(store, **dict.fromkeys(names, b"1"))
    assert await read_through(store, "a/b/x", RangeByteRequest(0, 1)) == b"1"
    await store.delete_dir("a/b")
    assert sorted(stored_sizes(store)) == ["a b/x", "a/x", "ab/x", "x"]
    await store.delete_dir("a/")
    assert sorted(stored_sizes(store)) == ["a b/x", "ab/x", "x"]
    for name in names:
        assert (await agree(store, name) is None) is name.startswith("a/")
    await store.delete_dir("")
    assert stored_sizes(store) == {}
    assert await store.is_empty("")
    assert source.take()["delete_dir"] == 3
    await check_quiet(store)


async def test_clear(source: StoreDouble, cache: Store) -> None:
    store = CacheStore(source, cache_store=cache)
    await fill(store, **{"a/x": b"1", "b": b"2"})
    await read_through(store, "b", RangeByteRequest(0, 1))
    await store.clear()
    assert stored_sizes(store) == {}
    assert await listed(store.list()) == []
    assert await agree(store, "b") is None
    assert store.cache_info()["current_size"] == 0
    await fill(store, b=b"3")
    assert await agree(store, "b") == b"3"
    await check_quiet(store)


async def test_set_many_and_get_many(source: StoreDouble, cache: Store) -> None:
    store = CacheStore(source, cache_store=cache, max_size=10)
    values = {f"k{number}": bytes([number]) * 3 for number in range(6)}
    await store._set_many((key, buf(value)) for key, value in values.items())
    await drained(store)
    assert len(stored_sizes(store)) == 3
    await check_quiet(store)
    source.take()
    asked = [*values, "missing", "k0"]
    found = [
        (key, None if value is None else value.to_bytes())
        async for key, value in store._get_many((key, PROTOTYPE, None) for key in asked)
    ]
    assert sorted(found, key=str) == sorted(((key, values.get(key)) for key in asked), key=str)
    assert source.take().keys() <= {"get"}
    part = [item async for item in store._get_many([("k1", PROTOTYPE, RangeByteRequest(0, 2))])]
    assert [(key, value.to_bytes()) for key, value in part if value] == [("k1", b"\1\1")]
    assert [item async for item in store._get_many([])] == []
    await check_quiet(store)


async def test_get_many_stops_with_its_reader(source: StoreDouble) -> None:
    store = CacheStore(source)
    await fill(store, **{f"k{number}": b"1" for number in range(50)})
    await store.clear_cache()
    results = store._get_many((f"k{number}", PROTOTYPE, None) for number in range(50))
    async for _ in results:
        break
    await results.aclose()
    await check_quiet(store)


async def test_the_source_alone_raises(clock: FakeClock) -> None:
    """An error of the source reaches the caller as it is; one of the cache store never does."""
    source, cache = StoreDouble(MemoryStore()), StoreDouble(MemoryStore())
    store = CacheStore(source, cache_store=cache, clock=clock)
    await fill(store, a=b"1")
    wrong = OSError(28, "No space left on device")
    for method in ("get", "set", "delete", "exists"):
        cache.fail(method, wrong)
    assert await read_through(store, "a") == b"1"
    await write(store, "a", b"22")
    assert await agree(store, "a") == b"22"
    await store.delete("a")
    assert await agree(store, "a") is None
    assert store.cache_stats()["cache_failures"] > 0
    await check_invariants_async(store)
    for method in ("get", "set", "delete", "exists", "getsize"):
        source.fail(method, PermissionError(method))
    for attempt in (
        *(read(store, "b"), store.set("b", buf(b"1")), store.delete("b")),
        *(store.exists("b"), store.getsize("b")),
    ):
        with pytest.raises(PermissionError):
            await attempt


async def test_failed_write_leaves_nothing_cached() -> None:
    source = StoreDouble(MemoryStore())
    store = CacheStore(source)
    await fill(store, a=b"1")
    for after, expected in ((False, b"1"), (True, b"3")):
        source.fail("set", OSError("lost"), after=after)
        with pytest.raises(OSError, match="lost"):
            await store.set("a", buf(b"3"))
        assert stored_sizes(store) == {}
        source.heal()
        assert await agree(store, "a") == expected
    await check_quiet(store)


async def test_the_cache_keeps_its_own_copy() -> None:
    """The caller may use its memory again as soon as the write has returned."""
    memory = np.frombuffer(b"12345", "B").copy()
    store = CacheStore(MemoryStore())
    await store.set("a", PROTOTYPE.buffer.from_array_like(memory))
    memory[:] = 0
    assert await read_through(store, "a") == b"12345"


RANGES: list[ByteRequest | None] = [
    None,
    *(RangeByteRequest(a, b) for a, b in itertools.combinations_with_replacement(range(8), 2)),
    *(OffsetByteRequest(n) for n in range(8)),
    *(SuffixByteRequest(n) for n in range(8)),
]


@pytest.mark.parametrize("size", [0, 1, 5])
async def test_each_range_is_what_the_source_says(
    source: StoreDouble, cache: Store, size: int
) -> None:
    """Cold, warm, out of a full value and out of another range."""
    value = bytes(range(size))
    await source.inner.set("a", buf(value))

    async def ask(store: Store, request: ByteRequest | None) -> Any:
        try:
            return await read_through(store, "a", request)
        except Exception as error:  # noqa: BLE001
            return type(error)

    answers = {request: await ask(source, request) for request in RANGES}
    for suffix in range(size + 1, 8):
        # `MemoryStore` before zarr 3.2 gives only the end of a value that is shorter than asked.
        if answers[SuffixByteRequest(suffix)] != value:
            del answers[SuffixByteRequest(suffix)]
    store = CacheStore(source, cache_store=cache)
    for _ in range(2):
        for request, answer in answers.items():
            if request is not None:
                assert await ask(store, request) == answer, request
    assert await read_through(store, "a") == value
    for request, answer in answers.items():
        assert await ask(store, request) == answer, request
    await check_quiet(store)
