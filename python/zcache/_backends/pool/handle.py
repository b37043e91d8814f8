"""The index of a pool, as one of its sources sees and calls it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol

from zcache._index.handle import take
from zcache._index.shared_wait import LOCK_TIMEOUT
from zcache._runtime.registry import Registry

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Mapping

    from zcache._core import CorruptIndexError, Index, Plan, Stats
    from zcache._index.calls import Handle, T, Watcher
    from zcache._index.handle import IndexHandle
    from zcache._index.opening import Opening
    from zcache._runtime.io import IO


_OF_POOL: Final = ("eviction", "minimise", "unit")


class PoolLimits(Protocol):
    """Who keeps the limits of a pool."""

    def apply_limits(self, *, waits: bool = True) -> None:
        """Have the pool keep to the limits of all its sources."""

    def note_policy(self, policy: dict[str, str]) -> None:
        """Have the pool go by this policy."""


class SourceHandle:
    """Calls the steps of the index of a pool for one source: all keys are below its folder there.

    Waiting, recovery and opening are those of the pool, for they are about its one index.

    Parameters
    ----------
    pool : IndexHandle
        The index of the pool.
    label : str
        Of the source.
    limits : dict
        What the source asks for.
    keeper : PoolLimits
        Has the pool keep to the limits of all its sources.

    Attributes
    ----------
    label : str
        As given. Another one counts from the next index on.
    view : Index
        The index as the source sees it.
    """

    take = staticmethod(take)
    tells_steps = False
    view: Index
    unopened: Index | None

    def __init__(
        self, pool: IndexHandle, label: str, limits: dict[str, Any], keeper: PoolLimits
    ) -> None:
        self._pool = pool
        self.label = label
        self._slices = bool(limits["slices_like_python"])
        self._keeper = keeper
        self._watchers: Registry[Watcher] = Registry()
        self.name = pool.name
        self.own_limits = limits
        self.follows_plan = False
        self.plan: Plan | None = None
        pool.watch(self)

    def use_index(self, index: Index) -> None:
        """See this index from now on; it knows no plan."""
        self.plan = None
        self.view = index.within(self.label, self._slices)
        self.unopened = self.view if index is self._pool.unopened else None
        self.show(self.view)

    def show(self, index: Index) -> None:
        """Put a view, or what stands before it, where callers find it."""
        with self._pool.lock:
            self._index = index
            for watcher in self._watchers.snapshot():
                watcher.use_index(index)

    @property
    def index(self) -> Index:
        """The index of now."""
        return self._index

    @property
    def limits(self) -> dict[str, Any]:
        """What the source asks for, and what is the same for all of the pool."""
        of_pool = self._pool.limits
        return {**self.own_limits, **{name: of_pool[name] for name in _OF_POOL if name in of_pool}}

    def change_limits(self, limits: Mapping[str, Any]) -> None:
        """Have the source ask for these, in place of what it asked for."""
        with self._pool.limits_lock:
            self.own_limits = {**self.own_limits, **limits}

    @property
    def usable(self) -> bool:
        """Whether the pool can be used."""
        return self._pool.usable

    @property
    def users(self) -> Registry[Any]:
        """Those of all sources that use the policy."""
        return self._pool.users

    @property
    def opening(self) -> Opening | None:
        """That of the index of the pool, while it is not open."""
        return self._pool.opening

    @property
    def deferred(self) -> deque[Callable[[], None]]:
        """Steps without a waiter."""
        return self._pool.deferred

    @property
    def is_open(self) -> bool:
        """Whether the index is open, or never will be."""
        return self._pool.is_open

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` the index of now, and each one that takes its place."""
        # Under which the pool tells all its sources of another one.
        with self._pool.lock:
            self._watchers.add(watcher)
            watcher.use_index(self._index)

    def stats(self) -> Stats:
        """Counters of the pool."""
        return self._pool.stats()

    def count_refusal(self) -> None:
        """Count a value that the index was not asked to take."""
        self._pool.count_refusal()

    def note_policy(self, policy: dict[str, str]) -> None:
        """Have the pool go by this policy."""
        self._keeper.note_policy(policy)

    def when_open(self, then: Callable[[Handle], object]) -> None:
        """Call `then` with this handle now, or once the index of the pool is open."""
        this = weakref.ref(self)

        def of_source(_: Handle) -> None:
            if (handle := this()) is not None:
                then(handle)

        self._pool.when_open(of_source)

    def apply_limits(self, *, waits: bool = True) -> None:
        """Have the pool keep to `limits` as well."""
        self._keeper.apply_limits(waits=waits)

    def _step(self, step: Callable[..., T]) -> Callable[..., T]:
        take = self.take

        def in_source(index: Index, *args: Any) -> T:
            own = self._index
            if index is not self._pool.index:
                own = index.within(self.label, self._slices)
            return take(step, own, *args)

        return in_source

    async def call(
        self,
        io: IO,
        step: Callable[..., T],
        *args: Any,
        timeout: float = LOCK_TIMEOUT,  # noqa: ASYNC109
        alone: bool = False,
    ) -> T:
        return await self._pool.call(io, self._step(step), *args, timeout=timeout, alone=alone)

    async def call_shielded(
        self,
        io: IO,
        on_detached_result: Callable[[T], object],
        step: Callable[..., T],
        *args: Any,
        timeout: float = LOCK_TIMEOUT,  # noqa: ASYNC109
    ) -> T:
        return await self._pool.call_shielded(
            io, on_detached_result, self._step(step), *args, timeout=timeout
        )

    def call_later(self, then: Callable[[T], object], step: Callable[..., T], *args: Any) -> None:
        self._pool.call_later(then, self._step(step), *args)

    def call_if_free(self, step: Callable[..., object], *args: Any) -> None:
        self._pool.call_if_free(self._step(step), *args)

    def take_deferred(self) -> None:
        self._pool.take_deferred()

    def call_blocking(
        self, step: Callable[..., T], *args: Any, timeout: float | None = LOCK_TIMEOUT
    ) -> T:
        return self._pool.call_blocking(self._step(step), *args, timeout=timeout)

    def resolve(self, error: CorruptIndexError) -> None:
        self._pool.resolve(error)

    def mark_corrupt(self) -> None:
        self._pool.mark_corrupt()

    def abandon(self, failure: BaseException) -> None:
        self._pool.abandon(failure)
