"""A participant that cannot use the index: others see what it writes, and it comes back if it can."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import LocalStore, MemoryStore

from directories import closed
from pools import CACHES, ON_DISK
from storm import get
from support import buf, drained_sync, read, until
from zcache import CacheStore, CacheUnreachableError
from zcache._backends.directory import backend
from zcache._backends.directory.files import make_folders
from zcache._backends.directory.recovery import Recovery
from zcache._index import shared
from zcache._runtime.apart import OneForEach
from zcache._runtime.coroutines import run_without_loop
from zcache._runtime.io import SyncIO
from zcache.testing import is_complete, stored_sizes, without_shared_index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from zarr.abc.store import Store

KEYS = [f"a/c/{n}" for n in range(5)]


def put(store: Store, key: str, value: bytes) -> None:
    store.set_sync(key, buf(value))  # type: ignore[attr-defined]


@pytest.fixture
def source() -> MemoryStore:
    source = MemoryStore()
    for key in KEYS:
        put(source, key, b"old")
    return source


def participant(where: Path, source: Store) -> CacheStore:
    """One at another path of the same directory, so that it is a participant of its own."""
    return CacheStore(source, cache_store=LocalStore(where), source_id="source")


@pytest.fixture
def both(tmp_path: Path, source: MemoryStore) -> tuple[CacheStore, CacheStore]:
    """Two participants; each has read all."""
    root = tmp_path / "cache"
    one = participant(root, source)
    other = forget_that_it_is_shared(root, source)
    for key in KEYS:
        for store in (one, other):
            assert get(store, key) == b"old"
            drained_sync(store)
    return one, other


def forget_that_it_is_shared(root: Path, source: Store) -> CacheStore:
    """A store of the same process that is a participant of its own, like one in another process."""
    kept, shared._shared = shared._shared, OneForEach()
    try:
        return participant(root, source)
    finally:
        shared._shared = kept


def handle_of(store: CacheStore) -> Any:
    return store._cache.shared.handle


def give_up(store: CacheStore) -> None:
    """What happens where the index could not be used for a second."""
    handle_of(store).abandon(OSError(errno.EMFILE, "no descriptors"))
    # It does not come back for the time of the test.
    store._cache.shared.place.recovery._last_try = time.monotonic() + 3600


def come_back(store: CacheStore) -> None:
    store._cache.shared.place.recovery._last_try = 0.0
    deadline = time.monotonic() + 20
    while not handle_of(store).usable:
        get(store, KEYS[0])
        assert time.monotonic() < deadline
        time.sleep(0.01)


CHANGES: dict[str, Callable[[CacheStore, str], object]] = {
    "set_sync": lambda store, key: put(store, key, b"new"),
    "set": lambda store, key: asyncio.run(store.set(key, buf(b"new"))),
    "delete_sync": lambda store, key: store.delete_sync(key),
    "delete_dir": lambda store, _: asyncio.run(store.delete_dir("a")),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_others_see_what_is_changed_without_the_index(
    both: tuple[CacheStore, CacheStore], source: MemoryStore, change: str
) -> None:
    one, other = both
    give_up(one)
    CHANGES[change](one, KEYS[1])
    expected = get(source, KEYS[1])
    assert expected != b"old"
    for store in (one, other, one, other):
        assert get(store, KEYS[1]) == expected
        drained_sync(store)


def test_a_fill_that_began_before_a_write_without_the_index_is_not_kept(
    both: tuple[CacheStore, CacheStore], source: MemoryStore
) -> None:
    """The other one has read the source already when the write returns."""
    one, other = both
    give_up(one)
    handle = handle_of(other)
    put(other, KEYS[1], b"old")
    drained_sync(other)
    index = handle.index
    index.confirm_deletes([cell for cell, _ in index.drop_missing(KEYS[1])], [])
    ticket = index.join(KEYS[1], None, object(), 0.0, False)
    put(one, KEYS[1], b"new")
    rejected = index.reserve(KEYS[1], None, 3, ticket, 0.0)
    assert getattr(rejected, "reason", None) == "overtaken by a write"
    assert get(other, KEYS[1]) == get(source, KEYS[1]) == b"new"


def test_it_comes_back(both: tuple[CacheStore, CacheStore]) -> None:
    one, other = both
    give_up(one)
    put(one, KEYS[1], b"without")
    come_back(one)
    assert get(one, KEYS[1]) == b"without"
    drained_sync(one)
    put(other, KEYS[1], b"other")
    assert get(one, KEYS[1]) == b"other"
    put(one, KEYS[1], b"one")
    drained_sync(one)
    assert get(other, KEYS[1]) == b"one"
    # It is cached, and both have the same.
    assert one.cache_info()["cached_keys"] == other.cache_info()["cached_keys"] > 0


def test_a_write_that_was_begun_before_ends_after(
    both: tuple[CacheStore, CacheStore], source: MemoryStore
) -> None:
    """Its beginning is known to an index that is not used when it ends, and the other way round."""
    one, other = both

    class Slow:
        during: Callable[[], None]

        async def __call__(self) -> None:
            put(source, KEYS[1], b"new")
            self.during()

    for during in (give_up, come_back):
        work = Slow()
        work.during = lambda during=during: during(one)  # type: ignore[misc]
        run_without_loop(one._cache.writer.write(SyncIO(source), KEYS[1], work, b"new"))
        for store in (one, other):
            assert get(store, KEYS[1]) == b"new"
        drained_sync(other)
    # Nothing is left that would keep the key out.
    deadline = time.monotonic() + 20
    while not one.cache_info()["cached_keys"]:
        get(one, KEYS[1])
        drained_sync(one)
        assert time.monotonic() < deadline


def test_a_write_that_nobody_could_be_told_of_does_not_begin(
    both: tuple[CacheStore, CacheStore],
    source: MemoryStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, other = both
    give_up(one)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "refused")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(backend, "run_in_background", lambda work, _: work())
    with pytest.raises(CacheUnreachableError):
        put(one, KEYS[1], b"new")
    with pytest.raises(CacheUnreachableError):
        asyncio.run(one.set(KEYS[1], buf(b"new")))
    with pytest.raises(CacheUnreachableError):
        asyncio.run(one.delete_dir("a"))
    assert get(source, KEYS[1]) == b"old"
    assert get(other, KEYS[1]) == b"old"
    # What has not begun is missed by no one.
    assert "may not see" not in caplog.text


@pytest.mark.parametrize("kind", ON_DISK)
def test_writes_of_which_others_hear_too_little_are_told_of_once(
    tmp_path: Path,
    kind: str,
    source: MemoryStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They hear of the beginning of each, and not of its end."""
    one = CacheStore(source, cache_store=CACHES[kind](tmp_path), source_id="source")
    give_up(one)
    real, calls = os.utime, 0

    def refuse_every_other(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise OSError(errno.EIO, "refused")
        real(*args, **options)

    monkeypatch.setattr(os, "utime", refuse_every_other)
    for value in (b"1", b"2", b"3"):
        put(one, KEYS[1], value)
        assert get(source, KEYS[1]) == value
    assert calls == 6
    assert caplog.text.count("may not see a write") == 1


def test_a_folder_that_cannot_be_looked_at_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(OSError, match="Stale file handle"):
        make_folders(str(tmp_path))


def test_the_cache_of_another_source_is_left_alone(
    both: tuple[CacheStore, CacheStore], tmp_path: Path
) -> None:
    one, _ = both
    give_up(one)
    one._cache.shared.place.layout.is_others = True
    file = tmp_path / "cache" / KEYS[1]
    assert file.exists()
    put(one, KEYS[1], b"new")
    assert file.exists()


def test_recovery_in_vain_the_directory_is_abandoned_with_one_line(
    tmp_path: Path,
    source: MemoryStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No read waits for an index that is never right."""
    store = participant(tmp_path / "cache", source)
    assert get(store, KEYS[1]) == b"old"
    drained_sync(store)
    monkeypatch.setattr(Recovery, "start_over", lambda *_: None)
    os.truncate(tmp_path / "cache/.zcache/index/head", 100)
    assert get(store, KEYS[1]) == b"old"
    put(store, KEYS[1], b"new")
    assert get(store, KEYS[1]) == b"new"
    # It may be in use again by now, which others say.
    assert caplog.text.count("cannot be used any more") == 1


@pytest.fixture
def alone(tmp_path: Path, source: MemoryStore) -> Iterator[tuple[CacheStore, CacheStore]]:
    """Two participants with an index of their own each, as where it cannot be shared."""
    with without_shared_index(OSError("the file system (NFS) does not share locks")):
        one = participant(tmp_path / "cache", source)
        other = forget_that_it_is_shared(tmp_path / "cache", source)
        for store in (one, other, one):
            for key in KEYS:
                assert get(store, key) == b"old"
            drained_sync(store)
        yield one, other


def do_before_each_change(
    monkeypatch: pytest.MonkeyPatch, source: MemoryStore, work: Callable[[], None]
) -> None:
    """Do something when the source is about to change."""
    for name in ("set", "set_sync", "delete", "delete_sync", "delete_dir"):
        real = getattr(MemoryStore, name, None)
        if real is None:
            continue

        def change(self: Any, *args: Any, real: Any = real, **options: Any) -> Any:
            if self is source:
                work()
            return real(self, *args, **options)

        monkeypatch.setattr(MemoryStore, name, change)


@pytest.mark.parametrize("filled", ["before its end", "after its end"])
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("who", ["both", "alone"])
def test_what_is_read_during_a_change_of_one_without_the_index_is_not_kept(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    source: MemoryStore,
    who: str,
    change: str,
    filled: str,
) -> None:
    one, other = request.getfixturevalue(who)
    if who == "both":
        give_up(one)
    key, later = KEYS[1], []
    filler = other._cache.shared.fills.filler
    submit = filler.submit

    def during() -> None:
        assert get(other, key) == b"old"
        if filled == "before its end":
            drained_sync(other)

    def wait_with_fills(*job: Any) -> None:
        later.append(job)

    if filled == "after its end":
        monkeypatch.setattr(filler, "submit", wait_with_fills)
    do_before_each_change(monkeypatch, source, during)
    CHANGES[change](one, key)
    monkeypatch.undo()
    expected = get(source, key)
    assert expected != b"old"
    for job in later:
        submit(*job)
    drained_sync(other)
    for store in (one, other, one, other):
        assert get(store, key) == expected
        drained_sync(store)
    # It can be cached again.
    if expected is not None:
        for _ in range(2):
            assert get(other, key) == expected
            drained_sync(other)
        if who == "both":
            before = other.cache_stats()["hits"]
            assert get(other, key) == expected
            assert other.cache_stats()["hits"] == before + 1


def test_with_an_index_of_its_own_what_was_written_is_cached_once_it_is_read(
    alone: tuple[CacheStore, CacheStore],
) -> None:
    one, _ = alone
    for value in (b"new", b"newer"):
        put(one, KEYS[1], value)
        assert get(one, KEYS[1]) == value
        drained_sync(one)
        before = one.cache_stats()["hits"]
        assert get(one, KEYS[1]) == value
        assert one.cache_stats()["hits"] == before + 1


def test_directory_of_another_source_that_is_only_read_is_left_alone(
    tmp_path: Path, source: MemoryStore
) -> None:
    store = participant(tmp_path, source)
    assert get(store, KEYS[1]) == b"old"
    drained_sync(store)
    del store
    cache = LocalStore(tmp_path, read_only=True)
    other = CacheStore(MemoryStore(), cache_store=cache, source_id="another")
    put(other, KEYS[1], b"new")
    assert get(other, KEYS[1]) == b"new"
    assert (tmp_path / KEYS[1]).read_bytes() == b"old"


async def test_rebuild_of_an_index_that_was_given_up_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MemoryStore({f"{n}": buf(b"value") for n in range(5)})
    store = CacheStore(source, cache_store=LocalStore(tmp_path), source_id="source")
    for key in source._store_dict:
        await read(store, key)
    assert store.drain_sync()
    del store
    await closed(tmp_path, ".")
    (tmp_path / ".zcache/index/head").unlink()
    with monkeypatch.context() as patch:
        # It has stopped half way.
        patch.setattr("zcache._backends.directory.scan.Scanner.rebuild", lambda *_: None)
        store = CacheStore(source, cache_store=LocalStore(tmp_path), source_id="source")
        assert not is_complete(store)
        store._cache.shared.handle.abandon(OSError("gone for a moment"))
    store._cache.shared.place.recovery.come_back_now()
    await until(lambda: is_complete(store))
    assert len(stored_sizes(store)) == 5


async def test_clear_cache_removes_what_a_damaged_index_hides(tmp_path: Path) -> None:
    keys = [f"k/{number}" for number in range(12)]
    source = MemoryStore()
    for key in keys:
        await source.set(key, buf(b"old"))
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"), source_id="A")
    for key in keys:
        await read(store, key)
    await store.drain()
    with (tmp_path / "cache/.zcache/index/cells").open("r+b") as cells:
        cells.write(bytes(4096))
    for key in keys:
        await source.set(key, buf(b"new"))
    await store.clear_cache()
    assert {await read(store, key) for key in keys} == {b"new"}
