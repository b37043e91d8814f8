"""What the protocol tells of the requests that it serves, if anybody listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from zcache._backends.base import Hit
    from zcache._byte_ranges import ByteRange


class Recorder(Protocol):
    """Takes down requests. Nothing here raises or waits."""

    def looked_up(self, key: str, byte_range: ByteRange | None, hit: Hit | None) -> None:
        """A request was looked up: what the index has found, or None."""

    def brought(
        self, key: str, byte_range: ByteRange | None, size: int | None, *, hit: bool
    ) -> None:
        """What was missed has come, from the cache after all if it is a `hit`; None for no such key."""

    def retract(self, key: str, byte_range: ByteRange | None) -> None:
        """A miss is looked up once more."""
