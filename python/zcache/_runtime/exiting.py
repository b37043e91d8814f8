"""Callbacks for the end of the process. A leaf: modules that have something to end register it here."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - what it does at the end comes after what this does
import contextlib
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_callbacks: list[Callable[[bool], object]] = []


def at_exit(callback: Callable[[bool], object]) -> None:
    """Have `callback` run at the end of the process, the last one that is registered first.

    Parameters
    ----------
    callback : callable
        Is called twice: when the main thread has ended, and when all threads have that Python waits for. It is told
        whether that is so.
    """
    if not _callbacks:
        # Event loops cannot start threads any more once `atexit` has its turn.
        with contextlib.suppress(AttributeError, RuntimeError):
            threading._register_atexit(_main_has_ended)  # type: ignore[attr-defined]
        atexit.register(_call_all, True)
    _callbacks.append(callback)


def _call_all(threads_have_ended: bool) -> None:
    # The last one is called first, and what one raises costs no other one.
    with contextlib.ExitStack() as stack:
        for callback in _callbacks:
            stack.callback(callback, threads_have_ended)


def _main_has_ended() -> None:
    _call_all(False)
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None:
        return
    # A worker of multiprocessing ends without `atexit`, once the threads have ended that are there.
    try:
        threading.Thread(target=_await_threads, name="zcache-exit", daemon=False).start()
    except RuntimeError:
        _call_all(True)


def _await_threads() -> None:
    own = threading.current_thread(), threading.main_thread()
    while others := [t for t in threading.enumerate() if not t.daemon and t not in own]:
        for other in others:
            other.join()
    _call_all(True)
