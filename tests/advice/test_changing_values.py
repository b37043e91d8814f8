"""What `CacheStore.advise` and `replay` say of values that are written, expire, or change their size."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import MemoryStore

from support import buf, value_sync
from support import write as write_value
from zcache import Advice, CacheStore, replay
from zcache.testing import FakeClock

if TYPE_CHECKING:
    from pathlib import Path

KEYS = [f"a/c/{n}" for n in range(20)]
SIZES = [1000, 2500, 5000, 10_000, 15_000, 20_000, 100_000]


def one_grows(store: CacheStore, source: MemoryStore, clock: FakeClock) -> None:
    """One write among a thousand reads: the value takes nearly all of a small cache from then on."""
    rng = random.Random(3)
    for step in range(1000):
        ask(store, rng.choice(KEYS))
        if step == 900:
            write_sync(store, KEYS[0], bytes(9500))
            store.drain_sync()


def all_grow(store: CacheStore, source: MemoryStore, clock: FakeClock) -> None:
    rng = random.Random(2)
    for size in (250, 1000, 4000):
        for key in KEYS:
            write_sync(store, key, bytes(size))
            store.drain_sync()
        for _ in range(200):
            ask(store, rng.choice(KEYS))


def written_now_and_then(store: CacheStore, source: MemoryStore, clock: FakeClock) -> None:
    rng = random.Random(3)
    for _ in range(600):
        if rng.random() < 0.1:
            write_sync(store, rng.choice(KEYS), bytes(rng.randint(0, 2000)))
            store.drain_sync()
        else:
            ask(store, rng.choice(KEYS))


def only_ranges_are_read(store: CacheStore, source: MemoryStore, clock: FakeClock) -> None:
    rng = random.Random(5)
    for _ in range(600):
        key = rng.choice(KEYS)
        if rng.random() < 0.3:
            write_sync(store, key, bytes(1000))
            store.drain_sync()
        else:
            assert value_sync(store, key, RangeByteRequest(0, 100)) is not None
            store.drain_sync()


def invalidated_and_deleted(store: CacheStore, source: MemoryStore, clock: FakeClock) -> None:
    rng = random.Random(6)
    for step in range(600):
        key = rng.choice(KEYS)
        if rng.random() < 0.7:
            ask(store, key)
        elif step % 2:
            store.invalidate_sync(key)
        else:
            asyncio.run(store.delete(key))
            write_sync(source, key, bytes(1000))


def others_write(store: CacheStore, source: MemoryStore, clock: FakeClock) -> None:
    """What is cached expires, and is read anew."""
    rng = random.Random(4)
    for size in (250, 1000, 4000):
        for key in KEYS:
            write_sync(source, key, bytes(size))
        clock.advance(101)
        for _ in range(200):
            ask(store, rng.choice(KEYS))


def write_sync(store: Any, key: str, value: bytes) -> None:
    asyncio.run(write_value(store, key, value))


def ask(store: CacheStore, key: str) -> None:
    assert value_sync(store, key) is not None
    store.drain_sync()


def done(work: Any, size: int, *, path: Path | None = None, **options: Any) -> CacheStore:
    source = MemoryStore({key: buf(bytes(1000)) for key in KEYS})
    clock = FakeClock()
    store = CacheStore(source, max_size=size, clock=clock, **options)
    if path is None:
        work(store, source, clock)
    else:
        with store.record(path):
            work(store, source, clock)
    return store


def hit_rate(store: CacheStore) -> float:
    return float(store.cache_stats()["hit_rate"])


@pytest.mark.parametrize("eviction", ["lru", "none"])
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "dropped"])
@pytest.mark.parametrize(
    "work",
    [
        one_grows,
        all_grow,
        written_now_and_then,
        only_ranges_are_read,
        invalidated_and_deleted,
    ],
)
def test_advice_of_values_that_are_written_is_exact(
    work: Any, is_cached: bool, eviction: Any
) -> None:
    options: dict[str, Any] = {"cache_set_data": is_cached, "eviction": eviction}
    store = done(work, 10_000, **options)
    advice = store.advise(sizes=SIZES)
    curve = advice.curves[eviction]
    for size, ratio in zip(SIZES, curve.hit_ratio, strict=True):
        assert ratio == pytest.approx(hit_rate(done(work, size, **options))), size
    assert not curve.error.any()
    assert advice.hit_ratio == pytest.approx(hit_rate(store))


@pytest.mark.parametrize("work", [one_grows, all_grow, written_now_and_then])
def test_replay_of_values_that_are_written_is_within_its_band(work: Any, tmp_path: Path) -> None:
    """A recording has no writes: only by their sizes are values known to be others."""
    path = tmp_path / "requests"
    done(work, 10_000, path=path)
    curve = replay(path, sizes=SIZES).curves["lru"]
    for at, size in enumerate(SIZES):
        real = hit_rate(done(work, size))
        assert curve.hit_ratio[at] == pytest.approx(real, abs=curve.error[at] + 1e-9), size


def test_advice_and_replay_of_values_that_expire_know_their_sizes(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    options: dict[str, Any] = {"max_age_seconds": 100}
    store = done(others_write, 10_000, path=path, **options)
    for advice in (store.advise(sizes=SIZES), replay(path, sizes=SIZES)):
        assert advice.hit_ratio == pytest.approx(hit_rate(store))
        curve = advice.curves["lru"]
        for at, size in enumerate(SIZES):
            real = hit_rate(done(others_write, size, **options))
            assert curve.hit_ratio[at] == pytest.approx(real, abs=curve.error[at] + 1e-9), size


def test_advice_of_what_is_written_and_then_read_knows_that_it_can_be_served() -> None:
    def write_and_read(store: CacheStore, source: MemoryStore, clock: FakeClock) -> None:
        for step in range(200):
            write_sync(store, f"b/c/{step}", bytes(100))
            store.drain_sync()
        for step in range(200):
            ask(store, f"b/c/{step}")

    advice: Advice = done(write_and_read, 5000).advise(sizes=[5000, 20_000])
    assert advice.curves["lru"].hit_ratio.tolist() == [0.0, 1.0]
    assert (advice.best_hit_ratio, advice.requests) == (1.0, 200)
    assert hit_rate(done(write_and_read, 20_000)) == 1.0
    assert np.isclose(advice.cold_share, 0)
