"""`CachePool`: values of many sources under one bound."""

from __future__ import annotations

import contextlib
import difflib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from zcache._backends.pool.options import PoolOptions
from zcache._backends.pool.register import label_of, note_of, stand_in
from zcache._backends.pool.select import of_copy, pool_of
from zcache._backends.pool.stores import PoolMemoryStore, PoolStore
from zcache._cache import drain_source, open_sources
from zcache._index.shared import say_once
from zcache._options import (
    capacity_of,
    check_eviction,
    check_export,
    check_flag,
    check_minimise,
    parse_mode,
    parse_size,
    path_of_cache_store,
)
from zcache._protocol.fill import CLOSE_TIMEOUT
from zcache._runtime.coroutines import is_loop_of_zarr, run_without_loop
from zcache._runtime.fork import at_fork
from zcache._runtime.io import SyncIO
from zcache._runtime.thread_calls import run_in_background
from zcache._runtime.threads import NoThreadError, Threads
from zcache._runtime.tracebacks import clear_frames
from zcache._source.describe import describe
from zcache._source.identity import identify, location_named
from zcache._source.location import Location, innermost, location_here, places_overlap
from zcache.exceptions import (
    CacheOwnershipError,
    CacheUnreachableError,
    OptionTypeError,
    OptionValueError,
    UsageError,
)

if TYPE_CHECKING:
    import os

    from zarr.abc.store import Store

    from zcache._backends.pool.place import Pool
    from zcache._core import Index
    from zcache._runtime.latch import Outcome
    from zcache._types import Minimised, Policy, Size


class PoolSourceInfo(NamedTuple):
    """One source of a pool.

    Attributes
    ----------
    name : str
        Its name, which `forget` and `export` take: its URL or path, or the `source_id` that it was given. If that is
        lost, ``"unnamed:"`` and a number, which they take as well.
    source : str or None
        Its store when it was last opened, by class and location, without secrets, such as
        ``"FsspecStore(s3://bucket/era5.zarr)"``; None where that is not known.
    bytes : int
        Bytes of its values.
    entries : int
        Its values, full ones and ranges, including those that are too old to be served.
    last_used : float or None
        Seconds since 1970 when a process has last opened it; None where that is not known.
    """

    name: str
    source: str | None
    bytes: int
    entries: int
    last_used: float | None


