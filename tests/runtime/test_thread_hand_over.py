"""Results of calls in threads, on their way to an event loop, with interrupts and signals in between."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

import pytest

from zcache._runtime import threads
from zcache._runtime.threads import in_thread

LONG = 20.0


async def test_a_wake_up_that_an_interrupt_has_lost_is_made_up_for() -> None:
    loop = asyncio.get_running_loop()
    assert await in_thread(lambda: 1) == 1
    completions = threads._all_completions[loop]
    # The loop was woken, and interrupted before the first line of what it was woken for.
    completions._woken = True
    assert await asyncio.wait_for(in_thread(lambda: 2), LONG) == 2


async def test_an_interrupt_while_results_are_handed_over_loses_none() -> None:
    loop = asyncio.get_running_loop()
    assert await in_thread(lambda: 0) == 0
    completions = threads._all_completions[loop]

    class Interrupted(threads.ThreadCall[int]):
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
        call = threads.ThreadCall(lambda: 1, loop.create_future(), threads._completions(loop))
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
