"""What becomes of an index that cannot be used: waited for, emptied and filled again, or given up."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from zcache._core import CorruptIndexError, Index, IndexBusyError
from zcache._threads import background

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

    from zcache._directory import Directory

logger = logging.getLogger("zcache")

NOT_NOW: Final = (IndexBusyError, CorruptIndexError)
"""What a step of the index raises that is seen to here."""
WITHOUT: Final = (
    "Every read goes to the source; other processes that use it do not see what is written through this "
    "one."
)
_MOMENTARY: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.EIO}
)
"""Errors of a file system after which it is tried again, ..."""
_MOMENT: Final = 0.05
"""... after so many seconds."""
_REAP_EVERY: Final = 1.0
"""Seconds between two looks for participants that have died."""


class Repairs:
    """The part of `Books` that keeps an index in use, or does without it."""

    index: Any
    directory: Directory | None
    usable: bool
    options: dict[str, Any]
    soon: Callable[..., None]
    must: Callable[..., Any]
    _cache: Store
    _lock: threading.RLock
    _repair: Future[None] | None = None
    _seen_to_since = 0.0
    _last_reap = 0.0

    def _see_to(self, error: Exception, *, last: bool = False) -> Future[None]:
        """Wait for the lock of the index, or replace an index that cannot be used.

        That happens in a thread, one for all who wait. `last` says that it has been replaced often
        enough.
        """
        with self._lock:
            if self._repair is None:
                done: Future[None] = Future()
                self._repair = done
                self._seen_to_since = time.monotonic()
                # Not one of the pool: at the end of the process nobody waits for somebody's lock.
                work = threading.Thread(
                    target=self._see_to_it, args=(error, done, last), daemon=True
                )
                work.start()
            return self._repair

    def _see_to_it(self, error: Exception, done: Future[None], last: bool) -> None:
        try:
            if last:
                self._abandon(error)
            elif isinstance(error, CorruptIndexError):
                self._start_over(str(error))
            else:
                self.index.wait()
        except Exception as failure:  # noqa: BLE001 - whatever it is, the reads must go on
            self._abandon(failure)
        finally:
            with self._lock:
                self._repair = None
            done.set_result(None)

    def _start_over(self, why: str) -> None:
        index, directory = self.index, self.directory
        if not index.shared or directory is None:
            # On the heap nobody but us can have done this.
            self._abandon(CorruptIndexError(why))
            return
        try:
            directory.prepare(adopt=False)
            directory.outdate_walks()
            ours = index.restart(seed())
            # Somebody may have removed the directory meanwhile, and others may have made it anew.
            directory.prepare(adopt=False)
            if directory.cold:
                raise ValueError(f"the directory {directory.root} belongs to another source now")  # noqa: TRY301
        except IndexBusyError:
            return  # The next step waits for the lock, and comes back here.
        except OSError as failure:
            if failure.errno in _MOMENTARY:
                time.sleep(_MOMENT)
                return  # Likewise.
            self._abandon(failure)
            return
        except (ValueError, CorruptIndexError) as failure:
            self._abandon(failure)
            return
        if ours:
            with contextlib.suppress(OSError):  # The next one who looks for the dead does it.
                directory.sweep_tmp()
            self._leave(self._fill(directory, why))

    def _abandon(self, failure: BaseException) -> None:
        """Do without the cache store from now on."""
        logger.warning(
            "the index of the cache %s cannot be used any more (%r). %s",
            self._cache,
            failure,
            WITHOUT,
        )
        self.usable = False
        self.directory = None
        self.index = self._nothing()

    def _nothing(self) -> Index:
        return Index(**{**self.options, "max_size": 0})

    def doubt(self) -> None:
        """Have the index rebuilt: the size of an entry is not that of its file, which is whole."""
        if self.index.shared:
            self.soon(lambda _: None, self._condemn)

    def _condemn(self) -> None:
        try:
            self.index.condemn()
        except CorruptIndexError as verdict:
            # Not for `must`, which would condemn the new index too, and so on.
            self._see_to(verdict)

    def _fill(self, directory: Directory, why: str) -> Future[None]:
        """Fill an empty index, in the background; until that is done it takes nothing in."""
        # Whoever waits for a walk holds nothing of ours: once all stores are gone, it comes to nothing,
        # and whoever opens the directory next sees that its rebuilder has gone.
        kept = weakref.ref(self)
        try:
            return background(lambda: directory.rebuild(lambda: _fillable(kept(), directory), why))
        except RuntimeError:  # The process is about to end.
            nothing: Future[None] = Future()
            nothing.set_result(None)
            return nothing

    def _leave(self, work: Future[None]) -> None:
        """Let it go on in the background."""
        kept = weakref.ref(self)

        def ended(work: Future[None]) -> None:
            if (failure := work.exception()) is not None and (books := kept()) is not None:
                books._abandon(failure)

        work.add_done_callback(ended)

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
            if dead:
                self.directory.sweep_tmp()
        except CorruptIndexError as error:
            self._see_to(error)
            return False
        except (IndexBusyError, OSError):
            return False
        if rebuilder_died:
            # In a thread, for that reads and makes files.
            self._see_to(CorruptIndexError("the process that rebuilt it has died"))
        return bool(dead)


def _fillable(books: Repairs | None, directory: Directory) -> Repairs | None:
    """The books, as long as they live and use this directory."""
    return None if books is None or books.directory is not directory else books


def seed() -> int:
    """A number that nobody can guess, for the hashes of an index."""
    return int.from_bytes(os.urandom(8), "little")
