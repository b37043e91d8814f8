"""Callbacks for the end of the process. A leaf: modules that have something to end register it here."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - what it does at the end comes after what this does
import contextlib
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def at_exit(callback: Callable[[bool], object]) -> None:
    """Have `callback` run at the end of the process, the last one that is registered first.

    Parameters
    ----------
    callback : callable
        Is called twice: when the main thread has ended, and when all threads have that Python waits for. It is told
        whether nothing comes after that: a worker of multiprocessing ends without `atexit`.
    """
    # Event loops cannot start threads any more once `atexit` has its turn.
    with contextlib.suppress(AttributeError, RuntimeError):
        threading._register_atexit(partial(_call_early, callback))  # type: ignore[attr-defined]
    atexit.register(callback, True)


def _call_early(callback: Callable[[bool], object]) -> None:
    process = sys.modules.get("multiprocessing.process")
    callback(process is not None and process.parent_process() is not None)
