"""Which backend a cache store gets: by its class a pool, a directory, memory, or any other store."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, cast

from zarr.storage import LocalStore, MemoryStore

from zcache._backends.directory.backend import DirectoryBackend
from zcache._backends.directory.index import CacheDirectory
from zcache._backends.listings import DirectoryListings, MemoryListings
from zcache._backends.memory import MemoryBackend
from zcache._backends.pool.select import open_pool
from zcache._backends.pool.stores import PoolMemoryStore, PoolStore
from zcache._backends.source_place import SourceBackend, SourcePlace
from zcache._backends.store.backend import StoreBackend
from zcache._backends.store.place import StorePlace
from zcache._core import Index
from zcache._index.handle import IndexHandle
from zcache._index.shared import SharedIndex, breaker_of, find_or_make, keep_while_alive
from zcache._runtime import lingering
from zcache._runtime.buffers import own
from zcache._source.describe import describe
from zcache._source.identity import EPHEMERAL
from zcache._source.location import (
    innermost,
    location_here,
    memory_store_of,
    outlives_process,
    place_in_process,
)
from zcache._source.paths import absolute
from zcache.exceptions import CacheOwnershipError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer

    from zcache._backends.base import Backend
    from zcache._source.identity import SourceId

    Clock = Callable[[], float]


def open_backend(
    cache: Store,
    source: Store,
    source_id: SourceId,
    *,
    adopt: bool,
    limits: dict[str, Any],
    clock: Clock | None,
) -> Backend:
    """Open a cache store, with the index of its place that all stores of this process share.

    Parameters
    ----------
    cache : Store
        The cache store.
    source : Store
        The source that it is to hold values of.
    source_id : SourceId
        Its name.
    adopt : bool
        Whether to take over what the cache store holds already.
    limits : dict
        What a new index is made with.
    clock : callable, optional
        Seconds; what ages are counted by. Default is None: the clock of the system.

    Raises
    ------
    CacheOwnershipError
        If the cache store belongs to another source or user.
    """
    opening = _Opening(cache, source, source_id, adopt, limits, clock)
    for _ in lingering.looks():
        # One that is kept would keep the index that is in the way.
        try:
            return opening.open()
        except CacheOwnershipError:
            if not opening.has_met_another:
                raise
    return opening.open()


class _Opening:
    """One opening of a cache store.

    Attributes
    ----------
    has_met_another : bool
        Whether it was refused because of an index of this process, which may go.
    """

    def __init__(
        self,
        cache: Any,
        source: Store,
        source_id: SourceId,
        adopt: bool,
        limits: dict[str, Any],
        clock: Clock | None,
    ) -> None:
        self.cache = cache
        self.source = source
        self.source_id = source_id
        self.adopt = adopt
        self.limits = limits
        self.clock = clock
        self.has_met_another = False

    def open(self) -> Backend:
        cache = self.cache
        if isinstance(cache, (PoolStore, PoolMemoryStore)):
            return open_pool(self)
        if type(cache) is LocalStore:
            return DirectoryBackend(cache, self._directory())
        kept = memory_store_of(cache)
        if kept is not None:
            shared = self._shared(("dict", id(kept._store_dict)), lambda: self._memory(kept))
            self._check_class(shared, kept)
            # As long as there is a store over the dict: its values may be used again.
            keep_while_alive(shared, kept)
            if isinstance(kept, SourcePlace):
                return SourceBackend(kept, shared, self.source)
            is_plain = cache is kept and _plain_dict_of(kept) is not None
            return MemoryBackend(cache, shared) if is_plain else StoreBackend(cache, shared)
        place = place_in_process(cache)
        return StoreBackend(cache, self._shared(("store", place), self._store))

    def _check_class(self, shared: SharedIndex, kept: MemoryStore) -> None:
        place = cast("StorePlace", shared.place)
        if (place.values is None) != (_plain_dict_of(kept) is None):
            raise CacheOwnershipError(
                f"cache_store={describe(self.cache)} has the dict of another store, of a class of its own, that is in use "
                "as a cache store: each may keep values in a form of its own. Give each a dict of its own."
            )

    def _shared(self, key: tuple[Any, ...], make: Callable[[], SharedIndex]) -> SharedIndex:
        shared = find_or_make(key, make)
        self._check(shared)
        # Wrappers of a user's own make another place of the same values: then each would serve the
        # other's bytes.
        for other in shared.locate(self.cache, location_here(self.cache)):
            self._check(other)
        return shared

    def _check(self, shared: SharedIndex) -> None:
        try:
            shared.check_source(self.cache, self.source, self.source_id)
        except CacheOwnershipError:
            self.has_met_another = True
            raise

    def _new(self, handle: IndexHandle, clock: Clock) -> SharedIndex:
        shared = SharedIndex(
            handle,
            self.source,
            self.source_id,
            self.clock or clock,
            breaker_of(handle, self.clock),
        )
        shared.listings = MemoryListings()
        return shared

    def _directory(self) -> SharedIndex:
        root = os.path.realpath(absolute(str(self.cache.root), "cache_store"))
        # Who only reads is to who writes what another process would be, and neither sets the other's rules.
        key = ("directory", root, self.cache.read_only)
        shared = find_or_make(key, self._new_directory)
        try:
            self._check(shared)
        except CacheOwnershipError as error:
            if not shared.source_id.name.startswith(EPHEMERAL):
                raise
            lingering.make_way()
            shared = find_or_make(key, self._new_directory)
            if shared.source_id != self.source_id:
                # It ends with this process, so it is not worth an error; the log names the way out.
                return self._without(error)
        return shared

    def _without(self, error: CacheOwnershipError) -> SharedIndex:
        """Nothing is cached: the directory is in use for another source without a name."""
        directory = CacheDirectory.unopened(self.cache.root, self.limits, self.clock or time.time)
        # A log record would keep the frames, and they the index that is in use.
        directory.handle.abandon(error.with_traceback(None))
        shared = self._new(directory.handle, time.time)
        shared.place = directory
        return shared

    def _new_directory(self) -> SharedIndex:
        directory = CacheDirectory(
            self.cache.root,
            self.source_id.name,
            adopt=self.adopt,
            limits=self.limits,
            clock=self.clock or time.time,
            read_only=self.cache.read_only,
        )
        shared = self._new(directory.handle, time.time)
        shared.place = directory
        layout = directory.layout
        shared.listings = DirectoryListings(
            layout.index_root, self.source_id.name, only_reads=self.cache.read_only
        )
        return shared

    def _memory(self, kept: MemoryStore) -> SharedIndex:
        values, plain = kept._store_dict, _plain_dict_of(kept)
        if values and not (self.adopt and _is_stock(kept)):
            first = next(iter(values))
            way_out = (
                "Give an empty one; or pass adopt=True if all that it holds is a cache of "
                f"{describe(self.source)}, which zcache may serve and delete."
                if _is_stock(kept)
                else "Give an empty one, for what is in a class of its own cannot be adopted."
            )
            raise CacheOwnershipError(
                f"cache_store={describe(self.cache)} is not empty (it holds {first!r}, for instance), and zcache "
                "does not know what that is: it remembers its own values only as long as the MemoryStore lives that they "
                f"were put into. {way_out}"
            )
        index = Index(**self.limits, flat_namespace=True)
        for value in values.values():
            own(value)
        # What cannot be dated is stale as soon as anything can be.
        index.adopt([(0, len(value), name) for name, value in values.items()])
        handle = IndexHandle(index, describe(self.cache), {**self.limits, "flat_namespace": True})
        shared = self._new(handle, time.monotonic)
        shared.place = StorePlace(handle, shared.clock, values=plain)
        shared.place.enforce_bound()
        return shared

    def _store(self) -> SharedIndex:
        # What a store of a user's own class holds now is not zcache's.
        is_listed = outlives_process(innermost(self.cache))
        index = Index(**self.limits, complete=not is_listed)
        handle = IndexHandle(index, describe(self.cache), self.limits)
        shared = self._new(handle, time.monotonic)
        shared.place = StorePlace.of(
            handle, shared.clock, self.source_id.name, adopt=self.adopt, listed=is_listed
        )
        return shared


def _plain_dict_of(store: MemoryStore) -> dict[str, Buffer] | None:
    """The dict of a store that does nothing but look into it; a user's own class, or another mapping, may do anything."""
    values = store._store_dict
    return values if _is_stock(store) and type(values) is dict else None


def _is_stock(store: MemoryStore) -> bool:
    return type(store).__module__.startswith(("zarr.", "zcache."))
