"""What errors keep alive by the frames in their tracebacks."""

from __future__ import annotations

import traceback


def clear_frames(error: BaseException | None, handled: BaseException | None) -> None:
    """Have an error keep nothing in use, such as a pool: a notebook keeps the last one.

    For an ``except`` block. The frame that this is called from stays in the error, and so deletes by itself what it holds.

    Parameters
    ----------
    error : BaseException
        The error.
    handled : BaseException or None
        What the caller was handling before, which is the caller's and stays as it is.
    """
    waiting, seen = [error], {id(handled)}
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        waiting += [one.__context__, one.__cause__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
