"""A store that never asks its source."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

import zcache
from pools import BESIDE_OTHERS, one_of
from support import (
    PROTOTYPE,
    buf,
    check_quiet,
    drained,
    drained_sync,
    fill,
    read,
    read_through,
    value_sync,
)
from zcache import CachePool, CacheStore, OfflineError
from zcache.exceptions import IndexLockTimeout, OptionTypeError
from zcache.testing import StoreDouble, hold_index_lock

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

    from zcache.testing import FakeClock


cache = one_of(BESIDE_OTHERS)


@pytest.fixture
def source() -> StoreDouble:
    return StoreDouble(MemoryStore())


def opened(source: Store, cache: Store | CachePool, **options: Any) -> CacheStore:
    return CacheStore(source, cache_store=cache, source_id="source", **options)


@pytest.mark.parametrize("mode", [True, "metadata"])
async def test_offline_compares_nothing_with_the_source(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock, mode: Any
) -> None:
    keys = ["a/c/0", "a/zarr.json"]
    options: dict[str, Any] = {"max_age_seconds": 10, "revalidate": mode, "clock": clock}
    online = opened(source, cache, **options)
    for key in keys:
        await source.inner.set(key, buf(b"12345"))
        assert await read_through(online, key) == b"12345"
    clock.advance(100)
    source.take()
    store = opened(source, cache, **options, offline=True)
    part = RangeByteRequest(1, 3)
    for key in keys:
        assert await read(store, key) == b"12345"
    for key in ("a/c/1", "b/zarr.json"):
        with pytest.raises(OfflineError):
            await store.get_partial_values(PROTOTYPE, [(key, part), (key, None)])
        with pytest.raises(OfflineError):
            await read(store, key)
        if hasattr(store, "get_ranges"):
            with pytest.raises(OfflineError):
                [group async for group in store.get_ranges(key, [part], prototype=PROTOTYPE)]
    assert source.take() == {}


async def names_in(store: Store, prefix: str) -> list[str]:
    return sorted([name async for name in store.list_dir(prefix)])


async def test_offline_serves_what_is_cached_whatever_its_age_and_asks_nothing(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    online = opened(source, cache, max_age_seconds=10, clock=clock)
    await fill(online, **{"a/b": b"12345"})
    clock.advance(1e6)
    store = opened(source, cache, max_age_seconds=10, clock=clock, offline=True)
    source.take()
    part = RangeByteRequest(1, 3)
    await store._ensure_open()
    assert await read(store, "a/b") == b"12345"
    assert await read(store, "a/b", part) == b"23"
    assert await store.exists("a/b")
    assert await store.getsize("a/b") == 5
    found = await store.get_partial_values(PROTOTYPE, [("a/b", part), ("a/b", None)])
    assert [value and value.to_bytes() for value in found] == [b"23", b"12345"]
    assert store.max_age_seconds == 10
    with pytest.raises(OfflineError, match=r"'unknown'.*offline=False"):
        await read(store, "unknown")
    with pytest.raises(OfflineError, match="unknown"):
        await read(store, "unknown", part)
    for call in (store.exists("unknown"), store.getsize("unknown"), store.is_empty("x")):
        with pytest.raises(OfflineError):
            await call
    for names in (store.list(), store.list_prefix("a"), store.list_dir("a")):
        with pytest.raises(OfflineError):
            [name async for name in names]
    with pytest.raises(OfflineError, match="unknown"):
        await store.get_partial_values(PROTOTYPE, [("a/b", None), ("unknown", None)])
    if hasattr(store, "get_sync"):
        with pytest.raises(OfflineError, match="unknown"):
            await asyncio.to_thread(store.get_sync, "unknown", prototype=PROTOTYPE)
        with pytest.raises(OfflineError, match="unknown"):
            [group async for group in store.get_ranges("unknown", [part], prototype=PROTOTYPE)]
        groups = [group async for group in store.get_ranges("a/b", [part], prototype=PROTOTYPE)]
        assert len(groups) == 1
    store.close()
    assert source.take() == {}
    assert issubclass(OfflineError, OSError)
    assert issubclass(OfflineError, zcache.ZcacheError)
    await check_quiet(store)


async def test_offline_write_says_what_to_do(source: StoreDouble, cache: Store | CachePool) -> None:
    store = opened(source, cache, offline=True)
    with pytest.raises(OfflineError, match=r"'k'.*Write through a store that is online") as caught:
        await store.set("k", buf(b"1"))
    assert "Ask for it" not in str(caught.value)


@pytest.mark.parametrize("key", ["../x", "/x", ".zcache/x", "x" * 256, "x/" * 2500 + "x"])
async def test_offline_read_of_what_is_never_cached_says_so(
    source: StoreDouble, cache: Store | CachePool, key: str
) -> None:
    store = opened(source, cache, offline=True)
    part = RangeByteRequest(0, 1)
    reads: list[Any] = [
        store.get(key, PROTOTYPE),
        store.get("a", PROTOTYPE, RangeByteRequest(3, 2)),
        store.exists(key),
        store.getsize(key),
        store.get_partial_values(PROTOTYPE, [(key, part)]),
        store.get_partial_values(PROTOTYPE, [("a", part), ("a", RangeByteRequest(3, 2))]),
    ]
    if hasattr(store, "get_ranges"):
        ranges = [part, RangeByteRequest(3, 2)]
        reads += [anext(store.get_ranges("a", ranges, prototype=PROTOTYPE))]
    for one in reads:
        with pytest.raises(OfflineError, match=r"never cached.*offline=False") as caught:
            await one
        assert "Ask for it" not in str(caught.value)
        assert len(str(caught.value)) < 500


async def test_offline_listing_that_is_never_remembered_says_so(
    source: StoreDouble, cache: Store | CachePool
) -> None:
    store = opened(source, cache, offline=True)
    for names in (store.list(), store.list_prefix("a")):
        with pytest.raises(OfflineError, match="list_dir alone") as caught:
            [name async for name in names]
        assert "Ask for it" not in str(caught.value)
    with pytest.raises(OfflineError, match="list_dir alone"):
        await store.getsize_prefix("a")
    for change in (store.clear(), store.delete_dir("")):
        with pytest.raises(OfflineError, match=r"^nothing can be written or deleted"):
            await change


async def test_offline_refuses_writes_and_keeps_what_is_cached(
    source: StoreDouble, cache: Store | CachePool
) -> None:
    online = opened(source, cache)
    await fill(online, **{"a/b": b"1"})
    store = opened(source, cache, offline=True)
    source.take()
    calls = [
        lambda: store.set("a/b", buf(b"2")),
        lambda: store.set_if_not_exists("c", buf(b"2")),
        lambda: store.delete("a/b"),
        lambda: store.delete_dir("a"),
        store.clear,
    ]
    for call in calls:
        with pytest.raises(OfflineError, match="written or deleted"):
            await call()
    if hasattr(store, "set_sync"):
        with pytest.raises(OfflineError):
            store.set_sync("a/b", buf(b"2"))
        with pytest.raises(OfflineError):
            store.delete_sync("a/b")
    assert source.take() == {}
    assert await read(store, "a/b") == b"1"
    assert await read(online, "a/b") == b"1"
    assert source.take() == {}


@pytest.mark.parametrize(
    ("value", "option", "expected"),
    [
        ("1", None, True),
        ("yes", None, True),
        ("0", None, False),
        ("", None, False),
        (None, None, False),
        ("1", False, False),
        ("0", True, True),
    ],
)
async def test_offline_environment_is_read_when_the_store_is_made(
    source: StoreDouble,
    monkeypatch: pytest.MonkeyPatch,
    value: str | None,
    option: bool | None,
    expected: bool,
) -> None:
    monkeypatch.delenv("ZCACHE_OFFLINE", raising=False)
    if value is not None:
        monkeypatch.setenv("ZCACHE_OFFLINE", value)
    store = opened(source, MemoryStore(), offline=option)
    monkeypatch.setenv("ZCACHE_OFFLINE", "0" if expected else "1")
    for copy in (store, store.with_read_only(True), pickle.loads(pickle.dumps(store))):
        if expected:
            with pytest.raises(OfflineError):
                await read(copy, "a")
        else:
            assert await read(copy, "a") is None


def test_offline_of_another_type_raises() -> None:
    with pytest.raises(OptionTypeError, match="invalid offline: 1"):
        CacheStore(MemoryStore(), offline=1)  # type: ignore[arg-type]


async def test_offline_waits_for_an_index_that_is_not_complete(
    source: StoreDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that was lost is rebuilt in the background; until then a miss means nothing."""
    cache = LocalStore(tmp_path / "cache")
    online = opened(source, cache)
    await fill(online, **{f"a/{number}": b"1" for number in range(50)})
    await drained(online)
    name = zcache.__name__
    script = f"""
import asyncio, shutil, sys
from zarr.storage import LocalStore, MemoryStore
from zarr.core.buffer import default_buffer_prototype
from {name} import CacheStore
from {name}._backends.directory import index
index.REBUILD_PATIENCE = 0.0
shutil.rmtree(sys.argv[1] + "/.zcache/index")
async def main():
    store = CacheStore(MemoryStore(), cache_store=sys.argv[1], source_id="source", offline=True)
    for number in range(50):
        value = await store.get(f"a/{{number}}", default_buffer_prototype())
        assert value.to_bytes() == b"1"
asyncio.run(main())
"""
    del online
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script, str(tmp_path / "cache")], check=True
    )


