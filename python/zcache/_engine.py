"""The protocol: what happens between two steps of the index, for reads, writes and deletes.

Every method is a coroutine that is told how to reach the stores (`Traffic`): from an event loop, or
blocking, in which case it never suspends. So there is one protocol for both surfaces. ARCHITECTURE.md
shows its states and transitions.

Nothing here raises because of the cache store: only the source's own errors, and cancellations,
leave these methods.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from zarr.abc.store import SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore

from zcache import _registry
from zcache._books import Books, LateError
from zcache._breaker import Breaker
from zcache._buffers import freeze, snapshot, to_cpu_buffer
from zcache._changes import Changes
from zcache._core import Index, crc32c, select
from zcache._fills import NOT_NOW, ignore
from zcache._flights import Flight
from zcache._identity import Named, identify, innermost, transient
from zcache._ports import MemoryPort, ports
from zcache._quick import FileReader, quick_reader
from zcache._spans import Span, to_request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._core import Reservation
    from zcache._quick import QuickReader
    from zcache._traffic import Traffic

    Hit = int | tuple[str, int, int, int, int | None, int | None]

T = TypeVar("T")
AGAIN: Final = -1
"""Stands for a hit or miss that is not known yet: the lock of the index was taken."""


class Engine(Changes):
    """What all stores over one cache share: index, cache store, flights, counters."""

    def __init__(
        self,
        source: Store,
        cache: Store,
        *,
        max_size: int | None,
        max_age: float | Literal["infinity"],
        token: str | None = None,
        verify: str = "first",
        adopt: bool = False,
        source_id: str | None = None,
        min_free_space: int | None = None,
    ) -> None:
        self.source = source
        self.cache = cache
        # The process that it was made in, unless by a copy.
        self.home = None if token else os.getpid()
        self.max_size = max_size
        self.max_age = max_age
        self.known_as = token
        self.verify = verify
        self.adopt = adopt
        self.min_free_space = min_free_space
        # These slice a value as Python does, whatever the request.
        self.lenient = _slices(innermost(source))
        self.identity = source_id or identify(source) or transient(source)
        self.breaker = Breaker(cache)
        self.books = Books(
            Named(source, self.identity, source_id is not None),
            cache,
            adopt=adopt,
            breaker=self.breaker,
            max_size=max_size,
            max_age=None if max_age == "infinity" else max_age,
            lenient=self.lenient,
            flat=isinstance(cache, MemoryStore),
            verify=verify,
        )
        self.port, self.sync_port = ports(cache, self.books)
        held = self.port.values if isinstance(self.port, MemoryPort) else None
        self._values = held if type(held) is dict else None
        self._quick = quick_reader(cache)
        self._files = self._quick if isinstance(self._quick, FileReader) else None
        # Reentrant, for the garbage collector may end a reader inside.
        self._counting = threading.RLock()
        self.bypassed = 0
        self.damaged = 0
        self._left: set[int] = set()
        self._cut_off: list[Reservation] = []
        _registry.add(self)

    @property
    def token(self) -> str:
        """Names this engine, so that copies that meet again in one process are one."""
        return _registry.token(self)

    def ask(self, question: Callable[[Index], T]) -> T:
        """Ask the index something, whatever it takes."""
        return self.books.must(lambda: question(self.books.real()))

    def count(self, what: Literal["bypassed", "damaged"]) -> None:
        """Count one more; `+=` alone loses some without the GIL."""
        with self._counting:
            setattr(self, what, getattr(self, what) + 1)

    # ------------------------------------------------------------------ reads

    def glance(
        self, key: str, prototype: BufferPrototype, span: Span | None
    ) -> tuple[Buffer | None, Hit | None]:
        """Look something up, and read it if that takes no waiting.

        Returns the value, or else the hit, or None for a miss, to go on with.
        """
        books = self.books
        try:
            hit: Hit | None
            if span is None and books.ageless:
                hit = books.index.lookup(key)  # Three arguments take a tenth longer.
            else:
                hit = books.index.lookup(key, span, 0.0 if books.ageless else self.now())
        except NOT_NOW:
            return None, AGAIN
        except UnicodeEncodeError:
            return None, None
        if hit is None or (quick := self._quick) is None or self.breaker.in_trouble:
            return None, hit
        if hit.__class__ is int:
            return quick(key, prototype, hit, 0, hit), hit
        return self._glance_at(quick, prototype, hit), hit

    def _glance_at(self, quick: QuickReader, prototype: BufferPrototype, hit: Any) -> Buffer | None:
        """Read on the spot what is a part of a value, or was not verified yet; None says nothing."""
        name, total, start, size, handle, checksum = hit
        if handle is None:
            return quick(name, prototype, total, start, size)
        value = None if checksum is None else quick(name, prototype, total, 0, total)
        if value is None:
            return None
        data, frozen = freeze(value)
        # What is in memory and could change is given out as a copy.
        if (frozen is None and self._files is None) or crc32c(data) != checksum:
            return None
        self.books.soon(ignore, self.index.verified, handle, checksum)
        return value if size == total else prototype.buffer.from_bytes(data[start : start + size])

    async def get(
        self,
        io: Traffic,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None,
        span: Span | None,
        hit: Hit | None,
    ) -> Buffer | None:
        """Read a value or a range of it, after a glance has not brought it.

        `span` is `byte_range` as the index takes it, `hit` what the glance has found.
        """
        try:
            value = await self.serve(io, key, prototype, span, hit)
        except LateError:
            return await self.bypass(io, key, prototype, byte_range)
        if value is not None:
            return value
        return await self.fetch(io, key, prototype, byte_range, span)

    async def serve(
        self,
        io: Traffic,
        key: str,
        prototype: BufferPrototype,
        span: Span | None,
        hit: Hit | None,
    ) -> Buffer | None:
        """Read a hit from the cache store; None where it cannot serve the request.

        Raises
        ------
        LateError
            If the index does not answer: then without it.
        """
        if hit is AGAIN:
            step = self.books.step
            hit = await step(io, self.index.lookup, key, span, self.now(), for_ever=False)
        return None if hit is None else await self._serve(io, key, prototype, span, hit)

    async def cached(
        self, io: Traffic, key: str, prototype: BufferPrototype, span: Span | None
    ) -> Buffer | None:
        """Read from the cache store; None where it cannot serve the request."""
        value, hit = self.glance(key, prototype, span)
        return await self.serve(io, key, prototype, span, hit) if value is None else value

    def count_miss(self) -> None:
        """Count a read that the index was not asked about."""
        self.books.soon(ignore, self.index.count_miss)

    async def bypass(
        self, io: Traffic, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        """Read what the cache never holds."""
        self.count("bypassed")
        return await io.read(key, prototype, byte_range)

    async def _serve(
        self,
        io: Traffic,
        key: str,
        prototype: BufferPrototype,
        span: Span | None,
        hit: Hit,
    ) -> Buffer | None:
        """Read a hit from the cache store; None where that fails, upon which the entry is gone."""
        if not self.breaker.allows():
            self.books.soon(ignore, self.index.missed)
            return None
        if isinstance(hit, int):
            name, total, start, size, handle, checksum = key, hit, 0, hit, None, None
        else:
            name, total, start, size, handle, checksum = hit
        files = self._files
        if files is not None and not io.port.immediate:
            read = size if handle is None else total
            if await files.has_its_turn(read):
                known = (name, total, start, size, handle, checksum)
                value = self._glance_at(files, prototype, known)
                if value is not None:
                    return value
        part: Span | None = None
        wanted = total
        # Bytes that are not verified yet are read as a whole, for so goes the checksum.
        if handle is None and size < total:
            # Of nothing the last byte is read: an entry whose size is damaged would else go unnoticed,
            # and stores differ in what they make of an empty range.
            first, wanted = (start, size) if size else (total - 1, 1)
            # Up to the end, whatever its place: the length then tells whether the value is still the
            # one of the entry. Of a longer one these numbers would select something else.
            to_end = first + wanted == total
            part = (2, first, 0) if to_end else (1, first, first + wanted)
        try:
            value = await io.port.read(name, prototype, to_request(part))
        except Exception as error:  # noqa: BLE001 - whatever the cache store raises, the source serves
            self.breaker.failed(error)
        else:
            self.breaker.succeeded()
            # Of a range from the middle its own length tells nothing. By now the file is at hand.
            whole = None if part is None else io.port.size(name)
            if value is not None and len(value) == wanted and whole in (None, total):
                if handle is None:
                    return value if size or not total else prototype.buffer.from_bytes(b"")
                value = await self._verify(io, prototype, value, hit)
                if value is not None:
                    return value
            self.count("damaged")
        await self._discard(io, key, span, name, total)
        return None

    async def _verify(
        self, io: Traffic, prototype: BufferPrototype, value: Buffer, hit: Hit
    ) -> Buffer | None:
        """What was asked for of a whole value, if its checksum is right."""
        assert not isinstance(hit, int)
        name, total, start, size, handle, checksum = hit
        data = snapshot(value)
        found = crc32c(data)
        if checksum is None:
            # The index was rebuilt, and does not know it; perhaps the file does.
            checksum = (io.port.noted(name) or (total, found))[1]
        if checksum != found:
            return None
        self.books.soon(ignore, self.index.verified, handle, found)
        return value if size == total else prototype.buffer.from_bytes(data[start : start + size])

    async def _discard(
        self, io: Traffic, key: str, span: Span | None, name: str, size: int
    ) -> None:
        """Drop an entry of this size that cannot be served, unless another has taken its place."""
        whole = io.port.whole_size(name)
        step, discard = self.books.step, self.index.discard
        try:
            victims = await step(io, discard, key, span, self.now(), size, for_ever=False)
        except LateError:
            return  # Whoever reads it next finds the same.
        await self.drop(io, victims)
        if victims and whole is not None and whole != size:
            self.books.doubt()

    def fetch(
        self,
        io: Traffic,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None,
        span: Span | None,
        known: tuple[Span | None, Flight] | None = None,
    ) -> Awaitable[Buffer | None]:
        """Read what is not cached: from the source, or together with whoever reads it already.

        `known` is a flight that was joined before, and what it brings. The answer is to be awaited
        at once, for it may be the reader that others wait for.
        """
        joined: Any = known
        if known is None:
            flight, books = Flight(io.loop()), self.books
            # Where the cache store is out of use, what it holds does not count.
            out_of_use = bool(self.breaker.kinds) and not self.breaker.allows()
            now = 0.0 if books.ageless else books.now()
            try:
                joined = books.index.join(key, span, flight, now, out_of_use)
            except NOT_NOW:
                pass
            else:
                if joined.__class__ is int:
                    # One coroutine less where nobody else reads it, which is nearly always.
                    return self._lead(io, key, prototype, byte_range, span, joined, flight)
        return self._share(io, key, prototype, byte_range, span, joined, known is not None)

    async def _share(
        self,
        io: Traffic,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None,
        span: Span | None,
        joined: Any,
        before: bool,
    ) -> Buffer | None:
        """Go on with what `join` has answered; None where it is to be asked (again).

        `before` says that the flight was joined before, so its end is an answer in any case.
        """
        while True:
            flight = Flight(io.loop())
            if joined is None:
                joined, value = await self._join(io, key, prototype, span, flight)
                if value is not None:
                    return value
                if joined is None:
                    continue
            if joined is False:
                # Only known keys are ever held, so a hit needs no such check.
                return await self.bypass(io, key, prototype, byte_range)
            if isinstance(joined, int):
                return await self._lead(io, key, prototype, byte_range, span, joined, flight)
            (whole, other), joined = joined, None
            counts = before or other.has_answer(self.books.options["max_age"])
            before = False
            if not counts or not await io.wait(other):
                # Its reader cannot go on: all who wait for it start over, and whoever comes later
                # does not join it.
                with contextlib.suppress(LateError):
                    await self.books.step(io, self.index.strike, key, other, for_ever=False)
                other.abandon()
            if not counts or other.is_void_for(prototype.buffer):
                continue
            if other.error is not None:
                # From where it was raised: it would else collect the frames of all who wait.
                raise other.error.with_traceback(other.trace)
            if other.data is None:
                return None
            part = self._part(other.data, whole, span)
            if part is None:
                return await io.read(key, prototype, byte_range)
            return prototype.buffer.from_bytes(part)

    async def _join(
        self,
        io: Traffic,
        key: str,
        prototype: BufferPrototype,
        span: Span | None,
        flight: Flight,
    ) -> tuple[Any, Buffer | None]:
        """What `join` answers, waiting for the index if need be; and the value, if it is there by now."""
        step, now, out_of_use = self.books.step, self.now(), not self.breaker.allows()
        try:
            join = self.index.join
            joined = await step(io, join, key, span, flight, now, out_of_use, for_ever=False)
            value = await self.cached(io, key, prototype, span) if joined is None else None
        except LateError:
            return False, None
        return joined, value

    def _part(self, data: bytes, whole: Span | None, span: Span | None) -> bytes | None:
        """What `span` selects of a flight that brings `whole`; None where sources differ."""
        if whole == span:
            return data
        cut = select(len(data), span, self.lenient)
        return None if cut is None else data[cut[0] : cut[0] + cut[1]]

    async def _lead(
        self,
        io: Traffic,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None,
        span: Span | None,
        ticket: int,
        flight: Flight,
    ) -> Buffer | None:
        """Read the source for all who wait, and keep what it brings if the ticket allows."""
        landed = False
        try:
            flight.begun = True
            try:
                value = await io.read(key, prototype, byte_range)
                data, own = (None, None) if value is None else freeze(value)
            except Exception as error:
                flight.kind = prototype.buffer
                flight.fail(error)
                raise
            if data is not None and (values := self._values) is not None:
                # All steps of the fill in one call, for nothing in it waits.
                books = self.books
                own = to_cpu_buffer(data) if own is None else own
                joined = books.index.keep(values, key, span, data, own, ticket, books.now())
                # Most land alone, and nobody joins one that has landed.
                if joined is not False:
                    flight.deliver(data)
                landed = joined is not None
                return value
            flight.deliver(data)
            if data is None:
                await self.forget(io, key)
            else:
                landed = await self.fill(io, key, span, data, ticket)
        finally:
            try:
                if not landed and not self.is_left(ticket):
                    # Closed first: whoever is woken would else join it again, and again.
                    self.books.soon(ignore, self.books.index.land, key, ticket)
            finally:
                if not landed:
                    flight.abandon()  # Once it has ended that wakes whom nobody has woken yet.
        return value

    # ------------------------------------------------------------------- forks

    def after_fork(self) -> None:
        """Start over with what the parent's other threads had in flight."""
        self._counting = threading.RLock()
        self._left.clear()
        self.breaker = self.books.breaker = Breaker(self.cache)
        self.books.after_fork()


def _slices(source: Store) -> bool:
    """Whether a source slices a value as Python does, whatever the request."""
    if isinstance(source, LocalStore):
        return True
    # Of a suffix longer than the value some releases of zarr (3.1.6 is one) return its end.
    values = MemoryStore({"k": to_cpu_buffer(b"12")})
    end = values.get_sync("k", byte_range=SuffixByteRequest(3))
    return isinstance(source, MemoryStore) and end is not None and len(end) == 2
