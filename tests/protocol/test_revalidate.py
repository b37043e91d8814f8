"""Values that are too old are compared with the source before they are read again."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import FsspecStore, LocalStore, LoggingStore, MemoryStore, ObjectStore

from pools import BESIDE_OTHERS, one_of
from support import PROTOTYPE, buf, check_quiet, drained, fill, read, read_through
from zcache import CachePool, CacheStore
from zcache.exceptions import OptionTypeError, OptionValueError
from zcache.testing import StoreDouble, stored_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache.testing import FakeClock

# A comparison that never ends fails its test, long before `timeout` of all tests.
pytestmark = pytest.mark.timeout(60)

PARTS: list[ByteRequest | None] = [
    None,
    RangeByteRequest(1, 3),
    OffsetByteRequest(2),
    SuffixByteRequest(2),
]


cache = one_of(BESIDE_OTHERS)


@pytest.fixture
def source(tmp_path: Path) -> StoreDouble:
    return StoreDouble(LocalStore(tmp_path / "source"))


def opened(source: Store, cache: Store | CachePool, clock: FakeClock, **options: Any) -> CacheStore:
    options = {"max_age_seconds": 10, "revalidate": True, "source_id": "source"} | options
    return CacheStore(source, cache_store=cache, clock=clock, **options)


@pytest.mark.parametrize("part", PARTS)
async def test_revalidate_same_value_starts_its_age_anew_for_one_small_request(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock, part: ByteRequest | None
) -> None:
    await source.inner.set("a", buf(b"12345"))
    store = opened(source, cache, clock)
    first = await read_through(store, "a", part)
    clock.advance(10)
    source.take()
    hits = store.cache_stats()["hits"]
    assert await read_through(store, "a", part) == first
    assert source.take() == {"validator": 1}
    clock.advance(9)
    assert await read_through(store, "a", part) == first
    assert source.take() == {}
    assert store.cache_stats()["hits"] == hits + 2
    clock.advance(1)
    assert await read_through(store, "a", part) == first
    assert source.take() == {"validator": 1}
    await check_quiet(store)


@pytest.mark.parametrize("part", PARTS)
async def test_revalidate_another_value_is_read_again(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock, part: ByteRequest | None
) -> None:
    await source.inner.set("a", buf(b"12345"))
    store = opened(source, cache, clock)
    assert await read_through(store, "a", part) is not None
    await source.inner.set("a", buf(b"67890"))
    clock.advance(10)
    source.take()
    expected = await read(source.inner, "a", part)
    assert await read_through(store, "a", part) == expected
    assert source.take() == {"validator": 2, "get": 1}
    clock.advance(10)
    assert await read_through(store, "a", part) == expected
    assert source.take() == {"validator": 1}
    await check_quiet(store)


async def test_revalidate_value_that_is_gone_is_dropped(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"1"))
    store = opened(source, cache, clock)
    assert await read_through(store, "a") == b"1"
    await source.inner.delete("a")
    clock.advance(10)
    assert await read_through(store, "a") is None
    assert stored_sizes(store) == {}
    source.take()
    assert await read_through(store, "a") is None
    assert source.take() == {}
    await check_quiet(store)


async def test_revalidate_source_that_tells_nothing_is_read_again(
    cache: Store | CachePool, clock: FakeClock
) -> None:
    for source in (StoreDouble(MemoryStore()), StoreDouble(LoggingStore(MemoryStore()))):
        store = opened(source, MemoryStore(), clock)
        await fill(store, a=b"1")
        clock.advance(10)
        source.take()
        assert await read_through(store, "a") == b"1"
        assert source.take()["get"] == 1
        await check_quiet(store)
    plain = StoreDouble(MemoryStore())
    plain.fail("validator", PermissionError("HEAD is not allowed"))
    store = opened(plain, cache, clock)
    await plain.inner.set("a", buf(b"1"))
    assert await read_through(store, "a") == b"1"
    clock.advance(10)
    assert await read_through(store, "a") == b"1"


async def test_revalidate_metadata_compares_metadata_documents_only(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    for key in ("a/zarr.json", "a/c/0"):
        await source.inner.set(key, buf(b"1"))
    store = opened(source, cache, clock, revalidate="metadata")
    for key in ("a/zarr.json", "a/c/0"):
        assert await read_through(store, key) == b"1"
    clock.advance(10)
    source.take()
    assert await read_through(store, "a/zarr.json") == b"1"
    assert source.take() == {"validator": 1}
    assert await read_through(store, "a/c/0") == b"1"
    assert source.take() == {"get": 1}


async def test_revalidate_off_asks_for_no_validators(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"1"))
    store = opened(source, cache, clock, revalidate=False)
    for _ in range(2):
        assert await read_through(store, "a") == b"1"
        clock.advance(10)
    assert source.take() == {"get": 2}


async def test_revalidate_age_zero_compares_each_time(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"1"))
    store = opened(source, cache, clock, max_age_seconds=0)
    assert await read_through(store, "a") == b"1"
    source.take()
    for _ in range(3):
        clock.advance(0.001)
        assert await read_through(store, "a") == b"1"
    assert source.take() == {"validator": 3}


async def test_revalidate_many_readers_compare_once(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"12345"))
    store = opened(source, cache, clock)
    for part in PARTS[1:]:
        assert await read_through(store, "a", part) is not None
    clock.advance(10)
    source.take()
    gate = source.block("validator")
    reads = [asyncio.ensure_future(read(store, "a", part)) for part in PARTS[1:] * 3]
    await gate.entered_async()
    for _ in range(20):
        await asyncio.sleep(0)
    gate.release()
    assert await asyncio.gather(*reads) == [b"23", b"345", b"45"] * 3
    assert source.take() == {"validator": 1}
    await check_quiet(store)


async def test_revalidate_reader_that_is_cancelled_leaves_the_comparison_to_the_next(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"12345"))
    store = opened(source, cache, clock)
    for part in PARTS[1:3]:
        assert await read_through(store, "a", part) is not None
    clock.advance(10)
    source.take()
    gate = source.block("validator", times=1)
    first, second = [asyncio.ensure_future(read(store, "a", part)) for part in PARTS[1:3]]
    await gate.entered_async()
    for _ in range(20):
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == b"345"
    # It has made the comparison anew, and read nothing.
    assert source.take() == {"validator": 2}
    gate.release()
    await check_quiet(store)


async def test_revalidate_one_comparison_dates_all_parts_of_a_key(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"12345"))
    store = opened(source, cache, clock)
    for part in PARTS[1:]:
        assert await read_through(store, "a", part) is not None
    clock.advance(10)
    source.take()
    for part in PARTS[1:]:
        assert await read_through(store, "a", part) is not None
    assert source.take() == {"validator": 1}


async def test_revalidate_batches_compare_each_key_once(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    for key in ("a", "b", "c"):
        await source.inner.set(key, buf(b"12345"))
    store = opened(source, cache, clock)
    requests: list[tuple[str, ByteRequest | None]] = [
        ("a", PARTS[1]),
        ("a", PARTS[2]),
        ("b", None),
        ("c", PARTS[3]),
    ]
    expected = [b"23", b"345", b"12345", b"45"]

    async def values() -> list[bytes | None]:
        found = await store.get_partial_values(PROTOTYPE, requests)
        await drained(store)
        return [value and value.to_bytes() for value in found]

    assert await values() == expected
    clock.advance(10)
    source.take()
    assert await values() == expected
    assert source.take() == {"validator": 3}
    await source.inner.set("b", buf(b"67890"))
    clock.advance(10)
    assert await values() == [b"23", b"345", b"67890", b"45"]
    assert source.take_requests() is not None
    clock.advance(10)
    source.take()
    assert await values() == [b"23", b"345", b"67890", b"45"]
    assert source.take() == {"validator": 3}
    if hasattr(LocalStore, "get_ranges"):
        clock.advance(10)
        source.take()
        groups = [group async for group in store.get_ranges("a", PARTS[1:3], prototype=PROTOTYPE)]
        found = {number: value.to_bytes() for group in groups for number, value in group if value}
        assert found == {0: b"23", 1: b"345"}
        assert source.take() == {"validator": 1}
    await check_quiet(store)


async def test_revalidate_batches_compare_all_keys_at_a_time(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    keys = [f"k{number}" for number in range(20)]
    for key in keys:
        await source.inner.set(key, buf(b"12345"))
    store = opened(source, cache, clock)
    requests = [(key, part) for key in keys for part in (PARTS[1], PARTS[2])]
    # Before a first read and after it; and then in a comparison.
    for rounds, values in ((2, 1), (1, 0)):
        source.take()
        gate = source.block("validator", times=len(keys))
        reading = asyncio.ensure_future(store.get_partial_values(PROTOTYPE, requests))
        for _ in range(rounds):
            await gate.entered_async(len(keys))
            before, gate = gate, source.block("validator", times=len(keys))
            before.release()
        source.heal()
        found = await reading
        assert [value and value.to_bytes() for value in found] == [b"23", b"345"] * len(keys)
        counts = source.take()
        assert counts["validator"] == rounds * len(keys)
        assert counts["get_partial_values"] == values
        await drained(store)
        clock.advance(10)
    await check_quiet(store)


async def test_revalidate_write_in_between_voids_the_comparison(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"old"))
    store = opened(source, cache, clock)
    assert await read_through(store, "a") == b"old"
    clock.advance(10)
    gate = source.block("validator", times=1, after=True)
    reading = asyncio.ensure_future(read(store, "a"))
    await gate.entered_async()
    await store.set("a", buf(b"new"))
    gate.release()
    assert await reading in (b"old", b"new")
    assert await read_through(store, "a") == b"new"
    clock.advance(10)
    assert await read_through(store, "a") == b"new"
    await check_quiet(store)


class Versions(MemoryStore):
    """A source of which the value changes at every await, and is its own validator."""

    def __init__(self) -> None:
        super().__init__()
        self.version = 0
        self.stops = False

    async def step(self) -> None:
        await asyncio.sleep(0)
        if not self.stops:
            self.version += 1

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        await self.step()
        found = b"%09d" % self.version
        await self.step()
        values = MemoryStore({key: buf(found)})
        return await values.get(key, prototype or PROTOTYPE, byte_range)

    async def validator(self, key: str) -> str | None:
        await self.step()
        return f"{self.version:09d}"


@pytest.mark.parametrize("part", PARTS)
async def test_revalidate_never_pairs_bytes_with_the_validator_of_others(
    cache: Store | CachePool, clock: FakeClock, part: ByteRequest | None
) -> None:
    source = Versions()
    store = opened(source, cache, clock)
    for stops_at in range(12):
        source.stops = False
        reading = asyncio.ensure_future(read_through(store, "a", part))
        for _ in range(stops_at):
            await asyncio.sleep(0)
        source.stops = True
        await reading
        clock.advance(10)
        now = await read(source, "a", part)
        assert await read_through(store, "a", part) == now
        if part is not None and hasattr(store, "get_ranges_sync"):
            source.stops = False
            async for _ in store.get_ranges("a", [part, None], prototype=PROTOTYPE):
                pass
            source.stops = True
            clock.advance(10)
            now = await read(source, "a", part)
            async for group in store.get_ranges("a", [part], prototype=PROTOTYPE):
                assert [value and value.to_bytes() for _, value in group] == [now]
        clock.advance(10)
    await check_quiet(store)


async def test_revalidate_validators_survive_the_process_that_has_read(
    source: StoreDouble, tmp_path: Path, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"12345"))
    store = opened(source, LocalStore(tmp_path / "cache"), clock)
    assert await read_through(store, "a") == b"12345"
    clock.advance(10)
    source.take()
    del store
    again = opened(source, LocalStore(tmp_path / "cache"), clock)
    assert await read_through(again, "a") == b"12345"
    assert source.take() == {"validator": 1}
    await check_quiet(again)


async def test_revalidate_source_that_is_down_is_replaced_by_stale_values(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"1"))
    store = opened(source, cache, clock, stale_if_error=20)
    assert await read_through(store, "a") == b"1"
    clock.advance(10)
    source.fail("*", OSError("down"))
    assert await read_through(store, "a") == b"1"
    assert store.cache_stats()["stale_hits"] == 1


@pytest.mark.parametrize("part", PARTS)
async def test_revalidate_source_that_is_down_is_asked_once_for_each_of_both(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock, part: ByteRequest | None
) -> None:
    await source.inner.set("a", buf(b"12345"))
    store = opened(source, cache, clock)
    assert await read_through(store, "a", part) is not None
    clock.advance(10)
    source.fail("*", OSError("down"))
    source.take()
    with pytest.raises(OSError, match="down"):
        await read(store, "a", part)
    assert source.take() == {"validator": 1, "get": 1}
    with pytest.raises(OSError, match="down"):
        await read(store, "b", part)
    assert source.take() == {"validator": 1, "get": 1}
    await check_quiet(store)


async def test_revalidate_key_that_is_gone_is_read_at_once(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"1"))
    store = opened(source, cache, clock)
    assert await read_through(store, "a") == b"1"
    await source.inner.delete("a")
    clock.advance(10)
    source.take()
    assert await read_through(store, "a") is None
    assert source.take() == {"validator": 1, "get": 1}
    # It went between the comparison and the read: nothing is left to compare.
    await source.inner.set("b", buf(b"1"))
    gate = source.block("validator", key="b", after=True)
    reading = asyncio.ensure_future(read(store, "b"))
    await gate.entered_async()
    await source.inner.delete("b")
    gate.release()
    assert await reading is None
    assert source.take() == {"validator": 1, "get": 1}
    await check_quiet(store)


async def test_revalidate_without_an_event_loop(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    await source.inner.set("a", buf(b"12345"))
    store = opened(source, cache, clock)
    if not hasattr(store, "get_sync") or not store._supports_sync_io:
        pytest.skip("zarr has no synchronous stores")
    for requests in ({"validator": 2, "get": 1}, {"validator": 1}, {"validator": 1}):
        value = await asyncio.to_thread(store.get_sync, "a", prototype=PROTOTYPE)
        assert value is not None
        assert value.to_bytes() == b"12345"
        await drained(store)
        clock.advance(10)
        assert source.take() == requests


# ------------------------------------------------------------------------------- sources


def changed(path: Path) -> None:
    """Change a file in place, to the same size."""
    before = path.stat()
    path.write_bytes(b"6" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("part", PARTS)
async def test_revalidate_local_files_by_time_and_size(
    tmp_path: Path, clock: FakeClock, part: ByteRequest | None
) -> None:
    source = LoggingStore(LocalStore(tmp_path / "source"))
    await source._store.set("a", buf(b"12345"))
    store = opened(source, MemoryStore(), clock)
    first = await read_through(store, "a", part)
    clock.advance(10)
    # Not seen by a comparison, so it is served from the cache.
    path = tmp_path / "source" / "a"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"00000")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert await read_through(store, "a", part) == first
    clock.advance(10)
    changed(path)
    assert await read_through(store, "a", part) != first
    clock.advance(10)
    path.unlink()
    assert await read_through(store, "a", part) is None


@pytest.mark.parametrize("part", PARTS)
async def test_revalidate_obstore_by_etag_with_one_request_for_both(
    clock: FakeClock, part: ByteRequest | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstore = pytest.importorskip("obstore")
    inner = pytest.importorskip("obstore.store").MemoryStore()
    source = ObjectStore(inner)
    await source.set("a", buf(b"12345"))
    calls: list[str] = []
    real = {name: getattr(obstore, name) for name in ("get_async", "get_range_async", "head_async")}
    for name in real:

        def counted(*args: Any, _name: str = name, **more: Any) -> Any:
            calls.append(_name)
            return real[_name](*args, **more)

        monkeypatch.setattr(obstore, name, counted)
    store = opened(source, MemoryStore(), clock)
    expected = await read(source, "a", part)
    calls.clear()
    assert await read_through(store, "a", part) == expected
    assert calls == ["get_async"]
    clock.advance(10)
    assert await read_through(store, "a", part) == expected
    assert calls == ["get_async", "head_async"]
    await source.set("a", buf(b"67890"))
    clock.advance(10)
    assert await read_through(store, "a", part) == await read(source, "a", part) != expected
    await source.delete("a")
    clock.advance(10)
    assert await read_through(store, "a", part) is None


async def test_revalidate_obstore_repeats_no_read_that_has_failed(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstore = pytest.importorskip("obstore")
    source = ObjectStore(pytest.importorskip("obstore.store").MemoryStore())
    await source.set("a", buf(b"12345"))
    store = opened(source, MemoryStore(), clock)
    assert await read_through(store, "a") == b"12345"
    clock.advance(10)
    calls: list[str] = []
    for name in ("get_async", "get_range_async", "head_async"):

        async def down(*_: Any, _name: str = name, **__: Any) -> Any:
            calls.append(_name)
            raise OSError("down")

        monkeypatch.setattr(obstore, name, down)
    with pytest.raises(OSError, match="down"):
        await read(store, "a")
    assert calls == ["head_async", "get_async"]


@pytest.mark.parametrize(
    ("info", "compared"),
    [
        ({"ETag": '"abc"', "size": 5}, True),
        ({"etag": "abc", "size": 5}, True),
        ({"etag": "x" * 500}, True),
        ({"ETag": 'W/"abc"', "size": 5, "LastModified": 1}, False),
        ({"LastModified": 17, "size": 5}, True),
        ({"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT", "size": 5}, False),
        ({"size": 5}, False),
    ],
)
async def test_revalidate_fsspec_by_what_its_info_says(
    clock: FakeClock, info: dict[str, Any], compared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FsspecStore.from_url("memory://revalidate")
    await source.set("a", buf(b"12345"))
    asked: list[str] = []

    async def told(path: str, **_: Any) -> dict[str, Any]:
        asked.append(path)
        return {"name": path, "type": "file", **info}

    monkeypatch.setattr(source.fs, "_info", told)
    store = opened(source, MemoryStore(), clock, source_id="memory")
    assert await read_through(store, "a") == b"12345"
    await source.set("a", buf(b"67890"))
    clock.advance(10)
    asked.clear()
    # Its info still says the same.
    assert await read_through(store, "a") == (b"12345" if compared else b"67890")
    assert all(path.endswith("revalidate/a") for path in asked)
    await source.delete("a")


@pytest.mark.parametrize(
    ("given", "error"),
    [(1, OptionTypeError), (None, OptionTypeError), ("data", OptionValueError)],
)
def test_revalidate_without_a_meaning_raises(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"invalid revalidate: {given!r}. Give True"):
        CacheStore(MemoryStore(), revalidate=given)
