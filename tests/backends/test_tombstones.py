"""What a cache that outlives its process must not take in again: dropped, torn, or another cache's."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from directories import tree
from support import buf, check_quiet, quiet, read_through, until, write
from zcache import CacheStore
from zcache._backends.tombstones import key_of, tombstone, with_tombstone
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from pathlib import Path

DROPPED = ".zcache/dropped/"
WRITING = ".zcache/writing/"


def open_store(where: Path, **options: Any) -> tuple[StoreDouble, CacheStore]:
    """A cache directory and its source, which counts."""
    source = StoreDouble(LocalStore(where / "source"))
    cache = LocalStore(where / "cache")
    # The double has no name of its own.
    source_id = f"file://{where.resolve() / 'source'}"
    store = CacheStore(source, cache_store=cache, source_id=source_id, **options)
    return source, store


def lose_index(where: Path) -> None:
    """As after a reboot: all that is left are the files."""
    gc.collect()
    (where / "cache/.zcache/index/head").write_bytes(b"")


def marks_of(where: Path, kind: str) -> set[str]:
    return {name for name in tree(where / "cache") if name.startswith(kind)}


def test_tombstone_of_each_name_is_its_own() -> None:
    names = ["a", "a/b", ".zcache/ranges/a/b@3-5", "\udcff"]
    assert [key_of(name) for name in names] == ["a", "a/b", "a/b", "\udcff"]
    assert len({tombstone(name) for name in names}) == len(names)
    assert with_tombstone([tombstone("a/b"), tombstone("a")], names) == ["a", "a/b"]
    assert with_tombstone([], names) == []


# ------------------------------------------------------------------- directories


@pytest.fixture
def stuck(tmp_path: Path) -> Any:
    """Lets the folders of cache directories refuse deletes."""
    if os.geteuid() == 0 and not _immutable(tmp_path):
        pytest.skip("this user can delete everything, and the file system knows no such mark")
    refused: list[Path] = []

    def refuse(folder: Path) -> None:
        _refuse(folder, True)
        refused.append(folder)

    yield refuse
    for folder in refused:
        _refuse(folder, False)


def _refuse(folder: Path, refuses: bool) -> bool:
    """Let no file be removed from a folder; for root that takes a mark of the file system."""
    if os.geteuid():
        folder.chmod(0o555 if refuses else 0o755)
        return True
    import subprocess

    done = subprocess.run(
        ["chattr", "+i" if refuses else "-i", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0


def _immutable(where: Path) -> bool:
    try:
        works = _refuse(where, True)
    except FileNotFoundError:
        return False
    _refuse(where, False)
    return works


@pytest.mark.parametrize("still", [True, False])
async def test_directory_delete_refused_value_is_never_served_later(
    tmp_path: Path, stuck: Any, still: bool
) -> None:
    source, store = open_store(tmp_path, cache_set_data=False)
    for key in ("a/k", "r/r", "other"):
        await write(store, key, b"0123456789")
        await read_through(store, key, RangeByteRequest(2, 4) if key == "r/r" else None)
    stuck(tmp_path / "cache/a")
    stuck(tmp_path / "cache/.zcache/ranges/r")
    for key in ("a/k", "r/r"):
        await write(store, key, b"ABCDEFGHIJ")
    assert await read_through(store, "a/k") == b"ABCDEFGHIJ"
    assert store.cache_info()["current_size"] == 22
    assert len(marks_of(tmp_path, DROPPED)) == 2
    del store
    lose_index(tmp_path)
    if not still:
        _refuse(tmp_path / "cache/a", False)
        _refuse(tmp_path / "cache/.zcache/ranges/r", False)
    source, store = open_store(tmp_path, cache_set_data=False)
    # As long as they cannot be deleted they count, and are not served.
    assert store.cache_info()["current_size"] == (22 if still else 10)
    assert await read_through(store, "a/k") == b"ABCDEFGHIJ"
    assert await read_through(store, "r/r", RangeByteRequest(2, 4)) == b"CD"
    assert source.take()["get"] == 2
    assert await read_through(store, "other") == b"0123456789"
    assert source.take()["get"] == 0
    assert len(marks_of(tmp_path, DROPPED)) == (2 if still else 0)
    _refuse(tmp_path / "cache/a", False)
    _refuse(tmp_path / "cache/.zcache/ranges/r", False)
    del store
    lose_index(tmp_path)
    source, store = open_store(tmp_path)
    assert marks_of(tmp_path, DROPPED) == set()
    assert await read_through(store, "a/k") == b"ABCDEFGHIJ"
    await check_quiet(store)


def test_directory_adopt_with_a_cache_below_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "cache/within"
    CacheStore(LocalStore(tmp_path / "one"), cache_store=LocalStore(inner)).cache_info()
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"holds another cache directory, .*within"):
        open_store(tmp_path, adopt=True)
    assert tree(tmp_path) >= before


# ---------------------------------------------------------------- listed stores


class Stubborn(StoreDouble):
    """A store that deletes nothing any more once it is told so."""

    refuses = False

    async def delete(self, key: str) -> None:
        if self.refuses:
            # One that is not logged, for a record would keep the frames, and they the store.
            raise OSError(22, "no deletes", key)
        await super().delete(key)


def remote(where: Path) -> FsspecStore:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url(f"file://{where / 'cache'}", storage_options={"auto_mkdir": True})


async def over(where: Path, cache: Any) -> CacheStore:
    """A store with a cache store that is listed by now."""
    store = CacheStore(LocalStore(where / "source"), cache_store=cache)
    assert await store.drain()
    return store


async def test_listed_store_delete_refused_value_is_never_served_later(tmp_path: Path) -> None:
    cache = Stubborn(remote(tmp_path))
    store = await over(tmp_path, cache)
    for key in ("k", "other"):
        await write(store, key, b"old")
    cache.refuses = True
    await write(store, "k", b"new")
    assert await read_through(store, "k") == b"new"
    assert (tmp_path / "cache/k").read_bytes() == b"old"
    assert marks_of(tmp_path, DROPPED) == {tombstone("k")}
    del store
    gc.collect()

    store = await over(tmp_path, remote(tmp_path))
    assert await read_through(store, "k") == b"new"
    (tmp_path / "source/other").write_bytes(b"changed")  # Behind the back of the cache.
    assert await read_through(store, "other") == b"old"
    assert marks_of(tmp_path, DROPPED) == set()


async def test_write_cancelled_while_a_tombstone_is_made_frees_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be deleted is tried again, and its room comes back."""
    cache = Stubborn(remote(tmp_path))
    store = await over(tmp_path, cache)
    await write(store, "k", b"0123456789")
    cache.refuses = True
    gate = cache.block("set", key=tombstone("k"))
    task = asyncio.ensure_future(store.set("k", buf(b"new")))
    await gate.entered_async()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.release()
    cache.refuses = False
    await write(store, "other", b"12345")
    await quiet(store)
    assert store.cache_info()["current_size"] == 5
    assert not (tmp_path / "cache/k").exists()


