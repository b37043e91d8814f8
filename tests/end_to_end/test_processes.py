"""Several processes and one cache directory: one bound, one truth, and no harm from those that die.

What happens in the processes is in `crashes.py` and `agent.py`.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import multiprocessing
import os
import pickle
import subprocess
from typing import TYPE_CHECKING

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore

from agent import SOURCE_ID, Agent, spawned
from crashes import LoggingStore, play, reads_of, size_at_one_instant
from pools import ON_DISK, cache_at
from support import buf, check_quiet, check_quiet_sync, fill, read, read_through, said, until, write
from zcache import CacheStore, IndexLockTimeout
from zcache.testing import StoreDouble, entries, hold_index_lock, index_slot, missing_keys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zarr.abc.store import Store

OTHERS = 256
"""Processes that one directory has slots for."""


def open_store(
    where: Path, source: Store | None = None, *, max_size: int | None = None
) -> CacheStore:
    return CacheStore(
        source or LoggingStore(where / "source"),
        cache_store=cache_at(where / "cache"),
        source_id=SOURCE_ID,
        max_size=max_size,
    )


@pytest.fixture(params=ON_DISK, autouse=True)
def is_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processes share a pool; see `cache_at`."""
    is_so: bool = request.param == "pool"
    monkeypatch.setenv("ZCACHE_TEST_POOL", "1" if is_so else "")
    return is_so


@pytest.fixture
def other(is_pool: bool, tmp_path: Path) -> Iterator[Agent]:
    """Another process on the directory."""
    with Agent(tmp_path) as agent:
        yield agent


# --------------------------------------------------------------------- workers and bounds


@pytest.mark.slow
def test_bound_four_processes_fill_and_evict_is_never_exceeded(
    tmp_path: Path, is_pool: bool
) -> None:
    found = play("bound", tmp_path, pool=is_pool)
    assert found["looks"] > 20
    assert found["bound"] / 2 < found["peak"] <= found["bound"]


def test_epochs_workers_deal_keys_out_anew_read_the_source_once(
    tmp_path: Path, is_pool: bool
) -> None:
    """As a loader's worker processes do: the first epoch reads each key once, later ones none."""
    reads = play("epochs", tmp_path, pool=is_pool)["reads"]
    assert reads == [{"all": 80, "most": 1}] * 3


def test_fork_while_in_use_both_go_on_and_share(tmp_path: Path, is_pool: bool) -> None:
    assert play("forks", tmp_path, pool=is_pool) == {"most": 1}


def test_spawn_store_by_pickle_shares_the_cache(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_size=1000)
    asyncio.run(write(store, "a", b"1"))
    slot = index_slot(store)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        value, hits, other = pool.apply(spawned, (pickle.dumps(store), "a"))
    assert (value, hits) == (b"1", 1)
    assert other != slot
    assert asyncio.run(read(store, "b")) == b"by a worker"
    assert reads_of(tmp_path / "source") == []
    check_quiet_sync(store)


async def test_bound_smaller_in_another_process_is_in_force_while_that_lives(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path, max_size=100)
    await fill(store, **{f"a/{number}": bytes(10) for number in range(8)})
    with Agent(tmp_path, max_size=30) as strict:
        await write(store, "b", bytes(10))  # Enforced before new bytes are written.
        size = store.cache_info()["current_size"]
        assert size == strict("info")["current_size"] == 30
        await write(store, "large", bytes(31))
        assert strict("info")["current_size"] == 30

    # That its process has died is noticed by reads, at most once a second.
    while store.cache_info()["current_size"] != 61:
        await asyncio.sleep(0.05)
        await read_through(store, "unknown")
        await write(store, "large", bytes(31))
    await check_quiet(store)


async def test_bound_smaller_in_the_same_process_is_in_force_while_its_store_lives(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path, max_size=100)
    await fill(store, **{f"a/{number}": bytes(10) for number in range(8)})
    strict = open_store(tmp_path, max_size=30)
    assert index_slot(strict) == index_slot(store)
    # In the background, whether or not anything is filled.
    await until(lambda: store.cache_info()["current_size"] == 30)
    await write(store, "b", bytes(10))
    info = store.cache_info()
    assert info == strict.cache_info()
    assert info["max_size"] == info["current_size"] == 30
    await write(store, "large", bytes(31))
    assert store.cache_info()["current_size"] == 30
    del strict
    gc.collect()
    await write(store, "large", bytes(31))
    assert store.cache_info()["current_size"] == 61
    await check_quiet(store)


