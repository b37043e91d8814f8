"""Calls on their way to a thread, and their results on the way back, with interrupts and signals in between."""

from __future__ import annotations

import _thread
import asyncio
import itertools
import signal
import sys
import threading
import time
from functools import partial
from typing import Any

import pytest

from interrupting import Interrupter
from support import until
from zcache._runtime import thread_calls
from zcache._runtime.thread_calls import in_thread, in_thread_sync, run_in_background
from zcache._runtime.threads import Threads

LONG = 20.0


async def test_call_that_an_interrupt_meets_anywhere_ends_with_a_report_or_never_begins() -> None:
    has_begun = False
    for at in itertools.count():
        some, ran, told = Threads(1), list[None](), list[object]()
        work = partial(ran.append, None)
        call = partial(in_thread_sync, work, told.append, LONG, threads=some)
        if not Interrupter(at).run(call):
            break
        # What has begun has ended now: there is one thread.
        assert in_thread_sync(lambda: 1, None, LONG, threads=some) == 1
        begun, left = len(ran), len(told)
        has_begun = has_begun or bool(begun)
        assert in_thread_sync(lambda: 1, None, LONG, threads=some) == 1
        assert len(ran) == begun, at
        # Before it is handed over, and after its end was told, there is nothing to tell.
        assert left <= 1, at
    assert at > 50
    assert has_begun


@pytest.mark.parametrize("is_kept", [False, True])
def test_call_that_is_interrupted_as_it_is_handed_over_is_told_of(is_kept: bool) -> None:
    class Interrupted(Threads):
        def submit(self, call: Any) -> None:
            if is_kept:
                self._calls.append(call)
            raise KeyboardInterrupt

    some, ran, told = Interrupted(1), list[None](), list[object]()
    with pytest.raises(KeyboardInterrupt) as interrupt:
        in_thread_sync(lambda: ran.append(None), told.append, LONG, threads=some)
    assert told == [interrupt.value]
    some._start(starts_again=True)
    assert run_in_background(lambda: 1, Threads(1)).result(LONG) == 1
    assert not some._calls
    assert ran == []


async def test_call_of_a_coroutine_that_is_interrupted_as_it_is_handed_over_is_told_of() -> None:
    class Interrupted(Threads):
        def submit(self, call: Any) -> None:
            super().submit(call)
            raise asyncio.CancelledError

    some, told = Interrupted(1), list[object]()
    with pytest.raises(asyncio.CancelledError):
        await in_thread(lambda: 7, told.append, LONG, threads=some)
    await until(lambda: bool(told))
    # It may have begun.
    assert len(told) == 1
    assert told[0] == 7 or isinstance(told[0], asyncio.CancelledError)


def test_error_of_an_interrupt_that_is_kept_keeps_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook keeps the last one."""
    start, started = _thread.start_new_thread, list[None]()

    def count(*args: Any) -> int:
        started.append(None)
        return start(*args)

    monkeypatch.setattr(_thread, "start_new_thread", count)
    for at in itertools.count():
        some, kept = Threads(1), list[BaseException]()
        before, interrupter = sys.gettrace(), Interrupter(at)
        sys.settrace(interrupter.trace)
        try:
            in_thread_sync(lambda: 1, None, LONG, threads=some)
        except KeyboardInterrupt as error:
            kept.append(error)
        finally:
            sys.settrace(before)
        assert in_thread_sync(lambda: 2, None, LONG, threads=some) == 2, at
        # One that was started is on its way until its first line.
        while some._is_starting():
            time.sleep(0.001)
        started.clear()
        go = threading.Event()
        waiting = [run_in_background(partial(go.wait, LONG), some) for _ in range(5)]
        go.set()
        assert all(one.result(LONG) for one in waiting)
        # Nor does it lift the bound.
        assert len(started) <= 1, at
        if not kept:
            break
    assert at > 50


async def test_work_that_raises_stop_iteration_has_failed() -> None:
    """No future takes it: its event loop would try again for ever."""
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(in_thread(lambda: next(iter(()))), LONG)
    assert await asyncio.wait_for(in_thread(lambda: 1), LONG) == 1


async def test_result_that_cannot_be_delivered_holds_up_no_other() -> None:
    loop, complaints = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda _, context: complaints.append(context["exception"]))
    assert await in_thread(lambda: 0) == 0

    class Broken(thread_calls.ThreadCall[int]):
        def deliver(self) -> None:
            if not self.future.done():
                raise ValueError("broken")

    call = Broken(lambda: 5, loop.create_future(), thread_calls._all_completions[loop])
    await asyncio.to_thread(call.run)
    assert await asyncio.wait_for(in_thread(lambda: 1), LONG) == 1
    assert call.future.cancelled()
    assert [str(error) for error in complaints] == ["broken"]


async def test_a_wake_up_that_an_interrupt_has_lost_is_made_up_for() -> None:
    loop = asyncio.get_running_loop()
    assert await in_thread(lambda: 1) == 1
    completions = thread_calls._all_completions[loop]
    # The loop was woken, and interrupted before the first line of what it was woken for.
    completions._woken = True
    assert await asyncio.wait_for(in_thread(lambda: 2), LONG) == 2


async def test_an_interrupt_while_results_are_handed_over_loses_none() -> None:
    loop = asyncio.get_running_loop()
    assert await in_thread(lambda: 0) == 0
    completions = thread_calls._all_completions[loop]

    class Interrupted(thread_calls.ThreadCall[int]):
        times = 1

        @property
        def error(self) -> Any:  # type: ignore[override]
            if self.times:
                self.times -= 1
                raise KeyboardInterrupt
            return None

        @error.setter
        def error(self, error: Any) -> None:
            pass

    call = Interrupted(lambda: 5, loop.create_future(), completions)
    call.result = 5
    completions._done.append(call)
    with pytest.raises(KeyboardInterrupt):
        completions._collect()
    assert await asyncio.wait_for(call.future, LONG) == 5


def test_a_signal_handler_may_come_in_while_a_result_is_taken() -> None:
    """Its lock is reentrant: the handler reads as well, in the same thread."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        call = thread_calls.ThreadCall(
            lambda: 1, loop.create_future(), thread_calls._completions(loop)
        )
        entered = threading.Event()

        def handler(*_: object) -> None:
            call.detach(lambda _: None)
            entered.set()

        before = signal.signal(signal.SIGALRM, handler)
        try:
            with call._lock:
                signal.raise_signal(signal.SIGALRM)
                assert entered.is_set()
        finally:
            signal.signal(signal.SIGALRM, before)
        call.run()

    thread = threading.Timer(LONG, signal.raise_signal, (signal.SIGABRT,))
    thread.daemon = True
    thread.start()
    asyncio.run(main())
    thread.cancel()
