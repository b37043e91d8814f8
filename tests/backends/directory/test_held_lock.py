"""A process that stops while it holds the lock of an index: the others go on, within a second."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from directories import complete
from pools import cache_at
from support import said
from zcache import CacheStore, IndexLockTimeout
from zcache._runtime import threads
from zcache.testing import StoreDouble, check_invariants, hold_index_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from zcache._core import Index

GUARD = 20.0
"""Seconds after which a test fails that should take about one."""
VALUE = cpu.Buffer.from_bytes(b"value")
PROTOTYPE = default_buffer_prototype()


@pytest.fixture(params=["directory", pytest.param("pool", marks=pytest.mark.once)], autouse=True)
def is_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the cache is a pool; see `cache_at`."""
    is_so: bool = request.param == "pool"
    monkeypatch.setenv("ZCACHE_TEST_POOL", "1" if is_so else "")
    return is_so


def open_store(root: Path, source: Any = None, **options: Any) -> CacheStore:
    source = MemoryStore() if source is None else source
    return CacheStore(source, cache_store=cache_at(root), source_id="s", **options)


@contextlib.contextmanager
def taking_over(root: Path) -> Iterator[None]:
    """Hold the lock of one that takes the directory over: through a file of its own."""
    file = os.open(root / ".zcache/take-over", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def in_time(work: Callable[[], Any]) -> Any:
    """What `work` returns, or its error; fails if it hangs."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:  # noqa: BLE001 - it is looked at
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(GUARD)
    assert outcome, "it hangs"
    return outcome[0]


def read(store: CacheStore, key: str) -> bytes | None:
    value = asyncio.run(store.get(key, PROTOTYPE))
    return None if value is None else value.to_bytes()


@pytest.fixture
def without_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    def refuse() -> None:
        # Without threads of earlier calls.
        for some in threads._all_threads.snapshot():
            some.after_fork()
        monkeypatch.setattr(_thread, "start_new_thread", start)

    return refuse


@pytest.mark.slow
def test_every_public_method_answers_while_the_lock_is_held(tmp_path: Path) -> None:
    source = StoreDouble(MemoryStore({"k": VALUE, "d/k": VALUE}))
    store = open_store(tmp_path, source)
    assert read(store, "k") == b"value"
    store.drain_sync()
    with hold_index_lock(tmp_path):
        assert "current_size=unknown" in in_time(lambda: repr(store))
        assert in_time(store.cache_stats)["misses"] == 1
        assert isinstance(in_time(store.cache_info), IndexLockTimeout)
        assert in_time(lambda: read(store, "k")) == b"value"
        assert in_time(lambda: asyncio.run(store.exists("k"))) is True
        assert in_time(lambda: asyncio.run(store.getsize("k"))) == 5
        writes: list[Callable[[], Any]] = [
            lambda: store.set("k", cpu.Buffer.from_bytes(b"new")),
            lambda: store.set_if_not_exists("k2", VALUE),
            lambda: store.delete("k"),
            lambda: store.delete_dir("d"),
            store.clear,
            store.clear_cache,
        ]
        for write in writes:
            assert isinstance(in_time(lambda work=write: asyncio.run(work())), IndexLockTimeout)
        # The others could not be told, so the source was not touched.
        assert in_time(lambda: read(store, "k")) == b"value"
        assert asyncio.run(source.exists("k2")) is False
    asyncio.run(store.set("k", cpu.Buffer.from_bytes(b"new")))
    assert read(store, "k") == b"new"
    store.drain_sync()
    check_invariants(store)


def test_a_write_whose_end_cannot_be_told_returns_and_stays_coherent(tmp_path: Path) -> None:
    source = StoreDouble(MemoryStore({"k": VALUE}))
    store = open_store(tmp_path, source)
    other = open_store(tmp_path, source)

    async def write() -> None:
        with contextlib.ExitStack() as stack:
            gate = source.block("set")
            task = asyncio.ensure_future(store.set("k", cpu.Buffer.from_bytes(b"new")))
            await gate.entered_async()
            stack.enter_context(hold_index_lock(tmp_path))
            gate.release()
            await asyncio.wait_for(task, GUARD)

    asyncio.run(write())
    assert read(store, "k") == read(other, "k") == b"new"
    store.drain_sync()
    assert read(store, "k") == b"new"
    check_invariants(store)


def test_reads_cost_no_wait_once_one_has_found_the_lock_held(tmp_path: Path) -> None:
    store = open_store(tmp_path, MemoryStore({str(n): VALUE for n in range(500)}))

    async def reads() -> None:
        with hold_index_lock(tmp_path):
            await store.get("0", PROTOTYPE)  # Finds out.
            # One after the other: each would wait for a second else.
            for n in range(500):
                assert await store.get(str(n), PROTOTYPE) is not None

    async def main() -> None:
        await asyncio.wait_for(reads(), GUARD)

    asyncio.run(main())
    stats = store.cache_stats()
    assert stats["cache_skips"] == stats["misses"] == 501
    assert stats["bypassed"] == 0


def leave_warm(root: Path) -> None:
    """A directory with a cached value and an index that no process uses."""
    store = open_store(root, MemoryStore({"k": VALUE}))
    assert read(store, "k") == b"value"
    assert store.drain_sync()
    del store
    gc.collect()


@pytest.mark.slow
def test_a_constructor_goes_on_and_the_index_is_opened_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave_warm(tmp_path)
    source = StoreDouble(MemoryStore({"k": VALUE}))
    with hold_index_lock(tmp_path):
        store = in_time(lambda: open_store(tmp_path, source, max_size=1000))
        assert "is not open yet" in caplog.text
        assert "unknown" in in_time(lambda: repr(store))
        assert in_time(lambda: read(store, "k")) == b"value"
        assert source.take()["get"] == 1
        # What this process knows nothing of yet others may be served.
        write = store.set("k", cpu.Buffer.from_bytes(b"new"))
        assert isinstance(in_time(lambda: asyncio.run(write)), IndexLockTimeout)
        assert source.take()["set"] == 0
    # It is opened as soon as the lock is free.
    handle: Any = store._cache.shared.handle
    assert handle.opening is not None
    assert handle.opening.begin().wait(GUARD)
    assert store.cache_info()["cached_keys"] == 1
    assert store.cache_info()["max_size"] == 1000
    assert read(store, "k") == b"value"
    assert source.take()["get"] == 0
    asyncio.run(store.set("k", cpu.Buffer.from_bytes(b"new")))
    assert read(store, "k") == b"new"


# A pool is no source's.
@pytest.mark.parametrize("is_pool", ["directory"], indirect=True)
def test_a_constructor_does_not_wait_for_one_that_takes_the_directory_over(tmp_path: Path) -> None:
    # Of a source without a name: its values are removed first.
    store = CacheStore(MemoryStore({"k": VALUE}), cache_store=LocalStore(tmp_path))
    read(store, "k")
    store.drain_sync()
    del store
    gc.collect()
    with taking_over(tmp_path):
        other = in_time(lambda: open_store(tmp_path, MemoryStore({"k": VALUE})))
        assert in_time(lambda: read(other, "k")) == b"value"
    opening = other._cache.shared.handle.opening
    assert opening is not None
    assert opening.begin().wait(GUARD)
    assert read(other, "k") == b"value"
    other.drain_sync()
    assert other.cache_info()["cached_keys"] == 1


FORKED = """
import asyncio, os, sys
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore
from zcache import CacheStore
from zcache.testing import hold_index_lock
root = sys.argv[1]
source = MemoryStore({"k": cpu.Buffer.from_bytes(b"value")})
store = CacheStore(source, cache_store=LocalStore(root), source_id="s")
asyncio.run(store.get("k", default_buffer_prototype()))
store.drain_sync()
held = hold_index_lock(root)
held.__enter__()
child = os.fork()
if child == 0:
    async def main():
        beats = 0
        async def beat():
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0.01)
        task = asyncio.ensure_future(beat())
        for _ in range(100):
            value = await store.get("k", default_buffer_prototype())
            assert value.to_bytes() == b"value"
        task.cancel()
        print("beats" if beats > 10 else f"only {beats} beats", flush=True)
    asyncio.run(main())
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_forked_child_reads_while_the_lock_is_held(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD, check=False)
    assert done.stdout == "beats\n", done.stderr


