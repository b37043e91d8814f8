"""Work in threads on behalf of coroutines: its outcome is never lost, even if its caller has gone."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import gc
import multiprocessing
import sys
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from support import until
from zcache._runtime import thread_calls, threads
from zcache._runtime.thread_calls import in_thread, in_thread_sync, run_in_background
from zcache._runtime.threads import THREADS, Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zcache._runtime.latch import Outcome

LONG = 30.0


def never(_: object) -> None:
    raise AssertionError("its caller waits for this")


async def test_in_thread_of_many_returns_each_result() -> None:
    found = await asyncio.gather(*(in_thread(lambda n=n: n * n, never) for n in range(500)))
    assert found == [n * n for n in range(500)]


async def test_in_thread_of_a_failure_raises_it() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await in_thread(fail, never)
    assert await in_thread(lambda: 1, never) == 1


@pytest.mark.parametrize("fails", [False, True])
async def test_in_thread_of_a_cancelled_caller_reports_its_outcome(fails: bool) -> None:
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


async def test_in_thread_cancelled_when_it_is_done_reports_once() -> None:
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


def refuse(_: object) -> None:
    raise OSError(5, "the index is gone")


@pytest.mark.parametrize("is_over", [False, True])
async def test_report_of_a_detached_outcome_that_fails_is_logged(
    is_over: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    call = thread_calls.ThreadCall(lambda: 7, loop.create_future(), thread_calls._completions(loop))
    if is_over:
        call.run()
        # It must not take the place of the cancellation that brings it here.
        call.detach(refuse)
    else:
        call.detach(refuse)
        call.run()
    assert "the index is gone" in caplog.text


async def test_in_thread_with_a_timeout_raises_and_reports_later() -> None:
    go, told = threading.Event(), threading.Event()
    outcomes: list[object] = []

    def late(outcome: object) -> None:
        outcomes.append(outcome)
        told.set()

    with pytest.raises(TimeoutError):
        await in_thread(lambda: go.wait(LONG), late, timeout=0.01)
    assert outcomes == []
    go.set()
    assert await asyncio.to_thread(told.wait, LONG)
    assert outcomes == [True]


@pytest.mark.parametrize("fails", [False, True])
def test_in_thread_sync_with_a_timeout_raises_and_reports_later(fails: bool) -> None:
    go, told = threading.Event(), threading.Event()
    outcomes: list[object] = []

    def work() -> int:
        assert go.wait(LONG)
        if fails:
            raise OSError(5, "Input/output error")
        return 7

    def late(outcome: object) -> None:
        outcomes.append(outcome)
        told.set()

    with pytest.raises(TimeoutError):
        in_thread_sync(work, late, timeout=0.01)
    go.set()
    assert told.wait(LONG)
    (outcome,) = outcomes
    assert isinstance(outcome, OSError) if fails else outcome == 7
    assert in_thread_sync(lambda: 1) == 1


async def test_threads_that_hang_are_no_threads_of_the_event_loop() -> None:
    go = threading.Event()
    stuck = [asyncio.ensure_future(in_thread(lambda: go.wait(LONG))) for _ in range(3 * THREADS)]
    await asyncio.sleep(0.01)
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), LONG) == 1
    go.set()
    assert await asyncio.gather(*stuck) == [True] * 3 * THREADS


def test_in_thread_of_a_closed_loop_reports_its_outcome() -> None:
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


@pytest.mark.parametrize("limit", [None, 60.0])
async def test_in_thread_cancelled_as_the_result_arrives_reports_it(limit: float | None) -> None:
    """The result is back in the event loop, and the cancellation comes before the caller's turn."""
    loop = asyncio.get_running_loop()
    begin, told = threading.Event(), list[object]()
    task = asyncio.create_task(in_thread(lambda: begin.wait(60) and "result", told.append, limit))
    await asyncio.sleep(0.01)
    begin.set()
    # The thread ends while the event loop is held up, so that it finds both in one turn.
    time.sleep(0.05)  # noqa: ASYNC251
    loop.call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == ["result"]


async def test_in_thread_error_awaited_is_raised_once_and_not_reported() -> None:
    told: list[object] = []

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await in_thread(fail, told.append)
    await asyncio.sleep(0.01)
    assert told == []


async def test_in_thread_error_after_the_time_is_no_complaint_of_the_event_loop() -> None:
    begin, complaints = threading.Event(), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    def fail() -> None:
        assert begin.wait(60)
        raise OSError("no")

    told: list[object] = []
    with pytest.raises(TimeoutError):
        await in_thread(fail, told.append, 0.01)
    with pytest.raises(TimeoutError):
        await in_thread(fail, None, 0.01)
    begin.set()
    while not told:  # noqa: ASYNC110 - a thread brings it
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    gc.collect()
    assert [type(error) for error in told] == [OSError]
    assert complaints == []


def test_in_thread_sync_error_awaited_is_raised_once_and_not_reported() -> None:
    told: list[object] = []

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        in_thread_sync(fail, told.append, 60)
    assert told == []


