"""A cache in a directory, as its users see it: the files in it, and deletes that the disk refuses."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import stat
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

from directories import INDEX, closed, complete, open_store, reads, sizes_in, tree
from interrupting import Interrupter
from support import buf, check_quiet, drained, fill, read, read_through, until, write
from zcache import CacheStore
from zcache._backends.directory import backend
from zcache._core import Index, IndexBusyError
from zcache._protocol import listing
from zcache._runtime.coroutines import run_without_loop
from zcache._runtime.thread_calls import run_in_background
from zcache._runtime.threads import THREADS
from zcache.testing import FakeClock, StoreDouble, check_invariants, check_invariants_async, entries

if TYPE_CHECKING:
    from pathlib import Path


async def test_directory_is_readable_as_zarr(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path)
    await write(store, "a/zarr.json", b"{}")
    assert await read(LocalStore(tmp_path / "cache"), "a/zarr.json") == b"{}"


async def test_keys_that_file_systems_treat_specially_are_cached(tmp_path: Path) -> None:
    where = tmp_path / "naïve dir %41 'quoted'"
    where.mkdir()
    keys = ["ü/c/0", "sp ace/%2F", "a@1-2", "c/0", "dot.ted/.zgroup", "-", "~", "x" * 255]
    behind = MemoryStore()
    for _ in range(2):
        store, _ = open_store(where, behind)
        for key in keys:
            assert (await read(store, key)) in (None, key.encode())
            await write(store, key, key.encode())
            assert await read(store, key, RangeByteRequest(0, 1)) == key.encode()[:1]
        await check_quiet(store)
    assert store.cache_info()["cached_keys"] == len(keys)


@pytest.mark.parametrize("key", ["x" * 256, "a/" + "x" * 300 + "/c/0", ".zcache/a", "a/\0"])
@pytest.mark.parametrize("what", ["set", "delete", "delete_dir"])
async def test_write_to_a_key_that_is_never_cached_leaves_all_others_cached(
    tmp_path: Path, key: str, what: str
) -> None:
    store, _ = open_store(tmp_path, MemoryStore())
    await fill(store, a=b"1", b=b"2")
    before = entries(store)
    if what == "set":
        await write(store, key, b"3")
        assert await read(store, key) == b"3"
    else:
        await (store.delete(key) if what == "delete" else store.delete_dir(key))
    assert entries(store) == before
    await check_quiet(store)


async def test_range_without_a_name_that_a_file_system_takes_stays_uncached(tmp_path: Path) -> None:
    source = StoreDouble(MemoryStore())
    store = CacheStore(source, cache_store=tmp_path / "cache", source_id="s")
    for length, cached in ((251, True), (252, False)):
        key = "x" * length
        await source.inner.set(key, buf(b"123"))
        for _ in range(2):
            assert await read_through(store, key, RangeByteRequest(0, 1)) == b"1"
        assert store.is_cached(key, RangeByteRequest(0, 1)) == cached
    stats = store.cache_stats()
    assert (stats["refusals"], stats["bypassed"], stats["cache_failures"]) == (2, 0, 0)
    assert await read_through(store, key) == b"123"
    assert store.is_cached(key)
    await check_quiet(store)


@pytest.mark.parametrize("key", ["a/../b", "./a", "a//b", "/a"])
async def test_write_to_a_key_that_may_name_another_drops_everything(
    tmp_path: Path, key: str
) -> None:
    store, _ = open_store(tmp_path, MemoryStore())
    await fill(store, a=b"1", b=b"2")
    await write(store, key, b"3")
    assert entries(store) == []
    await check_quiet(store)


async def test_relative_path_stays_where_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = StoreDouble(MemoryStore())
    store = CacheStore(source, cache_store=LocalStore("cache"))
    await fill(store, a=b"1")
    monkeypatch.chdir("/")
    assert await read(store, "a") == b"1"
    assert reads(source) == 0
    await write(store, "b", b"2")
    assert (tmp_path / "cache/b").read_bytes() == b"2"


async def test_value_removed_by_others_is_read_from_the_source_and_cached_again(
    tmp_path: Path,
) -> None:
    store, source = open_store(tmp_path, max_size=100)
    await write(store, "a/c/0", bytes(60))
    (tmp_path / "cache/a/c/0").unlink()
    assert await read_through(store, "a/c/0") == bytes(60)
    assert reads(source) == 1
    assert store.cache_stats()["damaged"] == 1
    assert await read(store, "a/c/0") == bytes(60)
    assert reads(source) == 0
    await check_quiet(store)


async def test_file_of_others_under_a_key_is_never_served_nor_removed(tmp_path: Path) -> None:
    store, source = open_store(tmp_path, max_size=100)
    await write(store, "a", bytes(10))
    foreign = tmp_path / "cache/b"
    foreign.write_bytes(b"another's own")
    await source.inner.set("b", buf(b"22"))
    for _ in range(2):
        assert await read_through(store, "b") == b"22"
    await write(store, "b", b"333")
    assert await read_through(store, "b") == b"333"
    await store.clear_cache()
    assert foreign.read_bytes() == b"another's own"
    assert "a" not in tree(tmp_path / "cache")


async def test_delete_refused_the_value_stays_counted_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is not served, nor found valid by a rebuild."""
    clock = FakeClock(1e9)
    store, source = open_store(tmp_path, max_size=100, clock=clock)
    await write(store, "a", bytes(60))

    def refuse(_: str, names: list[str], *__: object) -> list[OSError]:
        return [PermissionError(13, "Permission denied", name) for name in names]

    monkeypatch.setattr(backend, "remove_victims", refuse)
    await store.delete("a")
    assert [(entry.key, entry.state) for entry in entries(store)] == [("a", "delete-failed")]
    assert store.cache_info()["current_size"] == 60
    await check_invariants_async(store)
    # A rebuild by the next process does not take it for valid.
    assert len(tree(tmp_path / "cache/.zcache/dropped")) == 1
    monkeypatch.undo()
    clock.advance(1000)
    assert await read(store, "a") is None
    await write(store, "b", bytes(50))  # There is no room beside it, so it is deleted first.
    await write(store, "b", bytes(50))
    assert sizes_in(tmp_path / "cache") == {"b": 50}
    await check_quiet(store)
    assert reads(source) == 1


