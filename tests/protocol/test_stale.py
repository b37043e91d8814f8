"""Values past their age in place of errors of the source."""

from __future__ import annotations

import asyncio
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from pools import BESIDE_OTHERS, one_of, within_bound
from support import (
    PROTOTYPE,
    buf,
    check_quiet,
    drained,
    drained_sync,
    fill,
    logged,
    read,
    read_through,
    said,
)
from zcache import CachePool, CacheStore
from zcache.exceptions import OptionTypeError, OptionValueError
from zcache.testing import StoreDouble, entries

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zarr.abc.store import Store

    from zcache.testing import FakeClock


cache = one_of(BESIDE_OTHERS)


@pytest.fixture
def source() -> StoreDouble:
    return StoreDouble(MemoryStore())


def opened(source: Store, cache: Store | CachePool, clock: FakeClock, **options: Any) -> CacheStore:
    options = {"max_age_seconds": 10, "stale_if_error": 20} | options
    return CacheStore(source, cache_store=cache, clock=clock, source_id="source", **options)


async def test_stale_value_is_served_for_so_long_past_its_age_and_no_longer(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = opened(source, cache, clock)
    await fill(store, a=b"12345")
    source.fail("*", OSError("down"))
    clock.advance(29.5)
    hits = store.cache_stats()["hits"]
    assert await read_through(store, "a") == b"12345"
    assert await read_through(store, "a", RangeByteRequest(1, 3)) == b"23"
    if hasattr(store, "get_sync"):
        value = await asyncio.to_thread(store.get_sync, "a", prototype=PROTOTYPE)
        assert value is not None
        assert value.to_bytes() == b"12345"
    assert await store.exists("a")
    assert await store.getsize("a") == 5
    stats = store.cache_stats()
    reads = 3 if hasattr(store, "get_sync") else 2
    assert stats["stale_hits"] == reads + 2
    assert stats["hits"] == hits + reads
    clock.advance(0.5)
    with pytest.raises(OSError, match="down"):
        await read(store, "a")
    with pytest.raises(OSError, match="down"):
        await store.exists("a")
    source.heal()
    assert await read_through(store, "a") == b"12345"
    await check_quiet(store)


async def test_stale_default_raises_the_error(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = opened(source, cache, clock, stale_if_error=0)
    await fill(store, a=b"1")
    clock.advance(10)
    source.fail("get", OSError("down"))
    with pytest.raises(OSError, match="down"):
        await read(store, "a")
    assert store.cache_stats()["stale_hits"] == 0


async def test_stale_value_is_not_served_where_the_source_says_that_there_is_none(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = opened(source, cache, clock)
    await fill(store, a=b"1")
    await source.inner.delete("a")
    clock.advance(10)
    assert await read_through(store, "a") is None
    assert entries(store) == []
    await fill(store, b=b"1")
    await source.inner.delete("b")
    clock.advance(10)
    with pytest.raises(FileNotFoundError):
        await store.getsize("b")
    assert store.cache_stats()["stale_hits"] == 0
    await check_quiet(store)


async def test_stale_value_of_a_followed_flight_is_served_to_all(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = opened(source, cache, clock)
    strict = opened(source, cache, clock, stale_if_error=0)
    await fill(store, a=b"1")
    clock.advance(10)
    gate = source.block("get")
    source.fail("get", OSError("down"))
    reads = [asyncio.ensure_future(read(store, "a")) for _ in range(5)]
    others = [asyncio.ensure_future(read(strict, "a")) for _ in range(2)]
    await gate.entered_async()
    for _ in range(20):
        await asyncio.sleep(0)
    gate.release()
    assert await asyncio.gather(*reads) == [b"1"] * 5
    # A store that has not asked for it gets none.
    errors = await asyncio.gather(*others, return_exceptions=True)
    assert [str(error) for error in errors] == ["down"] * 2
    assert source.take()["get"] == 1
    assert store.cache_stats()["stale_hits"] == 5
    assert strict.cache_stats()["stale_hits"] == 0
    await check_quiet(store)


async def test_stale_values_of_a_batch_are_served_and_the_rest_raises(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = opened(source, cache, clock)
    await fill(store, a=b"12345", b=b"6")
    part = RangeByteRequest(0, 2)
    clock.advance(10)
    source.fail("*", OSError("down"))
    found = await store.get_partial_values(PROTOTYPE, [("a", part), ("b", None), ("a", part)])
    assert [value and value.to_bytes() for value in found] == [b"12", b"6", b"12"]
    with pytest.raises(OSError, match="down"):
        await store.get_partial_values(PROTOTYPE, [("a", part), ("unknown", None)])
    if hasattr(LocalStore, "get_ranges"):
        groups = [group async for group in store.get_ranges("a", [part, None], prototype=PROTOTYPE)]
        values = {number: value.to_bytes() for group in groups for number, value in group if value}
        assert values == {0: b"12", 1: b"12345"}
    await check_quiet(store)


async def test_stale_values_are_logged_once_a_minute_without_secrets(
    cache: Store | CachePool,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("zcache._protocol.stale.time.monotonic", lambda: now)
    source = StoreDouble(MemoryStore())
    store = opened(source, cache, clock, stale_if_error="infinity")
    await fill(store, a=b"1")
    clock.advance(1e6)
    source.fail("get", OSError("https://host/?X-Amz-Signature=secret"))
    with caplog.at_level(logging.WARNING, "zcache"):
        for _ in range(3):
            assert await read(store, "a") == b"1"
        assert [record.levelname for record in logged(caplog)] == ["WARNING"]
        assert "OSError" in caplog.text
        assert "stale_if_error" in caplog.text
        assert "secret" not in caplog.text
        now += 59
        assert await read(store, "a") == b"1"
        assert len(said(caplog)) == 1
        now += 1
        assert await read(store, "a") == b"1"
        assert len(said(caplog)) == 2


async def test_stale_value_that_others_have_evicted_or_damaged_raises_the_error(
    source: StoreDouble, tmp_path: Path, clock: FakeClock
) -> None:
    store = opened(source, LocalStore(tmp_path / "cache"), clock, verify="always")
    await fill(store, a=b"1", b=b"2")
    clock.advance(10)
    source.fail("get", OSError("down"))
    (tmp_path / "cache" / "a").unlink()
    (tmp_path / "cache" / "b").write_bytes(b"3")
    for key in ("a", "b"):
        with pytest.raises(OSError, match="down"):
            await read(store, key)
    assert store.cache_stats()["stale_hits"] == 0
    source.heal()
    assert await read_through(store, "a") == b"1"
    await check_quiet(store)


async def test_stale_value_is_not_the_first_to_go_while_it_is_of_use(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = within_bound(opened(source, cache, clock, max_size=20))
    await fill(store, stale=bytes(10), live=bytes(10))
    clock.advance(10)
    await source.inner.set("live", buf(bytes(10)))
    source.fail("get", OSError("down"), key="stale")
    assert await read_through(store, "live") == bytes(10)
    assert await read_through(store, "stale") == bytes(10)
    await fill(store, new=bytes(10))
    assert store.cache_stats()["expirations"] == 0
    assert await read_through(store, "stale") == bytes(10)
    await drained(store)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (-1, OptionValueError),
        (float("nan"), OptionValueError),
        (True, OptionTypeError),
        (None, OptionTypeError),
        ("soon", OptionValueError),
    ],
)
def test_stale_if_error_without_a_meaning_raises(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        CacheStore(MemoryStore(), stale_if_error=given)
    assert f"invalid stale_if_error: {given!r}. Give seconds" in str(caught.value)


async def names_in(store: Store, prefix: str) -> list[str]:
    return sorted([name async for name in store.list_dir(prefix)])


async def test_stale_listing_is_the_last_answer_while_the_source_raises(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = opened(source, cache, clock, max_age_seconds="infinity")
    await fill(store, **{"a/x": b"1", "a/y": b"2"})
    assert await names_in(store, "a") == ["x", "y"]
    assert await names_in(store, "none") == []
    clock.advance(1e6)
    source.fail("*", OSError("down"))
    for _ in range(2):  # A listing that fails leaves the answer where it is.
        assert await names_in(store, "a") == ["x", "y"]
    assert not await store.is_empty("a")
    assert await store.is_empty("none")
    assert store.cache_stats()["stale_hits"] == 4
    for prefix in ("b", ""):
        with pytest.raises(OSError, match="down"):
            await names_in(store, prefix)
        with pytest.raises(OSError, match="down"):
            await store.is_empty(prefix)
    strict = opened(source, cache, clock, stale_if_error=0)
    with pytest.raises(OSError, match="down"):
        await names_in(strict, "a")
    with pytest.raises(OSError, match="down"):
        await strict.is_empty("a")
    source.heal()
    await store.set("a/z", buf(b"3"))
    source.fail("*", OSError("down"))
    with pytest.raises(OSError, match="down"):
        await names_in(store, "a")


async def test_stale_listing_goes_on_where_the_source_stops(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = opened(source, cache, clock)
    await fill(store, **{"a/x": b"1", "a/y": b"2"})
    assert await names_in(store, "a") == ["x", "y"]
    source.fail("list_dir", OSError("down"), after=True)
    assert await names_in(store, "a") == ["x", "y"]
    # Errors of who takes the names are no errors of the source.
    names: Any = store.list_dir("a")
    await anext(names)
    with pytest.raises(OSError, match="mine"):
        await names.athrow(OSError("mine"))
    source.heal()
    source.fail("list_dir", FileNotFoundError("a"))
    with pytest.raises(FileNotFoundError):
        await names_in(store, "a")


async def test_listing_that_is_too_long_to_be_compared_raises(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    """What was given already is not known any more, and would come twice."""
    store = opened(source, cache, clock)
    await fill(store, **{"a/x": b"1", "a/y": b"2"})
    assert await names_in(store, "a") == ["x", "y"]
    for n in range(400):
        await source.inner.set(f"a/{n:0200}", buf(b"3"))
    source.fail("list_dir", OSError("down"), after=True)
    with pytest.raises(OSError, match="down"):
        await names_in(store, "a")


async def test_absence_is_not_served_in_place_of_an_error_by_who_remembers_none(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    remembers = opened(source, cache, clock)
    assert await read(remembers, "a") is None
    store = opened(source, cache, clock, cache_missing=False)
    source.fail("*", OSError("down"))
    clock.advance(11)
    assert await read(remembers, "a") is None
    with pytest.raises(OSError, match="down"):
        await read(store, "a")


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"max_age_seconds": 0},
        {"max_age_seconds": 0, "revalidate": True},
        {"max_age_seconds": "infinity", "metadata_max_age_seconds": 0},
        {"max_age_seconds": {"**/zarr.json": 0, "**/.z*": 0}},
    ],
)
def test_stale_dataset_of_any_age_opens_while_the_source_raises(
    source: StoreDouble,
    cache: Store | CachePool,
    clock: FakeClock,
    options: dict[str, Any],
    zarr_format: Any,
) -> None:
    made = zarr.create_group(source.inner, zarr_format=zarr_format, attributes={"title": "t"})
    array = made.create_array("x", shape=(4,), chunks=(2,), dtype="i4", attributes={"unit": "m"})
    array[:] = np.arange(4)
    store = opened(source, cache, clock, **options)

    def look() -> list[Any]:
        group: Any = zarr.open(store, mode="r")
        return [dict(group.attrs), group["x"][:].tolist(), dict(group["x"].attrs)]

    expected = look()
    drained_sync(store)
    clock.advance(15)
    source.fail("*", OSError("down"))
    assert look() == expected
    assert store.cache_stats()["stale_hits"] > 0
    clock.advance(20)
    if options.get("max_age_seconds") != "infinity":
        with pytest.raises(OSError, match="down"):
            look()


@pytest.mark.parametrize("max_age", [0, 10])
@pytest.mark.parametrize("cached", [".zgroup", "zarr.json"])
async def test_stale_document_does_not_stand_for_what_is_not_known_of_its_node(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock, cached: str, max_age: int
) -> None:
    """A node may be in both formats: who opens it to write would overwrite the one that seems to be missing."""
    store = opened(source, cache, clock, max_age_seconds=max_age)
    await fill(store, **{f"g/{cached}": b"{}"})
    others = [name for name in (".zgroup", ".zattrs", ".zmetadata", "zarr.json") if name != cached]
    for name in others:
        await source.inner.set(f"g/{name}", buf(b"{}"))
    clock.advance(max_age + 1)
    source.fail("*", OSError("down"))
    assert await read(store, f"g/{cached}") == b"{}"
    for name in others:
        with pytest.raises(OSError, match="down"):
            await read(store, f"g/{name}")
        with pytest.raises(OSError, match="down"):
            await store.exists(f"g/{name}")
    await check_quiet(store)


async def test_stale_absence_beside_an_age_of_0_is_served_in_place_of_an_error(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = opened(source, cache, clock, max_age_seconds=0)
    assert await read(store, "a") is None
    await drained(store)
    source.fail("*", OSError("down"))
    clock.advance(19)
    assert await read(store, "a") is None
    clock.advance(1)
    with pytest.raises(OSError, match="down"):
        await read(store, "a")


class Answering(BaseHTTPRequestHandler):
    """Answers each request with the status that its server has."""

    def do_GET(self) -> None:
        status = self.server.status  # type: ignore[attr-defined]
        body = b"12345" if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - so it is called

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def http() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.daemon_threads = True
    server.status = 200
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("options", [{}, {"revalidate": True}])
async def test_stale_value_of_http_is_served_where_fsspec_says_that_there_is_none(
    http: Any, cache: Store | CachePool, clock: FakeClock, options: dict[str, Any]
) -> None:
    pytest.importorskip("aiohttp")
    source = FsspecStore.from_url(
        f"http://127.0.0.1:{http.server_port}", storage_options={"skip_instance_cache": True}
    )
    fs: Any = source.fs
    async with await fs.set_session():  # Closed at the end.
        store = opened(source, cache, clock, **options)
        assert await read_through(store, "a") == b"12345"
        clock.advance(10)
        for status in (503, 403):
            http.status = status
            assert await read(store, "a") == b"12345"
            assert await store.getsize("a") == 5
        assert store.cache_stats()["stale_hits"] == 4
        http.status = 404
        with pytest.raises(FileNotFoundError):
            await store.getsize("a")
        assert await read(store, "a") is None
        assert store.cache_stats()["stale_hits"] == 4


def caused(cause: BaseException) -> FileNotFoundError:
    error = FileNotFoundError("a")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_served"),
    [
        (caused(ConnectionRefusedError()), True),
        (caused(TimeoutError()), True),
        (caused(caused(PermissionError())), True),
        (caused(FileNotFoundError()), False),
        (caused(IsADirectoryError()), False),
        (caused(RuntimeError("404")), False),
        (FileNotFoundError("a"), False),
    ],
)
async def test_stale_size_by_the_cause_of_the_error(
    source: StoreDouble,
    cache: Store | CachePool,
    clock: FakeClock,
    error: Exception,
    is_served: bool,
) -> None:
    store = opened(source, cache, clock)
    await fill(store, a=b"12345")
    assert await read_through(store, "a") == b"12345"
    clock.advance(10)
    source.fail("getsize", error)
    if is_served:
        assert await store.getsize("a") == 5
    else:
        with pytest.raises(FileNotFoundError):
            await store.getsize("a")


@pytest.mark.parametrize(("given", "words"), [(20, "up to 20 s past"), ("infinity", "of any age")])
async def test_stale_log_says_how_old(
    source: StoreDouble,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    given: Any,
    words: str,
) -> None:
    store = opened(source, MemoryStore(), clock, stale_if_error=given)
    await fill(store, a=b"1")
    clock.advance(10)
    source.fail("get", OSError("down"))
    with caplog.at_level(logging.WARNING, "zcache"):
        assert await read(store, "a") == b"1"
    assert words in caplog.text
