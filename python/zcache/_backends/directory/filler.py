"""Fills of a directory: each is one job of the core, in threads that need no interpreter."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from typing import TYPE_CHECKING, Final

from zcache._backends.base import Ended
from zcache._backends.directory.files import fold
from zcache._core import NO_SPACE_ON_VOLUME, DirectoryFills
from zcache._index.handle import ignore
from zcache._runtime.thread_calls import run_in_background

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zcache._backends.access import Access
    from zcache._backends.base import FillJob
    from zcache._backends.directory.layout import Layout
    from zcache._core import FillResult, Index
    from zcache._runtime.circuit_breaker import Operation
    from zcache._runtime.io import IO
    from zcache._runtime.latch import Outcome

_POLL: Final = 0.005
"""Seconds between two looks where no thread can be started to wait."""


class DirectoryFiller:
    """Hands jobs to the core and collects how they ended.

    Parameters
    ----------
    layout : Layout
        The directory.
    on_idle : callable
        Called when fills have ended.

    Attributes
    ----------
    min_free_space : int or None
        Bytes of the volume that stay free; None for the default of the core.
    on_unlisted : callable
        Called in the background where a fill has met a value that the index does not list.
    """

    def __init__(self, layout: Layout, on_idle: Callable[[], object]) -> None:
        self._layout = layout
        self._on_idle = on_idle
        self._has_met_foreign = False
        self._fills: DirectoryFills | None = None
        self._jobs: dict[int, FillJob] = {}
        # Held from the hand-over to the note of the number. Reentrant: inside it the garbage collector
        # may end a reader.
        self._lock = threading.RLock()
        self.min_free_space: int | None = None
        self._moved: Outcome[bool] | None = None
        self.on_unlisted: Callable[[], object] = ignore
        self._unlisted: Outcome[object] | None = None
        self._is_shared = False

    @property
    def access(self) -> Access:
        # docstring inherited
        return self._layout.access

    def start(self, index: Index) -> None:
        """Begin to take jobs for this index."""
        layout = self._layout
        self._is_shared = index.shared
        self._fills = DirectoryFills(
            index,
            layout.root,
            layout.temporary.path,
            on_idle=self._on_idle,
            source=layout.digest,
            marked=None if index.shared else layout.lock_path,
            segments=layout.segment_files,
        )

    def note_marks(self) -> bool:
        """End what has begun before others, or this process, have said that they change the source.

        False where nothing is filled, and so nothing tells of what they change.
        """
        if self._fills is None:
            return False
        self._fills.look()
        return True

    def submit(self, io: IO, job: FillJob) -> None:  # noqa: ARG002 - the core needs no event loop
        fills = self._fills
        if fills is None:
            raise RuntimeError("the cache directory is not open")
        if self._layout.folds_names and fold(job.key) != job.key:
            # Another key may have the same file.
            raise ValueError(f"the volume does not tell {job.key!r} from {fold(job.key)!r}")
        # A user's own clock may do anything.
        now = job.backend.shared.clock()
        with self._lock:
            number = fills.submit(
                job.name,
                job.byte_range,
                job.data,
                job.ticket,
                job.fetched,
                self.min_free_space,
                now,
            )
            self._jobs[number] = job

    def collect(self) -> Sequence[Ended]:
        fills = self._fills
        if fills is None:
            return ()
        with self._lock:
            # Before the look, so that it finds all of them.
            was_idle = not fills.pending
            results = fills.collect()
            # Of a caller that was interrupted right after the hand-over there is no note.
            known = [(self._jobs.pop(one.id, None), one) for one in results]
            if was_idle and self._jobs:
                # An interrupt has taken what was collected before.
                self._jobs.clear()
        if not results:
            return ()
        if not self._has_met_foreign and any(map(_met_foreign, results)):
            self._has_met_foreign = True
            with contextlib.suppress(RuntimeError):
                run_in_background(self._layout.scanner.say_in_the_way)
        if any(one.outcome == "filled" for one in results):
            self._layout.space_log.filled()
        if any(one.reason == NO_SPACE_ON_VOLUME for one in results):
            self._layout.space_log.rejected(self.min_free_space)
        unlisted = [one for one in results if one.outcome == "unlisted"]
        if unlisted and self._is_shared and (self._unlisted is None or self._unlisted.is_set):
            with contextlib.suppress(RuntimeError):
                self._unlisted = run_in_background(self.on_unlisted)
        return [self._ended(job, one) for job, one in known if job is not None]

    def _ended(self, job: FillJob, result: FillResult) -> Ended:
        failures: list[tuple[Exception, Operation]] = [(e, "delete") for e in result.delete_errors]
        if result.error is not None:
            failures.append((result.error, "write"))
        return Ended(
            job,
            written=result.outcome == "filled",
            corrupt=result.outcome == "corrupt",
            failures=failures,
            reason=result.reason,
        )

    @property
    def completed(self) -> int:
        return 0 if self._fills is None else self._fills.completed

    @property
    def is_idle(self) -> bool:
        return self._fills is None or not self._fills.pending

    async def wait(self, io: IO, completed: int, timeout: float) -> bool:  # noqa: ASYNC109
        fills = self._fills
        if fills is None:
            return False
        until = time.monotonic() + timeout
        while fills.completed <= completed and (left := until - time.monotonic()) > 0:
            try:
                moved = self._wait_for_more(fills, completed, left)
            except RuntimeError:
                # At the end of the process no thread can be started any more.
                await io.pause(_POLL)
            else:
                await io.until(moved, left)
        return fills.completed > completed

    def _wait_for_more(
        self, fills: DirectoryFills, completed: int, seconds: float
    ) -> Outcome[bool]:
        """One thread waits for all who wait."""
        with self._lock:
            if self._moved is None or self._moved.is_set:
                self._moved = run_in_background(lambda: fills.wait(completed, seconds))
            return self._moved

    def can_wait_here(self) -> bool:
        return True

    def abandon(self) -> None:
        """Drop, in a forked child, the jobs of the parent."""
        self._lock = threading.RLock()
        fills, self._fills, self._moved = self._fills, None, None
        self._unlisted = None
        self._jobs.clear()
        if fills is not None:
            fills.abandon()


def _met_foreign(result: FillResult) -> bool:
    """Whether a fill has met a file that is not zcache's."""
    errors = [*result.delete_errors, result.error]
    return any(isinstance(e, OSError) and e.errno == errno.EEXIST for e in errors)
