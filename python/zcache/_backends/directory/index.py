"""The index of a cache directory: how it is opened, and opened again after a fork."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from zcache._backends.access import Access
from zcache._backends.directory import files
from zcache._backends.directory.bound import Bound
from zcache._backends.directory.filler import DirectoryFiller
from zcache._backends.directory.folders import counted
from zcache._backends.directory.layout import Layout
from zcache._backends.directory.private_index import PrivateIndex
from zcache._backends.directory.rebuild import REBUILD_PATIENCE, Rebuild
from zcache._backends.directory.recovery import Recovery
from zcache._backends.directory.stamp import InUseError, Stamp
from zcache._core import Index, IndexBusyError, IndexFullError, remove_victims
from zcache._index.calls import drain_absences, drained, is_complete
from zcache._index.handle import IndexHandle
from zcache._index.place import Place
from zcache._runtime.fork import at_fork
from zcache._runtime.registry import Registry
from zcache.exceptions import CacheOwnershipError, IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("zcache")

_CANNOT_SHARE: Final = frozenset(
    {None, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}
)
"""What a file system says that cannot lock or map; after any other error the directory is not used."""
_TAKES_NOTHING: Final = frozenset(
    {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.ETXTBSY}
)
"""What a file system says that takes nothing, but may be read from."""
_CANNOT_DELETE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
"""After which of these nothing can be deleted either. From a full volume it can."""
_LOOK_AGAIN: Final = 0.005
"""Seconds between two looks whether an index is complete."""


class CacheDirectory(Place):
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
    read_only : bool, optional
        Whether it is only read from. Default is False.
    mode : int, optional
        Permissions of a directory that is made. Default is 0o700.

    Attributes
    ----------
    handle : IndexHandle
        The index.
    layout : Layout
        What is kept beside the values.
    scanner : Scanner
        Finds the values, whether or not the index knows them.
    private_index : PrivateIndex
        Serves it where it is only read from.
    recovery : Recovery
        Brings the index back into use.
    filler : DirectoryFiller
        Carries out fills.

    Raises
    ------
    CacheOwnershipError
        If it belongs to another source or user.
    """

    layout_of: Any = Layout
    """What is kept in it, and how."""

    def __init__(
        self,
        root: os.PathLike[str] | str,
        source: str,
        *,
        adopt: bool,
        limits: dict[str, Any],
        clock: Callable[[], float],
        read_only: bool = False,
        mode: int = 0o700,
    ) -> None:
        self._prepare(root, source, limits, clock)
        self.layout.mode = mode
        if read_only:
            self.layout.set_access(Access.READS)
            self._read_as_asked()
            return
        try:
            self.layout.claim(adopt=adopt)
        except OSError as error:
            self._read_from(error)
            return
        self.handle.change_limits(self.layout.own_limits())
        self._begin()
        self.enforce_bound()

    def enforce_bound(self) -> None:
        # docstring inherited. In the background, also where nothing is filled.
        if self.layout.access is Access.FILLS:
            self._bound.enforce()

    def wait_for_bound(self) -> None:
        # docstring inherited
        self._bound.wait()

    def limit_fills(self, max_pending_size: int | None, min_free_space: int | None) -> None:
        # docstring inherited
        super().limit_fills(max_pending_size, min_free_space)
        self.filler.min_free_space = min_free_space

    @classmethod
    def unopened(
        cls, root: os.PathLike[str] | str, limits: dict[str, Any], clock: Callable[[], float]
    ) -> CacheDirectory:
        """A directory of which nothing is used."""
        directory = cls.__new__(cls)
        directory._prepare(root, None, limits, clock)
        directory.layout.is_others = True
        return directory

    def _prepare(
        self,
        root: os.PathLike[str] | str,
        source: str | None,
        limits: dict[str, Any],
        clock: Callable[[], float],
    ) -> None:
        self.layout = self.layout_of(root, source)
        self.root = self.layout.root
        self.scanner = self.layout.scanner
        self._clock = clock
        # Until it is opened.
        empty = Index(**{**limits, "max_size": 0})
        self.handle = IndexHandle(empty, f"directory {self.root}", limits)
        # The core must not keep alive what keeps it alive.
        this = weakref.ref(self)
        self.filler = DirectoryFiller(self.layout, lambda: _became_idle(this()))
        self.filler.on_unlisted = lambda: _remove_unlisted(this())
        self._rebuild = Rebuild(self.layout, self.handle)
        self.private_index = PrivateIndex(self.layout, self.handle)
        self.recovery = Recovery(
            self.layout, self.handle, self.filler, self._rebuild, self.private_index
        )
        self.recovery.on_restored = lambda: _enforce_bound(this())
        self._bound = Bound(
            self.handle,
            clock,
            lambda *values: _remove(this(), *values),
            lambda: _after_evictions(this()),
        )
        _directories.add(self)

    def _remove(self, names: list[str], known: Any) -> list[Any]:
        """Delete the bytes of victims; what the file system has said of each."""
        return list(remove_victims(self.root, names, known, self._clock()))

    def note_deletes(self, emptied: bool) -> None:
        """Do what is due once the index has heard of deletes; `emptied` is its answer."""

    def note_change(self, prefix: str) -> None:
        """Note that this process changes the source at and below a prefix."""
        self.private_index.note_change(prefix)

    def after_evictions(self) -> None:
        """Do what is due after evictions, in a thread that may wait."""

    # -------------------------------------------------------------- opening

    def _begin(self) -> None:
        """Open the index, within `REBUILD_PATIENCE` or else in the background."""
        begun = time.monotonic()
        until = begun + REBUILD_PATIENCE
        if not self.layout.stamp.is_foreign:
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

        opening = self.handle.open_later(open_first, begun)
        if opening is not None:
            opening.wait(until - time.monotonic())
        if refused:
            raise refused[0]
        if not self.handle.is_open:
            logger.warning(
                "the index of the cache directory %s is not open yet, for another process holds its lock, or "
                "what another source has left has to be removed first. Until then the source serves every "
                "read, and writes raise IndexLockTimeout. Is a process that uses the cache stopped?",
                self.root,
            )

    def _open(self, until: float) -> None:
        try:
            self.layout.check_parent()
            with self.layout.stamp.one_at_a_time(until):
                self._open_alone(until)
        except InUseError as error:
            self.layout.note_owner(error)
            # By another source without a name: that is not worth an error, for both end with their process.
            self.handle.abandon(error)
            return
        except (CacheOwnershipError, IndexBusyError):
            raise
        except OSError as error:
            if error.errno not in _CANNOT_SHARE or isinstance(error, IndexFullError):
                self._read_from(error)
                return
            try:
                self._keep_to_ourselves(error)
            except Exception as failure:  # noqa: BLE001 - reads must go on, whatever it is
                self.handle.abandon(failure)
                return
        except Exception as failure:  # noqa: BLE001 - the same
            self.handle.abandon(failure)
            return
        self.filler.start(self.handle.index)

    def _open_alone(self, until: float) -> None:
        layout, handle = self.layout, self.handle
        index, is_new = layout.open_index(handle.limits, until)
        # The owner of the directory was read before, and others may have taken it over or removed it since.
        layout.check()
        if layout.stamp.is_foreign and not index.is_alone:
            # Stores that wait to be collected do not count.
            gc.collect()
            if not index.is_alone:
                raise layout.stamp.in_use()
        # Not before: it has the values of the other source.
        handle.index = index
        # Who had this slot before is gone.
        layout.temporary.sweep(handle.index.slot)
        layout.note_doubt()
        if is_new:
            work = self._rebuild.begin(
                "there was none, it is of another version, or it could not be trusted"
            )
            if work is not None:
                # What belonged to another source is all removed next, so all of it has to be known.
                patience = None if layout.stamp.is_foreign else max(0.0, until - time.monotonic())
                self._rebuild.wait(work, patience)
        if layout.stamp.is_foreign:
            layout.stamp.take_over()
            self._empty()
            layout.stamp.restamp()
        elif layout.stamp.has_adopted and not is_new:
            # It lists nothing of what was signed just now.
            handle.mark_corrupt()
            while not handle.call_opened(is_complete) and time.monotonic() < until:
                time.sleep(_LOOK_AGAIN)
        layout.stamp.has_adopted = False

    def _is_alone(self) -> bool:
        """Whether no other process uses the directory; stores that wait to be collected do not count."""
        call = self.handle.call_opened
        if not call(_is_alone, timeout=None):
            gc.collect()
        return call(_is_alone, timeout=None)

    def _empty(self) -> None:
        call = partial(self.handle.call_opened, timeout=None)
        with counted(self.handle):
            call(Index.invalidate, "")
            for victims in drained(partial(call, Index.drain_prefix), ""):
                for _, name in victims:
                    files.remove_value(self.root, name)
                call(Index.confirm_deletes, [cell for cell, _ in victims], [])
            drain_absences(partial(call, Index.drain_absences), "")
            # And what the index does not know.
            self.scanner.remove_below("")

    def _keep_to_ourselves(self, error: OSError) -> None:
        logger.warning(
            "the index of the cache directory %s cannot be shared (%s). This process keeps one of its own "
            "in memory: other processes have bounds of their own, what it writes is cached when it is read "
            "next, nothing is while others share an index there, and what it knows ends with it.",
            self.root,
            str(error),
        )
        self.handle.index = Index(**self.handle.limits, complete=False)
        self.layout.has_own_index = True
        if self.layout.stamp.is_foreign:
            self.scanner.remove_below("")
            self.layout.stamp.restamp()
        self.layout.temporary.sweep()
        self._rebuild.here("it cannot be shared")

    def _read_from(self, error: OSError) -> None:
        """Serve what a directory holds that takes nothing now: an image, say, or another user's."""
        owner = Stamp.source_of(self.root, self.layout.kind)
        if error.errno not in _TAKES_NOTHING or owner != self.layout.source:
            self.layout.is_others = owner not in (None, self.layout.source)
            self.handle.abandon(error)
            return
        cannot_delete = error.errno in _CANNOT_DELETE
        self.layout.set_access(Access.READS if cannot_delete else Access.REMOVES)
        logger.warning(
            "the cache directory %s takes nothing (%s), so what it holds is read and nothing else is cached, until that is "
            "over. The order and the counters are those of this process alone.",
            self.root,
            # As text: some keep log records, and an exception keeps its frames, and with them the directory.
            str(error),
        )
        self.private_index.why = f"{error}. Open it where it can be written to, by a user who may."
        self.private_index.open()

    def _read_as_asked(self) -> None:
        """Serve what a directory holds that was given as read-only, and what others put there later."""
        self.private_index.is_asked_for = True
        self.private_index.why = "it was opened with read_only=True. Open it without that, as a user who may write to it."
        # What is no cache, or one of another kind, is refused.
        if Stamp.source_of(self.root, self.layout.kind) is None:
            logger.warning(
                "there is no cache in %s yet, and as it was given as read-only none is made. The source serves every "
                "read, until others have filled it.",
                self.root,
            )
        self.private_index.open()

    # ---------------------------------------------------------------- forks

    def rename(self, name: str) -> None:
        # docstring inherited
        self.layout.rename(name)

    def release_locks(self) -> None:
        """Close, in a forked child, the locks of its parent."""
        _close_locks(self.handle.index)
        if self.handle.lost is not None:
            _close_locks(self.handle.lost)

    def after_fork(self) -> None:
        """Start over in a forked child, as a participant of its own, at the first use."""
        super().after_fork()
        handle = self.handle
        self.release_locks()
        handle.lost = None
        self.filler.abandon()
        self._rebuild.after_fork()
        self.private_index.after_fork()
        self._bound.after_fork()
        handle.after_fork(self._open_first if handle.usable else None)
        if not handle.usable:
            # That of the parent takes no step here: each would be waited for.
            handle.index = handle.empty_index()

    def _open_first(self, patience: float) -> None:
        if self.layout.access is not Access.FILLS:
            self.private_index.open()
            return
        try:
            self._open(time.monotonic() + patience)
        except CacheOwnershipError as error:
            self.layout.note_owner(error)
            raise
        self.handle.apply_limits()


# Those that are just being opened among them, of which a forked child knows nothing else.
_directories: Registry[CacheDirectory] = Registry()


def _release_locks() -> None:
    """Close, in a forked child, the locks of all directories of its parent."""
    for directory in _directories.snapshot():
        directory.release_locks()


at_fork(_release_locks)


def _remove(directory: CacheDirectory | None, names: list[str], known: Any) -> list[Any]:
    if directory is None:
        return [OSError(errno.ENOENT, "it is not in use any more")] * len(names)
    return directory._remove(names, known)


def _after_evictions(directory: CacheDirectory | None) -> None:
    if directory is not None:
        directory.after_evictions()


def _remove_unlisted(directory: CacheDirectory | None) -> None:
    if directory is not None:
        # Where that fails, the next value that is in the way begins again.
        with contextlib.suppress(IndexLockTimeout, OSError):
            directory.scanner.remove_unlisted(directory.handle)


def _enforce_bound(directory: CacheDirectory | None) -> None:
    if directory is not None:
        directory.enforce_bound()


def _became_idle(directory: CacheDirectory | None) -> None:
    if directory is not None:
        directory.on_idle()


def _is_alone(index: Index) -> bool:
    return index.is_alone


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
