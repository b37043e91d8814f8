"""Several processes and one cache directory: one bound, one truth, and no harm from those that die.

What happens in the processes is in `crashes.py`.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore

import crashes
from coherence_support import GatedStore, index_of, reached
from crashes import LoggingStore, reads_of
from support import buf, check_books, read
from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
LONGEST = 150
"""Seconds after which a script counts as hung."""


def play(what: str, where: Path, *numbers: int) -> dict[str, Any]:
    """Run one of the scripts of `crashes.py` and return what it reports."""
    command = [sys.executable, str(HERE / "crashes.py"), what, str(where), *map(str, numbers)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    assert ended.returncode == 0, ended.stderr[-8000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_one_bound_for_four_processes(tmp_path: Path) -> None:
    found = play("bound", tmp_path)
    assert found["looks"] > 20
    assert found["bound"] / 2 < found["peak"] <= found["bound"]


def test_workers_read_an_epoch_together(tmp_path: Path) -> None:
    """As a loader's worker processes do: the first epoch reads each key once, later ones none."""
    reads = play("epochs", tmp_path)["reads"]
    assert reads == [{"all": 80, "most": 1}] * 3


def test_forked_workers(tmp_path: Path) -> None:
    assert play("forks", tmp_path) == {"most": 1}


@pytest.mark.slow
def test_killed_at_each_step(tmp_path: Path) -> None:
    assert play("steps", tmp_path)["deaths"] > 60


@pytest.mark.slow
def test_stopped_at_each_step(tmp_path: Path) -> None:
    assert play("stops", tmp_path)["deaths"] > 15


@pytest.mark.slow
def test_killed_at_random(tmp_path: Path) -> None:
    found = play("random", tmp_path, 200, 60)
    assert found["killed"] >= 100
    assert found["written"] > 100


# ------------------------------------------------------------------------- spawned workers


def spawned(pickled: bytes, key: str) -> tuple[bytes | None, int, int | None]:
    """What a worker reads through a store that came to it by pickle."""
    store = pickle.loads(pickled)
    value = asyncio.run(read(store, key))
    asyncio.run(store.set("b", buf(b"by a worker")))
    return value, store.cache_stats()["hits"], store._engine.index.place


def test_spawned_workers(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_size=1000)
    asyncio.run(store.set("a", buf(b"1")))
    place = store._engine.index.place
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        value, hits, other = pool.apply(spawned, (pickle.dumps(store), "a"))
    assert (value, hits) == (b"1", 1)
    assert other != place
    assert asyncio.run(read(store, "b")) == b"by a worker"
    assert reads_of(tmp_path / "source") == []
    check_books(store)


# ------------------------------------------------------- what one does and the other sees


