"""A decoded chunk: what it comes from, what is kept of it, and who decodes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zcache._protocol.single_flight import Flight

if TYPE_CHECKING:
    import asyncio

    from zcache._decoded.layout import Array


class Origin:
    """What a decode knows of the bytes that it reads.

    Attributes
    ----------
    version, fetched
        See `Index.begin_decode`.
    is_dated : bool
        Whether it can be said when its chunks expire: else they must not be kept, nor handed to others.
    stale : int
        Values past their age that were read until it began; see `Counters`.
    landed : float
        When the decode ended, in seconds on the clock of the byte cache.
    touched : float
        When the ranges of the key were last counted as used.
    checked : object
        The read that has found it current.
    """

    __slots__ = ("checked", "fetched", "is_dated", "landed", "stale", "touched", "version")

    def __init__(
        self, begun: float, stale: int, stamp: tuple[int, int], *, expires: bool = False
    ) -> None:
        self.version, self.fetched = stamp
        self.is_dated = not expires or self.fetched != 0
        self.stale = stale
        self.landed = self.touched = begun
        self.checked: object = None


class Kept:
    """A decoded chunk.

    Attributes
    ----------
    array : ndarray
        Its elements; cannot be written to.
    origin : Origin
        Where they come from.
    pins : int
        Readers that copy from it now: until they have, it counts.
    memory : ndarray or None
        What it lies in; None where it is one element, the fill value.
    is_condemned, is_gone : bool
        Whether it was to be evicted while it was pinned; whether it was evicted, so that others use its memory.
    """

    __slots__ = ("array", "is_condemned", "is_gone", "memory", "origin", "pins")

    def __init__(self, array: Array, origin: Origin, memory: Array | None) -> None:
        self.array = array
        self.origin = origin
        self.memory = memory
        self.pins = 0
        self.is_condemned = self.is_gone = False


class Decoding(Flight):
    """A chunk that is being decoded, and those who wait for it.

    Attributes
    ----------
    name : str
        Of the chunk.
    origin : Origin
        Of its bytes.
    ticket : int
        Of its flight.
    reservation : Reservation or None
        Room for it.
    is_admitted : bool
        Whether it is kept if there is room.
    kept : Kept or None
        What it has come to; also where there was no room for it.
    is_ended : bool
        Whether its leader has let go of it.
    """

    kept: Kept | None = None
    ticket = 0
    reservation: Any = None
    is_admitted = True
    waiting = 0
    is_ended = False
    begun = True

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, origin: Origin) -> None:
        self.loop = loop
        self.name = name
        self.origin = origin

    def end(self) -> None:
        """Wake all who wait; who comes later sees that it is done."""
        self.done = True
        if self._waiters is not None:
            self._wake_all()
