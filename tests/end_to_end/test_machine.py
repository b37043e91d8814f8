"""The whole surface at once, step by step, against a plain dict.

Operations start, go on, are cancelled and fail in an order that Hypothesis chooses; the clock moves,
values vanish from the cache store, both stores raise. After each step the index equals what the cache store holds; while no
write is under way, the cache holds what the source holds.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest

from schedules import Op, Scenario, SourceError, World
from zcache.testing import FakeClock, in_flight

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

KEYS = ["a", "b", "a/x", "g/a", "g/b", "g/h/c"]
START = {key: key.encode() * 3 for key in KEYS[:4]}
MAX_AGE = 100

keys = st.sampled_from(KEYS)
values = st.binary(max_size=12)
requests = st.one_of(
    st.none(),
    st.builds(lambda a, n: RangeByteRequest(a, a + n), st.integers(0, 8), st.integers(0, 8)),
    st.builds(OffsetByteRequest, st.integers(0, 10)),
    st.builds(SuffixByteRequest, st.integers(0, 10)),
)
prefixes = st.sampled_from(["g", "g/h", "g/", "a", "", "none"])


def op(method: str, key: Any = keys, what: Any = None) -> Any:
    """A strategy for one operation."""
    return st.builds(Op, st.just(method), key, st.none() if what is None else what)


reads, sets, deletes = op("get", what=requests), op("set", what=values), op("delete")
ops = st.one_of(
    reads,
    op("get_offline", what=requests),
    op(
        "get_partial_values",
        st.just(""),
        st.lists(st.tuples(keys, requests), min_size=1, max_size=4),
    ),
    sets,
    op("set_if_not_exists", what=values),
    op(
        "_set_many",
        st.just(""),
        st.dictionaries(keys, values, min_size=1, max_size=3).map(lambda d: sorted(d.items())),
    ),
    deletes,
    op("delete_dir", prefixes),
    op("clear", st.just("")),
    op("clear_cache", st.just("")),
    op("exists"),
    op("invalidate", prefixes),
)
cache_errors = st.sampled_from(
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.ENAMETOOLONG, "too long"),
        TimeoutError("slow"),
        KeyError("k"),
        RuntimeError("a library's own"),
    ]
)
when = st.sampled_from(["before", "after"])


@pytest.fixture(scope="module", autouse=True)
def no_time_limit() -> Iterator[None]:
    """Here what is held goes on when a rule says so, which on a loaded machine may be after a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zcache._backends.base.READ_TIMEOUT", 3600)
        patch.setattr("zcache._backends.store.backend.DELETE_TIMEOUT", 3600)
        yield


