"""A warm cache directory that takes nothing is read from, and nothing in it is changed."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from zarr.storage import LocalStore, MemoryStore

from agent import run_script
from directories import closed
from doubles import GatedStore, reached
from mounts import mounted_read_only
from pools import CACHES, ON_DISK, within_bound
from support import PROTOTYPE, TESTS, buf, listed, read, said
from zcache import CachePool, CacheStore, CacheUnreachableError
from zcache.testing import StoreDouble, check_invariants_async

VALUES = {f"a/c/{n}": bytes([n]) * 1000 for n in range(10)}


def source() -> StoreDouble:
    return StoreDouble(MemoryStore({key: buf(value) for key, value in VALUES.items()}))


async def warmed(where: Path, kind: str = "directory") -> None:
    cache = CACHES[kind](where)
    store = CacheStore(source(), cache_store=cache, source_id="source")
    for key in VALUES:
        await read(store, key)
    assert store.drain_sync()


def opened(where: Path, kind: str, behind: StoreDouble, **options: Any) -> CacheStore:
    cache = CACHES[kind](where)
    return CacheStore(behind, cache_store=cache, source_id="source", **options)


async def until_cached(store: CacheStore, key: str) -> None:
    while not store.is_cached(key):
        await read(store, key)
        assert await store.drain()


def contents(where: Path) -> dict[str, tuple[int, bytes]]:
    """All files with their times, but for the one that tells others of changes by its time."""
    found = [path for path in where.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


async def check_served(store: CacheStore, behind: StoreDouble) -> None:
    for key, value in VALUES.items():
        assert await read(store, key) == value
    assert behind.calls["get"] == 0
    await behind.inner.set("b", buf(b"more"))
    for _ in range(20):
        assert await read(store, "b") == b"more"
    assert store.cache_stats()["cache_failures"] == 0
    # Others who read it could not be told of a change of what it holds: it does not begin.
    for change in (
        store.set("a/c/1", buf(b"new")),
        store.delete("a/c/2"),
        store.delete_dir("a"),
        store.clear(),
    ):
        with pytest.raises(CacheUnreachableError, match="could not be told"):
            await change
    for key, value in VALUES.items():
        assert await read(behind.inner, key) == await read(store, key) == value
    # What it does not hold may change.
    await store.set("b", buf(b"new"))
    assert await read(store, "b") == b"new"
    await store.delete("b")
    assert await read(store, "b") is None
    with pytest.raises(CacheUnreachableError, match="is only read from"):
        await store.clear_cache()
    assert await read(store, "a/c/3") == VALUES["a/c/3"]
    assert store.drain_sync()


async def test_store_that_is_read_only(tmp_path: Path) -> None:
    await warmed(tmp_path)
    before = contents(tmp_path)
    behind = source()
    cache = LocalStore(tmp_path, read_only=True)
    store = CacheStore(behind, cache_store=cache, source_id="source", max_size=100)
    await check_served(store, behind)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("first", ["read-only", "writable"])
async def test_beside_a_writable_store_of_the_same_process(tmp_path: Path, first: str) -> None:
    """As if another process wrote."""
    await warmed(tmp_path)
    behind = source()

    def opened(*, read_only: bool) -> CacheStore:
        cache = LocalStore(tmp_path, read_only=read_only)
        return CacheStore(behind, cache_store=cache, source_id="source")

    if first == "read-only":
        reader = opened(read_only=True)
        writer = opened(read_only=False)
    else:
        writer = opened(read_only=False)
        reader = opened(read_only=True)
    stores = (reader, writer)
    for key, value in VALUES.items():
        assert [await read(store, key) for store in stores] == [value] * 2
    assert behind.calls["get"] == 0
    # One of another length, one of the same, and one that was not there.
    for key, value in {"a/c/1": b"new", "a/c/2": b"?" * 1000, "b": b"more"}.items():
        assert await read(reader, key) == VALUES.get(key)
        await writer.set(key, buf(value))
        assert [await read(store, key) for store in stores] == [value] * 2
        assert writer.drain_sync()
        assert writer.is_cached(key)
        assert [await read(store, key) for store in stores] == [value] * 2
    with pytest.raises(CacheUnreachableError, match="could not be told"):
        await reader.set("a/c/3", buf(b"new"))
    # What no one holds may change, and who remembers that it is missing hears of it.
    assert await read(writer, "d") is None
    await reader.set("d", buf(b"by the reader"))
    assert [await read(store, "d") for store in stores] == [b"by the reader"] * 2
    await writer.delete("a/c/2")
    await writer.delete_dir("a")
    for key in ("a/c/2", "a/c/4"):
        assert [await read(store, key) for store in stores] == [None] * 2
    await check_invariants_async(writer)


@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.parametrize("deletes", [False, True])
async def test_old_value_that_others_cache_during_a_change_goes_at_its_end(
    tmp_path: Path, kind: str, deletes: bool
) -> None:
    """It was not there when the change began, and nothing else would remove it."""
    where = tmp_path / "cache"
    await warmed(where, kind)
    behind = source()
    await behind.inner.set("b", buf(b"old"))
    writer = opened(where, kind, behind)
    cache: Any = (
        CachePool(where, read_only=True) if kind == "pool" else LocalStore(where, read_only=True)
    )

    class ReadMeanwhile(StoreDouble):
        async def set(self, key: str, value: Any) -> None:
            await self.look(key)
            await super().set(key, value)

        async def delete(self, key: str) -> None:
            await self.look(key)
            await super().delete(key)

        async def look(self, key: str) -> None:
            assert await read(writer, key) == b"old"
            assert await writer.drain()
            assert writer.is_cached(key)

    reader = CacheStore(ReadMeanwhile(behind.inner), cache_store=cache, source_id="source")
    before = {name: found for name, found in contents(where).items() if "/index" not in name}
    if deletes:
        await reader.delete("b")
    else:
        await reader.set("b", buf(b"new"))
    expected = None if deletes else b"new"
    assert [await read(store, "b") for store in (writer, reader)] == [expected] * 2
    assert await writer.drain()
    # All else is as it was.
    for key, value in VALUES.items():
        assert await read(reader, key) == value
    assert kind == "pool" or before.items() <= contents(where).items()
    await check_invariants_async(writer)


async def test_damaged_value_is_not_served_even_without_verify(tmp_path: Path) -> None:
    await warmed(tmp_path)
    path = tmp_path / "a/c/3"
    if "user.zcache" not in os.listxattr(path):
        pytest.skip("this file system has no extended attributes")
    times = path.stat()
    path.write_bytes(b"?" * 1000)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    behind = source()
    cache = LocalStore(tmp_path, read_only=True)
    store = CacheStore(behind, cache_store=cache, source_id="source", verify="never")
    assert await read(store, "a/c/3") == VALUES["a/c/3"]
    assert path.read_bytes() == b"?" * 1000


async def test_another_source_gets_nothing(tmp_path: Path) -> None:
    await warmed(tmp_path)
    behind = StoreDouble(MemoryStore({"a/c/1": buf(b"other")}))
    cache = LocalStore(tmp_path, read_only=True)
    store = CacheStore(behind, cache_store=cache, source_id="another")
    assert await read(store, "a/c/1") == b"other"


@pytest.mark.parametrize("lose", [None, "stamp.json", "index", "tmp"])
async def test_read_only_volume(tmp_path: Path, lose: str | None) -> None:
    where = tmp_path / "cache"
    await warmed(where)
    if lose is not None:
        path = where / ".zcache" / lose
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    before = contents(where)
    behind = source()
    with mounted_read_only(where):
        store = CacheStore(behind, cache_store=LocalStore(where), source_id="source")
        await check_served(store, behind)
        assert contents(where) == before


@pytest.mark.parametrize("kind", ON_DISK)
async def test_volume_that_has_become_writable_is_filled(tmp_path: Path, kind: str) -> None:
    where = tmp_path / "cache"
    await warmed(where, kind)
    await closed(tmp_path)
    behind = source()
    await behind.inner.set("b", buf(b"more"))
    with mounted_read_only(where):
        store = opened(where, kind, behind, max_size=5 * 4096)
        assert await read(store, "a/c/1") == VALUES["a/c/1"]
        assert await read(store, "b") == b"more"
        assert await store.drain()
        assert not store.is_cached("b")
        assert await listed(store.list_dir("a/c")) == sorted(f"{n}" for n in range(10))
        # What others may have filled in from before it is dropped once they can be told.
        await store.set("b", buf(b"new"))
    await until_cached(store, "b")
    assert await read(store, "b") == b"new"
    await store.set("a/c/1", buf(b"new"))
    within_bound(store)
    assert await listed(store.list_dir("a/c")) == sorted(f"{n}" for n in range(10))
    await check_invariants_async(store)
    del store
    await closed(tmp_path)
    behind.take()
    store = opened(where, kind, behind, offline=True)
    assert await read(store, "b") == b"new"
    assert await listed(store.list_dir("a/c")) == sorted(f"{n}" for n in range(10))


@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.parametrize("most", [0, 1000])
async def test_change_while_the_volume_was_read_only_is_told_once_it_is_not(
    tmp_path: Path, kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes to the same directory through another mount; more than `most` changes are told as one."""
    monkeypatch.setattr("zcache._backends.directory.private_index._MOST_CHANGES", most)
    where, again = tmp_path / "cache", tmp_path / "again"
    await warmed(where, kind)
    await closed(tmp_path)
    again.mkdir()
    behind = source()
    with mounted_read_only(where):
        store = opened(where, kind, behind)
        assert await read(store, "a/c/1") == VALUES["a/c/1"]
        await store.set("b", buf(b"new"))
    # It was read before that, and is filled after it.
    code = _FILL_OLD.format(tests=str(TESTS), where=str(where), kind=kind)
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: ASYNC221
    await until_cached(store, "b")
    assert await read(store, "b") == b"new"


