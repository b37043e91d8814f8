"""Hits of a pool that are read where they are looked up."""

from __future__ import annotations

import asyncio
import csv
import gzip
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import MemoryStore

from support import PROTOTYPE, buf, check_quiet, read, read_through
from zcache import CachePool, CacheStore
from zcache.testing import StoreDouble, hold_index_lock, record_steps

if TYPE_CHECKING:
    from pathlib import Path

    from zcache.testing import Step

VALUE = np.random.default_rng(0).bytes(3 * 4096 + 100)
REQUESTS = [
    None,
    RangeByteRequest(0, 1),
    RangeByteRequest(4000, 9000),
    OffsetByteRequest(12_000),
    SuffixByteRequest(300),
]
EXPECTED = [VALUE, VALUE[:1], VALUE[4000:9000], VALUE[12_000:], VALUE[-300:]]
TURN = 16 * 2**20
"""Bytes that are read in one turn of an event loop."""
LEAST = 2**14
"""Bytes that each read counts for at least."""


def open_store(where: Path, source: Any, **options: Any) -> CacheStore:
    pool = CachePool(where / "pool")
    return CacheStore(source, cache_store=pool, source_id="source", **options)


@pytest.mark.parametrize(("request_", "expected"), list(zip(REQUESTS, EXPECTED, strict=True)))
@pytest.mark.parametrize("filled", ["value", "part"])
async def test_hit_is_what_was_asked_for_in_memory_of_its_own(
    tmp_path: Path, request_: Any, expected: bytes, filled: str
) -> None:
    source = StoreDouble(MemoryStore({"a/c/0": buf(VALUE)}))
    store = open_store(tmp_path, source)
    asked = None if filled == "value" else request_
    # Once more, for the first hit is compared with its checksum.
    for _ in range(2):
        await read_through(store, "a/c/0", asked)
    source.take()
    for _ in range(2):
        found = await store.get("a/c/0", PROTOTYPE, request_)
        assert found is not None
        assert found.to_bytes() == expected
        # It is its reader's: to write to it changes no later answer.
        array = np.asarray(found.as_numpy_array())
        array[:] = 0
    assert source.take()["get"] == 0
    await check_quiet(store)


async def test_hits_of_a_value_that_others_write_are_never_older(tmp_path: Path) -> None:
    source = MemoryStore({"a/c/0": buf(VALUE)})
    store, other = open_store(tmp_path, source), open_store(tmp_path, source)
    for number in range(20):
        new = bytes([number]) * (100 * number + 1)
        await other.set("a/c/0", buf(new))
        assert await read(store, "a/c/0") == new
        assert await read(store, "a/c/0", RangeByteRequest(0, 1)) == new[:1]
        await other.drain()
        assert await read(store, "a/c/0") == new


@pytest.mark.parametrize(("size", "count"), [(2**16, 1500), (100, 5000)])
async def test_many_hits_leave_turns_to_other_tasks(tmp_path: Path, size: int, count: int) -> None:
    names = [f"a/c/{number}" for number in range(200)]
    source = MemoryStore({name: buf(bytes(size)) for name in names})
    store = open_store(tmp_path, source)
    for _ in range(2):
        for name in names:
            await read_through(store, name)
    keys = [names[number % len(names)] for number in range(count)]
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    watcher = asyncio.ensure_future(count_turns())
    found = await asyncio.gather(*(store.get(key, PROTOTYPE) for key in keys))
    watcher.cancel()
    assert all(value is not None and len(value) == size for value in found)
    assert turns >= count * max(size, LEAST) // TURN - 1


async def test_recording_has_the_sizes_of_hits(tmp_path: Path) -> None:
    store = open_store(tmp_path, MemoryStore({"a/c/0": buf(VALUE)}))
    for _ in range(2):
        await read_through(store, "a/c/0")
    path = tmp_path / "requests.csv.gz"
    with store.record(path):
        for request in REQUESTS:
            await store.get("a/c/0", PROTOTYPE, request)
    with gzip.open(path, "rt") as file:
        lines = [line for line in file if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    assert [int(row["size"]) for row in rows] == [len(expected) for expected in EXPECTED]
    assert [row["entry_size"] for row in rows] == [str(len(VALUE))] * len(rows)
    assert [row["hit"] for row in rows] == ["1"] * len(rows)


async def test_steps_of_a_pool_can_be_recorded(tmp_path: Path) -> None:
    source = StoreDouble(MemoryStore({"a/c/0": buf(VALUE)}))
    store = open_store(tmp_path, source)
    for _ in range(2):
        await read_through(store, "a/c/0")
    source.take()
    with record_steps(store) as steps:
        assert await read(store, "a/c/0") == VALUE
    assert [step.name for step in steps] == ["lookup"]
    assert await read(store, "a/c/0") == VALUE
    assert source.take()["get"] == 0


async def test_hit_waits_for_a_lock_that_was_taken_since_it_was_looked_up(tmp_path: Path) -> None:
    source = StoreDouble(MemoryStore({key: buf(VALUE) for key in ("a/c/0", "a/c/1")}))
    store = open_store(tmp_path, source)
    for _ in range(2):
        await read_through(store, "a/c/0")
        await read_through(store, "a/c/1")
    source.take()
    held: list[threading.Timer] = []

    def hold(step: Step) -> None:
        if step.name == "lookup" and step.args[0] == "a/c/0" and not held:
            # Where the last value is, a view of the index knows by itself.
            store.get_sync("a/c/1")
            lock = hold_index_lock(tmp_path / "pool")
            held.append(threading.Timer(0.2, lock.release))
            held[0].start()

    with record_steps(store, hold):
        assert await read(store, "a/c/0") == VALUE
    (release,) = held
    release.join()
    assert sum(source.take().values()) == 0
    assert store.cache_stats()["cache_failures"] == 0
    await check_quiet(store)


LITTLE_MEMORY = """
import asyncio, mmap, resource, sys
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import MemoryStore
from zcache import CachePool, CacheStore

SIZE = 4 << 20

async def main():
    source = MemoryStore({"a": cpu.Buffer.from_bytes(bytes(SIZE))})
    store = CacheStore(source, cache_store=CachePool(sys.argv[1]), source_id="s")
    for _ in range(2):
        assert len(await store.get("a", default_buffer_prototype())) == SIZE
        await store.drain()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SIZE // 4, before[1]))
    kept = []
    for _ in range(3):
        try:
            kept.append(await store.get("a", default_buffer_prototype()))
        except MemoryError:
            pass
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert len(await store.get("a", default_buffer_prototype())) == SIZE

asyncio.run(main())
"""


def test_hit_without_memory_is_an_error_that_programs_expect(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "p")], check=True, timeout=120
    )
