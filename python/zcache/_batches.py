"""Many ranges in one call: what is cached at once, the rest in one request to the source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zcache._core import is_known
from zcache._engine import snapshot
from zcache._fills import ignore
from zcache._flights import Flight
from zcache._spans import Span, to_span

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from zarr.abc.store import ByteRequest
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
        self._leads: dict[int, tuple[int, Flight]] = {}
        self._waits: list[int] = []
        self._direct: list[int] = []

    async def run(self) -> AsyncIterator[Group]:
        """Yield groups of request number and value (None for a missing key)."""
        missing = []
        ready: list[tuple[int, Buffer | None]] = []
        for number, (key, _) in enumerate(self.requests):
            value = await self._cached(number, key)
            if value is None:
                missing.append(number)
            else:
                ready.append((number, value))
        if ready:
            yield ready
        if not missing:
            return
        # Nothing is handed out before all is there: nobody may wait for this call while it waits for
        # its caller to ask on.
        groups: list[Group] = []
        try:
            for number in missing:
                await self._join(number)
            asked = sorted([*self._leads, *self._direct])
            if asked:
                async for group in self.fetch(asked):
                    for number, found in group:
                        await self._keep(number, found)
                    groups.append(group)
        finally:
            # Whoever waits for what did not come asks for itself.
            for number in list(self._leads):
                ticket, flight = self._leads.pop(number)
                flight.abandon()
                key = self.requests[number][0]
                self.engine.books.soon(ignore, self.engine.index.land, key, ticket)
        for group in groups:
            yield group
        for number in self._waits:
            key, byte_range = self.requests[number]
            span = to_span(byte_range)
            yield [
                (
                    number,
                    await self.engine.fetch(self.io, key, self.prototype, byte_range, span),
                )
            ]

    def _span(self, number: int) -> tuple[bool, Span | None]:
        key, byte_range = self.requests[number]
        try:
            return is_known(key), to_span(byte_range)
        except ValueError:
            return False, None

    async def _cached(self, number: int, key: str) -> Buffer | None:
        known, span = self._span(number)
        if not known:
            self.engine.count("bypassed")
            self.engine.count_miss()
            self._direct.append(number)
            return None
        return await self.engine.cached(self.io, key, self.prototype, span)

    async def _join(self, number: int) -> None:
        if number in self._direct:
            return
        key = self.requests[number][0]
        span = self._span(number)[1]
        engine = self.engine
        flight = Flight(self.io.loop())
        out_of_use = not engine.breaker.allows()
        joined = await engine.books.step(
            self.io, engine.index.join, key, span, flight, engine.now(), out_of_use
        )
        if isinstance(joined, int):
            self._leads[number] = (joined, flight)
        else:
            # Somebody brings it, or has brought it; perhaps this very call, for a duplicate.
            self._waits.append(number)

    async def _keep(self, number: int, found: Buffer | None) -> None:
        lead = self._leads.pop(number, None)
        if lead is None:
            return
        ticket, flight = lead
        key = self.requests[number][0]
        span = self._span(number)[1]
        engine = self.engine
        try:
            if found is None:
                flight.deliver(None)
                victims = await engine.books.step(self.io, engine.index.forget, key)
                await engine.drop(self.io, victims)
            else:
                data = snapshot(found)
                flight.deliver(data)
                await engine.fill(self.io, key, span, data, ticket)
        finally:
            flight.abandon()  # Of no effect once it is delivered.
            engine.books.soon(ignore, engine.index.land, key, ticket)
