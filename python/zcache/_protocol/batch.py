"""Many requests in one call: cached values at once, the rest in one request to the source, as it comes."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from zcache._backends.base import ABSENT, BUSY, FillJob
from zcache._byte_ranges import ByteRange, check_key, to_byte_range
from zcache._core import Index, is_cacheable_key
from zcache._protocol.read import Joined
from zcache._protocol.single_flight import Flight
from zcache._runtime.buffers import freeze, to_cpu_buffer
from zcache._runtime.coroutines import Handover
from zcache._runtime.turns import turns
from zcache._source.missing import says_missing
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._protocol.read import Reader
    from zcache._protocol.revalidate import Check, Revalidator
    from zcache._runtime.io import IO

    Request = tuple[str, ByteRequest | None]
    Group = Sequence[tuple[int, Buffer | None]]
    Put = Callable[[Group], None]
    Fetch = Callable[[list[int], Put], Coroutine[Any, Any, None]]


CANCEL_TIMEOUT: Final = 1.0
"""Seconds that the end of a call waits for a source that was cancelled."""
PIECE: Final = 64
"""Values after which the turn of the event loop may be another's: to ask takes as long as some of them."""


class Batch:
    """One call for several requests.

    It hands over groups of request number and value (None for a missing key), as they come.

    Parameters
    ----------
    reader : Reader
        The protocol of reads.
    io : IO
        The way to the source.
    prototype : BufferPrototype
        Of the buffers to return.
    requests : sequence of (str, ByteRequest or None)
        Keys and ranges.
    fetch : callable
        Asks the source for the requests with these numbers, in one call, and hands over groups as they come.
    trusts_absences : bool, optional
        Whether keys that are remembered as missing are answered without the source. Default is True.

    Attributes
    ----------
    has_invalid_range : bool
        Whether some request has no meaning (see `to_byte_range`), so that the answer of a source that
        joins ranges depends on what else it is asked.
    """

    def __init__(
        self,
        reader: Reader,
        io: IO,
        prototype: BufferPrototype,
        requests: Sequence[Request],
        fetch: Fetch,
        *,
        trusts_absences: bool = True,
    ) -> None:
        self._trusts_absences = trusts_absences
        self._reader = reader
        self._io = io
        self._prototype = prototype
        self._requests = requests
        self._fetch = fetch
        self.has_invalid_range = False
        # What each request is for the index; None where the source has to answer it.
        self._asked = [self._parse(*request) for request in requests]
        # The first one that was not looked up yet.
        self._next = 0
        self._missing: list[int] = []
        self._slow: dict[int, Any] = {}
        # Those of which the index has not answered whether they are cached.
        self._unknown: set[int] = set()
        # Those that were looked up and have missed, until it is known what they come to.
        self._open: set[int] = set()
        self._leads: dict[int, tuple[int, Flight]] = {}
        self._waits: list[tuple[int, Joined | None]] = []
        self._direct: set[int] = set()
        # Validators of the keys, from before they are read.
        self._checks: dict[str, Check] = {}

    def _parse(self, key: str, request: ByteRequest | None) -> tuple[str, ByteRange | None] | None:
        try:
            byte_range = to_byte_range(request)
        except ValueError:
            self.has_invalid_range = True
            return None
        try:
            return (key, byte_range) if is_cacheable_key(key) else None
        except TypeError:
            check_key(key)
            raise

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to be brought."""
        is_looked_up = self._next == len(self._asked)
        return is_looked_up and not (self._missing or self._slow or self._direct)

    def look_up(self) -> Group:
        """What is there at once, as far as this turn of the event loop goes; for the others see `bring`."""
        reader = self._reader
        ready: list[tuple[int, Buffer | None]] = []
        for number in range(self._next, len(self._asked)):
            if number > self._next and number % PIECE == 0 and turns.are_over():
                self._next = number
                return ready
            asked = self._asked[number]
            if asked is None:
                self.count_bypassed(1)
                self._direct.add(number)
                continue
            value, hit = reader.hits.get_nowait(asked[0], self._prototype, asked[1])
            if hit is ABSENT and not self._trusts_absences:
                reader.hits.recount_negative_as_miss()
                self._direct.add(number)
            elif value is not None or hit is ABSENT:
                ready.append((number, value))
            elif hit is None:
                self._missing.append(number)
                self._open.add(number)
            else:
                self._slow[number] = hit
                if ready and reader.backend.is_turn_full:
                    # What comes after it is read in the next one, at once as this was. Where others have filled this
                    # one already, all waits for its turn as single reads do: else those would always come first.
                    self._next = number + 1
                    return ready
        self._next = len(self._asked)
        return ready

    async def bring(self, put: Put) -> None:
        """Hand over what was not there at once."""
        try:
            await self._bring(put)
        finally:
            self.end()

    def end(self) -> None:
        """Take the requests back that have come to nothing, because the call has failed or was left."""
        while self._slow:
            number, hit = self._slow.popitem()
            # What the index has not answered yet is none.
            if hit is not BUSY:
                self._reader.hits.request_unserved(*self._known(number))
                self._open.add(number)
        while self._open:
            self._reader.hits.retract_request(*self._known(self._open.pop()))

    def _known(self, number: int) -> tuple[str, ByteRange | None]:
        asked = self._asked[number]
        assert asked is not None
        return asked

    def _brought(self, number: int, value: Buffer | None, *, hit: bool = False) -> None:
        """Tell what a request has come to that this call leads."""
        if number in self._open:
            self._open.discard(number)
            size = None if value is None else len(value)
            self._reader.hits.brought(*self._known(number), size, hit=hit)

    async def _bring(self, put: Put) -> None:
        while self._next < len(self._asked):
            await self._io.pause()
            if ready := self.look_up():
                put(ready)
        slow = list(self._slow)
        values = await self._io.gather([partial(self._serve, number) for number in slow])
        found: list[tuple[int, Buffer | None]] = []
        for number, (is_answer, value) in zip(slow, values, strict=True):
            if is_answer:
                found.append((number, value))
            else:
                self._missing.append(number)
        if found:
            put(found)
        if self._reader.offline and (found := await self._look_offline(self._missing)):
            put(found)
        if self._missing or self._direct:
            try:
                await self._lead(self._missing, put)
            finally:
                # Who waits for what did not come asks for it.
                self._close_all()
        for count, (number, joined) in enumerate(self._waits, 1):
            await self._rest(count)
            key, request = self._requests[number]
            value = await self._reader.fetch(
                self._io, key, self._prototype, request, to_byte_range(request), joined
            )
            self._open.discard(number)
            put([(number, value)])

    async def run(self, put: Put) -> None:
        """Hand over all, to a caller that does nothing else meanwhile."""
        try:
            if ready := self.look_up():
                put(ready)
            if not self.is_over:
                await self.bring(put)
        finally:
            self.end()

    async def _look_offline(self, missing: list[int]) -> list[tuple[int, Buffer | None]]:
        """What is there by now of what was missing, or cannot be there at all, which is taken out."""
        reader, hits = self._reader, self._reader.hits
        found: list[tuple[int, Buffer | None]] = []
        again: bool | None = None
        for number in missing:
            asked = self._known(number)
            is_answer, value = False, None
            with reader.answers_offline(asked[0]):
                if again is None:
                    again = await hits.wait_until_complete(self._io)
                if again or number in self._unknown:
                    hits.retract_miss(*asked)
                    is_answer, value = await hits.cached(
                        self._io, asked[0], self._prototype, asked[1]
                    )
                if not is_answer and await hits.is_ruled_out(self._io, asked[0]):
                    hits.recount_as_negative_hit(*asked)
                    is_answer = True
            if is_answer:
                self._open.discard(number)
                found.append((number, value))
        missing[:] = set(missing) - {number for number, _ in found}
        return found

    async def _serve(self, number: int) -> tuple[bool, Buffer | None]:
        key, byte_range = self._known(number)
        hit = self._slow.pop(number)
        self._open.add(number)
        try:
            served = await self._reader.hits.serve(self._io, key, self._prototype, byte_range, hit)
        except IndexLockTimeout:
            self._unknown.add(number)
            return False, None
        if served[0]:
            self._open.discard(number)
        return served

    async def _lead(self, missing: list[int], put: Put) -> None:
        """Ask the source, in one call, for what no other reader reads already."""
        reader = self._reader
        backend = reader.backend
        # What others read already may have begun before a change that the index does not know of.
        has_heard = not backend.tells_by_name or await backend.hear_of_changes(self._io)
        for count, number in enumerate(missing, 1):
            await self._join(number, has_heard)
            await self._rest(count)
        if reader.revalidator is not None and (same := await self._unchanged(reader.revalidator)):
            put(same)
        wanted = sorted([*self._leads, *self._direct])
        if not wanted:
            return
        try:
            await self._read(wanted, put)
        except Exception as error:
            if served := await self._stale_instead_of(error):
                put(served)
            if not served or len(served) < len(self._leads) + len(self._direct):
                raise

    async def _unchanged(self, revalidator: Revalidator) -> Group:
        """What is too old but still the same; notes which validators the others have before they are read.

        All keys at a time, and each of them once.
        """
        same: list[tuple[int, Buffer | None]] = []

        async def check_one(key: str, numbers: list[int]) -> None:
            for number in numbers:
                asked, (ticket, flight) = self._known(number), self._leads[number]
                value, check = await revalidator.compare(
                    self._io, key, self._prototype, asked[1], ticket, self._checks.get(key)
                )
                if check is not None:
                    self._checks[key] = check
                if value is not None:
                    self._brought(number, value, hit=True)
                    flight.deliver(freeze(value)[0])
                    self._close(number)
                    same.append((number, value))
            if key not in self._checks:
                now = self._reader.now()
                self._checks[key] = await revalidator.current(self._io, key), now

        keys = self._by_key(list(self._leads))
        await self._io.gather(
            [partial(check_one, *one) for one in keys.items() if revalidator.applies(one[0])]
        )
        return same

    async def _note_validators(self, revalidator: Revalidator, numbers: list[int]) -> None:
        """Have validators kept with what has come, where they are still the ones from before."""

        async def note(key: str, tickets: list[int], before: str) -> None:
            if await revalidator.current(self._io, key) == before:
                for ticket in tickets:
                    revalidator.note(key, ticket, before)

        known = [
            partial(note, key, [self._leads[number][0] for number in of_key], before)
            for key, of_key in self._by_key(numbers).items()
            if (before := self._checks.get(key, (None, 0.0))[0]) is not None
        ]
        await self._io.gather(known)

    def _by_key(self, numbers: list[int]) -> dict[str, list[int]]:
        """Those of these requests that this call leads, by their keys."""
        keys: dict[str, list[int]] = {}
        for number in numbers:
            if number in self._leads:
                keys.setdefault(self._known(number)[0], []).append(number)
        return keys

    async def _read(self, wanted: list[int], put: Put) -> None:
        """Hand what the source brings to all who wait for it."""
        try:
            await self._ask(wanted, put)
        except BaseExceptionGroup as error:
            # So says `get_ranges` that there is no such key.
            if says_missing(error):
                await self._deliver([(number, None) for number in list(self._leads)])
            raise

    async def _ask(self, wanted: list[int], put: Put) -> None:
        if self._io.loop() is None:
            groups: list[Group] = []
            await self._fetch(wanted, groups.append)
            for group in groups:
                put(await self._deliver(group))
            return
        async with Handover(partial(self._fetch, wanted), CANCEL_TIMEOUT) as brought:
            try:
                async for group in brought:
                    put(await self._deliver(group))
            except asyncio.CancelledError:
                # Before the source is waited for: who waits for this need not.
                self._close_all()
                raise

    async def _stale_instead_of(self, error: Exception) -> list[tuple[int, Buffer | None]]:
        """What is still cached of the requests that the source has not answered."""
        stale = self._reader.stale
        served: list[tuple[int, Buffer | None]] = []
        if not stale:
            return served
        for number in self._leads:
            key, byte_range = self._known(number)
            is_answer, value = await stale.instead_of(
                error, self._io, key, self._prototype, byte_range
            )
            if is_answer:
                self._open.discard(number)
                served.append((number, value))
        return served

    def count_bypassed(self, count: int) -> None:
        """Count requests that the cache never answers."""
        for _ in range(count):
            self._reader.counters.count("bypassed")
            self._reader.hits.count_miss()

    async def _rest(self, count: int) -> None:
        """Let others have their turn after so many of many steps, if they have waited for long."""
        if count % PIECE == 0 and turns.are_over():
            await self._io.pause()

    async def _join(self, number: int, has_heard: bool) -> None:
        asked, reader = self._known(number), self._reader
        now, ages = reader.now(), reader.hits.ages_of(asked[0])
        flight = Flight(self._io.loop(), now)
        reader.hits.begin(self._io)
        left_alone = not reader.breaker.allows()
        if left_alone:
            reader.counters.count("skipped")
        try:
            joined = await reader.handle.call(
                self._io, Index.join, *(*asked, flight, now, left_alone, *ages)
            )
        except IndexLockTimeout:
            # Its miss was counted when it was looked up.
            reader.counters.count("skipped")
            self._direct.add(number)
            return
        if isinstance(joined, int) and joined is not False:
            self._leads[number] = (joined, flight)
            flight.begun = True
            return
        # Another read brings it, or has brought it; perhaps this very call, for a duplicate.
        known = None
        if isinstance(joined, tuple):
            whole, other = joined
            if not has_heard and all(other is not own for _, own in self._leads.values()):
                reader.counters.count("skipped")
                self._direct.add(number)
                return
            if other.may_be_joined(now, ages[0]):
                known = Joined(whole, other, other.done)
        self._waits.append((number, known))

    async def _deliver(self, group: Group) -> Group:
        """Hand what has come to all who wait for it, and over to the cache."""
        reader = self._reader
        if reader.revalidator is not None:
            numbers = [number for number, found in group if found is not None]
            await self._note_validators(reader.revalidator, numbers)
        for count, (number, found) in enumerate(group, 1):
            await self._rest(count)
            lead = self._leads.get(number)
            if lead is None:
                if number in self._direct:
                    self._direct.discard(number)
                    if number in self._open:
                        self._open.discard(number)
                        reader.hits.brought_past_cache(*self._known(number), found)
                continue
            ticket, flight = lead
            asked = self._known(number)
            self._brought(number, found)
            if found is None:
                await reader.deliver_absence(self._io, asked[0], ticket, flight)
                del self._leads[number]
                continue
            data, buffer = freeze(found)
            flight.deliver(data)
            if (fill_now := reader.backend.fill_now) is not None:
                buffer = to_cpu_buffer(data) if buffer is None else buffer
                taken = fill_now(*asked, data, buffer, ticket, flight.fetched) is not None
            else:
                taken = await reader.fills.put(
                    self._io, FillJob(*asked, data, ticket, flight.fetched, reader.backend)
                )
            if taken:
                del self._leads[number]
            else:
                self._close(number)
        return group

    def _close_all(self) -> None:
        for number in list(self._leads):
            self._close(number)

    def _close(self, number: int) -> None:
        ticket, flight = self._leads.pop(number)
        # Closed first: woken readers would else join it again.
        self._reader.close_flight(self._requests[number][0], ticket)
        flight.abandon()  # Of no effect once it is delivered.


def from_partial_values(
    source: Store, prototype: BufferPrototype, requests: Sequence[Request]
) -> Fetch:
    """Ask a source for requests of any keys."""

    async def fetch(numbers: list[int], put: Put) -> None:
        asked = [requests[number] for number in numbers]
        found = await source.get_partial_values(prototype, asked)
        put(list(zip(numbers, found, strict=True)))

    return fetch


def from_ranges(
    source: Any, prototype: BufferPrototype, requests: Sequence[Request], options: dict[str, int]
) -> Fetch:
    """Ask a source for ranges of one key."""
    if not hasattr(source, "get_ranges"):  # zarr before 3.3
        return from_partial_values(source, prototype, requests)

    async def fetch(numbers: list[int], put: Put) -> None:
        key = requests[0][0]
        asked = [requests[number][1] for number in numbers]
        # Nothing is awaited in between: its `TaskGroup` may cancel the task while it is suspended.
        async for group in source.get_ranges(key, asked, prototype=prototype, **options):
            put([(numbers[at], value) for at, value in group])

    return fetch


def from_ranges_sync(
    source: Any, prototype: BufferPrototype, requests: Sequence[Request], options: dict[str, int]
) -> Fetch:
    """Ask a source for ranges of one key without an event loop."""

    async def fetch(numbers: list[int], put: Put) -> None:
        key = requests[0][0]
        asked = [requests[number][1] for number in numbers]
        if not hasattr(source, "get_ranges_sync"):  # zarr before 3.4
            values = [source.get_sync(key, prototype=prototype, byte_range=r) for r in asked]
            put(list(zip(numbers, values, strict=True)))
            return
        found = source.get_ranges_sync(key, asked, prototype=prototype, **options)
        put([(numbers[at], value) for at, value in found])

    return fetch
