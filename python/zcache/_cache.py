"""One cache: source, cache store, index and protocol, composed. All copies of a `CacheStore` share it."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import uuid
import weakref
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from zarr.storage import MemoryStore

from zcache._backends.pool.select import pool_of
from zcache._backends.pool.source import PoolSource
from zcache._backends.pool.stores import PoolMemoryStore
from zcache._backends.select import open_backend
from zcache._backends.source_place import SourcePlace, place_of
from zcache._core import Index
from zcache._decoded import cache as decoded_chunks
from zcache._decoded.cache import DecodedCache
from zcache._decoded.pipeline import install
from zcache._index import shared as shared_indexes
from zcache._index.handle import ignore
from zcache._index.shared import Member, policy_in_force, say_once
from zcache._protocol.fill import MAX_PENDING_SIZE, FillQueue
from zcache._protocol.hits import Hits
from zcache._protocol.listing import Lister
from zcache._protocol.read import Reader
from zcache._protocol.sizes import Sizes
from zcache._protocol.write import Writer
from zcache._runtime.apart import OneForEach
from zcache._runtime.coroutines import run_without_loop
from zcache._runtime.fork import at_fork
from zcache._runtime.lingering import lease
from zcache._runtime.registry import Registry
from zcache._source.copies import is_equal, source_of_copy
from zcache._source.describe import describe
from zcache._source.identity import (
    SourceId,
    identify,
    keeps_values_in_process,
    name_after_fork,
    say_unnamed,
)
from zcache._source.location import innermost, outlives_process, values_of
from zcache._source.settled import settled
from zcache._source.slicing import slices_like_python
from zcache._source.validators import validators_of
from zcache.exceptions import CacheOwnershipError, CacheUnreachableError, IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from zarr.abc.store import Store

    from zcache._backends.base import Backend
    from zcache._backends.pool.place import Pool
    from zcache._cache_options import CacheOptions
    from zcache._index.changes import Version
    from zcache._runtime.io import IO
    from zcache._runtime.lingering import Lease
    from zcache._types import Minimised, Policy


_AT_ONCE: Final = 1000
"""Values of which the sample is told in one step of the index."""


class Cache:
    """What all copies of one store share.

    Parameters
    ----------
    source : Store
        Where values come from.
    cache : Store
        Where they are kept.
    options : CacheOptions
        What the user chose.
    token : str, optional
        Of the original that this is a copy of. Where its values have come along (see `values_of`), it is an original from now
        on: what is written here is here alone.

    Attributes
    ----------
    decoded : DecodedCache or None
        Decoded chunks, where `decoded_size` is given.
    home : int or None
        The process that it was made in; None if it arrived there as a copy.
    has_values : bool
        Whether its values go along with a pickle; see `values_of`.
    is_of_process : bool
        Whether copies in other processes are of another source; see `keeps_values_in_process`.
    """

    def __init__(
        self, source: Store, cache: Store, options: CacheOptions, *, token: str | None = None
    ) -> None:
        self.source = source
        self.cache = cache
        self.options = options
        self.has_values = values_of(source) is not None
        is_copy = token is not None and not self.has_values
        self.home = None if is_copy else os.getpid()
        self.known_token = token if is_copy else None
        self.source_id = identify(source, options.source_id)
        self.is_of_process = self.source_id.is_ephemeral and keeps_values_in_process(source)
        slices = slices_like_python(innermost(source))
        limits = {
            "max_size": options.max_size,
            "max_age": options.longest_use,
            "verify": options.verify,
            "slices_like_python": slices,
            "eviction": options.eviction,
            "minimise": options.minimise,
        }
        # Of a copy the original has said it.
        if token is None and self.source_id.is_ephemeral and outlives_process(innermost(cache)):
            say_unnamed(source, cache)
        self.backend = open_backend(
            cache, source, self.source_id, adopt=options.adopt, limits=limits, clock=options.clock
        )
        self.shared = self.backend.shared
        pending = options.max_pending_size
        # What lies in a dict of this process is damaged by no disk.
        self._member = Member(
            {
                **limits,
                "verify": self.backend.verify or options.verify,
                "max_pending_size": MAX_PENDING_SIZE if pending is None else pending,
                "min_free_space": options.min_free_space,
            }
        )
        # Before it joins, so that its limits are those of the queue as well.
        self._make_queue()
        self.shared.join(self._member, has_come=token is not None)
        # Offline the source is asked for nothing.
        compares = options.revalidate and not options.offline
        self.reader = Reader(
            Hits(self.backend, options.ages, options.missing_age, sampling=options.sampling),
            offline=options.offline,
            revalidate=options.revalidate,
            validators=validators_of(source) if compares else None,
            stale_if_error=options.stale_if_error,
            source_name=describe(source),
            slices_like_python=slices,
            times_source=options.minimise == "seconds",
        )
        self.sizes = Sizes(self.reader)
        self.lister = Lister(
            self.shared.listings,
            self.reader.stale,
            self.shared.breaker,
            offline=options.offline,
        )
        self.writer = Writer(self.backend, self.lister, describe(source), sampling=options.sampling)
        self._own_decoded: weakref.WeakValueDictionary[str, DecodedCache] = (
            weakref.WeakValueDictionary()
        )
        size = options.decoded_size
        self.decoded = None if size is None else self.decoded_chunks(size)
        # Others have used the cache store before.
        self._stats_before = self.shared.handle.stats()
        self._failures_before = self.shared.breaker.failures
        _caches.add(self)

    def decoded_chunks(self, max_size: int) -> DecodedCache:
        """Room for decoded chunks, which arrays use that are opened from now on."""
        install()
        return DecodedCache(max_size, self.backend, self.reader.ages, self.reader.counters)

    def own_decoded_chunks(self, max_size: int, token: str) -> DecodedCache:
        """Room that only copies of one store have, as this token says."""
        found = self._own_decoded.get(token)
        if found is None:
            made = self.decoded_chunks(max_size)
            made.token = token
            with _lock:
                # Another thread may have been faster.
                found = self._own_decoded.setdefault(token, made)
        return found

    def lease(self, decoded: DecodedCache | None) -> Lease | None:
        """What copies hold that were unpickled here, so that what is kept in memory outlives them for a while.

        None where it does not: the original is in this process.
        """
        if self.home is not None:
            return None
        handle, kept = self.shared.handle, innermost(self.cache)
        limit = 0.0 if decoded is None else decoded.max_size
        if isinstance(kept, MemoryStore):
            bound = self.options.max_size
            if bound is None and isinstance(kept, PoolMemoryStore):
                bound = kept.options.max_size
            limit += math.inf if bound is None else bound

        def sizes() -> dict[Hashable, int]:
            taken: dict[Hashable, int] = {}
            if isinstance(kept, MemoryStore):
                # All sources of a pool share it.
                taken[id(kept._store_dict)] = handle.index.current_size
            if decoded is not None:
                taken[id(decoded)] = decoded.size
            return taken

        key = self.token, "" if decoded is None else decoded.token
        found = lease(key, (self, decoded), sizes, limit)
        # In the place of what outlives it: kept for the next copy, it holds no one to its policy.
        self.shared.use_as(self._member, found)
        return found

    @property
    def _is_in_memory(self) -> bool:
        """Whether what is cached is in the memory of this process."""
        return isinstance(innermost(self.cache), MemoryStore)

    def meet(self, version: Version, io: IO) -> None:
        """Forget what is outdated where a copy comes that was made after changes that are not known here."""
        handle = self.shared.handle
        # Processes that share an index hear of each other's changes, if the source has one name in all of them.
        hears = handle.index.shared and not self.is_of_process
        if hears or not self.shared.changes.meet(version):
            return
        handle.call_later(ignore, Index.invalidate, "")
        self.shared.changes.tell("")
        if (self._is_in_memory or handle.index.shared) and not self.backend.needs_loop:
            # Otherwise values that are not served any more stay until their room is needed.
            with contextlib.suppress(IndexLockTimeout, CacheUnreachableError):
                run_without_loop(self.writer.clear(io))

    def after_fork(self) -> None:
        """Be another cache than the parent's, if its source is another one."""
        if self.is_of_process:
            self.source_id = SourceId(name_after_fork(self.source_id.name))
        elif not self.has_values:
            return
        # Copies that the parent makes have its data.
        _by_token.discard(self.known_token)
        self.known_token = None
        if self.home is not None:
            self.home = os.getpid()

    def _make_queue(self) -> None:
        """The queue of pending fills of this place, or of its pool, which its first user makes."""
        filler, shared = self.backend.filler, self.shared
        if filler is None:
            return
        with _lock:
            if shared.fills is None:
                shared.place.fills = FillQueue(shared.breaker, filler)

    @property
    def token(self) -> str:
        """Names this cache, so that copies that meet again in one process are one."""
        new = uuid.uuid4().hex if self.known_token is None else ""
        with _lock:
            if self.known_token is None:
                self.known_token = new
            _by_token.add(self.known_token, self)
            return self.known_token

    def stats(self, decoded: DecodedCache | None) -> dict[str, int | float]:
        """What was counted since this cache was made; takes no lock of the index.

        Reads, and what was skipped, are counted for this cache; evictions, refusals and failures are
        those of the cache store, for which all who use it in this process share the responsibility.
        """
        counters = self.backend.counters
        stats = self.shared.handle.stats() - self._stats_before
        return {
            "hits": counters.reads.hits,
            "misses": counters.reads.misses,
            "negative_hits": counters.reads.negative_hits,
            "missing_keys": self.shared.handle.index.absences,
            "evictions": stats.evictions,
            "expirations": stats.expirations,
            "refusals": stats.refusals,
            "bypassed": counters.bypassed,
            "damaged": counters.damaged,
            "stale_hits": counters.stale,
            "cache_failures": self.shared.breaker.failures - self._failures_before,
            "cache_skips": counters.skipped,
            **(decoded_chunks.NOTHING if decoded is None else decoded.stats()),
        }

    def policy(self) -> tuple[Policy, Minimised]:
        """See `policy_in_force`."""
        return policy_in_force(self.shared.handle)

    def ask(self, question: Callable[[Index], Any]) -> Any:
        """Ask the index something, within a second.

        Raises
        ------
        IndexLockTimeout
            If another process holds its lock for longer.
        """
        return self.shared.handle.call_blocking(question)

    def note_pending_sizes(self) -> None:
        """Tell the sample how large the values are that are on their way to the cache store.

        Raises
        ------
        IndexLockTimeout
            If another process holds the lock of the index for longer than a second.
        """
        queue: FillQueue | None = self.shared.fills
        pending: dict[Backend, list[tuple[str, Any, int]]] = {}
        for job in [] if queue is None else queue.pending():
            pending.setdefault(job.backend, []).append((job.key, job.byte_range, len(job.data)))
        for backend, values in pending.items():
            for first in range(0, len(values), _AT_ONCE):
                some = values[first : first + _AT_ONCE]
                backend.shared.handle.call_blocking(Index.note_sizes, some)

    async def drain(self, io: IO, timeout: float) -> bool:  # noqa: ASYNC109
        """Wait until all that was read or written before is in the cache store, or was refused."""
        until = time.monotonic() + timeout
        self.backend.begin(io)
        if not await self.shared.place.settle(io, self.backend, until):
            return False
        queue: FillQueue | None = self.shared.fills
        left = max(0.0, until - time.monotonic())
        return queue is None or await queue.drain(io, left, self.shared)


