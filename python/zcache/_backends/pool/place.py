"""A pool of this process: its index, and the sources that use it."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import numpy as np

from zcache._backends.access import Access
from zcache._backends.pool.directory import PoolDirectory
from zcache._backends.pool.layout import POOL_SOURCE
from zcache._backends.pool.listings import remove_listings
from zcache._backends.pool.register import label_of, note_of
from zcache._backends.pool.source import PoolSource, SharedPool
from zcache._backends.store.bound import evict_from
from zcache._core import DEFAULT_MINIMISED, DEFAULT_POLICY, Index, SegmentReader, crc32c
from zcache._index.calls import COMPLETE_TIMEOUT, drain_absences, drained, is_complete
from zcache._index.handle import IndexHandle
from zcache._index.limits import greatest, least, strictest
from zcache._index.shared import Member, breaker_of, choose_policy, say_once
from zcache._runtime.refresh import Refresh
from zcache._runtime.registry import Registry
from zcache._runtime.thread_calls import run_in_background
from zcache._runtime.threads import THREADS, NoThreadError, Threads
from zcache._source.folders import identity
from zcache._source.identity import EPHEMERAL, ended
from zcache.exceptions import CacheUnreachableError, IndexLockTimeout, IndexRebuildTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from zcache._backends.pool.stores import PoolMemoryStore, PoolStore
    from zcache._runtime.circuit_breaker import CircuitBreaker

T = TypeVar("T")

_LOOK_AGAIN: Final = 0.005
"""Seconds between two looks whether an index is complete."""
_LIMITS: Final[dict[str, Any]] = {
    "max_age": None,
    "slices_like_python": False,
    "flat_namespace": True,
    "verify": "first",
    "eviction": DEFAULT_POLICY,
    "minimise": DEFAULT_MINIMISED,
}


class Pool:
    """What all sources of a pool share in this process.

    Attributes
    ----------
    key : Hashable
        What is equal for all that stand for this pool in this process, when they are opened.
    handle : IndexHandle
        The index.
    directory : PoolDirectory or None
        None for a pool in memory.
    read_only : bool
        Whether it was opened to be read from only.
    clock : callable
        Seconds; what ages are counted by, unless a source has a clock of its own: in memory `time.monotonic`,
        in a directory `time.time`, for other processes go by them too.
    threads : Threads
        Run what waits for the pool.
    objects : Registry of CachePool
        Each that stands for it.
    names : dict
        What is noted of each source that this process has opened, by its label; see `note_of`.
    breaker : CircuitBreaker
        Of all sources, with its pauses by the clock of the system.
    home : int or None
        The process that made it; None if it arrived there as a copy.
    """

    key: Hashable = None
    handle: IndexHandle
    directory: PoolDirectory | None = None
    read_only = False
    breaker: CircuitBreaker

    def __init__(self, store: PoolStore | PoolMemoryStore, clock: Callable[[], float]) -> None:
        self._limits = Refresh()
        self.clock = clock
        self.home = None if store.has_come else os.getpid()
        # Those that stand for it: their options count as long as they are referred to.
        self._stores: Registry[PoolStore | PoolMemoryStore] = Registry()
        self._add(store)
        self._sources: Registry[PoolSource] = Registry()
        self.threads = Threads(THREADS)
        self.objects: Registry[Any] = Registry()
        self.names: dict[str, dict[str, Any]] = {}
        self._forked = os.getpid()
        # By which those of these that ask for a policy hold the pool to it.
        self._policies: Registry[Member] = Registry()
        # That of stores that ask for none: the last one that was asked for so.
        self._policy = {name: _LIMITS[name] for name in ("eviction", "minimise")}

    def join(self, store: PoolStore | PoolMemoryStore) -> None:
        """Keep to the options of a store as well, as long as it is referred to: the strictest are in force."""
        self._add(store)
        self.apply_limits()
        self.go_by(store)

    def _add(self, store: PoolStore | PoolMemoryStore) -> None:
        self._stores.add(store)
        self._when_gone(store)

    def _when_gone(self, asks: object) -> None:
        """Have the limits without those of `asks` in force once it is gone."""
        weakref.finalize(asks, _apply_limits, weakref.ref(self)).atexit = False

    def go_by(self, store: PoolStore | PoolMemoryStore) -> None:
        """Have the pool go by the policy of its options, if they have one, as long as it is referred to.

        Stores that ask for none have it afterwards, too. Where it is in use with another one, the caller is told.
        """
        options = store.options
        if options.eviction is None and options.minimise is None:
            return
        wanted = {
            "eviction": options.eviction or DEFAULT_POLICY,
            "minimise": options.minimise or DEFAULT_MINIMISED,
        }
        member = Member(wanted)
        if choose_policy(self.handle, member, has_come=store.has_come):
            self._policy = wanted
            store.policy = member
            self._policies.add(member)
            self.handle.users.add(member)
            self.handle.apply_limits()

    @property
    def is_in_use(self) -> bool:
        """Whether there is any store or `CachePool` of it; fills of stores that were dropped may go on."""
        return len(self.handle.users) > len(self._policies) or bool(self.objects)

    def policy(self) -> dict[str, str]:
        """The policy for a store that asks for none."""
        return dict(self._policy)

    def source(
        self,
        name: str,
        text: str,
        limits: dict[str, Any],
        clock: Callable[[], float] | None = None,
    ) -> PoolSource:
        """One source, as a place of its own, with ages by this clock."""
        self.forget_ended()
        source = PoolSource(self, name, limits, clock or self.clock)
        self._sources.add(source)
        self.names[source.label] = note_of(name, text, time.time())
        self._when_gone(source)
        return source

    def rename(self, label: str, name: str) -> None:
        # docstring inherited
        if (note := self.names.pop(label, None)) is not None:
            self.names[label_of(name)] = {**note, "name": name, "used": time.time()}

    @property
    def takes_values(self) -> bool:
        """Whether anything can be added to it, as far as is known now."""
        directory = self.directory
        fills = directory is None or directory.layout.access is Access.FILLS
        return self.handle.usable and fills

    def is_same(self, other: SharedPool) -> bool:
        """Whether another one is over the same directory, for one that is only read from is another one."""
        mine, theirs = self.directory, other.directory
        if mine is None or theirs is None:
            return self is other
        return identity(str(mine.root)) == identity(str(theirs.root))

    def take_in(self) -> None:
        """Know what others have added by now, also where the pool is only read from."""
        directory = self.directory
        if directory is not None and directory.layout.access is Access.READS:
            directory.private_index.look()

    @property
    def max_size(self) -> int | None:
        """Bytes that the pool holds at most."""
        return least([store.options.max_size for store in self._stores.snapshot()])

    def notes(self) -> dict[str, dict[str, Any]]:
        """What is known of each source, by its label."""
        return dict(self.names)

    def check_usable(self) -> None:
        """See that what the index tells is what the pool holds.

        Raises
        ------
        CacheUnreachableError
            If the index cannot be used.
        """
        # It may not be open yet.
        self.handle.call_blocking(len)
        if not self.handle.usable:
            may = "read it" if self.read_only else "read and write it"
            advice = f" Open it as a user who may {may}." if self.handle.lacks_rights else ""
            raise CacheUnreachableError(
                f"the index of the pool in {self.handle.name} cannot be used ({self.handle.why}), so nothing in it can be "
                f"forgotten or exported until it can be used again.{advice}"
            )

    def while_complete(self, work: Callable[[], T]) -> T:
        """Do this while the index knows all values; from its beginning, where a rebuild begins meanwhile.

        Raises
        ------
        IndexRebuildTimeout
            If that is not so within `COMPLETE_TIMEOUT`.
        """
        until = time.monotonic() + COMPLETE_TIMEOUT
        while True:
            self._wait_until_complete(until)
            done = work()
            if self.handle.call_blocking(is_complete):
                return done

    def _wait_until_complete(self, until: float) -> None:
        while not self.handle.call_blocking(is_complete):
            if time.monotonic() >= until:
                raise IndexRebuildTimeout(
                    f"the index of the pool in {self.handle.name} is still being rebuilt after {COMPLETE_TIMEOUT:g} s, so "
                    "not all of its values are known. That goes on: try again later."
                )
            if self.directory is not None:
                # Who rebuilds it may have died.
                self.directory.recovery.reclaim_dead()
            time.sleep(_LOOK_AGAIN)

    def check_may_forget(self) -> None:
        """See that values may be deleted; see `check_usable`."""
        self.check_usable()

    def forget(self, name: str) -> None:
        """Delete all values of a source."""
        self.check_usable()
        label, call = label_of(name), self.handle.call_blocking
        call(Index.invalidate, label)
        for victims in drained(partial(call, Index.drain_prefix), label):
            self._delete(victims)
        drain_absences(partial(call, Index.drain_absences), label)
        self.check_usable()
        if label in self.names:
            self.names[label] = {**self.names[label], "forgotten": True}

    def forget_ended(self) -> None:
        """Forget sources that no store can have again; one in a directory is rid of them when it is opened."""

    def live(self, name: str | None = None) -> Iterator[tuple[str, bool, int]]:
        """Each entry that can be served, of one source or of all: key, whether it is the full value, and bytes.

        Those of all have the label of their source before their keys.
        """
        cursor: tuple[int, int] | None = None
        while True:

            def step(index: Index, at: Any = cursor) -> Any:
                view = index if name is None else index.within(label_of(name), True)
                return view.next_live(at)

            found, cursor = self.handle.call_blocking(step)
            yield from found
            if cursor is None:
                return

    def read(self, name: str, key: str, size: int) -> Any:
        """The bytes of a full value, as an array; None where it is gone or damaged.

        Raises
        ------
        CacheUnreachableError
            If the file system refuses.
        """
        raise NotImplementedError

    def _delete(self, victims: list[tuple[int, str]]) -> None:
        raise NotImplementedError

    def apply_limits(self, *, waits: bool = True) -> None:
        """Keep to the limits of all sources and stores: each is bound by the smallest size, and leaves the most space free.

        What is too old for the stores of its own source, in all processes, goes first. With `waits` false another thread may
        do so a moment later.
        """
        self._limits.run(self._take_limits, waits=waits)

    def _take_limits(self) -> None:
        sources = self._sources.snapshot()
        limits = strictest([one.handle.own_limits for one in sources])
        size = least([self.max_size, limits["max_size"]])
        before = self.handle.limits["max_size"]
        self.handle.change_limits({**limits, "max_size": size})
        # Where they go by several clocks, the index cannot tell what is too old.
        is_one_clock = all(one.clock is sources[0].clock for one in sources)
        self.handle.ages = [
            (one.label, one.handle.own_limits["max_age"] if is_one_clock else None)
            for one in sources
        ]
        free = greatest(
            [
                *(store.options.min_free_space for store in self._stores.snapshot()),
                *(source.min_free_space for source in sources),
            ]
        )
        if self.directory is not None:
            pending = least(source.max_pending_size for source in sources)
            self.directory.limit_fills(pending, free)
        self.handle.apply_limits()
        is_less = size is not None and (before is None or size < before)
        if is_less:
            self._enforce_bound()

    def _enforce_bound(self) -> None:
        """Evict what is above a bound that has become smaller."""
        raise NotImplementedError

    def wait_for_bound(self) -> None:
        """Wait until that is done, some seconds at most."""

    def note_policy(self, policy: dict[str, str]) -> None:
        """Go by this policy when the index is opened anew."""
        self.handle.note_policy(policy)

    def after_fork(self) -> None:
        """Start over in a forked child, once for all sources."""
        if self._forked == os.getpid():
            return
        self._forked = os.getpid()
        self.breaker.after_fork()
        if self.directory is None:
            self.handle.after_fork(None)
            if not self.handle.index.after_fork():
                self.handle.index = Index(**self.handle.limits)
                self.handle.apply_limits()
            return
        self.directory.layout.scanner.renew(holes=self.directory.layout.holes)
        self.directory.after_fork()
        if self.handle.opening is not None:
            self.handle.when_open(partial(_note_renamed, weakref.ref(self)))


class MemoryPool(Pool):
    """A pool in memory of this process."""

    def __init__(self, store: PoolMemoryStore) -> None:
        super().__init__(store, time.monotonic)
        limits = {
            **_LIMITS,
            "verify": "never",
            "max_size": store.options.max_size,
            "sources": True,
        }
        self.handle = IndexHandle(Index(**limits), repr(store), limits)
        self.breaker = breaker_of(self.handle)
        # The store keeps the pool alive, and not the other way round.
        self._values: Any = store._store_dict

    def join(self, store: PoolStore | PoolMemoryStore) -> None:
        # docstring inherited. Whatever is opened over the store reads and fills this dict.
        cast("PoolMemoryStore", store)._store_dict = self._values
        asked, bound = store.options.max_size, self.max_size
        # A copy changes nothing for those who are here.
        if store.has_come and bound not in (None, asked):
            store.options = store.options._replace(max_size=bound)
            say_once(
                f"a copy of a pool in memory has the bound that the pool has in this process, max_size={bound}, in the "
                f"place of max_size={asked}"
            )
        super().join(store)

    def read(self, name: str, key: str, size: int) -> Any:
        value = self._values.get(f"{label_of(name)}/{key}")
        return None if value is None or len(value) != size else value.as_numpy_array()

    def forget(self, name: str) -> None:
        super().forget(name)
        label = label_of(name)
        for source in self._sources.snapshot():
            if source.label == label:
                source.listings.forget_below("")

    def forget_ended(self) -> None:
        # docstring inherited. A name from before a fork is not known any more, but may be in use.
        notes = self.names.copy().items()
        in_use = {source.label for source in self._sources.snapshot()}
        gone = ended([note["name"] for label, note in notes if label not in in_use])
        with contextlib.suppress(CacheUnreachableError, IndexLockTimeout):
            for name in gone:
                self.forget(name)
                self.names.pop(label_of(name), None)

    def _enforce_bound(self) -> None:
        evict_from(self._values, self.handle, self.clock)

    def _delete(self, victims: list[tuple[int, str]]) -> None:
        for _, name in victims:
            self._values.pop(name, None)
        self.handle.call_blocking(Index.confirm_deletes, [cell for cell, _ in victims], [])


class DirectoryPool(Pool):
    """A pool in a directory."""

    directory: PoolDirectory

    def __init__(self, store: PoolStore, *, adopt: bool) -> None:
        super().__init__(store, time.time)
        self.read_only = store.read_only
        limits = {**_LIMITS, "max_size": store.options.max_size, "holes": True}
        self.directory = PoolDirectory(
            store.root,
            POOL_SOURCE,
            adopt=adopt,
            limits=limits,
            clock=self.clock,
            read_only=store.read_only,
            mode=store.options.mode,
        )
        self.handle = self.directory.handle
        self.breaker = breaker_of(self.handle)
        this = weakref.ref(self)
        self.directory.recovery.on_restored = lambda: _restored(this())
        if self.directory.layout.access is Access.FILLS:
            with contextlib.suppress(NoThreadError):
                run_in_background(partial(_forget_ended, this))

    def read(self, name: str, key: str, size: int) -> Any:
        files, array = self.directory.layout.scanner.files, np.empty(size, "u1")

        def is_read(index: Index) -> bool:
            reader = SegmentReader(index.within(label_of(name), True), files)
            if not reader.read(key, array, size, 0, size, True):
                return False
            return reader.recorded(key) == (size, crc32c(array.tobytes()))

        try:
            return array if self.handle.call_blocking(is_read) else None
        except IndexLockTimeout:
            raise
        except OSError as error:
            raise CacheUnreachableError(
                f"the value of {key!r} in the pool {self.directory.root} cannot be read ({error}). Try again where that "
                "may pass; else drop it by `invalidate` of a store over this source."
            ) from error

    def check_usable(self) -> None:
        super().check_usable()
        if self.read_only and not self.directory.layout.is_of_source():
            raise CacheUnreachableError(
                f"there is no pool in {self.directory.root} yet, and read_only=True makes none, so there is nothing "
                "to export. Give the path of a pool that others have filled."
            )

    def notes(self) -> dict[str, dict[str, Any]]:
        # There is no room for the names of all, but what this process has opened it knows.
        return {**self.names, **self.directory.register.names()}

    def _enforce_bound(self) -> None:
        self.directory.enforce_bound()

    def wait_for_bound(self) -> None:
        self.directory.wait_for_bound()

    def check_may_forget(self) -> None:
        # docstring inherited
        directory = self.directory
        if directory.layout.access is not Access.FILLS:
            raise directory.private_index.refusal("nothing in it can be forgotten")
        super().check_may_forget()

    def forget(self, name: str) -> None:
        self.forget_values(name)
        self.directory.register.forget(name)

    def forget_values(self, name: str) -> None:
        """Delete all values of a source, and what is known of it, but for its name."""
        self.while_complete(partial(super().forget, name))
        self.directory.remove_empty_segments()
        remove_listings(self.directory.layout.index_root, label_of(name))

    def _delete(self, victims: list[tuple[int, str]]) -> None:
        scanner = self.directory.layout.scanner
        errors = scanner.files.delete([name for _, name in victims])
        outcome = list(zip(victims, errors, strict=True))
        scanner.add_tombstones(name for (_, name), error in outcome if error is not None)
        gone = [cell for (cell, _), error in outcome if error is None]
        failed = [cell for (cell, _), error in outcome if error is not None]
        self.handle.call_blocking(Index.confirm_deletes, gone, failed)


def _apply_limits(pool: Callable[[], Pool | None]) -> None:
    if (found := pool()) is not None:
        found.apply_limits(waits=False)


def _note_renamed(pool: Callable[[], Pool | None], _: object) -> None:
    """Note the sources that have a name of their own in a forked child."""
    found = pool()
    if found is None or found.directory is None or not found.takes_values:
        return
    for source in found._sources.snapshot():
        note = found.names.get(source.label)
        if note is not None and note["name"].startswith(EPHEMERAL):
            found.directory.register.add(note)


def _restored(pool: DirectoryPool | None) -> None:
    """Note the sources that were opened while nothing could be, and those of which the note was lost."""
    if pool is not None:
        pool.directory.enforce_bound()
        for note in list(pool.names.values()):
            pool.directory.register.add(note)


def _forget_ended(pool: Callable[[], DirectoryPool | None]) -> None:
    """Delete what can never be served again: values of sources that had a name only in a process that has ended."""
    if (found := pool()) is None:
        return
    register = found.directory.register
    # First: a process that lives has the pool open before its sources are noted.
    notes = register.names().values()
    gone = ended([note["name"] for note in notes if not note["forgotten"]])
    if not gone:
        return
    with contextlib.suppress(OSError, CacheUnreachableError, IndexLockTimeout):
        if not found.handle.call_blocking(_is_alone_and_complete):
            return
        for name in gone:
            found.forget_values(name)
        # What is left is about one file: the directory is free with its last store.
        del found
        register.drop(gone)


def _is_alone_and_complete(index: Index) -> bool:
    return index.is_alone and index.is_complete
