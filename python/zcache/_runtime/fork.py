"""Callbacks for a forked child. A leaf: modules that have something to reset register it here."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_callbacks: list[Callable[[], None]] = []


def at_fork(callback: Callable[[], None]) -> None:
    """Have `callback` run in each forked child, in the order of registration.

    Parameters
    ----------
    callback : callable
        Takes nothing and must not raise; if it does, Python shows the error, and all others run. It runs before
        anything else in the child, the garbage collector included, and must not wait for a lock that another thread
        of the parent may have held.
    """
    _callbacks.append(callback)


def _run() -> None:
    errors = []
    is_collecting = gc.isenabled()
    # It would end objects that wait for locks of the parent, or that a callback goes through.
    gc.disable()
    try:
        for callback in _callbacks:
            try:
                callback()
            except BaseException as error:  # noqa: BLE001 - the locks of all others have to be made anew all the same
                errors.append(error)
    finally:
        if is_collecting:
            gc.enable()
    if errors:
        raise BaseExceptionGroup("in a forked child", errors)  # Python shows it, and goes on.


os.register_at_fork(after_in_child=_run)
