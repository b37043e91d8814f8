"""How the steps of an index are called, and what happens where its lock is taken or it is damaged.

A step is named (`handle.call(io, Index.reserve, ...)`), and the handle supplies the index of now:
recovery, a fork or the loss of the directory may have replaced it since the caller began.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from zcache._core import CorruptIndexError, Index, IndexBusyError
from zcache._runtime.threads import run_in_background
from zcache.exceptions import IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._runtime.io import IO

logger = logging.getLogger("zcache")
T = TypeVar("T")

RETRYABLE: Final = (IndexBusyError, CorruptIndexError)
"""What a step of the index raises if it was not taken, and may be once something was done about it."""
LOCK_TIMEOUT: Final = 1.0
"""Seconds that a read waits for the lock of an index, and for its first opening in a forked child."""
RECOVERIES: Final = 20
"""Times that one step may find the index damaged before this process does without it."""
_RETRY: Final = 0.01
"""Seconds between two tries where no thread can be started to wait."""


def ignore(_: object) -> None:
    """Do nothing about an outcome."""


def _take(step: Callable[..., T], index: Index, *args: Any) -> T:
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
    index : Index
        The index of now. On the hot path its methods are called directly.
    usable : bool
        False where the cache store cannot be used at all: then nothing is ever cached.
    ageless : bool
        Whether nothing ever expires, so that the clock need not be asked.
    recover : callable
        Replaces or repairs an index that is damaged; runs in a thread.
    take : callable
        Takes a step: `zcache.testing` puts its recorder here.
    open_first : callable or None
        In a forked child: opens the index, which the child has not used yet; runs in a thread.
    """

    take = staticmethod(_take)

    def __init__(self, index: Index, name: str, limits: dict[str, Any]) -> None:
        self.index = index
        self.name = name
        self.limits = limits
        self.usable = True
        self.ageless = limits["max_age"] is None
        self.recover: Callable[[Exception], None] = self.abandon
        self.open_first: Callable[[], None] | None = None
        # Reentrant: while it is held the garbage collector may end an operation.
        self._lock = threading.RLock()
        self._resolution: Future[None] | None = None
        self._resolving_since = 0.0
        self._opener: int | None = None

    # -------------------------------------------------------------- steps

    async def call(
        self,
        io: IO,
        step: Callable[..., T],
        *args: Any,
        timeout: float | None = None,  # noqa: ASYNC109 - for reads of others as well
    ) -> T:
        """Take a step of the index; where another process holds its lock, wait out of the way.

        Parameters
        ----------
        io : IO
            How to wait.
        step : callable
            A method of `Index`; it gets the index of now and `args`.
        timeout : float, optional
            Seconds that all who wait now wait at most. Default is None: as long as it takes.

        Raises
        ------
        IndexLockTimeout
            After `timeout`; the step was not taken.
        """
        damages, until = 0, None
        if self.open_first is not None:
            await self._open(io, timeout)
        while True:
            if timeout is not None and self._resolution is not None and self._left(timeout) <= 0:
                raise IndexLockTimeout(self._message(timeout))
            try:
                return self.take(step, self.index, *args)
            except RETRYABLE as error:
                damages += isinstance(error, CorruptIndexError)
                done = self._resolve(error, last=damages >= RECOVERIES)
                if done is None:
                    now = time.monotonic()
                    until = until or now + (timeout or math.inf)
                    if now >= until:
                        raise IndexLockTimeout(self._message(timeout)) from None
                    await io.pause(_RETRY)
                elif not await io.until(done, None if timeout is None else self._left(timeout)):
                    raise IndexLockTimeout(self._message(timeout)) from None

    async def call_shielded(
        self,
        io: IO,
        on_detached_result: Callable[[T], object],
        step: Callable[..., T],
        *args: Any,
        timeout: float | None = None,  # noqa: ASYNC109
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
        self._call_later(then, step, args, 0)

    def _call_later(
        self, then: Callable[[T], object], step: Callable[..., T], args: Any, damages: int
    ) -> None:
        try:
            result = self.take(step, self.index, *args)
        except RETRYABLE as error:
            damages += isinstance(error, CorruptIndexError)
            again = partial(self._call_later, then, step, args, damages)
            done = self._resolve(error, last=damages >= RECOVERIES)
            if done is None:
                timer = threading.Timer(_RETRY, again)
                timer.daemon = True
                with contextlib.suppress(RuntimeError):
                    timer.start()
                return

            # Not before the index answers: a thread that waited for it would be one less for others.
            def go_on(_: object) -> None:
                try:
                    run_in_background(again)
                except RuntimeError:
                    again()

            done.add_done_callback(go_on)
        else:
            then(result)

    def call_blocking(
        self, step: Callable[..., T], *args: Any, timeout: float | None = LOCK_TIMEOUT
    ) -> T:
        """Take a step of the index from a thread that may block.

        Raises
        ------
        IndexLockTimeout
            After `timeout` seconds.
        """
        damages = 0
        # The thread that opens it takes steps as well.
        if self.open_first is not None and self._opener != threading.get_ident():
            done = self._open_in_thread()
            if done is not None:
                with contextlib.suppress(TimeoutError):
                    done.result(timeout)
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return self.take(step, self.index, *args)
            except RETRYABLE as error:
                damages += isinstance(error, CorruptIndexError)
                done = self._resolve(error, last=damages >= RECOVERIES)
                if done is None:
                    time.sleep(_RETRY)
                else:
                    with contextlib.suppress(TimeoutError):
                        done.result(None if until is None else max(0.0, until - time.monotonic()))
                if until is not None and time.monotonic() >= until:
                    raise IndexLockTimeout(self._message(timeout)) from None

    def _left(self, timeout: float) -> float:
        """Seconds left for all who wait for the same, counted from the first of them."""
        return self._resolving_since + timeout - time.monotonic()

    def _message(self, timeout: float | None) -> str:
        return (
            f"the lock of the index of the cache {self.name} is held by another process for more than "
            f"{timeout} s. Is a process that uses the cache stopped?"
        )

    # ----------------------------------------------------------- recovery

    def _resolve(self, error: Exception, *, last: bool = False) -> Future[None] | None:
        """Wait for the lock of the index, or recover an index that is damaged.

        That happens in one thread for all who wait; None where no thread can be started. `last` says
        that it was recovered often enough.
        """
        with self._lock:
            if self._resolution is None:
                done: Future[None] = Future()
                self._resolving_since = time.monotonic()
                # Not one of the pool, which serves reads, and a daemon: the process ends without it.
                thread = threading.Thread(
                    target=self._resolve_in_thread, args=(error, done, last), daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:
                    return None
                self._resolution = done
            return self._resolution

    def _resolve_in_thread(self, error: Exception, done: Future[None], last: bool) -> None:
        try:
            if last:
                self.abandon(error)
            elif isinstance(error, CorruptIndexError):
                self.recover(error)
            else:
                self.index.wait_unlocked()
        except Exception as failure:  # noqa: BLE001 - reads must go on, whatever it is
            self.abandon(failure)
        finally:
            with self._lock:
                if self._resolution is done:
                    self._resolution = None
            done.set_result(None)

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
        """Do without the cache store from now on."""
        logger.warning(
            "the index of the cache %s cannot be used any more (%s). The source serves every read; other "
            "processes that use the cache do not see what is written through this one.",
            self.name,
            # As text: a log record is kept for long by some, and with it the frames of an exception.
            repr(failure),
        )
        self.usable = False
        self.index = self.empty_index()

    def empty_index(self) -> Index:
        """An index that takes nothing in."""
        return Index(**{**self.limits, "max_size": 0})

    # -------------------------------------------------------------- forks

    async def _open(self, io: IO, timeout: float | None) -> None:  # noqa: ASYNC109
        done = self._open_in_thread()
        if done is not None and not await io.until(done, timeout):
            raise IndexLockTimeout(self._message(timeout))

    def _open_in_thread(self) -> Future[None] | None:
        with self._lock:
            if self.open_first is None:
                return None
            if self._resolution is None:
                done: Future[None] = Future()
                self._resolving_since = time.monotonic()
                thread = threading.Thread(target=self._open_now, args=(done,), daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return None
                self._resolution = done
            return self._resolution

    def _open_now(self, done: Future[None]) -> None:
        try:
            self._opener = threading.get_ident()
            open_first = self.open_first
            if open_first is not None:
                open_first()
        except Exception as failure:  # noqa: BLE001 - reads must go on, whatever it is
            self.abandon(failure)
        finally:
            with self._lock:
                self.open_first = self._resolution = None
            done.set_result(None)

    def after_fork(self, open_first: Callable[[], None] | None) -> None:
        """Start over in a forked child; with `open_first`, the index is opened at its first use."""
        self._lock = threading.RLock()
        self._resolution = None
        if open_first is not None:
            self.index = self.empty_index()
            self.open_first = open_first
