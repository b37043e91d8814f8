"""The lock of the index of a cache directory."""

from __future__ import annotations

import os

from zcache._core import HeldLock, IndexBusyError
from zcache.exceptions import IndexLockTimeout


def hold_index_lock(directory: os.PathLike[str] | str) -> HeldLock:
    """Hold the lock of the index of a cache directory or pool, as a process that was stopped in a step does.

    Parameters
    ----------
    directory : path
        The cache directory. It has an index already.

    Returns
    -------
    context manager
        It releases the lock at its end. Its method `release` releases it earlier, and returns whether it was still
        held.

    Raises
    ------
    IndexLockTimeout
        A `TimeoutError`: others hold it for a second.
    """
    try:
        return HeldLock(os.path.join(directory, ".zcache", "index"))
    except IndexBusyError as error:
        raise IndexLockTimeout(
            f"the lock of the index of {os.fspath(directory)!r} is held"
        ) from error
