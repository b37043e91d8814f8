"""The rules of a `StoreDouble`, and the gates that block operations."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from zcache._options import parse_timeout
from zcache._runtime.registry import Registry
from zcache.exceptions import OptionValueError

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATIONS: Final = (
    *(
        "get",
        "get_partial_values",
        "get_ranges",
        "set",
        "set_if_not_exists",
        "delete",
        "delete_dir",
    ),
    *(
        "clear",
        "exists",
        "getsize",
        "getsize_prefix",
        "is_empty",
        "list",
        "list_prefix",
        "list_dir",
    ),
    "validator",
)
"""Names of what a store does; that of a synchronous method is the same."""

_LONGEST: Final = 60.0
"""Seconds that a test waits for an operation which never comes."""


class Request(NamedTuple):
    """One call of an operation.

    Attributes
    ----------
    operation : str
        Its name, the same for the synchronous method: "get" is `get` and `get_sync`.
    key : str
        The key or prefix; "" where there is none.
    """

    operation: str
    key: str


class Gate:
    """Blocks operations of any thread or event loop until a test releases them.

    Attributes
    ----------
    entered : int
        How many operations have come to it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = threading.Event()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.entered = 0

    @property
    def is_open(self) -> bool:
        """Whether it has been released."""
        return self._open.is_set()

    def wait_entered(self, count: int = 1, timeout: float = _LONGEST) -> None:
        """Wait in a thread until operations have come; see `entered_async` for coroutines.

        Parameters
        ----------
        count : int, optional
            How many, since the gate was made. Default is 1.
        timeout : float, optional
            Seconds to wait. Default is 60.

        Raises
        ------
        TimeoutError
            If they do not come.
        """
        seconds = parse_timeout(timeout)
        with self._changed:
            if not self._changed.wait_for(lambda: self.entered >= count, seconds):
                raise TimeoutError(f"{self.entered} operations came, not {count}")

    async def entered_async(self, count: int = 1, timeout: float = _LONGEST) -> None:  # noqa: ASYNC109 - as `wait_entered`
        """Wait in a coroutine until operations have come; see `wait_entered`.

        Parameters
        ----------
        count : int, optional
            How many, since the gate was made. Default is 1.
        timeout : float, optional
            Seconds to wait. Default is 60.

        Raises
        ------
        TimeoutError
            If they do not come.
        """
        end = time.monotonic() + parse_timeout(timeout)
        while self.entered < count:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.entered} operations came, not {count}")
            await asyncio.sleep(0.001)

    def release(self) -> None:
        """Release all operations that wait here, and all later ones."""
        with self._changed:
            self._open.set()
            waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            # The event loop may have been closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_wake, future)

    def _enter(self) -> None:
        with self._changed:
            self.entered += 1
            self._changed.notify_all()

    def pass_sync(self) -> None:
        self._enter()
        self._open.wait()

    async def pass_async(self) -> None:
        self._enter()
        loop = asyncio.get_running_loop()
        with self._changed:
            if self._open.is_set():
                return
            future = loop.create_future()
            self._waiting.append((loop, future))
        await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@dataclass
class Rule:
    """What happens to calls of an operation."""

    operation: str
    key: str | None
    times: float
    after: bool
    error: BaseException | type[BaseException] | Callable[[], BaseException] | None = None
    seconds: float = 0.0
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.operation not in (*OPERATIONS, "*"):
            raise OptionValueError(
                f"invalid operation: {self.operation!r}. Give one of {', '.join(OPERATIONS)}, or '*' for each."
            )

    def takes(self, request: Request) -> bool:
        return self.operation in (request.operation, "*") and self.key in (request.key, None)

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error if isinstance(self.error, BaseException) else self.error()

    def act(self) -> None:
        if self.gate is not None:
            self.gate.pass_sync()
        if self.seconds:
            time.sleep(self.seconds)
        self.raise_error()

    async def act_async(self) -> None:
        if self.gate is not None:
            await self.gate.pass_async()
        if self.seconds:
            await asyncio.sleep(self.seconds)
        self.raise_error()


class Plan:
    """What a double does, and what it has counted; read-only copies share it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: list[Rule] = []
        # Those of rules that are used up as well.
        self.gates: list[Gate] = []
        self.requests: list[Request] = []
        self.calls: Counter[str] = Counter()
        self.seen = 0
        self.failures = 0
        _plans.add(self)

    def __reduce__(self) -> tuple[type[Plan], tuple[()]]:
        """A copy in another process does nothing and has counted nothing."""
        return type(self), ()

    def add(self, rule: Rule) -> None:
        with self.lock:
            self.rules.append(rule)
            if rule.gate is not None:
                self.gates.append(rule.gate)

    def begin(self, request: Request) -> tuple[list[Rule], list[Rule]]:
        """Count a call; what happens before and after it."""
        with self.lock:
            self.requests.append(request)
            self.calls[request.operation] += 1
            taken = [rule for rule in self.rules if rule.takes(request)]
            for rule in taken:
                rule.times -= 1
            self.failures += sum(rule.error is not None for rule in taken)
            self.rules = [rule for rule in self.rules if rule.times > 0]
        return [rule for rule in taken if not rule.after], [rule for rule in taken if rule.after]


_plans: Registry[Plan] = Registry()


def _after_fork() -> None:
    # A thread that stayed with the parent may hold a lock.
    for plan in _plans.snapshot():
        plan.lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
