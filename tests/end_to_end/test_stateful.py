"""zarr's own state machines on a cache that is too small, with its books checked at each step."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore
from zarr.testing.stateful import ZarrHierarchyStateMachine, ZarrStoreStateMachine
from zarr.testing.strategies import keys as zarr_keys

from decoding import ROOM, check_decoded_quiet
from doubles import WatchedStore
from pools import pool_with_neighbours
from support import PROTOTYPE, buf, check_quiet_sync
from zcache import CacheStore
from zcache.testing import FakeClock, cache_store_of, entries, source_of

if TYPE_CHECKING:
    from collections.abc import Callable

    MakeCache = Callable[[Path, int], Any]

Machine = TypeVar("Machine", bound=RuleBasedStateMachine)

CACHES: dict[str, MakeCache] = {
    "memory": lambda *_: MemoryStore(),
    "local": lambda path, _: LocalStore(path),
    # Its neighbours keep to the bound as well.
    "pool": lambda path, max_size: pool_with_neighbours(path, max_size=max_size),
    "wrapped": lambda *_: WatchedStore(MemoryStore()),
}
MAX_AGE = 10.0


class Checked(RuleBasedStateMachine):
    """What is added to both machines: a cache in its own directory, more rules, its books."""

    seen: Counter[str]
    clock: FakeClock
    cached: CacheStore

    def make_store(self, make_cache: MakeCache, max_size: int, **options: Any) -> CacheStore:
        self.directory = Path(tempfile.mkdtemp(prefix="zcache-"))
        self.cached = CacheStore(
            MemoryStore(),
            cache_store=make_cache(self.directory, max_size),
            max_size=max_size,
            max_age_seconds=MAX_AGE,
            # Some chunks, but not all.
            decoded_size=30 * ROOM,
            clock=self.clock,
            **options,
        )
        return self.cached

    @rule()
    def clear_cache(self) -> None:
        sync(self.cached.clear_cache())
        assert not entries(self.cached)

    @rule(seconds=st.floats(0, 2 * MAX_AGE))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def read_all_by_a_read_only_copy(self) -> None:
        copy = self.cached.with_read_only(read_only=True)
        source = source_of(self.cached)
        assert isinstance(source, MemoryStore)
        for key, value in source._store_dict.items():
            observed = sync(copy.get(key, PROTOTYPE))
            assert observed is not None
            assert observed.to_bytes() == value.to_bytes(), key
            assert sync(copy.getsize(key)) == len(value)

    @invariant()
    def invariants_hold(self) -> None:
        note(f"{self.cached!r} {self.cached.cache_stats()}")
        check_quiet_sync(self.cached)
        check_decoded_quiet(self.cached)

    def teardown(self) -> None:
        stats = self.cached.cache_stats()
        assert stats["damaged"] == stats["cache_skips"] == 0
        cache = cache_store_of(self.cached)
        if isinstance(cache, WatchedStore):
            assert self.cached.max_size is not None
            assert cache.peak <= self.cached.max_size
        self.seen.update(stats)
        # Something in the background may write there yet.
        shutil.rmtree(self.directory, ignore_errors=True)
        super().teardown()


class HierarchyMachine(Checked, ZarrHierarchyStateMachine):
    """Groups and arrays. A document of metadata takes about 600 bytes."""

    def __init__(self, make_cache: MakeCache) -> None:
        ZarrHierarchyStateMachine.__init__(self, self.make_store(make_cache, max_size=2000))

    @rule()
    def write_more_than_fits(self) -> None:
        """Left to itself, a short run may never make four documents."""
        for number in range(3):
            sync(self.cached.set(f"more/{number}", buf(bytes(900))))
        sync(self.cached.delete_dir("more"))


class StoreMachine(Checked, ZarrStoreStateMachine):
    """Keys and values of up to 100 bytes; it can hold one of those and something beside it."""

    def __init__(self, make_cache: MakeCache, **options: Any) -> None:
        ZarrStoreStateMachine.__init__(self, self.make_store(make_cache, 120, **options))

    @rule(keys=st.sets(zarr_keys(), min_size=3, max_size=8), size=st.integers(30, 100))
    def set_many(self, keys: set[str], size: int) -> None:
        """More than fits; left to itself, Hypothesis prefers one small value."""
        values = {key: buf(bytes(size)) for key in sorted(keys)}
        sync(self.cached._set_many(values.items()))
        self.model.update(values)

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data())
    def read_through(self, data: st.DataObject) -> None:
        """Read one value twice: what the invariants read has pushed most of them out."""
        key = data.draw(st.sampled_from(sorted(self.model)))
        for _ in range(2):
            observed = self.store.get(key, self.prototype)
            assert observed is not None
            assert observed.to_bytes() == self.model[key].to_bytes()


@pytest.fixture
def run(clock: FakeClock) -> Callable[[type[Checked], MakeCache], Counter[str]]:
    """Run a machine; returns the sums of the counters of all its caches."""

    def run(machine: type[Checked], make_cache: MakeCache, **options: Any) -> Counter[str]:
        seen: Counter[str] = Counter()

        class Timed(machine):  # type: ignore[valid-type,misc]
            def __init__(self) -> None:
                self.clock = clock
                self.seen = seen
                super().__init__(make_cache, **options)

        run_state_machine_as_test(Timed)
        return seen

    return run


Run = Any


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
def test_hierarchy_random_steps_match_the_model(run: Run, cache: str) -> None:
    seen = run(HierarchyMachine, CACHES[cache])
    # It would say nothing about a cache that never had to give way, or never served.
    assert seen["hits"] > 0
    assert seen["evictions"] > 0
    assert seen["cache_failures"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("cache_set_data", [True, False])
@pytest.mark.parametrize("cache", CACHES)
def test_store_random_steps_match_the_model(run: Run, cache: str, cache_set_data: bool) -> None:
    seen = run(StoreMachine, CACHES[cache], cache_set_data=cache_set_data)
    assert seen["hits"] > 0
    assert seen["evictions"] > 0
