"""The queue of pending fills: values that their readers have, and the cache store does not have yet.

A fill belongs to the cache, not to the reader: once its bytes are in memory the reader returns. The
value stays in its flight, which serves all other readers that ask for it, until it is in the cache store.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from zcache._backends.access import Access
from zcache._core import PATH_CONFLICT, Index, end_calls
from zcache._index.handle import ignore
from zcache._runtime.circuit_breaker import concerns_key
from zcache._runtime.exiting import at_exit
from zcache._runtime.fork import at_fork

if TYPE_CHECKING:
    from zcache._backends.base import Ended, Filler, FillJob
    from zcache._index.shared import SharedIndex
    from zcache._runtime.circuit_breaker import CircuitBreaker
    from zcache._runtime.io import IO

logger = logging.getLogger("zcache")

MAX_PENDING_SIZE: Final = 64 * 2**20
"""What a store asks for without the option `max_pending_size`: bytes of pending fills for its place, or pool."""
STALL_TIMEOUT: Final = 1.0
"""Seconds without progress after which a reader that found the queue full goes without caching."""
DRAIN_TIMEOUT: Final = 60.0
"""Seconds that `drain` waits at most by default."""
HAND_OVER: Final = 0.005
"""Seconds between two looks at a value that is being handed over."""
CLOSE_TIMEOUT: Final = 5.0
"""Seconds that `close`, the end of a `with` block and the end of the process wait at most."""
KEY_PAUSE: Final = 1.0
"""Seconds for which a value is not tried again that the cache store cannot hold, ..."""
LONGEST_KEY_PAUSE: Final = 60.0
"""... twice as long after each further failure, up to this."""
REMEMBERED_KEYS: Final = 4096
"""Values of which that is remembered; the oldest is forgotten first."""


class _RefusedKeys:
    """Values that the cache store cannot hold: each try would evict others for nothing."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, object], tuple[float, float]] = {}

    def until(self, value: tuple[str, object]) -> float | None:
        """When a value is tried again; None for now."""
        found = self._until.get(value) if self._until else None
        return None if found is None else found[0]

    def add(self, value: tuple[str, object], now: float) -> None:
        _, pause = self._until.pop(value, (0.0, KEY_PAUSE / 2))
        pause = min(2 * pause, LONGEST_KEY_PAUSE)
        self._until[value] = (now + pause, pause)
        if len(self._until) > REMEMBERED_KEYS:
            self._until.pop(next(iter(self._until)), None)

    def discard(self, value: tuple[str, object]) -> None:
        if self._until:
            self._until.pop(value, None)


