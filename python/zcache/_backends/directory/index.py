"""The index of a cache directory: how it is opened, and opened again after a fork."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
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
from zcache._core import (
    CorruptIndexError,
    Index,
    IndexBusyError,
    IndexFullError,
    remove_files,
    take_folder_bytes,
)
from zcache._index.handle import LOCK_TIMEOUT, IndexHandle, ignore
from zcache._runtime.fork import at_fork
from zcache._runtime.threads import run_in_background
from zcache.exceptions import CacheOwnershipError, IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("zcache")

BLOCK_SIZE: int | None = None
"""Bytes of a block of all cache directories, or 1 to count bytes; None asks the volume of each."""
REBUILD_PATIENCE: Final = LOCK_TIMEOUT
"""Seconds that the opening of a directory waits in all, for the lock of its index, a rebuild, or another
process that takes the directory over. Then that goes on in the background, and nothing is cached meanwhile."""
_CANNOT_SHARE: Final = frozenset(
    {None, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}
)
"""What a file system says that cannot lock or map; after any other error the directory is not used."""
_TAKES_NOTHING: Final = frozenset(
    {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.ETXTBSY}
)
"""What a file system says that takes nothing, but may be read from."""
_MOMENTARY: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.EIO}
)
"""Errors of a file system after which a recovery is tried again, ..."""
_MOMENT: Final = 0.05
"""... after so many seconds."""
_LOOKS: Final = 100_000
"""Batches that one opening evicts at most."""
_LOOKS_WHILE_OPENING: Final = 1000
"""Looks of it at an index that is not open yet."""
_LOOK_AGAIN: Final = 0.005
"""Seconds between two looks whether an index is complete."""
RECLAIM_EVERY: Final = 1.0
"""Seconds between two looks for participants that have died, and two tries to use a directory again."""
_TICK: Final = 0.001
"""Seconds; file systems do not tell shorter times apart."""


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

    is_others : bool
        Whether it is, by now, the cache of another source.

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
        read_only: bool = False,
    ) -> None:
        self._prepare(root, source, limits, clock)
        if read_only:
            self._read_from(OSError(errno.EROFS, "it was given as read-only"))
            return
        try:
            self._claim(adopt=adopt)
        except OSError as error:
            self._read_from(error)
            return
        self._begin()
        self.enforce_bound()

    def _examine_volume(self) -> None:
        """See how large its blocks are, which count, and whether it tells all names apart."""
        unit = BLOCK_SIZE
        if unit is None:
            try:
                unit = files.block_size(self.temporary.path)
            except OSError:
                # A full volume, say, which takes in nothing now.
                unit = os.statvfs(self.root).f_frsize
        self.handle.limits = {**self.handle.limits, "unit": unit}
        folds = files.folds_names(self.temporary.path)
        self.filler.folds_names = self.scanner.folds_names = folds

    def enforce_bound(self) -> None:
        """Evict in the background what is above the bound, also where nothing is filled."""
        if self.filler.reads_only:
            return
        this = weakref.ref(self)
        with contextlib.suppress(RuntimeError):
            run_in_background(lambda: _enforce_bound(this))

    @classmethod
    def unopened(
        cls, root: os.PathLike[str] | str, limits: dict[str, Any], clock: Callable[[], float]
    ) -> CacheDirectory:
        """A directory of which nothing is used."""
        directory = cls.__new__(cls)
        directory._prepare(root, None, limits, clock)
        directory.is_others = True
        return directory

    def _prepare(
        self,
        root: os.PathLike[str] | str,
        source: str | None,
        limits: dict[str, Any],
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self.root = os.path.abspath(root)
        self._reserved = os.path.join(self.root, ".zcache")
        self._index_root = os.path.join(self._reserved, "index")
        # As it is recorded with each value.
        digest = hashlib.sha256((source or "").encode()).digest()[:8]
        self.scanner = Scanner(self.root, self._reserved, digest)
        self.temporary = TemporaryFiles(self._reserved, self._index_root)
        self.on_idle: Callable[[], object] = _nothing
        self._last_reclaim = self._last_try = 0.0
        self.is_others = False
        self._source = source
        # Why the index has to be filled, where no thread could be started for that.
        self._rebuild_due: str | None = None
        # Until it is opened.
        empty = Index(**{**limits, "max_size": 0})
        self.handle = IndexHandle(empty, f"directory {self.root}", limits)
        # The handle must not keep alive what keeps it alive.
        this = weakref.ref(self)
        self.filler = DirectoryFiller(
            self.root,
            self.temporary.path,
            clock,
            lambda: _became_idle(this()),
            source=digest,
            on_foreign=self.scanner.say_in_the_way,
        )
        self.handle.recover = lambda error: _recover(this(), error)
        _directories.add(self)

    def _claim(self, *, adopt: bool) -> None:
        """See whose the directory is, and make what is missing of it."""
        self._stamp = Stamp(self.root, self._reserved, self._source or "", adopt=adopt)
        self._make_folders()
        self._examine_volume()

    def _note_doubt(self) -> None:
        """Have the next scan take in only what is recorded to be the source's, where all else is gone."""
        if self._stamp.is_doubtful:
            self.scanner.strict = True
            self._stamp.is_doubtful = False

    def _make_folders(self) -> None:
        mode = 0o700 | os.stat(self.root).st_mode & 0o777
        os.makedirs(self._index_root, mode=mode, exist_ok=True)
        os.makedirs(self.temporary.path, mode=mode, exist_ok=True)

    # -------------------------------------------------------------- opening

    def _begin(self) -> None:
        """Open the index, within `REBUILD_PATIENCE` or else in the background."""
        until = time.monotonic() + REBUILD_PATIENCE
        if not self._stamp.is_foreign:
            try:
                self._open(until)
            except IndexBusyError:
                pass
            else:
                return
        refused: list[BaseException] = []

        def open_first(patience: float) -> None:
            try:
                self._open_first(patience)
                self.enforce_bound()
            except CacheOwnershipError as error:
                refused.append(error)
                raise
            except Exception:
                raise
            except BaseException as interrupt:
                # For the caller of the constructor, not for the thread.
                refused.append(interrupt)
                raise RuntimeError("the opening was interrupted") from interrupt

        opening = self.handle.open_later(open_first)
        if opening is not None:
            wait([opening], max(0.0, until - time.monotonic()))
        if refused:
            raise refused[0]
        if self.handle.open_first is not None:
            logger.warning(
                "the index of the cache directory %s is not open yet, for another process holds its lock, or "
                "what another source has left has to be removed first. Until then the source serves every "
                "read, and writes raise IndexLockTimeout. Is a process that uses the cache stopped?",
                self.root,
            )

    def _open(self, until: float) -> None:
        try:
            with self._stamp.one_at_a_time(until):
                self._open_alone(until)
        except InUseError as error:
            self._note_owner(error)
            # By another source without a name: that is not worth an error, for both end with their process.
            self.handle.abandon(error)
            return
        except OSError as error:
            if error.errno not in _CANNOT_SHARE or isinstance(error, IndexFullError):
                self._read_from(error)
                return
            try:
                self._keep_to_ourselves(error)
            except OSError as failure:
                self.handle.abandon(failure)
                return
        if not self.filler.reads_only:
            self.filler.start(self.handle.index)

    def _open_alone(self, until: float) -> None:
        handle = self.handle
        handle.index, is_new = self._attach(until)
        # It was read before whose directory it is, and others may have taken it over or removed it since.
        self._stamp.check(adopt=False)
        self._make_folders()
        # Who had this slot before is gone.
        self.temporary.sweep(handle.index.slot)
        self._note_doubt()
        if is_new:
            work = self._rebuild("there was none, or it could not be trusted")
            if work is not None:
                # What belonged to another source is all removed next, so all of it has to be known.
                patience = None if self._stamp.is_foreign else max(0.0, until - time.monotonic())
                wait([work], patience)
                if work.done():
                    work.result()
                else:
                    self._watch(work)
        if self._stamp.is_foreign:
            self._stamp.take_over(alone=self._is_alone())
            self._empty()
            self._stamp.restamp()
        elif self._stamp.has_adopted and not is_new:
            # It lists nothing of what was signed just now.
            handle.mark_corrupt()
            while not handle.call_opened(_is_complete) and time.monotonic() < until:
                time.sleep(_LOOK_AGAIN)
        self._stamp.has_adopted = False

    def _attach(self, until: float) -> tuple[Index, bool]:
        patience = max(0.0, until - time.monotonic())
        return Index.open(self._index_root, seed=_seed(), timeout=patience, **self.handle.limits)

    def _is_alone(self) -> bool:
        """Whether no other process uses the directory; stores that wait to be collected do not count."""
        call = self.handle.call_opened
        if not call(_is_alone, timeout=None):
            gc.collect()
        return call(_is_alone, timeout=None)

    def _empty(self) -> None:
        call = self.handle.call_opened
        take_folder_bytes()
        call(Index.invalidate, "", timeout=None)
        while victims := call(Index.drain_prefix, "", timeout=None):
            for _, name in victims:
                files.remove_value(self.root, name)
            call(Index.confirm_deletes, [cell for cell, _ in victims], [], timeout=None)
        # And what the index does not know.
        self.scanner.remove_below("")
        call(Index.count_folders, take_folder_bytes(), timeout=None)

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

    def _read_from(self, error: OSError) -> None:
        """Serve what a directory holds that takes nothing: an image, say, or another user's."""
        if error.errno not in _TAKES_NOTHING or Stamp.source_of(self.root) != self._source:
            self.handle.abandon(error)
            return
        logger.warning(
            "the cache directory %s takes nothing (%s), so what it holds is read and nothing else is cached. "
            "The order and the counters are those of this process alone.",
            self.root,
            error,
        )
        self.filler.reads_only = self.scanner.only_looks = True
        self.handle.index = Index(**self.handle.limits)
        work = self._rebuild("it is only read from")
        if work is None:
            return
        wait([work], REBUILD_PATIENCE)
        if work.done():
            work.result()
        else:
            self._watch(work)

    def _rebuild(self, why: str) -> Future[None] | None:
        """Fill an empty index in the background; until that is done it takes nothing in.

        None where no thread can be started: it is tried again, unless there is so little to scan that it was
        done here.
        """
        self._rebuild_due = None
        # The scan keeps nothing alive: once all stores are gone it comes to nothing, and the next process
        # that opens the directory sees that its rebuild owner is gone.
        this = weakref.ref(self)
        scanner = self.scanner
        try:
            return run_in_background(lambda: scanner.rebuild(lambda: _handle_of(this()), why))
        except RuntimeError:  # No thread, or the process is about to end.
            pass
        if self._stamp.is_foreign or self._is_empty():
            scanner.rebuild(lambda: _handle_of(this()), why)
        else:
            self._rebuild_due = why
        return None

    def _is_empty(self) -> bool:
        ranges = os.path.join(self._reserved, "ranges")
        return os.listdir(self.root) == [".zcache"] and not os.path.exists(ranges)

    def _rebuild_watched(self, why: str) -> None:
        """Fill an empty index in the background, and give it up where that fails."""
        work = self._rebuild(why)
        if work is not None:
            self._watch(work)

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
            self._note_doubt()
            if self._stamp.is_foreign:
                raise ValueError(f"the directory {self.root} belongs to another source now")  # noqa: TRY301
        except OSError as failure:
            if failure.errno in _MOMENTARY:
                time.sleep(_MOMENT)
                return  # The next step finds the same, and comes back here.
            handle.abandon(failure)
            return
        except (ValueError, CorruptIndexError) as failure:
            self._note_owner(failure)
            handle.abandon(failure)
            return
        except RuntimeError:
            return  # The lock is taken: the next step waits for it, and comes back here.
        if ours:
            try:
                self.temporary.sweep()
            except OSError as error:  # The next look for the dead does it.
                logger.debug("unfinished files of %s stay: %r", self.root, error)
            self._rebuild_watched(why)

    def _note_owner(self, failure: Exception) -> None:
        """Note whether the directory is the cache of another source, which is left alone."""
        stamp = os.path.join(self._reserved, "stamp.json")
        self.is_others = isinstance(failure, ValueError) and os.path.lexists(stamp)

    def come_back(self) -> None:
        """Try in the background to use the directory again, at most once in `RECLAIM_EVERY` seconds."""
        now = time.monotonic()
        if self.handle.usable or self._source is None or now - self._last_try < RECLAIM_EVERY:
            return
        self._last_try = now
        this = weakref.ref(self)
        with contextlib.suppress(RuntimeError):  # No thread now.
            run_in_background(lambda: _come_back(this()))

    def come_back_now(self) -> None:
        """Use the directory again, if that is possible."""
        handle = self.handle
        lost = handle.lost
        try:
            self._claim(adopt=False)
            if lost is None:
                index, is_new = self._attach(time.monotonic() + REBUILD_PATIENCE)
            else:
                index, is_new = lost, lost.rejoin(_seed())
            self._stamp.check(adopt=False)
            self._note_doubt()
            if self._stamp.is_foreign:
                raise CacheOwnershipError("another source has it")
        except (OSError, RuntimeError, ValueError) as error:
            self._note_owner(error)
            logger.debug("the cache directory %s cannot be used yet: %r", self.root, error)
            return
        self.is_others = False
        if lost is None:
            self.filler.start(index)
        handle.restore(index)
        handle.call_later(ignore, *self._limits_step())
        if is_new:
            self._rebuild_watched("it was not used for a while")

    def tell_others(self) -> None:
        """Say that the source is changed by somebody who cannot use the index.

        A step that finds another time of the lock file than the last one ends all reads of the source
        that have begun before: what they bring is not cached.

        Raises
        ------
        OSError
            If the file system refuses.
        """
        lock = os.path.join(self._index_root, "lock")
        try:
            before = os.stat(lock).st_mtime_ns
            try:
                now = time.time_ns()
                os.utime(lock, ns=(now, now))
            except PermissionError:
                # It is another user's, who lets us write: then it can be set to the time of now only.
                os.utime(lock)
                while os.stat(lock).st_mtime_ns == before:
                    time.sleep(_TICK)
                    os.utime(lock)
        except (FileNotFoundError, NotADirectoryError):
            pass  # Whoever makes it anew begins with what is there then.
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            # Where nothing can be written, only what is there already can be served.

    def reclaim_dead(self) -> None:
        """Take over from processes that have died, at most once in `RECLAIM_EVERY` seconds."""
        if not self.handle.usable:
            self.come_back()
            return
        now = time.monotonic()
        index = self.handle.index
        if now - self._last_reclaim < RECLAIM_EVERY or not index.shared or self.filler.reads_only:
            return
        self._last_reclaim = now
        if (why := self._rebuild_due) is not None:
            self._rebuild_watched(why)
        # Where the directory itself is gone, the step finds out.
        with contextlib.suppress(OSError):
            self._stamp.keep()
            self._make_folders()
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

    def evict_excess(self) -> bool:
        """Evict a batch of what is above the bound; whether there may be more.

        Raises
        ------
        IndexLockTimeout
            If another process holds the lock of the index.
        """
        handle = self.handle
        excess, is_complete = handle.call_blocking(_excess)
        if not excess:
            return not is_complete
        victims = handle.call_blocking(Index.evict, excess, self._clock())
        if not victims:
            return not is_complete
        take_folder_bytes()
        cells = [cell for cell, _ in victims]
        known = handle.call_blocking(Index.expected, cells)
        outcome = remove_files(self.root, [name for _, name in victims], known)
        failed = [cell for cell, error in zip(cells, outcome, strict=True) if error]
        gone = [cell for cell, error in zip(cells, outcome, strict=True) if not error]
        handle.call_later(ignore, Index.confirm_deletes, gone, failed)
        if folders := take_folder_bytes():
            handle.call_later(ignore, Index.count_folders, folders)
        # What cannot be deleted now is tried again by the next fill.
        return bool(gone)

    # ---------------------------------------------------------------- forks

    def release_locks(self) -> None:
        """Close, in a forked child, the locks of its parent."""
        _close_locks(self.handle.index)
        if self.handle.lost is not None:
            _close_locks(self.handle.lost)

    def after_fork(self) -> None:
        """Start over in a forked child, as a participant of its own, at the first use."""
        handle = self.handle
        self.release_locks()
        handle.lost = None
        self.filler.abandon()
        handle.after_fork(self._open_first if handle.usable else None)

    def _open_first(self, patience: float) -> None:
        try:
            self._open(time.monotonic() + patience)
        except CacheOwnershipError as error:
            self._note_owner(error)
            raise
        except ValueError as error:  # It is another source's by now.
            self._note_owner(error)
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
        directory.release_locks()


