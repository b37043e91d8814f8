"""A cache directory whose other users die, stop, fork, or remove it at the worst moment."""

from __future__ import annotations

import asyncio
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
from zarr.storage import LocalStore, MemoryStore

from directory_support import open_store
from support import PROTOTYPE, buf, check_books, read
from zcache import CacheStore, _files, _repairs
from zcache._directory import Directory
from zcache._fills import ignore
from zcache._threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
LONGEST = 60
KEYS = [f"k{number}" for number in range(8)]
BEGIN = """
import asyncio, os, sys, time
from pathlib import Path
from zarr.storage import LocalStore
from support import buf, read
from zcache import CacheStore, _files
where = Path(sys.argv[1])
def open_store(source="source"):
    return CacheStore(LocalStore(where / source), cache_store=LocalStore(where / "cache"), max_size=10**6)
async def read_all(store):
    return [await read(store, f"k{number}") for number in range(8)]
"""


def start(where: Path, script: str) -> subprocess.Popen[str]:
    """Another process, which is killed if it lives longer than any test."""
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + script, str(where)]
    paths = os.pathsep.join([str(HERE), *sys.path])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def others() -> Iterator[list[subprocess.Popen[str]]]:
    """Other processes, which end with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for other in started:
        other.kill()
        other.communicate()


def make_source(where: Path, beginning: str = "") -> None:
    """Values of all keys; those of another beginning are of another source."""
    root = where / f"source{beginning}"
    root.mkdir()
    for key in KEYS:
        (root / key).write_text(f"{beginning}{key}")


async def all_of(store: CacheStore) -> list[bytes | None]:
    return [await read(store, key) for key in KEYS]


MINE = [key.encode() for key in KEYS]
OTHERS = [f"-b{key}".encode() for key in KEYS]


@pytest.mark.parametrize("how", ["the same store", "a forked child"])
def test_a_directory_that_is_removed_and_used_for_another_source(tmp_path: Path, how: str) -> None:
    make_source(tmp_path)
    make_source(tmp_path, "-b")
    store = open_store(tmp_path, max_size=10**6)
    assert asyncio.run(all_of(store)) == MINE
    shutil.rmtree(tmp_path / "cache")
    other = start(tmp_path, "print(asyncio.run(read_all(open_store('source-b'))))")
    assert other.communicate(timeout=LONGEST)[0].strip() == str(OTHERS)
    if how == "the same store":
        assert asyncio.run(all_of(store)) == MINE
    elif (child := os.fork()) == 0:
        code = 1
        try:
            code = int(asyncio.run(all_of(store)) != MINE)
        finally:
            os._exit(code)
    else:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = start(tmp_path, "print(asyncio.run(read_all(open_store('source-b'))))")
    assert again.communicate(timeout=LONGEST)[0].strip() == str(OTHERS)


async def test_whoever_fills_the_index_dies(
    tmp_path: Path,
    others: list[subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those who have the directory open already fill it instead."""
    make_source(tmp_path)
    assert await all_of(open_store(tmp_path, max_size=10**6)) == MINE
    shutil.rmtree(tmp_path / "cache/.zcache/index")
    script = """
def never(*args):
    print("walks", flush=True)
    time.sleep(600)
    yield
_files.walk = never
open_store()
"""
    others.append(start(tmp_path, script))
    assert others[0].stdout is not None
    assert others[0].stdout.readline() == "walks\n"
    stores = [open_store(tmp_path, max_size=10**6) for _ in range(2)]
    assert await all_of(stores[0]) == MINE
    assert not stores[0]._engine.index.is_complete
    others[0].kill()
    others[0].wait()
    monkeypatch.setattr(_repairs, "_REAP_EVERY", 0.0)
    assert await all_of(stores[1]) == MINE
    deadline = time.monotonic() + LONGEST
    while not stores[0]._engine.index.is_complete and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for store in stores:
        assert await all_of(store) == MINE
        assert store.cache_info()["cached_keys"] == len(KEYS)
        check_books(store)