@pytest.mark.slow
def test_no_thread_to_wait_with_reaches_no_reader_and_no_writer_hangs(
    tmp_path: Path, without_threads: Callable[[], None]
) -> None:
    source = StoreDouble(MemoryStore({"k": VALUE, "other": VALUE}))
    store = open_store(tmp_path, source)
    assert read(store, "k") == b"value"
    store.drain_sync()

    async def reads(count: int) -> None:
        for _ in range(count):
            value = await store.get("k", PROTOTYPE)
            assert value is not None

    async def main() -> None:
        with hold_index_lock(tmp_path):
            await asyncio.wait_for(reads(200), GUARD)
            with pytest.raises(IndexLockTimeout):
                await asyncio.wait_for(store.set("k", VALUE), GUARD)
        source.take()
        await store.set("k", cpu.Buffer.from_bytes(b"new"))
        value = await store.get("k", PROTOTYPE)
        assert value is not None
        assert value.to_bytes() == b"new"

    without_threads()
    asyncio.run(main())
    check_invariants(store)


def test_a_step_that_nobody_waits_for_is_taken_later_without_a_thread(
    tmp_path: Path, without_threads: Callable[[], None]
) -> None:
    source = StoreDouble(MemoryStore({"k": VALUE}))
    store = open_store(tmp_path, source)

    async def main() -> None:
        gate = source.block("set")
        task = asyncio.ensure_future(store.set("k", VALUE))
        await gate.entered_async()
        with hold_index_lock(tmp_path):
            gate.release()
            await asyncio.wait_for(task, GUARD)
        await store.get("k", PROTOTYPE)

    without_threads()
    asyncio.run(main())
    # The write has ended for the index as well: the next read is kept.
    assert read(store, "k") == b"value"
    store.drain_sync()
    assert store.cache_info()["cached_keys"] == 1
    check_invariants(store)


