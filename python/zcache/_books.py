"""The index of one cache store: how it is opened, shared, repaired, and taken over after a fork."""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
import time
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from zarr.storage import LocalStore

from zcache import _files, _registry
from zcache._core import CorruptIndexError, Index, IndexFullError
from zcache._coroutines import guarded
from zcache._directory import Directory, let_go
from zcache._identity import in_memory
from zcache._listing import NotOursError, take_in
from zcache._repairs import NOT_NOW, WITHOUT, Repairs, seed
from zcache._sharing import Shared, memory_index, other_index
from zcache._standins import NotListedError, Unlisted, Unopened
from zcache._threads import in_background

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

    from zcache._breaker import Breaker
    from zcache._flights import Flight
    from zcache._identity import Named
    from zcache._traffic import Traffic

logger = logging.getLogger("zcache")
T = TypeVar("T")

_PATIENCE: Final = 1.0
"""Seconds that the first use of a directory waits for an index that has to be rebuilt, and a read for the
lock of an index: then it goes without."""
_REBUILDS: Final = 20
"""Times that one step finds the index damaged before its process gives it up."""
_NO_SHARING: Final = frozenset(
    {None, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}
)
"""What a file system says that cannot lock or map; with any other error the directory is not used."""


class LateError(Exception):
    """Somebody who has been stopped, it seems, holds the lock of the index: the step was not taken."""