def test_workers_take_a_directory_over_together(tmp_path: Path) -> None:
    """What a source without a name has left is emptied by one of them; none is refused."""
    make_source(tmp_path)
    asyncio.run(open_store(tmp_path, MemoryStore()).set("k0", buf(b"old")))
    script = """
print("ready", flush=True)
sys.stdin.readline()
print(asyncio.run(read_all(open_store())))
"""
    workers = [start(tmp_path, script) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    assert [w.communicate(timeout=LONGEST)[0].strip() for w in workers] == [str(MINE)] * 3


async def test_a_stamp_that_another_process_makes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_source(tmp_path)
    listdir, first = os.listdir, []

    def late(path: Any) -> list[str]:
        if not first:
            monkeypatch.undo()
            first.append(open_store(tmp_path))
            asyncio.run_coroutine_threadsafe(read(first[0], "k0"), loop).result()
        return listdir(path)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    monkeypatch.setattr(os, "listdir", late)
    store = open_store(tmp_path)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    assert await all_of(store) == MINE


def taken(where: Path) -> int:
    lock = os.open(where / "cache/.zcache/index/lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


async def test_reads_go_on_without_an_index_that_somebody_holds(tmp_path: Path) -> None:
    """A process that is stopped in the middle of a step has the lock for as long as it likes."""
    make_source(tmp_path)
    store = open_store(tmp_path)
    assert await read(store, "k0") == b"k0"
    lock = taken(tmp_path)
    assert await asyncio.wait_for(all_of(store), LONGEST) == MINE
    many = await store.get_partial_values(PROTOTYPE, [(key, None) for key in KEYS])
    assert [value and value.to_bytes() for value in many] == MINE
    writing = asyncio.create_task(store.set("k0", buf(b"new")))
    await asyncio.sleep(0.05)
    assert not writing.done()
    os.close(lock)
    await writing
    assert await read(store, "k0") == b"new"
    assert await all_of(store) == [b"new", *MINE[1:]]
    check_books(store)


def test_a_fork_while_a_thread_waits_for_the_lock(tmp_path: Path) -> None:
    """What the child has inherited keeps nobody out."""
    make_source(tmp_path)
    store = open_store(tmp_path)
    assert asyncio.run(read(store, "k0")) == b"k0"
    lock = taken(tmp_path)
    writer = threading.Thread(target=lambda: asyncio.run(store.set("k1", buf(b"new"))))
    writer.start()
    while store._engine.books._repair is None:
        time.sleep(0.001)
    time.sleep(0.1)  # Until it waits in the kernel, which cannot be seen from here.
    child = os.fork()
    if child == 0:
        os.close(lock)
        signal.pause()
        os._exit(0)
    try:
        os.close(lock)
        writer.join(LONGEST)
        assert not writer.is_alive()
        assert asyncio.run(read(store, "k1")) == b"new"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_index_that_cannot_be_emptied(tmp_path: Path) -> None:
    """The disk takes nothing when it is found damaged: the process must not end with a signal."""
    make_source(tmp_path)
    script = """
import resource
store = open_store()
asyncio.run(read(store, "k0"))
resource.setrlimit(resource.RLIMIT_FSIZE, (32768, 32768))
os.truncate(where / "cache/.zcache/index/cells", 0)
print(asyncio.run(read_all(store)))
"""
    other = start(tmp_path, script)
    assert other.communicate(timeout=LONGEST)[0].strip() == str(MINE)
    assert other.returncode == 0


async def test_what_was_never_committed_is_not_adopted(tmp_path: Path) -> None:
    make_source(tmp_path)
    store = open_store(tmp_path)
    assert await all_of(store) == MINE
    del store
    old = tmp_path / "cache/k3"
    old.unlink()  # With what is noted of it.
    old.write_bytes(b"older")
    time = old.stat().st_mtime_ns // 10**6 * 10**6 + _files.PENDING
    os.utime(old, ns=(time, time))
    shutil.rmtree(tmp_path / "cache/.zcache")
    store = open_store(tmp_path, adopt=True)
    assert await all_of(store) == MINE
    check_books(store)


async def test_a_walk_of_an_index_that_was_emptied_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not say that all is there: what it had entered before is gone."""
    make_source(tmp_path)
    assert await all_of(open_store(tmp_path)) == MINE
    shutil.rmtree(tmp_path / "cache/.zcache/index")
    without_dropped = Directory._without_dropped

    def late(self: Directory, found: Any) -> Any:
        self.outdate_walks()
        return without_dropped(self, found)

    monkeypatch.setattr(Directory, "_without_dropped", late)
    store = open_store(tmp_path)
    assert not store._engine.index.is_complete
    assert store.cache_info()["cached_keys"] == 0
    assert await all_of(store) == MINE


def test_a_fork_while_another_thread_opens_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child, which never has that store, keeps none of its locks."""
    make_source(tmp_path)
    assert asyncio.run(all_of(open_store(tmp_path))) == MINE
    shutil.rmtree(tmp_path / "cache/.zcache/index")
    walks, go = threading.Event(), threading.Event()
    walk = _files.walk

    def slow(*args: Any) -> Iterator[tuple[int, int, str]]:
        walks.set()
        assert go.wait(LONGEST)
        yield from walk(*args)

    monkeypatch.setattr(_files, "walk", slow)
    opened: list[CacheStore] = []
    opening = threading.Thread(target=lambda: opened.append(open_store(tmp_path)))
    opening.start()
    assert walks.wait(LONGEST)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        go.set()
        opening.join()
        assert asyncio.run(all_of(opened.pop())) == MINE
        gc.collect()
        for name in ("lock", "p0"):
            with (tmp_path / "cache/.zcache/index" / name).open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("name", ["p0", "lock"])
async def test_a_file_of_the_index_that_somebody_removes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what cleans up old files may: whoever has it open finds out, and all go on together."""
    make_source(tmp_path)
    monkeypatch.setattr(_repairs, "_REAP_EVERY", 0.0)
    store = open_store(tmp_path, max_size=10)
    assert await read(store, "k0") == b"k0"
    (tmp_path / "cache/.zcache/index" / name).unlink()
    assert await read(store, "k1") == b"k1"
    while store._engine.books._repair is not None:  # noqa: ASYNC110 - it ends in a thread
        await asyncio.sleep(0.001)
    other = open_store(tmp_path, max_size=10)
    assert other._engine.index.place != store._engine.index.place
    for each in (store, other):
        assert await all_of(each) == MINE
    await store.set("k2", buf(b"new"))
    assert await read(other, "k2") == b"new"
    assert store.cache_info() == other.cache_info()
    check_books(store)


class LockingStore(LocalStore):
    """A source in the middle of whose reads another process is stopped, holding the lock."""

    takes: Callable[[], object] | None = None

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        value = await super().get(key, *args, **kwargs)
        if self.takes is not None:
            takes, self.takes = self.takes, None
            takes()
        return value


@pytest.mark.parametrize("key", ["k0", "missing"])
async def test_a_lock_that_is_not_given_back_while_a_value_is_read(
    tmp_path: Path, key: str
) -> None:
    """Its reader has it; what was begun ends when the index answers again."""
    make_source(tmp_path)
    source = LockingStore(tmp_path / "source")
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"), max_size=10)
    assert await read(store, "k1") == b"k1"
    locks: list[int] = []
    source.takes = lambda: locks.append(taken(tmp_path))
    expected = None if key == "missing" else key.encode()
    assert await asyncio.wait_for(read(store, key), LONGEST) == expected
    assert await asyncio.wait_for(store.exists("k1"), LONGEST)
    assert await asyncio.wait_for(store.getsize("k1"), LONGEST) == 2
    os.close(locks.pop())
    assert await read(store, key) == expected
    await store.set("k1", buf(b"new"))
    assert await all_of(store) == [MINE[0], b"new", *MINE[2:]]
    while store._engine.index.in_flight != (0, 0):  # noqa: ASYNC110 - it ends in threads
        await asyncio.sleep(0.001)
    check_books(store)


async def test_who_waits_for_one_index_keeps_no_thread_from_others(tmp_path: Path) -> None:
    make_source(tmp_path)
    source = LockingStore(tmp_path / "source")
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"))
    locks: list[int] = []
    source.takes = lambda: locks.append(taken(tmp_path))
    found = await asyncio.gather(*(read(store, key) for key in KEYS))
    assert found == MINE
    work = (in_thread(lambda: None, ignore) for _ in range(2 * len(KEYS)))
    await asyncio.wait_for(asyncio.gather(*work), LONGEST)
    os.close(locks.pop())
    while store._engine.index.in_flight != (0, 0):  # noqa: ASYNC110 - it ends in threads
        await asyncio.sleep(0.001)
    assert await all_of(store) == MINE
    check_books(store)
