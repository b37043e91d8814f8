"""Work in threads on behalf of coroutines: nobody misses what came of it, whoever has left."""

from __future__ import annotations

import asyncio
import threading

import pytest

from zcache._threads import in_thread

LONG = 30.0


def never(_: object) -> None:
    raise AssertionError("somebody awaited this")


async def test_many_come_back() -> None:
    found = await asyncio.gather(*(in_thread(lambda n=n: n * n, never) for n in range(500)))
    assert found == [n * n for n in range(500)]


async def test_errors_come_back() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await in_thread(fail, never)
    assert await in_thread(lambda: 1, never) == 1


@pytest.mark.parametrize("fails", [False, True])
async def test_whoever_leaves_is_told_later(fails: bool) -> None:
    begun, go, told = threading.Event(), threading.Event(), threading.Event()
    outcomes: list[object] = []

    def work() -> int:
        begun.set()
        assert go.wait(LONG)
        if fails:
            raise OSError(5, "Input/output error")
        return 7

    def late(outcome: object) -> None:
        outcomes.append(outcome)
        told.set()

    task = asyncio.ensure_future(in_thread(work, late))
    assert await asyncio.to_thread(begun.wait, LONG)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert outcomes == []
    go.set()
    assert told.wait(LONG)
    (outcome,) = outcomes
    assert isinstance(outcome, OSError) if fails else outcome == 7


async def test_a_cancellation_that_meets_the_result() -> None:
    """The work is over, but its coroutine has not gone on yet when it is cancelled."""
    done = threading.Event()
    outcomes: list[object] = []

    def work() -> int:
        done.set()
        return 7

    task = asyncio.ensure_future(in_thread(work, outcomes.append))
    await asyncio.sleep(0)
    assert done.wait(LONG)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # In the thread or here, but once.
    for _ in range(1000):
        if outcomes:
            break
        await asyncio.sleep(0.001)
    assert outcomes == [7]


def test_a_loop_that_is_closed() -> None:
    begun, go, told = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go.wait(LONG)

    async def leave() -> None:
        task = asyncio.ensure_future(in_thread(work, lambda _: told.set()))
        assert await asyncio.to_thread(begun.wait, LONG)
        assert not task.done()

    # It cancels what it leaves behind.
    asyncio.run(leave())
    go.set()
    assert told.wait(LONG)
    # A loop of a later day, and several at once.
    assert asyncio.run(in_thread(lambda: 1, never)) == 1
    results: list[int] = []
    threads = [
        threading.Thread(
            target=lambda n=n: results.append(asyncio.run(in_thread(lambda: n, never)))
        )
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(8))
