"""Hits that are read at once, and those that have pages outside the page cache."""

from __future__ import annotations

import asyncio
import errno
import gc
import inspect
import math
import os
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import cpu
from zarr.storage import LocalStore, MemoryStore

from directories import flip
from mounts import mounted
from support import PROTOTYPE, buf, check_quiet, count_turns, read, read_through
from zcache import CacheStore
from zcache._backends.directory import backend, page_cache
from zcache._backends.directory.page_cache import PageCacheReader
from zcache._core import Index, open_cached, read_resident, tells_residency
from zcache._runtime.turns import ReadTurns, _ReadTurn
from zcache.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zarr.core.buffer import Buffer

VALUE = bytes(range(256)) * 4096  # 1 MiB
KEYS = [f"c/{number}" for number in range(32)]


def has_nowait(where: Path) -> bool:
    """Whether the file system tells which pages are in the page cache; tmpfs does not."""
    path = where / "probe"
    path.write_bytes(b"1")
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except (AttributeError, OSError):
            return False


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with something else changes nothing."""
    monkeypatch.setattr(page_cache, "SLOW", math.inf)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory on a file system that reads without waiting."""
    if not has_nowait(tmp_path):
        pytest.skip("no RWF_NOWAIT on this file system")
    return tmp_path


@pytest.fixture(params=["here", "tmpfs", "overlayfs"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on each kind of file system from which hits are read on the spot."""
    if request.param == "here":
        yield request.getfixturevalue("here")
        return
    with mounted(request.param, tmp_path) as path:
        yield path


@pytest.fixture
async def store(where: Path) -> CacheStore:
    """With values that are cached and verified, on each kind of file system."""
    return await filled(where)


@pytest.fixture
async def plain_store(here: Path) -> CacheStore:
    """The same on the one that reads without waiting."""
    return await filled(here)


async def filled(where: Path) -> CacheStore:
    source = MemoryStore({key: buf(VALUE) for key in KEYS})
    store = CacheStore(source, cache_store=LocalStore(where / "cache"))
    for _ in range(2):
        for key in KEYS:
            assert await read_through(store, key) == VALUE
    return store


@pytest.fixture
def thread_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are read in a thread."""
    names: list[str] = []
    read_value = backend.read_value

    def noted(root: str, name: str, *args: Any) -> Any:
        names.append(name)
        return read_value(root, name, *args)

    monkeypatch.setattr(backend, "read_value", noted)
    return names


def pretend(monkeypatch: pytest.MonkeyPatch, preadv: Any) -> None:
    """Have another answer of the kernel."""
    monkeypatch.setattr(page_cache, "os", SimpleNamespace(**{**vars(os), "preadv": preadv}))


async def test_hit_in_the_page_cache_takes_no_thread(
    store: CacheStore, thread_reads: list[str]
) -> None:
    for key in KEYS:
        assert await read(store, key) == VALUE
    found = await asyncio.gather(*(store.get(key, PROTOTYPE) for key in KEYS))
    assert [value and value.to_bytes() for value in found] == [VALUE] * len(KEYS)
    assert thread_reads == []
    assert store.cache_stats()["misses"] == len(KEYS)


async def test_hits_many_leave_turns_to_other_tasks(
    store: CacheStore, thread_reads: list[str]
) -> None:
    turns: list[None] = []
    watcher = asyncio.ensure_future(count_turns(turns))
    await asyncio.gather(*(store.get(key, PROTOTYPE) for key in KEYS))
    at_once = len(turns)
    # One after the other no await ever suspends, but for this.
    for key in KEYS:
        await store.get(key, PROTOTYPE)
    watcher.cancel()
    least = len(KEYS) * len(VALUE) // page_cache.A_TURN - 1
    assert at_once >= least
    assert len(turns) - at_once >= least
    assert thread_reads == []


async def reopened(where: Path, **options: Any) -> CacheStore:
    """A store on a cache directory with values that it has not verified yet."""
    source = MemoryStore({key: buf(VALUE) for key in KEYS})
    cache = LocalStore(where / "cache")
    before = CacheStore(source, cache_store=cache, source_id="s")
    for key in KEYS:
        assert await read_through(before, key) == VALUE
    del before
    # An index of another process's: what this one has verified is forgotten with it.
    gc.collect()
    return CacheStore(source, cache_store=cache, source_id="s", **options)


@pytest.mark.parametrize(("size", "count"), [(page_cache.LEAST, 3_000), (100, 10_000)])
async def test_hits_many_small_leave_turns_to_other_tasks(
    where: Path, thread_reads: list[str], size: int, count: int
) -> None:
    names = [f"c/{number}" for number in range(min(count, 900))]
    source = MemoryStore({key: buf(VALUE[:size]) for key in names})
    store = CacheStore(source, cache_store=LocalStore(where / "cache"))
    for key in names:
        await read_through(store, key)
    keys = [names[number % len(names)] for number in range(count)]
    for _ in range(2):
        turns: list[None] = []
        watcher = asyncio.ensure_future(count_turns(turns))
        found = await asyncio.gather(*(store.get(key, PROTOTYPE) for key in keys))
        watcher.cancel()
        assert [value and value.to_bytes() for value in found] == [VALUE[:size]] * count
        assert len(turns) >= count * max(size, page_cache.LEAST) // page_cache.A_TURN - 1
    # One that finds the index busy, as on a busy machine, is read by a thread once it is free.
    assert len(thread_reads) < count // 10


async def test_hits_of_one_call_wait_for_their_turn_as_single_ones_do(
    store: CacheStore, thread_reads: list[str]
) -> None:
    turns: list[None] = []
    watcher = asyncio.ensure_future(count_turns(turns))
    asked = [(key, None) for key in KEYS]
    found = await store.get_partial_values(PROTOTYPE, asked)
    watcher.cancel()
    assert [value and value.to_bytes() for value in found] == [VALUE] * len(KEYS)
    assert len(turns) >= len(KEYS) * len(VALUE) // page_cache.A_TURN - 1
    assert thread_reads == []


async def test_hits_of_one_call_go_on_beside_others_that_fill_each_turn(where: Path) -> None:
    count = 600
    source = MemoryStore({f"small/{n}": buf(b"%d" % n) for n in range(count)})
    large = buf(bytes(page_cache.A_TURN // 5))
    others = [f"large/{n}" for n in range(8)]
    for key in others:
        await source.set(key, large)
    asked = [(f"small/{n}", None) for n in range(count)]
    store = CacheStore(source, cache_store=where / "beside", source_id="s")
    for key in (*others, *(key for key, _ in asked)):
        await read_through(store, key)
        await read(store, key)

    async def go_on(key: str) -> None:
        while True:
            await read(store, key)

    tasks = [asyncio.ensure_future(go_on(key)) for key in others]
    turns: list[None] = []
    tasks.append(asyncio.ensure_future(count_turns(turns)))
    await asyncio.sleep(0.01)
    turns.clear()
    found = await store.get_partial_values(PROTOTYPE, asked)
    for task in tasks:
        task.cancel()
    assert [value and value.to_bytes() for value in found] == [b"%d" % n for n in range(count)]
    # Not one value in each turn.
    assert len(turns) < count // 2


@pytest.mark.parametrize("verify", ["first", "always"])
async def test_hit_first_is_verified_without_a_thread(
    where: Path, thread_reads: list[str], verify: str
) -> None:
    store = await reopened(where, verify=verify)
    assert await read(store, KEYS[0], RangeByteRequest(7, 300)) == VALUE[7:300]
    turns: list[None] = []
    watcher = asyncio.ensure_future(count_turns(turns))
    found = await asyncio.gather(*(store.get(key, PROTOTYPE) for key in KEYS))
    watcher.cancel()
    assert [value and value.to_bytes() for value in found] == [VALUE] * len(KEYS)
    assert len(turns) >= len(KEYS) * len(VALUE) // page_cache.A_TURN - 1
    assert thread_reads == []
    # Verified once, or each time.
    flip(where / "cache" / KEYS[1], 0, 7)
    assert await read(store, KEYS[1]) == (VALUE if verify == "always" else b"\x80" + VALUE[1:])
    assert store.cache_stats()["damaged"] == (verify == "always")


@pytest.mark.parametrize("asked", [None, RangeByteRequest(7, 300)])
async def test_hit_first_damaged_is_read_from_the_source(
    where: Path, asked: RangeByteRequest | None
) -> None:
    store = await reopened(where)
    flip(where / "cache" / KEYS[1], len(VALUE) - 1, 0)
    assert await read(store, KEYS[1], asked) == (VALUE if asked is None else VALUE[7:300])
    assert store.cache_stats()["damaged"] == 1
    await check_quiet(store)


async def test_hit_on_memory_of_others_is_verified_and_copied() -> None:
    """The cache store was given a value of the same bytes, in memory that can change."""
    source, cache = MemoryStore({"k": buf(VALUE)}), MemoryStore()
    store = CacheStore(source, cache_store=cache)
    assert await read(store, "k") == VALUE
    foreign = np.frombuffer(VALUE, "u1").copy()
    cache._store_dict["k"] = cpu.Buffer(foreign)
    for _ in range(2):  # Verified by the first.
        value = await store.get("k", PROTOTYPE)
        assert value is not None
        assert value.to_bytes() == VALUE
        assert not np.shares_memory(value.as_numpy_array(), foreign)


@pytest.mark.parametrize("answer", ["not there", "some of it"])
async def test_hit_outside_the_page_cache_does_not_block_the_loop(
    plain_store: CacheStore, thread_reads: list[str], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device waits for what only another task of the event loop does."""

    def cold(file: int, buffers: Any, offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        if answer == "some of it":
            return len(VALUE) // 2
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    pretend(monkeypatch, cold)
    slow = backend.read_value
    begun, go = threading.Event(), threading.Event()

    def device(*args: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return slow(*args)

    monkeypatch.setattr(backend, "read_value", device)
    task = asyncio.ensure_future(read(plain_store, KEYS[0]))
    assert await asyncio.to_thread(begun.wait, 30)
    go.set()
    assert await task == VALUE
    assert thread_reads == KEYS[:1]


async def test_hit_pages_dropped_is_read_in_a_thread(
    store: CacheStore, where: Path, thread_reads: list[str]
) -> None:
    """The kernel says of each file whether it would have to wait for the disk."""
    path = where / "cache" / KEYS[0]
    # To ask whether they are out begins to read them on some kernels, and at times that is done before the hit.
    for _ in range(10):
        if not drop_pages(path):
            pytest.skip("the system keeps the pages")
        assert await read(store, KEYS[0]) == VALUE
        if thread_reads:
            break
    assert thread_reads == KEYS[:1]
    assert await read(store, KEYS[0]) == VALUE
    assert thread_reads == KEYS[:1]


def drop_pages(path: Path) -> bool:
    """Take a file out of the page cache; whether it is out."""
    size = path.stat().st_size
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if tells_residency(file.fileno()):
            return read_resident(str(path), bytearray(size), size, 0, size) is None
        try:
            os.preadv(file.fileno(), [bytearray(size)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("length", [len(VALUE) - 1, len(VALUE) + 1])
async def test_range_of_a_file_of_another_length_is_read_from_the_source(
    store: CacheStore, where: Path, length: int
) -> None:
    """A value that was verified, and then cut or made longer: what else has changed is unknown."""
    path = where / "cache" / KEYS[0]
    times = path.stat()
    os.truncate(path, length)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert await read(store, KEYS[0], RangeByteRequest(7, 300)) == VALUE[7:300]
    assert store.cache_stats()["damaged"] == 1


@pytest.mark.parametrize("kind", ["memory", "directory"])
async def test_hit_is_one_coroutine_and_one_call_of_the_index(kind: str, store: CacheStore) -> None:
    if kind == "memory":
        store = CacheStore(MemoryStore({KEYS[0]: buf(VALUE)}))
        for _ in range(2):
            assert await read(store, KEYS[0]) == VALUE
    coroutines: list[str] = []
    calls: list[str] = []

    def note(frame: Any, event: str, function: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & inspect.CO_COROUTINE:
            coroutines.append(code.co_qualname)
        if event == "c_call" and isinstance(getattr(function, "__self__", None), Index):
            calls.append(function.__name__)

    def step() -> Buffer | None:
        """Take the first step of a hit; None where it is not the last."""
        hit = store.get(KEYS[0], PROTOTYPE)
        sys.setprofile(note)
        try:
            hit.send(None)
        except StopIteration as done:
            return done.value
        finally:
            sys.setprofile(None)
            hit.close()
        return None

    # A hit suspends while background work holds the lock of the index, or after the system took a page away.
    while (value := step()) is None:
        coroutines.clear()
        calls.clear()
        assert await read(store, KEYS[0]) == VALUE
    assert value.to_bytes() == VALUE
    assert (coroutines, calls) == (["CacheStore.get"], ["lookup"])


def test_get_sync_after_a_closed_loop_reads(where: Path) -> None:
    """A loop that is closed, but not collected yet, is nothing to a thread that reads by itself."""
    source = MemoryStore({"k": buf(VALUE)})
    store = CacheStore(source, cache_store=LocalStore(where / "cache"))
    loop = asyncio.new_event_loop()
    for _ in range(3):
        assert loop.run_until_complete(read(store, "k")) == VALUE
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    if not store._supports_sync_io:
        pytest.skip("zarr before 3.4 has no synchronous local store")
    for _ in range(2 * page_cache.A_TURN // len(VALUE)):
        value = store.get_sync("k", prototype=PROTOTYPE)
        assert value is not None
        assert value.to_bytes() == VALUE


async def test_file_system_without_nowait_is_asked_once(
    plain_store: CacheStore, thread_reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def unknown(*_: Any) -> int:
        nonlocal asked
        asked += 1
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    pretend(monkeypatch, unknown)
    for key in KEYS:
        assert await read(plain_store, key) == VALUE
    assert asked == 1
    assert thread_reads == KEYS


@pytest.mark.parametrize("kind", ["tmpfs", "overlayfs"])
async def test_hit_that_waits_all_the_same_leaves_the_next_ones_to_threads(
    tmp_path: Path, thread_reads: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a hundred times as long as it has waited, but never longer than a minute."""
    waits = [0.0]
    monkeypatch.setattr(page_cache, "SLOW", 0.01)

    def read_slowly(*args: Any) -> float | None:
        waited = read_resident(*args)
        return None if waited is None else waits[0]

    monkeypatch.setattr(page_cache, "read_resident", read_slowly)
    clock = FakeClock()
    with mounted(kind, tmp_path) as where:
        await filled(where)
        thread_reads.clear()
        reader = PageCacheReader(str(where / "cache"), clock)

        async def is_read() -> bool:
            await asyncio.sleep(0)  # In a turn of its own.
            return reader(KEYS[0], PROTOTYPE, len(VALUE), 0, len(VALUE)) is not None

        assert await is_read()
        for waits[0], pause in ((2 * page_cache.SLOW, 2.0), (5.0, 60.0)):
            assert await is_read()
            assert not await is_read()
            clock.advance(pause - 0.001)
            assert not await is_read()
            # It asks for no turn either, in which it would not be read.
            assert await reader.turn(1) is None
            clock.advance(0.002)
        waits[0] = page_cache.SLOW
        assert await is_read()
        assert await is_read()


@pytest.mark.parametrize("kind", ["tmpfs", "overlayfs"])
async def test_hit_on_a_file_of_another_user_is_read_in_a_thread(
    tmp_path: Path, thread_reads: list[str], kind: str
) -> None:
    """Of such a file the kernel says that all its pages are in memory."""
    if os.geteuid():
        pytest.skip("files cannot be given away")
    with mounted(kind, tmp_path) as where:
        store = await filled(where)
        os.chown(where / "cache" / KEYS[0], 12345, -1)
        thread_reads.clear()
        for key in KEYS[:2]:
            assert await read(store, key) == VALUE
    # Another may be read there as well, for a while after one was slow.
    assert KEYS[0] in thread_reads


async def test_hit_on_foreign_objects_in_memory_is_read_from_the_source() -> None:
    """The dict of the cache store was given something else."""
    source, cache = MemoryStore({"k": buf(VALUE)}), MemoryStore()
    store = CacheStore(source, cache_store=cache)
    for foreign in ("text", b"bytes", 5, None, buf(b"short")):
        for _ in range(2):
            assert await read(store, "k") == VALUE
        cache._store_dict["k"] = foreign
    assert await read(store, "k") == VALUE
    await check_quiet(store)


async def test_pages_missing_are_asked_for_once_in_a_turn(
    plain_store: CacheStore,
    here: Path,
    thread_reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For even to be told so takes time: the kernel begins to read."""
    asked: list[str] = []

    def cold(path: str) -> int:
        asked.append(path)
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(page_cache, "open_cached", cold)
    found = await asyncio.gather(*(plain_store.get(key, PROTOTYPE) for key in KEYS))
    assert [value and value.to_bytes() for value in found] == [VALUE] * len(KEYS)
    assert (len(asked), len(thread_reads)) == (1, len(KEYS))
    await plain_store.get(KEYS[0], PROTOTYPE)
    assert len(asked) == 2
    # A thread without an event loop may ask as often as it likes.
    monkeypatch.undo()
    reader = PageCacheReader(str(here / "cache"))
    await asyncio.to_thread(reader, KEYS[0], PROTOTYPE, len(VALUE), 0, len(VALUE))
    assert reader(KEYS[0], PROTOTYPE, len(VALUE), 0, len(VALUE)) is not None


def test_turn_never_ended_is_over_with_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = ReadTurns(1)
    monkeypatch.setattr(_ReadTurn, "_end", lambda _, loop: None)

    async def ask() -> tuple[bool, bool]:
        before = turn.is_cold
        turn.note_cold()
        return before, turn.is_cold

    for _ in range(2):
        assert asyncio.run(ask()) == (False, True)
        assert not turn.is_cold


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
async def test_system_without_cached_opens_opens_files_as_usual(
    plain_store: CacheStore, thread_reads: list[str], error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: str) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(page_cache, "open_cached", unknown)
    assert await read(plain_store, KEYS[0]) == VALUE
    assert thread_reads == []


def test_open_cached_name_never_looked_up_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    try:
        os.close(open_cached(str(tmp_path / "a")))
    except OSError:
        pytest.skip("the system has no such opens")
    # The name of a file that never was is in no cache.
    with pytest.raises((BlockingIOError, FileNotFoundError)):
        open_cached(str(tmp_path / "b"))
