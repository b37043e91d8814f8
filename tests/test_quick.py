"""Hits that are read on the spot, and what happens where their pages are not at hand."""

from __future__ import annotations

import asyncio
import errno
import inspect
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

from directory_support import flip
from support import PROTOTYPE, buf, check_books, count_turns, read
from zcache import CacheStore, _quick
from zcache._core import Index, open_cached
from zcache._ports import LocalSyncPort

if TYPE_CHECKING:
    from pathlib import Path

VALUE = bytes(range(256)) * 4096  # 1 MiB
KEYS = [f"c/{number}" for number in range(32)]


def has_nowait(where: Path) -> bool:
    """Whether the file system tells which pages are at hand; tmpfs does not."""
    path = where / "probe"
    path.write_bytes(b"1")
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except (AttributeError, OSError):
            return False


@pytest.fixture
async def store(tmp_path: Path) -> CacheStore:
    """With values that are cached and verified."""
    if not has_nowait(tmp_path):
        pytest.skip("no RWF_NOWAIT on this file system")
    source = MemoryStore({key: buf(VALUE) for key in KEYS})
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"))
    for _ in range(2):
        for key in KEYS:
            assert await read(store, key) == VALUE
    return store


@pytest.fixture
def port_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are read through the port, which takes a thread."""
    names: list[str] = []
    read_now = LocalSyncPort.read_now

    def noted(self: Any, name: str, *args: Any) -> Any:
        names.append(name)
        return read_now(self, name, *args)

    monkeypatch.setattr(LocalSyncPort, "read_now", noted)
    return names


def pretend(monkeypatch: pytest.MonkeyPatch, preadv: Any) -> None:
    """Have another answer of the kernel."""
    monkeypatch.setattr(_quick, "os", SimpleNamespace(**{**vars(os), "preadv": preadv}))


async def test_what_is_at_hand_takes_no_thread(store: CacheStore, port_reads: list[str]) -> None:
    for key in KEYS:
        assert await read(store, key) == VALUE
    found = await asyncio.gather(*(store.get(key, PROTOTYPE) for key in KEYS))
    assert [value and value.to_bytes() for value in found] == [VALUE] * len(KEYS)
    assert port_reads == []
    assert store.cache_stats()["misses"] == len(KEYS)


async def test_others_have_their_turn_while_much_is_at_hand(
    store: CacheStore, port_reads: list[str]
) -> None:
    turns: list[None] = []
    watcher = asyncio.ensure_future(count_turns(turns))
    await asyncio.gather(*(store.get(key, PROTOTYPE) for key in KEYS))
    at_once = len(turns)
    # One after the other no await ever suspends, but for this.
    for key in KEYS:
        await store.get(key, PROTOTYPE)
    watcher.cancel()
    least = len(KEYS) * len(VALUE) // _quick.LARGEST - 1
    assert at_once >= least
    assert len(turns) - at_once >= least
    assert port_reads == []


async def reopened(where: Path, **options: Any) -> CacheStore:
    """A store on a cache directory with values that it has not verified yet."""
    if not has_nowait(where):
        pytest.skip("no RWF_NOWAIT on this file system")
    source = MemoryStore({key: buf(VALUE) for key in KEYS})
    cache = LocalStore(where / "cache")
    before = CacheStore(source, cache_store=cache, source_id="s")
    for key in KEYS:
        assert await read(before, key) == VALUE
    return CacheStore(source, cache_store=cache, source_id="s", **options)


async def test_many_small_ones_are_much_as_well(tmp_path: Path, port_reads: list[str]) -> None:
    if not has_nowait(tmp_path):
        pytest.skip("no RWF_NOWAIT on this file system")
    size, count = _quick.COUNTED - 1, 900
    keys = [f"c/{number}" for number in range(count)]
    source = MemoryStore({key: buf(VALUE[:size]) for key in keys})
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"))
    for key in keys:
        await read(store, key)
    for _ in range(2):
        turns: list[None] = []
        watcher = asyncio.ensure_future(count_turns(turns))
        found = await asyncio.gather(*(store.get(key, PROTOTYPE) for key in keys))
        watcher.cancel()
        assert [value and value.to_bytes() for value in found] == [VALUE[:size]] * count
        assert len(turns) >= count * size // _quick.LARGEST - 1
    assert port_reads == []


@pytest.mark.parametrize("verify", ["first", "always"])
async def test_what_is_verified_takes_no_thread_either(
    tmp_path: Path, port_reads: list[str], verify: str
) -> None:
    store = await reopened(tmp_path, verify=verify)
    assert await read(store, KEYS[0], RangeByteRequest(7, 300)) == VALUE[7:300]
    turns: list[None] = []
    watcher = asyncio.ensure_future(count_turns(turns))
    found = await asyncio.gather(*(store.get(key, PROTOTYPE) for key in KEYS))
    watcher.cancel()
    assert [value and value.to_bytes() for value in found] == [VALUE] * len(KEYS)
    assert len(turns) >= len(KEYS) * len(VALUE) // _quick.LARGEST - 1
    assert port_reads == []
    # Verified once, or each time.
    flip(tmp_path / "cache" / KEYS[1], 0, 7)
    assert await read(store, KEYS[1]) == (VALUE if verify == "always" else b"\x80" + VALUE[1:])
    assert store.cache_stats()["damaged"] == (verify == "always")


@pytest.mark.parametrize("asked", [None, RangeByteRequest(7, 300)])
async def test_what_is_damaged_is_found_where_it_is_at_hand(
    tmp_path: Path, asked: RangeByteRequest | None
) -> None:
    store = await reopened(tmp_path)
    flip(tmp_path / "cache" / KEYS[1], len(VALUE) - 1, 0)
    assert await read(store, KEYS[1], asked) == (VALUE if asked is None else VALUE[7:300])
    assert store.cache_stats()["damaged"] == 1
    check_books(store)


async def test_what_could_change_in_memory_is_verified_and_given_out_as_a_copy() -> None:
    """Somebody has put a value of the same bytes, but in memory of his own, into the cache store."""
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
async def test_what_is_not_at_hand_holds_nobody_up(
    store: CacheStore, port_reads: list[str], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device waits for what only another task of the event loop does."""

    def cold(file: int, buffers: Any, offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        if answer == "some of it":
            return len(VALUE) // 2
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    pretend(monkeypatch, cold)
    slow = LocalSyncPort.read_now

    begun, go = threading.Event(), threading.Event()

    def device(self: Any, name: str, *args: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return slow(self, name, *args)

    monkeypatch.setattr(LocalSyncPort, "read_now", device)
    task = asyncio.ensure_future(read(store, KEYS[0]))
    assert await asyncio.to_thread(begun.wait, 30)
    go.set()
    assert await task == VALUE
    assert port_reads == KEYS[:1]


async def test_pages_that_were_dropped_are_read_in_a_thread(
    store: CacheStore, tmp_path: Path, port_reads: list[str]
) -> None:
    """The kernel says of each file whether it would have to wait for the disk."""
    path = tmp_path / "cache" / KEYS[0]
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        else:
            pytest.skip("the system keeps the pages")
    assert await read(store, KEYS[0]) == VALUE
    assert port_reads == KEYS[:1]
    assert await read(store, KEYS[0]) == VALUE
    assert port_reads == KEYS[:1]


@pytest.mark.parametrize("length", [len(VALUE) - 1, len(VALUE) + 1])
async def test_a_range_of_a_file_of_another_length(
    store: CacheStore, tmp_path: Path, length: int
) -> None:
    """A value that was verified, and then cut or made longer: what else has changed nobody knows."""
    path = tmp_path / "cache" / KEYS[0]
    times = path.stat()
    os.truncate(path, length)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert await read(store, KEYS[0], RangeByteRequest(7, 300)) == VALUE[7:300]
    assert store.cache_stats()["damaged"] == 1


@pytest.mark.parametrize("where", ["memory", "directory"])
async def test_a_hit_is_one_coroutine_and_one_call_of_the_index(
    where: str, store: CacheStore
) -> None:
    if where == "memory":
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

    hit = store.get(KEYS[0], PROTOTYPE)
    sys.setprofile(note)
    try:
        hit.send(None)
    except StopIteration as done:
        value = done.value
    finally:
        sys.setprofile(None)
    assert value.to_bytes() == VALUE
    assert (coroutines, calls) == (["CacheStore.get"], ["lookup"])


def test_without_the_loop_that_has_read_before(tmp_path: Path) -> None:
    """A loop that is closed, but not collected yet, is nothing to a thread that reads by itself."""
    if not has_nowait(tmp_path):
        pytest.skip("no RWF_NOWAIT on this file system")
    source = MemoryStore({"k": buf(VALUE)})
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"))
    loop = asyncio.new_event_loop()
    for _ in range(3):
        assert loop.run_until_complete(read(store, "k")) == VALUE
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    if not store._supports_sync_io:
        pytest.skip("zarr before 3.4 has no synchronous local store")
    for _ in range(2 * _quick.LARGEST // len(VALUE)):
        value = store.get_sync("k", prototype=PROTOTYPE)
        assert value is not None
        assert value.to_bytes() == VALUE


async def test_a_file_system_that_cannot_tell_is_asked_once(
    store: CacheStore, port_reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def unknown(*_: Any) -> int:
        nonlocal asked
        asked += 1
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    pretend(monkeypatch, unknown)
    for key in KEYS:
        assert await read(store, key) == VALUE
    assert asked == 1
    assert port_reads == KEYS


async def test_what_is_no_value_at_all_in_memory() -> None:
    """Somebody has put something else into the dict of the cache store."""
    source, cache = MemoryStore({"k": buf(VALUE)}), MemoryStore()
    store = CacheStore(source, cache_store=cache)
    for foreign in ("text", b"bytes", 5, None, buf(b"short")):
        for _ in range(2):
            assert await read(store, "k") == VALUE
        cache._store_dict["k"] = foreign
    assert await read(store, "k") == VALUE
    check_books(store)


async def test_what_is_not_at_hand_is_asked_for_once_in_a_turn(
    store: CacheStore, port_reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For even to be told so takes time: the kernel begins to read."""
    asked: list[str] = []

    def cold(path: str) -> int:
        asked.append(path)
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(_quick, "open_cached", cold)
    found = await asyncio.gather(*(store.get(key, PROTOTYPE) for key in KEYS))
    assert [value and value.to_bytes() for value in found] == [VALUE] * len(KEYS)
    assert (len(asked), len(port_reads)) == (1, len(KEYS))
    await store.get(KEYS[0], PROTOTYPE)
    assert len(asked) == 2
    # A thread without an event loop may wait as often as it likes.
    monkeypatch.undo()
    assert store._engine._files is not None
    await asyncio.to_thread(store._engine._files._turn.was_cold)
    assert store._engine._files(KEYS[0], PROTOTYPE, len(VALUE), 0, len(VALUE)) is not None


def test_a_turn_that_never_ended_is_over_with_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = _quick._Turn()
    monkeypatch.setattr(turn, "_end", lambda: None)

    async def ask() -> tuple[bool, bool]:
        before = turn.is_cold
        turn.was_cold()
        return before, turn.is_cold

    for _ in range(2):
        assert asyncio.run(ask()) == (False, True)
        assert not turn.is_cold


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
async def test_systems_that_cannot_tell_what_is_at_hand(
    store: CacheStore, port_reads: list[str], error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: str) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(_quick, "open_cached", unknown)
    assert await read(store, KEYS[0]) == VALUE
    assert port_reads == []


def test_what_was_never_looked_up_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    try:
        os.close(open_cached(str(tmp_path / "a")))
    except OSError:
        pytest.skip("the system does not tell what is at hand")
    # The name of a file that never was is in no cache.
    with pytest.raises((BlockingIOError, FileNotFoundError)):
        open_cached(str(tmp_path / "b"))
