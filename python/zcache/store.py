"""`CacheStore`: a Zarr store that keeps what it has read from a slow store in a fast one."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Any, Final, Literal

from zarr.abc.store import Store, SupportsSyncStore
from zarr.core.buffer import Buffer
from zarr.core.buffer.core import default_buffer_prototype
from zarr.core.config import config
from zarr.storage import MemoryStore

from zcache import _registry
from zcache._batches import Batch, from_partial_values, from_ranges, from_ranges_sync
from zcache._books import LateError
from zcache._bounds import parse_age, parse_size
from zcache._buffers import snapshot
from zcache._copies import same_cache, source_of_copy, without_contents
from zcache._core import Index, is_known
from zcache._coroutines import drive
from zcache._engine import Engine
from zcache._identity import TRANSIENT
from zcache._options import (
    check_cache_store,
    check_flag,
    check_source_id,
    check_store,
    check_verify,
)
from zcache._spans import to_span
from zcache._traffic import SyncTraffic, Traffic

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Iterable,
        Sequence,
    )

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import BufferPrototype

    from zcache._batches import Fetch, Group, Request


_OWN: Final = frozenset(
    {
        *("_engine", "_io", "_is_open", "_read_only", "_store", "_sync_io", "_syncable"),
        "cache_set_data",
    }
)
"""Attributes of a `CacheStore` itself."""


class CacheStore(Store):
    """A store that reads from `store` and keeps what it has read in `cache_store`.

    Takes the place of `zarr.experimental.cache_store.CacheStore`. Any number of tasks, threads and
    event loops may use one at once.

    Parameters
    ----------
    store : Store
        The source: where values come from and writes go to.
    cache_store : Store, optional
        Where values are kept. It must be able to write and to delete, and belongs to zcache alone.
        Default is a new `MemoryStore`. Give a `LocalStore` on a local disk for a cache larger than
        memory.
    max_age_seconds : float or "infinity", optional
        Seconds, from 0 on and fractions allowed, after which a value is read from the source again.
        Default is "infinity" (None is the same): values never expire. Set it where others write to
        the source; writes through this store are seen at once in any case.
    max_size : int or str, optional
        Bytes that the cache store holds at most, at every instant: a whole number from 0 on, or text
        such as ``"256MB"`` (10**6) or ``"2 GiB"`` (2**30). Default is None, no bound. Set it to what
        the memory or disk behind `cache_store` can spare. A larger value is never cached.
    cache_set_data : bool, optional
        Whether values that are written are cached as well. Default is True; set it to False where
        what is written is not read again soon.
    read_only : bool, optional
        Open the source anew with this setting. Default is None: as the source is.
    verify : {"first", "always", "never"}, optional
        When the bytes of a hit are compared with their CRC32C. Default is "first": at the first hit
        of each process, which finds what a disk has damaged. "always" costs one pass over the bytes at
        each hit; "never" is for a cache store that checks by itself, and still checks once what it finds
        in a cache directory after a loss of power.
    adopt : bool, optional
        Take over what a cache store holds that was not made by zcache: it may then be served, and
        evicted. Default is False: such a store is refused.
    source_id : str, optional
        Name of the source, for a cache that outlives the process. Default is None: its URL, its path,
        or what else names it in every process. Give one where the same data is reached under several
        names, where the source has no name (a `MemoryStore`), for else each process starts cold, and
        for a wrapper of your own that changes keys or bytes, unless its ``str`` says what it shows.
    min_free_space : int or str, optional
        Bytes of the volume of a cache directory that stay free, written as for `max_size`. Below them
        zcache evicts before it writes, and writes nothing if that does not help. Default is None: 5 %
        of the volume, at most 1 GiB. Set it higher where others write to the volume in bursts.

    Raises
    ------
    TypeError
        If `store` or `cache_store` is no store, or a bound is of the wrong type.
    ValueError
        If an option has no meaning, if `cache_store` is the source itself or cannot write or delete,
        or if it holds what zcache did not write, or what it wrote for another source.

    See Also
    --------
    zarr.experimental.cache_store.CacheStore : the class that this one replaces.

    Examples
    --------
    >>> import zarr
    >>> from zcache import CacheStore
    >>> store = CacheStore(zarr.storage.MemoryStore(), max_size="256MB")
    >>> array = zarr.create_array(store, shape=(4,), chunks=(2,), dtype="i4")
    >>> array[:] = 42
    >>> int(array[0])
    42
    >>> store.cache_info()["max_size"]
    256000000
    """

    _store: Store
    _engine: Engine

    def __init__(
        self,
        store: Store,
        *,
        cache_store: Store | None = None,
        max_age_seconds: float | Literal["infinity"] | None = "infinity",
        max_size: int | str | None = None,
        cache_set_data: bool = True,
        read_only: bool | None = None,
        verify: Literal["first", "always", "never"] = "first",
        adopt: bool = False,
        source_id: str | None = None,
        min_free_space: int | str | None = None,
    ) -> None:
        check_store("store", store)
        if cache_store is None:
            cache_store = MemoryStore()
        check_cache_store(store, cache_store)
        check_flag("cache_set_data", cache_set_data)
        check_flag("adopt", adopt)
        if read_only is not None:
            check_flag("read_only", read_only)
        if read_only is not None and read_only != store.read_only:
            store = store.with_read_only(read_only)
        engine = Engine(
            store,
            cache_store,
            max_size=parse_size(max_size),
            max_age=parse_age(max_age_seconds),
            verify=check_verify(verify),
            adopt=adopt,
            source_id=check_source_id(source_id),
            min_free_space=parse_size(min_free_space, "min_free_space"),
        )
        self._setup(store, engine, cache_set_data)

    def _setup(self, store: Store, engine: Engine, cache_set_data: bool) -> None:
        super().__init__(read_only=store.read_only)
        self._store = store
        self._engine = engine
        self.cache_set_data = cache_set_data
        self._io = Traffic(store, engine.port)
        self._sync_io = SyncTraffic(store, engine.sync_port)
        # Asked anew only where the answer was no: a protocol check costs more than a hit.
        self._syncable = _is_sync(store) and _is_sync(engine.cache)

    def _derive(self, store: Store) -> CacheStore:
        derived = type(self).__new__(type(self))
        vars(derived).update(self._of_subclass())
        derived._setup(store, self._engine, self.cache_set_data)
        return derived

    def _of_subclass(self) -> dict[str, Any]:
        """What a subclass has added, which goes along with every copy."""
        return {name: value for name, value in vars(self).items() if name not in _OWN}

    # ----------------------------------------------------- what it is

    @property
    def _cache(self) -> Store:
        return self._engine.cache

    @property
    def max_size(self) -> int | None:
        """Bytes that the cache store holds at most; None for no bound."""
        return self._engine.max_size

    @property
    def max_age_seconds(self) -> float | Literal["infinity"]:
        """Seconds after which a value is read from the source again, or "infinity"."""
        return self._engine.max_age

    def cache_info(self) -> dict[str, Any]:
        """Describe the cache.

        Returns
        -------
        dict
            ``cache_store_type`` (name of the class), ``max_age_seconds`` (seconds or "infinity"),
            ``max_size`` (bytes or None), ``current_size`` (bytes in the cache store, those whose
            delete failed among them), ``cache_set_data``, ``tracked_keys`` and ``cached_keys`` (both
            the number of entries that can be served; a full value is one entry, and each range
            that was read of a value that is not cached as a whole is one).
        """
        entries = self._engine.ask(len)
        return {
            "cache_store_type": type(self._cache).__name__,
            "max_age_seconds": self.max_age_seconds,
            "max_size": self.max_size,
            "current_size": self._engine.ask(_current_size),
            "cache_set_data": self.cache_set_data,
            "tracked_keys": entries,
            "cached_keys": entries,
        }

    def cache_stats(self) -> dict[str, Any]:
        """Count what happened since the store was made.

        Returns
        -------
        dict
            ``hits`` (reads served by the cache store), ``misses`` (reads that were not), ``evictions``
            (entries removed to make room), ``total_requests`` (hits and misses), ``hit_rate`` (hits
            by requests, 0.0 where there were none); then ``expirations`` (evictions of stale
            entries), ``refusals`` (values left uncached: too large, overtaken by a write, no room),
            ``bypassed`` (reads of keys that are never cached), ``damaged`` (hits whose bytes were
            gone, of another length or against their checksum), ``cache_failures`` (operations of the cache store that
            raised), ``cache_skips`` (times that it was left alone because it kept failing).
        """
        engine = self._engine
        hits, misses, evictions, expirations, refusals = engine.ask(Index.stats)
        total = hits + misses
        return {
            "hits": hits,
            "misses": misses,
            "evictions": evictions,
            "total_requests": total,
            "hit_rate": hits / total if total else 0.0,
            "expirations": expirations,
            "refusals": refusals,
            "bypassed": engine.bypassed,
            "damaged": engine.damaged,
            "cache_failures": engine.breaker.failures,
            "cache_skips": engine.breaker.skipped,
        }

    async def clear_cache(self) -> None:
        """Empty the cache. The source stays as it is, and so does what zcache did not write."""
        await self._engine.clear(self._io)

    def __eq__(self, other: object) -> bool:
        """Whether both read the same source with the same bounds through the same cache store."""
        if not isinstance(other, CacheStore):
            return NotImplemented
        if self._engine is not other._engine and (
            self.max_size != other.max_size
            or self.max_age_seconds != other.max_age_seconds
            or not same_cache(self._engine, other._engine)
        ):
            return False
        return (
            type(self) is type(other)
            and self.cache_set_data == other.cache_set_data
            and self._store == other._store
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"cache://{self._store}"

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(store={self._store!r}, cache_store={self._cache!r}, "
            f"max_age_seconds={self.max_age_seconds!r}, max_size={self.max_size!r}, "
            f"current_size={self._engine.ask(_current_size)}, "
            f"cached_keys={self._engine.ask(len)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        engine = self._engine
        # Contents stay: a cache in memory travels empty.
        cache = engine.cache
        return {
            "store": self._store,
            "cache": type(cache) if isinstance(cache, MemoryStore) else without_contents(cache),
            "options": {
                "max_size": engine.max_size,
                "max_age": engine.max_age,
                "verify": engine.verify,
                # Also that of a source without a name: copies read the same data.
                "source_id": engine.identity,
                "min_free_space": engine.min_free_space,
            },
            "set": self.cache_set_data,
            "token": engine.token,
            "open": self._is_open,
            "more": self._of_subclass(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        store, token = state["store"], state["token"]
        engine = _registry.find(token)
        if engine is not None:
            source = source_of_copy(engine, store)
            if source is None:
                engine, token = None, uuid.uuid4().hex
                if state["options"]["source_id"].startswith(TRANSIENT):
                    state["options"]["source_id"] = None
            else:
                store = source
        if engine is None:
            cache = state["cache"]
            engine = _registry.find_or_add(
                Engine(
                    store,
                    cache() if isinstance(cache, type) else cache,
                    token=token,
                    **state["options"],
                )
            )
        vars(self).update(state["more"])
        self._setup(store, engine, state["set"])
        self._is_open = state["open"]

    # ---------------------------------------------------- open and close

    async def _open(self) -> None:
        # The source first: where it cannot be opened, neither is this.
        await self._store._ensure_open()
        await super()._open()

    async def _ensure_open(self) -> None:
        # docstring inherited
        if not self._is_open:
            # Many may come here at once, and opening the source may suspend; `_open` is for one.
            await self._store._ensure_open()
            self._is_open = True

    def close(self) -> None:
        """Close the source. The cache store stays open: copies of this store may share it."""
        self._store.close()
        super().close()

    def with_read_only(self, read_only: bool = False) -> CacheStore:
        """A store over the source with this setting, which shares cache, index and counters."""
        return self._derive(self._store.with_read_only(read_only))

    @property
    def supports_writes(self) -> bool:
        # docstring inherited
        return self._store.supports_writes

    @property
    def supports_deletes(self) -> bool:
        # docstring inherited
        return self._store.supports_deletes

    @property
    def supports_listing(self) -> bool:
        # docstring inherited
        return self._store.supports_listing

    @property
    def supports_consolidated_metadata(self) -> bool:
        # docstring inherited
        return self._store.supports_consolidated_metadata

    @property
    def _supports_sync_io(self) -> bool:
        return _is_sync(self._store) and _is_sync(self._cache)

    # ------------------------------------------------------------- reads

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        # docstring inherited
        if prototype is None:
            prototype = default_buffer_prototype()
        try:
            span = None if byte_range is None else to_span(byte_range)
        except ValueError:
            self._engine.count_miss()
            return await self._engine.bypass(self._io, key, prototype, byte_range)
        # A hit that is at hand ends here: no other coroutine, and one call into the index.
        value, hit = self._engine.glance(key, prototype, span)
        if value is not None:
            return value
        if hit is None:
            return await self._engine.fetch(self._io, key, prototype, byte_range, span)
        return await self._engine.get(self._io, key, prototype, byte_range, span, hit)

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read without an event loop; see `get`. Needs two stores that can do so.

        Raises
        ------
        TypeError
            If the source or the cache store has no synchronous methods.
        """
        if not self._syncable:
            self._check_sync("get_sync")
        if prototype is None:
            prototype = default_buffer_prototype()
        io = self._sync_io
        try:
            span = None if byte_range is None else to_span(byte_range)
        except ValueError:
            self._engine.count_miss()
            return drive(self._engine.bypass(io, key, prototype, byte_range))
        value, hit = self._engine.glance(key, prototype, span)
        if value is not None:
            return value
        return drive(self._engine.get(io, key, prototype, byte_range, span, hit))

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        # docstring inherited
        requests = list(key_ranges)

        fetch = from_partial_values(self._store, prototype, requests)
        values: list[Buffer | None] = [None] * len(requests)
        async for group in Batch(self._engine, self._io, prototype, requests, fetch).run():
            for number, value in group:
                values[number] = value
        return values

    async def get_ranges(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        *,
        prototype: BufferPrototype,
        max_concurrency: int | None = None,
        max_gap_bytes: int | None = None,
        max_coalesced_bytes: int | None = None,
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Read many ranges of one key: the cached ones at once, the rest in one call to the source.

        Parameters
        ----------
        key : str
            Key to read from.
        byte_ranges : sequence of ByteRequest or None
            What to read; None means the whole value.
        prototype : BufferPrototype
            Of the buffers to return.
        max_concurrency, max_gap_bytes, max_coalesced_bytes : int, optional
            How the source joins neighbouring ranges; see `Store.get_ranges`. Default is None: as
            the source does by itself.

        Yields
        ------
        sequence of (int, Buffer)
            Number of the request and its value.

        Raises
        ------
        BaseExceptionGroup
            As `Store.get_ranges`; holds a `FileNotFoundError` if there is no such key.
        """
        options = {
            "max_concurrency": max_concurrency,
            "max_gap_bytes": max_gap_bytes,
            "max_coalesced_bytes": max_coalesced_bytes,
        }
        given = {name: value for name, value in options.items() if value is not None}
        requests: list[Request] = [(key, byte_range) for byte_range in byte_ranges]

        fetch = from_ranges(self._store, prototype, requests, given)
        async for group in self._ranges(self._io, prototype, requests, fetch):
            yield group

    def get_ranges_sync(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        *,
        prototype: BufferPrototype,
        max_gap_bytes: int = 1 << 20,
        max_coalesced_bytes: int = 16 << 20,
    ) -> Sequence[tuple[int, Buffer | None]]:
        """Read many ranges of one key without an event loop; see `get_ranges` and `get_sync`.

        Returns
        -------
        sequence of (int, Buffer)
            Number of the request and its value.
        """
        self._check_sync("get_ranges_sync")
        requests: list[Request] = [(key, byte_range) for byte_range in byte_ranges]

        options = {"max_gap_bytes": max_gap_bytes, "max_coalesced_bytes": max_coalesced_bytes}
        fetch = from_ranges_sync(self._store, prototype, requests, options)

        async def collect() -> list[tuple[int, Buffer | None]]:
            groups = self._ranges(self._sync_io, prototype, requests, fetch)
            return [item async for group in groups for item in group]

        return drive(collect())

    async def _ranges(
        self, io: Traffic, prototype: BufferPrototype, requests: list[Request], fetch: Fetch
    ) -> AsyncIterator[Group]:
        batch = Batch(self._engine, io, prototype, requests, fetch)
        if batch.senseless:
            # The source joins ranges, and gives to this one what it makes of all of them.
            batch.count_bypassed(len(requests))
            groups = fetch(list(range(len(requests))))
        else:
            groups = batch.run()
        async for group in groups:
            if any(value is None for _, value in group):
                missing = FileNotFoundError(requests[0][0])
                raise BaseExceptionGroup("a range of a missing key was asked for", [missing])
            yield group

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        # In no order, as the base class allows; it reads one after the other.
        at_once: int | None = config.get("async.concurrency")
        limit = contextlib.nullcontext() if at_once is None else asyncio.Semaphore(at_once)

        async def one(
            key: str, prototype: BufferPrototype, byte_range: ByteRequest | None
        ) -> tuple[str, Buffer | None]:
            async with limit:
                return key, await self.get(key, prototype, byte_range)

        tasks = [asyncio.ensure_future(one(*request)) for request in requests]
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def exists(self, key: str) -> bool:
        # docstring inherited
        return await self._cached_size(key) is not None or await self._store.exists(key)

    async def getsize(self, key: str) -> int:
        # docstring inherited
        size = await self._cached_size(key)
        return await self._store.getsize(key) if size is None else size

    async def _cached_size(self, key: str) -> int | None:
        engine = self._engine
        # Where the cache store is out of use, `get` reads the source.
        if not is_known(key) or not engine.breaker.allows():
            return None
        peek, now = engine.index.peek, engine.now()
        try:
            return await engine.books.step(self._io, peek, key, None, now, for_ever=False)
        except LateError:
            return None

    # ------------------------------------------------------------ writes

    async def set(self, key: str, value: Buffer) -> None:
        # docstring inherited
        self._check_writable()
        await self._set(self._io, key, value, lambda: self._store.set(key, value))

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write without an event loop; see `set` and `get_sync`."""
        self._check_sync("set_sync")
        self._check_writable()
        source: Any = self._store
        drive(self._set(self._sync_io, key, value, _later(source.set_sync, key, value)))

    async def _set(
        self, io: Traffic, key: str, value: Buffer, work: Callable[[], Awaitable[None]]
    ) -> None:
        # The caller may use its buffer again as soon as this returns: the cache keeps a copy.
        data = snapshot(value) if self.cache_set_data and isinstance(value, Buffer) else None
        await self._engine.write(io, key, work, data)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        # docstring inherited
        self._check_writable()
        # Which value the source holds afterwards is its secret.
        work = self._store.set_if_not_exists
        await self._engine.write(self._io, key, lambda: work(key, value), None)

    async def delete(self, key: str) -> None:
        # docstring inherited
        self._check_writable()
        # Some stores delete all that lies below the key with it.
        await self._engine.change(self._io, key, lambda: self._store.delete(key))

    def delete_sync(self, key: str) -> None:
        """Delete without an event loop; see `delete` and `get_sync`."""
        self._check_sync("delete_sync")
        self._check_writable()
        source: Any = self._store
        drive(self._engine.change(self._sync_io, key, _later(source.delete_sync, key)))

    async def delete_dir(self, prefix: str) -> None:
        # docstring inherited
        self._check_writable()
        await self._engine.change(self._io, prefix, lambda: self._store.delete_dir(prefix))

    async def clear(self) -> None:
        # docstring inherited
        self._check_writable()
        await self._engine.change(self._io, "", self._store.clear)

    def _check_sync(self, method: str) -> None:
        for name, store in (("source", self._store), ("cache store", self._cache)):
            if not _is_sync(store):
                raise TypeError(
                    f"{method} needs stores with synchronous methods, but the {name} "
                    f"{store!r} has none. Use {method.removesuffix('_sync')} instead."
                )

    # ---------------------------------------------------------- listings

    async def is_empty(self, prefix: str) -> bool:
        # docstring inherited
        return await self._store.is_empty(prefix)

    def list(self) -> AsyncIterator[str]:
        # docstring inherited
        return self._store.list()

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        # docstring inherited
        return self._store.list_prefix(prefix)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        # docstring inherited
        return self._store.list_dir(prefix)


def _later(work: Callable[..., None], *args: Any) -> Callable[[], Awaitable[None]]:
    async def call() -> None:
        work(*args)

    return call


def _is_sync(store: Store) -> bool:
    """Whether a store can do without an event loop now, as zarr's codec pipeline asks."""
    return isinstance(store, SupportsSyncStore) and bool(getattr(store, "_supports_sync_io", True))


def _current_size(index: Index) -> int:
    return index.current_size
