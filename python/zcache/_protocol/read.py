"""Reads: a hit, or a miss that one of its readers brings from the source for all of them.

Every method is a coroutine that is told how to reach the source (`IO`): from an event loop, or
blocking, in which case it never suspends. So there is one protocol for both surfaces. Nothing here
raises because of the cache store while the source is asked: only the source's own errors, and
cancellations, leave these methods. Offline, what is not cached or cannot be looked up is an `OfflineError`.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from zcache._backends.base import ABSENT, BUSY, FillJob
from zcache._core import Index, is_cacheable_key, select
from zcache._index.handle import ignore
from zcache._index.resolution import RETRYABLE
from zcache._protocol.revalidate import Revalidator
from zcache._protocol.single_flight import Flight
from zcache._protocol.stale import StaleValues
from zcache._runtime.buffers import freeze, to_cpu_buffer
from zcache._runtime.turns import turns
from zcache._source.offline import locked, miss
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._backends.base import Hit, Victim
    from zcache._byte_ranges import ByteRange
    from zcache._protocol.hits import Hits
    from zcache._runtime.io import IO
    from zcache._source.validators import Validators


class Joined(NamedTuple):
    """A flight that was joined, what it brings, and whether it had brought that: on its way into the cache store."""

    whole: ByteRange | None
    flight: Flight
    is_pending: bool


class Reader:
    """Reads through one cache.

    Parameters
    ----------
    hits : Hits
        What it holds.
    offline : bool
        Whether the source is not asked.
    revalidate : bool or "metadata"
        Which keys are compared with the source when they are too old.
    validators : Validators, optional
        Those of the source, if it has any.
    stale_if_error : float
        Seconds past its age for which a value is served where the source raises.
    source_name : str
        For the log.
    slices_like_python : bool
        Whether the source slices a value as Python does, whatever the request.
    times_source : bool, optional
        Whether the index is told how long the source takes. Default is False.

    Attributes
    ----------
    revalidator : Revalidator or None
        Compares what is too old with the source.
    slices_like_python : bool
        As given.
    stale : StaleValues
        What is served in place of an error of the source.
    """

    def __init__(
        self,
        hits: Hits,
        *,
        offline: bool,
        revalidate: Literal[False, True, "metadata"],
        validators: Validators | None,
        stale_if_error: float,
        source_name: str,
        slices_like_python: bool,
        times_source: bool = False,
    ) -> None:
        self.hits = hits
        self._times_source = times_source
        self.backend = backend = hits.backend
        self.handle, self.breaker, self.counters = hits.handle, hits.breaker, hits.counters
        self.fills = backend.shared.fills
        self.now, self.ages = hits.now, hits.ages
        self.slices_like_python = slices_like_python
        self.offline = offline
        self.revalidator: Revalidator | None = None
        if revalidate and validators is not None:
            self.revalidator = Revalidator(hits, validators, revalidate)
        self.stale = StaleValues(hits, stale_if_error, source_name)
        self._may_be_stale = stale_if_error > 0
        self._fill_now = backend.fill_now

    async def get(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        hit: Hit | None,
    ) -> Buffer | None:
        """Read a value or a range of it, after `get_nowait` has not brought it.

        `byte_range` is `request` as the index takes it, `hit` what the index has found.
        """
        try:
            is_answer, value = await self.hits.serve(io, key, prototype, byte_range, hit)
        except IndexLockTimeout:
            if self.offline:
                return await self._fetch_offline(io, key, prototype, byte_range, is_known=False)
            return await self.skip(io, key, prototype, request, byte_range)
        if is_answer:
            return value
        return await self.fetch(io, key, prototype, request, byte_range)

    async def skip(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
    ) -> Buffer | None:
        """Read the source, for the index does not answer."""
        self.counters.count("skipped")
        value = await io.read(key, prototype, request)
        self.hits.brought_past_cache(key, byte_range, value)
        return value

    async def bypass(
        self, io: IO, key: str, prototype: BufferPrototype, request: ByteRequest | None
    ) -> Buffer | None:
        """Read what the cache never holds."""
        self.counters.count("bypassed")
        return await io.read(key, prototype, request)

    def fetch(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        joined: Joined | None = None,
    ) -> Awaitable[Buffer | None]:
        """Read what is not cached: from the source, or together with others who read it already.

        `joined` is a flight that was joined before. The answer is to be awaited at once, for it may be the leader that others wait for.
        """
        if self.offline:
            return self._fetch_offline(io, key, prototype, byte_range)
        # A synchronous read cannot wait for a turn, also where a loop runs in its thread.
        waits = self._fill_now is None and joined is None and io.loop() is not None
        if waits and not turns.begins():
            work: Awaitable[Buffer | None] = self._fetch_in_turn(
                io, key, prototype, request, byte_range
            )
        else:
            work = self._fetch(io, key, prototype, request, byte_range, joined)
        return (
            self.stale.or_stale(work, io, key, prototype, byte_range)
            if self._may_be_stale
            else work
        )

    async def _fetch_offline(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRange | None,
        *,
        is_known: bool = True,
    ) -> Buffer | None:
        """Read what was not found, once all is known that is cached; the source is not asked.

        Unless `is_known`, the index has not answered whether it is cached.
        """
        with self.answers_offline(key):
            if await self.hits.wait_until_complete(io) or not is_known:
                self.hits.retract_miss(key, byte_range)
                is_answer, value = await self.hits.cached(io, key, prototype, byte_range)
                if is_answer:
                    return value
            if await self.hits.is_ruled_out(io, key):
                self.hits.recount_as_negative_hit(key, byte_range)
                return None
        raise miss(key)

    @contextlib.contextmanager
    def answers_offline(self, key: str) -> Iterator[None]:
        """Have an `OfflineError` name the lock of the index, where that is why it is not known what is cached of a key."""
        try:
            yield
        except IndexLockTimeout as error:
            if not is_cacheable_key(key):
                raise miss(key) from None
            self.counters.count("skipped")
            raise locked(key) from error

    async def known_size(self, io: IO, key: str) -> int | Literal[False] | None:
        """Bytes of a value that is cached as a whole; `ABSENT`; or None where that is not known."""
        if not self.offline:
            try:
                return await self.hits.cached_size(io, key)
            except IndexLockTimeout:
                return None
        with self.answers_offline(key):
            size = await self.hits.cached_size(io, key)
            if size is None and await self.hits.wait_until_complete(io):
                size = await self.hits.cached_size(io, key)
            if size is None and await self.hits.is_ruled_out(io, key):
                return ABSENT
        return size

    async def _fetch_in_turn(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
    ) -> Buffer | None:
        await turns.wait()
        return await self._fetch(io, key, prototype, request, byte_range, None)

    def _fetch(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        joined: Joined | None,
    ) -> Awaitable[Buffer | None]:
        answer: Any = joined and joined[:2]
        was_pending = None if joined is None else joined.is_pending
        handle = self.handle
        if joined is None and handle.opening is None:
            if handle.deferred:
                handle.take_deferred()
            self.hits.begin(io)
            now = self.now()
            flight = Flight(io.loop(), now)
            # Where the cache store is left alone, what it holds does not count.
            left_alone = bool(self.breaker.failing) and not self.breaker.allows()
            if left_alone:
                self.counters.count("skipped")
            try:
                ages = self.hits.ages_of(key)
                answer = handle.index.join(key, byte_range, flight, now, left_alone, *ages)
            except RETRYABLE:
                pass
            else:
                if answer.__class__ is int:
                    # One coroutine less where no other reader waits, which is nearly always.
                    return self._lead(io, key, prototype, request, byte_range, answer, flight)
        return self._share(io, key, prototype, request, byte_range, answer, was_pending)

    async def _share(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        joined: Any,
        was_pending: bool | None,
    ) -> Buffer | None:
        """Go on with what `join` has answered; None where it is to be asked (again).

        A flight that was joined before is an answer in any case; `was_pending` says what it was then, else None.
        """
        has_heard = was_pending is not None or not self.backend.tells_by_name
        while True:
            flight = Flight(io.loop(), self.now())
            if joined is None:
                joined, is_answer, value = await self._join(io, key, prototype, byte_range, flight)
                if is_answer:
                    return value
                if joined is None:
                    continue
            if joined is False:
                # Only cacheable keys are ever held, so a hit needs no such check.
                return await self.bypass(io, key, prototype, request)
            if joined is BUSY:
                return await self.skip(io, key, prototype, request, byte_range)
            if isinstance(joined, int):
                leads = self._lead(io, key, prototype, request, byte_range, joined, flight)
                del flight
                return await leads
            (whole, other), joined = joined, None
            if not has_heard:
                # It may have begun before a change that the index does not know of.
                if not await self.backend.hear_of_changes(io):
                    return await self.skip(io, key, prototype, request, byte_range)
                has_heard = True
                continue
            follows = self._follow(
                io, key, prototype, request, byte_range, whole, other, was_pending
            )
            del other
            is_answer, value = await follows
            if is_answer:
                return value
            was_pending = None

    async def _follow(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        whole: ByteRange | None,
        other: Flight,
        was_pending: bool | None,
    ) -> tuple[bool, Buffer | None]:
        """Wait for a flight that brings `whole`; whether that gave an answer, and the answer."""
        before = was_pending is not None
        counts = before or other.may_be_joined(self.now(), self.ages.of(key))
        is_pending = other.done if was_pending is None else was_pending
        if not counts and not other.is_cut_off:
            # It goes on for those who were in time.
            with contextlib.suppress(IndexLockTimeout):
                await self.handle.call(io, Index.supersede_flight, key, other)
            return False, None
        if not counts or not await io.wait(other):
            # Its leader cannot go on: all who wait for it start over, and later readers do not join it.
            with contextlib.suppress(IndexLockTimeout):
                await self.handle.call(io, Index.abort_flight, key, other)
            other.abandon()
        if not counts or other.must_ask_again(prototype.buffer):
            return False, None
        if other.error is not None:
            # From where it was raised: it would else collect the frames of all who wait.
            try:
                raise other.error.with_traceback(other.trace)
            finally:
                del other
        if other.data is None:
            self.hits.brought(key, byte_range, None)
            return True, None
        part = self._part(other.data, whole, byte_range)
        if part is None:
            value = await io.read(key, prototype, request)
            self.hits.brought_past_cache(key, byte_range, value)
            return True, value
        # What is on its way into the cache store is served by the cache, not by the source.
        self.hits.followed(key, byte_range, len(part), whole, len(other.data), hit=is_pending)
        return True, prototype.buffer.from_bytes(part)

    async def _join(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRange | None,
        flight: Flight,
    ) -> tuple[Any, bool, Buffer | None]:
        """What `join` answers, waiting for the index if need be; and what is known by now, if it is."""
        left_alone = not self.breaker.allows()
        try:
            joined = await self.handle.call(
                io,
                Index.join,
                *(key, byte_range, flight, self.now(), left_alone),
                *(self.ages.of(key), self.hits.missing_ages(key)),
            )
            is_answer, value = False, None
            if joined is None:
                # Its lookup counted a miss; this one counts what the read comes to.
                self.hits.retract_miss(key, byte_range)
                is_answer, value = await self.hits.cached(io, key, prototype, byte_range)
        except IndexLockTimeout:
            return BUSY, False, None
        return joined, is_answer, value

    def _part(
        self, data: bytes, whole: ByteRange | None, byte_range: ByteRange | None
    ) -> bytes | None:
        """What `byte_range` selects of a flight that brings `whole`; None where sources differ."""
        if whole == byte_range:
            return data
        cut = select(len(data), byte_range, self.slices_like_python)
        return None if cut is None else data[cut[0] : cut[0] + cut[1]]

    async def _lead(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        ticket: int,
        flight: Flight,
    ) -> Buffer | None:
        """Read the source for all who wait, and hand what it brings over to the cache."""
        is_handed_over = False
        try:
            flight.begun = True
            is_cached = False
            try:
                revalidator = self.revalidator
                if revalidator is None or not revalidator.applies(key):
                    value = await self._read_source(io, key, prototype, request)
                else:
                    value, is_cached = await revalidator.read(
                        io, key, prototype, request, byte_range, ticket
                    )
                data, buffer = (None, None) if value is None else freeze(value)
            except Exception as error:
                flight.kind = prototype.buffer
                flight.fail(error)
                raise
            size = None if data is None else len(data)
            if is_cached:
                flight.deliver(data)
            elif data is None:
                await self.deliver_absence(io, key, ticket, flight)
                is_handed_over = True
            elif (fill_now := self._fill_now) is not None:
                # All steps of the fill in one call, for nothing in it waits.
                buffer = to_cpu_buffer(data) if buffer is None else buffer
                joined = fill_now(key, byte_range, data, buffer, ticket, flight.fetched)
                # Most flights have their leader alone, and a closed one cannot be joined.
                if joined is not False:
                    flight.deliver(data)
                is_handed_over = joined is not None
            else:
                flight.deliver(data)
                job = FillJob(key, byte_range, data, ticket, flight.fetched, self.backend)
                is_handed_over = await self.fills.put(io, job)
        finally:
            try:
                if not is_handed_over:
                    # Closed first: woken readers would else join it again.
                    self.close_flight(key, ticket)
            finally:
                if not is_handed_over:
                    flight.abandon()  # Of no effect on one that is delivered.
                # Its error has the frames of all who wait for it, so none of these keeps the flight.
                del flight
        # Last of all: until then its caller may be cut off, and takes the request back.
        self.hits.brought(key, byte_range, size, hit=is_cached)
        return value

    async def _read_source(
        self, io: IO, key: str, prototype: BufferPrototype, request: ByteRequest | None
    ) -> Buffer | None:
        if not self._times_source:
            return await io.read(key, prototype, request)
        begun = time.perf_counter()
        value = await io.read(key, prototype, request)
        if value is not None:
            seconds = time.perf_counter() - begun
            self.handle.call_later(ignore, Index.note_seconds, len(value), seconds)
        return value

    def close_flight(self, key: str, ticket: int) -> None:
        """Close a flight with a value that is not cached."""
        self.handle.call_later(ignore, Index.complete_flight, key, ticket)

    async def deliver_absence(self, io: IO, key: str, ticket: int, flight: Flight) -> None:
        """End a flight of a key that the source does not have; what is cached of that goes."""
        kept = self.hits.missing_max_age > 0 and self.backend.remembers_absences
        victims: Sequence[Victim] = ()
        # Where the lock is taken, later: no one waits for this.
        with contextlib.suppress(IndexLockTimeout):
            victims = await self.handle.call_shielded(
                io,
                self.backend.remove_later,
                Index.commit_absence,
                *(key, ticket, flight.fetched, self.now(), kept),
                timeout=0.0,
            )
        flight.deliver(None)
        if victims:
            await self.backend.remove(io, victims)
