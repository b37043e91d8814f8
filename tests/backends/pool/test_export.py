"""What a pool holds of a source, written to another store, where it is readable as Zarr."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore, ZipStore

from directories import SEGMENTS, closed
from pools import KEYS, NEIGHBOURS, POOL_PATHS, one_of, pool_with_neighbours, source_of
from support import PROTOTYPE, buf, read, read_through, threads, until, value_sync
from zcache import (
    CachePool,
    CacheStore,
    CacheUnreachableError,
    IndexLockTimeout,
    OptionTypeError,
    OptionValueError,
    UsageError,
)
from zcache._backends.directory.filler import DirectoryFiller
from zcache._backends.pool.register import label_of, stand_in
from zcache._core import VALUE_HEADER
from zcache.testing import FakeClock, hold_index_lock

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

    from zcache._core import HeldLock

PAGE, FIRST_PAGE = 4096, 65
"""Bytes of a page of a segment; the one at which values begin."""
DATA = np.arange(40).reshape(4, 10)


where = one_of(POOL_PATHS)


def source_with_arrays(source: Store) -> None:
    """Write a group of three arrays: in chunks, in shards, and one that is not to be read."""
    group = zarr.create_group(source, attributes={"about": "export"})
    group.create_array("x", data=DATA, chunks=(2, 5))
    group.create_array("sharded", data=DATA, chunks=(2, 5), shards=(4, 10))
    group.create_array("unread", data=DATA + 1, chunks=(2, 5))


def warmed(pool: CachePool, source: Store) -> CacheStore:
    store = CacheStore(source, cache_store=pool, source_id="mine")
    group = zarr.open_group(store, mode="r")
    assert (group["x"][:] == DATA).all()
    assert (group["sharded"][:] == DATA).all()
    assert store.drain_sync()
    return store


def check_exported(target: Store) -> None:
    group = zarr.open_group(target, mode="r")
    assert group.attrs.asdict() == {"about": "export"}
    assert (group["x"][:] == DATA).all()
    assert (group["sharded"][:] == DATA).all()
    assert "unread" not in group


def test_export_writes_what_is_cached_as_zarr(where: Path | None, tmp_path: Path) -> None:
    source = MemoryStore()
    source_with_arrays(source)
    pool = pool_with_neighbours(where)
    warmed(pool, source)
    # The group, two arrays, and the chunks of one and the shard of the other.
    assert pool.export("mine", LocalStore(tmp_path / "target")) == 1 + 2 + 4 + 1
    check_exported(LocalStore(tmp_path / "target"))
    with ZipStore(tmp_path / "target.zip", mode="w") as archive:
        assert pool.export("mine", archive) == 8
    check_exported(ZipStore(tmp_path / "target.zip", mode="r"))
    with pytest.raises(OptionTypeError, match="invalid store: 'somewhere'"):
        pool.export("mine", "somewhere")  # type: ignore[arg-type]


@pytest.mark.parametrize("read_only", [False, True])
async def test_export_after_a_restart(tmp_path: Path, read_only: bool) -> None:
    source, path = MemoryStore(), tmp_path / "pool"
    await asyncio.to_thread(source_with_arrays, source)
    await asyncio.to_thread(lambda: warmed(pool_with_neighbours(path), source))
    await closed(tmp_path, "pool")
    pool = CachePool(path, read_only=read_only)
    names = {info.name for info in pool.sources()}
    assert "mine" in names
    target = MemoryStore()
    # From within an event loop, and from a thread.
    assert pool.export("mine", target) == 8
    await asyncio.to_thread(check_exported, target)
    assert await asyncio.to_thread(pool.export, "mine", MemoryStore()) == 8


@pytest.mark.slow
@pytest.mark.once
def test_export_of_what_xarray_has_read(where: Path | None, tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    dataset = xarray.Dataset(
        {"t": (("time", "x"), np.random.default_rng(0).normal(size=(6, 8)))},
        coords={"time": np.arange(6), "x": np.linspace(0, 1, 8)},
        attrs={"title": "export"},
    )
    dataset.to_zarr(tmp_path / "source", encoding={"t": {"chunks": (2, 4)}})
    pool = CachePool(where)
    store = CacheStore(LocalStore(tmp_path / "source"), cache_store=pool)
    xarray.testing.assert_identical(xarray.open_zarr(store).load(), dataset)
    assert store.drain_sync()
    (name,) = [info.name for info in pool.sources()]
    assert pool.export(name, LocalStore(tmp_path / "target")) == 1 + 6 + 2
    found = xarray.open_zarr(tmp_path / "target").load()
    xarray.testing.assert_identical(found, dataset)


def test_export_leaves_out_ranges_and_what_is_gone(where: Path | None) -> None:
    source = MemoryStore({key: buf(key.encode() * 10) for key in ("full", "part", "old")})
    pool = CachePool(where)
    store = CacheStore(source, cache_store=pool, source_id="mine", cache_set_data=False)

    async def use() -> None:
        await read_through(store, "full")
        await read_through(store, "part", RangeByteRequest(1, 5))
        await read_through(store, "old")
        await store.set("old", buf(b"new"))

    asyncio.run(use())
    target = MemoryStore()
    assert pool.export("mine", target) == 1
    assert {key: value.to_bytes() for key, value in target._store_dict.items()} == {
        "full": b"full" * 10
    }


def test_export_leaves_out_what_is_damaged(tmp_path: Path) -> None:
    pool = pool_with_neighbours(tmp_path)
    for segment in (tmp_path / SEGMENTS).iterdir():
        with segment.open("r+b") as file:
            # The first byte of the first value, after its header.
            file.seek(FIRST_PAGE * PAGE + VALUE_HEADER)
            file.write(b"?")
    target = MemoryStore()
    assert pool.export(NEIGHBOURS[0], target) == len(KEYS) - 1
    assert KEYS[0] not in target._store_dict


class Failing(WrapperStore[Any]):
    """A store that is full after three values."""

    count = 0

    async def set(self, key: str, value: Any) -> None:
        self.count += 1
        if self.count == 4:
            raise OSError(28, "No space left on device")
        await super().set(key, value)


def test_export_to_a_store_that_fails_raises_its_error_and_can_be_repeated(
    where: Path | None,
) -> None:
    source, inner = MemoryStore(), MemoryStore()
    source_with_arrays(source)
    pool = pool_with_neighbours(where)
    store = warmed(pool, source)
    target = Failing(inner)
    with pytest.raises(OSError, match="No space left"):
        pool.export("mine", target)
    assert len(inner._store_dict) == 3
    # Nothing of the pool has suffered; what was written is replaced.
    assert store.cache_stats()["cache_failures"] == 0
    assert pool.export("mine", target) == 8
    check_exported(inner)


def test_export_while_the_source_changes_writes_whole_values(where: Path | None) -> None:
    keys = [f"c/{n}" for n in range(20)]
    source = MemoryStore({key: buf(b"0" * 1000) for key in keys})
    pool = CachePool(where)
    store = CacheStore(source, cache_store=pool, source_id="mine")
    for key in keys:
        assert store.get_sync(key) is not None
    store.drain_sync()
    rounds = 0

    def write() -> None:
        nonlocal rounds
        for rounds in range(1, 30):
            for key in keys:
                store.set_sync(key, buf(str(rounds % 10).encode() * (1000 + rounds % 3)))

    def export() -> None:
        while rounds < 29:
            target = MemoryStore()
            assert pool.export("mine", target) <= len(keys)
            for value in target._store_dict.values():
                data = value.to_bytes()
                assert len(set(data)) == 1
                assert len(data) in (1000, 1001, 1002)

    with threads(write, export):
        pass
    store.drain_sync()
    asyncio.run(until(lambda: pool.export("mine", MemoryStore()) == len(keys)))


@pytest.mark.parametrize("below", ["", ".zcache", ".zcache/segments", "new/folder", "link"])
def test_export_into_the_folder_of_the_pool_is_refused(tmp_path: Path, below: str) -> None:
    pool = pool_with_neighbours(tmp_path / "above/pool")
    (tmp_path / "link").symlink_to(tmp_path / "above/pool/.zcache")
    target = tmp_path / below if below == "link" else tmp_path / "above/pool" / below
    before = set(tmp_path.rglob("*"))
    for store in (
        LocalStore(target),
        WrapperStore(LocalStore(target)),
        ZipStore(target / "a", mode="w"),
        LocalStore(tmp_path / "above"),
    ):
        with pytest.raises(OptionValueError, match=r"invalid store: .*above/pool"):
            pool.export(NEIGHBOURS[0], store)
    assert set(tmp_path.rglob("*")) == before


def test_export_into_what_is_cached_in_the_pool_is_refused(where: Path | None) -> None:
    pool = pool_with_neighbours(where)
    for store in (pool._store, CacheStore(MemoryStore(), cache_store=pool)):
        with pytest.raises(OptionValueError, match="invalid store: "):
            pool.export(NEIGHBOURS[0], store)
    assert pool.export(NEIGHBOURS[0], CacheStore(MemoryStore())) == len(KEYS)


class TakesTheLock(WrapperStore[Any]):
    """A store; when it gets its first value, the lock of a pool is taken, until it is released."""

    def __init__(self, store: Store, path: Path) -> None:
        super().__init__(store)
        self._path = path
        self.lock: HeldLock | None = None

    async def set(self, key: str, value: Any) -> None:
        if self.lock is None:
            self.lock = hold_index_lock(self._path)
            self.has_taken(self.lock)
        await super().set(key, value)

    def has_taken(self, lock: HeldLock) -> None:
        """Nothing more."""


def test_export_waits_for_the_lock_of_the_index(tmp_path: Path) -> None:
    class TakesItForAMoment(TakesTheLock):
        def has_taken(self, lock: HeldLock) -> None:
            threading.Timer(0.2, lock.release).start()

    pool, inner = pool_with_neighbours(tmp_path), MemoryStore()
    assert pool.export(NEIGHBOURS[0], TakesItForAMoment(inner, tmp_path)) == len(KEYS)
    assert sorted(inner._store_dict) == sorted(KEYS)


@pytest.mark.slow
def test_export_where_the_lock_is_held_says_so(tmp_path: Path) -> None:
    pool, target = pool_with_neighbours(tmp_path), TakesTheLock(MemoryStore(), tmp_path)
    with pytest.raises(IndexLockTimeout):
        pool.export(NEIGHBOURS[0], target)
    assert target.lock is not None
    assert target.lock.release()
    assert pool.export(NEIGHBOURS[0], MemoryStore()) == len(KEYS)


def test_export_of_what_cannot_be_read_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            pass

        def read(self, *_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

    pool = pool_with_neighbours(tmp_path)
    monkeypatch.setattr("zcache._backends.pool.place.SegmentReader", Broken)
    with pytest.raises(CacheUnreachableError, match=r"the value of '.*Input/output error"):
        pool.export(NEIGHBOURS[0], MemoryStore())


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_export_into_the_source_itself_is_refused(
    where: Path | None, tmp_path: Path, kind: str
) -> None:
    pool = CachePool(where)
    source = LocalStore(tmp_path / "source") if kind == "local" else MemoryStore()
    asyncio.run(source.set("k", buf(b"old")))
    stores = [CacheStore(source, cache_store=pool, source_id=name) for name in (None, "given")]
    for store in stores:
        assert store.get_sync("k") is not None
        store.drain_sync()
    asyncio.run(source.set("k", buf(b"new")))
    names = [info.name for info in pool.sources()]
    assert len(names) == 2
    for name in names:
        for target in (source, WrapperStore(source), CacheStore(source), Failing(source)):
            with pytest.raises(OptionValueError, match=r"is the source .* itself"):
                pool.export(name, target)
        assert pool.export(name, MemoryStore()) == 1
    assert sync(source.get("k", PROTOTYPE)).to_bytes() == b"new"


def test_export_into_the_source_is_refused_by_its_name_alone(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    asyncio.run(source.set("k", buf(b"old")))
    name = f"file://{tmp_path}/source"

    def use() -> None:
        store = CacheStore(source, cache_store=CachePool(tmp_path / "pool"))
        assert store.get_sync("k") is not None
        store.drain_sync()

    use()
    pool = CachePool(tmp_path / "pool")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    for called in (name, stand_in(label_of(name))):
        for path in ("source", "link"):
            with pytest.raises(OptionValueError, match=r"is the source .* itself"):
                pool.export(called, LocalStore(tmp_path / path))
        assert pool.export(called, LocalStore(tmp_path / "target")) == 1


@pytest.mark.parametrize("named", [True, False])
def test_export_into_a_part_of_the_source_or_around_it_is_refused(
    where: Path | None, tmp_path: Path, named: bool
) -> None:
    pool = CachePool(where if where is None else where / "pool")
    source = LocalStore(tmp_path / "above/source")
    asyncio.run(source.set("k", buf(b"1")))
    store = CacheStore(source, cache_store=pool, source_id=None if named else "given")
    assert store.get_sync("k") is not None
    assert store.drain_sync()
    if named:
        del store
        gc.collect()
    (name,) = [info.name for info in pool.sources()]
    (tmp_path / "link").symlink_to("above/source")
    for path in ("above/source/a/b", "above", "link/a", ""):
        with pytest.raises(OptionValueError, match="or one of them is inside the other"):
            pool.export(name, LocalStore(tmp_path / path))
    for path in ("above/source2", "above/other"):
        assert pool.export(name, LocalStore(tmp_path / path)) == 1


@pytest.mark.parametrize("where_to", ["realpath", "stat"])
@pytest.mark.parametrize("named", [True, False])
def test_export_beside_a_source_that_does_not_answer_asks_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where_to: str, named: bool
) -> None:
    pool, source = CachePool(tmp_path / "pool"), LocalStore(tmp_path / "source")
    asyncio.run(source.set("k", buf(b"1")))
    store = CacheStore(source, cache_store=pool, source_id=None if named else "given")
    assert store.get_sync("k") is not None
    assert store.drain_sync()
    (name,) = [info.name for info in pool.sources()]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    healthy = CacheStore(LocalStore(tmp_path / "link"), cache_store=pool, source_id="healthy")
    module = os.path if where_to == "realpath" else os
    answer, asked, answers = getattr(module, where_to), [], threading.Event()

    def ask(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path) == str(tmp_path / "source"):
            asked.append(threading.get_ident())
            # In its caller's thread nothing would bound it.
            if asked[-1] != caller:
                answers.wait(60)
        return answer(path, *args, **kwargs)

    caller = threading.get_ident()
    monkeypatch.setattr("zcache.pool._PATIENCE", 0.2)
    monkeypatch.setattr(module, where_to, ask)
    try:
        for _ in range(3):
            assert pool.export(name, LocalStore(tmp_path / "target")) == 1
        assert len(asked) == 1
        assert caller not in asked
        # By names it is known all the same.
        for target in (source, LocalStore(tmp_path)):
            with pytest.raises(OptionValueError, match="or one of them is inside the other"):
                pool.export(name, target)
        # Another one is asked all the same.
        with pytest.raises(OptionValueError, match="is the source 'healthy' itself"):
            pool.export("healthy", LocalStore(tmp_path / "real"))
    finally:
        answers.set()

    def is_asked_again() -> bool:
        asked.clear()
        return pool.export(name, LocalStore(tmp_path / "target")) == 1 and bool(asked)

    asyncio.run(until(is_asked_again))
    del healthy


def test_export_into_a_part_of_a_source_in_memory_is_refused(where: Path | None) -> None:
    pytest.importorskip("fsspec")
    pool, source = CachePool(where), FsspecStore.from_url("memory://exported/source")
    CacheStore(source, cache_store=pool)
    # No store over it is open any more.
    gc.collect()
    (name,) = [info.name for info in pool.sources()]
    for path in ("/exported/source/a", "/exported"):
        with pytest.raises(OptionValueError, match="or one of them is inside the other"):
            pool.export(name, FsspecStore(source.fs, path=path))
    assert pool.export(name, FsspecStore(source.fs, path="/exported/source2")) == 0


@pytest.mark.parametrize("path", ["bucket/a", "bucket/a/b", "bucket"])
def test_export_into_a_part_of_a_source_in_a_bucket_is_refused(
    where: Path | None, path: str
) -> None:
    pytest.importorskip("s3fs")
    pool = CachePool(where)
    store = CacheStore(FsspecStore.from_url("s3://bucket/a"), cache_store=pool)
    del store
    gc.collect()
    with pytest.raises(OptionValueError, match="or one of them is inside the other"):
        pool.export("s3://bucket/a", FsspecStore.from_url(f"s3://{path}"))


@pytest.fixture
def held_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills of a pool in a directory begin once they are waited for."""
    held: list[Any] = []
    submit, is_idle, wait = DirectoryFiller.submit, DirectoryFiller.is_idle, DirectoryFiller.wait

    async def let_go(self: DirectoryFiller, *args: Any) -> bool:
        while held:
            submit(self, *held.pop())
        return await wait(self, *args)

    monkeypatch.setattr(DirectoryFiller, "submit", lambda _, *job: held.append(job))
    monkeypatch.setattr(
        DirectoryFiller, "is_idle", property(lambda self: not held and is_idle.__get__(self))
    )
    monkeypatch.setattr(DirectoryFiller, "wait", let_go)