# Guards the making of tokens and queues; never held over anything that waits.
_lock = threading.RLock()
_caches: Registry[Cache] = Registry()
_by_token: OneForEach[Cache] = OneForEach()


def find_or_make(
    token: str, source: Store, cache_store: Store, options: CacheOptions, *, is_first: bool
) -> tuple[Cache, Store]:
    """The cache of this process for a copy that has come with this token and these, and what it reads.

    Where its values have come along, it has a cache of its own, unless it was pickled by one that is here. Then it is
    of that; see `source_of_copy`, also for `is_first`. None of this raises: an error would end an executor that unpickles
    its task.
    """
    # Where its path leads here was found out for another copy. Many may come, each for one read.
    known = _by_token.get(token)
    if known is not None and is_equal(source, known.source):
        return known, source
    source = settled(source)
    make = partial(_arrived, source, cache_store, options)
    values = values_of(source)
    if values is not None and (known is None or known.home != os.getpid()):
        # Several stores in one pickle may share them.
        return _by_token.find_or_make((token, values), partial(make, token)), source
    cache = _by_token.find_or_make(token, partial(make, token))
    # Another copy has made it.
    if cache.source is not source:
        shared = source_of_copy(cache, source, is_first=is_first)
        if shared is not None:
            return cache, shared
        token = uuid.uuid4().hex
        if cache.source_id.is_ephemeral:
            options = replace(options, source_id=None)
        cache = _by_token.find_or_make(
            token, partial(_arrived, source, cache_store, options, token)
        )
    return cache, source


