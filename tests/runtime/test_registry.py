"""Objects that are kept weakly are gone through while others are added."""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import MemoryStore

from support import buf
from zcache import CachePool, CacheStore
from zcache._runtime.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable


MOST = 30
"""Times that something is done between the lines of one work."""


class Thing:
    """What is equal to all others, and has no hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    __hash__ = None  # type: ignore[assignment]


def between_steps(work: Callable[[], object], act: Callable[[], object]) -> int:
    """Do the work, and act between the lines of it by which objects that are kept weakly are gone through."""
    acted = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal acted
        name = Path(frame.f_code.co_filename).name
        is_it = name in ("weakref.py", "_weakrefset.py", "registry.py") and (
            frame.f_code.co_name in ("__iter__", "values", "snapshot", "<listcomp>")
        )
        if event == "line" and is_it and acted < MOST:
            acted += 1
            act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return acted


def test_registry_knows_objects_by_identity_as_long_as_they_live() -> None:
    one, other = Thing(), Thing()
    registry = Registry([one])
    registry.add(one)
    assert one in registry
    assert other not in registry
    registry.add(other)
    assert [id(thing) for thing in registry.snapshot()] == [id(one), id(other)]
    del one
    assert len(registry) == 1
    assert registry
    other.itself = other  # type: ignore[attr-defined]
    del other
    gc.collect()
    assert not registry
    assert registry.snapshot() == []


def test_registry_is_gone_through_while_others_are_added_and_end() -> None:
    things = [Thing() for _ in range(100)]
    registry = Registry(things)

    def act() -> None:
        things.append(Thing())
        registry.add(things[-1])
        del things[0]

    found: list[Thing] = []
    assert between_steps(lambda: found.extend(registry.snapshot()), act) > 0
    assert found
    del found[:]
    assert len(registry) == len(things)


@pytest.mark.parametrize("kind", ["memory", "pool", "pool in memory"])
@pytest.mark.parametrize("work", ["a write", "a store", "a pool", "an index"])
def test_stores_are_made_while_others_over_their_place_go_on(
    tmp_path: Path, kind: str, work: str
) -> None:
    source = MemoryStore()
    kept: list[object] = []

    def pool() -> CachePool:
        return CachePool(tmp_path if kind == "pool" else None, max_size="1MB")

    cache: Any = MemoryStore() if kind == "memory" else pool()

    def make() -> CacheStore:
        if kind == "pool":
            # Each is of the one pool of the directory.
            kept.append(pool())
        kept.append(
            CacheStore(source, cache_store=cache, source_id="s", max_size=1000, decoded_size=1000)
        )
        return kept[-1]  # type: ignore[return-value]

    store = make()
    make()
    whole: Any = store._cache.shared.handle
    whole = cache._pool.handle if isinstance(cache, CachePool) else whole
    do: dict[str, Callable[[], object]] = {
        "a write": lambda: asyncio.run(store.set("k", buf(b"1"))),
        "a store": make,
        "a pool": lambda: kept.append(pool()),
        "an index": lambda: setattr(whole, "index", whole.empty_index()),
    }
    # A pool in memory is one of its own.
    assert between_steps(do[work], make) or (work == "a pool" and kind != "pool")
    asyncio.run(store.set("k", buf(b"2")))
    assert source._store_dict["k"].to_bytes() == b"2"
