"""Two threads that meet at every step of the code of one of them."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

LONG = 120.0


class NoticedLock:
    """A reentrant lock that says when somebody has to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.awaited = threading.Event()

    def acquire(self, blocking: bool = True) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        if not blocking:
            return False
        self.awaited.set()
        return self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def meet(
    work: Callable[[], object],
    other: Callable[[], object],
    lock: NoticedLock,
    *,
    at: int,
    inside: Collection[str],
) -> bool:
    """Do `work`; at one step of these functions another thread does the other, as far as the lock lets it.

    Returns
    -------
    bool
        Whether there are so many steps.
    """
    left = at
    errors: list[BaseException] = []

    def do_other() -> None:
        try:
            other()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)
        lock.awaited.set()

    thread = threading.Thread(target=do_other)

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_name in inside:
            frame.f_trace_opcodes = True
            left -= event == "opcode"
            if left < 0 and thread.ident is None:
                thread.start()
                assert lock.awaited.wait(LONG)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    if thread.ident is not None:
        thread.join()
    assert not errors, errors
    return left < 0
