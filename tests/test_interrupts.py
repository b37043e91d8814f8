"""An interrupt (Ctrl+C) may come between any two steps of a reader; what it has begun is given back."""

from __future__ import annotations

import asyncio
import gc
import linecache
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

import zcache
from coherence_support import SyncDictStore, value_sync
from support import PROTOTYPE, buf, check_books, read
from zcache import CacheStore, _flights, _offload, _threads
from zcache._core import Index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from zarr.abc.store import ByteRequest, Store

PACKAGE = str(Path(zcache.__file__).parent)
VALUE = b"0123456789"


class Interrupter:
    """Raises KeyboardInterrupt at the n-th call, line or return in the code of zcache.

    And, if `again` is given, so many calls, lines and returns later once more.
    """

    def __init__(self, after: int, again: int | None = None) -> None:
        self._left: int | None = after
        self._again = again

    def trace(self, frame: FrameType, _event: str, _arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        name, at = frame.f_code.co_filename, frame.f_lineno
        # Not between a lock and the block below it: there the interpreter itself lets no interrupt in.
        locks = any(
            linecache.getline(name, line).lstrip().startswith("with ") for line in (at - 1, at)
        )
        if self._left is not None and not locks:
            self._left -= 1
            if self._left < 0:
                self._left, self._again = self._again, None
                raise KeyboardInterrupt
        return self.trace

    def run(self, work: Callable[[], object]) -> bool:
        """Whether the work was interrupted."""
        before = sys.gettrace()
        # What the garbage collector runs has nowhere to raise.
        gc.disable()
        sys.settrace(self.trace)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            gc.enable()
        return False


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("request_", [None, RangeByteRequest(2, 6)], ids=["whole", "range"])
@pytest.mark.parametrize("kind", ["memory", "directory", "store"])
def test_a_read_that_is_interrupted_anywhere(
    tmp_path: Path, kind: str, request_: ByteRequest | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For so long a reader that was cut off may seem to be writing still.
    monkeypatch.setattr(_flights, "LONGEST", 0.0)
    asyncio.run(watch())
    source = SyncDictStore({f"{n}": VALUE for n in range(2000)})
    # Every fill evicts.
    store = CacheStore(source, cache_store=make(kind, tmp_path), max_size=25)
    index = store._engine.index

    def get(n: int) -> bytes | None:
        value = store.get_sync(f"{n}", prototype=PROTOTYPE, byte_range=request_)
        return None if value is None else value.to_bytes()

    expected = VALUE if request_ is None else VALUE[2:6]
    for n in range(10):
        assert get(n) == expected
    for at in range(1000):
        if not Interrupter(at).run(lambda n=at + 10: get(n)):
            break
        # Whoever asks for it next gets it, and it can be cached.
        assert get(at + 10) == expected
        assert index.in_flight == (0, 0), at
    else:
        pytest.fail("it never came to its end")
    assert at > 100 or kind == "memory"
    for n in range(1500, 1510):
        assert get(n) == expected
    assert index.current_size <= 25
    index.validate()
    assert not store._engine._left
    assert all(state == "present" for *_, state in index.entries())
    if kind != "store":
        check_books(store)


@pytest.fixture(autouse=True)
def _nobody_holds_a_lock() -> Iterator[None]:
    """An interrupter that keeps one would stop the tests that come after it."""
    yield

    def is_free(lock: Any) -> bool:
        return bool(lock.acquire(timeout=10)) and lock.release() is None

    with ThreadPoolExecutor(1) as pool:
        for module in (_flights, _offload, _threads):
            assert pool.submit(is_free, module._lock).result(), module


async def watch() -> None:
    """Leave a closed event loop behind, for others to find."""
    _offload.counter(asyncio.get_running_loop())


def make(kind: str, path: Path) -> Store:
    if kind == "directory":
        return LocalStore(path / "cache")
    return MemoryStore() if kind == "memory" else SyncDictStore()


def ranges(store: Any) -> None:
    requests = [RangeByteRequest(0, 4), None, RangeByteRequest(2, 6)]
    list(store.get_ranges_sync("a", requests, prototype=PROTOTYPE))


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("operation", ["set", "delete", "ranges"])
@pytest.mark.parametrize("kind", ["memory", "directory", "store"])
def test_a_change_that_is_interrupted_anywhere(
    tmp_path: Path, kind: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether it took effect; whoever reads next sees what the source holds."""
    if operation == "ranges" and not hasattr(CacheStore, "get_ranges_sync"):
        pytest.skip("zarr before 3.4 has no such method")
    monkeypatch.setattr(_flights, "LONGEST", 0.0)
    monkeypatch.setattr(_flights, "PATIENCE", 0.01)
    source = SyncDictStore({"a": VALUE})
    store = CacheStore(source, cache_store=make(kind, tmp_path), max_size=25)
    index = store._engine.index
    for at in range(1000):
        source.values["k"] = VALUE
        store.delete_sync("a")
        source.values["a"] = VALUE
        assert value_sync(store) == VALUE
        works: dict[str, Callable[[], object]] = {
            "set": partial(store.set_sync, "k", buf(b"%010d" % at)),
            "delete": partial(store.delete_sync, "k"),
            "ranges": partial(ranges, store),
        }
        if not Interrupter(at).run(works[operation]):
            break
        for key in ("k", "a"):
            for _ in range(2):
                assert value_sync(store, key) == source.values.get(key), (at, key)
        assert index.in_flight[1] == 0, at
        # It can be cached, and there is room for it.
        reads = source.counts["get"]
        assert value_sync(store, "a") == VALUE
        assert source.counts["get"] == reads, at
        index.validate()
    else:
        pytest.fail("it never came to its end")
    assert at > 50
    for n in range(10):
        source.values[f"{n}"] = VALUE
        assert value_sync(store, f"{n}") == VALUE
    # What a write was about to delete when it began is lost where the interrupt meets that very
    # answer: those bytes stay where they are, and counted.
    lost = [state for *_, state in index.entries() if state != "present"]
    assert lost in ([], ["dropping"])
    assert index.current_size <= 25
    index.validate()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("again", [None, 0, 2, 5])
@pytest.mark.parametrize("kind", ["memory", "store"])
def test_those_who_wait_for_one_that_is_interrupted(
    tmp_path: Path, kind: str, again: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread and a task have joined its flight before; neither waits for ever."""
    monkeypatch.setattr(_flights, "PATIENCE", 0.01)
    enlist, here = _flights.Flight._enlist, threading.Semaphore(0)

    def enlisted(self: _flights.Flight, waiter: Any) -> bool:
        is_open = enlist(self, waiter)
        here.release()
        return is_open

    monkeypatch.setattr(_flights.Flight, "_enlist", enlisted)
    found: list[bytes | None] = []

    class Source(SyncDictStore):
        armed = False

        def before_now(self, operation: str, key: str) -> None:
            if operation == "get" and self.armed:
                self.armed = False
                for follow in followers:
                    follow.start()
                for _ in followers:
                    assert here.acquire(timeout=30)

    source = Source({"k": VALUE})
    for at in range(1000):
        store = CacheStore(source, cache_store=make(kind, tmp_path))
        followers = [
            threading.Thread(target=lambda s=store: found.append(value_sync(s)), daemon=True),
            threading.Thread(
                target=lambda s=store: found.append(asyncio.run(read(s, "k"))), daemon=True
            ),
        ]
        source.armed = True
        interrupted = Interrupter(at, again).run(lambda s=store: value_sync(s))
        for follow in followers if not source.armed else ():
            follow.join(30)
            assert not follow.is_alive(), at
        assert found == [VALUE] * (0 if source.armed else 2)
        found.clear()
        if not interrupted:
            break
    else:
        pytest.fail("it never came to its end")


def test_a_reservation_that_nobody_holds() -> None:
    index = Index(flat=True, max_size=100)

    def reserve(key: str, size: int) -> Any:
        ticket = index.join(key, None, None, 1.0, False)
        assert isinstance(ticket, int)
        room = index.reserve(key, None, size, ticket, 1.0)
        assert not isinstance(room, str)
        return room

    granted, victims = reserve("a", 60)
    assert not victims
    assert index.finish(granted, None, 1.0) is not None
    del granted
    assert index.in_flight == (0, 0)
    assert index.current_size == 60
    # One whose bytes may be there stays counted until they are deleted.
    granted, victims = reserve("b", 30)
    assert index.in_flight == (1, 1)
    del granted
    gc.collect()
    assert index.in_flight == (1, 0)
    assert index.current_size == 90
    ((cell, name),) = index.orphans(10)
    assert name == "b"
    index.settled([cell], [])
    assert index.current_size == 60
    # One that waits for deletes: nobody knows whether they were made.
    waiting, victims = reserve("c", 50)
    assert [name for _, name in victims] == ["a"]
    del waiting
    ((cell, name),) = index.orphans(10) or [(0, "")]
    assert (cell, name) == (0, "")  # Nobody has asked yet.
    room = reserve("d", 100)
    assert [name for _, name in room[1]] == ["a"]
    again = index.settle(room[0], [cell for cell, _ in room[1]], [], 1.0)
    assert again[0] is room[0]
    assert index.abort(again[0]) is not None
    index.validate()
