"""What goes on without its caller, and what becomes of it when its event loop does not."""

from __future__ import annotations

import asyncio
import gc

from zcache._index.shared_wait import timed_out
from zcache._runtime import coroutines
from zcache._runtime.coroutines import NoAnswerError, OutcomeUnknown, shield_to_completion


def test_work_that_is_collected_with_its_closed_loop_is_reported_and_not_kept() -> None:
    told: list[object] = []
    loop = asyncio.new_event_loop()
    # Asyncio complains of tasks that a loop leaves behind.
    loop.set_exception_handler(lambda *_: None)

    async def begin() -> None:
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        caller = loop.create_task(shield_to_completion(lambda: waiter, told.append))
        while not waiter._callbacks:  # type: ignore[attr-defined]  # noqa: ASYNC110 - it is another's
            await asyncio.sleep(0)
        assert not caller.done()

    loop.run_until_complete(begin())
    loop.close()
    del loop, begin
    gc.collect()
    assert not any(task.get_loop().is_closed() for task in coroutines._unfinished)
    assert [type(outcome) for outcome in told] == [OutcomeUnknown]


def test_time_limit_in_a_text_is_rounded() -> None:
    """A second for each so many bytes made 1.0000000149011612 of it."""
    assert str(NoAnswerError(1 + 1 / 2**26)) == "no answer within 1 s"
    assert str(NoAnswerError(0.02)) == "no answer within 0.02 s"
    assert str(NoAnswerError(1234.5)) == "no answer within 1234.5 s"
    assert " more than 1 s. " in str(timed_out("x", 1 + 1 / 2**26))