class Machine(RuleBasedStateMachine):
    """Everything that may happen to a store."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = FakeClock()
        self.damaged: set[str] = set()

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Go on until nothing can go on by itself."""

        async def main() -> None:
            await work
            await self.world.quiet()

        self.runner.run(main())

    async def nothing(self) -> None:
        """Go on."""

    @initialize(
        max_size=st.sampled_from([0, 10, 25, 60, None]),
        max_age_seconds=st.sampled_from([MAX_AGE, "infinity", {"g/**": MAX_AGE, "a": 2}]),
        stale_if_error=st.sampled_from([0, MAX_AGE, "infinity"]),
        revalidate=st.booleans(),
        cache_set_data=st.booleans(),
        cache_missing=st.booleans(),
        missing_max_age_seconds=st.sampled_from([1, MAX_AGE, "infinity"]),
        held=st.booleans(),
    )
    def begin(self, max_size: int | None, held: bool, **options: Any) -> None:
        async def make() -> None:
            scenario = Scenario((), START, max_size=max_size)
            self.world = World(scenario, with_offline=True, clock=self.clock, **options)
            self.world.hold_up(on=True)
            self.held = held

        self.runner.run(make())

    # ---------------------------------------------------------------- what is done

    @rule(what=ops)
    def start(self, what: Op) -> None:
        async def begin() -> None:
            self.world.start(what, held=self.held)

        self.run(begin())

    @rule(key=keys)
    def start_to_decode(self, key: str) -> None:
        self.start(Op("decode", key))

    @rule(what=st.one_of(reads, sets, deletes))
    def call_now(self, what: Op) -> None:
        """From a thread without an event loop."""
        self.world.call_now(what)
        self.run(self.nothing())

    # Rules without preconditions: which points there are depends on fills in the background, and the
    # data that is drawn must not.
    @rule(which=st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
    def let_pass(self, which: list[int]) -> None:
        for at in which:
            if self.world.points:
                self.world.let_pass(at % len(self.world.points))
                self.run(self.nothing())

    @rule(which=st.integers(0, 10**6), point=st.booleans(), turns=st.integers(0, 3))
    def cancel(self, which: int, point: bool, turns: int) -> None:
        """At a point, or while it goes on from there."""
        if not self.running():
            return

        async def do_cancel() -> None:
            number = self.running()[which % len(self.running())]
            actor = self.world.actors[number]
            mine = [at for at, p in enumerate(self.world.points) if p.actor == number]
            if point and mine:
                self.world.let_pass(mine[0])
                for _ in range(turns):
                    await asyncio.sleep(0)
            if actor.task is not None and not actor.task.done():
                actor.cancelled = actor.task.cancel()

        self.run(do_cancel())

    def running(self) -> list[int]:
        actors = enumerate(self.world.actors)
        return [n for n, a in actors if a.task and not a.task.done() and not a.cancelled]

    # ------------------------------------------------------------ what goes wrong

    @rule(
        operation=st.sampled_from(["get", "set", "delete", "exists"]),
        at=when,
        error=cache_errors,
        times=st.integers(1, 3),
    )
    def cache_fails(self, operation: str, at: str, error: Exception, times: int) -> None:
        self.world.cache.faults += [(operation, at, error)] * times

    @rule(
        operation=st.sampled_from(
            ["get", "set", "set_if_not_exists", "delete", "delete_dir", "clear", "validator"]
        ),
        at=when,
    )
    def source_fails(self, operation: str, at: str) -> None:
        self.world.source.faults.append((operation, at, SourceError(operation)))

    @rule(seconds=st.sampled_from([0.5, 2, MAX_AGE / 2, MAX_AGE]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(which=st.integers(0, 10**6), shrink=st.booleans())
    def value_is_damaged(self, which: int, shrink: bool) -> None:
        cache = self.world.cache
        if not cache.values:
            return
        name = sorted(cache.values)[which % len(cache.values)]
        value = cache.values[name]
        cache.do_set(name, value[:-1] if shrink and value else None)
        self.damaged.add(name)

    # ------------------------------------------------------------------ what holds

    @invariant()
    def index_equals_cache_store(self) -> None:
        if not hasattr(self, "world"):
            return
        # What is written again is whole again.
        self.world.check_step(frozenset(self.damaged))

    @rule()
    def calm(self) -> None:
        """Let everything end, and compare all of it."""
        for _ in range(10_000):
            if not self.world.points:
                break
            self.world.let_pass(0)
            self.run(self.nothing())
        self.world.hold_up(on=False)
        self.world.source.faults.clear()
        self.world.cache.faults.clear()
        self.clock.advance(1000)
        if self.damaged:
            # Who reads a damaged value finds out; who never does, counts what is not there.
            self.run(self.world.store.clear_cache())
            self.damaged.clear()
        self.run(self.world.check_end())
        self.world.hold_up(on=True)

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.calm()
                self.check_counters()
                self.run(self.world.dismiss())
        finally:
            self.runner.close()

    def check_counters(self) -> None:
        stats = self.world.store.cache_stats()
        assert stats["total_requests"] == stats["hits"] + stats["misses"]
        assert stats["expirations"] <= stats["evictions"]
        assert self.world.store.cache_missing or not stats["negative_hits"]
        assert stats["stale_hits"] <= stats["hits"]
        assert stats["cache_failures"] <= self.world.cache.raised
        assert in_flight(self.world.store) == (0, 0)


TestMachine = Machine.TestCase
