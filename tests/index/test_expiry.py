"""What is too old for everybody goes first, in each kind of cache store, under each policy."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import MemoryStore

from pools import CACHES, POOL_PATHS, one_of
from support import buf, check_quiet, read_through
from zcache import CachePool, CacheStore
from zcache._backends.directory import recovery
from zcache._core import POLICIES, Index
from zcache.testing import FakeClock, stored_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from zarr.abc.store import Store

cache = one_of(CACHES)
where = one_of(POOL_PATHS)
OPEN: Any = {"max_age_seconds": 60}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def over(pool: Store | CachePool, name: str, clock: FakeClock, **options: Any) -> CacheStore:
    source = MemoryStore({f"{name}{n}": buf(bytes(10)) for n in range(100)})
    return CacheStore(source, cache_store=pool, source_id=name, clock=clock, **options)


async def read_all(store: CacheStore, *keys: str) -> None:
    for key in keys:
        await read_through(store, key)


@pytest.mark.parametrize("eviction", POLICIES)
async def test_what_is_too_old_makes_room_on_each_of_several_days(
    cache: Store | CachePool, clock: FakeClock, eviction: Any
) -> None:
    store = over(cache, "k", clock, max_size=50, eviction=eviction, max_age_seconds=60)
    await read_all(store, *(f"k{n}" for n in range(8)))
    for day in range(3):
        clock.advance(61)
        today = [f"k{n}" for n in range(10 * day + 10, 10 * day + 15)]
        await read_all(store, *today)
        assert sorted(stored_sizes(store)) == today
        before = store.cache_stats()
        await read_all(store, *today)
        assert store.cache_stats()["hits"] - before["hits"] == 5
    assert store.cache_stats()["expirations"] == 15
    await check_quiet(store)


@pytest.mark.parametrize("eviction", POLICIES)
async def test_pool_what_is_too_old_for_its_source_goes_before_what_is_older_and_of_use(
    where: Path | None, clock: FakeClock, eviction: Any
) -> None:
    pool = CachePool(where, max_size=60, eviction=eviction)
    always, briefly = over(pool, "a", clock), over(pool, "b", clock, **OPEN)
    longer = over(pool, "c", clock, max_age_seconds=600)
    await read_all(always, "a0", "a1")
    await read_all(longer, "c0", "c1")
    clock.advance(10)
    await read_all(briefly, "b0", "b1")
    clock.advance(61)
    await read_all(always, "a2", "a3")
    assert sorted(stored_sizes(always)) == ["a0", "a1", "a2", "a3"]
    assert sorted(stored_sizes(longer)) == ["c0", "c1"]
    assert not stored_sizes(briefly)
    clock.advance(600)
    await read_all(briefly, "b2", "b3")
    assert sorted(stored_sizes(always)) == ["a0", "a1", "a2", "a3"]
    assert not stored_sizes(longer)
    await check_quiet(briefly)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_age_seconds": 600},
        {**OPEN, "stale_if_error": 600},
        {**OPEN, "offline": True},
        {**OPEN, "revalidate": True},
        {**OPEN, "metadata_max_age_seconds": 600},
    ],
    ids=str,
)
async def test_pool_what_another_store_of_the_source_may_serve_is_of_use(
    where: Path | None, clock: FakeClock, options: dict[str, Any]
) -> None:
    pool = CachePool(where, max_size=20, eviction="none")
    store = over(pool, "a", clock, **OPEN)
    other: CacheStore | None = over(pool, "a", clock, **options)
    await read_all(store, "a0", "a1")
    clock.advance(61)
    await read_all(store, "a2")
    assert sorted(stored_sizes(store)) == ["a0", "a1"]
    del other
    await read_all(store, "a2")
    assert sorted(stored_sizes(store)) == ["a1", "a2"]
    await check_quiet(store)


async def test_pool_source_that_no_store_has_open_has_no_age(
    where: Path | None, clock: FakeClock
) -> None:
    pool = CachePool(where, max_size=20, eviction="none")
    store: CacheStore | None = over(pool, "a", clock, **OPEN)
    assert store
    await read_all(store, "a0", "a1")
    store.close()
    del store
    clock.advance(1000)
    other = over(pool, "b", clock, **OPEN)
    await read_all(other, "b0")
    assert not stored_sizes(other)
    again = over(pool, "a", clock, **OPEN)
    await read_all(other, "b0")
    assert sorted(stored_sizes(other)) == ["b0"]
    assert sorted(stored_sizes(again)) == ["a1"]
    await check_quiet(other)


async def test_pool_of_many_sources_finds_what_is_too_old_within_a_few_fills(
    where: Path | None, clock: FakeClock
) -> None:
    pool = CachePool(where, max_size=400, eviction="none")
    ages = [60 if n == 31 else 1000 for n in range(40)]
    stores = [over(pool, f"{n:02}-", clock, max_age_seconds=age) for n, age in enumerate(ages)]
    for n, store in enumerate(stores):
        await read_all(store, f"{n:02}-0")
    clock.advance(61)
    # Each looks at eight sources of those with an age, and the next one goes on from there.
    for n in range(1, 6):
        await read_all(stores[0], f"00-{n}")
    assert not stored_sizes(stores[31])
    assert len(stored_sizes(stores[0])) == 2
    await check_quiet(stores[0])


async def test_pool_by_several_clocks_has_no_ages(where: Path | None, clock: FakeClock) -> None:
    pool = CachePool(where, max_size=20, eviction="none")
    store = over(pool, "a", clock, **OPEN)
    other = over(pool, "b", FakeClock(), **OPEN)
    await read_all(store, "a0", "a1")
    clock.advance(61)
    await read_all(store, "a2")
    assert sorted(stored_sizes(store)) == ["a0", "a1"]
    await check_quiet(other)


def test_index_that_is_told_of_no_label_says_so() -> None:
    index = Index(sources=True)
    with pytest.raises(ValueError, match="is no label of a source"):
        index.set_limits(None, None, "never", False, [("a", 1.0)])


# ------------------------------------------------------------------------- other processes

OTHER = """
import asyncio, json, sys
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore
from zcache import CachePool, CacheStore
from zcache.testing import FakeClock, set_block_size

