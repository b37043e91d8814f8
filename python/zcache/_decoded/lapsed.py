"""Which kept chunks are void, or have expired: they go before any that is of use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from zcache._decoded.chunk import Kept
    from zcache._decoded.origins import Origins

STEP: Final = 256
"""Chunks that are looked at each time room is needed, at most."""
PAUSE: Final = 2
"""All are looked at once room was needed for a part of them since that was begun last: for one in so many."""


class Lapsed:
    """Looks at what is kept, in rounds, while room is needed.

    A change of an array or a group in this process ends its chunks at once. This finds what others on the cache have changed,
    what has expired, and what was written chunk by chunk.

    Parameters
    ----------
    values : dict of str to Kept
        What is kept, by name.
    lock : RLock
        Guards it.
    origins : Origins
        Knows what is current.
    now : callable
        Clock of the byte cache, in seconds.
    """

    def __init__(
        self,
        values: dict[str, Kept],
        lock: threading.RLock,
        origins: Origins,
        now: Callable[[], float],
    ) -> None:
        self._values = values
        self._lock = lock
        self._origins = origins
        self._now = now
        # Not looked at yet in this round; the last is the next one.
        self._rest: list[str] = []
        self._wanted: float = float("inf")
        self._is_noted = False

    def note(self) -> None:
        """Say that something has lapsed."""
        self._is_noted = True

    def find(self, wanted: int) -> list[str]:
        """Some that have lapsed, where there is room for fewer chunks than these."""
        if not (self._is_noted or self._rest or self._origins.lapse_unheard):
            return []
        self._wanted += wanted
        with self._lock:
            if not self._rest and self._wanted * PAUSE >= len(self._values):
                self._rest = list(self._values)[::-1]
                self._wanted, self._is_noted = 0, False
            names, self._rest[-STEP:] = self._rest[-STEP:], []
            found = [(name, kept) for name in names if (kept := self._values.get(name)) is not None]
        if not found:
            return []
        stay = self._origins.stay_current([kept.origin for _, kept in found], self._now())
        return [name for (name, _), stays in zip(found, stay, strict=True) if not stays]
