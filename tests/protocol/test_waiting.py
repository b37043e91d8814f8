"""No reader waits for ever: not for a loop that has ended, nor for a thread that waits itself."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest, Store
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from doubles import DictStore, GatedStore, SyncDictStore, reached
from support import PROTOTYPE, buf, read, threads, until, value_sync
from zcache import CacheStore
from zcache._protocol import single_flight
from zcache._protocol.fill import FillQueue
from zcache.testing import check_invariants, in_flight

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.core.buffer import Buffer

    from zcache.testing import FakeClock

VALUE = bytes(range(100))
RANGES = [RangeByteRequest(0, 10), RangeByteRequest(50, 60)]
HANGS = 30.0
"""Seconds after which something is said to hang: far more than any time limit of zcache."""


@pytest.fixture
def source() -> GatedStore:
    return GatedStore({"k": VALUE, "other": VALUE[::-1]})


@pytest.fixture
def store(source: GatedStore) -> CacheStore:
    return CacheStore(source)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiters soon ask whether their reader can go on."""
    monkeypatch.setattr(single_flight, "PATIENCE", 0.02)
    monkeypatch.setattr(single_flight, "PAUSE", 0.01)


@pytest.mark.parametrize("workers", [1, 2, 6])
def test_waiters_that_fill_the_thread_pool_their_reader_needs(workers: int, tmp_path: Path) -> None:
    """`LocalStore` reads in the loop's thread pool, and in that pool sit those who wait for it."""
    gate = asyncio.Event()

    class Slow(WrapperStore[LocalStore]):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            await gate.wait()
            return await self._store.get(key, prototype, byte_range)

        def get_sync(self, key: str, **options: Any) -> Any:
            return self._store.get_sync(key, **options)

        def set_sync(self, key: str, value: Buffer) -> None:
            self._store.set_sync(key, value)

        def delete_sync(self, key: str) -> None:
            self._store.delete_sync(key)

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(workers))
        files = LocalStore(tmp_path)
        for n in range(3):
            await files.set(f"{n}", buf(VALUE))
        store = CacheStore(Slow(files))
        leaders = [asyncio.create_task(read(store, f"{n}")) for n in range(3)]
        await asyncio.sleep(0)
        work = [asyncio.to_thread(value_sync, store, f"{n % 3}") for n in range(30)]
        waiters = asyncio.gather(*work)
        await asyncio.sleep(0.01)
        gate.set()
        assert await asyncio.wait_for(waiters, 60) == [VALUE] * 30
        assert await asyncio.gather(*leaders) == [VALUE] * 3
        assert in_flight(store) == (0, 0)

    asyncio.run(main())


async def test_a_waiter_that_blocks_the_loop_of_its_reader(
    source: GatedStore, store: CacheStore
) -> None:
    source.shut["get"] = 1
    leader = asyncio.create_task(read(store, "k"))
    follower = asyncio.create_task(read(store, "k"))
    await reached(source)
    assert value_sync(store) == VALUE
    assert source.counts["get"] == 2
    # Nor does any other reader wait for the one that is held up.
    assert await follower == VALUE
    source.release()
    assert await leader == VALUE
    assert in_flight(store) == (0, 0)


@pytest.mark.usefixtures("patience")
def test_a_loop_that_waits_for_a_task_of_another(source: GatedStore, store: CacheStore) -> None:
    """As a notebook does that calls a synchronous function: the task needs what its own loop reads."""
    source.shut["get"] = 1

    async def main() -> None:
        leader = asyncio.create_task(read(store, "k"))
        await reached(source)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(asyncio.run, read(store, "k")).result(60) == VALUE
        source.release()
        assert await leader == VALUE

    asyncio.run(main())
    assert source.counts["get"] == 2
    assert in_flight(store) == (0, 0)