@pytest.mark.usefixtures("held_fills")
@pytest.mark.parametrize("is_read_only", [False, True])
def test_export_waits_for_what_was_read_and_is_pending(tmp_path: Path, is_read_only: bool) -> None:
    kept = CachePool(tmp_path)
    store = CacheStore(source_of(k=b"1", c=b"2"), cache_store=kept, source_id="mine")
    assert [value_sync(store, key) for key in ("k", "c")] == [b"1", b"2"]
    # One that is only read from has an index of its own.
    pool = CachePool(tmp_path, read_only=is_read_only)
    # Of a store that is gone as well.
    del store
    gc.collect()
    assert pool.export("mine", MemoryStore()) == 2


@pytest.mark.usefixtures("held_fills")
def test_export_where_pending_values_do_not_reach_the_pool_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, target = CachePool(tmp_path), MemoryStore()
    store = CacheStore(source_of(k=b"1"), cache_store=pool, source_id="mine")
    assert value_sync(store, "k") == b"1"
    with monkeypatch.context() as patch:
        patch.setattr("zcache.pool.CLOSE_TIMEOUT", 0.0)
        with pytest.raises(CacheUnreachableError, match=r"values of 'mine' .*would lack them"):
            pool.export("mine", target)
    assert not target._store_dict
    assert pool.export("mine", target) == 1


