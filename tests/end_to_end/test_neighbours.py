"""Other users of a cache directory that die, stop, fork, or remove it at the worst moment."""

from __future__ import annotations

import asyncio
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

from forks import fork, run
from support import buf, check_quiet, drained, quiet, read
from zcache import CacheStore
from zcache.testing import hold_index_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS = Path(__file__).parents[1]
LONGEST = 60
KEYS = [f"k{number}" for number in range(8)]
BEGIN = """
import asyncio, os, sys, time
from pathlib import Path
from zarr.storage import LocalStore
from support import buf, read
from zcache import CacheStore
where = Path(sys.argv[1])
def open_store(source="source"):
    return CacheStore(LocalStore(where / source), cache_store=LocalStore(where / "cache"), max_size=10**6)
async def read_all(store):
    return [await read(store, f"k{number}") for number in range(8)]
"""


def start(where: Path, script: str) -> subprocess.Popen[str]:
    """Another process, which is killed if it lives longer than any test."""
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + script, str(where)]
    paths = os.pathsep.join([str(TESTS), *sys.path])
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


def open_store(where: Path, source: Any = None, **options: Any) -> CacheStore:
    """A store on the directory ``cache``."""
    source = source or LocalStore(where / "source")
    return CacheStore(source, cache_store=LocalStore(where / "cache"), **options)


async def all_of(store: CacheStore) -> list[bytes | None]:
    found = [await read(store, key) for key in KEYS]
    await store.drain(timeout=5)
    return found


MINE = [key.encode() for key in KEYS]
OTHERS = [f"-b{key}".encode() for key in KEYS]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the same store", "a forked child"])
def test_directory_removed_and_used_for_another_source_each_reads_its_own(
    tmp_path: Path, how: str
) -> None:
    make_source(tmp_path)
    make_source(tmp_path, "-b")
    store = open_store(tmp_path, max_size=10**6)
    assert asyncio.run(all_of(store)) == MINE
    shutil.rmtree(tmp_path / "cache")
    other = start(tmp_path, "print(asyncio.run(read_all(open_store('source-b'))))")
    assert other.communicate(timeout=LONGEST)[0].strip() == str(OTHERS)
    if how == "the same store":
        assert asyncio.run(all_of(store)) == MINE
    else:

        def child() -> None:
            assert asyncio.run(all_of(store)) == MINE

        assert run(child) == 0
    again = start(tmp_path, "print(asyncio.run(read_all(open_store('source-b'))))")
    assert again.communicate(timeout=LONGEST)[0].strip() == str(OTHERS)


@pytest.mark.slow
def test_take_over_by_workers_at_once_none_is_refused(tmp_path: Path) -> None:
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


def test_fork_while_a_thread_waits_for_the_lock_keeps_no_lock(tmp_path: Path) -> None:
    """What the child has inherited keeps no other process out."""
    make_source(tmp_path)
    store = open_store(tmp_path)
    assert asyncio.run(read(store, "k0")) == b"k0"
    lock = hold_index_lock(tmp_path / "cache")
    writer = threading.Thread(target=lambda: asyncio.run(store.set("k1", buf(b"new"))))
    writer.start()
    time.sleep(0.2)  # Until it waits, which cannot be seen from here.
    child = fork(signal.pause)
    try:
        assert lock.release()
        writer.join(LONGEST)
        assert not writer.is_alive()
        assert asyncio.run(read(store, "k1")) == b"new"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_index_damaged_on_a_full_disk_the_source_serves(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("name", ["s0", "lock", "owner"])
async def test_index_file_removed_all_go_on_together(
    tmp_path: Path, name: str, others: list[subprocess.Popen[str]]
) -> None:
    """As what cleans up old files may: those who have it open find out, and all go on together."""
    make_source(tmp_path)
    store = open_store(tmp_path, max_size=10)
    assert await read(store, "k0") == b"k0"
    (tmp_path / "cache/.zcache/index" / name).unlink()
    assert await read(store, "k1") == b"k1"
    assert await all_of(store) == MINE
    script = """
store = CacheStore(LocalStore(where / "source"), cache_store=LocalStore(where / "cache"), max_size=10)
print(asyncio.run(read_all(store)), flush=True)
sys.stdin.readline()
print(asyncio.run(read(store, "k2")), store.cache_info()["current_size"], flush=True)
"""
    others.append(start(tmp_path, script))
    other: Any = others[0]
    # It has its own slot in the same index, and sees what is written here.
    deadline = time.monotonic() + LONGEST
    assert other.stdout.readline().strip() == str(MINE)
    while True:
        assert await all_of(store) == MINE
        if (tmp_path / "cache/.zcache/index" / name).exists() or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.05)
    await store.set("k2", buf(b"new"))
    await drained(store)
    size = store.cache_info()["current_size"]
    other.stdin.write("go\n")
    other.stdin.flush()
    value, seen = other.stdout.readline().split()
    assert value == str(b"new")
    assert 0 <= int(seen) <= 10 >= size
    await check_quiet(store)


class LockingStore(LocalStore):
    """A source: in the middle of a read another process is stopped, holding the lock."""

    takes: Callable[[], object] | None = None

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        value = await super().get(key, *args, **kwargs)
        if self.takes is not None:
            takes, self.takes = self.takes, None
            takes()
        return value


@pytest.mark.parametrize("key", ["k0", "missing"])
async def test_lock_held_while_a_value_is_read_the_reader_has_it(tmp_path: Path, key: str) -> None:
    """Its reader has it; what was begun ends when the index answers again."""
    make_source(tmp_path)
    source = LockingStore(tmp_path / "source")
    store = open_store(tmp_path, source, max_size=10)
    assert await read(store, "k1") == b"k1"
    locks: list[Any] = []
    source.takes = lambda: locks.append(hold_index_lock(tmp_path / "cache"))
    expected = None if key == "missing" else key.encode()
    assert await asyncio.wait_for(read(store, key), LONGEST) == expected
    assert await asyncio.wait_for(store.exists("k1"), LONGEST)
    assert await asyncio.wait_for(store.getsize("k1"), LONGEST) == 2
    assert locks.pop().release()
    assert await read(store, key) == expected
    await store.set("k1", buf(b"new"))
    assert await all_of(store) == [MINE[0], b"new", *MINE[2:]]
    await quiet(store)
    await check_quiet(store)


async def test_fills_waiting_for_the_lock_take_no_thread_from_others(tmp_path: Path) -> None:
    make_source(tmp_path)
    source = LockingStore(tmp_path / "source")
    store = open_store(tmp_path, source)
    locks: list[Any] = []
    source.takes = lambda: locks.append(hold_index_lock(tmp_path / "cache"))
    found = await asyncio.gather(*(read(store, key) for key in KEYS))
    assert found == MINE
    # A directory of its own; its writes take threads.
    other = CacheStore(
        LocalStore(tmp_path / "beside"), cache_store=LocalStore(tmp_path / "cache-beside")
    )
    writes = [other.set(f"{key}-{number}", buf(b"1")) for key in KEYS for number in range(2)]
    await asyncio.wait_for(asyncio.gather(*writes), LONGEST)
    assert await other.drain(timeout=LONGEST)
    assert locks.pop().release()
    await quiet(store)
    assert await all_of(store) == MINE
    await check_quiet(store)