class Gate(LocalStore):
    """Holds up what it has read until it is told to hand it out."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.began = asyncio.Event()
        self.go = asyncio.Event()

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        value = await super().get(*args, **kwargs)
        self.began.set()
        await self.go.wait()
        return value


def agent() -> None:
    """Runs in a process of its own: one command a line, one answer a line."""
    where = Path(sys.argv[1])
    store = CacheStore(LocalStore(where / "source"), cache_store=LocalStore(where / "cache"))

    async def obey(what: str, key: str, text: str) -> str | None:
        if what == "get":
            value = await read(store, key)
            return None if value is None else value.decode()
        if what == "set":
            await store.set(key, buf(text.encode()))
        elif what == "delete":
            await store.delete(key)
        elif what == "delete_dir":
            await store.delete_dir(key)
        elif what == "clear":
            await store.clear_cache()
        return None

    for line in sys.stdin:
        print(json.dumps(asyncio.run(obey(*json.loads(line)))), flush=True)


class Agent:
    """Another process on the same directory."""

    def __init__(self, where: Path) -> None:
        code = (
            f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_processes as t; t.agent()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(where)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, what: str, key: str = "", text: str = "") -> str | None:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([what, key, text]), file=self.process.stdin, flush=True)
        answer: str | None = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path)
    yield agent
    agent.close()


def open_store(where: Path, **options: Any) -> CacheStore:
    source = LoggingStore(where / "source")
    return CacheStore(source, cache_store=LocalStore(where / "cache"), **options)


async def test_writes_and_deletes_are_seen(tmp_path: Path, other: Agent) -> None:
    store = open_store(tmp_path)
    for text in ("1", "22"):
        await store.set("a/c/0", buf(text.encode()))
        assert other("get", "a/c/0") == text
        assert other("get", "a/c/0") == text
        other("set", "a/c/0", text + "!")
        assert await read(store, "a/c/0") == text.encode() + b"!"
        other("set", "a/c/1", "x")
        assert await read(store, "a/c/1") == b"x"
        await store.delete("a/c/1")
        assert other("get", "a/c/1") is None
        await store.set("a/c/1", buf(b"y"))
        assert other("get", "a/c/1") == "y"
        other("delete_dir", "a")
        assert await read(store, "a/c/0") is None
        assert await read(store, "a/c/1") is None
    check_books(store)


@pytest.mark.parametrize("what", ["set", "delete", "delete_dir", "clear"])
async def test_a_fill_under_way_elsewhere(tmp_path: Path, other: Agent, what: str) -> None:
    """Here a value is read from the source; elsewhere it is replaced before it gets into the cache."""
    source = Gate(tmp_path / "source")
    await LocalStore(tmp_path / "source").set("a/c/0", buf(b"old"))
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"))
    reader = asyncio.create_task(read(store, "a/c/0"))
    await source.began.wait()
    other(what, "a" if what == "delete_dir" else "a/c/0", "new")
    source.go.set()
    assert await reader == b"old"  # It began before.
    now = {"set": "new", "clear": "old"}.get(what)
    for _ in range(2):
        assert await read(store, "a/c/0") == (now.encode() if now else None)
        assert other("get", "a/c/0") == now
    check_books(store)


async def test_who_reads_after_a_write_elsewhere_joins_no_earlier_read(
    tmp_path: Path, other: Agent
) -> None:
    source = Gate(tmp_path / "source")
    await LocalStore(tmp_path / "source").set("a/c/0", buf(b"old"))
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"))
    first = asyncio.create_task(read(store, "a/c/0"))
    await source.began.wait()
    source.began.clear()
    other("set", "a/c/0", "new")
    # What the other has cached is found; drop it, so that this one has to read for itself.
    other("clear")
    second = asyncio.create_task(read(store, "a/c/0"))
    await source.began.wait()
    source.go.set()
    assert [await first, await second] == [b"old", b"new"]


@pytest.mark.parametrize("what", ["delete", "delete_dir", "delete_dir_cut_off"])
async def test_a_change_elsewhere_stops_only_what_it_is_about(tmp_path: Path, what: str) -> None:
    """A delete that takes long, or never ends, is nothing to those who read something else."""
    source = GatedStore({"a/c/0": b"1", "a/c/1": b"22", "ab/c/0": b"333", "b/c/0": b"4444"})
    here, there = (
        CacheStore(source, cache_store=LocalStore(tmp_path), source_id="one") for _ in range(2)
    )
    assert here._engine.index.place != there._engine.index.place
    source.late["get"] = 1
    under_way = asyncio.create_task(read(there, "b/c/0"))
    await reached(source)
    source.shut[what.removesuffix("_cut_off")] = 1
    gone = {"a/c/0"} if what == "delete" else {"a/c/0", "a/c/1"}
    change = asyncio.create_task(here.delete("a/c/0") if what == "delete" else here.delete_dir("a"))
    await reached(source)
    if what == "delete_dir_cut_off":
        for task in asyncio.all_tasks() - {under_way, asyncio.current_task()}:
            task.cancel()
        await asyncio.wait([change])
    for _ in range(2):
        for key, value in source.values.items():
            if key != "b/c/0":
                assert await read(there, key) == value
    source.release()
    assert await under_way == b"4444"
    await asyncio.wait([change])
    assert {key for key, *_ in index_of(there).entries()} == {"a/c/1", "ab/c/0", "b/c/0"} - gone
    for _ in range(2):
        for key in ("a/c/0", "a/c/1"):
            expected = source.values.get(key)
            assert await read(there, key) == await read(here, key) == expected
    check_books(here)


async def test_the_smallest_bound_is_in_force(tmp_path: Path) -> None:
    """And no longer than its owner lives."""
    store = open_store(tmp_path, max_size=100)
    for number in range(8):
        await store.set(f"a/{number}", buf(bytes(10)))
    strict = open_store(tmp_path, max_size=30)
    assert store.cache_info()["current_size"] == 80
    await store.set("b", buf(bytes(10)))  # Enforced before new bytes are written.
    assert store.cache_info()["current_size"] == strict.cache_info()["current_size"] == 30
    await store.set("large", buf(bytes(31)))
    assert strict.cache_info()["current_size"] == 30
    del strict
    store._engine.books._last_reap = 0.0
    await store.set("large", buf(bytes(31)))
    assert store.cache_info()["current_size"] == 61
    check_books(store)


async def test_more_processes_than_places(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever comes too late reads from the source, until one of the others has gone."""
    store = open_store(tmp_path, max_size=100)
    await store.set("a", buf(b"1"))
    others = []
    for number in range(1, 256):
        place = tmp_path / f"cache/.zcache/index/p{number}"
        others.append(os.open(place, os.O_RDWR | os.O_CREAT))
        fcntl.flock(others[-1], fcntl.LOCK_EX)
    late = open_store(tmp_path, max_size=100)
    assert await read(late, "a") == b"1"
    assert reads_of(tmp_path / "source") == ["a"]
    assert "256 stores" in caplog.text
    assert len(caplog.records) == 1
    os.close(others.pop())
    last = open_store(tmp_path, max_size=100)
    assert await read(last, "a") == b"1"
    assert reads_of(tmp_path / "source") == ["a"]
    for other in others:
        os.close(other)


