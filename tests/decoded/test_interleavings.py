"""Every order in which the steps of decodes and of changes can happen, and every cancellation.

What holds is what holds for bytes, see `tests/protocol/test_interleavings.py`: a decoded read gives the value of a write that
it overlaps, or of the last one that returned before it began.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from exploring import explore
from schedules import Op, Scenario, decode, get, put

if TYPE_CHECKING:
    from collections.abc import Callable

OLD, NEW, LONG = b"abcd", b"1234", b"567890"
SOURCE = {"a": OLD, "b": b"bbbb", "c": b"cc", "g/a": OLD, "g/b": b"gg"}
WARM = (decode("a"),)


def scenario(*ops: Op, **more: Any) -> Scenario:
    return Scenario(ops, SOURCE, **more)


PAIRS = [
    scenario(decode("a"), decode("a")),
    scenario(decode("a"), get("a")),
    scenario(decode("a"), put("a", NEW)),
    scenario(decode("a"), put("a", NEW), warm=WARM),
    scenario(decode("a"), Op("delete", "a"), warm=WARM),
    scenario(decode("g/a"), Op("delete_dir", "g"), warm=(decode("g/a"),)),
    scenario(decode("a"), Op("clear"), warm=WARM),
    scenario(decode("a"), Op("clear_cache"), warm=WARM),
    scenario(decode("missing"), put("missing", NEW)),
    scenario(decode("a"), Op("set_if_not_exists", "a", NEW), warm=WARM),
    # Not kept encoded.
    scenario(decode("a"), put("a", NEW), warm=WARM, max_size=0),
    scenario(decode("a"), put("b", NEW), warm=(decode("b"), decode("c")), max_size=6, coarse=True),
]


@pytest.mark.parametrize(
    "played", PAIRS, ids=lambda played: "-".join(op.method for op in played.ops)
)
async def test_decode_and_another_operation_in_every_order_keep_all_invariants(
    played: Scenario,
) -> None:
    explored = await explore(played)
    assert explored.schedules > 1


TRIPLES = [
    scenario(decode("a"), put("a", NEW), decode("a")),
    scenario(decode("a"), put("a", NEW), decode("a"), max_size=0),
    scenario(decode("a"), Op("delete", "a"), decode("a"), warm=WARM),
    scenario(decode("a"), decode("a"), Op("clear_cache")),
]


@pytest.mark.parametrize(
    "played", TRIPLES, ids=lambda played: "-".join(op.method for op in played.ops)
)
async def test_decodes_around_a_change_in_random_order_keep_all_invariants(
    played: Scenario,
) -> None:
    await explore(played, draw=random.Random(0).choice, schedules=150)


@pytest.mark.slow
@pytest.mark.parametrize(
    "played", PAIRS, ids=lambda played: "-".join(op.method for op in played.ops)
)
async def test_decode_cancelled_anywhere_keeps_all_invariants(played: Scenario) -> None:
    await explore(replace(played, coarse=True).with_cancels(1, turns=(1,)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cancel", [False, True])
async def test_many_decodes_and_changes_in_random_order_keep_all_invariants(
    seed: int, cancel: bool
) -> None:
    choose = random.Random(seed).choice
    keys = ["a", "b", "c", "g/a", "g/b"]
    make: list[Callable[[str], Op]] = [
        decode,
        decode,
        decode,
        get,
        lambda key: put(key, choose([OLD, NEW, LONG, b""])),
        lambda key: Op("delete", key),
        lambda key: Op("delete_dir", choose(["g", "h"])),
        lambda key: Op("clear_cache"),
    ]
    ops = tuple(choose(make)(choose(keys)) for _ in range(12))
    played = Scenario(ops, SOURCE, max_size=choose([10, None]), cancels=3 if cancel else 0)
    await explore(played, draw=choose, schedules=12)
