"""The lock of the index of a cache directory."""

from __future__ import annotations

import os

from zcache._core import HeldLock


def hold_index_lock(directory: os.PathLike[str] | str) -> HeldLock:
    """Hold the lock of the index of a cache directory, or of a pool, as a process that is stopped in a step.

    Parameters
    ----------
    directory : path
        The cache directory. It has an index already.

    Returns
    -------
    HeldLock
        A context manager that releases the lock at its end; its method `release` does so before, and says whether
        the lock was still held.

    Raises
    ------
    IndexBusyError
        If others hold it for a second.
    """
    return HeldLock(os.path.join(directory, ".zcache", "index"))
