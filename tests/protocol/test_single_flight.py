"""One flight per key, across tasks, threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any, Self

import pytest
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import BufferPrototype
from zarr.storage import LoggingStore, MemoryStore

import soak
from doubles import FaultyStore, GatedStore, reached
from support import PROTOTYPE, SECOND, SecondBuffer, drained, read, threads, until, value_sync
from zcache import CacheStore
from zcache.testing import in_flight, record_steps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from zarr.core.buffer import Buffer

VALUE = bytes(range(100))
MANY = 200


@pytest.fixture
def source() -> GatedStore:
    return GatedStore({"k": VALUE, "other": VALUE[::-1]})


@pytest.fixture
def store(source: GatedStore) -> CacheStore:
    return CacheStore(source)


def missed(store: CacheStore, count: int) -> None:
    """Wait until so many have looked in vain."""
    while store.cache_stats()["misses"] < count:
        time.sleep(0.001)


# ------------------------------------------------------------------- one flight per key


async def test_flight_of_many_tasks_reads_once(source: GatedStore, store: CacheStore) -> None:
    source.shut["get"] = 1
    tasks = [asyncio.create_task(read(store, "k")) for _ in range(MANY)]
    await reached(source)
    await asyncio.to_thread(missed, store, MANY)
    source.release()
    assert await asyncio.gather(*tasks) == [VALUE] * MANY
    assert source.counts["get"] == 1
    assert in_flight(store) == (0, 0)


def test_flight_of_many_threads_reads_once(source: GatedStore, store: CacheStore) -> None:
    source.shut["get"] = 1
    with threads(*[lambda: value_sync(store)] * 40) as results:
        missed(store, 40)
        source.release()
    assert results == [VALUE] * 40
    assert source.counts["get"] == 1


@pytest.mark.parametrize("first", ["loop", "thread"])
def test_flight_of_threads_and_loops_reads_once(
    source: GatedStore, store: CacheStore, first: str
) -> None:
    async def tasks() -> list[bytes | None]:
        requests = [None, None, RangeByteRequest(10, 20), SuffixByteRequest(5), None]
        return list(await asyncio.gather(*(read(store, "k", request) for request in requests)))

    source.shut["get"] = 1
    kinds: dict[str, Callable[[], object]] = {
        "loop": lambda: asyncio.run(tasks()),
        "thread": lambda: value_sync(store),
    }
    with threads(kinds[first]) as one:
        assert source.arrived.acquire(timeout=60)
        with threads(*[*kinds.values()] * 8) as results:
            missed(store, 8 * 6 + (5 if first == "loop" else 1))
            source.release()
    assert source.counts["get"] == 1
    loops = [VALUE, VALUE, VALUE[10:20], VALUE[-5:], VALUE]
    assert results == [loops, VALUE] * 8
    assert one == [loops if first == "loop" else VALUE]


async def test_flight_of_one_byte_range_reads_once(source: GatedStore, store: CacheStore) -> None:
    source.shut["get"] = 1
    tail = SuffixByteRequest(7)
    tasks = [asyncio.create_task(read(store, "k", tail)) for _ in range(MANY)]
    tasks += [asyncio.create_task(batch(store, tail)) for _ in range(3)]
    await reached(source)
    await asyncio.to_thread(missed, store, MANY + 3)
    source.release()
    assert await asyncio.gather(*tasks) == [VALUE[-7:]] * (MANY + 3)
    assert source.counts["get"] == 1


async def batch(store: CacheStore, *requests: Any) -> bytes:
    found = await store.get_partial_values(PROTOTYPE, [("k", request) for request in requests])
    return b"".join(value.to_bytes() for value in found if value is not None)


async def test_flight_of_overlapping_batches_reads_each_range_once(
    source: GatedStore, store: CacheStore
) -> None:
    """Each brings what the other waits for."""
    one, two, three = (RangeByteRequest(n, n + 5) for n in (0, 20, 40))
    found = await asyncio.gather(
        batch(store, one, two, one), batch(store, two, three, one), batch(store, three, three)
    )
    parts = VALUE[:5], VALUE[20:25], VALUE[40:45]
    assert found[0] == parts[0] + parts[1] + parts[0]
    assert found[1] == parts[1] + parts[2] + parts[0]
    assert found[2] == parts[2] * 2
    assert source.counts["get"] == 3
    assert in_flight(store) == (0, 0)


# ------------------------------------------------------- cancellations, errors, prototypes


@pytest.mark.parametrize("gate", ["shut", "late"])
async def test_flight_of_a_cancelled_leader_is_taken_over_by_a_task(
    source: GatedStore, store: CacheStore, gate: str
) -> None:
    getattr(source, gate)["get"] = 5
    tasks = [asyncio.create_task(read(store, "k")) for _ in range(20)]
    for leader in tasks[:5]:
        await reached(source)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
    assert await asyncio.gather(*tasks[5:]) == [VALUE] * 15
    assert source.counts["get"] == 6
    assert in_flight(store) == (0, 0)
    assert await read(store, "k") == VALUE
    assert source.counts["get"] == 6


@pytest.mark.parametrize("many", [False, True])
async def test_flight_of_a_cancelled_leader_is_not_joined_again(
    source: GatedStore, store: CacheStore, many: bool
) -> None:
    """Else those who wait would join the same flight without end."""

    def reading() -> Any:
        return store.get_partial_values(PROTOTYPE, [("k", None)]) if many else read(store, "k")

    source.shut["get"] = 1
    with record_steps(store) as steps:
        leader = asyncio.ensure_future(reading())
        await reached(source)
        others = [asyncio.ensure_future(reading()) for _ in range(5)]
        await until(lambda: store.cache_stats()["misses"] >= 6)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        await asyncio.gather(*others)
    # Each looks twice at most: before the leader has left, and after.
    joins = sum(step.name == "join" for step in steps)
    assert joins <= 1 + 2 * len(others)
    assert source.counts["get"] == 2
    assert in_flight(store) == (0, 0)


def test_flight_of_a_cancelled_leader_is_taken_over_by_a_thread(
    source: GatedStore, store: CacheStore
) -> None:
    source.shut["get"] = 1

    async def lead() -> None:
        task = asyncio.create_task(read(store, "k"))
        await until(lambda: store.cache_stats()["misses"] >= 4)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with threads(lambda: asyncio.run(lead())):
        assert source.arrived.acquire(timeout=60)
        with threads(*[lambda: value_sync(store)] * 3) as results:
            pass
    assert results == [VALUE] * 3
    assert source.counts["get"] <= 3
    assert in_flight(store) == (0, 0)


class RefusedError(Exception):
    """What a source raises."""


def test_flight_that_fails_raises_in_every_reader_and_is_not_kept() -> None:
    class Source(FaultyStore, GatedStore):
        async def before(self, operation: str, key: str) -> None:
            await GatedStore.before(self, operation, key)
            await FaultyStore.before(self, operation, key)

        def before_now(self, operation: str, key: str) -> None:
            GatedStore.before_now(self, operation, key)
            FaultyStore.before_now(self, operation, key)

    source = Source({"k": VALUE})
    store = CacheStore(source)
    source.shut["get"] = 1
    source.plan = lambda *_: RefusedError("no")

    def sync() -> int:
        with pytest.raises(RefusedError, match="no") as caught:
            store.get_sync("k")
        return len(traceback.extract_tb(caught.value.__traceback__))

    async def tasks() -> int:
        work = [read(store, "k") for _ in range(50)]
        errors = await asyncio.gather(*work, return_exceptions=True)
        refused = [error for error in errors if isinstance(error, RefusedError)]
        assert len(refused) == 50
        return max(len(traceback.extract_tb(error.__traceback__)) for error in refused)

    with threads(*[sync] * 10, *[lambda: asyncio.run(tasks())] * 3) as depths:
        missed(store, 160)
        source.release()
    assert source.counts["get"] == 1
    # Each has its own way to the error, not those of all who waited with it.
    assert max(depths) < 25
    with pytest.raises(RefusedError):
        value_sync(store)
    source.plan = lambda *_: None
    assert value_sync(store) == VALUE
    assert source.counts["get"] == 3
    assert in_flight(store) == (0, 0)


class Held:
    """What a frame of a source holds while it reads."""


class FailingStore(GatedStore):
    """Raises while it holds something, of which `held` knows."""

    def __init__(self) -> None:
        super().__init__({})
        self.held: list[weakref.ref[Held]] = []

    async def get(self, *args: Any, **kwargs: Any) -> Buffer | None:
        held = Held()
        self.held.append(weakref.ref(held))
        await super().get(*args, **kwargs)
        raise OSError("the source is gone")


@pytest.mark.parametrize("readers", [1, 3])
async def test_flight_that_fails_keeps_nothing_of_the_source(readers: int) -> None:
    """Its error goes with those who got it: no circle waits for the garbage collector."""
    source = FailingStore()
    store = CacheStore(source)
    source.shut["get"] = 1

    async def fails() -> None:
        with contextlib.suppress(OSError):
            await store.get("k", PROTOTYPE)

    gc.collect()
    gc.disable()
    try:
        tasks = [asyncio.create_task(fails()) for _ in range(readers)]
        await reached(source)
        await asyncio.to_thread(missed, store, readers)
        source.release()
        await asyncio.wait(tasks)
        await until(lambda: source.held[0]() is None)
    finally:
        gc.enable()
    assert len(source.held) == 1


async def test_flight_gives_each_reader_its_own_buffer(
    source: GatedStore, store: CacheStore
) -> None:
    """Of the class that he asked for: read, waited for, cut out of the whole, or cached."""
    part = RangeByteRequest(10, 20)

    async def get(prototype: BufferPrototype, request: Any) -> Buffer:
        value = await store.get("k", prototype, request)
        assert value is not None
        return value

    found: list[Buffer] = []
    for _ in range(2):
        source.shut["get"] = 1
        asked = [(p, r) for p in (PROTOTYPE, SECOND) for r in (None, part)] * 5
        tasks = [asyncio.create_task(get(*one)) for one in asked]
        await asyncio.sleep(0.01)
        source.release()
        found = await asyncio.gather(*tasks)
        for (prototype, request), value in zip(asked, found, strict=True):
            assert type(value) is prototype.buffer
            assert value.to_bytes() == (VALUE if request is None else VALUE[10:20])
        assert len({id(value) for value in found}) == len(found)
    many = await store.get_partial_values(SECOND, [("k", part), ("other", None), ("other", part)])
    assert [type(value) for value in many] == [SecondBuffer] * 3
    assert source.counts["get"] == 2
    # One reader's buffer gives no access to another's.
    for each in [*found, *many]:
        assert each is not None
        array = each.as_numpy_array()
        if array.flags.writeable:
            array[:] = 0
    assert await read(store, "k") == VALUE
    assert await read(store, "other") == VALUE[::-1]


@pytest.mark.parametrize("way", ["get_partial_values", "get_ranges"])
async def test_hits_of_one_call_are_read_side_by_side(way: str) -> None:
    """From a cache store that takes its time: each waits for its own bytes only."""
    source, cache = FaultyStore({"k": VALUE}), GatedStore()
    store = CacheStore(source, cache_store=cache)
    if way == "get_ranges" and not hasattr(Store, "get_ranges"):
        pytest.skip("zarr before 3.3 has no get_ranges")
    wanted = [RangeByteRequest(n, n + 5) for n in range(0, 40, 10)]

    async def get() -> list[bytes]:
        if way == "get_partial_values":
            found = await store.get_partial_values(PROTOTYPE, [("k", each) for each in wanted])
        else:
            found = [None] * len(wanted)
            async for group in store.get_ranges("k", wanted, prototype=PROTOTYPE):
                for number, value in group:
                    found[number] = value
        return [value.to_bytes() for value in found if value is not None]

    values = [VALUE[n : n + 5] for n in range(0, 40, 10)]
    assert await get() == values
    await drained(store)
    cache.shut["get"] = len(wanted)
    task = asyncio.create_task(get())
    await reached(cache, len(wanted))
    cache.release()
    assert await task == values
    assert store.cache_stats()["hits"] == len(wanted)
    assert in_flight(store) == (0, 0)


class FullBuffer(SecondBuffer):
    """Of a device that takes no more."""

    @classmethod
    def from_bytes(cls, bytes_like: object) -> Self:
        raise MemoryError("full")

    from_buffer = from_array_like = from_bytes


async def test_error_of_one_readers_buffer_class_reaches_no_other(
    source: GatedStore, store: CacheStore
) -> None:
    full = BufferPrototype(buffer=FullBuffer, nd_buffer=PROTOTYPE.nd_buffer)
    source.shut["get"] = 1
    first = asyncio.create_task(store.get("k", full))
    await reached(source)
    others = [asyncio.create_task(store.get("k", each)) for each in (PROTOTYPE, SECOND, full)]
    many = asyncio.create_task(store.get_partial_values(PROTOTYPE, [("k", None)]))
    await asyncio.sleep(0.01)
    source.release()
    for task in (first, others[2]):
        with pytest.raises(MemoryError):
            await task
    values = [await others[0], await others[1], *(await many)]
    assert [value and value.to_bytes() for value in values] == [VALUE] * 3


class Derived(MemoryStore):
    """Another class of store in memory."""


@pytest.mark.parametrize("prototype", [PROTOTYPE, SECOND])
@pytest.mark.parametrize("verify", ["first", "never"])
@pytest.mark.parametrize(
    "cache", [MemoryStore, Derived, lambda: LoggingStore(MemoryStore(), log_level="ERROR")]
)
async def test_buffer_of_a_hit_cannot_change_the_cache(
    cache: Callable[[], Store], verify: Any, prototype: BufferPrototype
) -> None:
    """Stores in memory give out the very memory that they hold."""
    store = CacheStore(GatedStore({"k": VALUE}), cache_store=cache(), verify=verify)
    for _ in range(3):
        for request in (None, RangeByteRequest(0, 50)):
            for now in {False, store._supports_sync_io}:
                value = (
                    store.get_sync("k", prototype=prototype, byte_range=request)
                    if now
                    else await store.get("k", prototype, request)
                )
                assert value is not None
                assert type(value) is prototype.buffer
                assert value.to_bytes() == (VALUE[:50] if request else VALUE)
                array = value.as_numpy_array()
                if array.flags.writeable:
                    array[:] = 255


# ------------------------------------------------------------------------- all at once


@pytest.mark.slow
@pytest.mark.parametrize("kind", soak.KINDS)
def test_soak_of_threads_and_loops_finds_no_mismatch(kind: str, tmp_path: Path) -> None:
    """A short run of `tests/soak.py`, which tells what it compares."""
    for seed in range(2):
        current = soak.Round(kind, seed, tmp_path / str(seed), forks=False)
        current.run(1.5)
        assert not current.mismatches, current.mismatches[0]
        assert current.counts["reads"] > 100
        assert current.counts["writes"] > 10
