"""The eviction policies, seen through the store: none, adaptive, and what happens where stores disagree."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

from directories import closed
from doubles import SyncDictStore
from pools import CACHES, ON_DISK, one_of
from support import buf, check_quiet, fill, read, read_through, said, until, value_sync
from zcache import CachePool, CacheStore
from zcache._core import POLICIES
from zcache._decoded.chunk import OVERHEAD
from zcache.testing import FakeClock, StoreDouble, check_index, set_block_size, stored_sizes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype


cache = one_of(CACHES)


async def source_of(count: int, size: int = 10) -> StoreDouble:
    """A source of so many chunks, which counts what reaches it."""
    source = MemoryStore()
    for n in range(count):
        await source.set(f"a/c/{n}", buf(bytes(size)))
    return StoreDouble(source)


async def hits_of(store: CacheStore, order: Sequence[int]) -> int:
    """Read chunks one after the other, each when the one before is kept; how many were hits."""
    before = store.cache_stats()["hits"]
    for n in order:
        await read_through(store, f"a/c/{n}")
    return int(store.cache_stats()["hits"] - before)


# ------------------------------------------------------------------------------------ none


async def test_none_what_came_first_stays(cache: Store | CachePool) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30, eviction="none")
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await fill(store, d=bytes(10))
    assert stored_sizes(store) == {"a": 10, "b": 10, "c": 10}
    assert bytes((await read_through(store, "d")) or b"") == bytes(10)
    assert stored_sizes(store) == {"a": 10, "b": 10, "c": 10}
    assert store.cache_stats()["evictions"] == 0
    await check_quiet(store)


async def test_none_a_write_replaces_its_own_value(cache: Store | CachePool) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30, eviction="none")
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await fill(store, b=b"1" * 8)
    assert stored_sizes(store) == {"a": 10, "b": 8, "c": 10}
    assert await read_through(store, "b") == b"1" * 8
    await check_quiet(store)


async def test_none_a_write_that_needs_more_room_than_there_is_is_not_kept(cache: Store) -> None:
    store = CacheStore(MemoryStore(), cache_store=cache, max_size=30, eviction="none")
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await fill(store, b=b"1" * 12)
    # The old value is not served any longer, and nothing that came first goes for the new one.
    assert stored_sizes(store) == {"a": 10, "c": 10}
    assert await read_through(store, "b") == b"1" * 12
    assert stored_sizes(store) == {"a": 10, "c": 10}
    assert store.cache_stats()["evictions"] == 0
    # What was left has its room again.
    await fill(store, d=bytes(10))
    assert stored_sizes(store) == {"a": 10, "c": 10, "d": 10}
    await check_quiet(store)


async def test_none_what_is_deleted_or_has_expired_makes_room() -> None:
    clock = FakeClock()
    store = CacheStore(MemoryStore(), max_size=30, eviction="none", max_age_seconds=60, clock=clock)
    await fill(store, a=bytes(10), b=bytes(10), c=bytes(10))
    await store.delete("a")
    await fill(store, d=bytes(10))
    assert stored_sizes(store) == {"b": 10, "c": 10, "d": 10}
    clock.advance(61)
    await fill(store, e=bytes(10))
    assert "e" in stored_sizes(store)
    await check_quiet(store)


async def test_none_a_smaller_bound_on_the_next_opening_evicts_what_came_last(
    tmp_path: Path,
) -> None:
    source, cache = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "cache")
    store = CacheStore(source, cache_store=cache, eviction="none")
    await fill(store, **{name: bytes(10) for name in "abcdef"})
    held = store.cache_info()["current_size"]
    store.close()
    del store
    again = CacheStore(source, cache_store=cache, max_size=held // 2, eviction="none")
    await fill(again, g=bytes(10))
    await again.drain()
    assert again.cache_info()["current_size"] <= held // 2
    assert "a" in stored_sizes(again)
    await check_quiet(again)


# ------------------------------------------------------------------- loops and shuffles


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("is_shuffled", [False, True])
async def test_epochs_in_memory_adaptive_serves_what_fits(share: float, is_shuffled: bool) -> None:
    count, epochs = 200, 8
    rng = np.random.default_rng(0)
    source = await source_of(count)
    store = CacheStore(source, max_size=int(10 * count * share), eviction="adaptive")
    hits = [
        await hits_of(store, rng.permutation(count).tolist() if is_shuffled else range(count))
        for _ in range(epochs)
    ]
    # One epoch fills the cache, one shows what the work is.
    assert all(hit >= count * share - 10 for hit in hits[3:]), hits
    await check_quiet(store)


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("factor", [2, 10])
async def test_cache_of_a_few_values_adaptive_serves_what_fits_of_a_loop(
    room: int, factor: int
) -> None:
    keys = room * factor
    store = CacheStore(await source_of(keys), max_size=10 * room, eviction="adaptive")
    await hits_of(store, list(range(keys)) * (400 // keys))
    assert await hits_of(store, list(range(keys)) * 3) >= 3 * room
    await check_quiet(store)


@pytest.mark.parametrize("eviction", POLICIES)
async def test_any_policy_keeps_bound_and_books(cache: Store | CachePool, eviction: Any) -> None:
    rng = np.random.default_rng(1)
    source = MemoryStore()
    store = CacheStore(source, cache_store=cache, max_size=100_000, eviction=eviction)
    sizes = rng.integers(0, 9000, 60)
    for n, size in enumerate(sizes):
        await source.set(f"a/c/{n}", buf(bytes(int(size))))
    for n in rng.integers(0, 60, 600):
        action = rng.random()
        if action < 0.05:
            await fill(store, **{f"a/c/{n}": bytes(int(rng.integers(0, 9000)))})
        elif action < 0.07:
            await store.delete_dir("a")
            await source.set(f"a/c/{n}", buf(bytes(5)))
        else:
            await read_through(store, f"a/c/{n}")
        assert store.cache_info()["current_size"] <= 100_000
    await check_quiet(store)


@pytest.mark.parametrize("minimise", ["requests", "bytes", "seconds"])
async def test_minimise_takes_each_of_its_values(minimise: Any) -> None:
    source = await source_of(40, 100)
    store = CacheStore(source, max_size=2000, eviction="adaptive", minimise=minimise)
    for _ in range(6):
        await hits_of(store, range(40))
    assert store.cache_stats()["hits"] > 40
    await check_quiet(store)


async def test_minimise_requests_keeps_small_values_rather_than_large_ones() -> None:
    source = MemoryStore()
    for n in range(150):
        await source.set(f"a/c/{n}", buf(bytes(100 if n < 100 else 10_000)))
    store = CacheStore(source, max_size=100_000, eviction="adaptive")
    rng = np.random.default_rng(2)
    for _ in range(20):
        await hits_of(store, rng.permutation(150).tolist())
    # All small ones take a tenth of the bytes.
    assert await hits_of(store, range(100)) >= 90


class TimedSource(MemoryStore):
    """Each read takes so many seconds, and so many more for each byte, on a clock of its own."""

    def __init__(self, latency: float, seconds_per_byte: float) -> None:
        super().__init__()
        self.latency, self.seconds_per_byte, self.now = latency, seconds_per_byte, 0.0

    def perf_counter(self) -> float:
        return self.now

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        self.now += self.latency + self.seconds_per_byte * (0 if value is None else len(value))
        return value


async def kept_of_small_and_large(
    source: TimedSource, minimise: Any, monkeypatch: pytest.MonkeyPatch
) -> dict[str, int]:
    """What a cache of 100 KB holds of 100 values of 1 KB and 50 of 10 KB, which are read three times as often."""
    monkeypatch.setattr("zcache._protocol.read.time", source)
    for n in range(150):
        await source.set(f"a/c/{n}", buf(bytes(1000 if n < 100 else 10_000)))
    store = CacheStore(source, max_size=100_000, eviction="adaptive", minimise=minimise)
    rng = np.random.default_rng(2)
    for _ in range(20):
        await hits_of(store, rng.permutation([*range(150), *range(100, 150), *range(100, 150)]))
    return stored_sizes(store)


async def test_minimise_seconds_weighs_latency_and_rate_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def kept(latency: float, seconds_per_byte: float, minimise: Any) -> dict[str, int]:
        source = TimedSource(latency, seconds_per_byte)
        return await kept_of_small_and_large(source, minimise, monkeypatch)

    # A source that takes a second for each request, and next to nothing for a byte: requests count.
    slow_to_answer = await kept(1.0, 2.0**-40, "seconds")
    assert slow_to_answer == await kept(1.0, 2.0**-40, "requests")
    # One that answers at once, and takes its time for each byte: bytes count.
    slow_to_send = await kept(0.0, 1.0, "seconds")
    assert slow_to_send == await kept(0.0, 1.0, "bytes")
    small = [sum(size == 1000 for size in kept.values()) for kept in (slow_to_answer, slow_to_send)]
    assert small[0] >= 80, small
    assert small[1] <= 20, small


async def test_decoded_chunks_go_by_the_same_policy() -> None:
    source = MemoryStore()
    data = np.arange(64 * 64, dtype="f8").reshape(64, 64)
    zarr.create_array(source, data=data, chunks=(8, 8))
    store = CacheStore(source, decoded_size=32 * (8 * 8 * 8 + OVERHEAD), eviction="none")
    array = zarr.open_array(store, mode="r")
    for _ in range(3):
        for row in range(0, 64, 8):
            assert (array[row : row + 8] == data[row : row + 8]).all()
    # What came first stays: half of all chunks, in each pass but the first one.
    assert store.cache_stats()["decoded_hits"] == 64


# --------------------------------------------------------------------- one for an index


def test_bad_policies_are_told_by_name() -> None:
    for option in ("eviction", "minimise"):
        with pytest.raises(ValueError, match=f"invalid {option}: 'no policy'"):
            CacheStore(MemoryStore(), **{option: "no policy"})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"invalid {option}: 3"):
            CacheStore(MemoryStore(), **{option: 3})  # type: ignore[arg-type]


def test_copies_have_the_same_policy() -> None:
    store = CacheStore(
        LocalStore("/nonexistent"), eviction="adaptive", minimise="bytes", source_id="one"
    )
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.eviction, copy.minimise) == ("adaptive", "bytes")


async def test_sources_of_a_pool_go_by_one_policy(tmp_path: Path) -> None:
    pool = CachePool(tmp_path / "cache", max_size=60_000)
    first = CacheStore(MemoryStore(), cache_store=pool, source_id="1", eviction="adaptive")
    with pytest.warns(UserWarning, match=r"eviction='adaptive'.*eviction='lru'"):
        second = CacheStore(MemoryStore(), cache_store=pool, source_id="2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = CacheStore(MemoryStore(), cache_store=pool, source_id="3", eviction="adaptive")
    for store in (first, second, third):
        assert store.eviction == "adaptive"
        await fill(store, **{f"k{n}": bytes(2000) for n in range(20)})
        await check_quiet(store)


async def test_another_policy_is_told_while_the_index_is_in_use(
    cache: Store | CachePool, tmp_path: Path
) -> None:
    source = LocalStore(tmp_path / "source")
    first = CacheStore(source, cache_store=cache, eviction="none")
    with pytest.warns(UserWarning, match=r"eviction='none'.*eviction='adaptive'"):
        second = CacheStore(source, cache_store=cache, eviction="adaptive")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = CacheStore(source, cache_store=cache, eviction="none")
    for store in (first, second, third):
        await check_quiet(store)


@pytest.mark.parametrize("eviction", POLICIES)
def test_another_cost_is_told_under_each_policy(eviction: Any) -> None:
    """Plans look at costs whatever the policy."""
    source, cache = MemoryStore(), MemoryStore()
    first = CacheStore(source, cache_store=cache, eviction=eviction, minimise="bytes")
    with pytest.warns(UserWarning, match=r"minimise='bytes'.*minimise='seconds'"):
        other = CacheStore(source, cache_store=cache, eviction=eviction, minimise="seconds")
    assert first.minimise == other.minimise == "bytes"


@pytest.mark.slow
def test_another_policy_is_told_by_the_log_where_the_index_answers_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does a read raise then, also where warnings are errors."""
    source, cache = MemoryStore({"k": buf(b"value")}), tmp_path / "cache"
    arguments = [sys.executable, "-c", textwrap.dedent(HOLDER), str(cache)]
    with (
        subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder,
        warnings.catch_warnings(),
    ):
        assert holder.stdin is not None
        assert holder.stdout is not None
        warnings.simplefilter("error")
        assert holder.stdout.readline() == "holds\n"
        store = CacheStore(source, cache_store=cache, source_id="source", eviction="none")
        assert value_sync(store, "k") == b"value"
        holder.stdin.write("released\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "released\n"

        def is_told() -> bool:
            assert value_sync(store, "k") == b"value"
            return any("is in use with eviction='adaptive'" in text for text in said(caplog))

        asyncio.run(until(is_told))
        assert store.eviction == "adaptive"
        holder.stdin.close()


@pytest.mark.slow
def test_who_asks_for_the_policy_of_another_process_is_not_told(tmp_path: Path) -> None:
    """Not of what an earlier store in this process has asked for in vain either."""
    cache = tmp_path / "cache"
    arguments = [sys.executable, "-c", textwrap.dedent(HOLDER), str(cache)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        holder.stdin.write("released\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "released\n"
        with pytest.warns(UserWarning, match="is in use with eviction='adaptive'"):
            first = CacheStore(MemoryStore(), cache_store=cache, source_id="source")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = CacheStore(
                MemoryStore(), cache_store=cache, source_id="source", eviction="adaptive"
            )
        assert first.eviction == second.eviction == "adaptive"
        holder.stdin.close()


HOLDER = """
    import sys
    from zarr.storage import MemoryStore
    from zcache import CachePool, CacheStore
    from zcache.testing import hold_index_lock

    store = CacheStore(
        MemoryStore(), cache_store=sys.argv[1], source_id="source", eviction="adaptive"
    )
    with hold_index_lock(sys.argv[1]):
        print("holds", flush=True)
        sys.stdin.readline()
    print("released", flush=True)
    sys.stdin.readline()
"""


async def test_another_policy_applies_on_the_next_start(
    cache: Store | CachePool, tmp_path: Path
) -> None:
    source = LocalStore(tmp_path / "source")
    store = CacheStore(source, cache_store=cache, max_size=60_000, eviction="adaptive")
    await fill(store, **{f"k{n}": bytes(1000) for n in range(40)})
    await check_quiet(store)
    store.close()
    del store
    if isinstance(cache, LocalStore):
        await closed(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = CacheStore(source, cache_store=cache, max_size=60_000, eviction="lru")
    assert (again.eviction, again.minimise) == ("lru", "requests")
    await fill(again, **{f"m{n}": bytes(1000) for n in range(40)})
    await check_quiet(again)


CHILD = """
    import asyncio, logging, sys, warnings
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import LocalStore
    from zcache import CachePool, CacheStore
    from zcache.testing import set_block_size

    set_block_size(1)  # as in the tests
    # Where the index was busy at the opening, the log tells.
    logged = []
    logging.getLogger("zcache").addFilter(
        lambda record: "is in use with" in record.getMessage() and logged.append(record)
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        store = CacheStore(
            LocalStore(sys.argv[1]), cache_store=sys.argv[2], max_size=1 << 20, eviction=sys.argv[3]
        )

    async def main():
        for _ in range(4):
            for n in range(200):
                await store.get(f"a/c/{n}", default_buffer_prototype())
        await store.drain()

    asyncio.run(main())
    print(store.eviction, len(told) + len(logged))
"""


def run_child(tmp_path: Path, eviction: str) -> subprocess.Popen[str]:
    """A process that reads 200 chunks of 8 KiB four times, over a cache of 1 MiB."""
    arguments = [str(tmp_path / "source"), str(tmp_path / "cache"), eviction]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
async def test_processes_go_by_one_policy(tmp_path: Path) -> None:
    source, cache = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "cache")
    for n in range(200):
        await source.set(f"a/c/{n}", buf(bytes(8192)))
    store = CacheStore(source, cache_store=cache, max_size=1 << 20, eviction="adaptive")
    children = [run_child(tmp_path, eviction) for eviction in ("adaptive", "adaptive", "none")]
    answers = [child.communicate()[0].split() for child in children]
    assert answers == [["adaptive", "0"], ["adaptive", "0"], ["adaptive", "1"]]
    assert store.cache_info()["current_size"] <= 1 << 20
    check_index(store)


async def test_processes_killed_at_work_leave_a_sound_index(tmp_path: Path) -> None:
    source, cache = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "cache")
    for n in range(200):
        await source.set(f"a/c/{n}", buf(bytes(8192)))
    store = CacheStore(source, cache_store=cache, max_size=1 << 20, eviction="adaptive")
    for _ in range(3):
        child = run_child(tmp_path, "adaptive")
        for n in range(200):
            await read_through(store, f"a/c/{n}")
        child.kill()
        child.communicate()
    await hits_of(store, range(200))
    assert store.cache_info()["current_size"] <= 1 << 20
    check_index(store)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ON_DISK)
async def test_adaptive_keeps_a_part_of_a_loop_whose_values_come_together(
    tmp_path: Path, kind: str
) -> None:
    """A reader asks for several chunks at once; each makes room before any of the others is there."""
    count, size, kept = 1600, 1000, 900
    source = SyncDictStore({f"c/{n}": bytes(size) for n in range(count)})
    cache: Any = CACHES[kind](tmp_path)
    store = CacheStore(
        source, cache_store=cache, eviction="adaptive", max_size=kept * 1000, source_id="x"
    )
    hits = []
    for _ in range(8):
        before = store.cache_stats()["hits"]
        for start in range(0, count, 16):
            keys = [f"c/{n}" for n in range(start, start + 16)]
            await asyncio.gather(*[read(store, key) for key in keys])
        await store.drain()
        hits.append(store.cache_stats()["hits"] - before)
    # All but what segments and folders take of it, and the values that are compared.
    assert min(hits[-3:]) > 0.35 * count, hits
    await check_quiet(store)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize("at_once", [1, 8])
async def test_adaptive_in_a_small_cache_on_disk_serves_about_what_none_does(
    tmp_path: Path, kind: str, is_shuffled: bool, at_once: int
) -> None:
    """What folders and segments take comes and goes, and counts for as much as several values do."""
    set_block_size(None)
    count, size, epochs = 400, 3584, 8
    source = SyncDictStore({f"c/{n}": bytes(size) for n in range(count)})
    hits = {}
    for eviction in ("none", "adaptive"):
        folder, rng = tmp_path / eviction, np.random.default_rng(0)
        cache: Any = CACHES[kind](folder)
        store = CacheStore(
            source, cache_store=cache, eviction=eviction, max_size=1_420_000, source_id="x"
        )
        hits[eviction] = []
        for _ in range(epochs):
            order = rng.permutation(count) if is_shuffled else np.arange(count)
            before = store.cache_stats()["hits"]
            for some in np.split(order, count // at_once):
                await asyncio.gather(*[read(store, f"c/{n}") for n in some])
                await store.drain()
            hits[eviction].append(store.cache_stats()["hits"] - before)
    served = {eviction: sum(some[3:]) for eviction, some in hits.items()}
    assert served["adaptive"] >= 0.7 * served["none"], hits
