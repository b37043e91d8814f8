"""Callbacks for a forked child. A leaf: modules that have something to reset register it here."""

from __future__ import annotations

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
        Takes nothing and must not raise. It runs before anything else in the child, and must not wait
        for a lock that another thread of the parent may have held.
    """
    _callbacks.append(callback)


def _run() -> None:
    for callback in _callbacks:
        callback()


os.register_at_fork(after_in_child=_run)
