"""How the steps of an index are called.

A step is named (`handle.call(io, Index.reserve, ...)`), and the handle supplies the index of now:
recovery, a fork or the loss of the directory may have replaced it since the caller began.

No caller waits longer than `LOCK_TIMEOUT` for a lock that is kept, counted from the first who found it
taken. Until it is free all others are told so at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from zcache._core import CorruptIndexError, Index, Plan, Stats
from zcache._index.opening import Opening
from zcache._index.resolution import RECOVERIES, RETRYABLE, Resolution
from zcache._index.shared_wait import LOCK_TIMEOUT, RETRY, timed_out, wait_for
from zcache._runtime.coroutines import report, run_without_loop
from zcache._runtime.io import IO, SyncIO
from zcache._runtime.registry import Registry
from zcache._runtime.thread_calls import run_in_background
from zcache._runtime.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zcache._index.calls import Handle, Watcher
    from zcache._runtime.latch import Latch

logger = logging.getLogger("zcache")
T = TypeVar("T")

_QUIET: Final = 60.0
"""Seconds in which it is said once that an index cannot be used."""
_RIGHTS: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_BLOCKING: Final = SyncIO(None)


def ignore(*_: object) -> None:
    """Do nothing about an outcome, or an event."""


def take(step: Callable[..., T], index: Index, *args: Any) -> T:
    return step(index, *args)


class IndexHandle:
    """The index of one place, and the calls of its steps.

    Parameters
    ----------
    index : Index
        The index.
    name : str
        Of the cache store, for the log.
    limits : dict
        What an index is made with; see `Index`.

    Attributes
    ----------
    ages : list of tuple, or None
        Of a pool, the sources that are open in this process; see `Index.set_limits`.
    usable : bool
        False where the cache store cannot be used: then nothing is cached.
    why : str
        What made it so the last time, as the log has it.
    lacks_rights : bool
        Whether that was for want of permission.
    lost : Index or None
        The index that was abandoned, if it may be used again.
    recover : callable or None
        Replaces or repairs an index that is damaged; runs in a thread. Default is None: `abandon`.
    take : callable
        Takes a step: `zcache.testing` puts its recorder here.
    tells_steps : bool
        Whether that wants to hear of each look-up too, so that nothing else may take one in the place of the index.
    deferred : deque of callable
        Steps without a waiter, where no thread could be started to take them later.
    plan : Plan or None
        What the index was told last.
    follows_plan : bool
        Whether the index was told what will be read, and it was not seen yet that this is over.
    opening : Opening or None
        That of an index which is not open yet: its lock was taken, or this is a forked child.
    unopened : Index or None
        An empty one, which stood or stands in the place of the index until that is open.
    users : Registry
        Those in this process that use the policy in force: as long as there is any, no other process chooses another.
    lock : RLock
        Held while the index is replaced, or it is noted who waits; never over a step.
    limits_lock : RLock
        Held while limits are replaced, and over nothing else: finalizers take it, whatever their thread holds.
    """

    take = staticmethod(take)
    tells_steps = False

    def __init__(self, index: Index, name: str, limits: dict[str, Any]) -> None:
        self._index = index
        self.name = name
        self.limits = limits
        self.limits_lock = threading.RLock()
        self.ages: list[tuple[str, float | None]] | None = None
        self.usable = True
        self.why = ""
        self.lacks_rights = False
        self.lost: Index | None = None
        self._said = -math.inf
        # None stands for `abandon`: a method of its own would keep it alive, and with it the index.
        self.recover: Callable[[Exception], None] | None = None
        self.opening: Opening | None = None
        self.unopened: Index | None = None
        # Reentrant: while it is held the garbage collector may end an operation.
        self.lock = threading.RLock()
        # One resolves and one opens, which may wait for the other: none that serves anything else.
        self._threads = Threads(2)
        self._resolution = Resolution(self.lock, self._threads)
        self.deferred: deque[Callable[[], None]] = deque()
        # Event loops that are to take them.
        self._retrying: Registry[asyncio.AbstractEventLoop] = Registry()
        self.follows_plan = False
        self.plan: Plan | None = None
        self._watchers: Registry[Watcher] = Registry()
        self.users: Registry[Any] = Registry()
        self._counted_before = Stats()

    # ----------------------------------------------------- the index of now

    @property
    def index(self) -> Index:
        """The index of now."""
        return self._index

    @index.setter
    def index(self, index: Index) -> None:
        with self.lock:
            if index is not self._index:
                # What was counted goes on: a rebuild or a fork is no new beginning for the stores over it.
                self._counted_before = self.stats()
                self.plan = None
                self.show(index)

    def show(self, index: Index) -> None:
        """Put an index, or what stands before it, where callers find it."""
        with self.lock:
            self._index = index
            for watcher in self._watchers.snapshot():
                watcher.use_index(index)

    @property
    def is_open(self) -> bool:
        """Whether the index is open, or never will be."""
        return self.opening is None

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` the index of now, and each one that takes its place."""
        with self.lock:
            self._watchers.add(watcher)
            watcher.use_index(self._index)

    def stats(self) -> Stats:
        """See `Index.stats`; counted on where another index has taken the place of one. Needs no lock."""
        return self._counted_before + self._index.stats()

    def count_refusal(self) -> None:
        """Count a value that the index was not asked to take."""
        with self.lock:
            self._counted_before += Stats(refusals=1)

    def note_policy(self, policy: dict[str, str]) -> None:
        """Have an index that is made or opened later go by this policy."""
        self.change_limits(policy)

    def change_limits(self, limits: Mapping[str, Any]) -> None:
        """Have these be in `limits`, in place of those that are there."""
        with self.limits_lock:
            self.limits = {**self.limits, **limits}

    def apply_limits(self, *, waits: bool = True) -> None:  # noqa: ARG002 - it never does
        """Have the index of now keep to `limits` and `ages`."""
        self.call_later(ignore, self._set_limits)

    def _set_limits(self, index: Index) -> None:
        limits, ages, is_used = None, None, False
        # Another thread may have changed them meanwhile, and have been faster.
        while limits is not self.limits or ages is not self.ages or is_used is not bool(self.users):
            limits, ages, is_used = self.limits, self.ages, bool(self.users)
            index.set_limits(limits["max_size"], limits["max_age"], limits["verify"], is_used, ages)

    # -------------------------------------------------------------- steps

    async def call(
        self,
        io: IO,
        step: Callable[..., T],
        *args: Any,
        timeout: float = LOCK_TIMEOUT,  # noqa: ASYNC109 - for reads of others as well
        alone: bool = False,
    ) -> T:
        """Take a step of the index; where another process holds its lock, wait out of the way.

        Parameters
        ----------
        io : IO
            How to wait.
        step : callable
            A method of `Index`; it gets the index of now and `args`.
        timeout : float, optional
            Seconds that all who wait now wait at most, counted from the first of them.
        alone : bool, optional
            Count from now instead: a write that cannot wait for a source in the place of the index.

        Raises
        ------
        IndexLockTimeout
            After `timeout`; the step was not taken.
        """
        if (opening := self.opening) is not None:
            await opening.wait(io, timeout, alone=alone)
        if self.deferred:
            self.take_deferred()
        try:
            return self.take(step, self.index, *args)
        except RETRYABLE:
            pass
        return await self._take(io, timeout, alone, step, args)

    async def _take(
        self,
        io: IO,
        timeout: float,  # noqa: ASYNC109
        alone: bool,
        step: Callable[..., T],
        args: Any,
    ) -> T:
        damages, until = 0, math.inf
        while True:
            try:
                return self.take(step, self.index, *args)
            except RETRYABLE as error:
                damages += isinstance(error, CorruptIndexError)
                done = self._resolve(error, damages)
                until = min(until, time.monotonic() + timeout)
                left = until - time.monotonic()
                if not alone:
                    left = min(left, self._resolution.left(timeout))
                if left <= 0 or not await wait_for(io, done, left):
                    raise timed_out(self.name, timeout) from None

    async def call_shielded(
        self,
        io: IO,
        on_detached_result: Callable[[T], object],
        step: Callable[..., T],
        *args: Any,
        timeout: float = LOCK_TIMEOUT,  # noqa: ASYNC109
    ) -> T:
        """Take a step that has to be taken, even if the caller is cancelled while it waits.

        In that case, and after `timeout`, it is taken later, and `on_detached_result` gets its answer.
        """
        try:
            return self.take(step, self.index, *args)
        except RETRYABLE:
            pass
        try:
            return await self.call(io, step, *args, timeout=timeout)
        except BaseException:
            self.call_later(on_detached_result, step, *args)
            raise

    def call_later(self, then: Callable[[T], object], step: Callable[..., T], *args: Any) -> None:
        """Take a step now if that needs no waiting, else in the background; `then` gets its answer."""
        if self.deferred:
            self.take_deferred()
        self._call_later(partial(report, then), step, args, 0)

    def call_if_free(self, step: Callable[..., object], *args: Any) -> None:
        """Take a step if that needs no waiting: one that may be left out, of which there may be many meanwhile."""
        with contextlib.suppress(*RETRYABLE):
            self.take(step, self.index, *args)

    def _call_later(
        self, then: Callable[[T], object], step: Callable[..., T], args: Any, damages: int
    ) -> None:
        try:
            result = self.take(step, self.index, *args)
        except RETRYABLE as error:
            damages += isinstance(error, CorruptIndexError)
            again = partial(self._call_later, then, step, args, damages)
            done = self._resolve(error, damages)
            if done is None:
                self._defer(again)
                return

            # Not before the index answers: a thread that waited for it would be one less for others.
            def go_on() -> None:
                try:
                    run_in_background(again)
                except RuntimeError:
                    self._defer(again)

            done.call_when_set(go_on)
        else:
            then(result)

    def _defer(self, again: Callable[[], None]) -> None:
        """Have a step taken by the next caller, for there is no thread to wait."""
        self.deferred.append(again)
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            # One look for all of them: each that defers others would double their number.
            if loop not in self._retrying:
                self._retrying.add(loop)
                loop.call_later(RETRY, self._retry, loop)

    def _retry(self, loop: asyncio.AbstractEventLoop) -> None:
        self._retrying.discard(loop)
        self.take_deferred()

    def take_deferred(self) -> None:
        """Take steps without a waiter, for which no thread could be started."""
        # As many as there are now: those that still cannot be taken come back.
        for _ in range(len(self.deferred)):
            try:
                again = self.deferred.popleft()
            except IndexError:  # Another thread was faster.
                return
            again()

    def call_blocking(
        self, step: Callable[..., T], *args: Any, timeout: float | None = LOCK_TIMEOUT
    ) -> T:
        """Take a step of the index from a thread that may block.

        Raises
        ------
        IndexLockTimeout
            After `timeout` seconds.
        """
        if (opening := self.opening) is not None:
            run_without_loop(opening.wait(_BLOCKING, _or_inf(timeout), alone=False))
        return self.call_opened(step, *args, timeout=timeout)

    def call_opened(
        self, step: Callable[..., T], *args: Any, timeout: float | None = LOCK_TIMEOUT
    ) -> T:
        """The same while the index is being opened, for those who open it."""
        return run_without_loop(self._take(_BLOCKING, _or_inf(timeout), False, step, args))

    # ----------------------------------------------------------- recovery

    def _resolve(self, error: Exception, damages: int = 0) -> Latch | None:
        return self._resolution.begin(self, error, last=damages >= RECOVERIES)

    def resolve(self, error: CorruptIndexError) -> None:
        """Have a damaged index recovered in the background."""
        self._resolve(error)

    def mark_corrupt(self) -> None:
        """Have the index rebuilt: what it says is not what the cache store holds."""
        if self.index.shared:
            self.call_later(ignore, self._mark_corrupt)

    def _mark_corrupt(self, index: Index) -> None:
        try:
            index.mark_corrupt()
        except CorruptIndexError as verdict:
            # Not for the caller of the step, which would mark the new index too, and so on.
            self._resolve(verdict)

    def abandon(self, failure: BaseException) -> None:
        """Do without the cache store, until it is `restore`d."""
        now = time.monotonic()
        with self.lock:
            is_known = not self.usable or now - self._said < _QUIET
            self.usable = False
            # As text: what keeps an exception keeps its frames, as some handlers of the log do.
            self.why = why = repr(failure)
            self.lacks_rights = getattr(failure, "errno", None) in _RIGHTS
            if self.index.shared:
                self.lost = self.index
            was_in_use = self.lost is not None
            self.index = self.empty_index()
            if not is_known:
                self._said = now
        if is_known:
            return
        if not was_in_use:
            logger.warning(
                "the cache %s cannot be used (%s). The source serves every read until it can; what is written is removed "
                "from it for other processes, where that is possible. See to it that this process can write there, or "
                "give another place to keep the cache in.",
                self.name,
                why,
            )
            return
        logger.warning(
            "the index of the cache %s cannot be used any more (%s). The source serves every read, until it can "
            "be used again; what is written is removed from it for other processes.",
            self.name,
            why,
        )

    def restore(self, index: Index) -> None:
        """Use the cache store again, with this index."""
        with self.lock:
            # What it had counted before it was abandoned is part of both.
            before = self.stats() - index.stats()
            self.show(index)
            self._counted_before = before
            self.lost, self.usable = None, True

    def say_restored(self) -> None:
        """Log it, without a lock: a handler of the log may do anything."""
        logger.info("the index of the cache %s is used again", self.name)

    def empty_index(self) -> Index:
        """An index that takes nothing in."""
        return Index(**{**self.limits, "max_size": 0})

    # ------------------------------------------------------------- opening

    def when_open(self, then: Callable[[Handle], object]) -> None:
        """Call `then` with this handle now, or once the index is open."""
        with self.lock:
            if self.opening is not None:
                self.opening.then.append(then)
                return
        then(self)

    def open_later(self, open_first: Callable[[float], None], since: float) -> Latch | None:
        """Have the index opened in the background; until then nothing is cached.

        Who waits for it does so as if the wait had begun at the time `since`, on the clock of `time.monotonic`.
        """
        return self._be_unopened(open_first, since).begin()

    def _be_unopened(
        self, open_first: Callable[[float], None], since: float = -math.inf
    ) -> Opening:
        with self.lock:
            self.unopened = self.empty_index()
            self.index = self.unopened
            self.opening = opening = Opening(self, self._threads, open_first, since)
        return opening

    # -------------------------------------------------------------- forks

    def after_fork(self, open_first: Callable[[float], None] | None) -> None:
        """Start over in a forked child; with `open_first`, the index is opened at its first use."""
        self.lock, self.limits_lock = threading.RLock(), threading.RLock()
        self._resolution = Resolution(self.lock, self._threads)
        # The parent takes them.
        self.deferred.clear()
        self._retrying = Registry()
        if open_first is not None:
            self._be_unopened(open_first)
        elif self.opening is not None:
            self.opening = Opening(self, self._threads, self.opening.open_first)


def _or_inf(timeout: float | None) -> float:
    return math.inf if timeout is None else timeout