async def test_slots_all_taken_the_source_serves_until_one_is_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path, max_size=100)
    await write(store, "a", b"1")
    del store
    gc.collect()
    others = []
    for number in range(OTHERS):
        slot = tmp_path / f"cache/.zcache/index/s{number}"
        others.append(os.open(slot, os.O_RDWR | os.O_CREAT))
        fcntl.flock(others[-1], fcntl.LOCK_EX)
    late = open_store(tmp_path, max_size=100)
    for _ in range(2):
        assert await read(late, "a") == b"1"
    assert reads_of(tmp_path / "source") == ["a", "a"]
    assert "256" in caplog.text
    assert len(said(caplog)) == 1
    del late
    gc.collect()
    os.close(others.pop())
    for _ in range(100):
        known = len(reads_of(tmp_path / "source"))
        last = open_store(tmp_path, max_size=100)
        assert await read(last, "a") == b"1"
        if len(reads_of(tmp_path / "source")) == known:
            break
        # What has timed out may be looking for a slot just now, and have this one.
        last = None
        gc.collect()
        await asyncio.sleep(0.1)
    else:
        pytest.fail("it is never free")
    for other in others:
        os.close(other)
    assert last is not None
    await check_quiet(last)


# ------------------------------------------------------- what one does and the other sees


async def test_write_in_another_process_is_read_at_once(tmp_path: Path, other: Agent) -> None:
    store = open_store(tmp_path)
    for text in ("1", "22"):
        await store.set("a/c/0", buf(text.encode()))
        assert other("get", "a/c/0") == text
        assert other("get", "a/c/0") == text
        other("set", "a/c/0", text + "!")
        assert await read(store, "a/c/0") == text.encode() + b"!"
        other("set", "a/c/1", "x")
        assert await read(store, "a/c/1") == b"x"
        await store.delete("a/c/1")
        assert other("get", "a/c/1") is None
        await store.set("a/c/1", buf(b"y"))
        assert other("get", "a/c/1") == "y"
        other("delete_dir", "a")
        assert await read(store, "a/c/0") is None
        assert await read(store, "a/c/1") is None
    assert other("drain")
    await check_quiet(store)
    other("check")


async def test_absence_in_one_process_is_known_in_the_other_and_ended_by_both(
    tmp_path: Path, other: Agent
) -> None:
    source = StoreDouble(LocalStore(tmp_path / "source"))
    store = open_store(tmp_path, source)
    for what, key in [
        ("set", "a/c/0"),
        ("delete", "a/c/0"),
        ("delete_dir", "a"),
        ("clear", ""),
        ("invalidate", "a/c"),
    ]:
        assert other("get", "a/c/0") is None
        source.take()
        assert await read(store, "a/c/0") is None
        assert not await store.exists("a/c/0")
        assert source.take() == {}
        other(what, key, "1")
        assert "a/c/0" not in missing_keys(store)
        assert await read(store, "a/c/0") == (b"1" if what == "set" else None)
        await store.delete("a/c/0")
        assert await read(store, "a/c/0") is None
        # And the other way round.
        assert other("exists", "a/c/0") is False
        await store.set("a/c/0", buf(b"2"))
        assert other("get", "a/c/0") == "2"
        assert "a/c/0" not in other("missing_keys")
        # Either may have filled it, and so kept the other one from it.
        await store.drain()
        assert other("drain")
        assert other("cached_keys", "a") == ["a/c/0"]
        assert other("invalidate", "a/c/0") == 1
        assert not store.is_cached("a/c/0")
        await store.delete("a/c/0")
    await check_quiet(store)


async def test_fill_in_one_process_is_a_hit_in_the_other(tmp_path: Path, other: Agent) -> None:
    store = open_store(tmp_path)
    other("set", "a", "0123456789")
    assert other("drain")
    assert await read(store, "a") == b"0123456789"
    assert await read(store, "a", RangeByteRequest(2, 4)) == b"23"
    assert reads_of(tmp_path / "source") == []
    assert store.cache_info() == other("info")
    await check_quiet(store)


