"""The protocol: what happens between two steps of the index, for reads, writes and deletes.

Every method is a coroutine that is told how to reach the stores (`Traffic`): from an event loop, or
blocking, in which case it never suspends. So there is one protocol for both surfaces. ARCHITECTURE.md
shows its states and transitions.

Nothing here raises because of the cache store: only the source's own errors, and cancellations,
leave these methods.
"""

from __future__ import annotations

import os
import threading
import uuid
import weakref
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from zarr.storage import LocalStore, MemoryStore

from zcache import _books, _flights, _identity, _ports
from zcache._books import Books
from zcache._breaker import Breaker
from zcache._core import Index, cache_key, crc32c, select
from zcache._flights import Flight
from zcache._identity import identify, innermost, transient
from zcache._ports import Outcome, ports
from zcache._spans import Span, is_encodable, is_known, is_reserved, to_request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._traffic import Traffic

    Hit = int | tuple[str, int, int, int, int | None, int | None]

T = TypeVar("T")
Victim = tuple[int, str]
RETRIES: Final = 4
"""Orphans (bytes whose delete failed) that one fill or write tries again to delete."""
DEFAULT_FREE_SPACE: Final = 2**30
"""Bytes of a volume that stay free unless `min_free_space` says otherwise, ..."""
DEFAULT_FREE_PART: Final = 20
"""... and the part of a small volume: one in so many bytes."""
_ROUNDS: Final = 16
_WAITS_FOR_THE_DEAD: Final = frozenset({"no room", "busy", "index not complete"})
"""Refusals that may be due to a process that has died."""


