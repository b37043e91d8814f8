"""The index of a cache directory: how it is opened, and opened again after a fork."""

from __future__ import annotations

import errno
import gc
import logging
import os
import time
import weakref
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Final

from zcache._backends.directory import files
from zcache._backends.directory.filler import DirectoryFiller
from zcache._backends.directory.scan import Scanner
from zcache._backends.directory.stamp import InUseError, Stamp
from zcache._backends.directory.temporary import TemporaryFiles
from zcache._core import CorruptIndexError, Index, IndexFullError
from zcache._index.handle import IndexHandle, ignore
from zcache._runtime.fork import at_fork
from zcache._runtime.threads import run_in_background

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("zcache")

REBUILD_PATIENCE: Final = 1.0
"""Seconds that the opening of a directory waits for an index that has to be rebuilt."""
_CANNOT_SHARE: Final = frozenset(
    {None, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}
)
"""What a file system says that cannot lock or map; after any other error the directory is not used."""
_MOMENTARY: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.EIO}
)
"""Errors of a file system after which a recovery is tried again, ..."""
_MOMENT: Final = 0.05
"""... after so many seconds."""
RECLAIM_EVERY: Final = 1.0
"""Seconds between two looks for participants that have died."""


class CacheDirectory:
    """A directory that holds a cache: its stamp, its temporary files, and the index in it.

    Parameters
    ----------
    root : path
        The directory.
    source : str
        Name of the source.
    adopt : bool
        Whether to take over what is there already.
    limits : dict
        What the index is made with.
    clock : callable
        Seconds since 1970.

    Attributes
    ----------
    handle : IndexHandle
        The index.
    filler : DirectoryFiller
        Carries out fills.
    on_idle : callable
        Called when fills have ended; set by the owner of the queue.

    Raises
    ------
    CacheOwnershipError
        If it belongs to somebody else.
    """

    def __init__(
        self,
        root: os.PathLike[str] | str,
        source: str,
        *,
        adopt: bool,
        limits: dict[str, Any],
        clock: Callable[[], float],
    ) -> None:
        self._prepare(root, limits, clock)
        try:
            self._stamp = Stamp(self.root, self._reserved, source, adopt=adopt)
            self._make_folders()
        except OSError as error:
            self.handle.abandon(error)
            return
        self._open()

    @classmethod
    def unopened(
        cls, root: os.PathLike[str] | str, limits: dict[str, Any], clock: Callable[[], float]
    ) -> CacheDirectory:
        """A directory of which nothing is used."""
        directory = cls.__new__(cls)
        directory._prepare(root, limits, clock)
        return directory

    def _prepare(
        self, root: os.PathLike[str] | str, limits: dict[str, Any], clock: Callable[[], float]
    ) -> None:
        self.root = os.path.abspath(root)
        self._reserved = os.path.join(self.root, ".zcache")
        self._index_root = os.path.join(self._reserved, "index")
        self.scanner = Scanner(self.root, self._reserved)
        self.temporary = TemporaryFiles(self._reserved, self._index_root)
        self.on_idle: Callable[[], object] = _nothing
        self._last_reclaim = 0.0
        # Until it is opened.
        empty = Index(**{**limits, "max_size": 0})
        self.handle = IndexHandle(empty, f"directory {self.root}", limits)
        # The handle must not keep alive what keeps it alive.
        this = weakref.ref(self)
        self.filler = DirectoryFiller(
            self.root, self.temporary.path, clock, lambda: _became_idle(this())
        )
        self.handle.recover = lambda error: _recover(this(), error)
        _directories.add(self)

    def _make_folders(self) -> None:
        os.makedirs(self._index_root, exist_ok=True)
        os.makedirs(self.temporary.path, exist_ok=True)

    # -------------------------------------------------------------- opening

    def _open(self) -> None:
        try:
            with self._stamp.one_at_a_time():
                self._open_alone()
        except InUseError as error:
            # By another source without a name: that is not worth an error, for both end with their process.
            self.handle.abandon(error)
            return
        except OSError as error:
            if error.errno not in _CANNOT_SHARE or isinstance(error, IndexFullError):
                self.handle.abandon(error)
                return
            try:
                self._keep_to_ourselves(error)
            except OSError as failure:
                self.handle.abandon(failure)
                return
        self.filler.start(self.handle.index)

    def _open_alone(self) -> None:
        handle = self.handle
        handle.index, is_new = self._attach()
        # It was read before whose directory it is, and others may have taken it over or removed it since.
        self._stamp.check(adopt=False)
        self._make_folders()
        # Who had this slot before is gone.
        self.temporary.sweep(handle.index.slot)
        if is_new:
            work = self._rebuild("there was none, or it could not be trusted")
            # What belonged to another source is all removed next, so all of it has to be known.
            wait([work], None if self._stamp.is_foreign else REBUILD_PATIENCE)
            if work.done():
                work.result()
            else:
                self._watch(work)
        if self._stamp.is_foreign:
            self._stamp.take_over(alone=self._is_alone())
            self._empty()
            self._stamp.restamp()

    def _attach(self) -> tuple[Index, bool]:
        while True:
            try:
                return Index.open(self._index_root, seed=_seed(), **self.handle.limits)
            except InterruptedError:
                pass  # By a signal, whose handler has run.

    def _is_alone(self) -> bool:
        """Whether no other process uses the directory; stores that wait to be collected do not count."""
        call = self.handle.call_blocking
        if not call(_is_alone, timeout=None):
            gc.collect()
        return call(_is_alone, timeout=None)

    def _empty(self) -> None:
        call = self.handle.call_blocking
        call(Index.invalidate, "", timeout=None)
        while victims := call(Index.drain_prefix, "", timeout=None):
            for _, name in victims:
                files.remove(self.scanner.path(name))
            call(Index.confirm_deletes, [cell for cell, _ in victims], [], timeout=None)
        # And what the index does not know.
        self.scanner.remove_below("")

    def _keep_to_ourselves(self, error: OSError) -> None:
        logger.warning(
            "the index of the cache directory %s cannot be shared (%s). This process keeps one of its own "
            "in memory: other processes have bounds of their own, do not see its writes, and what it knows "
            "ends with it.",
            self.root,
            error,
        )
        self.handle.index = Index(**self.handle.limits)
        if self._stamp.is_foreign:
            self.scanner.remove_below("")
            self._stamp.restamp()
        self.temporary.sweep()
        self.scanner.rebuild(lambda: self.handle, "it cannot be shared")

    def _rebuild(self, why: str) -> Future[None]:
        """Fill an empty index in the background; until that is done it takes nothing in."""
        # The scan keeps nothing alive: once all stores are gone it comes to nothing, and the next process
        # that opens the directory sees that its rebuild owner is gone.
        this = weakref.ref(self)
        scanner = self.scanner
        try:
            return run_in_background(lambda: scanner.rebuild(lambda: _handle_of(this()), why))
        except RuntimeError as error:  # No thread, or the process is about to end.
            nothing: Future[None] = Future()
            nothing.set_exception(OSError(errno.EAGAIN, str(error)))
            return nothing

    def _watch(self, work: Future[None]) -> None:
        """Let a rebuild go on in the background."""
        handle = weakref.ref(self.handle)

        def ended(work: Future[None]) -> None:
            failure = work.exception()
            if failure is not None and (found := handle()) is not None:
                found.abandon(failure)

        work.add_done_callback(ended)

    # ------------------------------------------------------------- recovery

    def start_over(self, why: str) -> None:
        """Empty an index that is damaged, and fill it from a scan; runs in a thread."""
        handle = self.handle
        index = handle.index
        if not index.shared:
            # On the heap only this process can have done it.
            handle.abandon(CorruptIndexError(why))
            return
        try:
            self._stamp.check(adopt=False)
            self._make_folders()
            self.scanner.outdate()
            ours = index.restart(_seed())
            # Somebody may have removed the directory meanwhile, and others may have made it anew.
            self._stamp.check(adopt=False)
            self._make_folders()
            if self._stamp.is_foreign:
                raise ValueError(f"the directory {self.root} belongs to another source now")  # noqa: TRY301
        except OSError as failure:
            if failure.errno in _MOMENTARY:
                time.sleep(_MOMENT)
                return  # The next step finds the same, and comes back here.
            handle.abandon(failure)
            return
        except (ValueError, CorruptIndexError) as failure:
            handle.abandon(failure)
            return
        except RuntimeError:
            return  # The lock is taken: the next step waits for it, and comes back here.
        if ours:
            try:
                self.temporary.sweep()
            except OSError as error:  # The next look for the dead does it.
                logger.debug("unfinished files of %s stay: %r", self.root, error)
            self._watch(self._rebuild(why))

    def reclaim_dead(self) -> None:
        """Take over from processes that have died, at most once in `RECLAIM_EVERY` seconds."""
        now = time.monotonic()
        index = self.handle.index
        if now - self._last_reclaim < RECLAIM_EVERY or not index.shared:
            return
        self._last_reclaim = now
        try:
            dead, rebuild_owner_died = index.reclaim_dead()
            if dead:
                self.temporary.sweep()
        except CorruptIndexError as error:
            self.handle.resolve(error)
            return
        except (RuntimeError, OSError):
            return
        if rebuild_owner_died:
            # In a thread, for that reads and makes files.
            self.handle.resolve(CorruptIndexError("the process that rebuilt it has died"))

    # ---------------------------------------------------------------- forks

    def after_fork(self) -> None:
        """Start over in a forked child, as a participant of its own, at the first use."""
        handle = self.handle
        _close_locks(handle.index)
        self.filler.abandon()
        handle.after_fork(self._open_first if handle.usable else None)

    def _open_first(self) -> None:
        try:
            self._open()
        except ValueError as error:  # It is another source's by now.
            self.handle.abandon(error)
        self.handle.call_later(ignore, *self._limits_step())

    def _limits_step(self) -> tuple[Any, ...]:
        limits = self.handle.limits
        return Index.set_limits, limits["max_size"], limits["max_age"], limits["verify"]