@pytest.mark.parametrize("what", ["set", "delete", "delete_dir", "clear", "invalidate"])
async def test_missing_key_read_while_another_process_changes_it_is_not_remembered(
    tmp_path: Path, other: Agent, what: str
) -> None:
    source = StoreDouble(LocalStore(tmp_path / "source"))
    store = open_store(tmp_path, source)
    gate = source.block("get", times=1, after=True)
    reader = asyncio.create_task(read(store, "a/c/0"))
    await gate.entered_async()
    other(what, "a" if what == "delete_dir" else "a/c/0", "new")
    gate.release()
    assert await reader is None  # It began before.
    assert missing_keys(store) == []
    assert await read(store, "a/c/0") == (b"new" if what == "set" else None)
    await check_quiet(store)


@pytest.mark.parametrize("what", ["set", "delete", "delete_dir", "clear", "invalidate"])
async def test_fill_under_way_changed_in_another_process_is_void(
    tmp_path: Path, other: Agent, what: str
) -> None:
    """Here a value is read from the source; elsewhere it is replaced before it gets into the cache."""
    source = StoreDouble(LocalStore(tmp_path / "source"))
    await source.inner.set("a/c/0", buf(b"old"))
    store = open_store(tmp_path, source)
    gate = source.block("get", times=1, after=True)
    reader = asyncio.create_task(read(store, "a/c/0"))
    await gate.entered_async()
    other(what, "a" if what == "delete_dir" else "a/c/0", "new")
    gate.release()
    assert await reader == b"old"  # It began before.
    now = {"set": "new", "clear": "old", "invalidate": "old"}.get(what)
    for _ in range(2):
        assert await read(store, "a/c/0") == (now.encode() if now else None)
        assert other("get", "a/c/0") == now
        await store.drain()
    await check_quiet(store)


async def test_read_after_a_write_in_another_process_joins_no_earlier_read(
    tmp_path: Path, other: Agent
) -> None:
    source = StoreDouble(LocalStore(tmp_path / "source"))
    await source.inner.set("a/c/0", buf(b"old"))
    store = open_store(tmp_path, source)
    gate = source.block("get", after=True)
    first = asyncio.create_task(read(store, "a/c/0"))
    await gate.entered_async()
    other("set", "a/c/0", "new")
    # What the other has cached is found; drop it, so that this one has to read for itself.
    other("clear")
    second = asyncio.create_task(read(store, "a/c/0"))
    await gate.entered_async(2)
    gate.release()
    assert [await first, await second] == [b"old", b"new"]


@pytest.mark.parametrize("end", ["ends", "dies"])
@pytest.mark.parametrize("what", ["set", "delete", "delete_dir"])
async def test_change_under_way_in_another_process_stops_only_what_it_is_about(
    tmp_path: Path, other: Agent, what: str, end: str
) -> None:
    """A change that takes long, or never ends, is nothing to those who read something else."""
    values = {"a/c/0": b"1", "a/c/1": b"22", "ab/c/0": b"333", "b/c/0": b"4444"}
    source = StoreDouble(LocalStore(tmp_path / "source"))
    behind = source.inner
    for key, value in values.items():
        await behind.set(key, buf(value))
    store = open_store(tmp_path, source)
    gate = source.block("get", times=1, after=True)
    under_way = asyncio.create_task(read(store, "b/c/0"))
    await gate.entered_async()
    other("begin", "a" if what == "delete_dir" else "a/c/0", what)
    changed = {"a/c/0", "a/c/1"} if what == "delete_dir" else {"a/c/0"}
    for _ in range(2):
        for key in values.keys() - {"b/c/0"}:
            assert await read_through(store, key) == values[key]
    gate.release()
    assert await under_way == b"4444"
    await store.drain()
    # What may be changed at any time is not kept.
    assert {entry.key for entry in entries(store)} == values.keys() - changed
    if end == "ends":
        other("end")
    else:
        other.kill()
    for _ in range(2):
        for key in values:
            assert await read_through(store, key) == await read(behind, key), key
    if end == "dies":
        # That its process has died is noticed at most a second later; then all is cached again.
        while values.keys() != {entry.key for entry in entries(store)}:
            for key in [*values, "unknown"]:
                assert await read_through(store, key) == values.get(key)
            await asyncio.sleep(0.05)
    await check_quiet(store)


