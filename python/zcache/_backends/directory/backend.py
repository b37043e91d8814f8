"""A cache in a directory: a `LocalStore`; all processes on it share its index."""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from typing import TYPE_CHECKING, Final, TypeVar, cast

from zcache._backends.access import Access
from zcache._backends.base import DELETE_TIMEOUT, READ_TIMEOUT, Backend, names_of, read_timeout
from zcache._backends.directory.files import read_value
from zcache._backends.directory.folders import counted
from zcache._backends.directory.page_cache import PageCacheReader, is_supported
from zcache._core import (
    Index,
    is_absent,
    recorded_size_and_checksum,
    remove_key,
    remove_victims,
)
from zcache._index.handle import ignore
from zcache._index.resolution import RETRYABLE
from zcache._index.shared_wait import LOCK_TIMEOUT
from zcache._runtime.coroutines import NoAnswerError
from zcache._runtime.latch import Latch, Outcome
from zcache._runtime.thread_calls import run_in_background
from zcache._runtime.threads import NoThreadError
from zcache.exceptions import CacheUnreachableError, IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zarr.core.buffer import Buffer, BufferPrototype
    from zarr.storage import LocalStore

    from zcache._backends.base import TryRead, Victim
    from zcache._backends.directory.index import CacheDirectory
    from zcache._index.shared import SharedIndex
    from zcache._runtime.io import IO


logger = logging.getLogger("zcache")
T = TypeVar("T")

MOST_BEHIND: Final = 1000
"""Deletes of a place that wait for a thread without their callers; more are left to later ones."""
_QUIET: Final = 60.0
"""Seconds in which it is said once that others may not see a write."""


