"""What is waited for is told to all who wait, whatever becomes of one of them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from interrupting import Interrupter
from zcache._runtime import threads
from zcache._runtime.io import SyncIO
from zcache._runtime.latch import Latch, Outcome
from zcache._runtime.thread_calls import in_thread_sync, run_in_background
from zcache._runtime.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable

LONG = 30.0


def in_thread(work: Callable[[], object]) -> threading.Thread:
    # What hangs does not keep the process.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ends(work: Callable[[], object]) -> bool:
    """Whether some work in another thread comes to its end."""
    thread = in_thread(work)
    thread.join(LONG)
    return not thread.is_alive()


def test_latch_that_is_set_lets_all_go_on_who_wait() -> None:
    latch, found = Latch(), list[bool]()
    waiting = [in_thread(lambda: found.append(latch.wait(LONG))) for _ in range(3)]
    waiting += [
        in_thread(lambda: found.append(asyncio.run(latch.wait_in_loop(LONG)))) for _ in range(3)
    ]
    while len(latch._waiters) < 6:
        time.sleep(0.001)
    assert not latch.is_set
    latch.set()
    for one in waiting:
        one.join(LONG)
    assert found == [True] * 6
    assert latch.wait()
    assert asyncio.run(latch.wait_in_loop())
    assert not latch._waiters


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.01])
async def test_latch_that_is_not_set_is_waited_for_so_long(seconds: float) -> None:
    latch = Latch()
    assert not latch.wait(seconds)
    assert not await latch.wait_in_loop(seconds)
    assert not latch._waiters
    latch.set()
    assert latch.wait(seconds)
    assert await latch.wait_in_loop(seconds)


def test_latch_calls_back_once() -> None:
    latch, told = Latch(), list[str]()
    latch.call_when_set(lambda: told.append("before"))
    assert told == []
    latch.set()
    latch.call_when_set(lambda: told.append("after"))
    latch.set()
    assert told == ["before", "after"]


async def test_latch_whose_waiter_has_left_with_its_loop_is_set() -> None:
    latch, loop = Latch(), asyncio.new_event_loop()

    async def wait_a_moment() -> None:
        loop.create_task(latch.wait_in_loop())
        await asyncio.sleep(0.01)

    await asyncio.to_thread(loop.run_until_complete, wait_a_moment())
    assert latch._waiters
    loop.close()
    latch.set()
    assert not latch._waiters


def test_outcome_brings_a_result_or_an_error() -> None:
    outcome: Outcome[int] = Outcome()
    with pytest.raises(TimeoutError):
        outcome.result(0.01)
    outcome.succeed(7)
    assert outcome.result() == 7
    outcome = Outcome()
    outcome.fail(OSError("no"))
    with pytest.raises(OSError, match="no"):
        outcome.result()


WAITS: dict[str, Callable[[Outcome[None]], object]] = {
    "wait": lambda outcome: outcome.wait(0.001),
    "result": lambda outcome: outcome.result(0.001),
    "callback": lambda outcome: outcome.call_when_set(print),
    "coroutine": lambda outcome: asyncio.run(outcome.wait_in_loop(0.001)),
}


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("how", WAITS)
def test_wait_that_is_interrupted_anywhere_keeps_no_one_from_setting(how: str) -> None:
    for at in range(1000):
        outcome: Outcome[None] = Outcome()
        waiting = in_thread(outcome.wait)

        def wait(outcome: Outcome[None] = outcome) -> None:
            with contextlib.suppress(TimeoutError):
                WAITS[how](outcome)

        was_interrupted = Interrupter(at).run(wait)
        assert ends(partial(outcome.succeed, None)), at
        waiting.join(LONG)
        assert not waiting.is_alive(), at
        if not was_interrupted:
            break
    else:
        pytest.fail("it never came to its end")
    assert at > 3


def test_latch_whose_setting_is_interrupted_anywhere_is_set_by_the_next() -> None:
    for at in range(1000):
        latch = Latch()
        waiting = [in_thread(latch.wait) for _ in range(3)]
        while len(latch._waiters) < 3:
            time.sleep(0.001)
        was_interrupted = Interrupter(at).run(latch.set)
        latch.set()
        for one in waiting:
            one.join(LONG)
            assert not one.is_alive(), at
        if not was_interrupted:
            break
    else:
        pytest.fail("it never came to its end")
    assert at > 3


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("how", ["background", "sync", "until"])
def test_threads_go_on_after_a_caller_that_is_interrupted_anywhere(how: str, many: int) -> None:
    """It holds nothing that they need, and no call that comes later stays where it is."""
    some, io = Threads(many), SyncIO(None)  # type: ignore[arg-type]

    def wait() -> None:
        outcome = run_in_background(lambda: time.sleep(0.001), some)
        if how == "until":
            io.until(outcome, LONG).send(None)

    def call() -> None:
        if how == "sync":
            in_thread_sync(lambda: time.sleep(0.001), lambda _: None, LONG, threads=some)
            return
        with contextlib.suppress(StopIteration):
            wait()

    assert run_in_background(lambda: 1, some).result(LONG) == 1
    for at in range(1000):
        was_interrupted = Interrupter(at).run(call)
        for _ in range(2 * many):
            # In another thread: what is held may be held by this one.
            assert ends(lambda: run_in_background(lambda: 1, some).result(LONG)), at
        if not was_interrupted:
            break
    else:
        pytest.fail("it never came to its end")
    assert at > 3


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("are_idle", [True, False])
def test_handler_of_a_signal_anywhere_in_a_call_waits_for_one_of_its_own(
    monkeypatch: pytest.MonkeyPatch, are_idle: bool, many: int
) -> None:
    """What it comes upon holds nothing that the threads need; nor does it wait for one that is only about to be started."""
    # Else each call starts a thread.
    monkeypatch.setattr(threads, "_spare", threading.Semaphore(16 if are_idle else 0))
    some = Threads(many)
    for at in range(1000):
        ended: list[bool] = []

        def handle(ended: list[bool] = ended) -> None:
            ended.append(run_in_background(lambda: 1, some).wait(LONG))

        Interrupter(at, handler=handle).run(
            lambda: in_thread_sync(lambda: 1, None, LONG, threads=some)
        )
        if not ended:
            break
        assert ended == [True], at
    else:
        pytest.fail("it never came to its end")
    assert at > 3