class FillQueue:
    """Pending fills of one filler, bounded by their bytes; in a pool, those of all its sources.

    Parameters
    ----------
    breaker : CircuitBreaker
        Hears how the fills end.
    filler : Filler
        Carries them out.

    Attributes
    ----------
    max_pending_size : int
        Bytes. One value is always taken, however large it is.
    pending_size : int
        Bytes of values that are not in the cache store yet.
    """

    def __init__(self, breaker: CircuitBreaker, filler: Filler) -> None:
        self.breaker = breaker
        self.filler = filler
        self.set_bound(None)
        self.pending_size = 0
        self._pending: dict[int, FillJob] = {}
        self._refused = _RefusedKeys()
        self._submitted = 0
        # The queue was full and nothing moved: no other reader waits until something does.
        self._stalled = False
        self._has_met_conflict = False
        # Guards the counts. Reentrant: inside it the garbage collector may end a reader.
        self._lock = threading.RLock()

    def set_bound(self, max_pending_size: int | None) -> None:
        """Take no more than so many bytes from now on; None for `MAX_PENDING_SIZE`."""
        self.max_pending_size = MAX_PENDING_SIZE if max_pending_size is None else max_pending_size

    def offer(self, io: IO, job: FillJob) -> bool:
        """Take a value if there is room for it, without waiting.

        Raises
        ------
        RuntimeError, OSError
            If the job cannot be begun, because there is no thread left, say.
        """
        self.collect()
        size = len(job.data)
        # An interrupt may come between any two of these steps.
        try:
            with self._lock:
                if self._is_full(size):
                    return False
                self._submitted += 1
                job.number = self._submitted
                job.handed_over_by = threading.get_ident()
                self.pending_size += size
                self._pending[job.number] = job
                _busy.add(self)
            self.filler.submit(io, job)
        except BaseException as error:
            # What an interrupt has met may be under way.
            if isinstance(error, Exception) or self.filler.is_idle:
                self._forget(job)
            raise
        finally:
            job.handed_over_by = None
        return True

    def _is_full(self, size: int) -> bool:
        return bool(self._pending) and self.pending_size + size > self.max_pending_size

    async def put(self, io: IO, job: FillJob) -> bool:
        """Take a value; while the queue is full, wait as long as the cache store makes progress.

        Returns
        -------
        bool
            False where it goes without caching: the cache store is left alone, has made no progress for
            `STALL_TIMEOUT`, or cannot begin.
        """
        is_taken = await self._put(io, job)
        if not is_taken:
            # What the cache store takes tells the sample its size when it gets room.
            handle, value = job.backend.shared.handle, (job.key, job.byte_range, len(job.data))
            handle.call_later(ignore, Index.note_sizes, [value])
        return is_taken

    async def _put(self, io: IO, job: FillJob) -> bool:
        allows, handle = self.breaker.allows, job.backend.shared.handle
        # Without deletes no room can be made: to try would cost entries that are still good.
        if not (handle.usable and allows("write") and allows("delete")):
            if allows("read"):
                # Where reads are left alone as well, this one was counted before.
                job.backend.counters.count("skipped")
            return False
        if (access := self.filler.access) is not Access.FILLS:
            if access is Access.REMOVES:
                handle.count_refusal()
            return False
        until = self._refused.until((job.name, job.byte_range))
        if until is not None and self.breaker.clock() < until:
            return False
        try:
            while True:
                completed = self.filler.completed
                if self.offer(io, job):
                    return True
                if self._stalled or not allows("write"):
                    job.backend.counters.count("skipped")
                    return False
                if not await self.filler.wait(io, completed, STALL_TIMEOUT):
                    self._stalled = True
                    self.breaker.failed(
                        TimeoutError(f"it has taken nothing for {STALL_TIMEOUT} s"), "write"
                    )
                    return False
        except (RuntimeError, OSError, ValueError) as error:
            if concerns_key(error):
                now = self.breaker.clock()
                with self._lock:
                    self._refused.add((job.name, job.byte_range), now)
            self.breaker.failed(error, "write")
            return False

    def pending(self) -> list[FillJob]:
        """The values that are not in the cache store yet."""
        with self._lock:
            return list(self._pending.values())

    def collect(self) -> None:
        """Take note of what has ended: while nothing is under way, all that was handed over.

        An interrupt may have taken the note of a job, and how it ended.
        """
        # First, so that how those ended is among what is collected.
        over = self._over()
        ended = self.filler.collect()
        if not ended and not over:
            return
        # A user's own clock may do anything: what one note raises costs no other one. The last one is called first.
        with contextlib.ExitStack() as notes:
            for job in over:
                notes.callback(self._forget, job)
            for one in reversed(ended):
                notes.callback(self._note, one)

    def _over(self) -> list[FillJob]:
        """The jobs that were handed over, while none is under way."""
        if not self._pending or not self._is_idle():
            return []
        handed_over = [job for job in self.pending() if job.handed_over_by is None]
        # One of them may have begun since the first look.
        return handed_over if self._is_idle() else []

    def _is_idle(self) -> bool:
        return self.filler.is_idle

    def _note(self, ended: Ended) -> None:
        self._forget(ended.job)
        value = (ended.job.name, ended.job.byte_range)
        is_refused = any(what == "write" and concerns_key(e) for e, what in ended.failures)
        if ended.corrupt:
            ended.job.backend.shared.handle.mark_corrupt()
        with self._lock:
            self._stalled = False
            if ended.written:
                self._refused.discard(value)
        if is_refused:
            now = self.breaker.clock()
            with self._lock:
                self._refused.add(value, now)
        for error, operation in ended.failures:
            self.breaker.failed(error, operation)
        if ended.written:
            self.breaker.succeeded("write")
        if ended.reason == PATH_CONFLICT and not self._has_met_conflict:
            self._has_met_conflict = True
            logger.warning(
                "the cache store %s holds values above or below the key %r, and cannot hold both: a file system has no "
                "file where it has a folder. This value, and others like it, stay uncached until those are older than "
                "any max_age_seconds, or evicted. If the source has them no more, call invalidate() with their prefix.",
                ended.job.backend.shared.handle.name,
                ended.job.key,
            )

    def _forget(self, job: FillJob) -> None:
        with self._lock:
            if self._pending.pop(job.number, None) is not None:
                self.pending_size -= len(job.data)
            if not self._pending:
                _busy.discard(self)

    async def drain(
        self,
        io: IO,
        timeout: float,  # noqa: ASYNC109
        of: SharedIndex | None = None,
    ) -> bool:
        """Wait until all values that were taken before have reached the cache store or were refused.

        Parameters
        ----------
        io : IO
            Of who waits.
        timeout : float
            Seconds.
        of : SharedIndex, optional
            Wait for those of this source only. Default is for all.

        Returns
        -------
        bool
            False if that took longer than `timeout` seconds.
        """
        until = time.monotonic() + timeout
        own = (job for job in self.pending() if of is None or job.backend.shared is of)
        # The handler of a signal may have interrupted the hand-over of one, which goes on only after this.
        here = threading.get_ident()
        awaited = deque(job.number for job in own if job.handed_over_by != here)
        while True:
            completed = self.filler.completed
            self.collect()
            # Jobs may end in another order.
            while awaited and awaited[0] not in self._pending:
                awaited.popleft()
            if not awaited:
                return True
            left = until - time.monotonic()
            if left <= 0:
                return False
            if self.filler.is_idle:
                # What is being handed over may be refused, and then nothing ends.
                await io.pause(min(HAND_OVER, left))
            else:
                await self.filler.wait(io, completed, left)

    def can_wait_here(self) -> bool:
        """Whether fills go on while this thread blocks."""
        return self.filler.can_wait_here()

    def after_fork(self) -> None:
        """Start over in a forked child: the pending fills are the parent's."""
        self._lock = threading.RLock()
        self._pending.clear()
        self.pending_size = 0
        self._stalled = False


# Queues with pending fills, which live until those have ended.
_busy: set[FillQueue] = set()
# When the end of the process has begun to wait.
_ends_at: float | None = None


def _drain_at_exit(_: bool) -> None:
    """Give pending fills a last chance at the end of the process, `CLOSE_TIMEOUT` seconds in all."""
    global _ends_at
    from zcache._runtime.io import IO  # noqa: PLC0415 - only here, at the end

    queues = list(_busy)
    if _ends_at is None:
        _ends_at = time.monotonic() + CLOSE_TIMEOUT
    left = _ends_at - time.monotonic()
    if not queues or left <= 0:
        return

    async def all_of_them() -> None:
        drains = [queue.drain(IO(None), left) for queue in queues]
        await asyncio.wait([asyncio.ensure_future(drain) for drain in drains], timeout=left)

    try:
        asyncio.run(all_of_them())
    except Exception as error:  # noqa: BLE001 - at the end of a process nothing more can be done
        logger.debug("pending fills were not finished: %r", error)


# Last of all, for what is registered first is called last.
atexit.register(end_calls, CLOSE_TIMEOUT)
at_exit(_drain_at_exit)


def _after_fork() -> None:
    _busy.clear()


at_fork(_after_fork)
