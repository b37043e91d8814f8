"""What all stores over one place share beside its index, such as a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcache._runtime.io import IO


class Place:
    """A place where values are kept. A kind of them overrides what it needs.

    Attributes
    ----------
    fills : FillQueue or None
        Values on their way into the cache store; None where a fill takes one step.
    """

    fills: Any = None

    def on_idle(self) -> None:
        """Take note of fills that have ended, while no reader comes."""
        if self.fills is not None:
            self.fills.collect()

    def enforce_bound(self) -> None:
        """Evict what is above a bound that has become smaller."""

    def wait_for_bound(self) -> None:
        """Wait until that is done, some seconds at most."""

    def limit_fills(self, max_pending_size: int | None, min_free_space: int | None) -> None:  # noqa: ARG002 - of those on a volume
        """Have values of so many bytes be on their way at most, and so many bytes of its volume stay free, where it has one.

        None stands for the default.
        """
        if self.fills is not None:
            self.fills.set_bound(max_pending_size)

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

    def rename(self, name: str) -> None:
        """Hold the values of the same source under another name, in a forked child, before `after_fork`."""

    def after_fork(self) -> None:
        """Start over in a forked child."""
        if self.fills is not None:
            self.fills.after_fork()