@pytest.mark.usefixtures("patience")
def test_two_loops_that_block_each_other(source: GatedStore, store: CacheStore) -> None:
    """Each leads what the other one's thread waits for."""
    source.shut["get"] = 2
    both = threading.Barrier(2)

    async def lead(mine: str, others: str) -> bytes | None:
        leader = asyncio.create_task(read(store, mine))
        await asyncio.sleep(0.01)
        both.wait(60)
        found = value_sync(store, others)
        source.release()
        await leader
        return found

    with threads(
        lambda: asyncio.run(lead("k", "other")), lambda: asyncio.run(lead("other", "k"))
    ) as results:
        pass
    assert results == [VALUE[::-1], VALUE]


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("request_", [None, RangeByteRequest(5, 9)])
@pytest.mark.parametrize("end", ["stopped", "closed", "collected"])
def test_a_loop_that_ends_in_the_middle(
    source: GatedStore, store: CacheStore, end: str, request_: Any
) -> None:
    """Its reads never come; those who wait for them, or come later, read anew, once for all."""
    source.shut["get"] = 1
    loop = asyncio.new_event_loop()
    leader = loop.create_task(read(store, "k", request_))
    while not source.counts["get"]:
        loop.run_until_complete(asyncio.sleep(0))
    leader._log_destroy_pending = False  # type: ignore[attr-defined]
    if end != "stopped":
        loop.close()
    if end == "collected":
        del leader
        gc.collect()

    async def followers() -> list[bytes | None]:
        return list(await asyncio.gather(*[read(store, "k", request_) for _ in range(20)]))

    with threads(lambda: asyncio.run(followers()), lambda: value_sync(store)) as results:
        pass
    assert results == [[VALUE if request_ is None else VALUE[5:9]] * 20, VALUE]
    # One more of the same; or two, for the thread wants all of it.
    assert 2 <= source.counts["get"] <= 3
    source.release()
    if end == "stopped":
        loop.run_until_complete(leader)
        loop.close()
    assert in_flight(store) == (0, 0) or end == "closed"
    reads = source.counts["get"]
    asyncio.run(followers())
    assert source.counts["get"] == reads


@pytest.mark.parametrize("request_", [None, RangeByteRequest(5, 9)])
@pytest.mark.parametrize("way", ["superseded", "invalidated"])
def test_a_flight_that_cannot_be_joined_and_is_cut_off_ends_with_the_next(
    source: GatedStore, clock: FakeClock, way: str, request_: Any
) -> None:
    """As long as someone kept its task, all seemed to be on its way that is of its key."""
    cache = MemoryStore()
    store = CacheStore(source, cache_store=cache, clock=clock)
    short = CacheStore(source, cache_store=cache, clock=clock, max_age_seconds=1)
    for _ in range(2):
        source.shut["get"] = 1
        loop = asyncio.new_event_loop()
        leader = loop.create_task(read(store, "k", request_))
        loop.run_until_complete(asyncio.wait_for(reached(source), HANGS))
        leader._log_destroy_pending = False  # type: ignore[attr-defined]
        clock.advance(5)
        if way == "invalidated":
            store.invalidate_sync("k")
        loop.run_until_complete(read(short, "k", request_))
        loop.close()
        assert short.drain_sync()
        assert in_flight(store) == (0, 0)
        assert asyncio.run(read(store, "k", request_)) is not None
        store.invalidate_sync("k")
        check_invariants(store)


