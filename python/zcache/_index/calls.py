"""How the protocol and the backends see the index of a place: its own, or that of a pool as one source sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterator, Mapping

    from zcache._core import CorruptIndexError, Index, Plan, Stats
    from zcache._runtime.io import IO
    from zcache._runtime.registry import Registry

T = TypeVar("T")
Rest: TypeAlias = tuple[tuple[int, int], int]

COMPLETE_TIMEOUT: Final = 60.0
"""Seconds that those wait at most who need all that is cached, while the index does not know it yet."""


START: Final[Rest] = ((0, 0), 0)
"""Where `Index.drain_prefix` and `Index.drain_absences` begin."""


def drained(
    step: Callable[[str, Rest], tuple[list[tuple[int, str]], Rest | None]], prefix: str
) -> Iterator[list[tuple[int, str]]]:
    """Drop entries below a prefix by `Index.drain_prefix`, however that is called; some of them after each call."""
    rest: Rest | None = START
    while rest is not None:
        victims, rest = step(prefix, rest)
        if victims:
            yield victims


def drain_absences(step: Callable[[str, Rest], Rest | None], prefix: str) -> None:
    """End absences below a prefix by `Index.drain_absences`, however that is called."""
    rest: Rest | None = START
    while rest is not None:
        rest = step(prefix, rest)


def is_complete(index: Index) -> bool:
    """A step: whether the index knows all that is cached."""
    return index.is_complete


class Opens(Protocol):
    """What opens an index. `Opening` says what each is."""

    meets_lock: bool

    async def wait(self, io: IO, timeout: float, *, alone: bool) -> None: ...  # noqa: ASYNC109


class Watcher(Protocol):
    """Who calls an index directly."""

    def use_index(self, index: Index) -> None:
        """Call this one from now on."""


class Handle(Protocol):
    """The index of one place, and the calls of its steps. `IndexHandle` says what each is."""

    name: str
    tells_steps: bool
    follows_plan: bool
    plan: Plan | None
    unopened: Index | None

    @property
    def index(self) -> Index: ...

    @property
    def limits(self) -> dict[str, Any]: ...

    @property
    def usable(self) -> bool: ...

    @property
    def is_open(self) -> bool: ...

    @property
    def users(self) -> Registry[Any]: ...

    @property
    def opening(self) -> Opens | None: ...

    @property
    def deferred(self) -> deque[Callable[[], None]]: ...

    def watch(self, watcher: Watcher) -> None: ...

    def stats(self) -> Stats: ...

    def count_refusal(self) -> None: ...

    def note_policy(self, policy: dict[str, str]) -> None: ...

    def change_limits(self, limits: Mapping[str, Any]) -> None: ...

    def apply_limits(self, *, waits: bool = True) -> None: ...

    def when_open(self, then: Callable[[Handle], object]) -> None: ...

    async def call(
        self,
        io: IO,
        step: Callable[..., T],
        *args: Any,
        timeout: float = ...,  # noqa: ASYNC109
        alone: bool = False,
    ) -> T: ...

    async def call_shielded(
        self,
        io: IO,
        on_detached_result: Callable[[T], object],
        step: Callable[..., T],
        *args: Any,
        timeout: float = ...,  # noqa: ASYNC109
    ) -> T: ...

    def call_later(
        self, then: Callable[[T], object], step: Callable[..., T], *args: Any
    ) -> None: ...

    def call_if_free(self, step: Callable[..., object], *args: Any) -> None: ...

    def take_deferred(self) -> None: ...

    def call_blocking(
        self, step: Callable[..., T], *args: Any, timeout: float | None = ...
    ) -> T: ...

    def resolve(self, error: CorruptIndexError) -> None: ...

    def mark_corrupt(self) -> None: ...

    def abandon(self, failure: BaseException) -> None: ...
