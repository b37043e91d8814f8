"""A clock that a test sets."""

from __future__ import annotations

import threading


class FakeClock:
    """A clock that stands still until a test moves it.

    It is an option of a store, not a patch: ``CacheStore(source, clock=clock)``. Ages of values and the
    pauses of the circuit breaker are then counted by it; in a pool, ages only.

    Parameters
    ----------
    start : float, optional
        Seconds that it shows first. Default is 1000.0, for 0 stands for an unknown time in the index.

    Examples
    --------
    >>> clock = FakeClock(0.0)
    >>> clock.advance(1.5)
    >>> clock()
    1.5
    """

    def __init__(self, start: float = 1000.0) -> None:
        self._lock = threading.Lock()
        self._seconds = float(start)

    def __call__(self) -> float:
        """Seconds that it shows."""
        return self._seconds

    def advance(self, seconds: float) -> None:
        """Move it forward.

        Parameters
        ----------
        seconds : float
            How far; negative numbers move it back, as a system's clock may be set back.
        """
        with self._lock:
            self._seconds += seconds

    def set(self, seconds: float) -> None:
        """Set it.

        Parameters
        ----------
        seconds : float
            What it shows from now on.
        """
        with self._lock:
            self._seconds = float(seconds)

    def __reduce__(self) -> tuple[type[FakeClock], tuple[float]]:
        """A copy in another process is a clock of its own."""
        return type(self), (self._seconds,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._seconds!r})"