async def test_listed_store_still_cannot_delete_caches_all_else(tmp_path: Path) -> None:
    cache = Stubborn(remote(tmp_path))
    store = await over(tmp_path, cache)
    await write(store, "k", b"old")
    cache.refuses = True
    await write(store, "k", b"new")
    del store
    gc.collect()
    store = await over(tmp_path, cache)
    assert await read_through(store, "k") == b"new"
    assert marks_of(tmp_path, DROPPED) == {tombstone("k")}
    # It counts, and all else is cached as ever.
    assert store.cache_info()["current_size"] == 3
    cache.refuses = False
    await write(store, "other", b"12345")
    assert await read_through(store, "other") == b"12345"
    assert store.cache_stats()["hits"] == 1
    assert not (tmp_path / "cache/k").exists()
    assert await read_through(store, "k") == b"new"
    assert store.cache_info()["current_size"] == 8


async def test_listed_store_value_written_in_part_is_never_served(tmp_path: Path) -> None:
    """A store of files shows half of it; a process that is killed meanwhile deletes nothing."""
    store = await over(tmp_path, remote(tmp_path))
    for key in ("k", "other"):
        await write(store, key, b"0123456789")
    assert marks_of(tmp_path, WRITING) == set()
    del store
    gc.collect()
    (tmp_path / "cache/k").write_bytes(b"01234")
    unfinished = tmp_path / "cache" / WRITING / tombstone("k").rpartition("/")[2]
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.write_bytes(b"k")

    store = await over(tmp_path, remote(tmp_path))
    assert await read_through(store, "k") == b"0123456789"
    assert marks_of(tmp_path, WRITING) == set()
    assert (tmp_path / "cache/k").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    "pause", [0.02, 0.1]
)  # seconds; the second is longer than all together may take
async def test_listed_store_no_change_waits_for_all_tombstones(
    pause: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = StoreDouble(remote(tmp_path))
    store = await over(tmp_path, cache)
    keys = {f"d/{number}" for number in range(20)}
    for key in keys:
        await write(store, key, b"0123456789")
    monkeypatch.setattr("zcache._backends.store.backend.DELETE_TIMEOUT", 0.05)
    cache.fail("delete", OSError(5, "no"))
    cache.delay("set", pause)
    await store.delete_dir("d")
    assert len(marks_of(tmp_path, DROPPED)) < len(keys)
    # They are written all the same.
    await until(lambda: len(marks_of(tmp_path, DROPPED)) == len(keys))
    for key in keys:
        assert await read_through(store, key) is None
    cache.heal()


async def test_listed_store_that_is_slow_takes_the_tombstones_of_each_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is answered too late, so the circuit breaker is open for those after it."""
    cache = StoreDouble(remote(tmp_path))
    store = await over(tmp_path, cache)
    for key in ("a", "b", "c"):
        await write(store, key, b"0123456789")
    monkeypatch.setattr("zcache._backends.store.backend.DELETE_TIMEOUT", 0.05)
    cache.fail("delete", OSError(5, "no"))
    cache.delay("set", 0.1)
    for key in ("a", "b", "c"):
        await store.delete(key)
    await until(lambda: len(marks_of(tmp_path, DROPPED)) == 3)
    cache.heal()


async def test_listed_store_value_is_marked_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    cache = remote(tmp_path)
    put = type(cache).set

    async def watched(self: Any, key: str, value: Any, *rest: Any) -> None:
        if key == "k":
            seen.append(marks_of(tmp_path, WRITING))
        await put(self, key, value, *rest)

    monkeypatch.setattr(type(cache), "set", watched)
    await write(await over(tmp_path, cache), "k", b"1")
    assert seen == [{WRITING + tombstone("k").rpartition("/")[2]}]


# --------------------------------------------------------------- sorts of caches


async def test_directory_through_another_store_is_refused(tmp_path: Path) -> None:
    _, store = open_store(tmp_path)
    await write(store, "k", b"1")
    for cache in (WrapperStore(LocalStore(tmp_path / "cache")), remote(tmp_path)):
        with pytest.raises(ValueError, match=r"made through a zarr\.storage\.LocalStore itself"):
            await over(tmp_path, cache)
    assert await read_through(store, "k") == b"1"


async def test_listed_store_through_a_local_store_is_refused(tmp_path: Path) -> None:
    await write(await over(tmp_path, remote(tmp_path)), "k", b"1")
    stamp = json.loads((tmp_path / "cache/.zcache/stamp.json").read_text())
    assert stamp["listed"] is True
    with pytest.raises(ValueError, match=r"made through a store of another class"):
        open_store(tmp_path)
    assert not (tmp_path / "cache/.zcache/index").exists()