# ------------------------------------------------------------------ a neighbour that is stopped


async def test_lock_held_elsewhere_reads_go_to_the_source_and_the_loop_goes_on(
    tmp_path: Path,
) -> None:
    """A process that is stopped in the middle of a step holds up reads and writes for a second."""
    store = open_store(tmp_path)
    await write(store, "a", b"1")
    lock = hold_index_lock(tmp_path / "cache")
    readers = [asyncio.create_task(read(store, key)) for key in ("a", "b")]
    writers = [
        asyncio.create_task(store.set("c", buf(b"3"))),
        asyncio.create_task(store.delete("e")),
    ]
    # One that the index only counts does not wait at all.
    assert await read(store, "a", RangeByteRequest(1, 0)) == b""
    cancelled = asyncio.create_task(store.set("d", buf(b"4")))
    await asyncio.sleep(0)
    # Not even a cancellation waits for the lock.
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    turns = 0
    while not all(reader.done() for reader in readers):
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 10
    assert [reader.result() for reader in readers] == [b"1", None]
    assert reads_of(tmp_path / "source").count("a") >= 1
    assert lock.release()
    outcomes = await asyncio.gather(*writers, return_exceptions=True)
    assert all(one is None or isinstance(one, IndexLockTimeout) for one in outcomes)
    assert await read(store, "c") == (b"3" if outcomes[0] is None else None)
    await check_quiet(store)


async def test_lock_taken_while_the_source_answers_delays_no_reader(tmp_path: Path) -> None:
    """The fill waits for the lock, in the background, and caches the value once it is free."""
    source = StoreDouble(LocalStore(tmp_path / "source"))
    await source.inner.set("a", buf(b"1"))
    store = open_store(tmp_path, source)
    gate = source.block("get", times=1)
    reader = asyncio.create_task(read(store, "a"))
    await gate.entered_async()
    lock = hold_index_lock(tmp_path / "cache")
    gate.release()
    assert await reader == b"1"
    assert lock.release()
    await store.drain()
    assert store.cache_info()["cached_keys"] == 1
    await check_quiet(store)


async def test_lock_held_for_long_fill_goes_uncached_and_nothing_is_left(tmp_path: Path) -> None:
    source = StoreDouble(LocalStore(tmp_path / "source"))
    await source.inner.set("a", buf(b"1"))
    store = open_store(tmp_path, source)
    gate = source.block("get", times=1)
    reader = asyncio.create_task(read(store, "a"))
    await gate.entered_async()
    lock = hold_index_lock(tmp_path / "cache")
    gate.release()
    assert await reader == b"1"
    # The job waits for a second, and ends though the lock is still held.
    assert await store.drain()
    assert lock.release()
    assert await read_through(store, "a") == b"1"
    assert await read(store, "a") == b"1"
    assert source.calls["get"] == 2
    await until(lambda: store.cache_info()["cached_keys"] == 1)
    await check_quiet(store)


def test_directory_removed_while_in_use_is_made_anew_and_shared(
    tmp_path: Path, is_pool: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path, max_size=100)
    asyncio.run(write(store, "a", bytes(50)))
    (tmp_path / "cache").rename(tmp_path / "gone")
    subprocess.run(["rm", "-r", str(tmp_path / "gone")], check=True)
    assert asyncio.run(read(store, "a")) == bytes(50)
    with Agent(tmp_path, max_size=100) as later:
        later("set", "b", "b" * 60)
        assert later("drain")
        asyncio.run(write(store, "c", bytes(60)))
        assert store.cache_info() == later("info")
        # Sizes of segments count holes.
        assert is_pool or size_at_one_instant(tmp_path / "cache") <= 100
        assert asyncio.run(read(store, "b")) == b"b" * 60
        check_quiet_sync(store)
        later("check")
    assert all("cannot be used" not in message for message in said(caplog))