async def test_delete_never_answers_a_write_goes_on_and_the_bytes_stay_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, source = open_store(tmp_path, max_size=100)
    await write(store, "a", bytes(60))
    go, remove_victims = threading.Event(), backend.remove_victims

    def hang(*args: Any) -> Any:
        assert go.wait(60)
        return remove_victims(*args)

    monkeypatch.setattr(backend, "remove_victims", hang)
    await asyncio.wait_for(store.set("a", buf(b"new")), 30)
    assert await read(source.inner, "a") == b"new"
    assert await read(store, "a") == b"new"
    assert store.cache_info()["current_size"] >= 60
    await check_invariants_async(store)
    go.set()
    await until(lambda: not _is_old(tmp_path))
    await until(lambda: all(entry.state == "live" for entry in entries(store)))
    await drained(store)
    await check_quiet(store)


async def test_no_write_waits_for_deletes_that_were_not_answered_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, source = open_store(tmp_path)
    for n in range(9):
        await write(store, f"c/{n}", bytes(60))
        await write(store, f"d/{n}", bytes(60))
    assert [name async for name in store.list_dir("c")]
    go = threading.Event()

    def hang(work: Any, *args: Any) -> Any:
        assert go.wait(120)
        return work(*args)

    for name in ("remove_victims", "remove_key"):
        monkeypatch.setattr(backend, name, partial(hang, getattr(backend, name)))
    await store.set("c/0", buf(b"new"))
    # Now the directory is known to be ill. A write that waits for it would not end.
    for module in (backend, listing):
        monkeypatch.setattr(module, "DELETE_TIMEOUT", 3600)

    async def write_all() -> None:
        for n in range(1, 5):
            await store.set(f"c/{n}", buf(b"new"))
            assert await read(store, f"c/{n}") == b"new"
        await asyncio.to_thread(store.set_sync, "c/5", buf(b"new"))
        assert await read(store, "c/5") == b"new"
        await store.delete("c/6")
        await store.delete_dir("d")
        await store.invalidate("c/8")

    try:
        await asyncio.wait_for(write_all(), 60)
    finally:
        go.set()
    assert await read(source.inner, "c/6") is None
    await until(lambda: all(entry.state == "live" for entry in entries(store)))
    await drained(store)
    await check_quiet(store)
    await until(lambda: _is_cached_again(store, "c/1"))


async def test_delete_that_a_cancelled_reader_leaves_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = open_store(tmp_path)
    await write(store, "a", bytes(60))
    os.truncate(tmp_path / "cache/a", 7)
    begun, go = threading.Event(), threading.Event()

    def hang(work: Any, *args: Any) -> Any:
        begun.set()
        assert go.wait(120)
        return work(*args)

    monkeypatch.setattr(backend, "remove_victims", partial(hang, backend.remove_victims))
    reader = asyncio.create_task(read(store, "a"))
    await until(begun.is_set)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert [entry.state for entry in entries(store)] == ["deleting"]
    go.set()
    await until(lambda: [entry.state for entry in entries(store)] != ["deleting"])
    await drained(store)


async def test_delete_that_is_cancelled_before_a_thread_has_it_is_done(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path)
    await write(store, "a", bytes(60))
    some, go = store._cache.shared.threads, threading.Event()
    for _ in range(THREADS):
        run_in_background(partial(go.wait, 120), some)
    delete = asyncio.create_task(store.delete("a"))
    await until(lambda: [entry.state for entry in entries(store)] == ["deleting"])
    delete.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delete
    assert sizes_in(tmp_path / "cache") == {"a": 60}
    go.set()
    await until(lambda: not entries(store))
    assert sizes_in(tmp_path / "cache") == {}
    await check_quiet(store)


