"""What the protocol tells of the requests that it serves, if a recorder listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from zcache._backends.base import ABSENT, BUSY
from zcache.exceptions import UsageError

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._backends.base import Hit
    from zcache._byte_ranges import ByteRange


class Recorder(Protocol):
    """Takes down requests. Nothing here raises or waits."""

    def looked_up(
        self, key: str, byte_range: ByteRange | None, hit: Hit | None, *, served: bool
    ) -> None:
        """A request was looked up: what the index has found, or None; and whether that was served at once."""

    def read(self, key: str, byte_range: ByteRange | None, *, served: bool) -> None:
        """What was found was read; where it could not be served, the request is a miss."""

    def brought(
        self,
        key: str,
        byte_range: ByteRange | None,
        size: int,
        *,
        hit: bool,
        entry: tuple[str, int] | None,
    ) -> None:
        """What one reader missed has come, from the cache after all if it is a `hit`.

        `entry` are the name and the bytes of what it is a part of, where that is another entry.
        """

    def retract(self, key: str, byte_range: ByteRange | None) -> None:
        """A miss is no request: it has brought nothing, or is looked up once more."""


class Lookup(Protocol):
    """What serves hits."""

    def get_nowait(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRange | None
    ) -> tuple[Buffer | None, Hit | None]:
        """What can be had at once, and what the index has found."""


class RequestHook:
    """Tells one recorder of the requests of a store, or no one.

    Attributes
    ----------
    recorder : Recorder or None
        Who is told.
    """

    def __init__(self) -> None:
        self.recorder: Recorder | None = None

    def attach(self, recorder: Recorder, hits: Lookup) -> None:
        """Tell of each request from now on.

        Raises
        ------
        UsageError
            If another recorder is told already.
        """
        if self.recorder is not None:
            raise UsageError(
                "the requests of this store, or of a copy of it, are being recorded already. End that "
                "recording first, or have another store over the same cache recorded."
            )
        self.recorder = recorder
        look_up = hits.get_nowait

        def get_nowait(
            key: str, prototype: BufferPrototype, byte_range: ByteRange | None
        ) -> tuple[Buffer | None, Hit | None]:
            value, hit = look_up(key, prototype, byte_range)
            self.found(key, byte_range, hit, served=value is not None)
            return value, hit

        # In the place of the method, so that a hit that is not recorded does not ask whether it is.
        vars(hits)["get_nowait"] = get_nowait

    def detach(self, recorder: Recorder, hits: Lookup) -> None:
        """Tell of none any more; of no effect where that was over."""
        if self.recorder is recorder:
            vars(hits).pop("get_nowait", None)
            self.recorder = None

    def found(
        self, key: str, byte_range: ByteRange | None, hit: Hit | None, *, served: bool = False
    ) -> None:
        """Tell what the index has found, and whether that was served at once."""
        if (recorder := self.recorder) is not None and hit is not BUSY and hit is not ABSENT:
            recorder.looked_up(key, byte_range, hit, served=served)

    def read(self, key: str, byte_range: ByteRange | None, *, served: bool) -> None:
        """Tell whether what was found could be served."""
        if (recorder := self.recorder) is not None:
            recorder.read(key, byte_range, served=served)

    def brought(
        self,
        key: str,
        byte_range: ByteRange | None,
        size: int,
        *,
        hit: bool = False,
        entry: tuple[str, int] | None = None,
    ) -> None:
        """Tell of the bytes that a miss has brought after all."""
        if (recorder := self.recorder) is not None:
            recorder.brought(key, byte_range, size, hit=hit, entry=entry)

    def retract(self, key: str, byte_range: ByteRange | None) -> None:
        """Tell that a miss is no request: it has brought nothing, or is looked up once more."""
        if (recorder := self.recorder) is not None:
            recorder.retract(key, byte_range)
