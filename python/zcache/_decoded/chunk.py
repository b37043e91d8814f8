"""A decoded chunk: what it comes from, what is kept of it, and who decodes it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol

from zcache._protocol.single_flight import Flight, HasLeader

if TYPE_CHECKING:
    import asyncio

    from zcache._decoded.layout import Array
    from zcache._protocol.single_flight import LoopReference

OVERHEAD: Final = 1024
"""Bytes that are counted for a kept chunk beside its elements: its objects, a name of `SHORT` characters, its cell of the index,
and what is remembered of those that were refused in its place."""
SHORT: Final = 64
"""Characters of a name that cost nothing beyond that."""
_COPIES: Final = 3
"""Times that a name is there at most: of the chunk, of its bytes, and in the index."""
_WIDEST: Final = 8
"""Bytes of a character beyond ASCII at most: Python keeps UTF-8 beside its own form."""


def overhead(name: str) -> int:
    """Bytes that are counted for a kept chunk of this name beside its elements."""
    more = len(name) - SHORT
    if more <= 0 and name.isascii():
        return OVERHEAD
    return OVERHEAD + _COPIES * (max(0, more) if name.isascii() else _WIDEST * len(name))


class Origin:
    """What a decode knows of the bytes that it reads.

    Attributes
    ----------
    key : str
        Of the bytes.
    version, fetched
        See `Index.begin_decodes`.
    max_age : float or None
        Seconds for which its chunks may be served; None for any time.
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

    __slots__ = (
        *("checked", "fetched", "is_dated", "key", "landed", "max_age", "stale", "touched"),
        "version",
    )

    def __init__(
        self,
        key: str,
        begun: float,
        stale: int,
        stamp: tuple[int, int],
        max_age: float | None = None,
    ) -> None:
        self.key = key
        self.version, self.fetched = stamp
        self.max_age = max_age
        self.is_dated = max_age is None or self.fetched != 0
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
    size : int
        Bytes that are counted for it in the bound; 0 without memory.
    is_condemned, is_gone : bool
        Whether it was to be evicted while it was pinned; whether it was evicted, so that others use its memory.
    """

    __slots__ = ("array", "is_condemned", "is_gone", "memory", "origin", "pins", "size")

    def __init__(
        self, array: Array, origin: Origin, memory: Array | None = None, size: int = 0
    ) -> None:
        self.array = array
        self.origin = origin
        self.memory = memory
        self.size = size
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
    size : int
        Bytes of that room.
    is_admitted : bool
        Whether it is kept: there is room for it, or will be looked for once it is there.
    kept : Kept or None
        What it has come to; also where there was no room for it.
    is_ended : bool
        Whether its leader has released it.
    is_overdue : bool
        Whether that was done for it, because those who wait have waited long enough: they start over.
    """

    kept: Kept | None = None
    ticket = 0
    reservation: Any = None
    size = 0
    is_admitted = False
    waiting = 0
    is_ended = False
    is_overdue = False
    begun = True

    def __init__(self, loop: LoopReference, name: str, origin: Origin) -> None:
        self._loop = loop
        self.name = name
        self.origin = origin

    def of(self, name: str) -> Decoding | None:  # noqa: ARG002 - it is of one chunk
        """Itself; see `Decodings`."""
        return self

    def pass_over(self, name: str) -> bool:  # noqa: ARG002 - it ends by itself
        """False; see `Decodings`."""
        return False

    def take_passed(self, name: str) -> int | None:  # noqa: ARG002 - it ends by itself
        """None; see `Decodings`."""
        return None

    def end(self) -> None:
        """Wake all who wait; who comes later sees that it is done."""
        self.done = True
        if self._waiters is not None:
            self._wake_all()


class Decodings(HasLeader):
    """Chunks of one size that one reader decodes.

    A chunk has a `Decoding` once it is to be kept, or another reader waits for it. Most have none while nothing is read
    again. To be used under the lock of the cache, unless it is said otherwise.

    Parameters
    ----------
    loop : AbstractEventLoop
        Of the reader.
    origins : dict of str to Origin
        Of the bytes of each chunk, by its name.

    Attributes
    ----------
    tickets : dict of str to int
        Of the flights of chunks that have no `Decoding`, by name.
    passed : dict of str to int
        The same of chunks that are decoded, and that no one keeps or waits for: their flights are closed together.
    single : dict of str to Decoding
        The others, by name.
    late : set of str
        Those that had no room, and are kept if others of the read turn out to need none.
    landed : list of Decoding or None
        Those that are kept, and are committed together; None once that is done.
    """

    __slots__ = ("_loop", "landed", "late", "origins", "passed", "single", "tickets")

    _loop: LoopReference
    landed: list[Decoding] | None

    def __init__(self, loop: asyncio.AbstractEventLoop, origins: dict[str, Origin]) -> None:
        self._loop = weakref.ref(loop)
        self.origins = origins
        # Others may come before the tickets are known.
        self.tickets = dict.fromkeys(origins, 0)
        self.passed: dict[str, int] = {}
        self.single: dict[str, Decoding] = {}
        self.late: set[str] = set()
        self.landed = []

    @property
    def is_dated(self) -> bool:
        """See `Origin`: either all of them are, or none."""
        return next(iter(self.origins.values())).is_dated

    def lead(self, names: list[str], tickets: list[int | None]) -> list[str]:
        """Note the tickets of the flights that it leads. Returns the names of these; others lead the rest."""
        if None not in tickets and not self.single:
            self.tickets = dict(zip(names, tickets, strict=True))  # type: ignore[arg-type]
            return names
        led = []
        for name, ticket in zip(names, tickets, strict=True):
            if ticket is None:
                self.tickets.pop(name, None)
                continue
            led.append(name)
            if name in self.single:
                self.single[name].ticket = ticket
            else:
                self.tickets[name] = ticket
        return led

    def of(self, name: str) -> Decoding | None:
        """The decode of one chunk, from now on by itself; None where it has ended."""
        decoding = self.single.get(name)
        if decoding is None and (ticket := self.tickets.pop(name, None)) is not None:
            decoding = self.single[name] = Decoding(self._loop, name, self.origins[name])
            decoding.ticket = ticket
        return decoding

    def apart(self, names: list[str]) -> list[Decoding]:
        """The same for many; those that have ended are left out."""
        found = []
        for name in names:
            if name in self.tickets and name not in self.single:
                decoding = self.single[name] = Decoding(self._loop, name, self.origins[name])
                decoding.ticket = self.tickets.pop(name)
                found.append(decoding)
            elif (one := self.of(name)) is not None:
                found.append(one)
        return found

    def take(self, names: list[str] | None) -> dict[str, int]:
        """Tickets of chunks that have no `Decoding`, of all of them without `names`: their decodes end now."""
        if names is None:
            taken, self.tickets, self.passed = {**self.passed, **self.tickets}, {}, {}
            return taken
        tickets = self.tickets
        return {name: tickets.pop(name) for name in names if name in tickets}

    def pass_over(self, name: str) -> bool:
        """Whether no one keeps a chunk that is decoded, or waits for it. Needs no lock: threads decode at once."""
        ticket = self.tickets.pop(name, None)
        if ticket is None:
            return False
        self.passed[name] = ticket
        return True

    def take_passed(self, name: str) -> int | None:
        """The ticket of a chunk that was passed over: another reader closes its flight, and decodes it anew."""
        return self.passed.pop(name, None)


class Leader(Protocol):
    """A read that decodes what others may wait for."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """In which it does so."""

    def led(self) -> list[Decoding | Decodings]:
        """What others may wait for."""
