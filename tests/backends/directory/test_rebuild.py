"""The rebuild of an index while others rebuild it, empty it, fork, or die."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import LocalStore

from directories import complete
from forks import fork, run
from support import check_quiet, read
from zcache import CacheStore
from zcache._backends.directory import files, layout, rebuild
from zcache._backends.directory.scan import Scanner
from zcache._core import CorruptIndexError
from zcache.testing import is_complete

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parents[2]
LONGEST = 60
KEYS = [f"k{number}" for number in range(8)]
VALUES = [key.encode() for key in KEYS]


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A directory with a cache of all keys, without its index."""
    (tmp_path / "source").mkdir()
    for key in KEYS:
        (tmp_path / "source" / key).write_text(key)
    assert asyncio.run(read_all(open_store(tmp_path))) == VALUES
    gc.collect()
    shutil.rmtree(tmp_path / "cache/.zcache/index")
    return tmp_path


def open_store(where: Path, **options: Any) -> CacheStore:
    source, cache = LocalStore(where / "source"), LocalStore(where / "cache")
    return CacheStore(source, cache_store=cache, **options)


async def read_all(store: CacheStore) -> list[bytes | None]:
    found = [await read(store, key) for key in KEYS]
    await store.drain(timeout=5)
    return found


@pytest.mark.parametrize(
    "error", [RuntimeError, UnicodeError, MemoryError, RecursionError, KeyError]
)
@pytest.mark.parametrize("thread", [True, False])
def test_rebuild_that_fails_in_any_way_costs_no_opening_and_no_read(
    where: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
    thread: bool,
) -> None:
    def fail(*args: object) -> None:
        raise error("a fault")

    def none(work: object) -> None:
        raise RuntimeError("no thread")

    with monkeypatch.context() as patched:
        patched.setattr(Scanner, "rebuild", fail)
        if not thread:
            patched.setattr(rebuild, "run_in_background", none)
            patched.setattr(layout.Layout, "is_empty", lambda self: True)
        store = open_store(where)
        assert asyncio.run(read_all(store)) == VALUES
        assert "cannot be used any more" in caplog.text
        assert store.cache_info()["cached_keys"] == 0


NEVER_READY = """
import sys, time
from pathlib import Path
from zarr.storage import LocalStore
from zcache import CacheStore
from zcache._backends.directory import files, layout

layout.BLOCK_SIZE = 1
where = Path(sys.argv[1])

def never(*args):
    print("scans", flush=True)
    time.sleep(600)
    yield

files.Finder.find = never
CacheStore(LocalStore(where / "source"), cache_store=LocalStore(where / "cache"), max_size=10**6)
"""