class Work:
    """What a call is made of."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def __call__(self) -> int:
        if self.fails:
            raise OSError(5, "Input/output error")
        return 1


def gone_when_done(work: Callable[[], int]) -> tuple[Callable[..., None], list[bool]]:
    """To be called where a call is done; says whether what it was made of is gone by then."""
    reference, seen = weakref.ref(work), []
    return lambda *_: seen.append(reference() is None), seen


def test_run_in_background_keeps_nothing_of_what_is_done() -> None:
    """A store that its user drops then is gone at once, not when the thread has its next turn."""
    begun = threading.Event()
    gate = run_in_background(lambda: begun.wait(LONG))
    work = Work()
    look, seen = gone_when_done(work)
    others = [run_in_background(lambda: begun.wait(LONG)) for _ in range(THREADS - 1)]
    outcome = run_in_background(work)
    outcome.call_when_set(look)
    del work
    begun.set()
    assert outcome.result(LONG) == 1
    assert gate.result(LONG)
    assert all(other.result(LONG) for other in others)
    assert seen == [True]


@pytest.mark.parametrize("fails", [False, True])
async def test_in_thread_keeps_nothing_of_what_is_done(fails: bool) -> None:
    work = Work(fails=fails)
    look, seen = gone_when_done(work)
    loop = asyncio.get_running_loop()
    completions = thread_calls._completions(loop)
    completions.add = look  # type: ignore[method-assign]
    call: thread_calls.ThreadCall[int] = thread_calls.ThreadCall(
        work, loop.create_future(), completions
    )
    del work
    thread = threading.Thread(target=call.run)
    thread.start()
    thread.join()
    # The traceback of an error has its frames.
    assert seen == [not fails]
    call.future.cancel()


class Held:
    """What a frame of some work holds, such as the buffer of a value."""


def fail_holding(seen: list[weakref.ref[Held]]) -> None:
    held = Held()
    seen.append(weakref.ref(held))
    raise OSError(5, "Input/output error")


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Only what nothing refers to ends."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def goes(seen: list[weakref.ref[Held]]) -> None:
    """Wait until it has gone: the thread, or the event loop, tells of the error before it is done with it."""
    await until(lambda: seen[0]() is None)


WAYS: dict[str, Callable[[Callable[[], None]], object]] = {
    "background": lambda work: run_in_background(work).result(LONG),
    "sync": lambda work: in_thread_sync(work, None, LONG),
    "sync with progress": lambda work: in_thread_sync(work, never, LONG, lambda: 1),
}


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("way", WAYS)
def test_error_of_work_that_was_dropped_keeps_nothing_of_it(way: str) -> None:
    seen: list[weakref.ref[Held]] = []
    with contextlib.suppress(OSError):
        WAYS[way](partial(fail_holding, seen))
    asyncio.run(goes(seen))


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("limit", [None, LONG])
async def test_error_of_work_for_a_coroutine_that_was_dropped_keeps_nothing_of_it(
    limit: float | None,
) -> None:
    seen: list[weakref.ref[Held]] = []
    with contextlib.suppress(OSError):
        await in_thread(partial(fail_holding, seen), never, limit)
    await goes(seen)


def begun(some: Threads, count: int) -> tuple[threading.Event, list[Outcome[bool]]]:
    """So many calls that are under way until the event."""
    go, at_work = threading.Event(), threading.Semaphore(0)

    def work() -> bool:
        at_work.release()
        return go.wait(LONG)

    calls = [run_in_background(work, some) for _ in range(count)]
    assert all(at_work.acquire(timeout=LONG) for _ in calls)
    return go, calls


async def test_call_that_has_not_begun_at_its_timeout_never_does() -> None:
    some = Threads(1)
    go, calls = begun(some, 1)
    ran: list[str] = []
    with pytest.raises(TimeoutError):
        await in_thread(lambda: ran.append("read"), None, 0.01, threads=some)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(
            in_thread_sync, lambda: ran.append("read"), None, 0.01, threads=some
        )
    # Of this one the end is to be known.
    with pytest.raises(TimeoutError):
        await in_thread(lambda: ran.append("delete"), lambda _: None, 0.01, threads=some)
    go.set()
    await in_thread(lambda: ran.append("last"), threads=some)
    assert calls[0].result(LONG)
    assert ran == ["delete", "last"]


async def test_threads_are_behind_with_works_that_wait_without_a_caller() -> None:
    some, go = Threads(1), threading.Event()
    run_in_background(partial(go.wait, LONG), some)
    await until(lambda: not some._calls)
    # A call that was left is a work of another kind.
    with pytest.raises(TimeoutError):
        in_thread_sync(lambda: 1, lambda _: None, 0, threads=some)
    assert not some.are_behind(1)
    outcome = run_in_background(lambda: 2, some)
    assert some.are_behind(1)
    waiter = asyncio.create_task(outcome.wait_in_loop())
    await asyncio.sleep(0)
    assert not some.are_behind(1)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert some.are_behind(1)
    work = some._calls[-1].take()
    assert work is not None
    assert not some.are_behind(1)
    go.set()


async def test_threads_of_one_place_that_hang_stop_no_other() -> None:
    hang, other = Threads(2), Threads(2)
    go, calls = begun(hang, 2)
    with pytest.raises(TimeoutError):
        await in_thread(lambda: 1, None, 0.01, threads=hang)
    assert await asyncio.wait_for(in_thread(lambda: 1, threads=other), LONG) == 1
    assert await asyncio.wait_for(in_thread(lambda: 1), LONG) == 1
    go.set()
    assert all(call.result(LONG) for call in calls)


def test_work_in_the_background_waits_for_calls_however_much_there_is() -> None:
    some, together = Threads(1), threading.Barrier(2 * THREADS)

    def work() -> int:
        together.wait(LONG)
        return in_thread_sync(lambda: 1, None, LONG, threads=some)

    works = [run_in_background(work) for _ in range(2 * THREADS)]
    assert [one.result(LONG) for one in works] == [1] * 2 * THREADS


async def test_threads_end_that_have_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE", 0.01)
    some = Threads(3)
    go, calls = begun(some, 3)
    lives = [life() for life in some._lives.values()]
    assert len(lives) == 3
    assert None not in lives
    del lives
    go.set()
    assert all(call.result(LONG) for call in calls)
    await until(lambda: not some._lives)
    # And others come.
    assert await in_thread(lambda: 1, threads=some) == 1


def dying(monkeypatch: pytest.MonkeyPatch, count: int) -> list[None]:
    """Have so many of the next threads die before their first line, as they do for want of memory."""
    start, died = _thread.start_new_thread, list[None]()

    def die(*_: object) -> None:
        pass

    def start_dying(run: Callable[..., object], args: tuple[Any, ...]) -> int:
        if len(died) < count:
            died.append(None)
            run = die
        return start(run, args)

    monkeypatch.setattr(_thread, "start_new_thread", start_dying)
    return died


def test_call_of_a_thread_that_died_at_its_start_is_run_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died = dying(monkeypatch, 1)
    assert run_in_background(lambda: 1, Threads(1)).result(LONG) == 1
    assert died


def test_threads_that_died_at_their_start_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    died = dying(monkeypatch, 2)
    some = Threads(1)
    first = run_in_background(lambda: 1, some)
    while len(died) < 2 or any(life() for life in some._lives.copy().values()):
        time.sleep(0.001)
    assert run_in_background(lambda: 2, some).result(LONG) == 2
    assert first.result(LONG) == 1


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that end as soon as they have nothing to do, and take turns after each few steps."""
    monkeypatch.setattr(threads, "_spare", threading.Semaphore(0))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize(("most", "hanging"), [(1, 0), (THREADS, THREADS - 1)])
