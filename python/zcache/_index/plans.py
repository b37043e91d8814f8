"""What will be read, as the program has said: told to the index, and what became of it, to the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from zcache._core import Index, Plan
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zcache._index.calls import Handle

logger = logging.getLogger("zcache")


def follow(handle: Handle, keys: Iterable[str]) -> int:
    """Have the index keep what is read soonest; see `CacheStore.will_read`. Returns the keys of the plan."""
    plan = Plan(keys)
    try:
        cursor: tuple[int, int] | None = handle.call_blocking(Index.set_plan, plan)
        handle.plan, handle.follows_plan = plan, len(plan) != 0
        # In steps, so that no one waits for long. What comes in meanwhile is told by itself.
        while handle.follows_plan and cursor is not None:
            cursor = handle.call_blocking(Index.match_plan, cursor)
    except IndexLockTimeout as error:
        # A hint is no reason for an error.
        logger.debug("%s: will_read() had no effect: %s", handle.name, error)
        return 0
    return len(plan)


def look(handle: Handle) -> None:
    """Tell the log once if the plan was wrong."""
    state = None if handle.plan is None else handle.plan.state
    if state == "followed":
        return
    handle.follows_plan = False
    if state == "wrong":
        logger.debug(
            "%s: the reads were not those that will_read() was told, so its plan is dropped",
            handle.name,
        )