set_block_size(1)
place = (CachePool if sys.argv[2] == "pool" else LocalStore)(sys.argv[1])
clock, held = FakeClock(), {}
source = MemoryStore({f"{name}{n}": cpu.Buffer.from_bytes(bytes(10)) for name in "ab" for n in range(9)})

async def read(store, key):
    await store.get(key, default_buffer_prototype())
    assert await store.drain()

print("null", flush=True)
for line in sys.stdin:
    what, name, value = json.loads(line)
    if what == "open":
        options = {"eviction": "none", "max_size": 20, "clock": clock, "max_age_seconds": value}
        held[name] = CacheStore(source, cache_store=place, source_id=name, **options)
    elif what == "drop":
        del held[name]
    else:
        clock.advance(value)
        asyncio.run(read(held[name], name + what))
    print("null", flush=True)
"""


@contextmanager
def other_process(path: Path, kind: str) -> Iterator[tuple[Callable[..., None], Any]]:
    """Another process, which is told of stores to open and to drop, and of keys to read once some seconds have passed."""
    command = [sys.executable, "-c", OTHER, str(path), kind]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        said = process.stdout

        def tell(what: str, name: str, value: Any = 0) -> None:
            print(json.dumps([what, name, value]), file=process.stdin, flush=True)
            assert json.loads(said.readline()) is None

        assert json.loads(said.readline()) is None
        yield tell, process
        process.stdin.close()


@pytest.mark.parametrize("kind", ["directory", "pool"])
async def test_value_that_another_process_may_serve_is_of_use(
    tmp_path: Path, clock: FakeClock, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = CACHES[kind](tmp_path / "cache")
    store = over(place, "a", clock, eviction="none", max_size=20, **OPEN)
    await read_all(store, "a0", "a1")
    with other_process(tmp_path / "cache", kind) as (tell, process):
        for age in (600, "infinity"):
            tell("open", "a", age)
            clock.advance(200)
            await read_all(store, "a2")
            assert sorted(stored_sizes(store)) == ["a0", "a1"]
            tell("drop", "a")
        tell("open", "a", "infinity")
        process.kill()
        process.wait()
    # A fill takes over from the dead, and the next one knows.
    monkeypatch.setattr(recovery, "RECLAIM_EVERY", 0)
    await read_all(store, "a2", "a2")
    assert sorted(stored_sizes(store)) == ["a1", "a2"]
    await check_quiet(store)


async def test_pool_what_is_too_old_in_another_process_goes_first_here(
    tmp_path: Path, clock: FakeClock
) -> None:
    pool = CachePool(tmp_path / "cache", max_size=20, eviction="none")
    store = over(pool, "a", clock, **OPEN)
    await read_all(store, "a0", "a1")
    with other_process(tmp_path / "cache", "pool") as (tell, _):
        # It does not have that source open.
        tell("open", "b", "infinity")
        tell("0", "b", 59)
        assert sorted(stored_sizes(store)) == ["a0", "a1"]
        tell("1", "b", 1)
        assert sorted(stored_sizes(store)) == ["a1"]
    await check_quiet(store)
