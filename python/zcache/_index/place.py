"""What all stores over one place share beside its index, such as a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._runtime.io import IO


class Place:
    """A place where values are kept. A kind of them overrides what it needs.

    Attributes
    ----------
    on_idle : callable
        Called when fills have ended; set by the owner of the queue.
    """

    on_idle: Callable[[], object] = staticmethod(lambda: None)

    def enforce_bound(self) -> None:
        """Evict what is above a bound that has become smaller."""

    def wait_for_bound(self) -> None:
        """Wait until that is done, some seconds at most."""

    def keep_free(self, size: int | None) -> None:
        """Have so many bytes of its volume stay free, where it has one; None for the default."""

    async def settle(self, io: IO, backend: Any, until: float) -> bool:  # noqa: ARG002 - of those that list
        """Wait until it is known what is there, and all above the bound has gone.

        Parameters
        ----------
        io : IO
            Of who waits.
        backend : Backend
            Of the same.
        until : float
            Time of the monotonic clock, in seconds, until which it waits.

        Returns
        -------
        bool
            Whether that was in time.
        """
        return True

    def after_fork(self) -> None:
        """Start over in a forked child."""
