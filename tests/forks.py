"""Children that tests fork. None goes on with the test of its parent."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def fork(work: Callable[[], object]) -> int:
    """Do something in a forked child, which fails if that raises. The number of the child."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the parent sees the exit code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(children: Iterable[int]) -> list[int]:
    """Exit codes; negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children]


def run(work: Callable[[], object]) -> int:
    """Do something in a forked child, and wait for its end."""
    return wait([fork(work)])[0]