def test_steps_that_nobody_waits_for_share_one_timer_without_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_threads: Callable[[], None]
) -> None:
    """One for each of them took all, and had each set another one."""
    store = open_store(tmp_path, StoreDouble(MemoryStore({"k": VALUE})))
    assert read(store, "k") == b"value"
    store.drain_sync()
    handle = store._cache.shared.handle
    looks, timers, taken = list[int](), list[float](), list[object]()

    def step(index: Index) -> object:
        looks.append(1)
        return index.recency()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        set_timer = loop.call_later
        monkeypatch.setattr(
            loop, "call_later", lambda *asked: (timers.append(asked[0]), set_timer(*asked))[1]
        )
        with hold_index_lock(tmp_path):
            for _ in range(4):
                handle.call_later(taken.append, step)
            timers.clear()
            looks.clear()
            while len(looks) < 40:  # noqa: ASYNC110 - by no timer of its own
                await asyncio.sleep(0)
            assert len(timers) <= len(looks) // 4
            assert not taken
        handle.take_deferred()
        assert len(taken) == 4

    without_threads()
    asyncio.run(main())


def test_a_first_opener_without_threads_leaves_a_directory_that_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_threads: Callable[[], None]
) -> None:
    with monkeypatch.context():
        without_threads()
        store = open_store(tmp_path, MemoryStore({"k": VALUE}))
        assert read(store, "k") == b"value"
    monkeypatch.undo()
    assert read(store, "k") == b"value"
    store.drain_sync()
    assert store.cache_info()["cached_keys"] == 1


HOLDER = """
import signal, sys
from zcache.testing import hold_index_lock
held = hold_index_lock(sys.argv[1])
print("holds", flush=True)
signal.pause()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that holds the lock of the directory, and ends it with the test."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_an_owner_that_is_stopped_keeps_the_lock_until_it_is_killed(
    tmp_path: Path, holder: Callable[[], subprocess.Popen[str]]
) -> None:
    source = StoreDouble(MemoryStore({"k": VALUE}))
    store = open_store(tmp_path, source)
    assert read(store, "k") == b"value"
    store.drain_sync()
    process = holder()
    process.send_signal(signal.SIGSTOP)
    source.take()
    assert in_time(lambda: read(store, "k")) == b"value"
    assert source.take()["get"] == 1
    write = store.set("k", cpu.Buffer.from_bytes(b"new"))
    assert isinstance(in_time(lambda: asyncio.run(write)), IndexLockTimeout)
    assert source.take()["set"] == 0
    process.kill()
    process.wait(GUARD)
    # It has died inside a step, so the index is made anew; the value is found by that.
    asyncio.run(complete(store))
    assert read(store, "k") == b"value"
    assert source.take()["get"] == 0
    asyncio.run(store.set("k", cpu.Buffer.from_bytes(b"new")))
    assert read(store, "k") == b"new"
    store.drain_sync()
    check_invariants(store)


@pytest.mark.slow
def test_an_owner_that_dies_before_anyone_asks_costs_no_wait(
    tmp_path: Path, holder: Callable[[], subprocess.Popen[str]]
) -> None:
    source = MemoryStore({"k": VALUE})
    store, other = open_store(tmp_path, source), open_store(tmp_path, source)
    for _ in range(3):
        process = holder()
        process.kill()
        process.wait(GUARD)
        asyncio.run(store.set("k", VALUE))
        assert read(other, "k") == b"value"
    store.drain_sync()
    check_invariants(store)


def test_forks_in_the_middle_of_steps_leave_the_lock_to_the_parent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever thread is in a step then: the child neither releases its lock nor keeps it."""
    source = MemoryStore({str(n): VALUE for n in range(8)})
    store = open_store(tmp_path, source)
    ends = threading.Event()
    wrong: list[Any] = []

    def work(number: int) -> None:
        while not ends.is_set():
            if read(store, str(number)) != b"value":
                wrong.append(number)
            asyncio.run(store.set(str(number), VALUE))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    code = int(read(store, "7") != b"value")
                    del store
                    gc.collect()
                os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        ends.set()
        for thread in threads:
            thread.join(GUARD)
    assert not wrong
    store.drain_sync()
    check_invariants(store)
    # No step has found that another had its lock.
    assert not said(caplog)