def test_export_of_a_pool_that_is_only_read_from_has_what_was_added(tmp_path: Path) -> None:
    store = CacheStore(source_of(k=b"1", c=b"2"), cache_store=CachePool(tmp_path), source_id="mine")
    assert value_sync(store, "k") == b"1"
    store.drain_sync()
    pool = CachePool(tmp_path, read_only=True)
    assert pool.export("mine", MemoryStore()) == 1
    assert value_sync(store, "c") == b"2"
    store.drain_sync()
    assert pool.export("mine", MemoryStore()) == 2


def test_export_of_a_source_that_does_not_answer_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its volume is gone, and a look at a folder of it never returns."""
    (tmp_path / "source").mkdir()
    pool = CachePool(tmp_path / "pool")
    source = LocalStore(tmp_path / "source")
    sync(source.set("k", buf(b"1")))
    store = CacheStore(source, cache_store=pool)
    assert value_sync(store, "k") == b"1"
    store.drain_sync()
    del store
    gc.collect()
    ends, look = threading.Event(), os.stat

    def look_for_ever(path: Any, *args: Any, **options: Any) -> Any:
        if str(path) == str(tmp_path / "source"):
            ends.wait(60)
        return look(path, *args, **options)

    monkeypatch.setattr(os, "stat", look_for_ever)
    monkeypatch.setattr("zcache.pool._PATIENCE", 0.1)
    [name] = [found.name for found in pool.sources()]
    assert pool.export(name, LocalStore(tmp_path / "copy")) == 1
    ends.set()


def test_export_writes_what_is_too_old_for_its_store(where: Path | None) -> None:
    pool, clock = CachePool(where), FakeClock()
    source = MemoryStore({"k": buf(b"old")})
    store = CacheStore(source, cache_store=pool, source_id="s", max_age_seconds=1, clock=clock)
    assert store.get_sync("k") is not None
    store.drain_sync()
    clock.advance(2)
    assert not store.is_cached("k")
    assert pool.export("s", MemoryStore()) == 1


def test_export_in_the_event_loop_of_zarr_names_the_way_out(where: Path | None) -> None:
    pool = pool_with_neighbours(where)

    async def export() -> int:
        with pytest.raises(UsageError, match=r"await asyncio\.to_thread\(pool\.export"):
            pool.export(NEIGHBOURS[0], MemoryStore())
        return await asyncio.to_thread(pool.export, NEIGHBOURS[0], MemoryStore())

    assert sync(export()) == len(KEYS)


@pytest.mark.parametrize("kind", ["pool", "memory pool"])
async def test_name_that_no_source_has_is_refused(kind: str, tmp_path: Path) -> None:
    """A slip must not look as if a source was forgotten."""
    pool = CachePool(tmp_path / "pool") if kind == "pool" else CachePool()
    store = CacheStore(
        MemoryStore({"k": buf(b"1")}), cache_store=pool, source_id="s3://b/era5.zarr"
    )
    await read(store, "k")
    await store.drain()
    for act in (pool.forget, partial(pool.export, store=MemoryStore())):
        with pytest.raises(OptionValueError) as caught:
            await asyncio.to_thread(act, "s3://b/era6.zarr")
        assert "'s3://b/era6.zarr' is no source of the pool" in str(caught.value)
        assert "Did you mean 's3://b/era5.zarr'?" in str(caught.value)
    assert store.is_cached("k")
    for _ in range(2):  # One that is forgotten may be forgotten again.
        await asyncio.to_thread(pool.forget, "s3://b/era5.zarr")
    assert not store.is_cached("k")
    assert await asyncio.to_thread(pool.export, "s3://b/era5.zarr", MemoryStore()) == 0