async def test_the_event_loop_goes_on_while_the_lock_is_taken(tmp_path: Path) -> None:
    """A process that is stopped in the middle of a step holds up the reads, and nothing else."""
    store = open_store(tmp_path)
    await store.set("a", buf(b"1"))
    beats = 0
    enough = asyncio.Event()

    async def heart() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.001)
            beats += 1
            if beats == 50:
                enough.set()

    beating = asyncio.create_task(heart())
    lock = os.open(tmp_path / "cache/.zcache/index/lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    tasks = [
        asyncio.create_task(read(store, "a")),
        asyncio.create_task(read(store, "b")),
        asyncio.create_task(store.set("c", buf(b"3"))),
        asyncio.create_task(store.delete("e")),
    ]
    # One that the index only counts does not wait at all.
    odd = asyncio.create_task(read(store, "a", RangeByteRequest(1, 0)))
    cancelled = asyncio.create_task(store.set("d", buf(b"4")))
    await enough.wait()
    # Not even a cancellation waits for the lock.
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert not any(task.done() for task in tasks)
    assert await odd == b""
    os.close(lock)
    assert await tasks[0] == b"1"
    assert await tasks[1] is None
    await asyncio.gather(*tasks[2:])
    beating.cancel()
    assert await read(store, "c") == b"3"
    check_books(store)


async def test_a_lock_that_is_taken_in_the_middle_of_an_operation(tmp_path: Path) -> None:
    """The steps after the first one wait off the event loop as well."""
    source = Gate(tmp_path / "source")
    await LocalStore(tmp_path / "source").set("a", buf(b"1"))
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"))
    reader = asyncio.create_task(read(store, "a"))
    await source.began.wait()
    lock = os.open(tmp_path / "cache/.zcache/index/lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # From a thread, for an event loop that is held up could not give it back.
    timer = threading.Timer(0.2, os.close, [lock])
    timer.start()
    source.go.set()
    turns = 0
    while not reader.done():
        await asyncio.sleep(0.001)
        turns += 1
    timer.join()
    assert turns > 10
    assert await reader == b"1"
    assert store.cache_info()["cached_keys"] == 1
    check_books(store)


def test_a_directory_that_is_removed_while_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made anew, and whoever comes later shares the new one."""
    store = open_store(tmp_path, max_size=100)
    asyncio.run(store.set("a", buf(bytes(50))))
    (tmp_path / "cache").rename(tmp_path / "gone")
    subprocess.run(["rm", "-r", str(tmp_path / "gone")], check=True)
    assert asyncio.run(read(store, "a")) == bytes(50)
    later = open_store(tmp_path, max_size=100)
    asyncio.run(later.set("b", buf(bytes(60))))
    asyncio.run(store.set("c", buf(bytes(60))))
    assert store.cache_info() == later.cache_info()
    assert crashes.size_at_one_instant(tmp_path / "cache") <= 100
    check_books(store)