@pytest.mark.parametrize("kind", ["directory", "pool"])
async def test_offline_does_not_wait_for_a_lock_that_is_kept_and_names_it(
    source: StoreDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """`exists` waited for a minute, and all said that the key was not in the cache."""
    cache = BESIDE_OTHERS[kind](tmp_path / "cache")
    online = opened(source, cache)
    await fill(online, **{"a/c/0": b"1", "a/zarr.json": b"2"})
    await drained(online)
    store = opened(source, cache, offline=True)
    assert await read(store, "a/c/0") == b"1"
    # In place of a minute: who waits for it waits for good.
    monkeypatch.setattr("zcache._protocol.hits.COMPLETE_TIMEOUT", 1e9)
    gone = "a/c/1"
    with hold_index_lock(tmp_path / "cache"):
        for work in (
            lambda: store.exists("a/c/0"),
            lambda: read(store, "a/c/0"),
            lambda: read(store, gone),
            lambda: store.exists(gone),
            lambda: store.getsize(gone),
            lambda: store.get_partial_values(PROTOTYPE, [(gone, None), ("a/c/0", None)]),
            lambda: store.exists("b/.zarray"),
        ):
            with pytest.raises(
                OfflineError, match=r"another process holds the lock.*Ask again"
            ) as e:
                await asyncio.wait_for(work(), 60)
            assert isinstance(e.value.__cause__, IndexLockTimeout)
        with pytest.raises(OfflineError, match="another process holds the lock"):
            await asyncio.to_thread(value_sync, store, "a/c/0")
        with pytest.raises(OfflineError, match="never cached"):
            await read(store, "../a")
    assert await read(store, "a/c/0") == b"1"
    assert await store.exists("a/c/0")
    with pytest.raises(OfflineError, match="not in the cache"):
        await read(store, gone)


@pytest.mark.parametrize("kind", ["directory", "pool"])
def test_offline_in_a_process_that_cannot_open_the_index_names_its_lock(
    source: StoreDouble, tmp_path: Path, kind: str
) -> None:
    online = opened(source, BESIDE_OTHERS[kind](tmp_path / "cache"))
    asyncio.run(fill(online, **{"a/c/0": b"1"}))
    drained_sync(online)
    script = f"""
import asyncio, sys
from zarr.storage import MemoryStore
from zarr.core.buffer import default_buffer_prototype
from zcache import CachePool, CacheStore, OfflineError
cache = CachePool(sys.argv[1]) if {kind == "pool"} else sys.argv[1]
async def main():
    store = CacheStore(MemoryStore(), cache_store=cache, source_id="source", offline=True)
    for work in (lambda: store.exists("a/c/0"), lambda: store.get("a/c/0", default_buffer_prototype())):
        try:
            await work()
        except OfflineError as error:
            assert "another process holds the lock" in str(error), error
        else:
            raise AssertionError("it was answered")
asyncio.run(main())
"""
    with hold_index_lock(tmp_path / "cache"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "cache")], check=True, timeout=50
        )


