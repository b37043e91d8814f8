"""An interrupt (Ctrl+C) may come between any two steps of a reader; what it has begun is given back."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest

from doubles import SyncDictStore
from interrupting import Interrupter
from pools import BESIDE_OTHERS, within_bound
from support import PROTOTYPE, buf, check_quiet_sync, read, value_sync
from zcache import CacheStore
from zcache._core import Granted, Index, NeedsEviction
from zcache._protocol import single_flight
from zcache.testing import check_invariants, entries, in_flight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from zarr.abc.store import ByteRequest

VALUE = b"0123456789"
KINDS: dict[str, Any] = {**BESIDE_OTHERS, "store": lambda _: SyncDictStore()}


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("request_", [None, RangeByteRequest(2, 6)], ids=["whole", "range"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_read_that_is_interrupted_anywhere(
    tmp_path: Path, kind: str, request_: ByteRequest | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For so long a reader that was cut off may seem to be writing still.
    monkeypatch.setattr(single_flight, "LONGEST", 0.0)
    source = SyncDictStore({f"{n}": VALUE for n in range(2000)})
    # Every fill evicts.
    store = within_bound(
        CacheStore(source, cache_store=KINDS[kind](tmp_path / "cache"), max_size=25)
    )

    def get(n: int) -> bytes | None:
        value = store.get_sync(f"{n}", prototype=PROTOTYPE, byte_range=request_)
        return None if value is None else value.to_bytes()

    expected = VALUE if request_ is None else VALUE[2:6]
    for n in range(10):
        assert get(n) == expected
    for at in range(5000):
        if not Interrupter(at).run(lambda n=at + 10: get(n)):
            break
        # The next reader gets it, and it can be cached.
        assert get(at + 10) == expected
        assert store.drain_sync(timeout=5), at
        assert in_flight(store) == (0, 0), at
    else:
        pytest.fail("it never came to its end")
    assert at > 100 or kind == "memory"
    for n in range(1500, 1510):
        assert get(n) == expected
    assert store.drain_sync(timeout=5)
    assert store.cache_info()["current_size"] <= 25
    assert all(entry.state == "live" for entry in entries(store))
    check_quiet_sync(store)


@pytest.fixture(autouse=True)
def _no_lock_is_held() -> Iterator[None]:
    """An interrupter that keeps one would stop the tests that come after it."""
    yield

    def is_free(lock: Any) -> bool:
        return bool(lock.acquire(timeout=10)) and lock.release() is None

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(is_free, single_flight._lock).result()


def ranges(store: Any) -> None:
    requests = [RangeByteRequest(0, 4), None, RangeByteRequest(2, 6)]
    list(store.get_ranges_sync("a", requests, prototype=PROTOTYPE))


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("operation", ["set", "delete", "ranges"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_that_is_interrupted_anywhere(
    tmp_path: Path, kind: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is unknown whether it took effect; the next reader sees what the source holds."""
    if operation == "ranges" and not hasattr(CacheStore, "get_ranges_sync"):
        pytest.skip("zarr before 3.4 has no such method")
    monkeypatch.setattr(single_flight, "LONGEST", 0.0)
    monkeypatch.setattr(single_flight, "PATIENCE", 0.01)
    source = SyncDictStore({"a": VALUE})
    store = within_bound(
        CacheStore(source, cache_store=KINDS[kind](tmp_path / "cache"), max_size=25)
    )
    for at in range(5000):
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
        assert store.drain_sync(timeout=60), at
        assert in_flight(store).reservations == 0, at
        # It can be cached, and there is room for it. Those above may have met the fill of the one that was
        # interrupted, which went on.
        assert value_sync(store, "a") == VALUE
        assert store.drain_sync(timeout=60), at
        reads = source.counts["get"]
        assert value_sync(store, "a") == VALUE
        assert source.counts["get"] == reads, at
    else:
        pytest.fail("it never came to its end")
    assert at > 50
    for n in range(10):
        source.values[f"{n}"] = VALUE
        assert value_sync(store, f"{n}") == VALUE
    # What a write was about to delete when it began is lost where the interrupt meets that very
    # answer: those bytes stay where they are, and counted.
    store.drain_sync(timeout=5)
    lost = [entry.state for entry in entries(store) if entry.state != "live"]
    assert lost in ([], ["deleting"])
    assert store.cache_info()["current_size"] <= 25
    check_invariants(store)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("again", [None, 0, 2, 5])
@pytest.mark.parametrize("kind", ["memory", "store"])
def test_those_who_wait_for_one_that_is_interrupted(
    tmp_path: Path, kind: str, again: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread and a task have joined its flight before; neither waits for ever."""
    monkeypatch.setattr(single_flight, "PATIENCE", 0.01)
    enlist, here = single_flight.Flight._enlist, threading.Semaphore(0)

    def enlisted(self: single_flight.Flight, waiter: Any) -> bool:
        is_open = enlist(self, waiter)
        here.release()
        return is_open

    monkeypatch.setattr(single_flight.Flight, "_enlist", enlisted)
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
    for at in range(5000):
        store = CacheStore(source, cache_store=KINDS[kind](tmp_path / "cache"))
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_that_drains_waits_for_nothing_that_it_holds_up_itself(
    tmp_path: Path, kind: str
) -> None:
    """Such as one that closes the store at SIGTERM."""
    source = SyncDictStore({f"{n}": VALUE for n in range(2000)})
    store = CacheStore(source, cache_store=KINDS[kind](tmp_path / "cache"))
    drained: list[bool] = []

    def drain() -> None:
        drained.append(store.drain_sync(timeout=5))

    for at in range(2000):
        Interrupter(at, handler=drain).run(lambda n=at: value_sync(store, f"{n}"))
        if len(drained) == at:
            break
        assert drained[at], at
        assert store.drain_sync(timeout=5), at
    else:
        pytest.fail("it never came to its end")
    assert at > 100 or kind == "memory"
    assert store.drain_sync(timeout=5)
    check_quiet_sync(store)


def test_a_reservation_that_is_dropped_gives_its_room_back() -> None:
    index = Index(flat_namespace=True, max_size=100)

    def reserve(key: str, size: int) -> Any:
        ticket = index.join(key, None, None, 1.0, False)
        assert isinstance(ticket, int)
        return index.reserve(key, None, size, ticket, 1.0)

    granted = reserve("a", 60)
    assert isinstance(granted, Granted)
    assert index.commit(granted.reservation, None, 1.0, 1.0) is not None
    del granted
    assert index.in_flight == (0, 0)
    assert index.current_size == 60
    # Bytes that may be there stay counted until they are deleted.
    granted = reserve("b", 30)
    assert index.in_flight == (1, 1)
    del granted
    gc.collect()
    assert index.in_flight == (1, 0)
    assert index.current_size == 90
    ((cell, name),) = index.failed_deletes(10)
    assert name == "b"
    index.confirm_deletes([cell], [])
    assert index.current_size == 60
    # One that waits for deletes, of which it is unknown whether they were made.
    waiting = reserve("c", 50)
    assert isinstance(waiting, NeedsEviction)
    assert [name for _, name in waiting.victims] == ["a"]
    del waiting
    assert index.failed_deletes(10) == []  # It is known at the next reservation.
    room = reserve("d", 100)
    assert isinstance(room, NeedsEviction)
    assert [name for _, name in room.victims] == ["a"]
    again = index.advance(room.reservation, [cell for cell, _ in room.victims], [], 1.0)
    assert isinstance(again, Granted)
    assert again.reservation is room.reservation
    assert index.release(again.reservation) is not None
    index.validate()
