"""`zcache.open`: a URL, through a pool of values of all sources."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Unpack

from zcache._backends.pool.options import PoolOptions
from zcache._backends.pool.select import pool_of
from zcache._backends.pool.stores import MEMORY, PoolMemoryStore, PoolStore
from zcache._cache_options import parse_options
from zcache._index.shared import policy_in_force
from zcache._options import (
    capacity_of,
    check_cache_store,
    parse_offline,
    parse_size,
    path_of_cache_store,
)
from zcache._runtime import lingering
from zcache._runtime.capacity import memory, volume
from zcache._runtime.fork import at_fork
from zcache._runtime.tracebacks import clear_frames
from zcache._source.opening import open_source, plain
from zcache.exceptions import OptionTypeError, OptionValueError
from zcache.pool import CachePool
from zcache.store import CacheStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zarr.abc.store import Store
    from zarr.storage import StorePath

    from zcache._backends.pool.place import Pool
    from zcache._types import Size, StoreOptions

DEFAULT_SHARE: Final = "20%"
"""What a pool may take of its volume or of the memory, unless an option says how much."""
_PATIENCE: Final = 1.0
"""Seconds for which a pool that no store uses any more is waited for."""

_ELSEWHERE: Final = {
    "store": 'Give it as the first argument, as in zcache.open("s3://bucket/key")',
    "cache_store": "Give cache=, or use zcache.CacheStore(store, cache_store=...)",
    "max_size": "Give it by its name",
    "mode": "Give it to zarr or xarray; or, for the permissions of a pool, cache=CachePool(path, mode=...)",
}
"""Names that are no further options of `CacheStore`, and what to do instead."""

_log = logging.getLogger("zcache")


def open(  # noqa: A001 - called `zcache.open`, like `zarr.open`
    url: str | os.PathLike[str] | Store | StorePath,
    *,
    cache: str | os.PathLike[str] | CachePool | None = None,
    max_size: Size | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **options: Unpack[StoreOptions],
) -> CacheStore:
    """Open a URL through a cache that all datasets share.

    May be called from any thread, within a running event loop or without one. It reads nothing from the source yet,
    except the table of contents of an archive (``zip://a::https://...``) and the references of ``reference::``, for
    which it blocks. In an event loop use ``await asyncio.to_thread(zcache.open, url)`` for those.

    Parameters
    ----------
    url : str, PathLike or Store
        The source, as zarr can open it: a URL (``s3://``, ``gs://``, ``az://``, ``https://``, ``memory://``, a chain
        such as ``simplecache::s3://``), or a directory or a zip file on a local disk, with or without ``file://``. Also
        a store, a `StorePath` of one without a path, or a mapping of ``fsspec.get_mapper``. A URL is read by fsspec's
        client where that is installed, and else by obstore. The source can be written to as well, unless it is a zip
        file or ``read_only=True`` is given.
    cache : str, PathLike, CachePool or "memory", optional
        Where values are kept: the directory of a pool, on a local disk (``~`` is your home), which is made if it does
        not exist; a pool; or "memory" for a pool in memory that this process shares. All stores of a process over one
        directory share one pool. Default is None: the directory of ``$ZCACHE_DIR`` in the environment, else the user's
        cache directory, such as ``~/.cache/zcache``. Set it where that is small, or on a network file system.
    max_size : int or str, optional
        Bytes that the whole pool holds at most, with the values of all other sources; written as for `CacheStore`.
        Default is None: the bound that the pool has in this process, else 20 % of the volume of the directory, or of
        the memory that this process may use. The log gives that default. Set it to what can be spared.
    storage_options : mapping of str, optional
        Options of the client, such as ``{"anon": True}``: those of fsspec, or of ``obstore.store.from_url`` where
        obstore reads. Default is None: none. Neither the log nor the cache ever has their values.
    **options
        All other options of `CacheStore`, such as ``max_age_seconds``. The default eviction policy is that of
        the pool. With ``read_only=False`` a path need not exist yet.

    Returns
    -------
    CacheStore
        To be given to ``xarray.open_zarr``, ``zarr.open`` and others.

    Raises
    ------
    OptionTypeError
        A `TypeError`: an option has the wrong type, or there is none of its name.
    OptionValueError
        A `ValueError`: an option has no meaning, the scheme of `url` is unknown, or the pool is open with another
        `max_size`.
    NoSuchSourceError
        A `FileNotFoundError`: there is nothing at the path.
    MissingClientError
        An `ImportError`: the package is not installed that reads such URLs.
    CacheOwnershipError
        A `ValueError`: `cache` is a directory with something else in it, or another user's. To read from a pool to which you
        may not write, give ``cache=CachePool(path, read_only=True)``: `read_only` is about the source.

    Examples
    --------
    >>> import zarr, zcache
    >>> _ = zarr.create_array("memory://example", shape=4, dtype="i4", fill_value=42)
    >>> store = zcache.open("memory://example", cache="memory", max_size="256MB")
    >>> int(zarr.open_array(store, mode="r")[0])
    42
    """
    handled = sys.exception()
    try:
        return _open(url, cache, max_size, storage_options, {**options})
    except BaseException as error:
        clear_frames(error, handled)
        # This frame stays in the error.
        del url, cache, storage_options, options
        raise


def _open(
    url: str | os.PathLike[str] | Store | StorePath,
    cache: str | os.PathLike[str] | CachePool | None,
    max_size: Size | None,
    storage_options: Mapping[str, Any] | None,
    options: dict[str, Any],
) -> CacheStore:
    _check_names(options)
    read_only, adopt = options.get("read_only"), options.get("adopt", False)
    place = _place(cache)
    # Before anything is made there.
    parse_options(place.capacity, **options)
    size = parse_size(
        max_size, whole=place.capacity, none=f"the bound that the pool has, else {DEFAULT_SHARE}"
    )
    may_be_new = read_only is False or parse_offline(options.get("offline"))
    source = open_source(url, storage_options, read_only=read_only, must_exist=not may_be_new)
    check_cache_store(source, place.store, f"{place.option}: {place.name!r}")
    for _ in lingering.looks(_PATIENCE):
        place = _place(cache)
        pool = _pool(place, size, adopt=adopt)
        if size in (None, pool.max_size) or place.pool or pool.is_in_use:
            break
        # Stores that were dropped have it until their last values are there.
        del pool, place
    else:
        place = _place(cache)
        pool = _pool(place, size, adopt=adopt)
    if size is not None and size != pool.max_size:
        raise OptionValueError(
            f"invalid max_size: {max_size!r}, but the pool in {place.name} is in use in this process with "
            f"max_size={pool.max_size}. Leave max_size out, which uses it as it is, or give another cache, such as "
            "cache=CachePool(path, max_size=...), or drop all stores over this one, and each CachePool of it, first."
        )
    if options.get("eviction") is None and options.get("minimise") is None:
        # By whatever the index goes, also where another process has chosen: only who asks for another one is told so.
        in_force = policy_in_force(pool.handle, timeout=0.0)
        options |= zip(("eviction", "minimise"), in_force, strict=True)
    return CacheStore(source, cache_store=place.store, max_size=pool.max_size, **options)


def _check_names(options: dict[str, Any]) -> None:
    more = [name for name in inspect.signature(CacheStore).parameters if name not in _ELSEWHERE]
    known = ["cache", "max_size", "storage_options", *more]
    for name in options:
        if name in more:
            continue
        # One that is only cut short is nearer than others of its length.
        longer = [one for one in known if one.startswith(f"{name}_")]
        close = longer or difflib.get_close_matches(name, known, 1)
        advice = f"Give {close[0]!r}" if close else f"Give one of {', '.join(known)}"
        raise OptionTypeError(
            f"unknown option of zcache.open: {name!r}. {_ELSEWHERE.get(name, advice)}."
        )


# ------------------------------------------------------------------------------- pools

# Guards the choice of a bound for a pool that several threads open at once; never held over anything that waits.
_lock = threading.RLock()
_said: set[str] = set()
"""Pools of which the log has said how large they are by default."""


class _Place(NamedTuple):
    """Where a pool is, or is to be.

    Attributes
    ----------
    store : PoolStore or PoolMemoryStore
        What stands for it as a cache store.
    name : str
        How people know it.
    option : str
        What has named it: an option, a variable of the environment, or neither.
    capacity : callable
        Bytes of the volume, or of the memory.
    pool : Pool or None
        The pool, if the user has opened it.
    """

    store: PoolStore | PoolMemoryStore
    name: str
    option: str
    capacity: Callable[[], int]
    pool: Pool | None = None


def _place(cache: object) -> _Place:
    """What `cache` stands for; nothing is made yet in a directory.

    Raises
    ------
    OptionTypeError, OptionValueError
        If it stands for no pool.
    """
    if isinstance(cache, CachePool):
        store = cache._store
        capacity = partial(capacity_of, store)
        return _Place(store, cache.path or "memory", "cache", capacity, cache._pool)
    if isinstance(cache, str) and cache == "memory":
        return _Place(_memory_store(), "memory", "cache", memory)
    path, option = _directory(cache)
    return _Place(PoolStore(path, PoolOptions()), path, option, partial(volume, path))


def _pool(place: _Place, size: int | None, *, adopt: bool) -> Pool:
    """The pool of this process at a place. One without a bound gets one.

    Raises
    ------
    CacheOwnershipError
        If its directory is no pool, or another user's.
    """
    if place.pool is not None:
        return place.pool
    # Joins one that is open, as it is.
    pool = pool_of(place.store, adopt=adopt)
    while (in_force := pool.max_size) is None:
        bound = parse_size(DEFAULT_SHARE, whole=place.capacity) if size is None else size
        with _lock:
            # Another thread may have been faster.
            is_first = pool.max_size is None
            if is_first:
                place.store.options = PoolOptions(bound)
        if is_first:
            pool.apply_limits()
            if size is None and pool.takes_values:
                _say_default(place, bound)
    # With it to other processes, and as long as this one is here: the store of that thread may go.
    place.store.options = PoolOptions(in_force)
    return pool


def _memory_store() -> PoolMemoryStore:
    """One over the pool that all share who say "memory", as long as it is in use."""
    store = PoolMemoryStore(PoolOptions(), MEMORY)
    # At once: a source that is read through this pool is found out by its dict.
    pool_of(store)
    return store


def _directory(cache: object) -> tuple[str, str]:
    """The directory of the pool, and what has named it."""
    name = "cache"
    if cache is None and (given := os.environ.get("ZCACHE_DIR")):
        cache, name = given, "$ZCACHE_DIR"
    elif cache is None:
        cache, name = _directory_of_user(), "cache directory of the user"
    path = os.fspath(cache) if isinstance(cache, os.PathLike) else cache
    if not isinstance(path, str):
        raise OptionTypeError(
            f'invalid cache: {plain(cache)}. Give the path of a directory, a CachePool, "memory", or None for '
            "$ZCACHE_DIR or the user's cache directory. To keep values in another store, use "
            "zcache.CacheStore(store, cache_store=...)."
        )
    return path_of_cache_store(path, name), name


def _directory_of_user() -> str:
    from platformdirs import user_cache_dir  # noqa: PLC0415 - of use here only

    try:
        path = user_cache_dir("zcache")
    except RuntimeError:
        path = "~"
    # Where the home is not known some versions raise, and others leave that in its place.
    if not path.startswith("~"):
        return path
    raise OptionValueError(
        "invalid cache: None, but your home is not known, so neither is your cache directory. Give the path of a "
        "directory as cache=, or set $ZCACHE_DIR to one, or HOME to your home in full."
    )


def _say_default(place: _Place, bound: int | None) -> None:
    """Log once for each pool and process how large it may become, where no option says it."""
    key = os.path.realpath(place.name) if isinstance(place.store, PoolStore) else ""
    with _lock:
        is_said = key in _said
        _said.add(key)
    if not is_said:
        _log.warning(
            "the cache in %s may grow to %s bytes, 20 %% of %s: pass max_size= for another bound",
            place.name,
            f"{bound:,}",
            "its volume" if key else "the memory that this process may use",
        )


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


at_fork(_after_fork)
