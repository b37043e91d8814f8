"""Has each forked child of the tests that hangs show where; not the children of those. Imported before zcache: it may hang in what zcache does at a fork."""

from __future__ import annotations

import faulthandler
import os
from typing import Final

LONGEST: Final = 120.0
"""Seconds after which a child ends, and shows the stacks of its threads: fewer than one test may take."""
_TESTS: Final = os.getpid()


def _watch() -> None:
    if os.getppid() != _TESTS:
        # The thread that watches its parent is not here, and `faulthandler` would wait for it for good.
        return
    # Not `signal.alarm`: the handler is that of pytest-timeout, and the error that it raises may have the child go on
    # with the tests of its parent, and report on them.
    faulthandler.dump_traceback_later(LONGEST, exit=True, file=2)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch)
