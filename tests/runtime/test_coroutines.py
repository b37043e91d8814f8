"""What goes on without its caller, and what becomes of it when its event loop does not."""

from __future__ import annotations

import asyncio
import gc

from zcache._runtime import coroutines
from zcache._runtime.coroutines import OutcomeUnknown, shield_to_completion


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
