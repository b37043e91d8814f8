"""What is a request and what is none, in the sample of an index and in a recording alike."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import gc
import gzip
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import MemoryStore

from pools import CACHES, STORES
from support import PROTOTYPE, buf, drained, read, read_through, value_sync
from zcache import CacheStore, IndexLockTimeout, OfflineError, replay
from zcache._advice.trace import UNKNOWN, sampled
from zcache._backends.base import BUSY
from zcache.testing import StoreDouble, in_flight
from zcache.testing._internals import ask

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from zarr.abc.store import ByteRequest

KEYS = [f"a/c/{number}" for number in range(4)]
PART = RangeByteRequest(3, 9)
SOURCE_READS = ("get", "get_ranges", "get_partial_values")
WANTED: list[tuple[str, ByteRequest | None]] = [(KEYS[0], PART), (KEYS[1], None), (KEYS[0], PART)]


def source_of() -> StoreDouble:
    return StoreDouble(MemoryStore({key: buf(bytes(100)) for key in KEYS}))


def asked_for(asked: list[tuple[str, ByteRequest | None]]) -> Counter[tuple[str, int]]:
    return Counter((key, 100 if request is None else 6) for key, request in asked)


def check(store: CacheStore, path: Path, asked: list[tuple[str, ByteRequest | None]]) -> None:
    """That the sample and the recording at `path`, which has ended, have these requests, with their sizes."""
    with gzip.open(path, "rt", newline="") as file:
        file.readline()
        rows = list(csv.DictReader(file))
    assert Counter((row["key"], int(row["size"] or -1)) for row in rows) == asked_for(asked)
    _, rate, _, _, keys, sizes, *_ = ask(store, lambda index: index.sample())
    assert rate == 1
    assert len(keys) == len(sizes) == 8 * len(asked)
    assert UNKNOWN not in memoryview(sizes).cast("Q")
    trace = ask(store, sampled)
    counted = sorted(zip(trace.hits.tolist(), trace.sizes.tolist(), strict=True))[trace.earlier :]
    assert trace.requests == len(asked)
    if not trace.earlier:
        found = sorted((row["hit"] == "1", int(row["size"])) for row in rows)
        assert found == counted


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.csv.gz"


async def cancelled(work: Awaitable[Any]) -> None:
    """What is asked is cut off once all of it waits."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def ranges(store: CacheStore) -> list[Any]:
    asked = [None, PART, PART]
    return [one async for one in store.get_ranges(KEYS[0], asked, prototype=PROTOTYPE)]


READS: dict[str, Callable[[CacheStore], Awaitable[Any]]] = {
    "get": lambda store: read(store, KEYS[0]),
    "range": lambda store: read(store, KEYS[0], PART),
    "several at once": lambda store: asyncio.gather(*(read(store, KEYS[0]) for _ in range(3))),
    "get_partial_values": lambda store: store.get_partial_values(PROTOTYPE, WANTED),
    "get_ranges": ranges,
}


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("kind", [*CACHES, "store"])
async def test_read_that_is_cancelled_is_no_request(path: Path, kind: str, how: str) -> None:
    """It counted as one that had brought its value, which a later read has told the size of."""
    source = source_of()
    place = {**CACHES, **STORES}[kind](path.parent / "cache")
    store = CacheStore(source, cache_store=place, source_id="here")
    with store.record(path):
        gates = [source.hang(operation) for operation in SOURCE_READS]
        for _ in range(3):
            await cancelled(READS[how](store))
        assert any(gate.entered for gate in gates)
        source.heal()
        for _ in range(2):
            for asked in WANTED:
                await read_through(store, *asked)
    await drained(store)
    check(store, path, WANTED * 2)


@pytest.mark.parametrize("how", READS)
async def test_read_that_fails_is_no_request(path: Path, how: str) -> None:
    source = source_of()
    store = CacheStore(source)
    with store.record(path):
        for operation in SOURCE_READS:
            source.fail(operation, OSError("unreachable"))
        for _ in range(3):
            with pytest.raises((OSError, BaseExceptionGroup)):
                await READS[how](store)
        source.heal()
        for asked in WANTED:
            await read_through(store, *asked)
    check(store, path, WANTED)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_read_without_a_loop_that_is_cut_off_is_no_request(
    path: Path, error: type[BaseException]
) -> None:
    source = source_of()
    store = CacheStore(source)
    with store.record(path):
        for operation in SOURCE_READS:
            source.fail(operation, error)
        for _ in range(3):
            with pytest.raises(error):
                value_sync(store, *WANTED[0])
        if hasattr(store, "get_ranges_sync"):
            with pytest.raises(error):
                store.get_ranges_sync(KEYS[0], [None, PART], prototype=PROTOTYPE)
        source.heal()
        for asked in WANTED:
            value_sync(store, *asked)
    check(store, path, WANTED)


