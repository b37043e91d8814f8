"""Writes of a cache store that were cut off, and may still take effect."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from zcache._backends.base import WRITE_TIMEOUT
from zcache._core import Index

if TYPE_CHECKING:
    from zcache._backends.base import Backend
    from zcache._core import Reservation

logger = logging.getLogger("zcache")


class UnknownWrites:
    """Writes that were cut off with their event loops: until each lands, if ever, it has its room.

    Nothing tells when that is, so after `WRITE_TIMEOUT` each counts as one that has failed: what has landed is deleted, and
    until then nothing else is written in its place.
    """

    def __init__(self) -> None:
        self._writes: deque[tuple[float, Backend, Reservation]] = deque()
        self._is_said = False

    def add(self, backend: Backend, reservation: Reservation) -> None:
        """Note one, and count it; the log hears of the first."""
        self._writes.append((backend.breaker.clock(), backend, reservation))
        backend.counters.count("skipped")
        if not self._is_said:
            self._is_said = True
            logger.warning(
                "a value on its way into the cache store %s was cut off with its event loop. It stays uncached, and "
                "takes room for another %.0f s. To avoid that, let the event loop end with `await store.drain()`.",
                backend.shared.handle.name,
                WRITE_TIMEOUT,
            )

    def release(self, until: float) -> None:
        """Leave to later deletes what was cut off by then."""
        while self._writes:
            try:
                write = self._writes.popleft()
            except IndexError:  # Another thread was faster.
                return
            cut_off, backend, reservation = write
            if cut_off > until:
                self._writes.appendleft(write)
                return
            backend.shared.handle.call_later(backend.remove_later, Index.release, reservation)
