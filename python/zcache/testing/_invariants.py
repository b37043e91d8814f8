"""What holds at every instant: the index agrees with itself, with the bound and with the cache store."""

from __future__ import annotations

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

from zcache._byte_ranges import is_reserved
from zcache._runtime.coroutines import run_without_loop
from zcache.exceptions import UsageError
from zcache.testing._doubles import StoreDouble
from zcache.testing._internals import (
    RANGES,
    cache_store,
    check_type,
    current_size,
    directory_root,
    disk_usage,
    is_ours,
    live_entries,
    memory_values,
    own_folders,
    own_names,
    pool_sizes,
    validate,
)
from zcache.testing._views import Entry, InFlight, entries, in_flight

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from zarr.abc.store import Store

    from zcache.store import CacheStore

    _Listed = Callable[[Store], Awaitable[dict[str, int]]]

_ATTEMPTS: Final = 20
"""How often the cache store is looked at while others keep changing it."""
_SHOWN: Final = 5
"""Names that an error shows of each difference."""
_CHANGES: Final = (
    f"the index has changed between each of {_ATTEMPTS} looks, so it could not be compared with the cache store. Call "
    "check_index while others use the cache."
)


class InvariantError(AssertionError):
    """The index disagrees with itself, with the bound or with what the cache store holds."""


class _Snapshot(NamedTuple):
    """What an index says at one time."""

    entries: frozenset[Entry]
    in_flight: InFlight
    current_size: int
    live: int


def check_invariants(store: CacheStore, *, held: Mapping[str, int] | None = None) -> None:
    """Assert that the index, the bound and the cache store agree.

    Works for every kind of cache store, at any time. While values are being filled in or deleted, it asserts that each
    byte in the cache store is counted. When nothing is under way, it asserts that both hold the same values of the same
    sizes. So call ``store.drain_sync()`` first to compare everything. If other threads or processes use the cache
    meanwhile, call `check_index` instead.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.
    held : mapping of str to int, optional
        Sizes of what the cache store holds, by its keys, where the caller knows them. Default is None:
        the cache store is asked (see `stored_sizes`), in a thread where it has to be listed.

    Raises
    ------
    InvariantError
        If they do not agree; it says what differs.
    UsageError
        The index has changed between each two looks, so nothing could be compared.
    """
    run_without_loop(_check(store, held, _listed_in_thread))


async def check_invariants_async(
    store: CacheStore, *, held: Mapping[str, int] | None = None
) -> None:
    """Assert that the index, the bound and the cache store agree; see `check_invariants`.

    For use in coroutines: a cache store that has to be listed is asked in this event loop.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.
    held : mapping of str to int, optional
        Sizes of what the cache store holds, by its keys. Default is None: the cache store is asked.

    Raises
    ------
    InvariantError
        If they do not agree; it says what differs.
    UsageError
        The index has changed between each two looks, so nothing could be compared.
    """
    await _check(store, held, _listed_sizes)


async def _check(store: CacheStore, held: Mapping[str, int] | None, listed: _Listed) -> None:
    check_index(store)
    before = _snapshot(store)
    for _ in range(_ATTEMPTS):
        found = await _stored_sizes(store, listed) if held is None else dict(held)
        after = _snapshot(store)
        usage = disk_usage(store)
        if after == before:
            _check_stored(after, found, usage)
            return
        before = after
    raise UsageError(_CHANGES)


def check_index(store: CacheStore) -> None:
    """Assert that the index agrees with itself and with the bound, whatever the cache store holds.

    For use while other threads or processes are at work, when nothing else can be compared.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.

    Raises
    ------
    InvariantError
        If it does not; it says what differs.
    """
    check_type(store)
    try:
        validate(store)
    except Exception as error:
        raise InvariantError(f"the index is damaged: {error}") from error
    bound = store.max_size
    if bound is not None and (size := current_size(store)) > bound and size > own_folders(store):
        raise InvariantError(f"current_size is {size}, more than max_size={bound}")


