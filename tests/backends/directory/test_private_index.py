"""A cache that was given as read-only never writes into its directory, in whatever way it comes to open."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

from forks import run
from mounts import mounted_read_only
from pools import ON_DISK
from support import buf, drained, listed, read, until
from zcache import CachePool, CacheStore, CacheUnreachableError
from zcache._backends.directory import private_index
from zcache._backends.pool import layout
from zcache._core import SegmentFiles
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

VALUES = {f"a/c/{n}": bytes([n]) * 1000 for n in range(8)}


@pytest.fixture(params=ON_DISK)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_store(kind: str, where: Path, behind: Any = None, **options: Any) -> CacheStore:
    """A store over the cache directory or the pool; `options` with `read_only` are those of the cache store."""
    cache_options = {"read_only": options.pop("read_only", False)}
    cache = (LocalStore if kind == "directory" else CachePool)(where, **cache_options)
    behind = source() if behind is None else behind
    return CacheStore(behind, cache_store=cache, source_id="source", **options)


def source() -> StoreDouble:
    return StoreDouble(MemoryStore({key: buf(value) for key, value in VALUES.items()}))


async def fill_in(kind: str, where: Path, behind: Any = None) -> CacheStore:
    """Fill the cache as another process would."""
    store = open_store(kind, where, behind)
    await check_values(store)
    await drained(store)
    return store


async def check_values(store: CacheStore) -> None:
    for key, value in VALUES.items():
        assert await read(store, key) == value


async def is_served(store: CacheStore) -> bool:
    """Whether all values are hits."""
    before = store.cache_stats()["misses"]
    await check_values(store)
    return store.cache_stats()["misses"] == before


def everything_in(where: Path) -> dict[str, tuple[int, ...]]:
    """What there is, with permissions, owners and times."""
    paths = [where, *where.rglob("*")] if where.exists() else []
    found = {str(path): path.lstat() for path in paths}
    return {
        path: (s.st_ino, s.st_mode, s.st_uid, s.st_gid, s.st_size, s.st_mtime_ns)
        for path, s in found.items()
    }


def place_of(store: CacheStore) -> Any:
    return store._cache.shared.place


def in_child(work: Callable[[], Awaitable[object]]) -> None:
    """Do this in a forked child."""
    assert run(lambda: asyncio.run(work())) == 0  # type: ignore[arg-type]


# --------------------------------------------------------------------- what is never written


def test_child_that_was_forked_reads_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    where = tmp_path / "cache"
    writer = asyncio.run(fill_in(kind, where))
    store = open_store(kind, where, read_only=True, max_size=4096)
    asyncio.run(check_values(store))
    before = everything_in(where)

    async def use() -> None:
        await until(lambda: is_complete_now(store))
        assert await is_served(store)
        # What others must not lose: this one asks for less than there is.
        assert await read(store, "missing") is None
        place_of(store).recovery.come_back_now()
        assert await is_served(store)
        assert not place_of(store).handle.index.shared

    in_child(use)
    assert everything_in(where) == before
    assert writer.cache_info()["max_size"] is None
    assert asyncio.run(is_served(writer))


def is_complete_now(store: CacheStore) -> bool:
    """Whether it is open, which begins with the first use, knows what there is, and is used."""
    handle = store._cache.shared.handle
    return bool(handle.call_blocking(lambda index: index.is_complete)) and handle.usable


def test_child_that_was_forked_on_a_read_only_volume_is_served(kind: str, tmp_path: Path) -> None:
    where = tmp_path / "cache"
    asyncio.run(fill_in(kind, where))
    with mounted_read_only(where):
        store = open_store(kind, where)
        asyncio.run(check_values(store))

        async def use() -> None:
            await until(lambda: is_complete_now(store))
            assert await is_served(store)

        in_child(use)
        store.close()


@pytest.mark.parametrize("is_there", [False, True])
async def test_path_without_a_cache_stays_as_it_is_until_others_fill_it(
    kind: str, is_there: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = tmp_path / "deep" / "cache"
    if is_there:
        where.mkdir(parents=True)
    before = everything_in(tmp_path)
    store = open_store(kind, where, read_only=True)
    assert "there is no cache in" in caplog.text
    for _ in range(2):
        await check_values(store)
        place_of(store).recovery.come_back_now()
        await listed(store.list_dir("a"))
    # Nothing has to be told to anyone.
    await store.set("b", buf(b"new"))
    assert await read(store, "b") == b"new"
    assert everything_in(tmp_path) == before
    others = await fill_in(kind, where)
    place_of(store).recovery.come_back_now()
    filled = everything_in(tmp_path)
    assert await is_served(store)
    assert everything_in(tmp_path) == filled
    # And where it is removed, while it is in use, and made anew.
    del others
    shutil.rmtree(where)
    place_of(store).recovery.come_back_now()
    await check_values(store)
    assert not where.exists()
    await fill_in(kind, where)
    place_of(store).recovery.come_back_now()
    assert await is_served(store)


async def test_damaged_index_of_its_own_is_made_anew(kind: str, tmp_path: Path) -> None:
    await fill_in(kind, tmp_path)
    store = open_store(kind, tmp_path, read_only=True)
    await check_values(store)
    before = everything_in(tmp_path)
    place = place_of(store)
    place.recovery.start_over("damaged")
    assert not place.handle.usable
    await check_values(store)
    place.recovery.come_back_now()
    assert await is_served(store)
    assert not place.handle.index.shared
    place.recovery.come_back_now()
    assert await is_served(store)
    assert everything_in(tmp_path) == before


async def test_permissions_of_others_stay(kind: str, tmp_path: Path) -> None:
    where = tmp_path / "cache"
    await fill_in(kind, where)
    for path in where.rglob("*"):
        path.chmod(0o750 if path.is_dir() else 0o640)
    where.chmod(0o777)
    before = everything_in(where)
    store = open_store(kind, where, read_only=True)
    assert await is_served(store)
    place_of(store).recovery.come_back_now()
    assert await is_served(store)
    in_child(lambda: check_values(store))
    assert everything_in(where) == before


async def test_list_dir_leaves_no_answer_behind(kind: str, tmp_path: Path) -> None:
    await fill_in(kind, tmp_path)
    store = open_store(kind, tmp_path, read_only=True)
    before = everything_in(tmp_path)
    assert await listed(store.list_dir("a")) == ["c"]
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("read_only", [False, True])
def test_child_that_is_forked_while_the_cache_is_not_used_waits_for_nothing(
    kind: str, read_only: bool, tmp_path: Path
) -> None:
    asyncio.run(fill_in(kind, tmp_path))
    store = open_store(kind, tmp_path, read_only=read_only)
    place_of(store).handle.abandon(OSError("gone for a moment"))

    async def use() -> None:
        await check_values(store)
        # Who finds the lock of the index taken raises this. A look may be on its way.
        assert store.cache_info()["cached_keys"] in range(len(VALUES) + 1)
        place_of(store).recovery.come_back_now()
        await until(lambda: is_complete_now(store))
        assert await is_served(store)

    in_child(use)


# ---------------------------------------------------------------- what others add later


async def test_what_others_add_later_is_served(kind: str, tmp_path: Path) -> None:
    """A miss looks for it, with nothing else to do than to read."""
    where = tmp_path / "cache"
    behind = source()
    await fill_in(kind, where, behind)
    store = open_store(kind, where, behind, read_only=True)
    await check_values(store)
    await behind.inner.set("b", buf(b"later"))
    writer = open_store(kind, where, behind)
    assert await read(writer, "b") == b"later"
    await writer.set("a/c/1", buf(b"new"))
    await drained(writer)
    before = everything_in(where)

    async def hits() -> bool:
        misses = store.cache_stats()["misses"]
        assert await read(store, "b") == b"later"
        assert await read(store, "a/c/1") == b"new"
        return store.cache_stats()["misses"] == misses

    for _ in range(3000):
        if await hits():
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("it is never served")
    assert everything_in(where) == before


async def test_what_others_evict_is_not_damaged(kind: str, tmp_path: Path) -> None:
    where = tmp_path / "cache"
    behind = source()
    await fill_in(kind, where, behind)
    store = open_store(kind, where, behind, read_only=True)
    await check_values(store)
    writer = open_store(kind, where, behind)
    await writer.invalidate()
    await drained(writer)
    await check_values(store)
    assert store.cache_stats()["damaged"] == 0


async def test_look_where_nothing_has_changed_keeps_the_index(kind: str, tmp_path: Path) -> None:
    await fill_in(kind, tmp_path)
    store = open_store(kind, tmp_path, read_only=True)
    place = place_of(store)

    def keeps() -> bool:
        before = place.handle.index
        place.recovery.come_back_now()
        return bool(place.handle.index is before)

    # Within a tick of the last change it cannot be told.
    await until(keeps)
    assert keeps()


async def test_read_your_writes_whatever_others_fill_meanwhile(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that another process has filled during a write, with what the source held before."""
    behind = source()
    await behind.inner.set("k", buf(b"old"))
    await fill_in(kind, tmp_path, behind)
    store = open_store(kind, tmp_path, behind, read_only=True)
    writer = open_store(kind, tmp_path, behind)
    inner_set = behind.inner.set

    async def set_slowly(key: str, value: Any) -> None:
        assert await read(writer, key) == b"old"
        await drained(writer)
        assert writer.is_cached(key)
        await inner_set(key, value)

    with monkeypatch.context() as patch:
        patch.setattr(behind.inner, "set", set_slowly)
        await store.set("k", buf(b"new"))
    for _ in range(2):
        assert await read(store, "k") == b"new"
        place_of(store).recovery.come_back_now()
    assert await is_served(store)
    # Each is remembered, so there is an end.
    monkeypatch.setattr(private_index, "_MOST_CHANGES", 0)
    await writer.set("a/c/1", buf(b"elsewhere"))
    await drained(writer)
    place_of(store).recovery.come_back_now()
    assert await read(store, "k") == b"new"
    assert await read(store, "a/c/1") == b"elsewhere"