@pytest.mark.parametrize("what", ["delete", "delete_sync", "clear_cache", "set"])
async def test_delete_has_told_the_index_when_it_returns(tmp_path: Path, what: str) -> None:
    """Also where another process has the lock then."""
    store, _ = open_store(tmp_path, max_size=100)
    await write(store, "a", bytes(60))
    handle, busy = store._cache.shared.handle, iter(range(3))

    def take(step: Any, *args: Any) -> Any:
        if step is Index.confirm_deletes and next(busy, None) is not None:
            # For as long as who does not wait needs to be back.
            time.sleep(0.05)
            raise IndexBusyError("taken")
        return step(*args)

    handle.take = take  # type: ignore[method-assign]
    if what == "delete_sync":
        store.delete_sync("a")
    elif what == "set":
        await store.set("a", buf(bytes(70)))
    else:
        await (store.delete("a") if what == "delete" else store.clear_cache())
    assert next(busy, None) is None
    if what == "set":
        await drained(store)
        assert store.is_cached("a")
    else:
        assert store.cache_info()["current_size"] == 0
    await check_quiet(store)


def test_delete_that_is_interrupted_anywhere_gives_its_room_back(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path)
    io, shared = store._sync_io, store._cache.shared
    for at in itertools.count():
        store.set_sync("a", buf(bytes(60)))
        assert store.drain_sync(timeout=60)
        victims, _ = shared.handle.index.drain_prefix("a")
        remove = store._cache.backend.remove(io, victims)
        # Not before it has taken note of them.
        is_interrupted = Interrupter(at + 6).run(partial(run_without_loop, remove))
        # What was left is tried again.
        asyncio.run(store.clear_cache())
        asyncio.run(until(lambda: not entries(store)))
        if not is_interrupted:
            break
    assert at > 50
    check_invariants(store)


async def test_deletes_that_nothing_answers_are_left_once_they_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = open_store(tmp_path)
    await write(store, "a", bytes(60))
    monkeypatch.setattr(backend, "MOST_BEHIND", 0)
    await store.delete("a")
    monkeypatch.undo()
    assert [entry.state for entry in entries(store)] == ["delete-failed"]


def _is_cached_again(store: CacheStore, key: str) -> bool:
    """Whether a value is cached again, once the cache store is no longer left alone."""
    store.get_sync(key)
    store.drain_sync()
    return store.is_cached(key)


def _is_old(where: Path) -> bool:
    try:
        return (where / "cache/a").stat().st_size == 60
    except FileNotFoundError:
        return False


async def test_read_never_answers_the_source_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs costs a reader a second once, and later ones nothing."""
    store, source = open_store(tmp_path)
    # More than is read on the spot.
    value = os.urandom(5 * 2**20)
    await write(store, "a", value)
    go = threading.Event()

    def hang(*_: Any) -> Any:
        go.wait(60)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(backend, "read_value", hang)
    try:
        for _ in range(20):
            assert await asyncio.wait_for(read(store, "a"), 30) == value
        assert reads(source) >= 1  # Or a value that is on its way into the cache.
        # All but the first did not even ask.
        assert store.cache_stats()["cache_failures"] <= 2
    finally:
        go.set()


@pytest.mark.parametrize("damaged", [False, True])
async def test_record_beside_a_value_that_never_answers_the_source_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """It is asked for the checksum that the index does not know, and for the length of a damaged value."""
    value = os.urandom(100)
    store, _ = open_store(tmp_path)
    await write(store, "a", value)
    await drained(store)
    if damaged:
        path = tmp_path / "cache/a"
        times = path.stat()
        os.truncate(path, 50)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        del store
        await closed(tmp_path)
        shutil.rmtree(tmp_path / "cache" / INDEX)
        store, _ = open_store(tmp_path)
        await complete(store)
    go = threading.Event()
    asked_in_loop: list[bool] = []

    def hang(_: str) -> None:
        asked_in_loop.append(threading.current_thread() is threading.main_thread())
        if not asked_in_loop[-1]:
            go.wait(60)

    monkeypatch.setattr(backend, "recorded_size_and_checksum", hang)
    try:
        assert await asyncio.wait_for(read(store, "a"), 30) == value
        assert asked_in_loop == [False]
        assert not store._cache.backend.breaker.allows()
    finally:
        go.set()


async def test_files_have_the_permissions_of_the_process(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        # One that zcache makes is for its user alone; below one that is there its permissions count.
        (tmp_path / "cache").mkdir()
        store, _ = open_store(tmp_path)
        await write(store, "a/b", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache/a/b").stat().st_mode) == 0o640
    del store
    await closed(tmp_path)