def _arrived(source: Store, cache_store: Store, options: CacheOptions, token: str) -> Cache:
    """The cache of a copy; without room where its cache store is in use for another source."""
    if isinstance(cache_store, SourcePlace):
        cache_store = place_of(source)
    if isinstance(cache_store, PoolMemoryStore):
        options = _in_pool(source, cache_store, options)
    try:
        return Cache(source, cache_store, options, token=token)
    except CacheOwnershipError as error:
        said = str(error)
    say_once(f"a copy of a store caches nothing in this process: {said}")
    return Cache(source, MemoryStore(), replace(options, max_size=0), token=token)


def _in_pool(source: Store, store: PoolMemoryStore, options: CacheOptions) -> CacheOptions:
    """What a copy asks for, of a pool in memory that may be in use here already."""
    asked = store.options.max_size
    # It may have another bound here, which one by the bound of its pool goes by.
    pool_of(store)
    if options.max_size == asked:
        options = replace(options, max_size=store.options.max_size)
    if values_of(source) is None:
        return options
    # Its values are those of this copy alone: the pool may have others by the name that it was given.
    return replace(options, source_id=None)


async def drain_source(pool: Pool, label: str, io: IO, timeout: float) -> bool:  # noqa: ASYNC109
    """Wait for what this process has read of a source of a pool, as `Cache.drain` does."""
    until = time.monotonic() + timeout
    for shared in shared_indexes.live():
        place = shared.place
        if isinstance(place, PoolSource) and place.label == label and place.pool.is_same(pool):
            fills: FillQueue | None = shared.fills
            left = max(0.0, until - time.monotonic())
            if fills is not None and not await fills.drain(io, left, shared):
                return False
    return True


def open_sources() -> list[tuple[str, Store]]:
    """Name and source of each store of this process."""
    return [(cache.source_id.name, cache.source) for cache in _caches.snapshot()]


def _after_fork() -> None:
    """Make everything usable in a forked child."""
    global _lock
    _lock = threading.RLock()
    # All of them before a pool tells each what it holds now.
    for shared in shared_indexes.live():
        name = shared.source_id.name
        if (new := name_after_fork(name)) != name:
            shared_indexes.rename(shared, new)
    for shared in shared_indexes.live():
        shared.breaker.after_fork()
        shared.changes.after_fork()
        shared.place.after_fork()
    for cache in _caches.snapshot():
        cache.after_fork()
        cache.backend.counters.after_fork()
        if cache.reader.revalidator is not None:
            cache.reader.revalidator.after_fork()


at_fork(_after_fork)