def stored_sizes(store: CacheStore, *, everything: bool = False) -> dict[str, int]:
    """List the values and byte ranges in the cache store, without the index.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.
    everything : bool, optional
        Of a pool, the values of all sources; their keys then begin with the label of their source. Default is False:
        those of the source of the store.

    Returns
    -------
    dict of str to int
        Sizes in bytes by key of the cache store. Files in a cache directory that zcache did not write are left out.
    """
    found = run_without_loop(_stored_sizes(store, _listed_in_thread))
    return found if everything else own_names(store, found)


async def _stored_sizes(store: CacheStore, listed: _Listed) -> dict[str, int]:
    cache = cache_store(store)
    found = _sizes_at_once(cache)
    return await listed(_undoubled(cache)) if found is None else found


def _undoubled(cache: Store) -> Store:
    """The store behind doubles: to look at it must neither count nor fail."""
    while isinstance(cache, StoreDouble):
        cache = cache.inner
    return cache


def _sizes_at_once(cache: Store) -> dict[str, int] | None:
    """Sizes of what is in memory or in a directory; None for any other store."""
    if (values := memory_values(cache)) is not None:
        return {name: len(value) for name, value in list(values.items()) if _is_value(name)}
    if (found := pool_sizes(cache)) is not None:
        return dict(found)
    if (root := directory_root(cache)) is not None:
        return _file_sizes(root)
    return None


def _file_sizes(root: str) -> dict[str, int]:
    sizes = {}
    for folder, _, files in os.walk(root):
        for file in files:
            path = os.path.join(folder, file)
            name = os.path.relpath(path, root).replace(os.sep, "/")
            if not _is_value(name):
                continue
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode) and is_ours(path):
                sizes[name] = status.st_size
    return sizes


async def _listed_sizes(cache: Store) -> dict[str, int]:
    sizes = {}
    for name in [name async for name in cache.list() if _is_value(name)]:
        try:
            sizes[name] = await cache.getsize(name)
        except FileNotFoundError:
            continue
    return sizes


async def _listed_in_thread(cache: Store) -> dict[str, int]:
    """The same, without a suspension of the caller."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(_listed_sizes(cache))).result()


def _is_value(name: str) -> bool:
    return name.startswith(RANGES) or not is_reserved(name)


def _snapshot(store: CacheStore) -> _Snapshot:
    return _Snapshot(
        frozenset(entries(store, everything=True)),
        in_flight(store),
        current_size(store),
        live_entries(store),
    )


def _check_stored(said: _Snapshot, held: Mapping[str, int], usage: int | None) -> None:
    """Compare what the index says with what the cache store holds, and takes on its disk if known."""
    live = {entry.name: entry.size for entry in said.entries if entry.state == "live"}
    failed = {entry.name: entry.size for entry in said.entries if entry.state == "delete-failed"}
    quiet = not said.in_flight.reservations and len(said.entries) == len(live) + len(failed)
    total = sum(held.values())
    faults = []
    if said.live != len(live):
        faults.append(f"the index counts {said.live} entries but has {len(live)}")
    if missing := live.keys() - held.keys():
        faults.append(f"not in the cache store: {_some(missing)}")
    if other := {name for name in live.keys() & held.keys() if live[name] != held[name]}:
        sizes = ", ".join(f"{name!r} {held[name]} not {live[name]}" for name in sorted(other))
        faults.append(f"of another size in the cache store: {sizes}")
    if total > said.current_size:
        faults.append(f"the cache store holds {total} bytes, current_size is {said.current_size}")
    if quiet:
        if unknown := held.keys() - live.keys() - failed.keys():
            faults.append(f"not in the index: {_some(unknown)}")
        counted = sum(live.values()) + sum(failed.values())
        if usage is None and counted != said.current_size:
            faults.append(f"entries have {counted} bytes, current_size is {said.current_size}")
        if usage is not None and usage > said.current_size:
            faults.append(f"the disk holds {usage} bytes, current_size is {said.current_size}")
    if faults:
        raise InvariantError("; ".join(faults))


def _some(names: Iterable[str]) -> str:
    every = sorted(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(map(repr, every[:_SHOWN])) + more