@pytest.mark.parametrize("end", ["stopped", "closed"])
@pytest.mark.parametrize("way", ["get_partial_values", "get_ranges", "generator"])
def test_a_loop_that_ends_in_the_middle_of_many_reads_says_nothing(
    source: GatedStore, store: CacheStore, way: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its readers are collected where nothing can be awaited."""
    if way != "get_partial_values" and not hasattr(Store, "get_ranges"):
        pytest.skip("zarr before 3.3 has no get_ranges")
    ranges = [RangeByteRequest(0, 10), RangeByteRequest(50, 60)]
    raised: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", raised.append)

    async def get() -> Any:
        if way == "get_partial_values":
            return await store.get_partial_values(PROTOTYPE, [("k", one) for one in ranges])
        return [group async for group in store.get_ranges("k", ranges, prototype=PROTOTYPE)]

    async def begin() -> Any:
        if way == "generator":
            groups: Any = store.get_ranges("k", ranges, prototype=PROTOTYPE)
            reader = asyncio.ensure_future(anext(groups))
        else:
            groups, reader = None, asyncio.ensure_future(get())
        await reached(source)
        return groups, reader

    source.shut["get"] = 2
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # asyncio says that its tasks are pending.
    reading = loop.run_until_complete(begin())
    if end == "closed":
        loop.close()
    del reading
    gc.collect()
    source.release()
    if end == "stopped":
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    assert asyncio.run(read(store, "k", ranges[0])) == VALUE[:10]
    gc.collect()
    # Of a generator that is closed while it runs, Python says so itself.
    assert [one for one in raised if "event loop" in str(one.exc_value).lower()] == []


def test_a_reader_that_is_collected_ends_its_flight(source: GatedStore, store: CacheStore) -> None:
    """The garbage collector may end it at any moment, within a step of another one as well."""
    for _ in range(3):
        steps = read(store, "k")
        source.shut["get"] = 1
        loop = asyncio.new_event_loop()
        task = loop.create_task(steps)
        loop.run_until_complete(asyncio.sleep(0.01))
        assert in_flight(store) == (1, 0)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        with single_flight._lock:
            del steps, task, loop
            gc.collect()
        assert in_flight(store) == (0, 0)


@pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
@pytest.mark.parametrize("is_invalidated", [False, True])
@pytest.mark.parametrize("way", ["get", "get_partial_values", "set"])
def test_a_loop_that_is_dropped_with_reads_under_way_is_collected(
    store: CacheStore,
    source: GatedStore,
    way: str,
    is_invalidated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The index holds flights, which do not hold the loop: what was to end them goes with it."""

    async def use() -> None:
        if way == "get":
            await read(store, "k")
        elif way == "set":
            await store.set("k", buf(VALUE))
        else:
            await store.get_partial_values(PROTOTYPE, [("k", None), ("other", None)])

    def abandon() -> weakref.ref[asyncio.AbstractEventLoop]:
        async def for_ever(*_: object, **__: object) -> None:
            entered.set()
            await asyncio.sleep(3600)  # The loop holds what waits for this.

        async def give_up() -> None:
            task = asyncio.ensure_future(use())
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            await entered.wait()

        entered = asyncio.Event()
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # asyncio says that its tasks are pending.
        with monkeypatch.context() as patch:
            for operation in ("get", "get_partial_values", "set"):
                patch.setattr(source, operation, for_ever)
            loop.run_until_complete(give_up())
        return weakref.ref(loop)

    # Python says itself of an asynchronous generator that it is closed while it runs.
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    loop = abandon()
    if is_invalidated:
        store.invalidate_sync("k")
        store.invalidate_sync("other")
    gc.collect()
    assert loop() is None
    # Python 3.11 does not run the end of an asynchronous generator that is collected while it waits.
    if way != "get_partial_values" or sys.version_info >= (3, 13):
        assert in_flight(store) == (0, 0)
    assert asyncio.run(read(store, "other")) == VALUE[::-1]


def test_stores_that_call_back() -> None:
    """No lock is held while a store works: it may use the cache itself."""
    used = 0
    mine: list[CacheStore] = []

    class Curious(SyncDictStore):
        def before_now(self, operation: str, key: str) -> None:
            nonlocal used
            assert mine[0].cache_info()["current_size"] >= 0
            assert mine[0].cache_stats()["hit_rate"] <= 1
            assert "cached_keys" in repr(mine[0])
            assert in_flight(mine[0]).flights >= 0
            if operation != "get" or key != "deep":
                used += 1
                assert value_sync(mine[0], "deep") == VALUE

        after_now = before_now

        async def before(self, operation: str, key: str) -> None:
            self.before_now(operation, key)

    store = CacheStore(
        Curious({f"{n}": VALUE for n in range(5)} | {"deep": VALUE}),
        cache_store=Curious(),
        max_size=250,
    )
    mine.append(store)
    for n in range(5):
        assert value_sync(store, f"{n}") == VALUE
        assert asyncio.run(read(store, f"{n}")) == VALUE
        store.set_sync(f"{n}", buf(VALUE))
    store.delete_sync("1")
    asyncio.run(store.delete_dir("x"))
    assert used > 20


def test_a_thread_does_not_wait_for_its_own_read() -> None:
    """A finalizer may read, in the thread and in the middle of the read of the very same key."""
    flight = single_flight.Flight(None)
    assert not flight.wait_sync()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(flight.wait_sync)
        flight.deliver(VALUE)
        assert waiting.result(30)
    assert flight.wait_sync()


@pytest.mark.parametrize("waiter", ["task", "thread", "same thread", "same loop", "batch"])
@pytest.mark.usefixtures("patience")
def test_a_reader_that_is_interrupted_before_it_begins(
    source: GatedStore, store: CacheStore, waiter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its flight is open, and no leader will ever end it."""

    def interrupt(*_: object) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(single_flight, "PATIENCE", 0.02)
        raise KeyboardInterrupt

    # Of this store: other tests may have left readers that go on.
    monkeypatch.setattr(store._reader, "_lead", interrupt)
    found: list[bytes | None] = []
    if waiter == "same loop":

        async def again() -> list[bytes | None]:
            with pytest.raises(KeyboardInterrupt):
                await read(store, "k")
            return list(await asyncio.gather(read(store, "k"), read(store, "k")))

        found = asyncio.run(again())
    else:
        with pytest.raises(KeyboardInterrupt):
            value_sync(store)
        assert in_flight(store) == (1, 0)
        if waiter == "task":
            found = [asyncio.run(read(store, "k"))]
        elif waiter == "thread":
            with threads(lambda: value_sync(store)) as found:
                pass
        elif waiter == "same thread":
            found = [value_sync(store)]
        else:

            async def batch() -> list[bytes | None]:
                values = await store.get_partial_values(PROTOTYPE, [("k", None)] * 3)
                return [None if value is None else value.to_bytes() for value in values]

            found = asyncio.run(batch())
    assert set(found) == {VALUE}
    assert source.counts["get"] == 1
    assert in_flight(store) == (0, 0)
    assert store.cache_info()["cached_keys"] == 1


def test_a_write_of_a_closed_loop_that_lands_later() -> None:
    """A thread may go on with it: it is unknown when it has ended, so nothing of that key is kept."""
    source = GatedStore({"k": b"old", "other": b"1"})
    store = CacheStore(source)
    source.shut["set"] = 1
    loop = asyncio.new_event_loop()
    task = loop.create_task(store.set("k", buf(b"new")))
    while not source.counts["set"]:
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    for _ in range(2):
        assert asyncio.run(read(store, "k")) == value_sync(store) == b"old"
    source.values["k"] = b"new"
    for _ in range(2):
        assert asyncio.run(read(store, "k")) == value_sync(store) == b"new"
    assert value_sync(store, "other") == b"1"
    assert store.cache_info()["cached_keys"] == 1
    task._log_destroy_pending = False  # type: ignore[attr-defined]


# ------------------------------------------------------- a source that ends a call by itself


async def outcome(store: Any, way: str) -> Any:
    """What comes of two ranges: an error is told by its kind, one of a group by those of all."""

    def told(error: BaseException) -> Any:
        if isinstance(error, BaseExceptionGroup):
            return type(error), error.message, [told(one) for one in error.exceptions]
        return type(error), str(error)

    async def get() -> list[bytes]:
        if way == "get_partial_values":
            values = await store.get_partial_values(PROTOTYPE, [("k", one) for one in RANGES])
        else:
            # Not joined, as ranges that lie near each other are.
            groups = store.get_ranges("k", RANGES, prototype=PROTOTYPE, max_gap_bytes=0)
            values = [value for group in [group async for group in groups] for _, value in group]
        return [value.to_bytes() for value in values]

    task = asyncio.ensure_future(get())
    done, _ = await asyncio.wait([task], timeout=HANGS)
    if not done:
        task.cancel()
        return "it hangs"
    try:
        return task.result()
    except BaseException as error:  # noqa: BLE001 - it is what is asked for
        return told(error)


async def check_ends_as(source: Any, store: CacheStore, way: str) -> None:
    """What the source raises is raised, those who wait read for themselves, and so does the next call."""
    first = asyncio.ensure_future(outcome(store, way))
    await until(lambda: in_flight(store)[0] == len(RANGES))
    followers = [asyncio.ensure_future(read(store, "k", one)) for one in RANGES]
    await asyncio.sleep(0)
    source.begins.set()
    assert await first == await outcome(source, way)
    source.fails = False
    for one, follower in zip(RANGES, followers, strict=True):
        with contextlib.suppress(ConnectionResetError, asyncio.CancelledError):
            assert await asyncio.wait_for(follower, HANGS) == VALUE[one.start : one.end]
    assert await outcome(store, way) == [VALUE[one.start : one.end] for one in RANGES]
    await store.drain()
    assert in_flight(store) == (0, 0)


class Parting(DictStore):
    """A source of which one range of two fails, by zarr's own `get_ranges` in the middle of the work on the other."""

    fails = True

    def __init__(self) -> None:
        super().__init__({"k": VALUE})
        self.begins, self.goes_on, self.has_failed = (asyncio.Event() for _ in range(3))

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        await self.begins.wait()
        if self.fails and byte_range == RANGES[1]:
            await self.goes_on.wait()
            self.has_failed.set()
            raise ConnectionResetError("the network")
        return await super().get(key, prototype, byte_range)


@pytest.mark.skipif(not hasattr(Store, "get_ranges"), reason="zarr before 3.3 has no get_ranges")
async def test_a_range_that_fails_while_another_one_is_taken_in_ends_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The `TaskGroup` in which zarr reads ranges then cancels the task that iterates over them."""
    source = Parting()
    store = CacheStore(source, cache_store=GatedStore())
    put = FillQueue.put

    async def put_late(*args: Any) -> bool:
        source.goes_on.set()
        await source.has_failed.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        return await put(*args)

    monkeypatch.setattr(FillQueue, "put", put_late)
    await check_ends_as(source, store, "get_ranges")


class Ending(DictStore):
    """A source of which the calls for many values end in a way of their own."""

    fails = True

    def __init__(self, end: str) -> None:
        super().__init__({"k": VALUE})
        self._end = end
        self.begins = asyncio.Event()

    async def _fail(self) -> None:
        if self._end == "cancels its task":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        if self._end == "cancelled":
            raise asyncio.CancelledError
        if self._end == "group":
            raise BaseExceptionGroup("one of two", [asyncio.CancelledError()])
        raise ConnectionResetError("the network")

    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
        await self.begins.wait()
        if self.fails:
            await self._fail()
        return [await self.get(key, prototype, one) for key, one in key_ranges]

    async def get_ranges(self, key: str, byte_ranges: Any, *, prototype: Any, **_: Any) -> Any:
        await self.begins.wait()
        for number, byte_range in enumerate(byte_ranges):
            if self.fails and number:
                await self._fail()
            yield [(number, await self.get(key, prototype, byte_range))]


@pytest.mark.parametrize("way", ["get_partial_values", "get_ranges"])
@pytest.mark.parametrize("end", ["error", "group", "cancelled", "cancels its task"])
async def test_a_source_that_ends_a_call_in_any_way_ends_it_here(end: str, way: str) -> None:
    source = Ending(end)
    await check_ends_as(source, CacheStore(source), way)


async def test_a_source_that_fails_while_the_caller_does_something_else_lets_others_read() -> None:
    source = Ending("error")
    source.begins.set()
    store = CacheStore(source)
    groups: Any = store.get_ranges("k", RANGES, prototype=PROTOTYPE)
    assert [at for at, _ in await anext(groups)] == [0]
    # Its caller has one group, and asks for no other one.
    assert await asyncio.wait_for(read(store, "k", RANGES[1]), HANGS) == VALUE[50:60]
    with pytest.raises(ConnectionResetError):
        await anext(groups)
    assert in_flight(store) == (0, 0)


def test_a_loop_that_ends_with_ranges_left_open_says_nothing() -> None:
    """It closes all generators at once, and each may have another one below it."""
    said: list[Any] = []
    kept: list[Any] = []

    async def begin() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        kept.append(store.get_ranges("k", RANGES, prototype=PROTOTYPE))
        await anext(kept[0])

    source = Ending("error")
    source.fails = False
    source.begins.set()
    store = CacheStore(source)
    asyncio.run(begin())
    assert said == []
    assert in_flight(store) == (0, 0)