# ------------------------------------------------------------------------------ listings


async def test_offline_listing_is_answered_as_the_source_has_answered_it(
    source: StoreDouble, cache: Store | CachePool
) -> None:
    online = opened(source, cache)
    await fill(online, **{"a/x": b"1", "a/y/z": b"2", "é/w": b"3"})
    expected = {prefix: await names_in(online, prefix) for prefix in ("", "a", "a/y", "none", "é")}
    store = opened(source, cache, offline=True)
    source.take()
    for prefix, names in expected.items():
        assert await names_in(store, prefix) == names
        if prefix:
            assert await names_in(store, prefix + "/") == names
        assert await store.is_empty(prefix) == (not names)
    with pytest.raises(OfflineError, match="listing of 'a/x'"):
        await names_in(store, "a/x")
    assert source.take() == {}


async def test_offline_listing_that_was_not_read_to_its_end_is_not_remembered(
    source: StoreDouble, cache: Store | CachePool
) -> None:
    online = opened(source, cache)
    await fill(online, **{"a/x": b"1", "a/y": b"2"})
    names = online.list_dir("a")
    await anext(names)
    await names.aclose()  # type: ignore[attr-defined]
    store = opened(source, cache, offline=True)
    with pytest.raises(OfflineError):
        await names_in(store, "a")