def test_calls_that_come_as_the_last_thread_ends_are_run(most: int, hanging: int) -> None:
    some, together = Threads(most), threading.Barrier(3)
    go, calls = begun(some, hanging)

    def submit() -> int:
        done = 0
        for turn in range(4000):
            together.wait(LONG)
            for _ in range(turn % 200):
                pass
            done += run_in_background(lambda: 1, some).result(LONG)
        return done

    submitting = [run_in_background(submit, Threads(1)) for _ in range(3)]
    assert [one.result(2 * LONG) for one in submitting] == [4000] * 3
    go.set()
    assert all(call.result(LONG) for call in calls)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("most", [1, THREADS])
def test_call_that_comes_as_a_thread_ends_is_run_where_none_can_be_started(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, go_on = threading.Event(), threading.Event()

    class Ending(Threads):
        def _leave(self, own: Any) -> bool:
            if threading.current_thread() is not threading.main_thread():
                ending.set()
                go_on.wait(LONG)
            return super()._leave(own)

    some = Ending(most)
    assert run_in_background(lambda: 1, some).result(LONG) == 1
    assert ending.wait(LONG)

    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", start)
    second = run_in_background(lambda: 2, some)
    go_on.set()
    assert second.result(LONG) == 2


def test_forked_child_has_threads_of_its_own() -> None:
    some = Threads(1)
    go, calls = begun(some, 1)
    waiting = run_in_background(lambda: 1, some)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process: Any = context.Process(
        target=lambda: theirs.send(in_thread_sync(lambda: 2, None, LONG, threads=some))
    )
    process.start()
    assert ours.poll(LONG)
    assert ours.recv() == 2
    process.join(LONG)
    go.set()
    assert calls[0].result(LONG)
    assert waiting.result(LONG) == 1


def test_call_that_ends_after_its_loop_was_closed_does_not_keep_it() -> None:
    loop = asyncio.new_event_loop()
    call = thread_calls.ThreadCall(lambda: 1, loop.create_future(), thread_calls._completions(loop))
    reference = weakref.ref(loop)
    loop.close()
    call.run()
    del loop, call
    gc.collect()
    assert reference() is None
