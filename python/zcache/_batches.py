"""Many ranges in one call: what is cached at once, the rest in one request to the source."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from zcache._books import LateError
from zcache._buffers import snapshot
from zcache._core import is_known
from zcache._fills import ignore
from zcache._flights import Flight
from zcache._spans import Span, to_span

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._engine import Engine
    from zcache._traffic import Traffic

    Request = tuple[str, ByteRequest | None]
    Group = Sequence[tuple[int, Buffer | None]]
    Fetch = Callable[[list[int]], AsyncIterator[Group]]


class Batch:
    """One call for several requests.

    Parameters
    ----------
    engine, io
        The protocol and its way to the stores.
    prototype : BufferPrototype
        Of the buffers to return.
    requests : sequence of (str, ByteRequest or None)
        Keys and ranges.
    fetch : callable
        Asks the source for the requests with these numbers, in one call, and yields groups of
        number and value as they come.

    Attributes
    ----------
    senseless : bool
        Whether some request has no meaning (see `to_span`), so that the answer of a source that
        joins ranges depends on what else it is asked.
    """

    def __init__(
        self,
        engine: Engine,
        io: Traffic,
        prototype: BufferPrototype,
        requests: Sequence[Request],
        fetch: Fetch,
    ) -> None:
        self.engine = engine
        self.io = io
        self.prototype = prototype
        self.requests = requests
        self.fetch = fetch
        self.senseless = False
        # What each request is for the index; None where the source has to answer it.
        self._asked = [self._parse(*request) for request in requests]
        self._leads: dict[int, tuple[int, Flight]] = {}
        self._brought: list[tuple[int, bytes | None]] = []
        self._waits: list[tuple[int, tuple[Span | None, Flight] | None]] = []
        self._direct: list[int] = []

    def _parse(self, key: str, byte_range: ByteRequest | None) -> tuple[str, Span | None] | None:
        try:
            span = to_span(byte_range)
        except ValueError:
            self.senseless = True
            return None
        return (key, span) if is_known(key) else None

    async def run(self) -> AsyncIterator[Group]:
        """Yield groups of request number and value (None for a missing key)."""
        missing = []
        ready: list[tuple[int, Buffer | None]] = []
        # Hits that are not at hand.
        slow: list[tuple[int, Any]] = []
        for number, asked in enumerate(self._asked):
            if asked is None:
                self.count_bypassed(1)
                self._direct.append(number)
                continue
            value, hit = self.engine.glance(asked[0], self.prototype, asked[1])
            if value is not None:
                ready.append((number, value))
            elif hit is None:
                missing.append(number)
            else:
                slow.append((number, hit))
        values = await self.io.together([partial(self._serve, *one) for one in slow])
        for (number, _), value in zip(slow, values, strict=True):
            if value is None:
                missing.append(number)
            else:
                ready.append((number, value))
        if ready:
            yield ready
        # Nothing is handed out before all is there: nobody may wait for this call while it waits for
        # its caller to ask on.
        for group in await self._bring(missing):
            yield group
        for number, joined in self._waits:
            key, byte_range = self.requests[number]
            value = await self.engine.fetch(
                self.io, key, self.prototype, byte_range, to_span(byte_range), joined
            )
            yield [(number, value)]

    async def _serve(self, number: int, hit: Any) -> Buffer | None:
        asked = self._asked[number]
        assert asked is not None
        try:
            return await self.engine.serve(self.io, asked[0], self.prototype, asked[1], hit)
        except LateError:
            return None

    async def _bring(self, missing: list[int]) -> list[Group]:
        """Ask the source, in one call, for what nobody else reads already; and cache it."""
        groups: list[Group] = []
        try:
            for number in missing:
                await self._join(number)
            if wanted := sorted([*self._leads, *self._direct]):
                try:
                    # Nothing is awaited for one group before all have come: a source that reads
                    # in a task group cancels whoever waits here when another of its reads fails.
                    async for group in self.fetch(wanted):
                        for number, found in group:
                            self._deliver(number, found)
                        groups.append(group)
                except Exception:
                    await self._keep()
                    raise
                await self._keep()
        finally:
            # Whoever waits for what did not come asks for itself.
            for number in list(self._leads):
                self._land(number)
        return groups

    def count_bypassed(self, count: int) -> None:
        """Count requests that the cache never answers."""
        for _ in range(count):
            self.engine.count("bypassed")
            self.engine.count_miss()

    async def _join(self, number: int) -> None:
        asked = self._asked[number]
        assert asked is not None
        engine = self.engine
        flight = Flight(self.io.loop())
        out_of_use = not engine.breaker.allows()
        try:
            joined = await engine.books.step(
                self.io, engine.index.join, *asked, flight, engine.now(), out_of_use, for_ever=False
            )
        except LateError:
            self.count_bypassed(1)
            self._direct.append(number)
            return
        if isinstance(joined, int):
            self._leads[number] = (joined, flight)
            flight.begun = True
        else:
            # Somebody brings it, or has brought it; perhaps this very call, for a duplicate.
            self._waits.append((number, joined))

    def _deliver(self, number: int, found: Buffer | None) -> None:
        if lead := self._leads.get(number):
            data = None if found is None else snapshot(found)
            lead[1].deliver(data)
            self._brought.append((number, data))

    async def _keep(self) -> None:
        """Fill the cache with what was brought."""
        await self.io.together([partial(self._keep_one, *one) for one in self._brought])

    async def _keep_one(self, number: int, data: bytes | None) -> None:
        engine, asked = self.engine, self._asked[number]
        assert asked is not None
        if data is None:
            await engine.forget(self.io, asked[0])
        else:
            await engine.fill(self.io, *asked, data, self._leads[number][0])
        self._land(number)

    def _land(self, number: int) -> None:
        ticket, flight = self._leads.pop(number)
        engine = self.engine
        if not engine.is_left(ticket):
            # Closed first: whoever is woken would else join it again, and again.
            engine.books.soon(ignore, engine.index.land, self.requests[number][0], ticket)
        flight.abandon()  # Of no effect once it is delivered.


def from_partial_values(
    source: Store, prototype: BufferPrototype, requests: Sequence[Request]
) -> Fetch:
    """Ask a source for requests of any keys."""

    async def fetch(numbers: list[int]) -> AsyncIterator[Group]:
        asked = [requests[number] for number in numbers]
        found = await source.get_partial_values(prototype, asked)
        yield list(zip(numbers, found, strict=True))

    return fetch


def from_ranges(
    source: Any, prototype: BufferPrototype, requests: Sequence[Request], options: dict[str, int]
) -> Fetch:
    """Ask a source for ranges of one key."""
    if not hasattr(source, "get_ranges"):  # zarr before 3.3
        return from_partial_values(source, prototype, requests)

    async def fetch(numbers: list[int]) -> AsyncIterator[Group]:
        key = requests[0][0]
        asked = [requests[number][1] for number in numbers]
        async for group in source.get_ranges(key, asked, prototype=prototype, **options):
            yield [(numbers[at], value) for at, value in group]

    return fetch


def from_ranges_sync(
    source: Any, prototype: BufferPrototype, requests: Sequence[Request], options: dict[str, int]
) -> Fetch:
    """Ask a source for ranges of one key without an event loop."""

    async def fetch(numbers: list[int]) -> AsyncIterator[Group]:
        key = requests[0][0]
        asked = [requests[number][1] for number in numbers]
        if not hasattr(source, "get_ranges_sync"):  # zarr before 3.4
            values = [source.get_sync(key, prototype=prototype, byte_range=r) for r in asked]
            yield list(zip(numbers, values, strict=True))
            return
        found = source.get_ranges_sync(key, asked, prototype=prototype, **options)
        yield [(numbers[at], value) for at, value in found]

    return fetch
