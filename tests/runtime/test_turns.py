"""Work that ten thousand tasks begin at once is spread over turns of the event loop."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import TYPE_CHECKING

import pytest
from zarr.storage import LocalStore

from doubles import SyncDictStore
from support import PROTOTYPE
from zcache import CacheStore
from zcache._runtime import turns
from zcache._runtime.turns import BUDGET, FEWEST, ReadTurns, Turns

if TYPE_CHECKING:
    from pathlib import Path


def work() -> None:
    """As long as ten pieces have together in one turn."""
    until = time.perf_counter() + BUDGET / 10
    while time.perf_counter() < until:
        pass


async def test_others_have_their_turn_in_between() -> None:
    turns = Turns()
    done = 0
    seen: list[int] = []

    async def piece() -> None:
        nonlocal done
        if not turns.begins():
            await turns.wait()
        work()
        done += 1

    async def watch() -> None:
        while done < 300:
            seen.append(done)
            await asyncio.sleep(0)

    await asyncio.gather(watch(), *(piece() for _ in range(300)))
    assert done == 300
    # None of the turns had a large part of them.
    assert max(b - a for a, b in zip(seen, [*seen[1:], done], strict=True)) < 150


async def test_they_begin_in_their_order() -> None:
    turns = Turns()
    order: list[int] = []

    async def piece(number: int) -> None:
        if not turns.begins():
            await turns.wait()
        work()
        order.append(number)

    await asyncio.gather(*(piece(number) for number in range(100)))
    assert order == list(range(100))


async def test_a_cancelled_waiter_holds_nobody_up() -> None:
    turns = Turns()
    done: list[int] = []

    async def piece(number: int) -> None:
        if not turns.begins():
            await turns.wait()
        work()
        done.append(number)

    tasks = [asyncio.ensure_future(piece(number)) for number in range(100)]
    await asyncio.sleep(0)
    assert len(done) < 100
    for task in tasks[-90::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
    assert len(done) == 100 - cancelled
    assert cancelled > 0


def test_a_loop_that_ended_leaves_nothing_behind() -> None:
    turns = Turns()

    async def begin_and_leave() -> None:
        for _ in range(3 * FEWEST):
            if turns.begins():
                work()
            else:
                task = asyncio.ensure_future(turns.wait())
                await asyncio.sleep(0)
                task.cancel()
                break

    asyncio.run(begin_and_leave())

    async def begin() -> bool:
        return turns.begins()

    assert asyncio.run(begin()) is True


def test_a_thread_without_a_loop_never_waits() -> None:
    turns = Turns()
    assert all(turns.begins() for _ in range(10))
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


@pytest.mark.parametrize("kind", ["directory", "store"])
async def test_synchronous_read_inside_an_event_loop_waits_for_no_turn(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "BUDGET", -1.0)  # No turn is young.
    source = SyncDictStore({f"{n}": b"value" for n in range(50)})
    cache = LocalStore(tmp_path / "cache") if kind == "directory" else SyncDictStore()
    store = CacheStore(source, cache_store=cache, max_size=100, source_id="source")
    if not store._supports_sync_io:
        pytest.skip("zarr before 3.4 has no synchronous local store")
    for key in source.values:
        value = store.get_sync(key)
        assert value is not None
        assert value.to_bytes() == b"value"
    values = await asyncio.gather(*(store.get(key, PROTOTYPE) for key in source.values))
    assert all(value is not None and value.to_bytes() == b"value" for value in values)


def test_a_loop_that_goes_on_after_another_had_its_turn_lets_in_all_who_wait() -> None:
    """One is kept, as by a test session, and another one comes for each call."""
    turns = Turns()
    done: list[int] = []

    async def piece(number: int) -> None:
        if not turns.begins():
            await turns.wait()
        work()
        done.append(number)

    async def begin() -> list[asyncio.Task[None]]:
        tasks = [asyncio.ensure_future(piece(number)) for number in range(100)]
        await asyncio.sleep(0)
        return tasks

    kept, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        tasks = kept.run_until_complete(begin())
        assert len(done) < 100
        other.run_until_complete(piece(-1))
        kept.run_until_complete(asyncio.wait_for(asyncio.gather(*tasks), 30))
        done.remove(-1)
        assert done == list(range(100))
    finally:
        kept.close()
        other.close()


def test_reads_of_a_loop_go_on_after_another_had_its_turn() -> None:
    reads = ReadTurns(10)

    async def read() -> None:
        if not reads.begins(8):
            await reads.wait(8)

    async def begin() -> list[asyncio.Task[None]]:
        tasks = [asyncio.ensure_future(read()) for _ in range(4)]
        await asyncio.sleep(0)
        return tasks

    kept, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        tasks = kept.run_until_complete(begin())
        other.run_until_complete(read())
        kept.run_until_complete(asyncio.wait_for(asyncio.gather(*tasks), 30))
    finally:
        kept.close()
        other.close()


def test_a_loop_that_was_closed_is_not_kept_by_those_who_wait() -> None:
    turns = Turns()
    loop = asyncio.new_event_loop()

    async def leave() -> None:
        for _ in range(3 * FEWEST):
            turns.begins()
            work()
        task = asyncio.ensure_future(turns.wait())
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()

    loop.run_until_complete(leave())
    reference = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert reference() is None
