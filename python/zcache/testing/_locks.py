"""The lock of the index of a cache directory."""

from __future__ import annotations

import os

from zcache._core import HeldLock, IndexBusyError
from zcache._options import path_of_cache_store
from zcache.exceptions import IndexLockTimeout, OptionValueError


def hold_index_lock(directory: os.PathLike[str] | str) -> HeldLock:
    """Hold the lock of the index of a cache directory or pool, as a process that was stopped in a step does.

    Parameters
    ----------
    directory : path
        The cache directory, which a store or pool has opened before.

    Returns
    -------
    context manager
        It releases the lock at its end. Its method `release` releases it earlier, and returns whether it was still
        held.

    Raises
    ------
    IndexLockTimeout
        A `TimeoutError`: others hold it for a second.
    OptionTypeError, OptionValueError
        It is no path, or there is no index.
    """
    root = path_of_cache_store(directory, "directory")
    try:
        return HeldLock(os.path.join(root, ".zcache", "index"))
    except IndexBusyError as error:
        raise IndexLockTimeout(f"the lock of the index of {root!r} is held") from error
    except FileNotFoundError as error:
        raise OptionValueError(
            f"invalid directory: {root!r} has no index. Give a directory that a store or pool has opened."
        ) from error