@pytest.mark.parametrize("change", ["set", "delete", "delete_dir", "clear", "clear_cache"])
async def test_offline_listing_is_forgotten_with_any_change_below(
    source: StoreDouble, cache: Store | CachePool, change: str
) -> None:
    online = opened(source, cache)
    await fill(online, **{"a/b/x": b"1", "c/y": b"2"})
    for prefix in ("", "a", "a/b", "c"):
        await names_in(online, prefix)
    await {
        "set": lambda: online.set("a/b/new", buf(b"3")),
        "delete": lambda: online.delete("a/b/x"),
        "delete_dir": lambda: online.delete_dir("a"),
        "clear": online.clear,
        "clear_cache": online.clear_cache,
    }[change]()
    store = opened(source, cache, offline=True)
    for prefix in ("", "a", "a/b"):
        with pytest.raises(OfflineError):
            await names_in(store, prefix)
    if change == "set":
        assert await names_in(store, "c") == ["y"]


@pytest.mark.parametrize("change", ["invalidate", "delete", "delete_dir"])
async def test_offline_listings_elsewhere_are_remembered_after_a_change(
    source: StoreDouble, cache: Store | CachePool, change: str
) -> None:
    deep = "/".join("d" * 20)
    online = opened(source, cache)
    await fill(online, **{"a/b/c/x": b"1", "a/bc/x": b"1", "ab/y": b"2", f"{deep}/z": b"3"})
    prefixes = ("a/bc", "ab", "d", deep)
    expected = {prefix: await names_in(online, prefix) for prefix in prefixes}
    for prefix in ("", "a", "a/b", "a/b/c"):
        await names_in(online, prefix)
    await getattr(online, change)("a/b")
    store = opened(source, cache, offline=True)
    for prefix, names in expected.items():
        assert await names_in(store, prefix) == names
    for prefix in ("", "a", "a/b", "a/b/c"):
        with pytest.raises(OfflineError):
            await names_in(store, prefix)
    await getattr(online, change)(f"{deep}/z")
    with pytest.raises(OfflineError):
        await names_in(store, deep)
    assert await names_in(store, "ab") == ["y"]


async def test_offline_listing_of_a_name_that_is_no_text_is_refused(
    source: StoreDouble, cache: Store | CachePool
) -> None:
    online = opened(source, cache)
    assert await names_in(online, "\ud800") == []
    with pytest.raises(OfflineError):
        await names_in(opened(source, cache, offline=True), "\ud800")