LOSSES = ["nothing", "all", ".zcache", ".zcache/index", ".zcache/segments", "moved"]


@pytest.mark.parametrize("lost", LOSSES)
@pytest.mark.parametrize("holes", [True, False])
async def test_write_of_others_is_seen_at_once_whatever_was_removed(
    kind: str, holes: bool, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of what was removed are in files that are open still, and those who write know these no more."""
    if not holes:
        monkeypatch.setattr(layout, "SegmentFiles", WithoutHoles)
    where = tmp_path / "cache"
    behind = source()
    writer = await fill_in(kind, where, behind)
    store = open_store(kind, where, behind, read_only=True)
    assert await is_served(store)
    if lost == "moved":
        where.rename(tmp_path / "moved")
    elif lost != "nothing":
        shutil.rmtree(where if lost == "all" else where / lost, ignore_errors=True)
    await writer.set("a/c/0", buf(bytes(1000)[::-1]))
    await writer.set("a/c/1", buf(b"new".ljust(1000)))
    await writer.delete("a/c/2")
    for _ in range(2):
        assert await read(store, "a/c/1") == b"new".ljust(1000)
        assert await read(store, "a/c/1", RangeByteRequest(1, 4)) == b"ew "
        assert await read(store, "a/c/2") is None
        await drained(writer)
        assert (await read(writer, "a/c/1"), await read(writer, "a/c/2")) == (
            b"new".ljust(1000),
            None,
        )
    assert store.cache_stats()["damaged"] == 0
    # The last read may have been what fills it again.
    await drained(writer)
    place_of(store).recovery.come_back_now()
    misses = store.cache_stats()["misses"]
    assert await read(store, "a/c/1") == b"new".ljust(1000)
    # What a writer has, its reader has: after a loss it may go on without caching for a moment.
    if writer.is_cached("a/c/1"):
        assert store.cache_stats()["misses"] == misses


class WithoutHoles:
    """The segments of a file system that cannot punch holes."""

    def __new__(cls, root: str, **_: Any) -> Any:
        return SegmentFiles(root, holes=False)

    @staticmethod
    def can_punch(_: str) -> bool:
        return False


async def test_sizes_are_those_that_others_have_written(kind: str, tmp_path: Path) -> None:
    behind = source()
    writer = await fill_in(kind, tmp_path, behind)
    store = open_store(kind, tmp_path, behind, read_only=True)
    assert await is_served(store)
    await writer.delete("a/c/0")
    await writer.set("a/c/1", buf(b"longer" * 1000))
    await drained(writer)
    assert not await store.exists("a/c/0")
    with pytest.raises(FileNotFoundError):
        await store.getsize("a/c/0")
    assert await store.exists("a/c/1")
    assert await store.getsize("a/c/1") == 6000
    assert await store.getsize_prefix("a") == 6000 + 6 * 1000
    # What is as it was needs no source.
    before = behind.calls
    assert await store.getsize("a/c/2") == 1000
    assert behind.calls == before


# ------------------------------------------------------------------- what is said of it


async def test_nothing_can_be_dropped(kind: str, tmp_path: Path) -> None:
    writer = await fill_in(kind, tmp_path)
    store = open_store(kind, tmp_path, read_only=True)
    await check_values(store)
    said = r"is only read from.*dropped: it was opened with read_only=True. Open it without that"
    with pytest.raises(CacheUnreachableError, match=said):
        await store.clear_cache()
    with pytest.raises(CacheUnreachableError, match=said):
        await store.invalidate()
    with pytest.raises(CacheUnreachableError, match=said):
        store.invalidate_sync("none/of/it")
    assert await is_served(store)
    assert await is_served(writer)
    # What is refused changes nothing for long.
    for change in (store.delete("a/c/1"), store.delete_dir("a"), store.clear()):
        with pytest.raises(CacheUnreachableError, match="could not be told"):
            await change
        place_of(store).recovery.come_back_now()
        assert await is_served(store)


async def test_errors_of_a_read_only_pool_name_the_cause(tmp_path: Path) -> None:
    pool = CachePool(tmp_path / "pool", read_only=True)
    with pytest.raises(CacheUnreachableError, match="forgotten: it was opened with read_only=True"):
        pool.forget("source")
    with pytest.raises(CacheUnreachableError, match=r"no pool in .* yet, and read_only=True makes"):
        await asyncio.to_thread(pool.export, "source", MemoryStore())
    assert pool.sources() == []
    assert pool.cache_info()["entries"] == 0
    assert not (tmp_path / "pool").exists()
    await fill_in("pool", tmp_path / "pool")
    pool._pool.directory.recovery.come_back_now()  # type: ignore[union-attr]
    assert await asyncio.to_thread(pool.export, "source", MemoryStore()) == len(VALUES)
    assert [one.name for one in pool.sources()] == ["source"]


def test_another_kind_of_cache_is_refused(kind: str, tmp_path: Path) -> None:
    other = "pool" if kind == "directory" else "directory"
    asyncio.run(fill_in(other, tmp_path))
    before = everything_in(tmp_path)
    with pytest.raises(ValueError, match="pool"):
        open_store(kind, tmp_path, read_only=True)
    assert everything_in(tmp_path) == before
