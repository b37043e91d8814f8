"""An interrupt (Ctrl+C) at any step of what a test runs."""

from __future__ import annotations

import concurrent.futures
import gc
import linecache
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zcache

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

PACKAGE = str(Path(zcache.__file__).parent)
WAITS = (threading.__file__, str(Path(concurrent.futures.__file__).parent))
"""Code of Python that holds locks while it waits, which an interrupt may leave held."""


def interrupt() -> None:
    """What the handler of Ctrl+C does."""
    raise KeyboardInterrupt


class Interrupter:
    """Raises KeyboardInterrupt at the n-th call, line or return in the code of zcache, or of Python by which it waits.

    And, if `again` is given, so many calls, lines and returns later once more. Or calls `handler` there, as that of a signal.
    """

    def __init__(
        self,
        after: int,
        again: int | None = None,
        handler: Callable[[], object] | None = None,
    ) -> None:
        self._handler = interrupt if handler is None else handler
        self._left: int | None = after
        self._again = again

    def trace(self, frame: FrameType, event: str, _arg: object) -> Any:
        code = frame.f_code
        # An expression that is left before its end is closed, and that has nowhere to raise.
        if not _is_of_zcache(frame) or code.co_name == "<genexpr>":
            return None
        name, at = frame.f_code.co_filename, frame.f_lineno
        # Not between a lock and the block below it: there the interpreter itself lets no interrupt in.
        locks = any(
            linecache.getline(name, line).lstrip().startswith("with ") for line in (at - 1, at)
        )
        # Python 3.11 goes on with the error of an `except` block if it is interrupted as it returns from there.
        returns = event == "return" and sys.exc_info()[0] is not None
        if self._left is not None and not locks and not returns:
            self._left -= 1
            if self._left < 0:
                self._left, self._again = self._again, None
                self._handler()
        return self.trace

    def run(self, work: Callable[[], object]) -> bool:
        """Whether the work was interrupted."""
        before = sys.gettrace()
        # What the garbage collector runs has nowhere to raise.
        gc.disable()
        sys.settrace(self.trace)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            gc.enable()
        return False


def _is_of_zcache(frame: FrameType) -> bool:
    name, caller = frame.f_code.co_filename, frame.f_back
    is_waiting = name.startswith(WAITS) and caller is not None and caller.f_trace is not None
    return is_waiting or name.startswith(PACKAGE)