at_fork(_release_locks)


def _nothing() -> None:
    pass


def _became_idle(directory: CacheDirectory | None) -> None:
    if directory is not None:
        directory.on_idle()


def _come_back(directory: CacheDirectory | None) -> None:
    if directory is not None:
        directory.come_back_now()


def _recover(directory: CacheDirectory | None, error: Exception) -> None:
    if directory is not None:
        directory.start_over(str(error))


def _handle_of(directory: CacheDirectory | None) -> IndexHandle | None:
    """The index of a directory, as long as that lives and is used."""
    if directory is None or not directory.handle.usable:
        return None
    return directory.handle


def _enforce_bound(reference: weakref.ref[CacheDirectory]) -> None:
    opening = 0
    for _ in range(_LOOKS):
        directory = reference()
        if directory is None or not directory.handle.usable:
            return
        is_open = directory.handle.is_open
        opening += not is_open
        if opening > _LOOKS_WHILE_OPENING:
            return
        try:
            if is_open and not directory.evict_excess():
                return
        except IndexLockTimeout:
            pass
        del directory
        time.sleep(_LOOK_AGAIN)


def _excess(index: Index) -> tuple[int, bool]:
    return index.excess, index.is_complete


def _is_complete(index: Index) -> bool:
    return index.is_complete


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
