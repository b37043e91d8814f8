"""`StoreDouble` and `FakeClock`: what a test tells them is what they do."""

from __future__ import annotations

import asyncio
import pickle
import threading

import pytest
from zarr.abc.store import Store, SupportsSyncStore
from zarr.storage import LocalStore, MemoryStore

from doubles import DictStore
from support import PROTOTYPE, buf, listed, read, threads, value_sync
from zcache import CacheStore, OptionValueError
from zcache.testing import FakeClock, Request, StoreDouble


async def groups_of(store: StoreDouble) -> int:
    groups = store.get_ranges("k", [None], prototype=PROTOTYPE)
    return len([group async for group in groups])


OPERATIONS = {
    "get": lambda store: read(store, "k"),
    "get_partial_values": lambda store: store.get_partial_values(PROTOTYPE, [("k", None)]),
    "set": lambda store: store.set("k", buf(b"new")),
    "set_if_not_exists": lambda store: store.set_if_not_exists("k", buf(b"new")),
    "delete": lambda store: store.delete("k"),
    "delete_dir": lambda store: store.delete_dir("k"),
    "clear": lambda store: store.clear(),
    "exists": lambda store: store.exists("k"),
    "getsize": lambda store: store.getsize("k"),
    "getsize_prefix": lambda store: store.getsize_prefix(""),
    "is_empty": lambda store: store.is_empty(""),
    "list": lambda store: listed(store.list()),
    "list_prefix": lambda store: listed(store.list_prefix("")),
    "list_dir": lambda store: listed(store.list_dir("")),
}
if hasattr(Store, "get_ranges"):
    OPERATIONS["get_ranges"] = groups_of


@pytest.fixture
def double() -> StoreDouble:
    return StoreDouble(MemoryStore({"k": buf(b"old")}))


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_operation_is_passed_on_and_counted(double: StoreDouble, operation: str) -> None:
    plain = MemoryStore({"k": buf(b"old")})

    def plainly(found: object) -> object:
        is_list = isinstance(found, list)
        return [v if isinstance(v, str) else v.to_bytes() for v in found] if is_list else found

    expected = plainly(await OPERATIONS[operation](plain))
    assert plainly(await OPERATIONS[operation](double)) == expected
    assert double.calls[operation] == 1
    assert {name: len(v) for name, v in double.inner._store_dict.items()} == {
        name: len(v) for name, v in plain._store_dict.items()
    }
    assert double.take()[operation] == 1
    assert not double.take()


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_operation_told_to_fail_raises_so_often(double: StoreDouble, operation: str) -> None:
    double.fail(operation, TimeoutError("once"), times=1)
    with pytest.raises(TimeoutError, match="once"):
        await OPERATIONS[operation](double)
    assert await read(double.inner, "k") == b"old"
    await OPERATIONS[operation](double)
    assert double.failures == 1
    double.fail(operation, lambda: OSError("always"))
    for _ in range(3):
        with pytest.raises(OSError, match="always"):
            await OPERATIONS[operation](double)
    double.heal()
    await OPERATIONS[operation](double)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_operation_told_to_hang_answers_after_heal_only(
    double: StoreDouble, operation: str
) -> None:
    gate = double.hang(operation)
    task = asyncio.ensure_future(OPERATIONS[operation](double))
    await gate.entered_async()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    double.heal()
    await task


async def test_failure_after_the_effect_leaves_the_effect(double: StoreDouble) -> None:
    double.fail("set", ConnectionError, after=True)
    with pytest.raises(ConnectionError):
        await double.set("k", buf(b"new"))
    assert await read(double, "k") == b"new"


async def test_failure_of_one_key_leaves_others_alone(double: StoreDouble) -> None:
    double.fail("*", ConnectionError, key="k")
    with pytest.raises(ConnectionError):
        await read(double, "k")
    assert await read(double, "other") is None
    assert double.requests == [Request("get", "k"), Request("get", "other")]


def test_gate_holds_up_threads_and_loops_alike(double: StoreDouble) -> None:
    gate = double.block("get")
    with threads(lambda: value_sync(double), lambda: asyncio.run(read(double, "k"))) as found:
        gate.wait_entered(2)
        assert not gate.is_open
        gate.release()
    assert found == [b"old", b"old"]
    assert value_sync(double) == b"old"
    assert double.calls["get"] == 3


async def test_gate_of_one_call_lets_the_next_pass(double: StoreDouble) -> None:
    gate = double.block("set", times=1)
    first = asyncio.ensure_future(double.set("k", buf(b"first")))
    await gate.entered_async()
    await double.set("k", buf(b"second"))
    assert await read(double, "k") == b"second"
    gate.release()
    await first
    assert await read(double, "k") == b"first"


def test_gate_that_nobody_comes_to_says_so(double: StoreDouble) -> None:
    gate = double.block("get")
    with pytest.raises(TimeoutError, match="0 operations came, not 1"):
        gate.wait_entered(timeout=0.01)
    with pytest.raises(TimeoutError, match="0 operations came, not 2"):
        asyncio.run(gate.entered_async(2, timeout=0.01))


async def test_delay_holds_up_nothing_else(double: StoreDouble) -> None:
    double.delay("get", 0.05, times=1)
    slow = asyncio.ensure_future(read(double, "k"))
    await asyncio.sleep(0)
    assert await read(double, "k") == b"old"
    assert not slow.done()
    assert await slow == b"old"


async def test_read_only_copy_is_watched_with_its_original(double: StoreDouble) -> None:
    double.fail("get", ConnectionError)
    with pytest.raises(ConnectionError):
        await read(double.with_read_only(read_only=True), "k")
    assert double.calls["get"] == 1


def test_pickled_copy_begins_anew() -> None:
    double = StoreDouble(LocalStore("/nowhere"))
    double.fail("get", ConnectionError)
    copy = pickle.loads(pickle.dumps(double))
    assert copy.inner == double.inner
    assert not copy.calls
    assert asyncio.run(read(copy, "k")) is None


def test_double_is_synchronous_where_its_store_is() -> None:
    assert StoreDouble(MemoryStore())._supports_sync_io == isinstance(
        MemoryStore(), SupportsSyncStore
    )
    assert not StoreDouble(DictStore())._supports_sync_io


def test_calls_of_many_threads_are_all_counted(double: StoreDouble) -> None:
    workers = [
        threading.Thread(target=lambda: [value_sync(double) for _ in range(200)]) for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert double.calls["get"] == 1600


async def test_clock_of_a_store_is_what_it_counts_ages_by(double: StoreDouble) -> None:
    clock = FakeClock()
    store = CacheStore(double, max_age_seconds=10, clock=clock)
    for seconds, reads in ((0, 1), (9.999, 1), (0.001, 2), (-1, 2), (11, 3)):
        clock.advance(seconds)
        assert await read(store, "k") == b"old"
        assert double.calls["get"] == reads, seconds
    clock.set(5000)
    assert clock() == 5000.0
    assert pickle.loads(pickle.dumps(clock))() == 5000.0


@pytest.mark.parametrize("what", ["fail", "delay", "block", "hang"])
def test_double_told_of_an_unknown_operation_raises(what: str) -> None:
    double = StoreDouble(MemoryStore())
    more = {"fail": (OSError(),), "delay": (1.0,)}.get(what, ())
    with pytest.raises(OptionValueError, match=r"invalid operation: 'gett'.*get_ranges"):
        getattr(double, what)("gett", *more)