class DirectoryBackend(Backend):
    """Files below a directory, each under the name of its key.

    The directory is the one of the moment in which it was opened, whatever the working directory
    becomes.
    """

    removes_by_name = True
    _said = -math.inf

    def __init__(self, store: LocalStore, shared: SharedIndex) -> None:
        super().__init__(store, shared)
        self._directory = cast("CacheDirectory", shared.place)
        self._root = self._directory.root
        self._page_cache = PageCacheReader(self._root) if is_supported() else None
        self.try_read = self._page_cache
        self.filler = self._directory.filler

    @property
    def hears_of_changes(self) -> bool:
        # What others change reaches an index of our own only by the files that they remove. And if the directory
        # was renamed, they have made another one.
        try:
            return not self.tells_by_name and self.index.is_in_place
        except RETRYABLE:
            return False

    async def hear_of_changes(self, io: IO) -> bool:
        look = self._directory.filler.note_marks
        try:
            return await io.in_thread(look, timeout=READ_TIMEOUT)
        except NoThreadError:
            return look()
        except TimeoutError:
            return False

    @property
    def hears_of_evictions(self) -> bool:
        return self.index.shared

    @property
    def remembers_absences(self) -> bool:
        # Who has an index of his own tells others of a write by its file alone, and an absence has none.
        return self.index.shared

    async def read(
        self, io: IO, name: str, prototype: BufferPrototype, total: int, start: int, size: int
    ) -> Buffer | None:
        root = self._root
        return await io.in_thread(
            lambda: read_value(root, name, prototype, total, start, size),
            timeout=read_timeout(size),
        )

    @property
    def is_turn_full(self) -> bool:
        return self._page_cache is not None and self._page_cache.is_turn_full

    async def turn(self, size: int) -> TryRead | None:
        return None if self._page_cache is None else await self._page_cache.turn(size)

    async def remove(self, io: IO, victims: Sequence[Victim]) -> None:
        # Who takes them sees to them, and no other.
        left = [victims]
        try:
            told = Latch()

            def work() -> None:
                for one in _taken(left):
                    self._remove_and_tell(one, told)

            # In a directory that is only read from they stay, and this process serves them no more.
            reads = self._directory.layout.access is Access.READS
            if reads or self.shared.threads.are_behind(MOST_BEHIND):
                self.remove_later(left.pop())
                return
            outcome = self._begin_deletes(work)
        except BaseException:
            # An interrupt. What was handed over goes on, also without this caller.
            for one in _taken(left):
                self.remove_later(one)
            raise
        if await self._have_ended(io, outcome):
            # It hears of it later, where its lock is kept for longer.
            await io.until(told, LOCK_TIMEOUT)

    def _begin_deletes(self, work: Callable[[], object]) -> Outcome[object]:
        """Do deletes in a thread, whether or not anyone waits for them."""
        try:
            return run_in_background(work, self.shared.threads)
        except NoThreadError:
            # Here, then: a file that stays is one that others may be served.
            outcome: Outcome[object] = Outcome()
            try:
                outcome.succeed(work())
            except Exception as error:  # noqa: BLE001 - it is raised where the outcome is asked
                outcome.fail(error)
            return outcome

    async def _have_ended(
        self, io: IO, outcome: Outcome[object], progress: Callable[[], int] = lambda: 0
    ) -> bool:
        """Wait for deletes as long as they make progress; whether they have ended. The circuit breaker hears how it went."""
        timeout = self.breaker.patience("delete", DELETE_TIMEOUT)
        before = progress()
        while not await io.until(outcome, timeout):
            # What is being deleted stays counted until that has ended.
            last, before = before, progress()
            if not timeout:
                return False  # It may be answered yet.
            if before == last:
                self.breaker.failed(NoAnswerError(timeout), "delete")
                return False
        if isinstance(outcome.error, OSError):
            self.breaker.failed(outcome.error, "delete")
        else:
            outcome.result()
        return True

    @property
    def tells_by_name(self) -> bool:
        handle = self.shared.handle
        return not (handle.usable and handle.index.shared)

    async def remove_key(
        self, io: IO, key: str, victims: Sequence[Victim], *, begins: bool
    ) -> None:
        if victims:
            await self.remove(io, victims)
        # Another participant may have dropped the entry, and have died or stopped before it removed the
        # file; a damaged index may hide it. A later rebuild would find it and take it for valid.
        if not self.tells_by_name and is_absent(self._root, key):
            return
        await self._remove_by_name(io, key, lambda: remove_key(self._root, key), begins=begins)

    def check_drops(self) -> None:
        if self._directory.layout.access is Access.READS:
            raise self._directory.private_index.refusal("nothing in it can be dropped")

    def tell_later(self, prefix: str) -> None:
        if not self.tells_by_name or self._leaves_alone():
            return

        def tell() -> None:
            try:
                self._tell_and_remove(prefix, lambda: self._remove_below(prefix), begins=False)
            except OSError as error:
                self._could_not_tell(error, begins=False)

        try:
            run_in_background(tell, self.shared.threads)
        except RuntimeError:  # No thread now.
            tell()

    def _leaves_alone(self) -> bool:
        """Whether the directory is another source's by now."""
        return not self.shared.handle.usable and self._directory.layout.is_others

    async def _remove_by_name(
        self, io: IO, prefix: str, work: Callable[[], list[tuple[str, OSError]]], *, begins: bool
    ) -> None:
        if self._leaves_alone():
            self._directory.note_change(prefix)
            return
        tells = self.tells_by_name
        if not self.shared.handle.usable:
            self._directory.recovery.come_back()

        def remove() -> None:
            if tells:
                self._tell_and_remove(prefix, work, begins=begins)
            else:
                names = [name for name, _ in self._remove_counted(work)]
                self._add_tombstones(names)

        if not tells:
            await self._remove_unasked(io, remove)
            return
        try:
            try:
                await io.in_thread(remove, ignore, timeout=DELETE_TIMEOUT, progress=self._progress)
            except NoThreadError:
                remove()
        except (TimeoutError, OSError) as error:
            if begins:
                # The index has dropped what stays.
                self._directory.private_index.look_anew()
            self._could_not_tell(error, begins=begins)
        self._directory.note_change(prefix)

    async def _remove_unasked(self, io: IO, work: Callable[[], object]) -> None:
        """Remove files by their names, and wait for that as long as they are removed."""
        if not self.shared.threads.are_behind(MOST_BEHIND):
            await self._have_ended(io, self._begin_deletes(work), self._progress)

    def _tell_and_remove(
        self, prefix: str, work: Callable[[], list[tuple[str, OSError]]], *, begins: bool
    ) -> None:
        """Tell others of a change without the index: nothing older is filled, nothing older is there.

        In a directory that is only read from no change begins of what is there. What is there once it has ended came
        meanwhile: another process read the old value before the source had the new one.

        Raises
        ------
        OSError
            If that cannot be.
        """
        # First, so that nothing that is older is filled afterwards.
        self._directory.layout.tell_others()
        self._directory.filler.note_marks()
        if begins and self._directory.layout.access is Access.READS:
            for name in self._directory.scanner.names_below(prefix):
                raise OSError(errno.EROFS, "it is read-only", name)
            return
        if failed := self._remove_counted(work):
            raise failed[0][1]

    def _remove_counted(
        self, work: Callable[[], list[tuple[str, OSError]]]
    ) -> list[tuple[str, OSError]]:
        with counted(self.shared.handle):
            failed = work()
        if self._directory.layout.access is Access.FILLS:
            for _, error in failed:
                self.breaker.failed(error, "delete")
        if not failed:
            self.breaker.succeeded("delete")
        return failed

    def _could_not_tell(self, error: Exception, *, begins: bool) -> None:
        """Others who use the directory do not hear of a write: it must not begin."""
        if begins:
            raise CacheUnreachableError(
                f"other processes that use the cache directory {self._root} could not be told of this write, "
                f"for this one cannot use its index or only reads it: {error!r}. Write to the source itself "
                "if no other process reads through that directory, or give a cache directory of your own."
            ) from error
        now = time.monotonic()
        if now - self._said < _QUIET:
            return
        self._said = now
        logger.warning(
            "processes that use the cache directory %s may not see a write: %r", self._root, error
        )

    def _remove_and_tell(self, victims: Sequence[Victim], told: Latch) -> None:
        """Delete the bytes of victims; the index hears of it whatever has become of the caller, and `told` is set then."""
        try:
            outcome = self._remove_in_thread(victims)
        except Exception as error:  # noqa: BLE001 - the user did not ask for it
            outcome = [_as_os_error(error)] * len(victims)
        except BaseException:
            # An interrupt, where there was no thread.
            self.remove_later(victims)
            raise
        dropped, failed = self.sort(victims, outcome)

        def heard(emptied: bool) -> None:
            told.set()
            self._directory.note_deletes(emptied)

        try:
            if failed:
                self._add_tombstones(names_of(victims, failed))
        finally:
            self.shared.handle.call_later(heard, Index.confirm_deletes, dropped, failed)

    def _remove_in_thread(self, victims: Sequence[Victim]) -> list[OSError | None]:
        names = [name for _, name in victims]
        with counted(self.shared.handle):
            return self._remove_known(names, victims)

    def _remove_known(self, names: list[str], victims: Sequence[Victim]) -> list[OSError | None]:
        now = self.shared.clock()
        outcome = remove_victims(self._root, names, [None] * len(names), now)
        doubtful = [n for n, error in enumerate(outcome) if error and error.errno == errno.EEXIST]
        if doubtful:
            # Their times were changed, or they are not ours: the index knows what they should hold.
            cells = [victims[n][0] for n in doubtful]
            try:
                known = self.shared.handle.call_blocking(Index.expected, cells)
            except IndexLockTimeout:
                known = [None] * len(cells)
            again = remove_victims(self._root, [names[n] for n in doubtful], known, now)
            for n, error in zip(doubtful, again, strict=True):
                outcome[n] = error
            if any(again):
                self._directory.scanner.say_in_the_way()
        return outcome

    def _add_tombstones(self, names: Sequence[str]) -> None:
        with counted(self.shared.handle):
            self._directory.scanner.add_tombstones(names)

    async def remove_unlisted(self, io: IO, prefix: str, *, begins: bool | None = None) -> None:
        if begins is not None:
            await self._remove_by_name(
                io, prefix, lambda: self._remove_below(prefix), begins=begins
            )
        elif self._directory.layout.access is Access.FILLS:
            await self._remove_unasked(
                io, lambda: self._remove_counted(lambda: self._remove_below(prefix))
            )

    def _progress(self) -> int:
        """How deletes by names get on: they take as long as there are many values."""
        return int(self._directory.scanner.progress)

    def _remove_below(self, prefix: str) -> list[tuple[str, OSError]]:
        try:
            self._directory.scanner.remove_below(prefix)
        except OSError as error:
            return [(prefix, error)]
        return []

    def begin(self, io: IO) -> None:  # noqa: ARG002
        self._directory.recovery.reclaim_dead()

    async def recorded_size_and_checksum(self, io: IO, name: str) -> tuple[int, int] | None:
        path = os.path.join(self._root, name)
        return await io.in_thread(lambda: recorded_size_and_checksum(path), timeout=READ_TIMEOUT)

    async def intact_size(self, io: IO, name: str) -> int | None:
        path = os.path.join(self._root, name)
        return await io.in_thread(lambda: _intact_size(path), timeout=READ_TIMEOUT)


def _intact_size(path: str) -> int | None:
    recorded = recorded_size_and_checksum(path)
    try:
        size = os.stat(path).st_size
    except OSError:
        return None
    return size if recorded is not None and recorded[0] == size else None


def _taken(left: list[T]) -> list[T]:
    """What is left, unless another one has it."""
    try:
        return [left.pop()]
    except IndexError:
        return []


def _as_os_error(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else OSError(str(error))
