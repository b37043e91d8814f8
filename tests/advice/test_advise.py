"""`CacheStore.advise`: its figures against exact ones, and how they are shown."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import sys
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock, patch
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from zarr.storage import LocalStore, MemoryStore

from agent import Agent
from directories import open_store
from pools import CACHES, ON_DISK
from support import buf, check_quiet, read, read_through, value_sync
from zcache import (
    Advice,
    CachePool,
    CacheStore,
    MissingClientError,
    OptionTypeError,
    OptionValueError,
    UsageError,
    replay,
)
from zcache._advice.advice import size_text
from zcache._advice.advise import advise
from zcache._advice.trace import Requests, complete
from zcache._core import POLICIES
from zcache.testing import StoreDouble, set_block_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

SIZE = 100


def whole_values(keys: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> Requests:
    """Requests of whole values, all of them misses."""
    ranges, never = np.zeros((len(keys), 3), np.uint64), np.zeros(len(keys), bool)
    return Requests(keys, keys, ranges, sizes, never, never, never.astype(np.uint8))


def read_keys(store: CacheStore, keys: Sequence[int]) -> None:
    for key in keys:
        assert value_sync(store, f"a/c/{key}") is not None


def store_of(count: int, sizes: Sequence[int] | None = None, **options: Any) -> CacheStore:
    values = {n: buf(bytes(SIZE if sizes is None else sizes[n])) for n in range(count)}
    return CacheStore(MemoryStore({f"a/c/{n}": value for n, value in values.items()}), **options)


def lru_hits(keys: Sequence[int], sizes: dict[int, int], bound: int) -> int:
    """Hits of a cache that evicts what was used least recently, the long way round."""
    held: OrderedDict[int, int] = OrderedDict()
    hits = 0
    for key in keys:
        if key in held:
            held.move_to_end(key)
            hits += 1
        elif sizes[key] <= bound:
            while sum(held.values()) + sizes[key] > bound:
                held.popitem(last=False)
            held[key] = sizes[key]
    return hits


def test_advice_of_few_keys_is_exact() -> None:
    rng = np.random.default_rng(1)
    keys = [int(key) for key in rng.zipf(1.3, 1000) if key < 60]
    sizes = [int(size) for size in rng.integers(1, 200, 60)]
    store = store_of(60, sizes, max_size=1500)
    read_keys(store, keys)
    advice = store.advise()
    assert advice
    assert advice.requests == advice.sampled_requests == len(keys)
    curve = advice.curves["lru"]
    by_key = dict(enumerate(sizes))
    for at, size in enumerate(advice.sizes):
        hits = lru_hits(keys, by_key, int(size))
        assert curve.hit_ratio[at] == pytest.approx(hits / len(keys))
        assert curve.source_requests[at] == pytest.approx(len(keys) - hits)
    # As the store itself has counted, where it has the present size.
    assert advice.hit_ratio == pytest.approx(store.cache_stats()["hit_rate"])
    assert not curve.error.any()
    assert not curve.source_bytes_error.any()
    # With all of them cached each is read once.
    assert curve.source_bytes[-1] == pytest.approx(sum(sizes[key] for key in set(keys)))
    assert advice.best_hit_ratio == pytest.approx(1 - len(set(keys)) / len(keys))


@pytest.mark.parametrize("is_pool", [False, True])
async def test_advice_knows_the_sizes_of_pending_values(is_pool: bool, tmp_path: Path) -> None:
    """A request had no size before its value was about to be written, and was left out."""
    sizes = [int(size) for size in np.random.default_rng(1).integers(1, 200, 60)]
    cache: Any = CachePool(tmp_path) if is_pool else StoreDouble(MemoryStore())
    store = store_of(60, sizes, cache_store=cache, max_size=100_000, source_id="one")
    with contextlib.ExitStack() as stack:
        if is_pool:
            filler = store._cache.shared.fills.filler
            stack.enter_context(patch.object(filler, "submit", lambda io, job: None))
        else:
            gate = cache.block("set")
            stack.callback(gate.release)
        for key in [*range(60), *range(60)]:
            assert await read(store, f"a/c/{key}") is not None
        advice = store.advise()
    assert advice.requests == 120
    assert not advice.unsized_share
    assert advice.curves["lru"].source_bytes[-1] == pytest.approx(sum(sizes))
    assert not advice.curves["lru"].error.any()
    if not is_pool:
        assert await store.drain()


def test_advice_allows_for_requests_of_unknown_size() -> None:
    keys = np.arange(300, dtype=np.uint64) % np.uint64(100)
    sizes = np.full(300, 10, np.uint64)
    known = advise(complete(whole_values(keys, sizes), unit=1), max_size=500)
    assert not known.curves["lru"].error.any()
    sizes[::10] = np.uint64(2**64 - 1)
    some = advise(complete(whole_values(keys, sizes), unit=1), max_size=500)
    assert some.unsized_share == pytest.approx(0.1)
    assert (some.curves["lru"].error >= 0.1).all()
    assert "10.0% of all are left out" in str(some)


def test_advice_about_a_loop_says_its_size_and_its_policy() -> None:
    store = store_of(200, max_size=100 * SIZE)
    for _ in range(10):
        read_keys(store, range(200))
    advice = store.advise()
    assert advice.hit_ratio == 0.0
    assert advice.max_size == 100 * SIZE
    assert advice.sizes[0] == 100 * SIZE / 16
    assert advice.sizes[-1] == 100 * SIZE * 16
    assert advice.best_hit_ratio == pytest.approx(0.9)
    assert advice.smallest_size is not None
    assert 200 * SIZE <= advice.smallest_size <= 200 * SIZE * 1.02
    assert advice.best_policy != "lru"
    assert advice.best_policy_gain > 0.4
    # What came first stays: half of each epoch but the first.
    middle = list(advice.sizes).index(100 * SIZE)
    assert advice.curves["none"].hit_ratio[middle] == pytest.approx(0.45)
    assert advice.cold_share == pytest.approx(0.1)


@pytest.mark.parametrize("bound", [200 * SIZE, 16 * 200 * SIZE, 1000 * 200 * SIZE])
def test_advice_smallest_size_is_looked_for_below_all_sizes(bound: int) -> None:
    store = store_of(200, max_size=bound)
    for _ in range(10):
        read_keys(store, range(200))
    for sizes in (None, [bound], [0, bound]):
        advice = store.advise(sizes=sizes)
        assert advice.smallest_size is not None
        assert 200 * SIZE <= advice.smallest_size <= 200 * SIZE * 1.02


@pytest.mark.parametrize("seed", [484, 571, 659])
@pytest.mark.parametrize("policy", ["lru", "none", "adaptive"])
def test_advice_smallest_size_has_what_it_promises(policy: str, seed: int) -> None:
    """Also where a byte more has less, as "none" has it with values of many sizes."""
    rng = np.random.default_rng(seed)
    each = np.where(rng.random(3000) < 0.2, 1, rng.lognormal(6, 2, 3000) + 1).astype(np.uint64)
    keys = rng.integers(0, 3000, 200)
    trace = complete(whole_values(keys.astype(np.uint64), each[keys]), unit=1)
    whole = int(each[np.unique(keys)].sum())
    advice = advise(trace, max_size=whole, policy=policy, policies=(policy,))
    assert advice.smallest_size is not None
    there = advise(trace, max_size=advice.smallest_size, policy=policy, policies=(policy,))
    assert there.hit_ratio >= 0.9 * advice.best_hit_ratio - 1e-9


@pytest.mark.parametrize("kind", ON_DISK)
def test_advice_smallest_size_on_disk_has_what_it_promises(tmp_path: Path, kind: str) -> None:
    """Where the hot set just fits is a cliff, and of the room that values take little is known."""
    source = MemoryStore({f"a/c/{n}": buf(bytes(1000 + n * 37)) for n in range(150)})
    rng = np.random.default_rng(9)
    keys: list[int] = []
    for turn in range(12):
        keys += [int(key) for key in rng.integers(0, 40, 50)]
        keys += [40 + (turn * 30 + step) % 110 for step in range(40)]

    def work(size: int) -> CacheStore:
        cache = CACHES[kind](tmp_path / str(size))
        store = CacheStore(source, cache_store=cache, max_size=size, source_id="here")
        for key in keys:
            read_keys(store, [key])
            assert store.drain_sync()
        return store

    before = set_block_size(4096)
    try:
        advice = work(400_000).advise(policies="lru")
        assert advice.smallest_size is not None
        found = work(advice.smallest_size).cache_stats()["hit_rate"]
    finally:
        set_block_size(before)
    assert found >= 0.9 * advice.best_hit_ratio


def test_advice_smallest_size_where_nothing_can_be_had_is_none_at_all() -> None:
    store = store_of(200, max_size=100 * SIZE)
    read_keys(store, range(200))
    assert store.advise().smallest_size == 0


@pytest.mark.parametrize("eviction", POLICIES)
def test_advice_compares_with_the_policy_in_force(eviction: Any) -> None:
    store = store_of(200, max_size=100 * SIZE, eviction=eviction)
    for _ in range(10):
        read_keys(store, range(200))
    advice = store.advise()
    assert advice.policy == eviction
    assert advice.hit_ratio == pytest.approx(store.cache_stats()["hit_rate"], abs=0.02)
    assert (advice.best_policy_gain == 0) == (advice.best_policy == eviction)
    assert f"source requests ({eviction})" in str(advice)


@pytest.mark.parametrize("hot", [300, 40])
def test_advice_once_the_work_has_changed_is_about_the_latest_requests(hot: int) -> None:
    """Of few keys, the first requests of which are forgotten."""
    store = store_of(1000, max_size=500 * SIZE)
    rng = np.random.default_rng(4)
    keys = [*list(range(1000)) * 20, *rng.integers(0, hot, 140_000).tolist()]
    # Of a key that was forgotten, and is requested late.
    keys[-1] = 900
    read_keys(store, keys)
    advice = store.advise()
    assert (advice.requests, advice.sampled_requests) == (65_536, 65_536)
    assert advice.only_latest
    assert str(advice).startswith("The latest 65,536 requests (all of them). Earlier ones are forg")
    assert "The latest 65,536 requests" in advice._repr_html_()
    misses = 65_536 * (1 - advice.hit_ratio)
    assert misses < 2
    # It had been requested before, so it is not cold, but whether it had stayed no one knows.
    assert (advice.best_hit_ratio, advice.cold_share) == (1.0, 0.0)
    assert advice.curves["lru"].error[8] == pytest.approx(1 / 65_536)
    assert advice.curves["lru"].source_bytes_error[8] == pytest.approx(SIZE)
    assert not advice.curves["lru"].error[-1]
    assert not advice.curves["lru"].source_bytes_error[-1]
    least = lru_hits(keys, dict.fromkeys(range(1000), SIZE), 1000)
    before = lru_hits(keys[:-65_536], dict.fromkeys(range(1000), SIZE), 1000)
    at_least = store.advise(sizes=[1000]).curves["lru"].hit_ratio[0]
    assert at_least == pytest.approx((least - before) / 65_536, abs=1e-4)


@pytest.mark.slow
def test_advice_of_many_keys_is_near_and_within_its_band() -> None:
    rng = np.random.default_rng(2)
    count = 40_000
    weights = np.arange(1, count + 1) ** -0.8
    draws = rng.choice(count, 60_000, p=weights / weights.sum())
    keys = np.concatenate([draws, np.tile(np.arange(20_000, 40_000), 3)])
    store = store_of(count, max_size=8000 * SIZE)
    read_keys(store, keys.tolist())
    advice = store.advise()
    assert advice.sampling_rate < 0.7
    sizes = np.full(len(keys), SIZE, np.uint64)
    exact = advise(complete(whole_values(keys.astype(np.uint64), sizes), 1), max_size=8000 * SIZE)
    for name in ("lru", "none"):
        off = np.abs(advice.curves[name].hit_ratio - exact.curves[name].hit_ratio)
        assert off.mean() < 0.02
        # A band of two deviations, and as much again: chance must not decide about a test.
        assert (off <= 2 * advice.curves[name].error + 0.02).all()
        missed = advice.curves[name].source_bytes / exact.curves[name].source_bytes
        assert np.abs(missed - 1).mean() < 0.1
    assert advice.requests == len(keys)
    assert abs(advice.best_hit_ratio - exact.best_hit_ratio) < 0.03
    assert abs(advice.cold_share - exact.cold_share) < 0.05


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_advice_band_holds_where_one_key_has_many_requests(share: float) -> None:
    """Which is in the sample, or is not: then only the number of all requests tells of it."""
    rng = np.random.default_rng(11)
    count, draws, rate = 6000, 20_000, 0.3
    keys = np.where(rng.random(draws) < share, count, rng.integers(0, count, draws))
    bound = count * SIZE // 4
    sizes = np.full(draws, SIZE, np.uint64)
    whole = complete(whole_values(keys.astype(np.uint64), sizes), 1)
    exact = advise(whole, max_size=bound, policies=("lru", "none"))
    holds = []
    for _ in range(20):
        is_sampled = rng.random(count + 1) < rate
        # As it is most of the time.
        is_sampled[count] = False
        taken = is_sampled[keys]
        sample = replace(
            complete(whole.select(taken), 1),
            rate=rate,
            requests=float(draws),
        )
        advice = advise(sample, max_size=bound, policies=("lru", "none"))
        for name, curve in advice.curves.items():
            off = np.abs(curve.hit_ratio - exact.curves[name].hit_ratio)
            holds.append((off <= curve.error + 1e-9).mean())
    assert np.mean(holds) > 0.86


def test_advice_band_holds_where_whole_values_of_sampled_ranges_are_not_sampled() -> None:
    """They were simulated as if they were never read, with the band of chance alone."""
    rng = np.random.default_rng(5)
    values, parts, draws, rate = 1000, 10, 40_000, 0.4
    value = (values * rng.random(draws) ** 2).astype(np.uint64)
    # Number 0 is the whole.
    part = np.where(rng.random(draws) < 0.2, 0, rng.integers(1, parts + 1, draws))
    sizes = np.where(part == 0, 10 * SIZE, SIZE).astype(np.uint64)
    starts = np.maximum(part - 1, 0) * SIZE
    wholes = value * np.uint64(parts + 1)
    requests = replace(
        whole_values(wholes + part.astype(np.uint64), sizes),
        wholes=wholes,
        ranges=np.stack([part > 0, starts, np.where(part > 0, starts + SIZE, 0)], 1).astype(
            np.uint64
        ),
    )
    bound = values * 10 * SIZE // 2
    exact = advise(complete(requests, 1), max_size=bound, policies=("lru",)).curves["lru"]
    assert not exact.error.any()
    is_sampled = (rng.random(values * (parts + 1)) < rate)[requests.keys.astype(int)]
    sample = replace(complete(requests.select(is_sampled), 1), rate=rate, requests=float(draws))
    said = advise(sample, max_size=bound, policies=("lru",)).curves["lru"]
    assert (np.abs(said.hit_ratio - exact.hit_ratio) <= said.error).all()
    assert (np.abs(said.source_bytes - exact.source_bytes) <= said.source_bytes_error).all()


def test_advice_band_is_that_of_the_size_whatever_others_are_asked_for() -> None:
    """It was read off the line between the sizes that were asked for, and 0 of one alone."""
    count, rate, holds = 6000, 0.25, []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        each = np.maximum(rng.lognormal(4, 1.5, count), 1).astype(np.uint64)
        keys = np.concatenate([rng.permutation(count) for _ in range(4)]).astype(np.uint64)
        whole = complete(whole_values(keys, each[keys]), 1)
        taken = (rng.random(count) < rate)[keys]
        sample = replace(complete(whole.select(taken), 1), rate=rate, requests=float(len(keys)))
        bound = int(each.sum())
        sizes = [round(bound * part) for part in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
        exact = advise(whole, max_size=bound, sizes=sizes, policies=("lru",)).curves["lru"]
        every = advise(sample, max_size=bound, sizes=sizes, policies=("lru",)).curves["lru"]
        for at, size in enumerate(sizes):
            alone = advise(sample, max_size=bound, sizes=[size], policies=("lru",)).curves["lru"]
            assert alone.error[0] == every.error[at]
            assert alone.source_bytes_error[0] == every.source_bytes_error[at]
            holds.append(abs(alone.hit_ratio[0] - exact.hit_ratio[at]) <= alone.error[0] + 0.005)
    assert np.mean(holds) > 0.9


@pytest.mark.parametrize(("spread", "skew"), [(2.0, 0.9), (2.5, 0.7), (1.0, 0.8)])
def test_advice_band_of_bytes_holds_where_sizes_are_uneven(spread: float, skew: float) -> None:
    """A few keys have most of the bytes, and are in the sample or are not."""
    count, draws, rate = 4000, 12_000, 0.4
    weights = np.arange(1, count + 1) ** -skew
    holds = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes = np.minimum(10 + rng.lognormal(3, spread, count), 200_000).astype(np.uint64)
        keys = rng.permutation(count)[rng.choice(count, draws, p=weights / weights.sum())]
        bound = int(sizes.sum()) // 10
        whole = complete(whole_values(keys.astype(np.uint64), sizes[keys]), 1)
        exact = advise(whole, max_size=bound, policies=("lru", "none"))
        taken = (rng.random(count) < rate)[keys]
        sample = replace(
            complete(whole.select(taken), 1),
            rate=rate,
            requests=float(draws),
        )
        advice = advise(sample, max_size=bound, policies=("lru", "none"))
        assert " ± " in str(advice).splitlines()[3].rpartition("  ")[2]
        for name, curve in advice.curves.items():
            off = np.abs(curve.source_bytes - exact.curves[name].source_bytes)
            assert not exact.curves[name].source_bytes_error.any()
            holds.append((off <= curve.source_bytes_error).mean())
    assert np.mean(holds) > 0.75


def test_advice_source_bytes_show_their_band() -> None:
    keys = np.tile(np.arange(200, dtype=np.uint64), 3)
    whole = complete(whole_values(keys, 100 + keys * 10), 1)
    exact = advise(whole, max_size=10_000)
    assert "±" not in str(exact)
    advice = advise(replace(whole, rate=0.5, requests=1200.0), max_size=10_000)
    own = advice.curves["lru"]
    shown = f"{size_text(own.source_bytes[8])} ± {size_text(own.source_bytes_error[8])}"
    assert shown in str(advice)
    assert f"<td>{shown}</td>" in advice._repr_html_()


def test_advice_without_a_bound_is_about_what_is_cached() -> None:
    store = store_of(50)
    read_keys(store, list(range(50)) * 3)
    advice = store.advise()
    assert advice.max_size == 50 * SIZE
    assert not advice.is_bounded
    assert "no max_size" in str(advice)


@pytest.mark.parametrize("bound", [2**64 - 2, 2**60 + 1])
@pytest.mark.filterwarnings("error")
def test_advice_sizes_end_where_those_of_a_cache_do(bound: int) -> None:
    store = store_of(50, max_size=bound)
    read_keys(store, list(range(50)) * 3)
    advice = store.advise()
    assert advice.max_size == bound
    assert int(advice.sizes[-1]) == 2**64 - 1
    assert (np.diff(advice.sizes.astype(float)) > 0).all()
    assert advice.curves["lru"].hit_ratio[-1] == advice.best_hit_ratio
    assert advice.smallest_size is not None
    assert 50 * SIZE <= advice.smallest_size <= 50 * SIZE * 1.02
    given = store.advise(sizes=[2**64 - 1, 2**64 - 2])
    assert given.sizes.tolist() == [2**64 - 2, 2**64 - 1]
    ET.fromstring(advice._repr_html_())
    assert str(advice)


def test_advice_where_more_was_requested_than_a_cache_can_hold() -> None:
    """It named a present size that is none."""
    keys = np.tile(np.arange(200, dtype=np.uint64), 3)
    sizes = np.full(len(keys), 2**47, np.uint64)
    whole = complete(whole_values(keys, sizes), 1)
    advice = advise(replace(whole, rate=1e-4, requests=6e6), max_size=None)
    assert advice.max_size == int(advice.sizes[-1]) == 2**64 - 1
    on_disk = complete(whole_values(keys, sizes), 4096, 512, 2**32)
    small = advise(replace(on_disk, rate=1e-4, requests=6e6), max_size=None, sizes=[1])
    assert small.curves["lru"].hit_ratio[0] == 0


async def test_advice_is_about_the_least_bound_of_all_processes(tmp_path: Path) -> None:
    store, source = open_store(tmp_path, max_size=10_000)
    for number in range(10):
        await source.inner.set(f"a/c/{number}", buf(bytes(SIZE)))
    with Agent(tmp_path, 600):
        for _ in range(12):
            for number in range(10):
                await read_through(store, f"a/c/{number}")
        advice = store.advise()
        assert (advice.max_size, advice.is_bounded, advice.requests) == (600, True, 120)
    await check_quiet(store)


@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.parametrize("size", [100, 3584, 3585, 2**20])
def test_advice_counts_what_a_value_takes_on_disk(tmp_path: Path, kind: str, size: int) -> None:
    """Whole blocks, in a pool the header before it, and the folders or segments."""
    keys = [f"a/c/{number}/0/0" for number in range(40)]
    source = MemoryStore({key: buf(bytes(size)) for key in keys})
    before = set_block_size(4096)
    try:
        store = CacheStore(
            source,
            cache_store=CACHES[kind](tmp_path / "cache"),
            max_size="200MB",
            source_id="here",
        )
        with store.record(tmp_path / "requests.csv.gz"):
            for _ in range(3):
                for key in keys:
                    assert value_sync(store, key) is not None
                assert store.drain_sync()
    finally:
        set_block_size(before)
    held = store.cache_info()["current_size"]
    assert held > 40 * max(size, 4096)
    sizes = [round(held * 0.99), round(held * 1.01)]
    for advice in (store.advise(sizes=sizes), replay(tmp_path / "requests.csv.gz", sizes=sizes)):
        assert advice.curves["lru"].hit_ratio == pytest.approx([0, 2 / 3])


@pytest.mark.parametrize("policy", ["lru", "none"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("directory", "a/c/{}/{}"),
        ("pool", "a/c/{}/{}"),
        ("directory", "x/{}-{}/a/b/c/d/e/f/0"),
    ],
)
def test_advice_band_on_disk_holds_what_values_take_beside(
    tmp_path: Path, kind: str, name: str, policy: Any
) -> None:
    """Also where each has many folders of its own."""
    rng = np.random.default_rng(1)
    keys = [name.format(n // 10, n % 10) for n in range(200)]
    source = MemoryStore(
        {
            key: buf(bytes(int(size)))
            for key, size in zip(keys, rng.lognormal(8, 1, 200), strict=True)
        }
    )
    order = [keys[int(n)] for n in 200 * rng.random(800) ** 2]
    sizes = [250_000, 500_000, 1_000_000]
    found = []
    before = set_block_size(4096)
    try:
        for size in sizes:
            cache = CACHES[kind](tmp_path / str(size))
            store = CacheStore(
                source, cache_store=cache, max_size=size, eviction=policy, source_id="here"
            )
            for key in order:
                assert value_sync(store, key) is not None
                assert store.drain_sync()
            found.append(store.cache_stats()["hit_rate"])
            if size == sizes[1]:
                curve = store.advise(sizes=sizes).curves[policy]
    finally:
        set_block_size(before)
    assert (np.abs(curve.hit_ratio - found) <= curve.error + 0.005).all()
    assert (curve.error > 0).all()


@pytest.mark.parametrize("present", ["lru", "none"])
def test_advice_on_disk_about_another_policy_or_size_is_within_its_band(
    tmp_path: Path, present: Any
) -> None:
    """A pool that evicts has holes, one of another size has other segments, and so has a directory other folders."""
    rng = np.random.default_rng(2)
    keys = [f"v{n // 100}/c/{n // 10 % 10}/{n % 10}" for n in range(400)]
    values = [buf(bytes(int(size))) for size in rng.lognormal(8.5, 1, 400)]
    source = MemoryStore(dict(zip(keys, values, strict=True)))
    order = [keys[n] for n in rng.permutation(400)[(400 ** rng.random(1200)).astype(int)]]
    sizes = [750_000, 1_500_000, 3_000_000]
    found: dict[str, dict[str, list[float]]] = {kind: {"lru": [], "none": []} for kind in ON_DISK}
    said = {}
    before = set_block_size(4096)
    try:
        for kind, policy, size in itertools.product(ON_DISK, ("lru", "none"), sizes):
            cache = CACHES[kind](tmp_path / f"{kind}-{policy}-{size}")
            options: Any = {"max_size": size, "eviction": policy, "source_id": "here"}
            store = CacheStore(source, cache_store=cache, **options)
            for key in order:
                assert value_sync(store, key) is not None
                assert store.drain_sync()
            found[kind][policy].append(store.cache_stats()["hit_rate"])
            if (policy, size) == (present, sizes[1]):
                said[kind] = store.advise(sizes=sizes)
    finally:
        set_block_size(before)
    outside = []
    for kind, policy in itertools.product(ON_DISK, ("lru", "none")):
        curve = said[kind].curves[policy]
        off = np.abs(curve.hit_ratio - found[kind][policy]) - curve.error
        outside += [(kind, policy, size) for size in np.array(sizes)[off > 0.005].tolist()]
    assert not outside


def test_advice_about_a_pool_counts_the_header_of_each_value(tmp_path: Path) -> None:
    """Which takes another block for the large ones only."""
    source = MemoryStore({f"a/c/{n}": buf(bytes(4000 if n < 40 else 10)) for n in range(80)})
    before = set_block_size(4096)
    try:
        pool = CachePool(tmp_path / "pool", max_size="100MB")
        store = CacheStore(source, cache_store=pool, source_id="here")
        with store.record(tmp_path / "requests.csv.gz"):
            for keys in (range(40, 80), range(40), range(40), range(40)):
                read_keys(store, keys)
                assert store.drain_sync()
    finally:
        set_block_size(before)
    sizes = [40 * 8191, 40 * 10_500]
    for advice in (store.advise(sizes=sizes), replay(tmp_path / "requests.csv.gz", sizes=sizes)):
        assert advice.curves["lru"].hit_ratio == pytest.approx([0, 1 / 2])


def test_advice_about_no_room_takes_its_sizes_from_what_was_requested() -> None:
    store = store_of(50, max_size=0)
    read_keys(store, list(range(50)) * 3)
    advice = store.advise()
    assert (advice.max_size, advice.is_bounded) == (0, True)
    assert advice.hit_ratio == store.cache_stats()["hit_rate"] == 0.0
    assert (advice.best_policy, advice.best_policy_gain) == ("lru", 0.0)
    assert advice.cold_share == pytest.approx(1 / 3)
    assert advice.sizes[8] == 50 * SIZE
    assert advice.smallest_size is not None
    assert 50 * SIZE <= advice.smallest_size <= 50 * SIZE * 1.02
    assert "Now: max_size 0 B, lru, hit ratio 0.00." in str(advice)
    ET.fromstring(advice._repr_html_())
    axes = MagicMock()
    axes.plot.side_effect = lambda *_, **__: (MagicMock(),)
    advice.plot(axes)
    # On a scale of logarithms there is no place for 0.
    axes.axvline.assert_not_called()


def test_advice_after_little_traffic_says_so() -> None:
    store = store_of(50)
    assert not store.advise()
    read_keys(store, list(range(50)))
    advice = store.advise()
    assert not advice
    assert "too little traffic: 50 of at least 100 requests" in str(advice)
    assert repr(advice).startswith("Advice(reason=")
    assert "too little traffic" in advice._repr_html_()
    assert not len(advice.sizes)
    with pytest.raises(UsageError, match="too little traffic"):
        advice.plot()


def test_advice_beside_a_cache_that_takes_nothing_knows_all_sizes(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    cache = LocalStore(tmp_path / "cache", read_only=True)
    store = store_of(20, cache_store=cache, max_size=1000)
    read_keys(store, list(range(20)) * 10)
    advice = store.advise()
    # What the cache store does not take has its size as well.
    assert (advice.requests, advice.unsized_share) == (200, 0.0)


async def test_advice_where_no_size_is_known_says_so() -> None:
    source = StoreDouble(MemoryStore({"a": buf(b"value")}))
    gate = source.block("get")
    store = CacheStore(source, max_size=1000)
    tasks = [asyncio.ensure_future(read(store, "a")) for _ in range(200)]
    await gate.entered_async()
    advice = store.advise()
    gate.release()
    await asyncio.gather(*tasks)
    assert not advice
    assert "0 of at least 100 requests are known so far, and 200 without their sizes" in str(advice)


def test_advice_about_reads_that_fail_has_none_of_them() -> None:
    source = StoreDouble(MemoryStore({"a": buf(b"value")}))
    source.fail("get", OSError("unreachable"))
    store = CacheStore(source, max_size=1000)
    for _ in range(200):
        with pytest.raises(OSError, match="unreachable"):
            value_sync(store, "a")
    assert "0 of at least 100 requests are known so far." in str(store.advise())


def test_advice_where_nothing_is_cached_and_nothing_bounds_it_says_so() -> None:
    store = store_of(50, [0] * 50)
    read_keys(store, list(range(50)) * 3)
    for advice in (store.advise(), store.advise(sizes=[100])):
        assert not advice
        assert "too little traffic: no bytes are cached" in str(advice)


def test_advice_about_given_sizes_and_policies() -> None:
    store = store_of(50, max_size=1000)
    read_keys(store, list(range(50)) * 3)
    advice = store.advise(sizes=["5KB", 1000, 5000], policies=["none"])
    assert list(advice.sizes) == [1000, 5000]
    assert list(advice.curves) == ["none"]
    assert advice.smallest_size is not None
    assert store.advise(sizes=[100]).smallest_size is None
    assert "None of these sizes is sure to take lru to 90 %" in str(store.advise(sizes=[100]))


@pytest.mark.parametrize("policies", [["none"], ["adaptive", "none"], ["lru"]])
def test_advice_about_other_policies_compares_with_the_present_one(policies: list[str]) -> None:
    store = store_of(200, max_size=100 * SIZE)
    for _ in range(10):
        read_keys(store, range(200))
    every, advice = store.advise(), store.advise(policies=policies)
    assert list(advice.curves) == policies
    assert (advice.policy, advice.hit_ratio) == ("lru", every.hit_ratio)
    assert advice.smallest_size == every.smallest_size
    assert advice.cold_share == every.cold_share
    assert "lru, hit ratio 0.00." in str(advice)
    ratios = {name: every.curves[name].hit_ratio[8] for name in ["lru", *policies]}
    assert advice.best_policy == max(ratios, key=lambda name: ratios[name])
    assert advice.best_policy_gain == pytest.approx(ratios[advice.best_policy] - ratios["lru"])
    assert ("compared with no other policy" in str(advice)) == (policies == ["lru"])
    assert f"source requests ({policies[0]})" in str(advice)
    ET.fromstring(advice._repr_html_())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sizes": []}, OptionValueError, "sizes"),
        ({"sizes": [None]}, OptionValueError, "sizes"),
        ({"sizes": ["some"]}, OptionValueError, "some"),
        ({"sizes": [-1]}, OptionValueError, "-1"),
        ({"sizes": object()}, OptionTypeError, "sizes"),
        ({"sizes": True}, OptionTypeError, "sizes"),
        ({"sizes": b"ab"}, OptionTypeError, "sizes: b'ab'.*text, not bytes"),
        ({"sizes": [b"1KB"]}, OptionTypeError, "sizes: b'1KB'"),
        ({"sizes": ["25%"]}, OptionValueError, '25%.*Shares such as "25%" are not taken here'),
        ({"policies": ["no policy"]}, OptionValueError, "no policy"),
        ({"policies": []}, OptionValueError, "policies"),
        ({"policies": [3]}, OptionTypeError, "3"),
        ({"policies": 3}, OptionTypeError, "policies"),
        ({"policies": b"lru"}, OptionTypeError, "policies: b'lru'.*text, not bytes"),
        ({"policies": [["lru"]]}, OptionTypeError, "policies: .'lru'.\\. Give a list of any of"),
    ],
)
def test_advice_bad_options_are_named(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        store_of(1).advise(**options)


def test_advice_endless_options_end() -> None:
    with pytest.raises(OptionValueError, match=r"sizes: count.* gives more than 10,000"):
        store_of(1).advise(sizes=itertools.count(1))
    with pytest.raises(OptionValueError, match=r"policies: repeat.*: give fewer"):
        store_of(1).advise(policies=itertools.repeat("lru"))


@pytest.mark.parametrize("option", ["sizes", "policies"])
def test_advice_error_of_an_iterable_is_its_own(option: str) -> None:
    def broken() -> Iterator[str]:
        yield "1 KB"
        raise TypeError("no more")

    with pytest.raises(TypeError, match="no more"):
        store_of(1).advise(**{option: broken()})  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [np.int64(500), np.float64(500), np.array([500]), 500, "500"])
def test_advice_takes_sizes_of_numpy(sizes: Any) -> None:
    store = store_of(50, max_size=1000)
    read_keys(store, list(range(50)) * 3)
    assert store.advise(sizes=sizes).sizes.tolist() == [500]


def test_advice_of_values_that_expire_counts_no_hits_that_nothing_had_given() -> None:
    from zcache.testing import FakeClock

    clock = FakeClock()
    store = store_of(50, max_age_seconds=10, clock=clock)
    for _ in range(4):
        read_keys(store, range(50))
        clock.advance(20)
    advice = store.advise()
    assert advice.best_hit_ratio == advice.hit_ratio == 0
    assert advice.cold_share == pytest.approx(0.25)


def test_advice_changes_nothing() -> None:
    store = store_of(50, max_size=2000)
    read_keys(store, list(range(50)) * 3)
    before = store.cache_stats(), store.cache_info()
    first, second = store.advise(), store.advise()
    assert (store.cache_stats(), store.cache_info()) == before
    assert str(first) == str(second)


async def test_advice_goes_on_beside_an_event_loop() -> None:
    store = store_of(50, max_size=2000)
    await asyncio.to_thread(read_keys, store, list(range(50)) * 3)
    assert await asyncio.to_thread(store.advise)


# --------------------------------------------------------------------------- how it is shown


@pytest.fixture
def advice() -> Advice:
    store = store_of(200, max_size=100 * SIZE)
    rng = np.random.default_rng(3)
    read_keys(store, rng.integers(0, 200, 1500).tolist())
    return store.advise()


def test_text_has_a_line_for_each_size(advice: Advice) -> None:
    lines = str(advice).splitlines()
    assert "1,500 requests (all of them)" in lines[0]
    table = lines[2 : 3 + len(advice.sizes)]
    assert table[0].split()[:4] == ["size", "lru", "none", "adaptive"]
    assert len({len(line) for line in table}) == 1
    assert sum("* 9.77 KiB" in line for line in table) == 1
    assert "90 % of what can be had" in str(advice)
    assert "cold" in lines[-1]


def test_html_has_the_table_and_the_curves(advice: Advice) -> None:
    root = ET.fromstring(advice._repr_html_())
    drawing = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f".//{drawing}polyline")
    assert len(lines) == len(advice.curves)
    for line in lines:
        assert len(line.attrib["points"].split()) == len(advice.sizes)
    assert len(root.findall(".//tbody/tr")) == len(advice.sizes)
    assert len(root.findall(".//thead/tr/th")) == 3 + len(advice.curves)


def test_html_of_one_size(advice: Advice) -> None:
    store = store_of(10)
    read_keys(store, list(range(10)) * 20)
    ET.fromstring(store.advise(sizes=[0])._repr_html_())
    ET.fromstring(store.advise(sizes=[0, 500])._repr_html_())


def test_plot_draws_each_curve_with_its_band(advice: Advice) -> None:
    axes = MagicMock()
    axes.plot.side_effect = lambda *_, **__: (MagicMock(),)
    assert advice.plot(axes) is axes
    assert [call.kwargs["label"] for call in axes.plot.call_args_list] == list(advice.curves)
    for call, curve in zip(axes.plot.call_args_list, advice.curves.values(), strict=True):
        assert list(call.args[0]) == list(advice.sizes)
        assert list(call.args[1]) == list(curve.hit_ratio)
    assert axes.fill_between.call_count == len(advice.curves)
    axes.axvline.assert_called_once()


def test_plot_shows_the_names_of_its_axes(advice: Advice) -> None:
    pytest.importorskip("matplotlib").use("agg")
    axes = advice.plot()
    figure = axes.figure
    figure.draw_without_rendering()
    for label in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels()):
        shown = label.get_window_extent()
        assert shown.x0 >= 0
        assert shown.y0 >= 0


SOME_SIZES: list[tuple[Any, int]] = [
    (None, 5),
    (range(1000, 60_001, 1000), 5),
    ([0, "1kB", "20kB", "1MB"], 3),
    ([10_000, 10_001, "1GB"], 2),
    ([10_000], 1),
    ([0], 1),
]
"""Sizes, and how many of them a drawing has room to name."""


@pytest.mark.parametrize(("sizes", "count"), SOME_SIZES)
def test_html_labels_keep_their_distance(sizes: Any, count: int) -> None:
    store = store_of(20, max_size=10 * SIZE)
    read_keys(store, list(range(20)) * 8)
    root = ET.fromstring(store.advise(sizes=sizes)._repr_html_())
    labels = root.findall(".//{http://www.w3.org/2000/svg}text[@text-anchor='middle']")
    at = [float(label.attrib["x"]) for label in labels]
    assert len(at) == count
    assert (np.diff(at) >= 60).all()


def test_html_has_a_place_for_no_size_beside_the_smallest() -> None:
    store = store_of(20, max_size=10 * SIZE)
    read_keys(store, list(range(20)) * 8)
    root = ET.fromstring(store.advise(sizes=[0, 1024, 4096])._repr_html_())
    line = root.find(".//{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    at = [float(point.partition(",")[0]) for point in line.attrib["points"].split()]
    assert at == [40, 180, 460]


@pytest.mark.parametrize(("sizes", "_"), SOME_SIZES)
def test_plot_labels_keep_their_distance(sizes: Any, _: int) -> None:
    pytest.importorskip("matplotlib").use("agg")
    store = store_of(20, max_size=10 * SIZE)
    read_keys(store, list(range(20)) * 8)
    axes = store.advise(sizes=sizes).plot()
    axes.figure.draw_without_rendering()
    shown = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(shown))
    assert axes.get_xscale() == ("symlog" if axes.lines[0].get_xdata()[0] == 0 else "log")


@pytest.mark.parametrize("ax", ["axes", 5, [None]])
def test_plot_on_what_are_no_axes_names_it(advice: Advice, ax: object) -> None:
    with pytest.raises(OptionTypeError, match=re.escape(f"ax: {ax!r}. Give matplotlib's Axes")):
        advice.plot(ax)


def test_plot_without_matplotlib_names_the_way_out(
    advice: Advice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingClientError, match=r"zarr-zcache\[plot\]"):
        advice.plot()