def start_rebuild_without_end(where: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", NEVER_READY, str(where)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
async def test_rebuild_owner_dies_those_who_wait_fill_the_index(where: Path) -> None:
    owner = start_rebuild_without_end(where)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "scans\n"
        stores = [open_store(where, max_size=10**6) for _ in range(2)]
        assert await read_all(stores[0]) == VALUES
        assert stores[0].cache_info()["cached_keys"] == 0
    finally:
        owner.kill()
        owner.communicate()
    deadline = time.monotonic() + LONGEST
    # The owner of a rebuild is looked for now and then.
    while not stores[0].cache_info()["cached_keys"] and time.monotonic() < deadline:
        assert await read_all(stores[1]) == VALUES
        await asyncio.sleep(0.01)
    for store in stores:
        assert await read_all(store) == VALUES
        assert store.cache_info()["cached_keys"] == len(KEYS)
        await check_quiet(store)


async def test_rebuild_index_emptied_meanwhile_is_not_complete(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not say that all is there: what it had entered before is gone."""
    without_tombstones = Scanner._without_tombstones

    def late(self: Scanner, found: Any) -> Any:
        self.outdate()
        return without_tombstones(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(Scanner, "_without_tombstones", late)
        store = open_store(where)
        assert store.cache_info()["cached_keys"] == 0
        assert await read_all(store) == VALUES
    # No one else fills it: the next look for what has died does.
    deadline = time.monotonic() + LONGEST
    while not is_complete(store) and time.monotonic() < deadline:
        assert await read_all(store) == VALUES
        await asyncio.sleep(0.01)
    assert store.cache_info()["cached_keys"] == len(KEYS)


def hold_walks(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Hold up each scan of a directory; what says that one has begun, and what lets them go on."""
    walks, go = threading.Event(), threading.Event()
    find = files.Finder.find

    def slow(*args: Any) -> Iterator[tuple[int, int, str]]:
        walks.set()
        assert go.wait(LONGEST)
        yield from find(*args)

    monkeypatch.setattr(files.Finder, "find", slow)
    return walks, go


async def test_rebuild_damage_told_by_two_threads_is_filled_once_more(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one ends the scan of the first one, which alone had emptied the index."""
    store = open_store(where)
    walks, go = hold_walks(monkeypatch)
    recovery = store._cache.shared.place.recovery
    with contextlib.suppress(CorruptIndexError):
        store._cache.shared.handle.index.mark_corrupt()
    recovery.start_over("damaged")
    assert walks.wait(LONGEST)
    recovery.start_over("damaged, another one says")
    go.set()
    await complete(store)
    assert await read_all(store) == VALUES
    assert store.cache_stats()["misses"] == 0


@pytest.mark.parametrize("read_only", [False, True])
async def test_rebuild_no_thread_at_the_opening_is_made_up_for(
    where: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    cache = LocalStore(where / "cache", read_only=read_only)
    with monkeypatch.context() as patch:
        patch.setattr(rebuild, "run_in_background", refuse)
        store = CacheStore(LocalStore(where / "source"), cache_store=cache)
    assert await read_all(store) == VALUES
    await complete(store)
    assert store.cache_info()["cached_keys"] == len(KEYS)


def test_fork_while_another_thread_opens_keeps_no_lock(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child, which never has that store, keeps none of its locks."""
    walks, go = hold_walks(monkeypatch)
    opened: list[CacheStore] = []
    opening = threading.Thread(target=lambda: opened.append(open_store(where)))
    opening.start()
    assert walks.wait(LONGEST)
    child = fork(signal.pause)
    try:
        go.set()
        opening.join()
        assert asyncio.run(read_all(opened.pop())) == VALUES
        gc.collect()
        for name in ("lock", "s0"):
            with (where / "cache/.zcache/index" / name).open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_rebuild_of_a_forked_child_that_stops_goes_on_whatever_its_parent_does(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that fills the index of the parent is none of the child's."""
    monkeypatch.setattr("zcache._backends.directory.index.REBUILD_PATIENCE", 0.05)
    walks, go = hold_walks(monkeypatch)
    store = open_store(where)
    assert walks.wait(LONGEST)

    def child() -> None:
        assert starts_over_and_fills(store, go)

    try:
        assert run(child) == 0
    finally:
        go.set()


def starts_over_and_fills(store: CacheStore, go: threading.Event) -> bool:
    """Whether an index is filled of which the rebuild could not begin at once, for want of a descriptor."""
    go.set()
    directory = store._cache.shared.place
    recovery, check = directory.recovery, directory.layout.check
    asyncio.run(read_all(store))
    checks = iter([None, OSError(errno.EMFILE, "Too many open files")])

    def check_twice() -> None:
        if (error := next(checks, None)) is not None:
            raise error
        check()

    directory.layout.check = check_twice
    with contextlib.suppress(CorruptIndexError):
        directory.handle.index.mark_corrupt()
    recovery.start_over("it was damaged")
    assert not is_complete(store)
    until = time.monotonic() + LONGEST / 4
    while not is_complete(store) and time.monotonic() < until:
        recovery._last_reclaim = 0.0  # The lock may have been taken at the last one.
        recovery.reclaim_dead()
        time.sleep(0.01)
    return is_complete(store)
