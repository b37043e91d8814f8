"""Views of the index of a store."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import zcache.testing._internals as _internals  # noqa: PLR0402 - not through the package, which imports this

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zarr.abc.store import ByteRequest, Store

    from zcache.store import CacheStore

State: TypeAlias = Literal["live", "filling", "deleting", "delete-failed"]


class Entry(NamedTuple):
    """An entry of the index.

    Attributes
    ----------
    key : str
        Key in the source.
    byte_range : ByteRequest or None
        The part of the value that it is; None for a whole value.
    size : int
        Bytes that count for it.
    name : str
        Key in the cache store.
    state : {"live", "filling", "deleting", "delete-failed"}
        Whether it can be served ("live"), is being written or deleted, or could not be deleted. In the last case its
        bytes count until the delete succeeds.
    """

    key: str
    byte_range: ByteRequest | None
    size: int
    name: str
    state: State


class InFlight(NamedTuple):
    """What is under way.

    Attributes
    ----------
    flights : int
        Keys and byte ranges that are being read from the source, each counted once.
    reservations : int
        Values for which room is being made or that are being written to the cache store.
    """

    flights: int
    reservations: int


class Step(NamedTuple):
    """A step of the index.

    Attributes
    ----------
    name : str
        Its name.
    args : tuple
        What it was given.
    answer : object
        What it returned.
    """

    name: str
    args: tuple[Any, ...]
    answer: Any


def entries(store: CacheStore, *, everything: bool = False) -> list[Entry]:
    """All entries of the index, in no order.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.
    everything : bool, optional
        Of a pool, the entries of all sources; their keys then begin with the label of their source. Default is False:
        those of the source of the store.

    Returns
    -------
    list of Entry
        Entries that are served, and those that only count.
    """
    return [
        Entry(key, byte_range, size, name, cast("State", state))
        for key, byte_range, size, name, state in _internals.raw_entries(
            store, everything=everything
        )
    ]


def source_of(store: CacheStore) -> Store:
    """The source that a store reads from and writes to.

    Parameters
    ----------
    store : CacheStore
        The store.

    Returns
    -------
    Store
        Its source, read-only where the store is.
    """
    return _internals.source_store(store)


def cache_store_of(store: CacheStore) -> Store:
    """The cache store that a store keeps values in.

    Parameters
    ----------
    store : CacheStore
        The store.

    Returns
    -------
    Store
        The cache store itself. Any other write to it damages the cache.
    """
    return _internals.cache_store(store)


def recency(store: CacheStore) -> list[tuple[str, ByteRequest | None]]:
    """The order in which entries would be evicted.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.

    Returns
    -------
    list of (str, ByteRequest or None)
        Keys and byte ranges, least recently used first.
    """
    return _internals.raw_recency(store)


def missing_keys(store: CacheStore) -> list[str]:
    """Keys that are remembered as missing, of any age.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.

    Returns
    -------
    list of str
        Keys, least recently used first.
    """
    return _internals.absent_keys(store)


def in_flight(store: CacheStore) -> InFlight:
    """What is under way.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.

    Returns
    -------
    InFlight
        Numbers of flights and of reservations; ``(0, 0)`` when nothing is under way.
    """
    return InFlight(*_internals.raw_in_flight(store))


def is_complete(store: CacheStore) -> bool:
    """Whether the index knows everything that the cache store holds.

    It does not while a cache store is being listed or a damaged index is being rebuilt. Meanwhile reads go to the
    source, and nothing is cached.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.

    Returns
    -------
    bool
        True if neither is under way.
    """
    return _internals.is_complete(store)


def index_slot(store: CacheStore) -> int | None:
    """Which slot this process has in the index of a cache directory.

    Parameters
    ----------
    store : CacheStore
        Any store over the cache.

    Returns
    -------
    int or None
        The number of the slot; None where the index is not shared with other processes.
    """
    return _internals.slot(store)


def shares_index(one: CacheStore, other: CacheStore) -> bool:
    """Whether two stores share one index, and with it bounds, counters and flights.

    Parameters
    ----------
    one, other : CacheStore
        The stores.

    Returns
    -------
    bool
        True for copies of one store, and for stores over one place in one process.
    """
    return _internals.index_of(one) is _internals.index_of(other)


@contextlib.contextmanager
def record_steps(
    store: CacheStore, on_step: Callable[[Step], object] | None = None
) -> Iterator[list[Step]]:
    """Record each step of the index that a store takes.

    A cache store that has to be listed is recorded from its complete listing on.

    Parameters
    ----------
    store : CacheStore
        The store.
    on_step : callable, optional
        Called with each step, in the task or thread that took it, before that continues. Default is None.

    Yields
    ------
    list of Step
        The steps so far, in their order.

    Examples
    --------
    >>> from zarr.core.sync import sync
    >>> from zarr.storage import MemoryStore
    >>> from zcache import CacheStore
    >>> store = CacheStore(MemoryStore())
    >>> with record_steps(store) as steps:
    ...     sync(store.exists("a"))
    False
    >>> [step.name for step in steps]
    ['peek']
    """
    steps: list[Step] = []

    def then(name: str, args: tuple[Any, ...], answer: Any) -> None:
        step = Step(name, args, answer)
        steps.append(step)
        if on_step is not None:
            on_step(step)

    with _internals.intercepted(store, then):
        yield steps
