"""Fills of a store that has only its own methods: by a few supervised tasks, or by one thread."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from zcache._backends.access import Access
from zcache._backends.base import WRITE_TIMEOUT, Ended, names_of
from zcache._backends.store.unknown_writes import UnknownWrites
from zcache._core import Granted, Index, NeedsEviction, Rejected, cache_key, crc32c
from zcache._index.handle import ignore
from zcache._runtime.coroutines import NoAnswerError, OutcomeUnknown, run_without_loop
from zcache._runtime.io import IO, SyncIO, keeps_sync
from zcache._runtime.latch import Latch
from zcache._runtime.thread_calls import run_in_background
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from zcache._backends.base import FillJob
    from zcache._backends.store.backend import StoreBackend
    from zcache._core import Committed, Reservation
    from zcache._runtime.circuit_breaker import Operation

    Failures = list[tuple[Exception, Operation]]

TASKS: Final = 8
"""Values that are written at once from one event loop."""
RETRIES: Final = 4
"""Failed deletes that one fill tries again."""
_parents: list[object] = []


class StoreFiller:
    """Carries out jobs where their readers are: by tasks of an event loop, or by one thread.

    Jobs of one name are carried out one after the other, as they came: the index refuses a value of which
    another one is being written. A job that outlives its event loop is carried out by the next loop or thread
    that submits, drains or ends; only what was cut off in the middle of a write is dropped.
    """

    access: Final = Access.FILLS

    def __init__(self) -> None:
        self._waiting: deque[FillJob] = deque()
        self._ended: deque[Ended] = deque()
        self.completed = 0
        # How many tasks of each event loop, or whether a thread, is at work.
        self._running: dict[asyncio.AbstractEventLoop | None, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Fills that were begun and have not ended, with the event loops that they need.
        self._active: dict[FillJob, tuple[asyncio.AbstractEventLoop | None, _Fill]] = {}
        self._moved = Latch()
        # Reentrant: inside it the garbage collector may end a task.
        self._lock = threading.RLock()
        # Writes that were cut off, and may still land.
        self._unknown = UnknownWrites()

    def after_fork(self) -> None:
        """Drop, in a forked child, the jobs of the parent, and let its tasks be."""
        _parents.append((self._tasks, self._moved, self._active))
        self._lock = threading.RLock()
        self._waiting, self._ended = deque(), deque()
        self._running, self._tasks, self._active = {}, set(), {}
        self._moved = Latch()
        self.completed = 0
        self._unknown = UnknownWrites()

    def release_unknown(self) -> None:
        """Leave to later deletes what was cut off in the middle of a write, if ever so lately."""
        self._unknown.release(math.inf)

    # --------------------------------------------------------------- queue

    def submit(self, io: IO, job: FillJob) -> None:
        with self._lock:
            self._waiting.append(job)
        self._start(io)

    def collect(self) -> Sequence[Ended]:
        self._drop_closed()
        if not self._ended:
            return ()
        # Two readers may look at once.
        with self._lock:
            found, self._ended = self._ended, deque()
        return found

    @property
    def is_idle(self) -> bool:
        # Not while a job goes from one to the next.
        with self._lock:
            return not (self._waiting or self._active or self._ended)

    async def wait(self, io: IO, completed: int, timeout: float) -> bool:  # noqa: ASYNC109
        self._drop_closed()
        moved = self._moved
        if self.completed > completed:
            return True
        self._start(io)
        await io.until(moved, timeout)
        return self.completed > completed

    def can_wait_here(self) -> bool:
        here = asyncio._get_running_loop()
        return here is None or not self._running.get(here)

    def _start(self, io: IO) -> None:
        """Have a task or a thread at work, if there is work."""
        if not self._waiting:
            return
        loop = io.loop()
        more = 0
        # An interrupt may come between any two of these steps: rather one worker too many than none.
        try:
            with self._lock:
                # Tasks of a loop that has stopped may never go on.
                at_work = sum(
                    count
                    for other, count in self._running.items()
                    if other is None or other.is_running()
                )
                wanted = 1 if loop is None else min(TASKS, len(self._waiting) + at_work)
                more = max(0, wanted - at_work)
                if more:
                    self._running[loop] = self._running.get(loop, 0) + more
            while more:
                if loop is None:
                    run_in_background(partial(self._run_in_thread, io))
                else:
                    task = loop.create_task(self._run(io, loop))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                more -= 1
        except BaseException:
            self._stop(loop, more)
            raise

    def _run_in_thread(self, io: IO) -> None:
        with self._lock:
            store = self._waiting[0].backend.store if self._waiting else None
        if store is not None and keeps_sync(store):
            run_without_loop(self._run(SyncIO(io.source, io.threads), None))
        else:
            asyncio.run(self._run(IO(io.source, io.threads), None))

    def _stop(self, loop: asyncio.AbstractEventLoop | None, count: int = 1) -> None:
        with self._lock:
            left = self._running.get(loop, 0) - count
            if left > 0:
                self._running[loop] = left
            else:
                self._running.pop(loop, None)

    async def _run(self, io: IO, loop: asyncio.AbstractEventLoop | None) -> None:
        is_over = False
        try:
            while True:
                with self._lock:
                    begun = self._begin(io)
                    if begun is None:
                        # Under the same lock: the next job finds that another task has to be started.
                        self._stop(loop)
                        is_over = True
                        break
                await self._carry_out(*begun)
        finally:
            if not is_over:
                self._stop(loop)

    def _begin(self, io: IO) -> tuple[FillJob, _Fill] | None:
        """Begin with the first job that waits for no other one, if there is one. To be called under the lock."""
        names = {(job.key, job.byte_range) for job in self._active}
        for job in self._waiting:
            if (job.key, job.byte_range) not in names:
                fill = _Fill(io, job, self._unknown, partial(self._cut_off, job))
                self._waiting.remove(job)
                self._active[job] = (asyncio._get_running_loop(), fill)
                return job, fill
        return None

    async def _carry_out(self, job: FillJob, fill: _Fill) -> None:
        try:
            self._unknown.release(job.backend.breaker.clock() - WRITE_TIMEOUT)
            ended = await fill.run()
        except Exception as error:  # noqa: BLE001 - the value stays uncached
            ended = Ended(job, failures=[(error, "write")])
        except BaseException:
            # Together with its event loop. What goes on without it reports its end.
            if not fill.is_detached:
                self._end(Ended(job))
            raise
        self._end(ended)

    def _cut_off(self, job: FillJob, *, again: bool) -> None:
        """Note that a fill has ended with its event loop; `again` says that nothing is left of it."""
        with self._lock:
            if again and self._active.pop(job, None) is not None:
                self._waiting.appendleft(job)
                return
        self._end(Ended(job))

    def _drop_closed(self) -> None:
        """Note the fills that never go on, because their event loop is closed."""
        loops = [*self._running, *(loop for loop, _ in list(self._active.values()))]
        if not any(loop is not None and loop.is_closed() for loop in loops):
            return
        with self._lock:
            for loop in [loop for loop in self._running if loop is not None and loop.is_closed()]:
                del self._running[loop]
            stuck = [
                (job, fill)
                for job, (loop, fill) in self._active.items()
                if loop is not None and loop.is_closed()
            ]
        for job, fill in stuck:
            fill.cut_off()
            self._end(Ended(job))

    def _end(self, ended: Ended) -> None:
        """Note the end of a fill that was begun, once."""
        with self._lock:
            if self._active.pop(ended.job, None) is None:
                return
            self._ended.append(ended)
            self.completed += 1
            moved, self._moved = self._moved, Latch()
        moved.set()


class _Fill:
    """One fill: reserve, delete the victims, write, commit.

    Attributes
    ----------
    is_detached : bool
        Whether something of it goes on without its task, which reports its end and closes the flight.
    """

    def __init__(
        self,
        io: IO,
        job: FillJob,
        unknown: UnknownWrites,
        on_cut_off: Callable[..., None],
    ) -> None:
        self._io = io
        self._job = job
        backend = self._backend = cast("StoreBackend", job.backend)
        self._handle = backend.shared.handle
        self._unknown = unknown
        self._name = job.key if job.byte_range is None else cache_key(job.key, job.byte_range)
        self._failures: Failures = []
        self._reservation: Reservation | None = None
        self._checksum = 0
        self._reason: str | None = None
        self.is_detached = False
        self._on_cut_off = on_cut_off
        # Whether it has lost its task, which would have ended the job.
        self._lost_task = False

    async def run(self) -> Ended:
        written = False
        try:
            written = await self._run()
        except IndexLockTimeout:
            pass  # What was begun ends when the index answers again.
        finally:
            if not written and not self.is_detached:
                self._close_flight()
        return Ended(self._job, written=written, failures=self._failures, reason=self._reason)

    def _close_flight(self) -> None:
        job = self._job
        self._handle.call_later(ignore, Index.complete_flight, job.key, job.ticket)

    def _ended_late(self, *, again: bool = False) -> None:
        """Close the flight of a detached fill, unless another task can begin it `again`."""
        # What ends together with its task reports that before the task hears of it.
        lost_task = self._lost_task or not self.is_detached
        again = again and lost_task
        if not again:
            self._close_flight()
        if lost_task:
            self._on_cut_off(again=again)

    def cut_off(self) -> None:
        """End what never goes on: what it has begun in the cache store may still take effect."""
        if self._reservation is not None:
            self._unknown.add(self._backend, self._reservation)
        self._close_flight()

    def _step(self, late: Any, step: Any, *args: Any) -> Coroutine[Any, Any, Any]:
        return self._handle.call_shielded(self._io, late, step, *args)

    async def _run(self) -> bool:
        job, size = self._job, len(self._job.data)
        now = self._backend.shared.clock
        # Before anything is reserved that a cancellation would have to give back.
        self._checksum = await self._io.aside(size, partial(crc32c, job.data))
        answer = await self._handle.call(
            self._io, Index.reserve, *(job.key, job.byte_range, size, job.ticket, now())
        )
        while not isinstance(answer, Rejected):
            reservation = self._reservation = answer.reservation
            if isinstance(answer, Granted):
                return await self._write(reservation)
            assert isinstance(answer, NeedsEviction)
            dropped, failed = await self._evict(reservation, answer.victims)
            answer = await self._step(
                self._give_back, Index.advance, reservation, dropped, failed, now()
            )
        self._reason = answer.reason
        await self._retry_deletes()
        return False

    def _give_back(self, answer: Granted | NeedsEviction | Rejected) -> None:
        if not isinstance(answer, Rejected):
            if isinstance(answer, NeedsEviction):
                self._backend.remove_later(answer.victims)
            self._handle.call_later(self._backend.remove_later, Index.release, answer.reservation)

    async def _evict(
        self, reservation: Reservation, victims: list[tuple[int, str]]
    ) -> tuple[list[int], list[int]]:
        backend = self._backend
        cells = [cell for cell, _ in victims]
        if not backend.breaker.allows("delete"):
            return [], cells

        def late(outcome: Any) -> None:
            if isinstance(outcome, BaseException):
                backend.remove_later(victims)
            else:
                dropped, failed = backend.sort(victims, outcome)
                self._handle.call_later(ignore, Index.confirm_deletes, dropped, failed)
            self._handle.call_later(backend.remove_later, Index.release, reservation)
            self._ended_late(again=True)

        try:
            outcome = await backend.delete(self._io, victims, late)
        except NoAnswerError:
            self.is_detached = True
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the user did not ask for it
            outcome = [error] * len(victims)
        except BaseException:
            self.is_detached = self._lost_task = True
            raise
        dropped, failed = backend.sort(victims, outcome)
        if failed:
            try:
                await backend.add_tombstones(self._io, names_of(victims, failed))
            except BaseException:
                self._handle.call_later(ignore, Index.confirm_deletes, dropped, failed)
                self._handle.call_later(backend.remove_later, Index.release, reservation)
                raise
        return dropped, failed

    async def _write(self, reservation: Reservation) -> bool:
        job, backend, now = self._job, self._backend, self._backend.shared.clock
        try:
            await backend.write(
                self._io, self._name, job.data, partial(self._written_late, reservation)
            )
        except NoAnswerError:
            self.is_detached = True
            raise
        except Exception as error:  # noqa: BLE001 - the value then stays uncached
            self._failures.append((error, "write"))
            victims = await self._step(backend.remove_later, Index.release, reservation)
            await backend.remove(self._io, victims)
            await self._retry_deletes()
            return False
        except BaseException:
            self.is_detached = self._lost_task = True
            raise
        committed: Committed | None = await self._step(
            self._committed_late, Index.commit, reservation, self._checksum, now(), job.fetched
        )
        self._reservation = None
        if committed is None:
            # The index was emptied meanwhile, and knows nothing of these bytes.
            await self._delete_uncounted()
            return False
        if committed.victims:
            await backend.remove(self._io, committed.victims)
        elif committed.has_failed_deletes:
            await self._retry_deletes()
        return True

    def _written_late(self, reservation: Reservation, outcome: BaseException | None) -> None:
        """End a fill that nothing waits for any more: the value is kept like any other."""
        handle, backend, job = self._handle, self._backend, self._job
        now = backend.shared.clock
        if isinstance(outcome, OutcomeUnknown):
            self._unknown.add(backend, reservation)
            self._ended_late()
        elif isinstance(outcome, BaseException):
            is_failure = isinstance(outcome, Exception)
            if is_failure:
                backend.breaker.failed(outcome, "write")
            handle.call_later(backend.remove_later, Index.release, reservation)
            # It was cancelled before it had begun.
            self._ended_late(again=not is_failure)
        else:
            handle.call_later(
                self._committed_late,
                Index.commit,
                reservation,
                self._checksum,
                now(),
                job.fetched,
            )
            if self._lost_task or not self.is_detached:
                self._on_cut_off(again=False)

    def _committed_late(self, committed: Committed | None) -> None:
        if committed is not None:
            self._backend.remove_later(committed.victims)

    async def _delete_uncounted(self) -> None:
        backend = self._backend
        try:
            outcome = await backend.delete(self._io, [(0, self._name)], ignore)
        except Exception as error:  # noqa: BLE001 - whatever it is, the user did not ask for it
            outcome = [error]
        self._failures += [(error, "delete") for error in outcome if error is not None]

    async def _retry_deletes(self) -> None:
        victims = await self._step(self._backend.remove_later, Index.failed_deletes, RETRIES)
        if victims:
            await self._backend.remove(self._io, victims)