class Books(Repairs):
    """The index of a cache store, with what it takes to keep it in step with the store.

    Attributes
    ----------
    index : Index
        The index itself; another one after a fork.
    breaker : Breaker
        Whether the cache store may be used.
    directory : Directory or None
        The directory that the index lies in, where it does.
    usable : bool
        False where the cache store cannot be used at all; then nothing is ever cached.
    ageless : bool
        Whether nothing ever expires in this index, so that nobody needs to ask the clock.
    options : dict
        What the index is made with: the bounds, among others.
    adopt : bool
        Whether what the cache store holds already is taken over.
    """

    def __init__(
        self,
        source: Named,
        cache: Store,
        *,
        adopt: bool,
        breaker: Breaker,
        **options: Any,
    ) -> None:
        self._cache = cache
        self.breaker = breaker
        self._identity = source.name
        self.options = options
        self.adopt = adopt
        # Reentrant, for while it is held the garbage collector may end an operation.
        self._lock = threading.RLock()
        self._shared: Shared | None = None
        self.directory: Directory | None = None
        self.usable = True
        self.ageless = options["max_age"] is None
        self.index: Any = None  # An Index, or what opens one.
        _registry.add_books(self)
        self.now: Callable[[], float] = time.monotonic
        if type(cache) is LocalStore:
            self.now = time.time
            self.index = self._open_directory(cache, source.name)
        elif (kept := in_memory(cache)) is not None:
            self._shared = memory_index(self, source, kept)
            self.index = self._shared.index
        else:
            self._shared = other_index(self, source, cache)
            self.index = self._shared.index

    def real(self) -> Index:
        """The index itself, never what stands for it."""
        index = self.index
        if isinstance(index, Unlisted):
            return index.within
        if isinstance(index, Unopened):
            index = self.reopen()
        found: Index = index
        return found

    def tmp(self) -> str:
        """Beginning of the names of unfinished files of this process."""
        if self.directory is None:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return self.directory.tmp(self.index.place)

    # -------------------------------------------------------------- steps

    async def step(
        self, io: Traffic, work: Callable[..., T], *args: Any, for_ever: bool = True
    ) -> T:
        """Take a step of the index; where another process holds its lock, wait out of the way.

        Raises
        ------
        LateError
            Unless it is to wait `for_ever`, if the lock has been taken for `_PATIENCE`.
        """
        damages = 0
        while True:
            if not for_ever and self._repair is not None and self._patience() <= 0:
                raise LateError
            try:
                return work(*args)
            except NotListedError as error:
                if not await self._list(io):
                    done: T = error.without(*args)
                    return done
            except NOT_NOW as error:
                damages += isinstance(error, CorruptIndexError)
                done_with = self._see_to(error, last=damages >= _REBUILDS)
                longest = None if for_ever else self._patience()
                if not await io.until(done_with, longest):
                    raise LateError from None
            work = self._current(work)

    def _patience(self) -> float:
        """Seconds for which a read waits still for what is seen to."""
        return self._seen_to_since + _PATIENCE - time.monotonic()

    async def sure(
        self,
        io: Traffic,
        late: Callable[[T], object],
        work: Callable[..., T],
        *args: Any,
        for_ever: bool = True,
    ) -> T:
        """Take a step that has to be taken, even if the caller is cancelled while it waits.

        In that case, and where it does not wait `for_ever` (see `step`), `late` is told later what came
        of it.
        """
        work = self._current(work)
        try:
            return work(*args)
        except NOT_NOW:
            pass
        try:
            return await self.step(io, work, *args, for_ever=for_ever)
        except BaseException:
            self.soon(late, work, *args)
            raise

    def soon(self, then: Callable[[T], object], work: Callable[..., T], *args: Any) -> None:
        """Take a step now if that needs no waiting, else in the background."""
        self._soon(then, work, args, 0)

    def _soon(
        self, then: Callable[[T], object], work: Callable[..., T], args: Any, damages: int
    ) -> None:
        work = self._current(work)
        try:
            result = work(*args)
        except NotListedError as error:
            then(error.without(*args))
        except NOT_NOW as error:
            damages += isinstance(error, CorruptIndexError)
            again = partial(self._soon, then, work, args, damages)
            # Not before the index answers: a thread that waited for it would be one less for others.
            self._see_to(error, last=damages >= _REBUILDS).add_done_callback(
                lambda _: in_background(again)
            )
        else:
            then(result)

    def must(self, work: Callable[..., T], *args: Any) -> T:
        """Take a step of the index, whatever it takes; not from an event loop."""
        damages = 0
        while True:
            work = self._current(work)
            try:
                return work(*args)
            except NotListedError as error:
                done: T = error.without(*args)
                return done
            except NOT_NOW as error:
                damages += isinstance(error, CorruptIndexError)
                self._see_to(error, last=damages >= _REBUILDS).result()

    def _current(self, work: Callable[..., T]) -> Callable[..., T]:
        """The same step of the index that is in use now."""
        owner = getattr(work, "__self__", None)
        if owner is self.index or not isinstance(owner, (Index, Unlisted)):
            return work
        index = self.index
        if isinstance(index, Unopened):
            # Begun before the fork: nothing of it is left that would be worth to open a directory.
            index = self._nothing()
        now: Callable[..., T] = getattr(
            index.within if isinstance(index, Unlisted) else index, work.__name__
        )
        return now

    async def _list(self, io: Traffic) -> bool:
        """Find out what is in a cache store that can only be asked, at the first use.

        Returns
        -------
        bool
            False where that fails or has failed lately: it has to do without, until the next try.

        Raises
        ------
        ValueError
            If the cache store belongs to somebody else.
        """
        unlisted = self.index
        if not isinstance(unlisted, Unlisted):
            return True
        if not unlisted.listed and not self.breaker.allows("list"):
            return False
        flight, leads = unlisted.begin_listing(io.loop())
        if unlisted.listed:
            if leads:
                flight.deliver(b"")
            self.index = unlisted.within
        elif not leads:
            if not await io.wait(flight):
                flight.abandon()  # Its event loop has stopped.
            if flight.error is not None:
                raise flight.error.with_traceback(flight.trace)
            return flight.abandoned or unlisted.listed
        else:
            await self._take_in(io, unlisted, flight)
        return unlisted.listed

    async def _take_in(self, io: Traffic, unlisted: Unlisted, flight: Flight) -> None:
        try:
            work = take_in(self._cache, unlisted, self._identity, adopt=self.adopt)
            await io.run(guarded(work))
        except NotOursError as refusal:
            flight.fail(refusal)
            raise
        except Exception as error:  # noqa: BLE001 - it is the cache store's, and none of the user's
            self.breaker.failed(error, "list")
        except BaseException:
            # What is in the index by now is found to be known the next time.
            flight.abandon()
            raise
        else:
            self.breaker.succeeded("list")
            unlisted.listed = True
            self.index = unlisted.within
        flight.deliver(b"")

    # -------------------------------------------------------------- opening

    def _open_directory(self, cache: LocalStore, identity: str) -> Index:
        try:
            self.directory = Directory(cache.root, identity, adopt=self.adopt)
        except OSError as error:
            return self._do_without(cache, error)
        return self._open_or_do_without(self.directory)

    def _open_or_do_without(self, directory: Directory) -> Index:
        try:
            return self._open_index(directory)
        except OSError as error:
            if error.errno not in _NO_SHARING or isinstance(error, IndexFullError):
                return self._do_without(self._cache, error)
            failure = error
        try:
            return self._keep_to_ourselves(directory, failure)
        except OSError as error:
            return self._do_without(self._cache, error)

    def _open_index(self, directory: Directory) -> Index:
        with directory.one_at_a_time():
            return self._open_alone(directory)

    def _open_alone(self, directory: Directory) -> Index:
        index, fresh = self._attach(directory)
        self.index = index
        # Whose it is was read before, and before others had taken it over, or removed it.
        directory.prepare(adopt=False)
        # Whoever had this place before is gone.
        directory.sweep_tmp(index.place)
        if fresh:
            work = self._fill(directory, "there was none, or it could not be trusted")
            # What belonged to another source is all removed next, so all of it has to be known.
            wait([work], None if directory.cold else _PATIENCE)
            if work.done():
                work.result()
            else:
                self._leave(work)
        if directory.cold:
            directory.take_over(alone=self._is_alone())
            self._empty(directory)
            directory.restamp()
        opened: Index = self.index
        return opened

    def _is_alone(self) -> bool:
        """Whether nobody else uses the directory; a store that is only waiting to be collected does not."""
        if not self.must(lambda: self.index.alone):
            gc.collect()
        alone: bool = self.must(lambda: self.index.alone)
        return alone

    def _attach(self, directory: Directory) -> tuple[Index, bool]:
        while True:
            try:
                return Index.open(directory.index_root, seed=seed(), **self.options)
            except InterruptedError:
                pass  # By a signal, whose handler has run.

    def _empty(self, directory: Directory) -> None:
        self.must(self.index.void_prefix, "")
        while victims := self.must(self.index.sweep, ""):
            cells = [cell for cell, _ in victims]
            for _, name in victims:
                _files.remove(directory.path(name))
            self.must(self.index.settled, cells, [])
        # And what the index does not know.
        directory.remove_below("")

    def _do_without(self, cache: Store, error: Exception) -> Index:
        logger.warning("the cache directory %s cannot be used (%r). %s", cache, error, WITHOUT)
        self.directory = None
        self.usable = False
        return self._nothing()

    def _keep_to_ourselves(self, directory: Directory, error: OSError) -> Index:
        logger.warning(
            "the index of the cache directory %s cannot be shared (%s). This process keeps one of its "
            "own in memory: other processes have bounds of their own, do not see its writes, and what "
            "it knows ends with it.",
            directory.root,
            error,
        )
        self.index = index = Index(**self.options)
        if directory.cold:
            directory.remove_below("")
            directory.restamp()
        directory.sweep_tmp()
        directory.rebuild(lambda: self, "it cannot be shared")
        return index

    # ---------------------------------------------------------------- forks

    def after_fork(self) -> None:
        """Start over in a forked child.

        What the parent's other threads had in flight is gone; in a shared directory the child is a
        participant of its own.
        """
        self._lock = threading.RLock()
        self._repair = None
        if in_memory(self._cache) is not None and self.index.after_fork():
            return
        if self.directory is not None:
            let_go(self.index)
            # Opened at the first use: most children of a fork never use it.
            self.index = Unopened(self)
        elif not self.usable or self._shared is None:
            self.index = self._nothing()
        else:
            # What is there by now is the parent's, so it is ours.
            self.adopt = True
            self._shared.after_fork(self.options)
            self.index = self._shared.index

    def let_go(self) -> None:
        """Keep, in a forked child, nothing of what was about to be opened."""
        let_go(self.index)

    def reopen(self) -> Any:
        """Open the directory again, as another participant."""
        with self._lock:
            if isinstance(self.index, Unopened):
                assert self.directory is not None
                try:
                    self.index = self._open_or_do_without(self.directory)
                except ValueError as error:  # It is another source's by now.
                    self.index = self._do_without(self._cache, error)
            return self.index
