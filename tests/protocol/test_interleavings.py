"""Every order in which the steps of two or three operations can happen, and every cancellation.

After each step: the index is sound, no byte is in the cache store that it does not count, the bound
holds, and while no write is under way, what is cached is what the source holds. A read gives the value of
a write that it overlaps, or of the last one that returned before it began. At the end no operation waits,
no reservation and no flight is left, and the index equals what the cache store holds.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest

from doubles import DictStore
from exploring import explore
from schedules import Op, Scenario, get, put
from support import buf, check_same, read, read_through
from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import Callable

OLD, NEW, LONG = b"abcd", b"1234", b"567890"
SOURCE = {"a": OLD, "b": b"bbbb", "c": b"cc", "g/a": OLD, "g/b": b"gg"}
MIDDLE, TAIL, END = RangeByteRequest(1, 3), OffsetByteRequest(2), SuffixByteRequest(2)
PAST = RangeByteRequest(2, 6)
REQUESTS: list[ByteRequest] = [MIDDLE, TAIL, END, PAST]
WARM = (get("a"),)
MISSED = (*WARM, get("missing"))
BATCH = Op("get_partial_values", what=(("a", MIDDLE), ("a", MIDDLE), ("a", TAIL)))


def named(*scenarios: Scenario) -> list[object]:
    """Parameters with names that tell them apart."""

    def text(op: Op) -> str:
        what = "" if op.what is None else getattr(op.what, "__class__", type).__name__[:6]
        return f"{op.method} {op.key} {what}".strip().replace(" ", "_")

    def name(scenario: Scenario) -> str:
        warm = "warm-" if scenario.warm else ""
        bound = "" if scenario.max_size is None else f"-{scenario.max_size}"
        return warm + "-".join(map(text, scenario.ops)) + bound

    return [pytest.param(scenario, id=name(scenario)) for scenario in scenarios]


def scenario(*ops: Op, **more: Any) -> Scenario:
    return Scenario(ops, SOURCE, **more)


PAIRS = named(
    scenario(get("a"), get("a")),
    scenario(get("a"), put("a", LONG)),
    scenario(get("a"), put("a", NEW), warm=WARM),
    scenario(get("missing"), put("missing", NEW)),
    scenario(get("missing"), put("missing", NEW), warm=MISSED),
    scenario(get("missing", MIDDLE), Op("invalidate", "missing"), warm=MISSED),
    scenario(get("missing"), Op("invalidate", "missing")),
    scenario(get("missing"), get("missing", TAIL)),
    scenario(Op("exists", "missing"), put("missing", NEW), warm=MISSED),
    scenario(get("missing"), Op("delete", "missing"), warm=MISSED),
    scenario(get("g/missing"), Op("delete_dir", "g"), warm=(*WARM, get("g/missing"))),
    scenario(get("a"), Op("invalidate"), warm=WARM),
    scenario(put("a", NEW), Op("invalidate", "a"), warm=WARM),
    scenario(put("a", NEW), put("a", LONG)),
    scenario(put("a", NEW), put("a", LONG), warm=WARM),
    scenario(get("a"), Op("delete", "a")),
    scenario(get("a"), Op("delete", "a"), warm=WARM),
    scenario(put("a", NEW), Op("delete", "a"), warm=WARM),
    scenario(get("g/a"), Op("delete_dir", "g")),
    scenario(put("g/a", NEW), Op("delete_dir", "g"), warm=(get("g/a"), get("g/b"))),
    scenario(get("a"), Op("clear")),
    scenario(get("a"), Op("clear_cache"), warm=WARM),
    scenario(put("a", NEW), Op("clear_cache"), warm=WARM),
    scenario(get("a"), Op("set_if_not_exists", "a", NEW)),
    scenario(get("missing"), Op("set_if_not_exists", "missing", NEW)),
    # Room for one of two.
    scenario(get("a"), get("b"), warm=(get("c"),), max_size=5),
    scenario(get("a"), put("b", NEW), warm=(get("c"),), max_size=6),
    scenario(put("a", NEW), put("b", NEW), warm=(get("c"),), max_size=6),
    scenario(put("a", LONG), get("b"), warm=WARM, max_size=6),
    # Ranges beside the whole value, and instead of it.
    scenario(get("a", MIDDLE), get("a")),
    scenario(get("a", MIDDLE), put("a", LONG)),
    scenario(get("a", END), put("a", LONG)),
    scenario(get("a", MIDDLE), put("a", LONG), warm=WARM),
    scenario(get("a", TAIL), put("a", LONG), warm=WARM),
    scenario(get("a", END), put("a", LONG), warm=WARM),
    scenario(get("a", PAST), put("a", LONG), warm=WARM),
    scenario(get("a", OffsetByteRequest(3)), put("a", LONG), warm=(get("a", TAIL),)),
    scenario(get("a", SuffixByteRequest(1)), put("a", LONG), warm=(get("a", END),)),
    scenario(get("a", MIDDLE), Op("delete", "a"), warm=(get("a", MIDDLE),)),
    # Several in one call, one of them twice.
    scenario(BATCH, put("a", LONG), coarse=True),
    scenario(BATCH, get("a"), coarse=True),
    scenario(BATCH, Op("delete", "a"), warm=(get("a", MIDDLE),), coarse=True),
    scenario(BATCH, BATCH, max_size=3, coarse=True),
)

TRIPLES = named(
    scenario(get("a"), get("a"), get("a")),
    scenario(get("a"), put("a", LONG), get("a")),
    scenario(put("a", NEW), put("a", LONG), get("a")),
    scenario(get("a"), put("a", NEW), Op("delete", "a")),
    scenario(get("g/a"), put("g/a", NEW), Op("delete_dir", "g")),
    # There are too many of these: the points after the effects are left out.
    scenario(get("a"), put("a", NEW), get("a"), warm=WARM, coarse=True),
    scenario(get("a", MIDDLE), put("a", LONG), get("a"), coarse=True),
    scenario(get("a", END), put("a", LONG), get("a", END), warm=WARM, coarse=True),
    scenario(put("a", NEW), put("a", LONG), Op("delete", "a"), warm=WARM, coarse=True),
    scenario(get("a"), put("a", LONG), Op("clear_cache"), warm=WARM, coarse=True),
    scenario(
        get("missing"), put("missing", LONG), Op("invalidate", "missing"), warm=MISSED, coarse=True
    ),
    scenario(get("missing"), put("missing", LONG), Op("delete", "missing"), coarse=True),
    scenario(get("a"), get("b"), get("c"), max_size=5, coarse=True),
    scenario(get("a"), put("b", NEW), Op("delete", "c"), max_size=5, warm=WARM, coarse=True),
)
CANCELLED = named(
    scenario(get("a"), get("a"), get("a"), coarse=True),
    scenario(get("a"), put("a", NEW), put("a", LONG), coarse=True),
    scenario(get("a"), put("a", NEW), Op("delete", "a"), coarse=True),
    scenario(get("a"), get("b"), get("c"), max_size=5, coarse=True),
)


@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("played", PAIRS)
async def test_two_operations_in_every_order_keep_all_invariants(
    played: Scenario, pool: bool
) -> None:
    explored = await explore(replace(played, pool=pool))
    assert explored.schedules > 1


@pytest.mark.slow
@pytest.mark.parametrize("played", TRIPLES)
async def test_three_operations_in_every_order_keep_all_invariants(played: Scenario) -> None:
    explored = await explore(replace(played, coarse=True))
    assert explored.schedules > 10


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("played", CANCELLED)
async def test_three_operations_one_cancelled_anywhere_keep_all_invariants(
    played: Scenario,
) -> None:
    # Reads of three keys have more points than any other three: a cancellation alone, there.
    turns = () if len({op.key for op in played.ops}) == len(played.ops) else (1,)
    await explore(played.with_cancels(1, turns=turns))


@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("played", PAIRS)
async def test_two_operations_one_cancelled_anywhere_keep_all_invariants(
    played: Scenario, pool: bool
) -> None:
    # Each fill is two more points in each order: without those after the effects, there are few enough.
    await explore(replace(played, coarse=True, pool=pool).with_cancels(1, turns=(1,)))


@pytest.mark.slow
@pytest.mark.parametrize("played", PAIRS[:12])
async def test_two_operations_both_cancelled_anywhere_keep_all_invariants(played: Scenario) -> None:
    await explore(replace(played, coarse=True).with_cancels(2, turns=()))


@pytest.mark.parametrize(
    "op",
    [
        get("a"),
        get("a", MIDDLE),
        put("a", LONG),
        Op("set_if_not_exists", "missing", NEW),
        Op("delete", "b"),
        Op("delete_dir", "g"),
        Op("clear"),
        Op("clear_cache"),
        Op("invalidate", "g"),
        Op("exists", "missing"),
        get("missing"),
    ],
    ids=lambda op: f"{op.method}_{op.key}",
)
async def test_operation_cancelled_after_any_turn_keeps_all_invariants(op: Op) -> None:
    """Between any two turns, so also where an operation has ended and its caller has not heard."""
    warm = (get("b"), get("g/a"))
    played = Scenario((op,), SOURCE, warm=warm, max_size=10, cancels=1, turns=tuple(range(8)))
    await explore(played)


async def test_explorer_that_prunes_loses_no_outcome() -> None:
    """The short cut of the scheduler, to follow each state once, loses no outcome."""
    for ops in [(get("a"), put("a", LONG)), (put("a", NEW), Op("delete", "a"))]:
        short = await explore(scenario(*ops))
        full = await explore(scenario(*ops), prune=False)
        assert full.schedules > short.schedules
        assert full.ends == short.ends


# ------------------------------------------------------------------ many at once


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cancel", [False, True])
async def test_many_operations_in_random_order_keep_all_invariants(
    seed: int, cancel: bool, pool: bool
) -> None:
    """What is too much to try exhaustively: a dozen operations, in orders drawn by chance."""
    choose = random.Random(seed).choice
    keys = ["a", "b", "c", "g/a", "g/b"]
    make: list[Callable[[str], Op]] = [
        get,
        get,
        lambda key: get(key, choose(REQUESTS)),
        lambda key: put(key, choose([OLD, NEW, LONG, b""])),
        lambda key: Op("delete", key),
        lambda key: Op("delete_dir", choose(["g", "h"])),
        lambda key: Op("clear_cache"),
    ]
    ops = tuple(choose(make)(choose(keys)) for _ in range(12))
    played = Scenario(ops, SOURCE, max_size=10, cancels=3 if cancel else 0, pool=pool)
    await explore(played, draw=choose, schedules=15)


async def test_hundreds_of_fills_and_writes_stay_within_a_small_bound() -> None:
    source = DictStore({f"k{n}": bytes([n]) * (10 + n) for n in range(100)})

    class Slow(DictStore):
        async def before(self, operation: str, key: str) -> None:
            for _ in range(len(key) + len(operation) % 3):
                await asyncio.sleep(0)

    cache = Slow()
    store = CacheStore(source, cache_store=cache, max_size=500)
    work = [read(store, f"k{n % 100}") for n in range(300)]
    work += [store.set(f"k{n % 100}", buf(bytes(n % 90))) for n in range(300)]
    await asyncio.gather(*work)
    for n in range(100):
        await read_through(store, f"k{n}")
    assert 0 < cache.peak <= 500
    assert store.cache_stats()["evictions"] > 0
    await check_same(store, source, cache)
