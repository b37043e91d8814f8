"""Reads: a hit on the spot, a hit that has to wait, and a miss.

Every method is a coroutine that is told how to reach the source (`IO`): from an event loop, or
blocking, in which case it never suspends. So there is one protocol for both surfaces. Nothing here
raises because of the cache store: only the source's own errors, and cancellations, leave these methods.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final, Literal

from zcache._ages import METADATA, NODES
from zcache._backends.base import ABSENT, FillJob
from zcache._core import Index, crc32c, select
from zcache._index.handle import LOCK_TIMEOUT, RETRYABLE, IndexHandle, ignore
from zcache._protocol.revalidate import Revalidator
from zcache._protocol.single_flight import Flight
from zcache._protocol.stale import StaleValues
from zcache._runtime.buffers import freeze, snapshot, to_cpu_buffer
from zcache._runtime.threads import NoThreadError
from zcache._runtime.turns import turns
from zcache._source.offline import miss
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._ages import MaxAges
    from zcache._backends.base import Backend, Hit, TryRead, Victim
    from zcache._byte_ranges import ByteRange
    from zcache._runtime.io import IO
    from zcache._source.validators import Validators

BUSY: Final = -1
"""Stands for a hit or miss that is not known yet: the lock of the index was taken."""


COMPLETE_TIMEOUT: Final = 60.0
"""Seconds that a read waits, where the source is not asked, for the index to know all that is cached; ..."""
COMPLETE_PAUSE: Final = 0.02
"""... and between two looks."""


class Reader:
    """Reads through one cache.

    Parameters
    ----------
    backend : Backend
        The cache store, with its index.
    ages : MaxAges
        How old a value may be that is served.
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
    missing_max_age : float
        Seconds for which a key is remembered as missing at most; 0 for not at all.

    Attributes
    ----------
    revalidator : Revalidator or None
        Compares what is too old with the source.
    stale : StaleValues
        What is served in place of an error of the source.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        ages: MaxAges,
        missing_max_age: float,
        offline: bool,
        revalidate: Literal[False, True, "metadata"],
        validators: Validators | None,
        stale_if_error: float,
        source_name: str,
        slices_like_python: bool,
    ) -> None:
        self.backend = backend
        self.handle: IndexHandle = backend.shared.handle
        self.fills = backend.shared.fills
        self.breaker = backend.shared.breaker
        self.counters = backend.counters
        self._reads = self.counters.reads
        self.now = backend.shared.clock
        self._slices_like_python = slices_like_python
        self.ages = ages
        self.offline = offline
        # For a hit: an attribute that is looked up less.
        self._ageless, self._max_age, self._age_of = ages.is_ageless, ages.single, ages.by_key
        self.revalidator: Revalidator | None = None
        if revalidate and validators is not None:
            self.revalidator = Revalidator(self, validators, revalidate)
        self.stale = StaleValues(self, stale_if_error, source_name)
        self._may_be_stale = stale_if_error > 0
        self._missing_max_age = missing_max_age
        self._missing_ages = (_least(missing_max_age, ages.single), ages.single)
        self._try_read = backend.try_read
        self._fill_now = backend.fill_now
        self._begin = backend.begin if backend.works_in_background else None
        self.handle.watch(self)

    def use_index(self, index: Index) -> None:
        """Look keys up in this index from now on, and count in the counters of this cache."""
        self._lookup = index.view(self._reads).lookup

    def begin(self, io: IO) -> None:
        """Do what the cache store asks for by now; called by reads that are no hits."""
        if self._begin is not None:
            self._begin(io)

    # ------------------------------------------------------------------ ages

    def missing_ages(self, key: str) -> tuple[float, float | None]:
        """Seconds for which a key is remembered as missing: not longer than a value of it would be.

        And, for a metadata document, the greatest age of another that shows that there is its node.
        """
        age_of = self._age_of
        if age_of is None:
            return self._missing_ages
        node, slash, name = key.rpartition("/")
        age = age_of(key)
        own = _least(self._missing_max_age, age)
        if name not in METADATA:
            return own, age
        ages = [age_of(f"{node}{slash}{other}") for other in NODES]
        return own, min((one for one in ages if one is not None), default=None)

    # ------------------------------------------------------------------ hits

    def get_nowait(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRange | None
    ) -> tuple[Buffer | None, Hit | None]:
        """Look a key up, and read its value if that needs no waiting.

        Returns
        -------
        value : Buffer or None
            The value, where it could be read.
        hit : int or tuple or None
            Else what the index has found: None for a miss, `ABSENT` for a key that the source does not
            have, `BUSY` where it is not known yet.
        """
        try:
            if self._ageless:
                # More arguments take a tenth longer, and so does the clock.
                hit = self._lookup(key) if byte_range is None else self._lookup(key, byte_range)
            else:
                age_of = self._age_of
                max_age = self._max_age if age_of is None else age_of(key)
                hit = self._lookup(key, byte_range, self.now(), max_age)
            if hit is ABSENT:
                # Perhaps: most keys have no absence, and need no time to be found.
                hit = self._lookup(
                    key, byte_range, self.now(), self.ages.of(key), self.missing_ages(key)
                )
                if hit is ABSENT:
                    return None, ABSENT
        except RETRYABLE:
            return None, BUSY
        except UnicodeEncodeError:
            self._reads.count_miss()
            return None, None
        if hit is None or (try_read := self._try_read) is None or self.breaker.reads_fail:
            return None, hit
        if hit.__class__ is int:
            return try_read(key, prototype, hit, 0, hit), hit
        return self._try_read_part(try_read, prototype, hit), hit

    def _try_read_part(
        self, try_read: TryRead, prototype: BufferPrototype, hit: Any
    ) -> Buffer | None:
        """Read what is a part of a value, or was not verified yet, without waiting."""
        name, total, start, size, handle, checksum = hit
        if handle is None:
            return try_read(name, prototype, total, start, size)
        value = None if checksum is None else try_read(name, prototype, total, 0, total)
        if value is None:
            return None
        data, frozen = freeze(value)
        # What could change is given out as a copy, by the other way.
        if (frozen is None and not self.backend.owns_what_it_reads) or crc32c(data) != checksum:
            return None
        self.handle.call_later(ignore, Index.mark_verified, handle, checksum)
        return value if size == total else prototype.buffer.from_bytes(data[start : start + size])

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
            is_answer, value = await self.serve(io, key, prototype, byte_range, hit)
        except IndexLockTimeout:
            return await self.skip(io, key, prototype, request)
        if is_answer:
            return value
        return await self.fetch(io, key, prototype, request, byte_range)

    async def serve(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRange | None,
        hit: Hit | None,
    ) -> tuple[bool, Buffer | None]:
        """Read a hit from the cache store; whether it could serve the request, and the answer.

        Raises
        ------
        IndexLockTimeout
            If the index does not answer: then without it.
        """
        if hit is BUSY:
            try:
                hit = await self.handle.call(
                    io,
                    Index.lookup,
                    *(key, byte_range, self.now(), self.ages.of(key), self.missing_ages(key)),
                )
            except BaseException:
                self._reads.count_miss()
                raise
            if hit is ABSENT:
                self._reads.count_negative_hit()
            else:
                (self._reads.count_miss if hit is None else self._reads.count_hit)()
        if hit is ABSENT:
            self.begin(io)
            return True, None
        if hit is None:
            return False, None
        value = await self.serve_found(io, key, prototype, byte_range, hit, self.ages.of(key))
        return value is not None, value

    async def cached(
        self, io: IO, key: str, prototype: BufferPrototype, byte_range: ByteRange | None
    ) -> tuple[bool, Buffer | None]:
        """Read from the cache store; whether it could serve the request, and the answer."""
        value, hit = self.get_nowait(key, prototype, byte_range)
        if value is not None:
            return True, value
        return await self.serve(io, key, prototype, byte_range, hit)

    async def cached_size(self, io: IO, key: str) -> int | Literal[False] | None:
        """Bytes of a value that is cached as a whole; `ABSENT`; or None where that is not known."""
        # Where the cache store is left alone, `get` reads the source.
        if not self.breaker.allows():
            self.counters.count("skipped")
            return None
        try:
            return await self.handle.call(
                io,
                Index.peek,
                *(key, None, self.now(), self.ages.of(key), self.missing_ages(key)),
                timeout=LOCK_TIMEOUT,
            )
        except IndexLockTimeout:
            return None

    def count_miss(self) -> None:
        """Count a read that the index was not asked about."""
        self._reads.count_miss()

    async def skip(
        self, io: IO, key: str, prototype: BufferPrototype, request: ByteRequest | None
    ) -> Buffer | None:
        """Read the source, for the index does not answer."""
        self.counters.count("skipped")
        return await io.read(key, prototype, request)

    async def bypass(
        self, io: IO, key: str, prototype: BufferPrototype, request: ByteRequest | None
    ) -> Buffer | None:
        """Read what the cache never holds."""
        self.counters.count("bypassed")
        return await io.read(key, prototype, request)

    async def serve_found(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRange | None,
        hit: Hit,
        max_age: float | None,
    ) -> Buffer | None:
        """Read a hit from the cache store; None where that fails, upon which the entry is gone.

        `max_age` are the seconds with which it was found.
        """
        if not self.breaker.allows():
            # Counted as skipped where the source is asked.
            self._reads.recount_as_miss()
            return None
        if isinstance(hit, int):
            name, total, start, size, handle, checksum = key, hit, 0, hit, None, None
        else:
            name, total, start, size, handle, checksum = hit
        # Bytes that are not verified yet are read as a whole, for the checksum is of the whole.
        first, wanted = (start, size) if handle is None else (0, total)
        if self._try_read is not None and io.loop() is not None:
            try_read = await self.backend.turn(wanted)
            known = (name, total, start, size, handle, checksum)
            value = try_read and self._try_read_part(try_read, prototype, known)
            if value is not None:
                return value
        is_damaged = False
        try:
            value = await self.backend.read(io, name, prototype, total, first, wanted)
        except Exception as error:  # noqa: BLE001 - whatever the cache store raises, the source serves
            self.breaker.failed(error)
            if isinstance(error, (TimeoutError, NoThreadError)):
                # The entry may be good: it could not be read now.
                self._reads.recount_as_miss()
                return None
        else:
            self.breaker.succeeded()
            if value is not None and handle is None:
                return value
            if value is not None:
                value = await self._verify(io, prototype, value, hit)
                if value is not None:
                    return value
            is_damaged = True
        # One that was evicted since the index was asked is no damaged one.
        if await self._discard(io, key, byte_range, name, total, max_age) and is_damaged:
            self.counters.count("damaged")
        return None

    async def _verify(
        self, io: IO, prototype: BufferPrototype, value: Buffer, hit: Hit
    ) -> Buffer | None:
        """What was asked for of a whole value, if its checksum is right."""
        assert not isinstance(hit, int)
        name, total, start, size, handle, checksum = hit

        def part_and_checksum() -> tuple[bytes, int]:
            data = snapshot(value)
            return data if size == total else data[start : start + size], crc32c(data)

        part, found = await io.aside(total, part_and_checksum)
        if checksum is None:
            # The index was rebuilt, and does not know it; perhaps it is recorded beside the value.
            checksum = (self.backend.recorded_size_and_checksum(name) or (total, found))[1]
        if checksum != found:
            return None
        self.handle.call_later(ignore, Index.mark_verified, handle, found)
        return value if size == total else prototype.buffer.from_bytes(part)

    async def _discard(
        self,
        io: IO,
        key: str,
        byte_range: ByteRange | None,
        name: str,
        size: int,
        max_age: float | None,
    ) -> bool:
        """Drop an entry of this size that cannot be served; whether it was still there."""
        self._reads.recount_as_miss()
        intact = self.backend.intact_size(name)
        try:
            victims = await self.handle.call(
                io,
                Index.discard,
                *(key, byte_range, self.now(), size, max_age),
                timeout=LOCK_TIMEOUT,
            )
        except IndexLockTimeout:
            return False  # The next read finds the same.
        if victims:
            await self.backend.remove(io, victims)
        if victims and intact is not None and intact != size:
            self.handle.mark_corrupt()
        return bool(victims)

    # ---------------------------------------------------------------- misses

    def fetch(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        joined: tuple[ByteRange | None, Flight] | None = None,
    ) -> Awaitable[Buffer | None]:
        """Read what is not cached: from the source, or together with others who read it already.

        `joined` is a flight that was joined before, and what it brings. The answer is to be awaited at
        once, for it may be the leader that others wait for.
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
        self, io: IO, key: str, prototype: BufferPrototype, byte_range: ByteRange | None
    ) -> Buffer | None:
        """Read what was not found, once all is known that is cached; the source is not asked."""
        if await self.wait_until_complete(io):
            self.retract_miss()
            is_answer, value = await self.cached(io, key, prototype, byte_range)
            if is_answer:
                return value
        raise miss(key)

    def retract_miss(self) -> None:
        """Take a miss back, because the same read is looked up once more."""
        self._reads.retract_miss()

    async def wait_until_complete(self, io: IO) -> bool:
        """Wait until the index knows all that is cached, a minute at most; False where it does already."""
        with contextlib.suppress(IndexLockTimeout):
            if await self.handle.call(io, _is_complete, timeout=LOCK_TIMEOUT):
                return False
        self.backend.begin(io)
        until = time.monotonic() + COMPLETE_TIMEOUT
        while time.monotonic() < until:
            with contextlib.suppress(IndexLockTimeout):
                if await self.handle.call(io, _is_complete, timeout=LOCK_TIMEOUT):
                    break
            await io.pause(COMPLETE_PAUSE)
        return True

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
        joined: tuple[ByteRange | None, Flight] | None,
    ) -> Awaitable[Buffer | None]:
        answer: Any = joined
        handle = self.handle
        if joined is None and handle.open_first is None:
            if handle.deferred:
                handle.take_deferred()
            if self._begin is not None:
                self._begin(io)
            now = self.now()
            flight = Flight(io.loop(), now)
            # Where the cache store is left alone, what it holds does not count.
            left_alone = bool(self.breaker.failing) and not self.breaker.allows()
            if left_alone:
                self.counters.count("skipped")
            try:
                age_of = self._age_of
                max_age = self._max_age if age_of is None else age_of(key)
                missing = self._missing_ages if age_of is None else self.missing_ages(key)
                answer = handle.index.join(
                    key, byte_range, flight, now, left_alone, max_age, missing
                )
            except RETRYABLE:
                pass
            else:
                if answer.__class__ is int:
                    # One coroutine less where no other reader waits, which is nearly always.
                    return self._lead(io, key, prototype, request, byte_range, answer, flight)
        return self._share(io, key, prototype, request, byte_range, answer, joined is not None)

    async def _share(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        joined: Any,
        before: bool,
    ) -> Buffer | None:
        """Go on with what `join` has answered; None where it is to be asked (again).

        `before` says that the flight was joined before, so its end is an answer in any case.
        """
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
                return await self.skip(io, key, prototype, request)
            if isinstance(joined, int):
                return await self._lead(io, key, prototype, request, byte_range, joined, flight)
            (whole, other), joined = joined, None
            is_answer, value = await self._follow(
                io, key, prototype, request, byte_range, whole, other, before
            )
            if is_answer:
                return value
            before = False

    async def _follow(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        whole: ByteRange | None,
        other: Flight,
        before: bool,
    ) -> tuple[bool, Buffer | None]:
        """Wait for a flight that brings `whole`; whether that gave an answer, and the answer."""
        counts = before or other.may_be_joined(self.now(), self.ages.of(key))
        is_pending = other.done and not before
        if not counts or not await io.wait(other):
            # Its leader cannot go on: all who wait for it start over, and later readers do not join it.
            with contextlib.suppress(IndexLockTimeout):
                await self.handle.call(io, Index.abort_flight, key, other, timeout=LOCK_TIMEOUT)
            other.abandon()
        if not counts or other.must_ask_again(prototype.buffer):
            return False, None
        if other.error is not None:
            # From where it was raised: it would else collect the frames of all who wait.
            raise other.error.with_traceback(other.trace)
        if other.data is None:
            return True, None
        part = self._part(other.data, whole, byte_range)
        if part is None:
            return True, await io.read(key, prototype, request)
        if is_pending:
            # On its way into the cache store: served by the cache, not by the source.
            self.recount_as_hit()
        return True, prototype.buffer.from_bytes(part)

    def recount_negative_as_miss(self) -> None:
        """Count a negative hit as a miss: only the source knows what its answer is."""
        self._reads.recount_negative_as_miss()

    def recount_as_negative_hit(self) -> None:
        """Count a miss as a negative hit: an absence has answered it after all."""
        self._reads.recount_as_negative_hit()

    def recount_as_hit(self) -> None:
        """Count a miss as a hit: a value on its way into the cache store has served it."""
        self._reads.recount_as_hit()

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
                *(self.ages.of(key), self.missing_ages(key)),
                timeout=LOCK_TIMEOUT,
            )
            is_answer, value = False, None
            if joined is None:
                # Its lookup counted a miss; this one counts what the read comes to.
                self._reads.retract_miss()
                is_answer, value = await self.cached(io, key, prototype, byte_range)
        except IndexLockTimeout:
            return BUSY, False, None
        return joined, is_answer, value

    def _part(
        self, data: bytes, whole: ByteRange | None, byte_range: ByteRange | None
    ) -> bytes | None:
        """What `byte_range` selects of a flight that brings `whole`; None where sources differ."""
        if whole == byte_range:
            return data
        cut = select(len(data), byte_range, self._slices_like_python)
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
                    value = await io.read(key, prototype, request)
                else:
                    value, is_cached = await revalidator.read(
                        io, key, prototype, request, byte_range, ticket
                    )
                data, buffer = (None, None) if value is None else freeze(value)
            except Exception as error:
                flight.kind = prototype.buffer
                flight.fail(error)
                raise
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
        return value

    def close_flight(self, key: str, ticket: int) -> None:
        """Close a flight whose value is not cached."""
        self.handle.call_later(ignore, Index.complete_flight, key, ticket)

    async def deliver_absence(self, io: IO, key: str, ticket: int, flight: Flight) -> None:
        """End a flight of a key that the source does not have; what is cached of that goes."""
        kept = self._missing_max_age > 0 and self.backend.remembers_absences
        victims: Sequence[Victim] = ()
        # Where the lock is taken, later: nobody waits for this.
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


def _is_complete(index: Index) -> bool:
    return index.is_complete


def _least(seconds: float, age: float | None) -> float:
    return seconds if age is None else min(seconds, age)
