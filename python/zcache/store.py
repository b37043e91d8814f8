"""`CacheStore`: a Zarr store that keeps what it has read from a slow store in a fast one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, cast

from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.core.buffer.core import default_buffer_prototype
from zarr.core.common import concurrent_map
from zarr.core.config import config
from zarr.storage import LocalStore, MemoryStore

from zcache._advice.advise import advise, parse_policies, parse_sizes
from zcache._advice.recording import Recording, RequestWriter
from zcache._advice.trace import sampled
from zcache._ages import MISSING_MAX_AGE
from zcache._backends.base import ABSENT
from zcache._backends.ownership import trust, trusted_root
from zcache._byte_ranges import check_byte_range, check_key, check_prefix, to_byte_range
from zcache._cache import Cache, find_or_make
from zcache._cache_options import CacheOptions, parse_options
from zcache._core import DEFAULT_MINIMISED, DEFAULT_POLICY, Index, is_cacheable_key
from zcache._decoded.cache import KeepsDecoded
from zcache._index.keys import CachedKeys
from zcache._index.plans import follow
from zcache._options import (
    capacity_of,
    check_cache_store,
    check_flag,
    check_store,
    parse_timeout,
    path_of_cache_store,
)
from zcache._protocol.batch import (
    CANCEL_TIMEOUT,
    Batch,
    from_partial_values,
    from_ranges,
    from_ranges_sync,
)
from zcache._protocol.fill import CLOSE_TIMEOUT, DRAIN_TIMEOUT
from zcache._runtime.buffers import snapshot
from zcache._runtime.capacity import memory
from zcache._runtime.coroutines import Handover, run_without_loop
from zcache._runtime.io import IO, SyncIO, is_sync, keeps_sync
from zcache._runtime.tracebacks import clear_frames
from zcache._source.copies import without_contents
from zcache._source.describe import show, show_address
from zcache._source.identity import same_source
from zcache._source.missing import finds_none_in_many, raise_for_ranges
from zcache._source.offline import OfflineSource, no_change
from zcache._source.settled import settled
from zcache.exceptions import IndexLockTimeout, SyncNotSupportedError, UsageError
from zcache.pool import CachePool

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Coroutine,
        Iterable,
        Sequence,
    )

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import BufferPrototype

    from zcache._advice.advice import Advice
    from zcache._protocol.batch import Group, Put, Request
    from zcache._runtime.lingering import Lease
    from zcache._types import Age, Minimised, Policy, Revalidate, Size, Verify


_OWN: Final = frozenset(
    {
        *(
            "_cache",
            "_decoded",
            "_hits",
            "_io",
            "_is_open",
            "_lease",
            "_options",
            "_read_only",
            "_reader",
            "_source",
            "_store",
        ),
        *("_sync_io", "_syncable", "_writer", "cache_set_data"),
    }
)
"""Attributes of a `CacheStore` itself."""
_OPTIONS: Final = frozenset(option.name for option in fields(CacheOptions))


class CacheStore(Store, KeepsDecoded):
    """A store that reads from `store` and keeps what it has read in `cache_store`.

    Takes the place of `zarr.experimental.cache_store.CacheStore`. Any number of tasks, threads and
    event loops may use one at once. A reader has its value as soon as the source has answered; the cache
    store is filled in the background, for which `drain` waits.

    Parameters
    ----------
    store : Store
        The source: where values come from and writes go to.
    cache_store : Store, CachePool, str or PathLike, optional
        Where values are kept. It must be able to write and to delete, and belongs to zcache alone. Default is a new
        `MemoryStore`. For a cache larger than memory give a path on a local disk (``~`` is your home), or a
        `LocalStore` on it, which is the same.
    max_age_seconds : float, "infinity" or mapping of str to these, optional
        Seconds, from 0 on and fractions allowed, after which a value is read from the source again. Default is
        "infinity" (None is the same): values never expire. Set it where others write to the source; writes through this
        store are seen at once in any case. A mapping gives ages by glob patterns over whole keys, such as
        ``{"**/zarr.json": 60, "forecast/**": 3600}``. The first pattern that matches holds; without a match,
        "infinity". ``**`` is any number of parts of a key, including none; ``*``, ``?`` and ``[...]`` stay within one
        part. Other stores over the same cache have their own ages.
    metadata_max_age_seconds : float or "infinity", optional
        The same for metadata documents (``zarr.json``, ``.zarray``, ``.zgroup``, ``.zattrs``,
        ``.zmetadata``), whatever `max_age_seconds` says of them. Default is None: as that says. Set it
        where a dataset grows while its chunks stay as they are.
    stale_if_error : float or "infinity", optional
        Seconds past its age, from 0 on and fractions allowed, for which a value is still served if the source raises an
        error. An answer that there is no such key is no error. Default is 0: the error is raised. Set it where an old
        value is better than none. A source that never answers is waited for: give it a time-out of its own.
    revalidate : bool or "metadata", optional
        Compare a value that is too old with the source, by one small request, and read it again only if it has changed.
        `ObjectStore`, and `FsspecStore` over S3, GCS, Azure and HTTP, compare ETags; weak ones do not count.
        `LocalStore` compares modification time, size and number of the file. A class of your own takes part by its
        method ``validator``; see docs/freshness.md. Values of any other source are read again. "metadata" compares
        metadata documents only. Default is False. Without an age nothing is ever too old. Set it where large values
        change seldom. Unless one answer of the source brings bytes and ETag (`ObjectStore`), a miss costs two small
        requests more.
    offline : bool, optional
        Never ask the source. Cached values are served, however old they are; anything else raises `OfflineError`, and
        so do writes. Of the listings only `list_dir` and `is_empty` are answered, from the last answer of the source to
        `list_dir`. Default is None: whether the environment has ``ZCACHE_OFFLINE`` with a value other than ``""`` and
        ``"0"`` now. Set it where there is no network.
    max_size : int or str, optional
        Bytes that the cache store holds at most, at every instant: a whole number from 0 on, or text such as
        ``"256MB"`` (10**6) or ``"2 GiB"`` (2**30). A share, such as ``"25%"``, is one of the whole volume of a
        directory; elsewhere of the memory, or of what the control group of the process may use. It is resolved once:
        `max_size`, `cache_info` and copies have the bytes. Default is None, no bound. Set it to what the memory or disk
        behind `cache_store` can spare. A value larger than this is never cached. The folders of a directory count, with
        blocks of 4 KiB as 16 KiB before there is a value (in a pool 32 KiB): with less nothing is kept. If more is
        cached already, it is evicted at once, in a store other than memory, a directory or a pool from the first
        operation on.
    eviction : {"lru", "none", "adaptive"}, optional
        Which values are evicted for a new one. Default is None: that of the `CachePool`, if it was given one, else
        "lru", the least recently used. "none" keeps what came first until it expires or is dropped: of data that is
        read in whole passes, the share that fits. "adaptive" uses the one of several rules that has lately served most
        of a sample of the traffic. Set it where passes over more than `max_size` are read (training, animations), or
        where you do not know. All stores over one cache store use one policy: a store that asks for another one than
        those in use, in this process or another, gets a `UserWarning` and theirs. It also applies to decoded chunks;
        see docs/eviction.md.
    minimise : {"requests", "bytes", "seconds"}, optional
        The cost of misses that "adaptive" minimises, and plans under each policy (`will_read`). Default is None: that
        of the pool, else "requests". There a miss costs the same, whatever its size, so small values are kept rather
        than large ones. "bytes" is for a source that is paid for, or limited, by the byte. "seconds" weighs both by the
        measured latency and rate of the source.
    cache_missing : bool, optional
        Whether a key that the source does not have is remembered as missing, so that it is not asked for again. Default
        is True. A missing metadata document is remembered only while another document of its node is cached, such as
        ``zarr.json`` beside ``.zarray``. Set it to False where others add keys to the source that must be seen at once.
    missing_max_age_seconds : float or "infinity", optional
        Seconds, from 0 on and fractions allowed, for which a missing key is remembered; not longer than the maximum age
        of a value of that key. Default is 300, also where None is given. Set it lower where others add chunks that must
        be seen soon, and to "infinity" for data that does not change. One key for each 256 bytes of `max_size` is
        remembered, at least 1,024 and at most 2**20, the most recently used. Each takes about 64 bytes in the index,
        and none of `max_size`.
    cache_set_data : bool, optional
        Whether values that are written are cached as well. Default is True; set it to False where
        what is written is not read again soon. Of a store that exists it can be set, as an attribute.
    read_only : bool, optional
        Open the source anew with this setting. Default is None: as the source is.
    verify : {"first", "always", "never"}, optional
        When the bytes of a hit are compared with their CRC32C. Values in a `MemoryStore` are never compared, since they
        have not left the process. Default is "first": at the first hit of each process, which finds damage by a disk.
        "always" costs one pass over the bytes at each hit. "never" is for a cache store that checks by itself; after a
        loss of power, values of a cache directory are still checked once.
    adopt : bool, optional
        Use a cache store with contents that zcache did not make, which may then be served and evicted, or another
        user's directory. Default is False: such a store is refused.
    source_id : str, optional
        Name of the source, for a cache that outlives the process. Default is None: the URL or path and
        the endpoint of a `LocalStore`, `ZipStore`, `FsspecStore` or `ObjectStore`, or the repository and snapshot of a
        read-only icechunk session without virtual chunks. Any other store is a new source each time, so its cache
        starts cold. Copies of one store in other processes, forked or unpickled, share its cache; but sources in memory
        and writable sessions of icechunk are other sources there. Give one for a store without a name (a
        `MemoryStore`, an `FsspecStore` over a URL with a query or a fragment, a class or wrapper of your own), and
        where the same data is reached under several names; and one for each process for a class of your own that keeps
        its values itself and is written to.
    min_free_space : int or str, optional
        Bytes of the volume of a cache directory that stay free, written as for `max_size`. If fewer are free, zcache
        evicts before it writes. If evicting everything would not make room, the cache is kept, and nothing is added
        until there is room. Default is None: 5 % of the volume, at most 1 GiB. Set it higher where others write to the
        volume in bursts.
    max_pending_size : int or str, optional
        Bytes in memory, from 0 on and written as for `max_size` (a share is of the memory), that may wait to be written
        to the cache store. All stores over it in this process, and all sources of a pool, share them; the least that
        any asks for is in force. A single larger value is still taken. Default is None: 64 MiB. If they are used up,
        readers wait while the cache store makes progress. Set it lower where memory is short, higher where a slow cache
        store has to take in bursts.
    decoded_size : int or str, optional
        Bytes of decoded chunks that this process keeps in memory for this store and its copies, beside the encoded
        ones; from 0 on and written as for `max_size` (a share is of the memory). Default is None: none are kept. Set it
        where the same chunks are read again and again; arrays that are opened on the store afterwards use them.
    sampling : bool, optional
        Whether the requests of this store and its copies go into the sample that `advise` uses; docs/advice.md has what
        it costs. Default is True. Set it to False for reads that are not the usual work, such as a copy of everything.
        It does not affect other stores over the same cache.
    clock : callable, optional
        Returns the seconds by which ages and the pauses of the circuit breaker are counted. In a pool only the ages,
        since its sources share one breaker. Default is None: the clock of the system. Meant for tests; see
        `zcache.testing.FakeClock`.

    Raises
    ------
    OptionTypeError
        A `TypeError`: `store` or `cache_store` is no store, or an option is of the wrong type.
    OptionValueError
        A `ValueError`: an option has no meaning, or `cache_store` is the source itself, or cannot write or
        delete.
    CacheOwnershipError
        A `ValueError`: the cache store holds what zcache did not write, or what it wrote for another
        source.

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
    _cache: Cache

    def __init__(
        self,
        store: Store,
        *,
        cache_store: Store | CachePool | str | os.PathLike[str] | None = None,
        max_age_seconds: Age | Mapping[str, Age | None] | None = "infinity",
        max_size: Size | None = None,
        cache_set_data: bool = True,
        eviction: Policy | None = None,
        minimise: Minimised | None = None,
        metadata_max_age_seconds: Age | None = None,
        stale_if_error: Age = 0,
        offline: bool | None = None,
        cache_missing: bool = True,
        missing_max_age_seconds: Age | None = MISSING_MAX_AGE,
        revalidate: Revalidate = False,
        read_only: bool | None = None,
        verify: Verify = "first",
        adopt: bool = False,
        source_id: str | None = None,
        min_free_space: Size | None = None,
        max_pending_size: Size | None = None,
        decoded_size: Size | None = None,
        sampling: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        handled, cache = sys.exception(), None
        try:
            cache = _open_cache(
                store,
                cache_store,
                cache_set_data=cache_set_data,
                read_only=read_only,
                max_size=max_size,
                max_age_seconds=max_age_seconds,
                metadata_max_age_seconds=metadata_max_age_seconds,
                stale_if_error=stale_if_error,
                offline=offline,
                cache_missing=cache_missing,
                missing_max_age_seconds=missing_max_age_seconds,
                revalidate=revalidate,
                verify=verify,
                eviction=eviction,
                minimise=minimise,
                adopt=adopt,
                source_id=source_id,
                min_free_space=min_free_space,
                max_pending_size=max_pending_size,
                decoded_size=decoded_size,
                sampling=sampling,
                clock=clock,
            )
            self._setup(cache.source, cache, cache_set_data)
        except BaseException as error:
            clear_frames(error, handled)
            # This frame stays in the error.
            del self, cache_store, cache
            raise

    def _setup(self, store: Store, cache: Cache, cache_set_data: bool) -> None:
        super().__init__(read_only=store.read_only)
        self._store = store
        self._cache = cache
        self._options = cache.options
        # What is asked: nothing, where the store is offline.
        self._source: Any = OfflineSource() if self._options.offline else store
        self._decoded = cache.decoded
        self._lease: Lease | None = None
        self.cache_set_data = cache_set_data
        self._io = IO(self._source, cache.shared.threads)
        self._sync_io = SyncIO(self._source, cache.shared.threads)
        self._reader, self._hits = cache.reader, cache.reader.hits
        self._writer = cache.writer
        # Asked anew only where the answer was no: a protocol check costs more than a hit.
        self._syncable = is_sync(store) and keeps_sync(cache.cache)

    def __setattr__(self, name: str, value: object) -> None:
        own = getattr(CacheStore, name, None)
        # A subclass may have what it likes under the name of an option that is no attribute here.
        if getattr(type(self), name, None) is own and (own or type(self) is CacheStore):
            if name in _OPTIONS:
                raise AttributeError(
                    f"{name} cannot be set, for all copies of a store share it. Make a new store in the place of this one: "
                    f"CacheStore(store, cache_store=..., {name}={value!r:.100})."
                )
            if name == "read_only":
                raise AttributeError(
                    f"read_only cannot be set. Use store.with_read_only({value!r:.100})."
                )
        if name == "cache_set_data":
            check_flag(name, value)
        super().__setattr__(name, value)

    def _derive(self, store: Store) -> Self:
        derived = type(self).__new__(type(self))
        vars(derived).update(self._of_subclass())
        derived._setup(store, self._cache, self.cache_set_data)
        derived._decoded, derived._lease = self._decoded, self._lease
        return derived

    def _with_decoded_size(self, size: int) -> Self:
        """A store that shares all with this one but keeps decoded chunks of its own."""
        derived = self._derive(self._store)
        derived._is_open = self._is_open
        derived._decoded = self._cache.own_decoded_chunks(size, uuid.uuid4().hex)
        return derived

    def _of_subclass(self) -> dict[str, Any]:
        """What a subclass has added, which goes along with every copy."""
        return {name: value for name, value in vars(self).items() if name not in _OWN}

    # ----------------------------------------------------- what it is

    @property
    def _cache_store(self) -> Store:
        return self._cache.cache

    @property
    def max_size(self) -> int | None:
        """Bytes that this store was given as the bound; None for none. `cache_info` has the one in force."""
        return self._options.max_size

    @property
    def eviction(self) -> Policy:
        """The policy in force: what was asked for, or that of the stores that used the cache store already."""
        return self._cache.policy()[0]

    @property
    def minimise(self) -> Minimised:
        """The cost that the policy in force minimises."""
        return self._cache.policy()[1]

    @property
    def min_free_space(self) -> int | None:
        """Bytes of the volume of a cache directory that stay free; None for the default."""
        return self._options.min_free_space

    @property
    def max_age_seconds(self) -> Age | dict[str, Age]:
        """Seconds after which a value is read from the source again, or "infinity"; or these by pattern."""
        given = self._options.max_age_seconds
        return dict(given) if isinstance(given, Mapping) else given

    @property
    def metadata_max_age_seconds(self) -> Age | None:
        """The same for metadata documents; None if `max_age_seconds` applies to them."""
        return self._options.metadata_max_age_seconds

    @property
    def revalidate(self) -> Revalidate:
        """Whether values that are too old are compared before they are read again; "metadata" for documents only."""
        return self._options.revalidate

    @property
    def stale_if_error(self) -> Age:
        """Seconds past its age for which a value is served where the source raises, or "infinity"."""
        seconds = self._options.stale_if_error
        return "infinity" if seconds == math.inf else seconds

    @property
    def offline(self) -> bool:
        """Whether the source is never asked."""
        return self._options.offline

    @property
    def cache_missing(self) -> bool:
        """Whether keys that the source does not have are remembered."""
        return self._options.cache_missing

    @property
    def missing_max_age_seconds(self) -> Age:
        """Seconds for which a missing key is remembered at most, or "infinity"."""
        return self._options.missing_max_age_seconds

    @property
    def sampling(self) -> bool:
        """Whether the requests of this store are sampled, for `advise`."""
        return self._options.sampling

    def cache_info(self) -> dict[str, Any]:
        """Describe the cache.

        Returns
        -------
        dict
            - ``cache_store_type``: name of the class.
            - ``max_age_seconds``: seconds, "infinity", or a dict of these by pattern.
            - ``max_size``: bytes, the smallest bound of all stores over the cache store; None if none has one.
            - ``current_size``: bytes in the cache store, including values with a failed delete; on a disk the most that
              its files may take, see `CachePool.cache_info`.
            - ``cache_set_data``: the option.
            - ``tracked_keys``, ``cached_keys``: both the number of entries (in a pool, of all sources), including those
              that are too old to be served. A full value is one entry, and so is each range of a value that is not
              cached as a whole.

        Raises
        ------
        IndexLockTimeout
            A `TimeoutError`: another process holds the lock of the index for more than a second.
        """
        size, entries, bound = self._size_entries_and_bound()
        return {
            "cache_store_type": type(self._cache_store).__name__,
            "max_age_seconds": self.max_age_seconds,
            "max_size": bound,
            "current_size": size,
            "cache_set_data": self.cache_set_data,
            "tracked_keys": entries,
            "cached_keys": entries,
        }

    def _size_entries_and_bound(self) -> tuple[int, int, int | None]:
        """What is cached, and the bound in force; where there is no index, or none of it, the one that was asked for."""
        size, entries, bound = self._cache.ask(_size_entries_and_bound)
        is_told = bound is not None and self._cache.shared.handle.usable
        return size, entries, bound if is_told else self.max_size

    def cache_stats(self) -> dict[str, Any]:
        """Count what happened since the store was made. Waits for nothing.

        Copies of a store (`with_read_only`, pickles that arrive in the same process) count together with it. Another
        store over the same cache counts its own reads. A rebuild of the index does not reset the counts. A forked child
        continues from those of its parent; a copy in another process begins at zero. docs/troubleshooting.md says what
        to do about each.

        Returns
        -------
        dict
            Reads of this store:

            - ``hits``: served by the cache, by its store or by a value on its way there.
            - ``misses``: all others.
            - ``total_requests``: hits and misses.
            - ``hit_rate``: hits divided by requests; 0.0 where there were none. Decoded hits are neither.
            - ``negative_hits``: answered because the key was known to be missing; neither hits nor misses.
            - ``missing_keys``: keys that are remembered as missing, including those that are too old to be served, as
              far as this process has looked.
            - ``bypassed``: requests for keys that are never cached; docs/freshness.md has the list.
            - ``damaged``: hits with bytes that were gone, of another length or with a wrong checksum; not in a
              directory that is only read, where others may have evicted them.
            - ``stale_hits``: values, sizes and listings that were too old, because the source raised an error
              (`stale_if_error`).
            - ``cache_skips``: reads and writes that did not use the cache store, because it kept failing or its index
              was locked, and fills that were cut off with their event loop. Of a read-only one also reads of what
              another read already brings, which may be older than a change by others.

            The cache store, for all stores of this process over it:

            - ``evictions``: entries removed to make room.
            - ``expirations``: evictions of stale entries.
            - ``refusals``: values, read or written, left uncached: too large, overtaken by a write, no room, a name
              that the cache store cannot take, or a cache store that was still being listed.
            - ``cache_failures``: operations that raised or did not answer in time.

            Decoded chunks, which are inner chunks where there are shards:

            - ``decoded_hits``: chunks that were kept, or were being decoded for another reader.
            - ``decoded_misses``: chunks that were not.
            - ``decoded_size``: bytes that are kept now, or are being decoded to be kept; for each chunk 1,024 or more
              beside its elements.
            - ``decode_seconds``: time in the wrapped codec pipeline, which reads and decodes what is missing.
        """
        counts = self._cache.stats(self._decoded)
        total = counts["hits"] + counts["misses"]
        first = {name: counts.pop(name) for name in ("hits", "misses", "evictions")}
        return {
            **first,
            "total_requests": total,
            "hit_rate": first["hits"] / total if total else 0.0,
            **counts,
        }

    def is_cached(self, key: str, byte_range: ByteRequest | None = None) -> bool:
        """Tell whether a read would be served by the cache store.

        Parameters
        ----------
        key : str
            The key.
        byte_range : ByteRequest, optional
            The part of its value; a cached full value has all parts. Default is None: the full value.

        Returns
        -------
        bool
            False also for a value that is too old to be served, for one that is still on its way into the cache store
            (see `drain`), and for a key that is known to be missing. In a cache that is only read, a value that others
            have dropped may count until a read misses it.

        Raises
        ------
        OptionTypeError
            `key` is no text, or `byte_range` no request of zarr's.
        IndexLockTimeout
            A `TimeoutError`: another process holds the lock of the index for more than a second.
        """
        check_key(key)
        check_byte_range(byte_range)
        try:
            parsed = to_byte_range(byte_range)
        except ValueError:
            return False
        if not is_cacheable_key(key):
            return False
        now, age = self._reader.now(), self._reader.ages.of(key)
        return self._cache.ask(lambda index: index.peek(key, parsed, now, age)) is not None

    def cached_keys(self, prefix: str = "") -> CachedKeys:
        """Go through the keys of which something can be served from the cache store.

        Parameters
        ----------
        prefix : str, optional
            A key or a directory: only that key and those below it. Default is "", all.

        Returns
        -------
        CachedKeys
            An iterator over keys, for ``for`` and for ``async for``, in no order. It takes them from the
            index a batch at a time, as they are then. Each key that is cached all the time comes once,
            whatever happens to others meanwhile; one that goes and comes back may come twice. Of a
            cache that is only read from they are those of its last look at what others have added.

        Raises
        ------
        OptionTypeError
            A `TypeError`: the prefix is no text.
        IndexLockTimeout
            While iterating: another process holds the lock of the index for more than a second.
        """
        return CachedKeys(self._cache.shared, self._reader.ages, self._io, check_prefix(prefix))

    async def invalidate(self, prefix: str = "") -> int:
        """Forget cached values, so that they are read from the source again. The source is not changed.

        Parameters
        ----------
        prefix : str, optional
            A key or a directory: that key, with all its byte ranges, and all keys below it. Default is "",
            everything.

        Returns
        -------
        int
            How many entries were forgotten: full values and byte ranges. Keys that are remembered as missing
            are forgotten as well, but not counted.

        Raises
        ------
        OptionTypeError
            A `TypeError`: the prefix is no text.
        IndexLockTimeout, CacheUnreachableError
            If other processes that use the cache directory cannot be told, or it is only read from.
        """
        return await self._writer.invalidate(self._io, check_prefix(prefix))

    def invalidate_sync(self, prefix: str = "") -> int:
        """Forget the same without an event loop; see `invalidate`.

        Raises
        ------
        SyncNotSupportedError
            A `TypeError`: the cache store has no synchronous methods.
        """
        check_prefix(prefix)
        if self._cache.backend.needs_loop:
            raise SyncNotSupportedError(
                f"invalidate_sync needs a cache store with synchronous methods, but {show(self._cache_store)} "
                "has none. Use invalidate instead."
            )
        return run_without_loop(self._writer.invalidate(self._sync_io, prefix))

    async def clear_cache(self) -> None:
        """Empty the cache; of a pool, what it holds of this source. The source itself is not changed.

        What zcache did not write stays.

        Raises
        ------
        IndexLockTimeout, CacheUnreachableError
            If other processes that use the cache directory cannot be told, or it is only read from.
        """
        await self._writer.clear(self._io)
        if self._decoded is not None:
            self._decoded.clear()

    def will_read(self, keys: Iterable[str]) -> int:
        """Say what will be read, in order, so that the cache keeps the values that are needed soonest.

        For programs that know the order, such as a sampler at the beginning of an epoch. While the plan holds, values
        that are needed late, take much room and are cheap to read again are evicted first. For values of one size this
        is nearly Belady's optimal replacement. Values in no plan stay if they are read often. The plan is a hint: reads
        are right whatever it says, and `max_size` holds.

        All stores over this cache (in a `CachePool`: over this source of it) in this process share one plan; a new call
        replaces it. Other processes, forked children and copies that are unpickled elsewhere have none. A plan ends when
        all was read, or when the reads do not follow it; then `eviction` alone decides. docs/eviction.md has the rules,
        the tolerance for reads out of order, and what a plan costs.

        It takes time in proportion to the keys and to what is cached; in an event loop use
        ``await asyncio.to_thread(store.will_read, keys)``.

        Parameters
        ----------
        keys : iterable of str
            Keys as `get` gets them, each as often as it will be read. A key stands for its value and for all byte
            ranges of it. At most 1,000,000 are taken from it, and at once: an endless iterable is fine, and
            what comes after them is left to `eviction`. Without keys, as in ``will_read(())``, the plan is forgotten.

        Returns
        -------
        int
            Keys of the plan; 0 also if another process held the lock of the index for more than a second.

        Raises
        ------
        OptionTypeError
            A `TypeError`: it is no iterable of str. The plan before stays, as it does after any error of the iterable itself.

        Examples
        --------
        >>> order = [f"images/c/{n}/0/0" for n in rng.permutation(50_000)]  # doctest: +SKIP
        >>> store.will_read(order)  # doctest: +SKIP
        50000
        """
        return follow(self._cache.shared.handle, keys)

    def advise(
        self,
        *,
        sizes: Iterable[Size] | None = None,
        policies: Iterable[str] | None = None,
    ) -> Advice:
        """Say how large the cache should be, and which policy suits it, from the requests so far.

        The index keeps a sample of all requests through stores with ``sampling=True``, for a directory those of
        all processes, over restarts; here each size and policy is simulated on it. That takes two or three seconds for
        a full sample, without the lock of the index or of the interpreter: in an event loop use
        ``await asyncio.to_thread(store.advise)``.

        Parameters
        ----------
        sizes : iterable of int or str, optional
            Bytes, or text such as ``"2 GiB"``. Default is None: from 1/16 to 16 times the smallest `max_size` of all
            stores over the cache. If there is none, the cached bytes take its place; if it is 0, the bytes of all
            values requested.
        policies : iterable of str, optional
            Any of "lru", "none" and "adaptive". Default is None: all.

        Returns
        -------
        Advice
            False in a condition, with a `reason`, after fewer than 100 requests, and where nothing is cached and no
            store has a `max_size`.

        Raises
        ------
        OptionTypeError, OptionValueError
            If a size or a policy is invalid.
        IndexLockTimeout
            A `TimeoutError`: another process holds the lock of the index for more than a second.
        """
        parsed, named = parse_sizes(sizes), parse_policies(policies)
        size, _, bound = self._size_entries_and_bound()
        eviction, _ = self._cache.ask(Index.policy)
        self._cache.note_pending_sizes()
        off = "" if self._options.sampling else "this store was made with sampling=False"
        return advise(
            self._cache.ask(
                partial(
                    sampled,
                    header=self._cache.backend.value_header,
                    slices_like_python=self._cache.reader.slices_like_python,
                )
            ),
            max_size=bound,
            in_use=size,
            policy=eviction,
            sizes=parsed,
            policies=named,
            nothing=off,
        )

    def record(self, path: str | os.PathLike[str], *, anonymous: bool = False) -> Recording:
        """Write the requests of this store and its copies, in this process, to a file while they are made.

        The file is CSV in gzip, with a line for each read of a value that the source has. Its columns are ``time``
        (seconds since the beginning), ``key``, ``range`` (``first-end``, ``first-``, ``-count``, or nothing for the
        whole value), ``size`` (bytes of the answer), ``hit`` (0 or 1), ``entry_range`` and ``entry_size`` of the entry
        that has served it, and ``outdated`` (1 if the cached value was too old to be served). A size that is not known
        at the end is left out. `replay` reads it.

        A reader does no more than put its request into a queue; a thread writes it. An error of the file
        ends the recording with a warning in the log, never a read.

        Parameters
        ----------
        path : str or PathLike
            Of the file, such as ``"requests.csv.gz"``; a ``~`` at the beginning is the home of a user. It must not
            exist.
        anonymous : bool, optional
            Write a hash in the place of each key, with a secret that is thrown away. Equal keys stay equal; ranges,
            sizes and times stay as they are. Default is False. Set it for a file that others are to see.

        Returns
        -------
        Recording
            A context manager. The recording ends with the block, by its `close`, when nothing refers to it any more, or
            when the process exits.

        Raises
        ------
        RecordingExistsError
            A `FileExistsError`: there is such a file.
        OSError
            If it cannot be made.
        OptionTypeError, OptionValueError
            If `anonymous` is no bool, or no file can have such a path.
        UsageError
            A `RuntimeError`: this store, or a copy of it, is being recorded already.
        IndexLockTimeout
            A `TimeoutError`: another process holds the lock of the index for more than a second.
        """
        check_flag("anonymous", anonymous)
        limits = self._cache.shared.handle.limits
        about = {
            "max_size": self._cache.ask(_bound),
            "block_size": limits.get("unit", 1),
            "value_header": self._cache.backend.value_header,
            "slices_like_python": self._cache.reader.slices_like_python,
            "eviction": limits["eviction"],
        }
        return Recording(RequestWriter(self._hits, path, anonymous=anonymous, about=about))

    async def drain(self, timeout: Age = DRAIN_TIMEOUT) -> bool:  # noqa: ASYNC109
        """Wait until all values that were read or written before are in the cache store, or were refused.

        It also waits for the listing of a cache store that has to be listed first.

        Parameters
        ----------
        timeout : float or "infinity", optional
            Seconds, from 0 on. Default is 60.

        Returns
        -------
        bool
            False if it took longer. The fills continue.

        Raises
        ------
        OptionTypeError, OptionValueError
            If `timeout` is no such number.
        CacheOwnershipError
            If the listing has found that the cache store belongs to another source.
        """
        return await self._cache.drain(self._io, parse_timeout(timeout))

    def drain_sync(self, timeout: Age = DRAIN_TIMEOUT) -> bool:
        """Wait for the same without an event loop; see `drain`.

        Raises
        ------
        UsageError
            A `RuntimeError`: the event loop of this very thread fills the cache store: it cannot go on meanwhile.
        """
        seconds = parse_timeout(timeout)
        fills = self._cache.shared.fills
        if fills is not None and not fills.can_wait_here():
            raise UsageError(
                "drain_sync() was called in the event loop that fills the cache store. Use "
                "`await store.drain()` there."
            )
        return run_without_loop(self._cache.drain(self._sync_io, seconds))

    def __eq__(self, other: object) -> bool:
        """Whether both read and write the same source, whatever they keep and where.

        By this zarr refuses to overwrite an array with itself, which would delete it before it is copied.
        """
        if not isinstance(other, CacheStore):
            return NotImplemented
        if type(self) is not type(other) or self.read_only != other.read_only:
            return False
        mine, theirs = self._store, other._store
        return mine == theirs or same_source(
            (mine, self._cache.source_id), (theirs, other._cache.source_id)
        )

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"cache://{show_address(self._store)}"

    def __repr__(self) -> str:
        told: tuple[object, ...] = "unknown", "unknown", self.max_size
        with contextlib.suppress(IndexLockTimeout):
            told = self._size_entries_and_bound()
        size, entries, bound = told
        options: dict[str, object] = {"max_age_seconds": self.max_age_seconds}
        if self.metadata_max_age_seconds is not None:
            options["metadata_max_age_seconds"] = self.metadata_max_age_seconds
        options |= {
            name: value
            for name in ("revalidate", "stale_if_error", "offline")
            if (value := getattr(self, name))
        }
        shown = "".join(f"{name}={value!r}, " for name, value in options.items())
        return (
            f"{type(self).__name__}(store={show(self._store)}, cache_store={show(self._cache_store)}, "
            f"{shown}max_size={bound!r}, "
            f"current_size={size}, cached_keys={entries})"
        )

    def __dask_tokenize__(self) -> Any:
        # What is read through it is what the source has: the cache makes no other dataset of it.
        return type(self).__qualname__, self._cache.source_id.name, self.read_only

    def __getstate__(self) -> dict[str, Any]:
        cache = self._cache
        decoded, own = self._decoded, None
        if decoded is not None and decoded is not cache.decoded:
            own = decoded.max_size, decoded.token
        # Contents stay: a cache in memory travels empty.
        kept, options = cache.cache, replace(self._options, adopt=False)
        if cache.source_id.is_ephemeral and not cache.is_of_process:
            # Copies read the same data.
            options = replace(options, source_id=cache.source_id.name)
        return {
            "store": self._store,
            "cache": without_contents(kept),
            "options": options,
            "set": self.cache_set_data,
            "own_decoded": own,
            "trusted": trusted_root(kept),
            "token": cache.token,
            # Not one of its copies elsewhere.
            "first": cache.home == os.getpid(),
            "open": self._is_open,
            "more": self._of_subclass(),
            # Mostly there are none.
            **({"changes": version} if (version := cache.shared.changes.version) else {}),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (trusted := state["trusted"]) is not None:
            trust(trusted)
        cache, store = find_or_make(
            state["token"],
            state["store"],
            state["cache"],
            state["options"],
            # Stores that an earlier release has pickled do not say.
            is_first=state.get("first", True),
        )
        vars(self).update(state["more"])
        self._setup(store, cache, state["set"])
        if state["own_decoded"] is not None:
            self._decoded = cache.own_decoded_chunks(*state["own_decoded"])
        self._lease = cache.lease(self._decoded)
        cache.meet(state.get("changes", {}), self._sync_io)
        self._is_open = state["open"]

    # ---------------------------------------------------- open and close

    async def _open(self) -> None:
        # The source first: where it cannot be opened, neither is this.
        if not self._options.offline:
            await self._store._ensure_open()
        await super()._open()

    async def _ensure_open(self) -> None:
        # docstring inherited
        if not self._is_open:
            # Many may come here at once, and opening the source may suspend; `_open` is for one.
            if not self._options.offline:
                await self._store._ensure_open()
            self._is_open = True

    def close(self) -> None:
        """Close the source, once pending fills have reached the cache store (5 seconds at most).

        The cache store stays open: copies of this store may share it. Fills that take longer continue after it, until
        the process ends. So do those that run in the event loop of the caller; `await store.drain()` waits for them.
        """
        fills = self._cache.shared.fills
        if fills is not None and fills.can_wait_here():
            run_without_loop(self._cache.drain(self._sync_io, CLOSE_TIMEOUT))
        if not self._options.offline:
            self._store.close()
        super().close()

    def with_read_only(self, read_only: bool = False) -> Self:
        """A store over the source with this setting, which shares cache, index and counters."""
        check_flag("read_only", read_only)
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
        return is_sync(self._store) and keeps_sync(self._cache_store)

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
            parsed = None if byte_range is None else to_byte_range(byte_range)
        except ValueError:
            check_key(key)
            self._hits.count_miss()
            return await self._reader.bypass(self._io, key, prototype, byte_range)
        # A hit that needs no waiting ends here: no other coroutine, and one call into the index.
        value, hit = self._hits.get_nowait(key, prototype, parsed)
        if value is not None:
            return value
        try:
            if hit is None:
                return await self._reader.fetch(self._io, key, prototype, byte_range, parsed)
            if hit is ABSENT:
                self._hits.begin(self._io)
                return None
            return await self._reader.get(self._io, key, prototype, byte_range, parsed, hit)
        except BaseException:
            self._hits.retract_request(key, parsed)
            raise

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read without an event loop; see `get`. Needs synchronous methods of both stores.

        Raises
        ------
        SyncNotSupportedError
            A `TypeError`: the source or the cache store has no synchronous methods.
        """
        if not self._syncable:
            self._check_sync("get_sync")
        if prototype is None:
            prototype = default_buffer_prototype()
        io = self._sync_io
        try:
            parsed = None if byte_range is None else to_byte_range(byte_range)
        except ValueError:
            check_key(key)
            self._hits.count_miss()
            return run_without_loop(self._reader.bypass(io, key, prototype, byte_range))
        value, hit = self._hits.get_nowait(key, prototype, parsed)
        if value is not None:
            return value
        try:
            return run_without_loop(self._reader.get(io, key, prototype, byte_range, parsed, hit))
        except BaseException:
            self._hits.retract_request(key, parsed)
            raise

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        # docstring inherited
        requests = list(key_ranges)

        fetch = from_partial_values(self._source, prototype, requests)
        values: list[Buffer | None] = [None] * len(requests)
        batch = Batch(
            self._reader,
            self._io,
            prototype,
            requests,
            fetch,
            trusts_absences=self._options.offline or finds_none_in_many(self._store),
        )

        def take(group: Group) -> None:
            for number, value in group:
                values[number] = value

        await batch.run(take)
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

        fetch = from_ranges(self._source, prototype, requests, given)
        batch = Batch(self._reader, self._io, prototype, requests, fetch)
        if batch.has_invalid_range:
            # The source joins ranges, and gives to this one what it makes of all of them.
            batch.count_bypassed(len(requests))
            bring: Callable[[Put], Coroutine[Any, Any, None]] = partial(
                fetch, list(range(len(requests)))
            )
        else:
            bring = batch.bring
        try:
            if not batch.has_invalid_range:
                if ready := batch.look_up():
                    await _raise_if_missing(ready, requests, prototype)
                    yield ready
                if batch.is_over:
                    return
            # Others wait for what this brings, so it goes on even while its caller does something else.
            async with Handover(bring, CANCEL_TIMEOUT) as groups:
                async for group in groups:
                    await _raise_if_missing(group, requests, prototype)
                    yield group
        finally:
            # Its caller may leave before anything is asked for.
            batch.end()

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
        fetch = from_ranges_sync(self._source, prototype, requests, options)

        batch = Batch(self._reader, self._sync_io, prototype, requests, fetch)
        found: list[tuple[int, Buffer | None]] = []

        async def collect() -> None:
            if batch.has_invalid_range:
                batch.count_bypassed(len(requests))
                await fetch(list(range(len(requests))), found.extend)
            else:
                await batch.run(found.extend)
            await _raise_if_missing(found, requests, prototype, sync=True)

        run_without_loop(collect())
        return found

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
        check_key(key)
        return await self._cache.sizes.exists(self._io, key)

    async def getsize(self, key: str) -> int:
        # docstring inherited
        check_key(key)
        return await self._cache.sizes.of(self._io, key)

    async def getsize_prefix(self, prefix: str) -> int:
        # docstring inherited
        if check_prefix(prefix) and not prefix.endswith("/"):
            prefix += "/"
        keys = [(key,) async for key in self.list_prefix(prefix)]
        size_of = partial(self._cache.sizes.of, self._io, is_listed=True)
        return sum(await concurrent_map(keys, size_of, limit=config.get("async.concurrency")))

    # ------------------------------------------------------------ writes

    async def set(self, key: str, value: Buffer) -> None:
        # docstring inherited
        self._check_may_write(key)
        await self._set(self._io, key, value, lambda: self._source.set(key, value))

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write without an event loop; see `set` and `get_sync`."""
        self._check_sync("set_sync")
        self._check_may_write(key)
        source = self._source
        run_without_loop(self._set(self._sync_io, key, value, _later(source.set_sync, key, value)))

    async def _set(
        self, io: IO, key: str, value: Buffer, work: Callable[[], Awaitable[None]]
    ) -> None:
        # The caller may use its buffer again as soon as this returns: the cache keeps a copy.
        data = snapshot(value) if self.cache_set_data and isinstance(value, Buffer) else None
        await self._writer.write(io, key, work, data)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        # docstring inherited
        self._check_may_write(key)
        # It does not tell which value the source holds afterwards.
        work = self._source.set_if_not_exists
        await self._writer.write(self._io, key, lambda: work(key, value), None)

    async def delete(self, key: str) -> None:
        # docstring inherited
        self._check_may_write(key)
        # Some stores delete all that lies below the key with it.
        await self._writer.change(self._io, key, lambda: self._source.delete(key))

    def delete_sync(self, key: str) -> None:
        """Delete without an event loop; see `delete` and `get_sync`."""
        self._check_sync("delete_sync")
        self._check_may_write(key)
        source = self._source
        run_without_loop(self._writer.change(self._sync_io, key, _later(source.delete_sync, key)))

    async def delete_dir(self, prefix: str) -> None:
        # docstring inherited
        self._check_may_write(prefix)
        await self._writer.change(self._io, prefix, lambda: self._source.delete_dir(prefix))

    async def clear(self) -> None:
        """Delete all keys of the source, and with them what is cached; `clear_cache` empties the cache alone."""
        self._check_may_write("")
        await self._writer.change(self._io, "", self._source.clear)

    def _check_may_write(self, key: str) -> None:
        check_key(key)
        self._check_writable()
        if self._options.offline:
            raise no_change(key)

    def _check_sync(self, method: str) -> None:
        both = (("source", self._store, is_sync), ("cache store", self._cache_store, keeps_sync))
        for name, store, is_able in both:
            if not is_able(store):
                raise SyncNotSupportedError(
                    f"{method} needs stores with synchronous methods, but the {name} "
                    f"{show(store)} has none. Use {method.removesuffix('_sync')} instead."
                )

    # ---------------------------------------------------------- listings

    async def is_empty(self, prefix: str) -> bool:
        # docstring inherited
        return await self._cache.lister.is_empty(self._io, check_prefix(prefix))

    def list(self) -> AsyncIterator[str]:
        # docstring inherited
        return cast("AsyncIterator[str]", self._source.list())

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        # docstring inherited
        return cast("AsyncIterator[str]", self._source.list_prefix(check_prefix(prefix)))

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        # docstring inherited
        return self._cache.lister.list_dir(self._io, check_prefix(prefix))


def _open_cache(
    store: Store,
    cache_store: Store | CachePool | str | os.PathLike[str] | None,
    *,
    cache_set_data: object,
    read_only: bool | None,
    **given: Any,
) -> Cache:
    """The cache of a new store, with these options; see `CacheStore`."""
    store = settled(check_store("store", store))
    policy: dict[str, str] = {"eviction": DEFAULT_POLICY, "minimise": DEFAULT_MINIMISED}
    if cache_store is None:
        cache_store = MemoryStore()
    elif isinstance(cache_store, CachePool):
        policy = cache_store._pool.policy()
        cache_store = cache_store._store
    # A mock of a store can pretend to be a path as well.
    is_store = hasattr(cache_store, "supports_deletes")
    if isinstance(cache_store, (str, os.PathLike)) and not is_store:
        cache_store = LocalStore(path_of_cache_store(cache_store))
    cache_store = check_cache_store(store, cache_store)
    for name, choice in policy.items():
        if given[name] is None:
            given[name] = choice
    options = parse_options(partial(capacity_of, cache_store), **given)
    # No options of what all copies share.
    parse_options(memory, cache_set_data=cache_set_data, read_only=read_only)
    if read_only is not None and read_only != store.read_only:
        store = store.with_read_only(read_only)
    return Cache(store, cache_store, CacheOptions(**options))


async def _raise_if_missing(
    found: Group, requests: list[Request], prototype: BufferPrototype, *, sync: bool = False
) -> None:
    """Raise what the source raises for ranges of a missing key, if this is one."""
    if any(value is None for _, value in found):
        ranges = [byte_range for _, byte_range in requests]
        await raise_for_ranges(requests[0][0], ranges, prototype, sync=sync)


def _later(work: Callable[..., None], *args: Any) -> Callable[[], Awaitable[None]]:
    async def call() -> None:
        work(*args)

    return call


def _bound(index: Index) -> int | None:
    return index.bound


def _size_entries_and_bound(index: Index) -> tuple[int, int, int | None]:
    return index.current_size, len(index), index.bound
