"""Entries that are too old are compared with the source, and read again only where they are not the same.

Bytes and validator belong together only if one answer of the source gave both, or the source had the same
validator before and after it gave the bytes. Both go into the index in one step, the commit of the fill.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, Literal

from zcache._ages import METADATA
from zcache._core import Index
from zcache._index.handle import ignore
from zcache._protocol.single_flight import Flight
from zcache._runtime.fork import at_fork
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._byte_ranges import ByteRange
    from zcache._protocol.hits import Hits
    from zcache._runtime.io import IO
    from zcache._source.validators import Validators

    Check = tuple[str | None, float]
    """A validator, None where the source has told none, and when it was asked."""


class Revalidator:
    """Comparisons of one cache with its source.

    Parameters
    ----------
    hits : Hits
        What the cache holds.
    validators : Validators
        Those of the source.
    mode : True or "metadata"
        Which keys are compared.
    """

    def __init__(self, hits: Hits, validators: Validators, mode: Literal[True, "metadata"]) -> None:
        self._hits = hits
        self._validators = validators
        self._mode = mode
        # Comparisons under way, by key.
        self._checks: dict[str, Flight] = {}

    def applies(self, key: str) -> bool:
        """Whether the values of a key are compared."""
        return self._mode is True or key.rpartition("/")[2] in METADATA

    async def read(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        request: ByteRequest | None,
        byte_range: ByteRange | None,
        ticket: int,
    ) -> tuple[Buffer | None, bool]:
        """What the leader of a flight reads: from the cache if that is still the same, else from the source.

        Returns
        -------
        value : Buffer or None
            The bytes.
        is_cached : bool
            Whether they came from the cache.
        """
        value, check = await self.compare(io, key, prototype, byte_range, ticket)
        if value is not None:
            return value, True
        paired = await self._validators.read(key, prototype, request) if io.loop() else None
        if paired is not None:
            value, validator = paired
        else:
            # Asked once, whatever came of that: a source that is down would keep each read waiting twice.
            validator = await self.current(io, key) if check is None else check[0]
            value = await io.read(key, prototype, request)
            if validator is None or value is None or validator != await self.current(io, key):
                validator = None
        if validator is not None and value is not None:
            self.note(key, ticket, validator)
        return value, False

    async def compare(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRange | None,
        ticket: int,
        check: Check | None = None,
    ) -> tuple[Buffer | None, Check | None]:
        """Ask the source whether what is cached is still the same, unless `check` says what it has answered.

        Returns
        -------
        value : Buffer or None
            The bytes, if so.
        check : Check or None
            What the source has answered, and when it was asked; None where there was nothing to compare.
        """
        known = await self._known(io, key, byte_range)
        if known is None:
            return None, check
        if check is None:
            check = await self._check(io, key)
        if check[0] != known:
            return None, check
        found = await self._refreshed(io, key, prototype, byte_range, ticket, known, check[1])
        return found, check

    def after_fork(self) -> None:
        """Start over in a forked child: what is under way is the parent's."""
        self._checks.clear()

    def note(self, key: str, ticket: int, validator: str) -> None:
        """Have a validator kept with what was read under a ticket."""
        self._hits.handle.call_later(ignore, Index.set_validator, key, ticket, validator)

    async def current(self, io: IO, key: str) -> str | None:
        """The validator of a key in the source; None where it does not tell, for whatever reason."""
        # That a comparison fails is no error of a read, which finds out for itself.
        with contextlib.suppress(Exception):
            return await self._validators.current(io, key)
        return None

    async def _known(self, io: IO, key: str, byte_range: ByteRange | None) -> str | None:
        hits = self._hits
        if not hits.breaker.allows():
            return None
        try:
            return await hits.handle.call(io, Index.validator, key, byte_range)
        except IndexLockTimeout:
            return None

    async def _check(self, io: IO, key: str) -> Check:
        """The validator in the source, and when it was asked: once for all who ask at a time."""
        now = self._hits.now()
        flight = Flight(io.loop(), now)
        with _lock:
            other = self._checks.setdefault(key, flight)
            if not other.may_be_joined(now, self._hits.ages.of(key)):
                other = self._checks[key] = flight
        if other is not flight:
            if await io.wait(other) and not other.abandoned:
                return None if other.data is None else other.data.decode(), other.fetched
            # Its leader cannot go on.
            return await self.current(io, key), now
        flight.begun = True
        try:
            found = await self.current(io, key)
            flight.deliver(None if found is None else found.encode(errors="surrogatepass"))
        finally:
            with _lock:
                if self._checks.get(key) is flight:
                    del self._checks[key]
            flight.abandon()  # Of no effect on one that is delivered.
        return found, now

    async def _refreshed(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRange | None,
        ticket: int,
        validator: str,
        asked: float,
    ) -> Buffer | None:
        hits = self._hits
        try:
            hit: Any = await hits.handle.call(
                io, Index.refresh, *(key, byte_range, ticket, validator, asked, hits.now())
            )
        except IndexLockTimeout:
            return None
        if hit is None:
            return None
        # What could not be read is counted as a miss again.
        hits.recount_as_hit()
        return await hits.serve_found(io, key, prototype, hit)


# Guards the comparisons under way; never held while anything waits.
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


at_fork(_after_fork)
