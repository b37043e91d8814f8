"""What the log says where the volume of a cache directory has no space for values."""

from __future__ import annotations

import contextlib
import logging
import os
from functools import partial

from zcache._core import volume_space
from zcache._runtime.thread_calls import run_in_background

logger = logging.getLogger("zcache")


class SpaceLog:
    """Says once that there is no space, until a value was written again.

    Parameters
    ----------
    root : str
        The directory.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._has_said = False

    def filled(self) -> None:
        """Note that a value was written."""
        self._has_said = False

    def rejected(self, min_free_space: int | None) -> None:
        """Note that one was not, so that so many bytes stay free; None for the default."""
        # No lock, which a forked child might inherit: two threads at once may both say it.
        if self._has_said:
            return
        self._has_said = True
        # A reader takes note of what has ended; it does not wait for the volume.
        with contextlib.suppress(RuntimeError):
            run_in_background(partial(self._say, min_free_space))

    def _say(self, min_free_space: int | None) -> None:
        try:
            free, _, default = volume_space(self._root)
            files = os.statvfs(self._root).f_favail
        except OSError:
            # The next fill fails, and says why.
            return
        logger.warning(
            "the cache directory %s takes nothing in: its volume has %s bytes and %s files left; min_free_space=%s bytes, and "
            "some files, stay free. What is cached is served, the source serves the rest. Free some of the volume, or "
            "pass a smaller min_free_space=.",
            self._root,
            f"{free:,}",
            f"{files:,}",
            f"{default if min_free_space is None else min_free_space:,}",
        )
