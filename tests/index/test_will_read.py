"""Plans of what will be read: how near to Belady, when they are dropped, and that they change nothing else."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import queue
import random
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

from agent import Agent
from directories import open_store
from forks import run
from pools import CACHES, one_of
from support import buf, check_quiet, fill, read, read_through, threads, until, value_sync
from zcache import CachePool, CacheStore, OptionTypeError
from zcache._core import POLICIES
from zcache.testing import StoreDouble, check_index, entries, stored_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from pathlib import Path

    from zarr.abc.store import Store

SIZE = 10
COUNT = 100


cache = one_of(CACHES)


def source_of(count: int = COUNT) -> StoreDouble:
    return source_of_sizes([SIZE] * count)


def source_of_sizes(sizes: Sequence[int]) -> StoreDouble:
    return StoreDouble(MemoryStore({key_of(n): buf(bytes(s)) for n, s in enumerate(sizes)}))


def key_of(number: int) -> str:
    return f"a/c/{number}"


def keys_of(order: Sequence[int]) -> list[str]:
    return [key_of(n) for n in order]


def loops(epochs: int, count: int = COUNT) -> list[int]:
    return list(range(count)) * epochs


def shuffled(epochs: int, count: int = COUNT, seed: int = 1) -> list[int]:
    chance = random.Random(seed)
    return [n for _ in range(epochs) for n in chance.sample(range(count), count)]


def next_uses(order: Sequence[Hashable]) -> list[int]:
    """Where the key of each read is read next; after the last one at the end."""
    later = [len(order)] * len(order)
    seen: dict[Hashable, int] = {}
    for at in range(len(order) - 1, -1, -1):
        later[at] = seen.get(order[at], len(order))
        seen[order[at]] = at
    return later


def belady(order: Sequence[Hashable], capacity: int) -> int:
    """Hits of the optimum, which may leave values out."""
    later = next_uses(order)
    held: dict[Hashable, int] = {}
    hits = 0
    for at, key in enumerate(order):
        if key in held:
            hits += 1
        elif len(held) >= capacity:
            farthest = max(held, key=lambda other: held[other])
            if held[farthest] <= later[at]:
                continue
            del held[farthest]
        held[key] = later[at]
    return hits


def weight_of(size: int, minimise: str) -> int:
    """The room of a value for what its miss costs, where room is counted in bytes."""
    return 1 if minimise == "bytes" else size


def greedy(order: Sequence[int], sizes: Sequence[int], bound: int, minimise: str) -> list[bool]:
    """Which reads are hits where what takes the most room until its next use goes, for what its miss costs."""
    never, later = len(order), next_uses(order)
    # The next use and the last one of each.
    held: dict[int, tuple[int, int]] = {}
    hits = []

    def burden(key: int, uses: tuple[int, int], now: int) -> float:
        reads = uses[0] - now if uses[0] < never else max(never - now, now - uses[1])
        return (reads + 1) * weight_of(sizes[key], minimise)

    def chosen(now: int, missing: int) -> Iterator[tuple[float, int]]:
        classes: dict[int, list[int]] = {}
        for key in sorted(held, key=lambda key: (held[key][0], -held[key][1])):
            if sizes[key]:
                classes.setdefault(weight_of(sizes[key], minimise).bit_length(), []).append(key)
        while missing > 0:
            last = (
                (burden(keys[-1], held[keys[-1]], now), keys) for keys in classes.values() if keys
            )
            worth, keys = max(last, key=lambda one: one[0])
            yield worth, keys[-1]
            missing -= sizes[keys.pop()]

    for now, key in enumerate(order, start=1):
        hits.append(key in held)
        uses = later[now - 1], now - 1
        if key not in held and sizes[key]:
            if sizes[key] > bound:
                continue
            missing = sum(sizes[other] for other in held) + sizes[key] - bound
            gone = list(chosen(now, missing))
            own = burden(key, uses, now)
            # The policy is LRU: of what is alike and has no more use, the new one is let in.
            if any(worth < own or (worth == own and uses[0] < never) for worth, _ in gone):
                continue
            spare = sum(sizes[other] for _, other in gone) - missing
            for _, other in reversed(gone):
                if sizes[other] <= spare:
                    spare -= sizes[other]
                else:
                    del held[other]
        held[key] = uses
    return hits


async def hits_of(store: CacheStore, order: Sequence[int]) -> int:
    """Read chunks one after the other, each when the one before is kept; how many were hits."""
    return sum(await each_hit_of(store, order, [SIZE] * (max(order, default=0) + 1)))


async def each_hit_of(store: CacheStore, order: Sequence[int], sizes: Sequence[int]) -> list[bool]:
    hits, before = [], store.cache_stats()["hits"]
    for n in order:
        assert await read_through(store, key_of(n)) == bytes(sizes[n])
        after = store.cache_stats()["hits"]
        hits.append(after > before)
        before = after
    return hits


def plan_of(store: CacheStore) -> str | None:
    plan = store._cache.shared.handle.plan
    return None if plan is None else plan.state


# ------------------------------------------------------------------------------- near Belady


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("share", [10, 50, 90])
@pytest.mark.parametrize("work", [loops, shuffled])
async def test_plan_of_epochs_is_served_as_belady_would(
    work: type, share: int, eviction: str
) -> None:
    order = work(6)
    store = CacheStore(source_of(), max_size=share * SIZE, eviction=eviction)
    assert store.will_read(keys_of(order)) == len(order)
    assert await hits_of(store, order) == belady(order, share)
    await check_quiet(store)
    assert plan_of(store) == "done"


@pytest.mark.parametrize("eviction", POLICIES)
async def test_plan_on_a_directory_is_served_as_belady_would(tmp_path: Path, eviction: str) -> None:
    order = shuffled(3)
    cache = LocalStore(tmp_path / "cache")
    store = CacheStore(source_of(), cache_store=cache, max_size=50 * SIZE, eviction=eviction)
    store.will_read(keys_of(order))
    hits, best = await hits_of(store, order), belady(order, 50)
    assert best - 3 <= hits <= best
    await check_quiet(store)


@pytest.mark.parametrize("eviction", POLICIES)
async def test_plan_of_each_epoch_alone_serves_the_share_that_fits(
    cache: Store | CachePool, eviction: str
) -> None:
    store = CacheStore(source_of(), cache_store=cache, max_size=50 * SIZE, eviction=eviction)
    for epoch in range(3):
        order = shuffled(1, seed=epoch)
        store.will_read(keys_of(order))
        assert await hits_of(store, order) >= (45 if epoch else 0)
    await check_quiet(store)


async def test_plan_of_what_is_there_keeps_it(cache: Store | CachePool) -> None:
    store = CacheStore(source_of(), cache_store=cache, max_size=50 * SIZE)
    await hits_of(store, range(50))
    # The first 25 were used least recently, and would go first.
    order = [*range(50, 75), *range(25)]
    store.will_read(keys_of(order))
    assert await hits_of(store, order) == 25
    assert {key_of(n) for n in order} == set(stored_sizes(store))
    await check_quiet(store)


async def test_ranges_of_a_planned_key_stay_with_it() -> None:
    store = CacheStore(source_of(), max_size=40)
    ranges = [RangeByteRequest(0, 4), RangeByteRequest(4, 10)]
    plan = [0, 1, 2, 3, 4, 5, 0]
    store.will_read(keys_of(plan))
    hits = 0
    for n in plan:
        before = store.cache_stats()["hits"]
        for part in ranges:
            await read_through(store, key_of(n), part)
        hits = store.cache_stats()["hits"] - before
    assert hits == 2
    assert plan_of(store) == "done"
    await check_quiet(store)


@pytest.mark.parametrize("eviction", POLICIES)
async def test_reads_that_leave_out_what_others_read_follow_the_plan(eviction: str) -> None:
    order = shuffled(8, 400)
    mine = order[::4]
    store = CacheStore(source_of(400), max_size=200 * SIZE, eviction=eviction)
    store.will_read(keys_of(order))
    hits = await hits_of(store, mine)
    assert plan_of(store) in ("followed", "done")
    assert hits > 0
    await check_quiet(store)


# --------------------------------------------------------------------------- varied sizes

SIZES = {
    "log-normal": lambda chance: int(chance.lognormvariate(5, 1)) + 1,
    "few and many bytes": lambda chance: chance.choice([3, 500, 500]),
    "none and some": lambda chance: chance.choice([0, 100, 100]),
    "one": lambda chance: 64,
}


def sizes_of(kind: str) -> list[int]:
    chance = random.Random(3)
    return [SIZES[kind](chance) for _ in range(COUNT)]


def favourites(epochs: int) -> list[int]:
    chance = random.Random(2)
    return [min(int(chance.paretovariate(0.6)), COUNT) - 1 for _ in range(epochs * COUNT)]


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("minimise", ["requests", "bytes"])
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("work", [loops, shuffled, favourites])
async def test_of_varied_sizes_goes_what_is_worth_least_for_its_room(
    cache: Store | CachePool,
    work: Callable[[int], list[int]],
    kind: str,
    minimise: Any,
    share: float,
) -> None:
    sizes, order = sizes_of(kind), work(4)
    bound = int(sum(sizes) * share)
    store = CacheStore(source_of_sizes(sizes), cache_store=cache, max_size=bound, minimise=minimise)
    store.will_read(keys_of(order))
    assert await each_hit_of(store, order, sizes) == greedy(order, sizes, bound, minimise)
    await check_quiet(store)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("work", [shuffled, favourites])
async def test_plan_serves_as_many_requests_as_any_policy_alone(
    work: Callable[[int], list[int]], kind: str
) -> None:
    sizes, order = sizes_of(kind), work(6)
    bound = sum(sizes) // 8
    hits = {}
    for eviction, is_told in [*((policy, False) for policy in POLICIES), ("lru", True)]:
        store = CacheStore(source_of_sizes(sizes), max_size=bound, eviction=eviction)
        if is_told:
            store.will_read(keys_of(order))
        hits[eviction, is_told] = sum(await each_hit_of(store, order, sizes))
    assert hits["lru", True] == max(hits.values()), hits


@pytest.mark.parametrize("eviction", POLICIES)
async def test_large_value_that_is_worth_less_than_any_that_would_go_takes_the_place_of_none(
    cache: Store | CachePool, eviction: str
) -> None:
    sizes = [10, 10, 10, 30]
    store = CacheStore(source_of_sizes(sizes), cache_store=cache, max_size=30, eviction=eviction)
    # One of the small ones has no more use.
    order = [0, 1, 2, 3, 1, 2, 3, 1, 2]
    store.will_read(keys_of(order))
    assert await each_hit_of(store, order, sizes) == [False] * 4 + [True, True, False, True, True]
    assert {key_of(n) for n in range(3)} == set(stored_sizes(store))
    await check_quiet(store)


@pytest.mark.parametrize("eviction", POLICIES)
async def test_values_without_bytes_stay(cache: Store | CachePool, eviction: str) -> None:
    sizes = [0] * 10 + [SIZE] * 90
    store = CacheStore(
        source_of_sizes(sizes), cache_store=cache, max_size=20 * SIZE, eviction=eviction
    )
    order = shuffled(4)
    store.will_read(keys_of(order))
    hits = await each_hit_of(store, order, sizes)
    missed = [n for n, is_hit in zip(order, hits, strict=True) if not is_hit and n < 10]
    assert sorted(missed) == list(range(10))
    await check_quiet(store)


# ----------------------------------------------------------------- beside what is in no plan


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("plan", ["each epoch", "all epochs"])
async def test_hot_keys_beside_a_plan_stay(
    cache: Store | CachePool, plan: str, eviction: str
) -> None:
    hot = range(COUNT, COUNT + 4)
    store = CacheStore(
        source_of(COUNT + 4), cache_store=cache, max_size=30 * SIZE, eviction=eviction
    )
    epochs = [shuffled(1, seed=seed) for seed in range(5)]
    if plan == "all epochs":
        store.will_read(keys_of([n for epoch in epochs for n in epoch]))
    hits = hot_hits = 0
    for epoch in epochs:
        if plan == "each epoch":
            store.will_read(keys_of(epoch))
        for n in epoch:
            hot_hits += await hits_of(store, [hot[n // 25]])
            hits += await hits_of(store, [n])
    # Each is read first once, and anew where a plan begins and nothing is known of it.
    assert hot_hits >= 5 * COUNT - 4 * 2 * 5
    assert hits >= 4 * 26 - 10
    await check_quiet(store)


@pytest.mark.parametrize("eviction", POLICIES)
async def test_key_that_becomes_hot_beside_a_plan_comes_in_and_goes_again(eviction: str) -> None:
    order = shuffled(6)
    store = CacheStore(source_of(COUNT + 2), max_size=30 * SIZE, eviction=eviction)
    store.will_read(keys_of(order))
    hits = 0
    for at, n in enumerate(order):
        await hits_of(store, [n])
        if 100 <= at < 200:
            hits += await hits_of(store, [COUNT + at % 2])
    assert hits >= 90
    assert not {key_of(n) for n in (COUNT, COUNT + 1)} & set(stored_sizes(store))
    await check_quiet(store)


# --------------------------------------------------------------------------------- dropped


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("wrong", ["other keys", "another order"])
async def test_plan_that_is_wrong_is_dropped_and_costs_nothing_then(
    wrong: str, eviction: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = [f"b/c/{n}" for n in range(1000)] if wrong == "other keys" else keys_of(loops(10)[::-1])
    order = loops(1, 60) + loops(20, 60)
    stores = [CacheStore(source_of(), max_size=50 * SIZE, eviction=eviction) for _ in range(2)]
    with caplog.at_level(logging.DEBUG, "zcache"):
        stores[1].will_read(plan)
        for store in stores:
            await hits_of(store, loops(3))
    assert plan_of(stores[1]) == "wrong"
    assert caplog.text.count("will_read() was told") == 1
    without, after = [await hits_of(store, order) for store in stores]
    assert after >= without - 50
    await check_quiet(stores[1])


async def test_what_adaptive_learns_while_a_plan_holds_serves_once_it_has_ended(
    cache: Store | CachePool,
) -> None:
    order = shuffled(5)
    store = CacheStore(source_of(), cache_store=cache, max_size=50 * SIZE, eviction="adaptive")
    store.will_read(keys_of(order))
    await hits_of(store, order)
    assert plan_of(store) == "done"
    # LRU, which it begins with, has none.
    assert await hits_of(store, loops(3)) >= 120
    await check_quiet(store)


async def test_few_other_reads_do_not_drop_a_plan() -> None:
    store = CacheStore(source_of(), max_size=50 * SIZE)
    order = shuffled(4)
    store.will_read(keys_of(order))
    for n in order:
        await read_through(store, key_of(n))
        assert await read_through(store, f"nothing/{n}") is None
    assert plan_of(store) == "done"


async def test_no_keys_forget_the_plan(cache: Store | CachePool) -> None:
    store = CacheStore(source_of(), cache_store=cache, max_size=30)
    store.will_read(keys_of([0, 1, 2, 3, 4]))
    assert plan_of(store) == "followed"
    assert store.will_read(()) == 0
    assert plan_of(store) is None
    await hits_of(store, range(5))
    assert set(stored_sizes(store)) == {key_of(n) for n in (2, 3, 4)}


# ------------------------------------------------------------------------------------ input


@pytest.mark.parametrize("keys", [["a", 5], [b"a"], [None], 7, None, "a/c/0", b"a"])
async def test_what_is_no_key_is_named_and_the_plan_before_stays(keys: object) -> None:
    store = CacheStore(source_of(), max_size=30)
    store.will_read(keys_of([0, 1, 2]))
    item = keys[-1] if isinstance(keys, list) else keys
    with pytest.raises(OptionTypeError) as error:
        store.will_read(keys)  # type: ignore[arg-type]
    assert repr(item) in str(error.value)
    assert plan_of(store) == "followed"


async def test_error_of_the_iterable_is_its_own() -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise RuntimeError("no more")

    store = CacheStore(source_of(), max_size=30)
    with pytest.raises(RuntimeError, match="no more"):
        store.will_read(broken())
    assert plan_of(store) is None


async def test_endless_iterable_is_taken_up_to_the_bound() -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        for n in itertools.count():
            taken += 1
            yield key_of(n % COUNT)

    store = CacheStore(source_of(), max_size=50 * SIZE)
    assert store.will_read(endless()) == taken == 1_000_000
    order = loops(3)
    assert await hits_of(store, order) >= belady(order, 50) - 1
    # Sixteen MB of numbers would be two for each position.
    assert store._cache.ask(lambda index: index.memory) < 17_000_000
    await check_quiet(store)
    assert store.will_read([]) == 0
    assert store._cache.ask(lambda index: index.memory) < 1_000_000


async def test_keys_that_are_no_unicode_are_let_be() -> None:
    store = CacheStore(source_of(), max_size=30)
    assert store.will_read(["\ud800", key_of(1)]) == 2
    assert await hits_of(store, [1]) == 0


# ------------------------------------------------------------------------------ beside others


def test_threads_that_overtake_each_other_follow_the_plan(cache: Store | CachePool) -> None:
    count = 400
    order = shuffled(5, count)
    store = CacheStore(source_of(count), cache_store=cache, max_size=count * SIZE // 2)
    store.will_read(keys_of(order))
    places = queue.SimpleQueue[int]()
    for n in order:
        places.put(n)
    # No thread runs ahead by more than the window, however few turns the others get.
    together = threading.Barrier(4)

    def work() -> None:
        for _ in range(len(order) // 4):
            assert value_sync(store, key_of(places.get())) == bytes(SIZE)
            together.wait()

    with threads(*[work] * 4):
        pass
    store.drain_sync()
    assert plan_of(store) in ("followed", "done")
    assert store.cache_info()["current_size"] <= count * SIZE // 2
    check_index(store)


def test_plans_that_are_made_while_threads_read_keep_all_books(cache: Store | CachePool) -> None:
    store = CacheStore(source_of(), cache_store=cache, max_size=30 * SIZE)

    def reads(seed: int) -> None:
        for n in shuffled(3, seed=seed):
            assert value_sync(store, key_of(n)) == bytes(SIZE)
            assert store.cache_info()["current_size"] <= 30 * SIZE

    def plans() -> None:
        for seed in range(20):
            store.will_read(keys_of(shuffled(2, seed=seed)))
            check_index(store)

    with threads(plans, *[lambda seed=seed: reads(seed) for seed in range(3)]):
        pass
    store.drain_sync()
    check_index(store)


async def test_clear_cache_leaves_the_plan(cache: Store | CachePool) -> None:
    order = shuffled(4)
    store = CacheStore(source_of(), cache_store=cache, max_size=50 * SIZE)
    store.will_read(keys_of(order))
    await hits_of(store, order[:150])
    await store.clear_cache()
    assert not entries(store)
    await check_quiet(store)
    rest = order[150:]
    assert await hits_of(store, rest) >= belady(rest, 50) - 3
    await check_quiet(store)


async def test_smaller_bound_keeps_what_is_needed_soonest(cache: Store | CachePool) -> None:
    store = CacheStore(source_of(), cache_store=cache, max_size=50 * SIZE)
    await hits_of(store, range(50))
    store.will_read(keys_of(range(50)))
    smaller = CacheStore(store._store, cache_store=cache, max_size=20 * SIZE)
    await read_through(smaller, key_of(0))
    if isinstance(cache, LocalStore) or getattr(cache, "path", None):
        # On a disk that is begun at once; a fill meanwhile would evict as much again.
        await until(lambda: smaller.cache_info()["current_size"] <= 20 * SIZE)
    # A bound is kept before something comes in.
    await fill(smaller, b=bytes(1))
    assert smaller.cache_info()["current_size"] <= 20 * SIZE
    assert await hits_of(smaller, range(1, 20)) >= 18
    await check_quiet(smaller)


async def test_copies_share_the_plan_of_their_process(
    cache: Store | CachePool, tmp_path: Path
) -> None:
    source = LocalStore(tmp_path / "source")
    store = CacheStore(source, cache_store=cache, max_size=50 * SIZE)
    store.will_read(keys_of(loops(2)))
    copies = [store.with_read_only(True), pickle.loads(pickle.dumps(store))]
    assert [plan_of(copy) for copy in copies] == ["followed"] * 2
    copies[0].will_read(())
    assert plan_of(store) is None


def test_copy_in_another_process_has_no_plan(tmp_path: Path) -> None:
    source, cache = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "cache")
    store = CacheStore(source, cache_store=cache, max_size=50 * SIZE)
    store.will_read(keys_of(loops(2)))
    script = "import pickle, sys; store = pickle.load(sys.stdin.buffer); "
    script += "print(store._cache.shared.handle.plan)"
    child = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(store),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert child.stdout.split() == [b"None"]
    assert plan_of(store) == "followed"


async def test_what_another_process_brings_in_is_noticed_when_it_would_go(tmp_path: Path) -> None:
    store, source = open_store(tmp_path, max_size=20 * SIZE)
    for n in range(60):
        await source.set(key_of(n), buf(bytes(SIZE)))
    order = [*range(40), *range(10, 20)]
    store.will_read(keys_of(order))
    with Agent(tmp_path, 20 * SIZE) as other:
        for n in (*range(10, 20), *range(50, 60)):
            assert other("get", key_of(n)) == "\0" * SIZE
        assert other("drain")
        # The other process has filled the cache; what is in no plan makes room.
        assert await hits_of(store, order) >= 18
        assert not {key_of(n) for n in range(50, 60)} & set(stored_sizes(store))
    await check_quiet(store)


@pytest.mark.parametrize("kind", ["pool", "memory pool"])
async def test_reads_of_other_sources_of_a_pool_neither_follow_nor_drop_a_plan(
    tmp_path: Path, kind: str
) -> None:
    pool = CACHES[kind](tmp_path / "cache")
    planned = CacheStore(source_of(), cache_store=pool, max_size=50 * SIZE, source_id="1")
    other = CacheStore(source_of(), cache_store=pool, source_id="2")
    planned.will_read(keys_of(loops(3)))
    hits = 0
    for _ in range(3):
        for n in range(COUNT):
            hits += await hits_of(planned, [n])
            assert plan_of(planned) == "followed" or n == COUNT - 1
            hits += await hits_of(other, [(n * 7) % COUNT])
    # What either source holds is needed as late as what the other one holds.
    assert hits >= belady(loops(3), 49) - 2
    assert plan_of(planned) == "done"
    for store in (planned, other):
        await check_quiet(store)


@pytest.mark.parametrize("kind", ["pool", "memory pool"])
async def test_each_source_of_a_pool_has_its_own_plan(tmp_path: Path, kind: str) -> None:
    pool = CACHES[kind](tmp_path / "cache")
    stores = [
        CacheStore(source_of(), cache_store=pool, max_size=100 * SIZE, source_id=name)
        for name in "12"
    ]
    orders = [loops(4), shuffled(4)]
    for store, order in zip(stores, orders, strict=True):
        store.will_read(keys_of(order))
    hits = [0, 0]
    for numbers in zip(*orders, strict=True):
        for at, n in enumerate(numbers):
            assert plan_of(stores[at]) == "followed"
            hits[at] += await hits_of(stores[at], [n])
    # As one plan of both would be, to a value on its way.
    both = [(at, n) for numbers in zip(*orders, strict=True) for at, n in enumerate(numbers)]
    assert sum(hits) >= belady(both, 99) - 4
    assert [plan_of(store) for store in stores] == ["done"] * 2
    for store in stores:
        await check_quiet(store)


@pytest.mark.parametrize("kind", ["pool", "memory pool"])
async def test_plan_of_a_source_ends_without_that_of_another(tmp_path: Path, kind: str) -> None:
    pool = CACHES[kind](tmp_path / "cache")
    one, two = (
        CacheStore(source_of(), cache_store=pool, max_size=50 * SIZE, source_id=name)
        for name in "12"
    )
    one.will_read(keys_of(loops(2)))
    two.will_read([f"b/c/{n}" for n in range(1000)])
    await hits_of(two, loops(2))
    assert [plan_of(one), plan_of(two)] == ["followed", "wrong"]
    two.will_read(keys_of(loops(2)))
    assert one.will_read(()) == 0
    assert [plan_of(one), plan_of(two)] == [None, "followed"]
    one.will_read(keys_of(loops(1)))
    one.will_read(keys_of(shuffled(1)))
    assert [plan_of(one), plan_of(two)] == ["followed"] * 2
    for store in (one, two):
        await check_quiet(store)


async def test_writes_of_planned_keys_are_read(cache: Store | CachePool) -> None:
    store = CacheStore(source_of(), cache_store=cache, max_size=5 * SIZE)
    store.will_read(keys_of(loops(3, 10)))
    for n in loops(3, 10):
        await read_through(store, key_of(n))
        await store.set(key_of(n), buf(b"%09d" % n))
        await store.drain()
        assert await read(store, key_of(n)) == b"%09d" % n
    await check_quiet(store)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_child_has_no_plan() -> None:
    store = CacheStore(source_of(), max_size=30)
    store.will_read(keys_of([0, 1, 2]))

    def child() -> None:
        assert plan_of(store) is None

    assert run(child) == 0
    assert plan_of(store) == "followed"