@pytest.mark.parametrize("kind", ON_DISK)
async def test_change_of_which_a_read_only_mount_lets_no_one_be_told_is_logged_once(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    where = tmp_path / "cache"
    await warmed(where, kind)
    await closed(tmp_path)
    with mounted_read_only(where):
        store = opened(where, kind, source())
        assert await read(store, "a/c/1") == VALUES["a/c/1"]
        caplog.clear()
        for key in ("b", "c"):
            await store.set(key, buf(b"new"))
        del store
    (message,) = said(caplog)
    assert "no other process is told that this one changes the source" in message


async def test_change_while_a_volume_is_taken_up_again_is_told_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "cache"
    await warmed(where, "directory")
    await closed(tmp_path)
    behind = source()
    await behind.inner.set("b", buf(b"more"))
    with mounted_read_only(where):
        store = opened(where, "directory", behind)
        assert await read(store, "a/c/1") == VALUES["a/c/1"]
    shared = store._cache.shared
    restore = shared.handle.restore

    def change_and_restore(index: Any) -> None:
        shared.place.private_index.note_change("a/c/1")
        restore(index)

    monkeypatch.setattr(shared.handle, "restore", change_and_restore)
    await until_cached(store, "b")
    assert store.is_cached("a/c/2")
    assert not store.is_cached("a/c/1")


_FILL_OLD = """
import sys
sys.path.insert(0, {tests!r})
from zarr.storage import LocalStore, MemoryStore
from support import buf, value_sync
from zcache import CachePool, CacheStore
cache = (CachePool if {kind!r} == "pool" else LocalStore)({where!r})
store = CacheStore(MemoryStore({{"b": buf(b"old")}}), cache_store=cache, source_id="source")
assert value_sync(store, "b") == b"old"
assert store.drain_sync() and store.is_cached("b")
"""


_MENDED = """
import asyncio, os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_read_only import *
where, kind = Path({where!r}), {kind!r}
# Root may write anywhere.
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)

def permit(mode):
    for path in (where, *where.rglob("*")):
        path.chmod(mode if path.is_dir() else mode & 0o666)

async def main():
    await warmed(where, kind)
    await closed(where.parent)
    permit(0o555)
    behind = source()
    await behind.inner.set("b", buf(b"more"))
    store = opened(where, kind, behind)
    for key, value in VALUES.items():
        assert await read(store, key) == value
    assert behind.calls["get"] == 0
    assert await read(store, "b") == b"more"
    assert await store.drain()
    assert not store.is_cached("b")
    permit(0o755)
    await until_cached(store, "b")
    await store.set("a/c/1", buf(b"new"))
    assert await read(store, "a/c/1") == b"new"
    if kind == "pool":
        assert [info.name for info in CachePool(where).sources()] == ["source"]

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ON_DISK)
def test_directory_of_which_the_permissions_were_mended_is_filled(
    tmp_path: Path, kind: str
) -> None:
    where = tmp_path / "home" / "cache"
    where.parent.mkdir()
    where.parent.chmod(0o777)
    for above in where.parent.parents:
        if not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)
    here = f"{TESTS}:{Path(__file__).parent}"
    code = _MENDED.format(tests=str(TESTS), where=str(where), kind=kind)
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{here}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


_AS_SOMEBODY = """
import asyncio, gc, os, pickle, sys, time
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore
from zcache import CachePool, CacheStore, CacheUnreachableError
from zcache._backends import ownership
from zcache.testing import StoreDouble, is_complete
os.setgid(65534); os.setuid(65534)
source = StoreDouble(MemoryStore({f"a/c/{n}": cpu.Buffer.from_bytes(bytes([n]) * 1000) for n in range(10)}))
where, read_only, adopt = sys.argv[1], "read_only" in sys.argv, "adopt" in sys.argv
if "pool" in sys.argv:
    cache = CachePool(where, read_only=read_only)
else:
    cache = LocalStore(where, read_only=read_only)
store = CacheStore(source, cache_store=cache, source_id="source", adopt=adopt)
while not is_complete(store):
    time.sleep(0.01)
async def main():
    for n in range(10):
        value = await store.get(f"a/c/{n}", default_buffer_prototype())
        assert value.to_bytes() == bytes([n]) * 1000
    # Its owner could not be told, who may be reading just what is changed.
    for key in ("a/c/1", "b"):
        try:
            await store.set(key, cpu.Buffer.from_bytes(b"new"))
        except CacheUnreachableError:
            continue
        raise AssertionError(key)
    assert not await source.inner.exists("b")
asyncio.run(main())
print(source.calls["get"])
if adopt:
    # A worker, which was told nothing itself, gets what its parent may use.
    copy = CacheStore(MemoryStore(), cache_store=cache, source_id="source", adopt=True)
    data = pickle.dumps(copy)
    del copy, store, main
    gc.collect()
    ownership._trusted.clear()
    assert pickle.loads(data).is_cached("a/c/5")
"""


def open_to_all(where: Path) -> None:
    """Let all users read a directory, and reach it."""
    for above in where.parents:
        if not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)
    for path in (where, *where.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def as_somebody(where: Path, *how: str) -> subprocess.CompletedProcess[str]:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    open_to_all(where)
    before = contents(where)
    done = run_script(_AS_SOMEBODY, str(where), *how)
    assert contents(where) == before
    return done


async def test_directory_of_root_is_read_by_others(tmp_path: Path) -> None:
    await warmed(tmp_path / "cache")
    done = as_somebody(tmp_path / "cache")
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.parametrize("how", ["read_only", "adopt"])
@pytest.mark.parametrize("kind", ON_DISK)
async def test_another_users_directory_is_read_only_where_that_is_asked_for(
    tmp_path: Path, kind: str, how: str
) -> None:
    where = tmp_path / "cache"
    await warmed(where, kind)
    for path in (where, *where.rglob("*")):
        os.chown(path, 54321, 54321)
    refused = as_somebody(where, kind)
    assert "CacheOwnershipError" in refused.stderr
    assert "another user's (uid 54321)" in refused.stderr
    assert "read_only=True" in refused.stderr
    if (kind, how) == ("pool", "adopt"):
        return  # A pool is not adopted.
    done = as_somebody(where, kind, how)
    assert done.stdout.strip() == "0", done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("surface", ["get", "get_partial_values"])
@pytest.mark.parametrize("change", ["set", "delete"])
@pytest.mark.parametrize("kind", sorted(ON_DISK))
async def test_read_that_begins_after_a_change_of_another_joins_none_from_before(
    kind: str, change: str, surface: str, tmp_path: Path
) -> None:
    await warmed(tmp_path, kind)
    behind = GatedStore({"a/c/new": b"old"})
    writer = opened(tmp_path, kind, behind)
    made: Any = CachePool if kind == "pool" else LocalStore
    reader = CacheStore(behind, cache_store=made(tmp_path, read_only=True), source_id="source")
    behind.late["get"] = 1
    before = asyncio.create_task(read(reader, "a/c/new"))
    await reached(behind)
    if change == "set":
        await writer.set("a/c/new", buf(b"new"))
    else:
        await writer.delete("a/c/new")
    if surface == "get":
        found = await read(reader, "a/c/new")
    else:
        # The second one of these is brought by the first.
        first, second = await reader.get_partial_values(PROTOTYPE, [("a/c/new", None)] * 2)
        assert (first and first.to_bytes()) == (second and second.to_bytes())
        found = first and first.to_bytes()
    assert found == (b"new" if change == "set" else None)
    behind.release()
    assert await before == b"old"
