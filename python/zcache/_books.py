"""The index of one cache store: how it is opened, shared, repaired, and taken over after a fork."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, TypeVar

from zarr.storage import LocalStore, MemoryStore

from zcache import _files
from zcache._core import CorruptIndexError, Index, IndexBusyError
from zcache._directory import Directory
from zcache._identity import same_place
from zcache._ports import background

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

    from zcache._traffic import Traffic

logger = logging.getLogger("zcache")
T = TypeVar("T")

_REAP_EVERY: Final = 1.0
"""Seconds between two looks for participants that have died."""


class Books:
    """The index of a cache store, with what it takes to keep it in step with the store.

    Attributes
    ----------
    index : Index
        The index itself; another one after a fork.
    directory : Directory or None
        The directory that the index lies in, where it does.
    usable : bool
        False where the cache store cannot be used at all; then nothing is ever cached.
    """

    def __init__(
        self, source: Store, cache: Store, identity: str, *, adopt: bool, **options: Any
    ) -> None:
        self._cache = cache
        self._options = options
        self._adopt = adopt
        self._last_reap = 0.0
        self._lock = threading.Lock()
        self.directory: Directory | None = None
        self.usable = True
        self.index: Any  # An Index, or what opens one.
        self.now: Callable[[], float] = time.monotonic
        if type(cache) is LocalStore:
            self.now = time.time
            self.index = self._open_directory(cache, identity)
        elif type(cache) is MemoryStore:
            self.index = _memory_index(source, cache, adopt, options)
        else:
            self.index = Index(**options)

    def tmp(self) -> str:
        """Beginning of the names of unfinished files of this process."""
        assert self.directory is not None
        return self.directory.tmp(self.index.place or 0)

    # -------------------------------------------------------------- steps

    async def step(self, io: Traffic, work: Callable[..., T], *args: Any) -> T:
        """Take a step of the index; where another process holds its lock, wait out of the way."""
        while True:
            try:
                return work(*args)
            except IndexBusyError:
                await io.block(self.index.wait)
            except CorruptIndexError as error:
                await io.block(lambda error=error: self._start_over(error))  # type: ignore[misc]

    def must(self, work: Callable[..., T], *args: Any) -> T:
        """Take a step of the index, whatever it takes."""
        while True:
            try:
                return work(*args)
            except IndexBusyError:
                self.index.wait()
            except CorruptIndexError as error:
                self._start_over(error)

    # ------------------------------------------------------------- repair

    def _start_over(self, error: CorruptIndexError) -> None:
        if not self.index.shared:
            # On the heap nobody but us can have done this.
            logger.error("the index has to be thrown away: %s", error)
            raise error
        try:
            ours = self.index.restart(_seed())
        except IndexBusyError:
            self.index.wait()
            return
        if ours:
            self._fill(str(error))

    def _fill(self, why: str) -> None:
        """Fill an empty index, in the background; until that is done it takes nothing in."""
        directory, index = self.directory, self.index
        assert directory is not None
        background(lambda: self._fill_now(directory, index, why))

    def _fill_now(self, directory: Directory, index: Index, why: str) -> None:
        try:
            directory.rebuild(self, index, why)
        except OSError as error:
            logger.warning(
                "the cache directory %s could not be read (%r); it is not used",
                directory.root,
                error,
            )
            self.usable = False
        except CorruptIndexError as error:
            self._start_over(error)

    def reap(self) -> bool:
        """Take over from processes that have died, at most once a second. Whether there were any."""
        if not self.index.shared or self.directory is None:
            return False
        with self._lock:
            if time.monotonic() - self._last_reap < _REAP_EVERY:
                return False
            self._last_reap = time.monotonic()
        try:
            dead, rebuilder_died = self.index.reap()
        except (IndexBusyError, CorruptIndexError):
            return False
        for place in dead:
            self.directory.sweep_tmp(place)
        if rebuilder_died and self.must(self.index.restart, _seed()):
            self._fill("the process that rebuilt it has died")
        return bool(dead)

    # -------------------------------------------------------------- opening

    def _open_directory(self, cache: LocalStore, identity: str) -> Index:
        try:
            self.directory = Directory(cache.root, identity, adopt=self._adopt)
        except OSError as error:
            return self._do_without(cache, error)
        try:
            return self._open_index(self.directory)
        except OSError as error:
            return self._keep_to_ourselves(cache, error)

    def _open_index(self, directory: Directory) -> Index:
        index, fresh = Index.open(directory.index_root, seed=_seed(), **self._options)
        if index.place is not None:
            # Whoever had this place before is gone.
            directory.sweep_tmp(index.place)
        if fresh:
            directory.rebuild(self, index, "there was none, or it could not be trusted")
        if directory.cold:
            directory.restamp(alone=index.alone)
            self.index = index
            index.void_prefix("")
            while victims := index.sweep(""):
                done = [cell for cell, name in victims if _files.remove(directory.path(name))]
                index.settled(done, [cell for cell, _ in victims if cell not in done])
            directory.cold = False
        return index

    def _do_without(self, cache: LocalStore, error: OSError) -> Index:
        logger.warning(
            "the cache directory %s cannot be used (%r). Every read goes to the source.",
            cache.root,
            error,
        )
        self.directory = None
        self.usable = False
        return Index(**{**self._options, "max_size": 0})

    def _keep_to_ourselves(self, cache: LocalStore, error: OSError) -> Index:
        logger.warning(
            "the index of the cache directory %s cannot be shared (%s). This process keeps one of its "
            "own in memory: other processes have bounds of their own, do not see its writes, and what "
            "it knows ends with it.",
            cache.root,
            error,
        )
        index = Index(**self._options)
        if self.directory is not None:
            self.directory.rebuild(self, index, "it cannot be shared")
        return index

    # ---------------------------------------------------------------- forks

    def after_fork(self) -> None:
        """Start over in a forked child.

        What the parent's other threads had in flight is gone; in a shared directory the child is a
        participant of its own.
        """
        self._lock = threading.Lock()
        if isinstance(self._cache, MemoryStore) and self.index.after_fork():
            return
        if self.directory is not None and self.index.shared:
            # Opened at the first use: most children of a fork never use it.
            self.index = _Unopened(self)
        else:
            self.index = Index(**self._options)

    def reopen(self) -> Any:
        """Open the directory again, as another participant."""
        with self._lock:
            if isinstance(self.index, _Unopened):
                assert self.directory is not None
                try:
                    self.index = self._open_index(self.directory)
                except OSError as error:
                    self.index = self._keep_to_ourselves(LocalStore(self.directory.root), error)
            return self.index


class _Unopened:
    """Stands for the index of a directory until a forked child uses it."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def __getattr__(self, name: str) -> Any:
        return getattr(self._books.reopen(), name)

    def __len__(self) -> int:
        return len(self._books.reopen())