async def test_offline_listing_that_a_write_overtakes_is_not_remembered(
    source: StoreDouble, cache: Store | CachePool
) -> None:
    online = opened(source, cache)
    await fill(online, **{"a/x": b"1"})
    gate = source.block("set", after=False)
    write = asyncio.ensure_future(online.set("a/y", buf(b"2")))
    await gate.entered_async()
    assert await names_in(online, "a") == ["x"]
    gate.release()
    await write
    store = opened(source, cache, offline=True)
    with pytest.raises(OfflineError):
        await names_in(store, "a")
    assert await names_in(online, "a") == ["x", "y"]
    assert await names_in(store, "a") == ["x", "y"]


async def test_offline_listing_of_another_source_or_damaged_is_not_answered(
    source: StoreDouble, tmp_path: Path
) -> None:
    online = opened(source, LocalStore(tmp_path / "cache"))
    await fill(online, **{"a/x": b"1"})
    await names_in(online, "a")
    store = opened(source, LocalStore(tmp_path / "cache"), offline=True)
    [path] = (tmp_path / "cache" / ".zcache" / "index").glob("listing-*")
    good = path.read_bytes()
    for data in (b"", good[:-1], good.replace(b'"x"', b'"y"'), b"\xff" * 20):
        path.write_bytes(data)
        with pytest.raises(OfflineError):
            await names_in(store, "a")
    path.write_bytes(good)
    assert await names_in(store, "a") == ["x"]


@pytest.mark.parametrize("name", ["listings", "listing-"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
async def test_listing_is_kept_in_no_file_of_others(
    source: StoreDouble, tmp_path: Path, name: str, kind: str
) -> None:
    online = opened(source, LocalStore(tmp_path / "cache"))
    await fill(online, **{"a/x": b"1"})
    await names_in(online, "a")
    [path] = (tmp_path / "cache" / ".zcache" / "index").glob(f"{name}*")
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    for _ in range(2):
        assert await names_in(online, "a") == ["x"]
        await fill(online, **{"a/x": b"2"})
    assert not (tmp_path / "elsewhere").exists()


# ------------------------------------------------------------------------------ datasets


def test_offline_dataset_that_was_read_once_is_read_again(tmp_path: Path) -> None:
    where = tmp_path / "source"
    made = zarr.open_group(where, mode="w", attributes={"title": "t"})
    for name in ("x", "y"):
        array = made.create_array(name, shape=(4, 4), chunks=(2, 2), dtype="i4")
        array[:] = np.arange(16).reshape(4, 4)
    made.create_group("inner").create_array("z", shape=(2,), dtype="f8")[:] = [1, 2]

    def walk(store: CacheStore) -> dict[str, Any]:
        group = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
        found: dict[str, Any] = {"attributes": dict(group.attrs)}
        for name, node in group.members(max_depth=None):
            found[name] = node[...].tolist() if isinstance(node, zarr.Array) else None
        found["keys"] = sorted(group.array_keys()), sorted(group.group_keys())
        return found

    cache = tmp_path / "cache"
    online = CacheStore(LocalStore(where, read_only=True), cache_store=cache)
    expected = walk(online)
    drained_sync(online)
    where.rename(tmp_path / "gone")
    store = CacheStore(LocalStore(where, read_only=True), cache_store=cache, offline=True)
    assert walk(store) == expected
    assert store.cache_stats()["misses"] == 0
    with pytest.raises(OfflineError):
        zarr.open_array(store, path="inner/unknown", mode="r", zarr_format=3)


async def test_offline_reads_what_an_online_store_of_the_same_process_fills(
    source: StoreDouble, cache: Store | CachePool
) -> None:
    online, store = opened(source, cache), opened(source, cache, offline=True)
    await source.inner.set("a", buf(b"1"))
    with pytest.raises(OfflineError):
        await read(store, "a")
    assert await read_through(online, "a") == b"1"
    assert await read(store, "a") == b"1"
