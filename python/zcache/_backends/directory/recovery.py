"""How a cache directory is used again: after damage of its index, a loss, or the death of a participant."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
import weakref
from typing import TYPE_CHECKING, Final

from zcache._backends.access import Access
from zcache._backends.directory.layout import new_seed
from zcache._backends.directory.rebuild import REBUILD_PATIENCE
from zcache._core import CorruptIndexError
from zcache._index.handle import ignore
from zcache._runtime.thread_calls import run_in_background
from zcache.exceptions import CacheOwnershipError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._backends.directory.filler import DirectoryFiller
    from zcache._backends.directory.layout import Layout
    from zcache._backends.directory.private_index import PrivateIndex
    from zcache._backends.directory.rebuild import Rebuild
    from zcache._index.handle import IndexHandle

logger = logging.getLogger("zcache")

_MOMENTARY: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.EIO}
)
"""Errors of a file system after which a recovery is tried again, ..."""
_MOMENT: Final = 0.05
"""... after so many seconds."""
RECLAIM_EVERY: Final = 1.0
"""Seconds between two looks for participants that have died, and two tries to use a directory again."""


class Recovery:
    """Brings the index of a directory back into use.

    Parameters
    ----------
    layout : Layout
        The directory.
    handle : IndexHandle
        Its index.
    filler : DirectoryFiller
        Carries out fills.
    rebuild : Rebuild
        Fills an empty index.
    private_index : PrivateIndex
        Serves a directory that is only read from, and tries itself to use it again.

    Attributes
    ----------
    on_reclaimed : callable
        Called when participants that have died were found.
    on_restored : callable
        Called when the directory is used again.
    """

    def __init__(
        self,
        layout: Layout,
        handle: IndexHandle,
        filler: DirectoryFiller,
        rebuild: Rebuild,
        private_index: PrivateIndex,
    ) -> None:
        self._layout = layout
        self._handle = handle
        self._filler = filler
        self._rebuild = rebuild
        self._private_index = private_index
        self._last_reclaim = self._last_try = 0.0
        self.on_reclaimed: Callable[[], object] = ignore
        self.on_restored: Callable[[], object] = ignore
        # These must not keep alive what keeps them alive.
        this = weakref.ref(self)
        private_index.use_again = lambda: _use_again(this())
        handle.recover = lambda error: _recover(this(), error)

    def start_over(self, why: str) -> None:
        """Empty an index that is damaged, and fill it from a scan; runs in a thread."""
        layout, handle = self._layout, self._handle
        index = handle.index
        if not index.shared:
            # On the heap only this process can have done it.
            handle.abandon(CorruptIndexError(why))
            return
        try:
            layout.check()
            layout.scanner.outdate()
            # From the restart on, any thread may begin the rebuild.
            self._rebuild.why = why
            # Where another thread was faster, the scan that has just been outdated was its.
            ours = index.restart(new_seed()) or index.adopt([])
            # The directory may have been removed meanwhile, and another process may have made it anew.
            layout.check()
            layout.note_doubt()
            if layout.stamp.is_foreign:
                raise CacheOwnershipError(
                    f"the directory {layout.root} belongs to another source now"
                )
        except OSError as failure:
            if failure.errno in _MOMENTARY:
                time.sleep(_MOMENT)
                return  # The next step finds the same, and comes back here.
            handle.abandon(failure)
            return
        except (ValueError, CorruptIndexError) as failure:
            layout.note_owner(failure)
            handle.abandon(failure)
            return
        except RuntimeError:
            return  # The lock is taken: the next step waits for it, and comes back here.
        if ours:
            try:
                layout.temporary.sweep()
            except OSError as error:  # The next look for the dead does it.
                logger.debug("unfinished files of %s stay: %r", layout.root, error)
            self._rebuild.begin_watched(why)

    def come_back(self) -> None:
        """Try in the background to use the directory again, at most once in `RECLAIM_EVERY` seconds."""
        if self._layout.access is not Access.FILLS:
            self._private_index.look_again()
            return
        now = time.monotonic()
        unused = self._handle.usable or self._layout.source is None
        if unused or now - self._last_try < RECLAIM_EVERY:
            return
        self._last_try = now
        this = weakref.ref(self)
        with contextlib.suppress(RuntimeError):  # No thread now.
            run_in_background(lambda: _come_back(this()))

    def come_back_now(self) -> None:
        """Use the directory again, if that is possible."""
        if self._layout.access is not Access.FILLS:
            self._private_index.look()
        else:
            self.use_again()

    def use_again(self) -> bool:
        """Claim the directory and join its index; whether that is possible."""
        layout, handle = self._layout, self._handle
        lost = handle.lost
        # Of what was changed where files could be removed, others were told at once.
        has_to_tell = layout.access is Access.READS
        try:
            layout.check_parent()
            layout.claim(adopt=False)
            handle.change_limits(layout.own_limits())
            if lost is None:
                until = time.monotonic() + REBUILD_PATIENCE
                index, is_new = layout.open_index(handle.limits, until)
            else:
                # A rebuild of its own has stopped as the index was abandoned, and no one else makes it up.
                index, is_new = lost, lost.rejoin(new_seed()) or lost.adopt([])
            layout.stamp.check(adopt=False)
            layout.note_doubt()
            if layout.stamp.is_foreign:
                raise CacheOwnershipError("another source has it")
            if has_to_tell:
                self._private_index.tell_changes(index)
        except (OSError, RuntimeError, ValueError) as error:
            layout.note_owner(error)
            logger.debug("the cache directory %s cannot be used yet: %r", layout.root, error)
            return False
        # Before the index is used, for what that drops has to be deleted.
        layout.is_others = False
        if has_to_tell:
            layout.set_access(Access.REMOVES)
        if lost is None:
            self._filler.start(index)
        handle.restore(index)
        if has_to_tell:
            # Of what was changed meanwhile; from now on each change tells by itself.
            with contextlib.suppress(OSError):
                self._private_index.tell_changes(index)
        handle.say_restored()
        self._private_index.end()
        handle.apply_limits()
        if is_new:
            self._rebuild.begin_watched("it was not used for a while")
        self.on_restored()
        return True

    def reclaim_dead(self) -> None:
        """Take over from processes that have died, at most once in `RECLAIM_EVERY` seconds."""
        handle = self._handle
        if self._layout.access is not Access.FILLS or not handle.usable:
            self.come_back()
            return
        now = time.monotonic()
        if now - self._last_reclaim < RECLAIM_EVERY:
            return
        self._last_reclaim = now
        index = handle.index
        is_shared = index.shared
        # Where the directory itself is gone, the step finds out.
        with contextlib.suppress(OSError):
            if is_shared:
                self._layout.stamp.keep()
                self._layout.make_folders()
        try:
            dead, rebuild_owner_died = index.reclaim_dead() if is_shared else ([], False)
            if dead:
                self._layout.temporary.sweep()
                self.on_reclaimed()
            is_stopped = self._rebuild.is_stopped(index)
        except CorruptIndexError as error:
            handle.resolve(error)
            return
        except (RuntimeError, OSError):
            return
        if is_stopped:
            self._rebuild.go_on()
        elif rebuild_owner_died:
            # In a thread, for that reads and makes files.
            handle.resolve(CorruptIndexError("the process that rebuilt it has died"))


def _recover(recovery: Recovery | None, error: Exception) -> None:
    if recovery is not None:
        recovery.start_over(str(error))


def _come_back(recovery: Recovery | None) -> None:
    if recovery is not None:
        recovery.come_back_now()


def _use_again(recovery: Recovery | None) -> bool:
    return recovery is not None and recovery.use_again()
