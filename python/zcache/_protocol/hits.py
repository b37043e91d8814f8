"""Hits: what the index finds is read from the cache store, on the spot or where it has to be waited for.

Nothing here raises because of the cache store, and nothing asks the source: where a hit cannot be served, the
caller reads it as a miss.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any, Final, Literal

from zarr.core.buffer import default_buffer_prototype

from zcache._ages import METADATA, NODES
from zcache._backends.base import ABSENT, BUSY
from zcache._byte_ranges import check_key
from zcache._core import Index, IndexBusyError, crc32c, is_cacheable_key
from zcache._index.calls import COMPLETE_TIMEOUT, is_complete
from zcache._index.handle import ignore
from zcache._index.plans import look
from zcache._index.resolution import RETRYABLE
from zcache._protocol.recorder import RequestHook
from zcache._runtime.buffers import Array, freeze, snapshot, to_buffer
from zcache._runtime.threads import NoThreadError
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._ages import MaxAges
    from zcache._backends.base import Backend, Hit, TryRead
    from zcache._byte_ranges import ByteRange
    from zcache._index.calls import Handle
    from zcache._runtime.io import IO

COMPLETE_PAUSE: Final = 0.02
"""Seconds between two looks whether the index knows all that is cached, where the source is not asked."""


class Hits:
    """What one cache holds, as one store over it may serve it.

    Parameters
    ----------
    backend : Backend
        The cache store, with its index.
    ages : MaxAges
        How old a value may be that is served.
    missing_max_age : float
        Seconds for which a key is remembered as missing at most; 0 for not at all.
    sampling : bool
        Whether requests go into the sample of the index.

    Attributes
    ----------
    hook : RequestHook
        Tells a recorder of each request.
    """

    def __init__(
        self, backend: Backend, ages: MaxAges, missing_max_age: float, *, sampling: bool
    ) -> None:
        self.backend = backend
        self._sampling = sampling
        self.hook = RequestHook()
        self.handle: Handle = backend.shared.handle
        self.breaker = backend.shared.breaker
        self.counters = backend.counters
        self._reads = self.counters.reads
        self.now = backend.shared.clock
        self.ages = ages
        # For a hit: an attribute that is looked up less.
        self._ageless, self._max_age, self._age_of = ages.is_ageless, ages.single, ages.by_key
        self.missing_max_age = missing_max_age
        self._missing_ages = (_least(missing_max_age, ages.single), ages.single)
        self._try_read = backend.try_read
        # When it was first waited for that the index knows all that is cached.
        self._incomplete_since = math.inf
        self._begin = backend.begin if backend.works_in_background else None
        self.handle.watch(self)

    def use_index(self, index: Index) -> None:
        """Look keys up in this index from now on, and count in the counters of this cache."""
        if index is self.handle.unopened:
            # What stands there until it is open knows nothing of what is cached or sampled.
            self._look_up_alone = self._look_up = _say_busy
            return
        view = self._view(index)
        self._look_up_alone = view.lookup
        self._look_up = self.backend.lookup_in(view)

    def _view(self, index: Index) -> Index:
        return index.view(self._reads, self._sampling, self.backend.asks_for_entries)

    def begin(self, io: IO) -> None:
        """Do what the cache store asks for by now; called by reads that are no hits."""
        if self.handle.follows_plan:
            look(self.handle)
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
        own = _least(self.missing_max_age, age)
        if name not in METADATA:
            return own, age
        ages = [age_of(f"{node}{slash}{other}") for other in NODES]
        return own, min((one for one in ages if one is not None), default=None)

    def ages_of(self, key: str) -> tuple[float | None, tuple[float, float | None]]:
        """Seconds for which a value of a key is fresh (None for any age); and `missing_ages`."""
        if self._age_of is None:
            return self._max_age, self._missing_ages
        return self._age_of(key), self.missing_ages(key)

    def is_outdated(self, key: str, byte_range: ByteRange | None) -> bool:
        """Whether what is cached of this is too old to be served; False also where only waiting could tell."""
        if self._ageless:
            return False
        peek, now = self.backend.index.peek, self.now()
        try:
            # Twice, for it may have been filled since it was missed.
            return (
                peek(key, byte_range, now) is not None
                and peek(key, byte_range, now, self.ages.of(key)) is None
            )
        except RETRYABLE:
            return False

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
        reads_fail = self.breaker.reads_fail
        look_up = self._look_up_alone if reads_fail else self._look_up
        hit: Any
        try:
            if self._ageless:
                # More arguments take a tenth longer, and so does the clock.
                hit = look_up(key) if byte_range is None else look_up(key, byte_range)
            else:
                age_of = self._age_of
                max_age = self._max_age if age_of is None else age_of(key)
                hit = look_up(key, byte_range, self.now(), max_age)
            if hit.__class__ is Array:
                return to_buffer(hit, prototype), len(hit)
            if hit is ABSENT:
                # Perhaps: most keys have no absence, and need no time to be found.
                hit = self._look_up_alone(
                    key, byte_range, self.now(), self.ages.of(key), self.missing_ages(key)
                )
                if hit is ABSENT:
                    return None, ABSENT
        except RETRYABLE:
            return None, BUSY
        except UnicodeEncodeError:
            self._reads.count_miss()
            return None, None
        except TypeError:
            # Only here: a look at each key beforehand would make every hit dearer.
            check_key(key)
            raise
        if hit is None or (try_read := self._try_read) is None or reads_fail:
            return None, hit
        if hit.__class__ is int:
            return try_read(key, prototype, hit, 0, hit), hit
        if len(hit) == 2:
            array, hit = hit
            return to_buffer(array, prototype), hit
        return self._try_read_part(try_read, prototype, hit), hit

    def _try_read_part(
        self, try_read: TryRead, prototype: BufferPrototype, hit: Any
    ) -> Buffer | None:
        """Read what is a part of a value, or was not verified yet, without waiting."""
        name, total, start, size, handle, checksum, must_verify = hit
        if not must_verify:
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
            check_key(key)
            try:
                hit = await self.handle.call(
                    io,
                    self._look_up_in,
                    *(key, byte_range, self.now(), self.ages.of(key), self.missing_ages(key)),
                )
            except BaseException:
                self._reads.count_miss()
                if self._sampling and is_cacheable_key(key):
                    # While the index does not answer there may be many of these.
                    self.handle.call_if_free(Index.miss_request, key, byte_range, False)
                self.hook.found(key, byte_range, None)
                raise
            self.hook.found(key, byte_range, hit)
        if hit is ABSENT:
            self.begin(io)
            return True, None
        if hit is None:
            return False, None
        value = None
        try:
            value = await self.serve_found(io, key, prototype, hit)
        finally:
            if value is None:
                self.request_unserved(key, byte_range)
        if value is None:
            return False, None
        self.hook.read(key, byte_range, served=True)
        return True, value

    def _look_up_in(self, index: Index, *asked: Any) -> Hit | None:
        """What `get_nowait` would have found: counted and, if so asked, sampled."""
        hit: Hit | None = self._view(index).lookup(*asked)
        return hit

    async def cached(
        self, io: IO, key: str, prototype: BufferPrototype, byte_range: ByteRange | None
    ) -> tuple[bool, Buffer | None]:
        """Read from the cache store; whether it could serve the request, and the answer."""
        value, hit = self.get_nowait(key, prototype, byte_range)
        if value is not None:
            return True, value
        return await self.serve(io, key, prototype, byte_range, hit)

    async def cached_size(self, io: IO, key: str) -> int | Literal[False] | None:
        """Bytes of a value that is cached as a whole; `ABSENT`; or None where that is not known.

        Raises
        ------
        IndexLockTimeout
            If the index does not answer.
        """
        # Where the cache store is left alone, `get` reads the source.
        if not self.breaker.allows():
            self.counters.count("skipped")
            return None
        size = await self.handle.call(
            io, Index.peek, *(key, None, self.now(), self.ages.of(key), self.missing_ages(key))
        )
        if size is None or size is ABSENT or await self._is_there(io, key, size):
            return size
        self.begin(io)
        return None

    async def _is_there(self, io: IO, key: str, size: int) -> bool:
        """Whether the cache store has a value that the index lists, where others may have dropped it unheard."""
        if self.backend.hears_of_evictions:
            return True
        try:
            # Nothing of it, which takes what a read of it takes.
            value = await self.backend.read(io, key, default_buffer_prototype(), size, 0, 0)
        except Exception as error:  # noqa: BLE001 - whatever the cache store raises, the source tells
            self.breaker.failed(error)
            return False
        return value is not None

    async def is_ruled_out(self, io: IO, key: str) -> bool:
        """Whether a cached document of a node says that it has no document of this key.

        A node has one of those that make it real, as a rule. Without ``.zmetadata`` it reads the same, and beside
        ``zarr.json``, which holds the attributes, there is no ``.zattrs``. Only where nothing can be written: one that is
        in both formats would lose what is not cached.

        Raises
        ------
        IndexLockTimeout
            If the index does not answer.
        """
        node, slash, name = key.rpartition("/")
        if name not in METADATA:
            return False
        others = NODES[:1] if name == ".zattrs" else [other for other in NODES if other != name]
        for other in others:
            if await self.cached_size(io, f"{node}{slash}{other}"):
                return True
        return False

    async def serve_found(
        self,
        io: IO,
        key: str,
        prototype: BufferPrototype,
        hit: Hit,
    ) -> Buffer | None:
        """Read a hit from the cache store; None where that fails, upon which the entry is gone."""
        if not self.breaker.allows():
            # Counted as skipped where the source is asked.
            self._reads.recount_as_miss()
            return None
        if isinstance(hit, int):
            # Most of such hits are read on the spot, which needs no more.
            entry = None
            with contextlib.suppress(IndexLockTimeout):
                entry = await self.handle.call(
                    io, Index.handle_of, key, None, hit, self.now(), timeout=0.0
                )
            hit = (key, hit, 0, hit, entry, None, False)
        # The entry that this read may drop: one that was there before it, and not what takes its place meanwhile.
        name, total, start, size, entry, _, must_verify = hit
        # Bytes that are not verified yet are read as a whole, for the checksum is of the whole.
        first, wanted = (0, total) if must_verify else (start, size)
        if self._try_read is not None and io.loop() is not None:
            try_read = await self.backend.turn(wanted)
            value = try_read and self._try_read_part(try_read, prototype, hit)
            if value is not None:
                return value
        is_damaged = False
        try:
            value = await self.backend.read(io, name, prototype, total, first, wanted)
            if value is not None and must_verify:
                value = await self._verify(io, prototype, value, hit)
        except Exception as error:  # noqa: BLE001 - whatever the cache store raises, the source serves
            self.breaker.failed(error)
            if isinstance(error, (TimeoutError, NoThreadError)):
                # The entry may be good: it could not be read now.
                self._reads.recount_as_miss()
                return None
        else:
            self.breaker.succeeded()
            if value is not None:
                return value
            is_damaged = True
        # One that was evicted since the index was asked is no damaged one.
        was_there = await self._discard(io, name, total, entry)
        if was_there and is_damaged and self.backend.hears_of_evictions:
            self.counters.count("damaged")
        return None

    async def _verify(
        self, io: IO, prototype: BufferPrototype, value: Buffer, hit: Any
    ) -> Buffer | None:
        """What was asked for of a whole value, if its checksum is right."""
        name, total, start, size, handle, checksum, _ = hit

        def part_and_checksum() -> tuple[bytes, int]:
            data = snapshot(value)
            return data if size == total else data[start : start + size], crc32c(data)

        part, found = await io.aside(total, part_and_checksum)
        if checksum is None:
            # The index was rebuilt, and does not know it; perhaps it is recorded beside the value.
            recorded = await self.backend.recorded_size_and_checksum(io, name)
            checksum = found if recorded is None else recorded[1]
        if checksum != found:
            return None
        self.handle.call_later(ignore, Index.mark_verified, handle, found)
        return value if size == total else prototype.buffer.from_bytes(part)

    async def _discard(self, io: IO, name: str, size: int, entry: int | None) -> bool:
        """Drop an entry of this size that cannot be served; whether it was still there."""
        self._reads.recount_as_miss()
        if entry is None:
            return False  # Gone before, or the next read finds the same.
        intact = None
        try:
            intact = await self.backend.intact_size(io, name)
        except Exception as error:  # noqa: BLE001 - as where it is read
            self.breaker.failed(error)
        try:
            victims = await self.handle.call(io, Index.discard, entry)
        except IndexLockTimeout:
            return False  # The next read finds the same.
        if victims:
            await self.backend.remove(io, victims)
        if victims and intact is not None and intact != size:
            self.handle.mark_corrupt()
        return bool(victims)

    async def wait_until_complete(self, io: IO) -> bool:
        """Wait until the index knows all that is cached; False where it does already.

        A minute at most, counted from the first who waits, and only while something is at work on it.

        Raises
        ------
        IndexLockTimeout
            If another process keeps the lock of the index.
        """
        if await self._is_complete(io):
            return False
        self.backend.begin(io)
        self._incomplete_since = min(self._incomplete_since, time.monotonic())
        while time.monotonic() < self._incomplete_since + COMPLETE_TIMEOUT:
            if await self._is_complete(io):
                break
            if not self.backend.completes:
                # The next try has a minute of its own.
                self._incomplete_since = math.inf
                break
            await io.pause(COMPLETE_PAUSE)
        return True

    async def _is_complete(self, io: IO) -> bool:
        is_known = False
        try:
            is_known = await self.handle.call(io, is_complete)
        except IndexLockTimeout:
            # One that is being opened knows it later, unless that waits for the lock as well.
            opening = self.handle.opening
            if opening is None or opening.meets_lock:
                raise
        if is_known:
            self._incomplete_since = math.inf
        return is_known

    # -------------------------------------------------------------- counters

    def count_miss(self) -> None:
        """Count a read that the index was not asked about."""
        self._reads.count_miss()

    def retract_miss(self, key: str, byte_range: ByteRange | None) -> None:
        """Take a miss back, because the same read is looked up once more."""
        self._reads.retract_miss()
        self.retract_request(key, byte_range)

    def retract_request(self, key: str, byte_range: ByteRange | None) -> None:
        """Take a request back that was no hit, and has brought nothing; of what is counted that is still a miss.

        The source has no such key, the read has failed or was cancelled, or it is looked up once more.
        """
        if self._sampling and is_cacheable_key(key):
            # Each look-up of this store has sampled one.
            self.handle.call_later(ignore, Index.retract_request, key, byte_range)
        self.hook.retract(key, byte_range)

    def request_unserved(self, key: str, byte_range: ByteRange | None) -> None:
        """Say that a request is no hit: what was found could not be read."""
        if self._sampling and is_cacheable_key(key):
            self.handle.call_later(ignore, Index.miss_request, key, byte_range, True)
        self.hook.read(key, byte_range, served=False)

    def recount_as_hit(self) -> None:
        """Count a miss as a hit: the cache has served it after all."""
        self._reads.recount_as_hit()

    def followed(
        self,
        key: str,
        byte_range: ByteRange | None,
        size: int,
        whole: ByteRange | None,
        total: int,
        *,
        hit: bool,
    ) -> None:
        """Tell of a miss that the read of another has served, or a value on its way into the cache store: a `hit`.

        That read was one of `whole`, of `total` bytes.
        """
        if hit:
            self.recount_as_hit()
        if self._sampling and (hit or whole != byte_range):
            self.handle.call_later(ignore, Index.settle_request, key, byte_range, size, hit)
        entry = (key, total) if whole is None else None
        self.hook.brought(key, byte_range, size, hit=hit, entry=entry)

    def recount_as_negative_hit(self, key: str, byte_range: ByteRange | None) -> None:
        """Count a miss as a negative hit: an absence has answered it after all."""
        self._reads.recount_as_negative_hit()
        self.brought(key, byte_range, None)

    def recount_negative_as_miss(self) -> None:
        """Count a negative hit as a miss: only the source knows what its answer is."""
        self._reads.recount_negative_as_miss()

    def brought(
        self, key: str, byte_range: ByteRange | None, size: int | None, *, hit: bool = False
    ) -> None:
        """Tell of the bytes that a miss has brought after all; None where there is no such key."""
        if size is None:
            # Reads of what the source does not have are no requests.
            self.retract_request(key, byte_range)
        else:
            self.hook.brought(key, byte_range, size, hit=hit)

    def brought_past_cache(
        self, key: str, byte_range: ByteRange | None, value: Buffer | None
    ) -> None:
        """Tell of what the source has brought for a miss, and the cache does not hear of."""
        # While the index does not answer there may be many of these.
        sample = self.handle.call_if_free if self._sampling and is_cacheable_key(key) else ignore
        if value is None:
            sample(Index.retract_request, key, byte_range)
            self.hook.retract(key, byte_range)
        else:
            sample(Index.note_sizes, [(key, byte_range, len(value))])
            self.brought(key, byte_range, len(value))


def _say_busy(*_: Any) -> Any:
    raise IndexBusyError("the index is being opened")


def _least(seconds: float, age: float | None) -> float:
    return seconds if age is None else min(seconds, age)