async def test_of_a_read_that_is_cancelled_the_others_who_wait_are_requests(path: Path) -> None:
    source = source_of()
    store = CacheStore(source)
    gate = source.block("get")
    with store.record(path):
        tasks = [asyncio.ensure_future(read(store, KEYS[0])) for _ in range(4)]
        await gate.entered_async()
        await asyncio.sleep(0.01)
        # The one who leads, and one who follows.
        for task in (tasks[0], tasks[2]):
            task.cancel()
        gate.release()
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [value == bytes(100) for value in found] == [False, True, False, True]
    check(store, path, [(KEYS[0], None)] * 2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", READS)
def test_read_of_a_loop_that_ends_is_no_request(
    path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The garbage collector ends it."""
    store = CacheStore(source_of())

    async def never(*_: object, **__: object) -> None:
        await asyncio.get_running_loop().create_future()

    async def begin() -> None:
        asyncio.ensure_future(READS[how](store)).add_done_callback(lambda _: None)
        await asyncio.sleep(0.01)

    with store.record(path):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryStore, "get", never)
            loop = asyncio.new_event_loop()
            loop.run_until_complete(begin())
            assert in_flight(store).flights
            loop.close()
            del loop
            gc.collect()
        for asked in WANTED:
            value_sync(store, *asked)
        # Those who wait for others are kept by what they wait for, until the next read ends that.
        gc.collect()
    check(store, path, WANTED)


async def test_ranges_that_their_caller_leaves_before_the_others_have_come_are_no_requests(
    path: Path,
) -> None:
    source = source_of()
    store = CacheStore(source)
    with store.record(path):
        await read_through(store, KEYS[0], PART)
        found = store.get_ranges(KEYS[0], [PART, None], prototype=PROTOTYPE)
        assert [number for number, _ in await anext(found)] == [0]
        await found.aclose()  # type: ignore[attr-defined]
    check(store, path, [WANTED[0]] * 2)


@pytest.mark.parametrize("is_batch", [False, True])
async def test_hit_that_is_cancelled_is_no_request(
    path: Path, is_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that some have not begun.
    monkeypatch.setattr("zcache._runtime.io.AT_ONCE", 2)
    cache = StoreDouble(MemoryStore())
    store = CacheStore(source_of(), cache_store=cache)
    for key in KEYS:
        await read_through(store, key)
    many: list[tuple[str, ByteRequest | None]] = [(key, None) for key in KEYS]
    with store.record(path):
        cache.hang("get")
        await cancelled(
            store.get_partial_values(PROTOTYPE, many) if is_batch else read(store, KEYS[0])
        )
        cache.heal()
        await read_through(store, KEYS[0])
    with gzip.open(path, "rt") as file:
        assert len(list(file)) == 3
    trace = ask(store, sampled)
    assert (trace.requests, trace.hits.tolist()) == (5, [False] * 4 + [True])


async def test_read_of_what_is_not_cached_offline_is_no_request(path: Path) -> None:
    source, cache = source_of(), MemoryStore()
    store = CacheStore(source, cache_store=cache, source_id="here")
    for asked in WANTED:
        await read_through(store, *asked)
    store = CacheStore(source, cache_store=cache, source_id="here", offline=True)
    with store.record(path):
        for _ in range(3):
            with pytest.raises(OfflineError):
                await read(store, KEYS[3])
            with pytest.raises(OfflineError):
                await store.get_partial_values(PROTOTYPE, [*WANTED, (KEYS[3], None)])
    trace = ask(store, sampled)
    assert trace.requests == 3 + 3 * len(WANTED)
    with gzip.open(path, "rt") as file:
        assert len(list(file)) == 2 + 3 * len(WANTED)


@pytest.mark.parametrize("is_batch", [False, True])
@pytest.mark.parametrize("answers", [0, 1])
async def test_read_that_the_index_does_not_answer_is_a_request(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_batch: bool, answers: int
) -> None:
    """The source serves it: it was not in the sample, and in a recording without its size."""
    store = CacheStore(source_of())
    handle = store._cache.shared.handle
    call = type(handle).call
    asked = []

    async def refuse(self: Any, io: Any, step: Any, *args: Any, **options: Any) -> Any:
        asked.append(step)
        if len(asked) > answers:
            raise IndexLockTimeout("the index does not answer")
        return await call(self, io, step, *args, **options)

    with store.record(path):
        monkeypatch.setattr(store._hits, "get_nowait", lambda *_: (None, BUSY))
        monkeypatch.setattr(type(handle), "call", refuse)
        reader: Any = store._reader
        # As where the index is busy as well when it is asked who reads this.
        monkeypatch.setattr(reader, "_fetch", lambda *asked: reader._share(*asked, None))
        if is_batch:
            await store.get_partial_values(PROTOTYPE, WANTED[1:2])
        else:
            await read(store, *WANTED[1])
        assert len(asked) > answers
        monkeypatch.undo()
    check(store, path, WANTED[1:2])


async def test_replay_of_cancelled_reads_is_what_advise_says(path: Path) -> None:
    source = StoreDouble(MemoryStore({f"a/c/{n}": buf(bytes(100)) for n in range(100)}))
    store = CacheStore(source, max_size=20_000)
    with store.record(path):
        source.hang("get")
        tasks = [asyncio.ensure_future(read(store, f"a/c/{number}")) for number in range(100)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        source.heal()
        for _ in range(2):
            for number in range(100):
                await read_through(store, f"a/c/{number}")
    for advice in (store.advise(), replay(path)):
        assert (advice.requests, advice.hit_ratio) == (200, 0.5)
        assert not advice.unsized_share