# Those that are just being opened among them, of which a forked child knows nothing else.
_directories: weakref.WeakSet[CacheDirectory] = weakref.WeakSet()


def _release_locks() -> None:
    """Close, in a forked child, the locks of all directories of its parent."""
    for directory in list(_directories):
        _close_locks(directory.handle.index)


at_fork(_release_locks)


def _nothing() -> None:
    pass


def _became_idle(directory: CacheDirectory | None) -> None:
    if directory is not None:
        directory.on_idle()


def _recover(directory: CacheDirectory | None, error: Exception) -> None:
    if directory is not None:
        directory.start_over(str(error))


def _handle_of(directory: CacheDirectory | None) -> IndexHandle | None:
    """The index of a directory, as long as that lives and is used."""
    if directory is None or not directory.handle.usable:
        return None
    return directory.handle


def _is_alone(index: Index) -> bool:
    return index.is_alone


def _seed() -> int:
    """A number that cannot be guessed, for the hashes of an index."""
    return int.from_bytes(os.urandom(8), "little")


def _close_locks(index: Index) -> None:
    """Close, in a forked child, what would keep the locks of its parent alive after its death.

    The index itself may live on, in the frames of the parent's threads and coroutines. Without a lock it
    takes no step any more.
    """
    locks = index.disown()
    if not locks:
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for lock in locks:
            os.dup2(null, lock, inheritable=False)
    finally:
        os.close(null)