def _seed() -> int:
    return int.from_bytes(os.urandom(8), "little")


# The indexes of caches in memory live as long as what they describe, by the number of its dict.
_memory: dict[int, tuple[weakref.ref[MemoryStore], Index, Store]] = {}
_memory_lock = threading.Lock()


def _memory_index(source: Store, cache: MemoryStore, adopt: bool, options: dict[str, Any]) -> Index:
    number = id(cache._store_dict)
    with _memory_lock:
        known = _memory.get(number)
        if (
            known is not None
            and (held := known[0]()) is not None
            and held._store_dict is cache._store_dict
        ):
            _, index, owner = known
            if not same_place(owner, source):
                raise ValueError(
                    f"cache_store={cache!r} holds the cache of {owner!r}, not of {source!r}. Give each "
                    "source a cache store of its own."
                )
            index.rebound(options["max_size"], options["max_age"])
            return index
        if cache._store_dict and not adopt:
            first = next(iter(cache._store_dict))
            raise ValueError(
                f"cache_store={cache!r} is not empty and was not filled by zcache (it holds {first!r}, "
                "for instance). Give an empty one; or pass adopt=True if all that it holds is a cache "
                f"of {source!r}, which zcache may serve and delete."
            )
        index = Index(**options)
        # What cannot be dated is stale as soon as anything can be.
        index.adopt([(0, len(value), name) for name, value in cache._store_dict.items()])
        _memory[number] = (weakref.ref(cache), index, source)
        weakref.finalize(cache, _memory.pop, number, None)
        return index


def after_fork() -> None:
    """Start with a lock of our own."""
    global _memory_lock
    _memory_lock = threading.Lock()