class Engine:
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
        self.cache = cache
        self.max_size = max_size
        self.max_age = max_age
        self._token = token
        self.verify = verify
        self.adopt = adopt
        self.min_free_space = min_free_space
        # These slice a value as Python does, whatever the request.
        self.lenient = isinstance(innermost(source), (MemoryStore, LocalStore))
        self.identity = source_id or identify(source) or transient(source)
        self.books = Books(
            source,
            cache,
            self.identity,
            adopt=adopt,
            max_size=max_size,
            max_age=None if max_age == "infinity" else max_age,
            lenient=self.lenient,
            flat=isinstance(cache, MemoryStore),
            verify=verify,
        )
        self.port, self.sync_port = ports(cache, self.books)
        self.breaker = Breaker(cache)
        # Reentrant, for the garbage collector may end a reader inside.
        self._counting = threading.RLock()
        self.bypassed = 0
        self.damaged = 0
        _engines.add(self)

    @property
    def token(self) -> str:
        """Names this engine, so that copies that meet again in one process are one."""
        with _lock:
            if self._token is None:
                self._token = uuid.uuid4().hex
            _by_token[self._token] = self
            return self._token

    @property
    def index(self) -> Index:
        """The index; another one after a fork."""
        index: Index = self.books.index
        return index

    def ask(self, question: Callable[[Index], T]) -> T:
        """Ask the index something, whatever it takes."""
        return self.books.must(lambda: question(self.index))

    def now(self) -> float:
        """Seconds on the clock that ages are counted by."""
        return self.books.now()

    def count(self, what: Literal["bypassed", "damaged"]) -> None:
        """Count one more; `+=` alone loses some without the GIL."""
        with self._counting:
            setattr(self, what, getattr(self, what) + 1)

    # ------------------------------------------------------------------ reads

    async def get(
        self,
        io: Traffic,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None,
        span: Span | None,
    ) -> Buffer | None:
        """Read a value or a range of it. `span` is `byte_range` as the index takes it."""
        try:
            value = await self.cached(io, key, prototype, span)
        except UnicodeEncodeError:
            value = None
        if value is not None:
            return value
        # Only known keys are ever held, so a hit needs no such check.
        if not is_known(key):
            return await self.bypass(io, key, prototype, byte_range)
        return await self.fetch(io, key, prototype, byte_range, span)

    async def cached(
        self, io: Traffic, key: str, prototype: BufferPrototype, span: Span | None
    ) -> Buffer | None:
        """Read from the cache store; None where it cannot serve the request."""
        hit = await self.books.step(io, self.index.lookup, key, span, self.now())
        return None if hit is None else await self._serve(io, key, prototype, span, hit)

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
            self.books.must(self.index.missed)
            return None
        if isinstance(hit, int):
            name, total, start, size, handle, checksum = key, hit, 0, hit, None, None
        else:
            name, total, start, size, handle, checksum = hit
        part: Span | None = None
        # Bytes that are not verified yet are read as a whole, for so goes the checksum.
        if handle is None and size < total:
            if size == 0:
                # Nothing to read, and stores differ in what they make of an empty range.
                return prototype.buffer.from_bytes(b"")
            # Up to the end, whatever its place: the length then tells whether the value is still the
            # one of the entry. Of a longer one these numbers would select something else.
            part = (2, start, 0) if start + size == total else (1, start, start + size)
        try:
            value = await io.port.read(name, prototype, to_request(part))
        except Exception as error:  # noqa: BLE001 - whatever the cache store raises, the source serves
            self.breaker.failed(error)
        else:
            self.breaker.succeeded()
            if value is not None and len(value) == (size if handle is None else total):
                if handle is None:
                    return value
                data = snapshot(value)
                found = crc32c(data)
                if checksum is None or checksum == found:
                    self.books.must(self.index.verified, handle, found)
                    if size == total:
                        return value
                    return prototype.buffer.from_bytes(data[start : start + size])
            self.count("damaged")
        victims = await self.books.step(io, self.index.discard, key, span, self.now())
        await self.drop(io, victims)
        return None

    async def fetch(
        self,
        io: Traffic,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None,
        span: Span | None,
    ) -> Buffer | None:
        """Read what is not cached: from the source, or together with whoever reads it already."""
        while True:
            flight = Flight(io.loop())
            # Where the cache store is out of use, what it holds does not count.
            usable = self.breaker.allows()
            joined = await self.books.step(
                io, self.index.join, key, span, flight, self.now(), not usable
            )
            if joined is None:
                value = await self.cached(io, key, prototype, span)
                if value is not None:
                    return value
                continue
            if isinstance(joined, int):
                return await self._lead(io, key, prototype, byte_range, span, joined, flight)
            whole, other = joined
            if not await io.wait(other):
                # Its reader cannot go on: all who wait for it start over, and whoever comes later
                # does not join it.
                self.books.must(self.index.void_prefix, key)
                other.abandon()
            if other.abandoned:
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
        try:
            try:
                value = await io.read(key, prototype, byte_range)
                data = None if value is None else snapshot(value)
            except Exception as error:
                flight.fail(error)
                raise
            except BaseException:
                flight.abandon()
                raise
            flight.deliver(data)
            if data is None:
                await self.drop(io, await self.books.step(io, self.index.forget, key))
            else:
                await self.fill(io, key, span, data, ticket)
        finally:
            self.books.must(self.index.land, key, ticket)
        return value

    # ------------------------------------------------------------------ fills

    async def fill(
        self, io: Traffic, key: str, span: Span | None, data: bytes, ticket: int
    ) -> None:
        """Cache a value, if there is room for it and the ticket allows."""
        if not self.breaker.allows():
            return
        books, index = self.books, self.index
        now = self.now()
        room = await books.step(io, index.reserve, key, span, len(data), ticket, now)
        if isinstance(room, str) and room in _WAITS_FOR_THE_DEAD and books.reap():
            room = await books.step(io, index.reserve, key, span, len(data), ticket, now)
        while not isinstance(room, str):
            reservation, victims = room
            outcome: tuple[list[int], list[int]] = [], []
            fits = False
            try:
                if victims:
                    outcome = await self._delete(io, victims)
                else:
                    fits = await self._has_space(io, len(data))
            except BaseException:
                self._give_up(books.must(index.abort, reservation))
                raise
            if victims:
                room = books.must(index.settle, reservation, *outcome, now)
                continue
            if fits:
                await self._write(io, key, span, data, reservation)
            else:
                await self.drop(io, books.must(index.abort, reservation))
            break
        await self.drop(io, books.must(index.orphans, RETRIES))

    async def _has_space(self, io: Traffic, size: int) -> bool:
        """Whether the volume stays as free as it should; makes room on it where that helps."""
        directory = self.books.directory
        if directory is None:
            return True
        for _ in range(_ROUNDS):
            try:
                free, volume = directory.free_space()
            except OSError as error:
                self.breaker.failed(error)
                return False
            wanted = self.min_free_space
            if wanted is None:
                wanted = min(DEFAULT_FREE_SPACE, volume // DEFAULT_FREE_PART)
            lacking = wanted + size - free
            if lacking <= 0:
                return True
            victims = self.books.must(self.index.evict, lacking, self.now())
            if not victims:
                break
            await self.drop(io, victims)
        return False

    async def _write(
        self, io: Traffic, key: str, span: Span | None, data: bytes, reservation: int
    ) -> None:
        name = key if span is None else cache_key(key, span)
        books, index = self.books, self.index
        checksum = crc32c(data)

        def late(error: BaseException | None) -> None:
            # Whoever read it is gone, but the value is as good as any.
            if error is None:
                victims = books.must(index.commit, reservation, checksum, self.now())
            else:
                victims = books.must(index.abort, reservation)
            self._give_up(victims or [])

        try:
            await io.port.write(name, data, late)
        except Exception as error:  # noqa: BLE001 - the value then stays uncached
            self.breaker.failed(error)
            await self.drop(io, books.must(index.abort, reservation))
            return
        self.breaker.succeeded()
        victims = books.must(index.commit, reservation, checksum, self.now())
        if victims is None:
            # The index was emptied meanwhile, and knows nothing of these bytes.
            await io.port.delete([name], lambda _: None)
        else:
            await self.drop(io, victims)

    # ---------------------------------------------------------------- deletes

    async def drop(self, io: Traffic, victims: list[Victim]) -> None:
        """Delete the bytes of entries that the index has dropped."""
        if victims:
            dropped, failed = await self._delete(io, victims)
            self.books.must(self.index.settled, dropped, failed)

    async def _delete(self, io: Traffic, victims: list[Victim]) -> tuple[list[int], list[int]]:
        """Delete bytes; returns the cells of those that are gone and of those that may not be."""
        if not self.breaker.allows():
            return [], [cell for cell, _ in victims]

        def late(outcome: Outcome | BaseException) -> None:
            if isinstance(outcome, BaseException):
                self._give_up(victims)
            else:
                self.books.must(self.index.settled, *self._sort(victims, outcome))

        try:
            outcome = await io.port.delete([name for _, name in victims], late)
        except Exception as error:  # noqa: BLE001 - whatever it is, the user did not ask for it
            outcome = [error] * len(victims)
        return self._sort(victims, outcome)

    def _sort(self, victims: list[Victim], outcome: Outcome) -> tuple[list[int], list[int]]:
        dropped, failed = [], []
        for (cell, _), error in zip(victims, outcome, strict=True):
            if error is None:
                dropped.append(cell)
            else:
                failed.append(cell)
                self.breaker.failed(error)
        if not failed:
            self.breaker.succeeded()
        return dropped, failed

    def _give_up(self, victims: list[Victim]) -> None:
        """Leave bytes to a later delete: they stay counted until then."""
        if victims:
            self.books.must(self.index.settled, [], [cell for cell, _ in victims])

    # ----------------------------------------------------------------- writes

    async def write(
        self,
        io: Traffic,
        key: str,
        work: Callable[[], Awaitable[None]],
        data: bytes | None,
    ) -> None:
        """Write one key of the source by `work`, and cache `data` where that is safe."""
        if not is_known(key):
            await self.change(io, key, work)
            return
        books, index = self.books, self.index
        ended = False

        def end(ok: bool) -> tuple[list[Victim], int | None]:
            nonlocal ended
            ended = True
            return books.must(index.end_write, key, ok and data is not None)

        def late(_: BaseException | None) -> None:
            self._give_up(end(ok=False)[0])

        victims = await books.step(io, index.begin_write, key)
        try:
            await self.drop(io, victims)
        except BaseException as interrupt:
            late(interrupt)
            raise
        try:
            await io.change(work(), late)
        except Exception:
            if not ended:
                await self.drop(io, end(ok=False)[0])
            raise
        victims, ticket = end(ok=True)
        try:
            await self.drop(io, victims)
            if ticket is not None and data is not None:
                await self.fill(io, key, None, data, ticket)
        finally:
            if ticket is not None:
                books.must(index.land, key, ticket)

    async def change(self, io: Traffic, prefix: str, work: Callable[[], Awaitable[None]]) -> None:
        """Change the source below a prefix by `work`; nothing below it stays cached."""
        prefix = prefix.rstrip("/")
        if not is_known(prefix):
            if is_reserved(prefix) or not is_encodable(prefix):
                # Nothing is ever cached below it.
                await io.change(work(), lambda _: None)
                return
            # It may name anything, by another name.
            prefix = ""

        def late(_: BaseException | None) -> None:
            self._sweep_now(prefix)

        await self._sweep(io, prefix)
        try:
            await io.change(work(), late)
        except Exception:
            await self._sweep(io, prefix)
            raise
        await self._sweep(io, prefix)

    async def _sweep(self, io: Traffic, prefix: str) -> None:
        """Drop everything below a prefix, and void what is on its way there."""
        try:
            await self.books.step(io, self.index.void_prefix, prefix)
            while victims := await self.books.step(io, self.index.sweep, prefix):
                await self.drop(io, victims)
        except BaseException:
            self._sweep_now(prefix)
            raise

    def _sweep_now(self, prefix: str) -> None:
        """Drop everything below a prefix at once, and leave the bytes to later deletes."""
        self.books.must(self.index.void_prefix, prefix)
        while victims := self.books.must(self.index.sweep, prefix):
            self._give_up(victims)

    async def clear(self, io: Traffic) -> None:
        """Empty the cache; the source stays as it is."""
        await self._sweep(io, "")
        await self.drop(io, self.books.must(self.index.orphans, 2**31))

    # ------------------------------------------------------------------- forks

    def after_fork(self) -> None:
        """Start over with what the parent's other threads had in flight."""
        self._counting = threading.RLock()
        self.breaker = Breaker(self.cache)
        self.books.after_fork()


def snapshot(value: Buffer) -> bytes:
    """The bytes of a buffer, out of reach of whoever holds it."""
    return value.to_bytes()


# Guards the making of tokens; never held over anything that waits.
_lock = threading.Lock()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_by_token: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()


def find(token: str) -> Engine | None:
    """The engine of this process with this token."""
    return _by_token.get(token)


def find_or_add(engine: Engine) -> Engine:
    """The engine of this process with the token of this one, which is this one if there is none."""
    with _lock:
        return _by_token.setdefault(engine._token or "", engine)


def after_fork() -> None:
    """Make everything usable in a forked child."""
    global _lock
    _lock = threading.Lock()
    _flights.after_fork()
    _ports.after_fork()
    _books.after_fork()
    _identity.after_fork()
    for engine in list(_engines):
        engine.after_fork()


os.register_at_fork(after_in_child=after_fork)