class CachePool:
    """Keeps values of any number of sources, under one bound and in one eviction order.

    Give it as ``cache_store=`` to any number of `CacheStore`, in any number of threads and processes. Sources are
    kept apart by their names. Two pools over one directory, by whatever path, are one: the smallest
    `max_size` is in force.

    Parameters
    ----------
    path : str or PathLike, optional
        Its directory, on a local disk, which belongs to zcache alone; ``~`` is your home. Default is None: in the
        memory of this process. All that is pickled of one to another process, with stores or without, is one pool there,
        empty at first.
    max_size : int or str, optional
        Bytes that it holds at most, at every instant, written as for `CacheStore`. In a directory whole blocks count,
        as in ``du``, without the index. If another pool or store asks for less, that is in force. Default is None, no
        bound. Set it to what the disk can spare.
    min_free_space : int or str, optional
        Bytes of the volume that stay free; see `CacheStore`. Default is None: 5 %, at most 1 GiB.
    eviction : {"lru", "none", "adaptive"}, optional
        Which values are evicted when it is full, whatever its stores ask for; see `CacheStore`. Default is None: as the
        first store over it asks. If the pool is in use with another policy, a `UserWarning` says so.
    minimise : {"requests", "bytes", "seconds"}, optional
        The cost that "adaptive" and plans minimise; see `CacheStore`. Default is None: requests, or as the first store
        asks.
    mode : int, optional
        Permissions of the directory if it is made, such as ``0o770`` for a group. Default is None: 0o700, for no other
        user. Each user of a group has to give it, which says that they trust the owner of the directory.
    read_only : bool, optional
        Only serve the values that the pool has, and write nothing, even if there is no pool yet. Values that others add
        later are looked for at misses, once a second at most. Default is False. Set it for a pool that others fill, which
        has a directory.

    Raises
    ------
    OptionTypeError, OptionValueError
        An option is of the wrong type, or has no meaning.
    CacheOwnershipError
        The directory is no pool, or another user's.

    Examples
    --------
    >>> import zarr
    >>> from zcache import CachePool, CacheStore
    >>> pool = CachePool(max_size="256MB")
    >>> stores = [CacheStore(zarr.storage.MemoryStore(), cache_store=pool) for _ in range(3)]
    >>> pool.cache_info()["max_size"]
    256000000
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_size: Size | None = None,
        min_free_space: Size | None = None,
        eviction: Policy | None = None,
        minimise: Minimised | None = None,
        mode: int | None = None,
        read_only: bool = False,
    ) -> None:
        check_flag("read_only", read_only)
        store: PoolStore | PoolMemoryStore
        if path is None:
            if read_only:
                raise OptionValueError(
                    "invalid read_only: True, but a pool in memory has no values that others have put there. Give the "
                    "path of a pool as well, or leave read_only out."
                )
            store = PoolMemoryStore(PoolOptions())
        else:
            store = PoolStore(path_of_cache_store(path, "path"), PoolOptions(), read_only=read_only)
        whole = partial(capacity_of, store)
        store.options = PoolOptions(
            parse_size(max_size, whole=whole),
            parse_size(min_free_space, "min_free_space", whole, none="the default"),
            parse_mode(mode),
            None if eviction is None else check_eviction(eviction),
            None if minimise is None else check_minimise(minimise),
        )
        handled = sys.exception()
        try:
            self._use(store)
        except BaseException as error:
            clear_frames(error, handled)
            # This frame stays in the error.
            del self, store, whole
            raise

    def _use(self, store: PoolStore | PoolMemoryStore) -> None:
        self._store = store
        self._opened: Pool | None = None
        self._open()

    def _open(self) -> Pool:
        self._opened = pool_of(self._store)
        self._opened.objects.add(self)
        return self._opened

    @property
    def _pool(self) -> Pool:
        """What it stands for; where that could not be opened as it came in a pickle, each use tries again."""
        return self._opened or self._open()

    @property
    def path(self) -> str | None:
        """Its directory; None for one in memory."""
        return str(self._store.root) if isinstance(self._store, PoolStore) else None

    @property
    def max_size(self) -> int | None:
        """Bytes that were asked for; None for no bound. The bound in force, in `cache_info`, may be less."""
        return self._store.options.max_size

    def __repr__(self) -> str:
        shown = "" if self.path is None else f"{self.path!r}, "
        return f"CachePool({shown}max_size={self.max_size!r})"

    def __eq__(self, other: object) -> bool:
        """Whether both are one pool."""
        return isinstance(other, CachePool) and self._place == other._place

    def __hash__(self) -> int:
        # A pool that could not be opened may be later. It may be a key in what is unpickled, so nothing is opened here.
        return hash(CachePool)

    @property
    def _place(self) -> Pool | str | None:
        return self._opened or self.path

    def __getstate__(self) -> PoolStore | PoolMemoryStore:
        return self._store

    def __setstate__(self, store: PoolStore | PoolMemoryStore) -> None:
        try:
            self._use(of_copy(store))
        except CacheOwnershipError as error:
            # It would end an executor that unpickles its task.
            say_once(f"a copy of a CachePool cannot be used in this process: {error}")

    def cache_info(self) -> dict[str, Any]:
        """Describe what it holds.

        Returns
        -------
        dict
            ``max_size`` (bytes or None), ``current_size``, ``value_size`` (bytes of the values alone), ``entries``.
            ``max_size`` is the bound in force, the least that any pool or store over it asks for, in this process or
            another; of a pool that is only read its own. ``current_size`` is the bytes that count towards it: on a disk
            the most that its files may take, in whole blocks and with room for their maps and holes, so more than
            ``du`` shows.

        Raises
        ------
        IndexLockTimeout
            A `TimeoutError`: another process holds the lock of the index for more than a second.
        """
        handle = self._pool.handle
        bound, size, entries, values = handle.call_blocking(_sizes)
        return {
            # There is no bound in force where nothing is cached.
            "max_size": bound if handle.usable else self._pool.max_size,
            "current_size": size,
            "value_size": values,
            "entries": entries,
        }

    def cache_stats(self) -> dict[str, int]:
        """Count what this process has done with the pool: ``evictions``, ``expirations``, ``refusals``."""
        stats = self._pool.handle.stats()
        return {
            "evictions": stats.evictions,
            "expirations": stats.expirations,
            "refusals": stats.refusals,
        }

    def sources(self) -> list[PoolSourceInfo]:
        """List what it holds of each source, the one with most bytes first.

        Takes time in proportion to the number of all entries, and holds up no reader; in an event loop use
        ``await asyncio.to_thread(pool.sources)``. A rebuild of the index is waited for.

        Raises
        ------
        IndexLockTimeout
            A `TimeoutError`: another process holds the lock of the index for more than a second.
        IndexRebuildTimeout
            A `TimeoutError`: the index is being rebuilt, and that takes more than a minute from now.
        """
        self._pool.forget_ended()
        return self._pool.while_complete(self._sources)

    def _sources(self) -> list[PoolSourceInfo]:
        held: dict[str, list[int]] = {}
        for key, _, size in self._pool.live():
            of_source = held.setdefault(key.partition("/")[0], [0, 0])
            of_source[0] += size
            of_source[1] += 1
        infos = []
        notes = self._pool.notes()
        for label in {*held, *notes}:
            size, entries = held.get(label, (0, 0))
            note = notes.get(label) or note_of(stand_in(label))
            if entries or not note["forgotten"]:
                infos.append(
                    PoolSourceInfo(note["name"], note["source"], size, entries, note["used"])
                )
        return sorted(infos, key=lambda info: (-info.bytes, info.name))

    def _check_known(self, name: str) -> None:
        pool = self._pool
        notes = pool.notes()
        if label_of(name) in notes or any(True for _ in pool.live(name)):
            return
        near = difflib.get_close_matches(name, [note["name"] for note in notes.values()], 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionValueError(
            f"invalid name: {name!r:.300} is no source of the pool. {_NAME}{meant}"
        )

    def _check_other_source(self, store: Store, name: str) -> None:
        label = label_of(name)
        note = self._pool.notes().get(label)
        named = location_named(name if note is None else note["name"])
        opened = [source for one, source in open_sources() if label_of(one) == label]
        # It is written to in any case, so its volume is waited for.
        here = location_here(store)
        # Of some sources only the label is known.
        if label_of(identify(innermost(store)).name) == label or _overlap(
            label, here, named, opened
        ):
            raise OptionValueError(
                f"invalid store: {describe(store)} is the source {name!r} itself, or one of them is inside the other: what "
                "the pool holds may be older than what is there. Give another store."
            )

    def forget(self, name: str) -> None:
        """Delete all values of a source; stores over it fill it anew.

        `sources` leaves it out until it has values again. Takes time in proportion to its values; in an event loop use
        ``await asyncio.to_thread(pool.forget, name)``. It waits for a rebuild of the index, so that all values are
        found.

        Parameters
        ----------
        name : str
            Its name, as `sources` tells it.

        Raises
        ------
        OptionTypeError, OptionValueError
            `name` is no text, or the pool has never had such a source.
        CacheUnreachableError
            An `OSError`: the pool is only read from, or its index cannot be used.
        OSError
            If the file system refuses.
        IndexLockTimeout
            A `TimeoutError`: another process holds the lock of the index for more than a second.
        IndexRebuildTimeout
            A `TimeoutError`: the index is being rebuilt, and that takes more than a minute from now.
        """
        _check_name(name)
        self._pool.check_may_forget()
        self._pool.while_complete(partial(self._check_known, name))
        self._pool.forget(name)

    def export(self, name: str, store: Store) -> int:
        """Write all full values of a source to another store, where they can be read as Zarr.

        Ranges are left out. Values that are too old for the stores are written as well, for a pool does not know their
        ages.

        It needs the event loop of zarr, and blocks its caller until all is written: in an event loop use
        ``await asyncio.to_thread(pool.export, name, store)``. It first waits for a rebuild of the index, and up to 5
        seconds for pending values of this process.

        Parameters
        ----------
        name : str
            Its name, as `sources` tells it.
        store : Store
            The target, outside the pool and the source. Its values under the same keys are replaced.

        Returns
        -------
        int
            How many values were written.

        Raises
        ------
        OptionTypeError
            `name` is no text, or `store` is no store.
        OptionValueError
            The pool has never had a source of this name. Or `store` is that of the pool, is read through it, or is the
            source itself, or one of them is inside the other. (A source with a `source_id` is recognised only while a
            store over it is open in this process.)
        UsageError
            A `RuntimeError`: it is called in the event loop of zarr.
        CacheUnreachableError
            An `OSError`: the index, which knows what there is, cannot be used, or a value cannot be read, or does not
            reach the pool in time.
        IndexLockTimeout
            A `TimeoutError`: another process holds the lock of the index for more than a second.
        IndexRebuildTimeout
            A `TimeoutError`: the index is being rebuilt, and that takes more than a minute from now.
        """
        _check_name(name)
        directory = self._pool.directory
        check_export(store, self._store if directory is None else LocalStore(directory.root))
        self._check_other_source(store, name)
        if is_loop_of_zarr():
            raise UsageError(
                "export() was called in the event loop of zarr, which it needs itself. Use "
                "`await asyncio.to_thread(pool.export, name, store)` there."
            )
        self._pool.check_usable()
        self._pool.while_complete(partial(self._check_known, name))
        buffer = default_buffer_prototype().buffer

        async def write() -> int:
            await store._ensure_open()
            count = 0
            for key, is_full, size in self._pool.live(name):
                value = self._pool.read(name, key, size) if is_full else None
                if value is not None:
                    await store.set(key, buffer.from_array_like(value))
                    count += 1
            self._pool.check_usable()
            return count

        self._wait_for_fills(name)
        self._pool.take_in()
        return self._pool.while_complete(lambda: sync(write()))

    def _wait_for_fills(self, name: str) -> None:
        draining = drain_source(self._pool, label_of(name), SyncIO(None), CLOSE_TIMEOUT)
        if run_without_loop(draining):
            return
        raise CacheUnreachableError(
            f"values of {name!r} that were read are not in the pool {self!r} after {CLOSE_TIMEOUT:g} s, so what is exported "
            "would lack them. That goes on: try again later, or let `drain_sync` of a store over this source wait for them."
        )


_PATIENCE: Final = 1.0
"""Seconds that a volume has to say what its folders are."""
_NAME: Final = "Give that of a source, as CachePool.sources() tells it."


_late: Final[dict[str, Outcome[bool]]] = {}
"""By the labels of sources, what their volumes have not answered in time, and perhaps not yet."""
at_fork(_late.clear)


def _overlap(label: str, here: Location, named: Location | None, opened: list[Store]) -> bool:
    """Whether a place and that of a source overlap, which is known by its name, its open stores or both.

    By names alone where its volume does not answer, as it may be that of a source that has gone.
    """

    def overlap(*, asks: bool) -> bool:
        compare = places_overlap if asks else Location.overlaps
        places = [location_here(source, asks=asks) for source in opened]
        return any(compare(here, place) for place in (named, *places) if place is not None)

    # Each source that has not answered keeps a thread; others are asked all the same.
    late = _late.get(label)
    if late is None or late.is_set:
        _late.pop(label, None)
        with contextlib.suppress(NoThreadError):
            asked = run_in_background(partial(overlap, asks=True), Threads(1))
            if asked.wait(_PATIENCE):
                return asked.result()
            _late[label] = asked
    return overlap(asks=False)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise OptionTypeError(f"invalid name: {name!r}. {_NAME}")


def _sizes(index: Index) -> tuple[int | None, int, int, int]:
    return index.bound, index.current_size, len(index), index.live_bytes
