"""How a cache directory is opened, opened again, and rebuilt: everything survives, and ages go on."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import shutil
import threading
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest

from crashes import as_if_inside
from directories import INDEX, INDEX_FILES, closed, complete, open_store, reads, sizes_in
from forks import fork, wait
from support import buf, check_quiet, drained, fill, logged, read, read_through, until, write
from zcache._backends.directory import files, index
from zcache._core import Index
from zcache.testing import (
    FakeClock,
    entries,
    index_slot,
    is_complete,
    recency,
    without_shared_index,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from zcache import CacheStore

START = 1_700_000_000.0
"""A time since 1970, as the index of a directory has it."""

# ------------------------------------------------------------------------------- restarts


async def test_open_again_values_ranges_and_order_survive(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path, cache_set_data=False)
    values = {f"a/c/{number}": bytes([number]) * 10 for number in range(6)}
    for key, value in values.items():
        await store.set(key, buf(value))
    for key in values:
        await read_through(store, key)
    await store.set("b", buf(b"0123456789"))
    for request in (RangeByteRequest(2, 4), OffsetByteRequest(7), SuffixByteRequest(1)):
        await read_through(store, "b", request)
    await read(store, "a/c/0")
    order, info = recency(store), store.cache_info()
    del store
    await closed(tmp_path)

    store, source = open_store(tmp_path)
    assert recency(store) == order
    assert store.cache_info() | {"cache_set_data": False} == info
    for key, value in values.items():
        assert await read(store, key) == value
    assert await read(store, "b", RangeByteRequest(2, 4)) == b"23"
    assert await read(store, "b", OffsetByteRequest(7)) == b"789"
    assert await read(store, "b", SuffixByteRequest(1)) == b"9"
    assert reads(source) == 0
    await check_quiet(store)
    for key in ("a/c/0", "a/c/2"):
        await read(store, key)
    del store
    await closed(tmp_path)

    store, _ = open_store(tmp_path, max_size=24)
    # Less than there is: that is enforced before anything new is written.
    await write(store, "new", bytes(4))
    assert sizes_in(tmp_path / "cache") == {"a/c/0": 10, "a/c/2": 10, "new": 4}
    await check_quiet(store)


async def test_open_again_while_fills_are_pending_both_share(tmp_path: Path) -> None:
    """Within a process there is one index for each directory, however it is named."""
    store, _ = open_store(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    other, source = open_store(tmp_path / "link")
    await store.set("a", buf(b"1"))
    assert await read(other, "a") == b"1"
    assert reads(source) == 0
    assert index_slot(other) == index_slot(store)
    await store.drain()
    assert other.cache_info() == store.cache_info()
    await check_quiet(store)
    assert len(list((tmp_path / "cache" / INDEX).glob("s[0-9]*"))) == 1


@pytest.mark.parametrize("rebuilt", [False, True])
async def test_ages_over_restarts_and_rebuilds_count_on(tmp_path: Path, rebuilt: bool) -> None:
    clock = FakeClock(START)
    options: dict[str, Any] = {"max_age_seconds": 100, "clock": clock}
    store, _ = open_store(tmp_path, **options)
    await fill(store, a=b"1")
    clock.advance(60)
    await fill(store, b=b"2")
    del store
    await closed(tmp_path)
    if rebuilt:
        shutil.rmtree(tmp_path / "cache" / INDEX)
    store, source = open_store(tmp_path, **options)
    assert await store.getsize("a") == 1
    assert [await read(store, key) for key in "ab"] == [b"1", b"2"]
    assert reads(source) == 0
    clock.advance(40)  # 100 for one, 40 for the other
    assert [await read_through(store, key) for key in "ab"] == [b"1", b"2"]
    assert reads(source) == 1
    clock.advance(-5000)
    del store
    await closed(tmp_path)
    store, source = open_store(tmp_path, **options)
    # From a future that never was: how old they are is not known.
    assert [await read_through(store, key) for key in "ab"] == [b"1", b"2"]
    assert reads(source) == 2
    assert [await read(store, key) for key in "ab"] == [b"1", b"2"]
    assert reads(source) == 0
    await check_quiet(store)


async def test_rebuild_orders_values_by_their_fetch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock(START)
    store, _ = open_store(tmp_path, clock=clock)
    for number in (2, 0, 1):
        await write(store, f"a/c/{number}", bytes(10))
        clock.advance(0.002)
    await read(store, "a/c/2", None)
    await write(store, "b", b"0123456789")
    del store
    await closed(tmp_path)
    shutil.rmtree(tmp_path / "cache" / INDEX)
    store, source = open_store(tmp_path, clock=clock)
    assert [record.levelno for record in logged(caplog)] == [logging.WARNING]
    assert "4 values, 40 bytes" in caplog.text
    assert [key for key, _ in recency(store)] == ["a/c/2", "a/c/0", "a/c/1", "b"]
    assert await read(store, "a/c/1") == bytes(10)
    assert reads(source) == 0
    await check_quiet(store)


@pytest.mark.slow
async def test_index_empty_is_small_and_grows_for_all(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path)
    root = tmp_path / "cache" / INDEX
    assert sum(path.stat().st_blocks * 512 for path in root.iterdir()) < 576 * 1024
    before = (root / "cells").stat().st_size
    other, fresh = Index.open(str(root))
    assert not fresh
    for number in range(3000):
        await store.set(f"a/c/{number}", buf(b""))
    await drained(store)
    assert (root / "cells").stat().st_size > before
    # It has grown while another participant has it mapped.
    # A few fills are refused as overtaken by the writes of other keys that go on meanwhile.
    assert len(other) == store.cache_info()["cached_keys"] > 2900
    assert all(other.peek(entry.key, None, 0.0) == 0 for entry in entries(store))
    other.validate()
    await check_quiet(store)


# ------------------------------------------------------------------ while it is rebuilt


class SlowScan:
    """Holds up the scan of a whole directory after it has found everything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_walked, self.go = threading.Event(), threading.Event()
        find = files.Finder.find

        def slow(finder: files.Finder, below: str | None = None) -> Iterator[tuple[int, int, str]]:
            found = list(find(finder, below))
            if below is None:
                self.has_walked.set()
                assert self.go.wait(60)
            return iter(found)

        monkeypatch.setattr(files.Finder, "find", slow)
        monkeypatch.setattr(index, "REBUILD_PATIENCE", 0.05)


async def change(store: CacheStore, what: str, keys: Iterable[str]) -> None:
    if what == "clear_cache":
        await store.clear_cache()
    for key in () if what == "clear_cache" else keys:
        if what == "set":
            await store.set(key, buf(b"new!"))
        else:
            await (store.delete(key) if what == "delete" else store.delete_dir(key.split("/")[0]))


@pytest.mark.parametrize("what", ["set", "delete", "delete_dir", "clear_cache"])
async def test_change_while_the_index_is_rebuilt_is_never_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The scan has found a value and its ranges; they go before they are entered."""
    store, source = open_store(tmp_path)
    await source.inner.set("b/c/0", buf(b"0123"))
    keys = ["a/c/0", "a/c/1", "d"]
    for key in keys:
        await store.set(key, buf(b"old"))
    for request in (RangeByteRequest(0, 2), RangeByteRequest(1, 3)):
        await read(store, "b/c/0", request)
    await drained(store)
    scan = SlowScan(monkeypatch)
    as_if_inside(tmp_path / "cache")  # Found by the next step.
    assert await read(store, "d") == b"old"
    await asyncio.to_thread(scan.has_walked.wait, 60)
    assert not is_complete(store)
    await change(store, what, ["a/c/0", "b/c/0"])
    scan.go.set()
    await complete(store)
    for key in [*keys, "b/c/0"]:
        assert await read(store, key) == await read(source.inner, key)
    # What the scan had found of them counts until it is seen that it is gone, at later writes.
    await write(store, "e", b"")
    await write(store, "f", b"")
    await check_quiet(store)


async def test_open_slow_scan_goes_on_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The opening of a directory waits for a second, not for a million files."""
    keys = [f"a/c/{number}" for number in range(5)]
    store, _ = open_store(tmp_path)
    for key in keys:
        await write(store, key, b"old")
    del store
    await closed(tmp_path)
    (tmp_path / "cache" / INDEX / "head").write_bytes(b"")
    scan = SlowScan(monkeypatch)
    store, source = open_store(tmp_path)
    assert not is_complete(store)
    # Meanwhile the source serves, and nothing is taken in; what is written is not served old later.
    for key in keys:
        assert await read_through(store, key) == b"old"
    assert reads(source) == len(keys)
    await write(store, keys[0], b"new")
    assert await read(store, keys[0]) == b"new"
    assert entries(store) == []
    scan.go.set()
    await complete(store)
    assert {entry.key for entry in entries(store)} >= set(keys[1:])
    reads(source)
    assert await read_through(store, keys[0]) == b"new"
    for key in keys[1:]:
        assert await read(store, key) == b"old"
    assert reads(source) <= 1
    await check_quiet(store)


async def test_open_scan_fails_in_the_background_the_source_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = open_store(tmp_path)
    await write(store, "a", b"1")
    del store
    await closed(tmp_path)
    (tmp_path / "cache" / INDEX / "head").write_bytes(b"")
    go = threading.Event()

    def no_walk(*_: Any) -> Iterator[tuple[int, int, str]]:
        assert go.wait(60)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.Finder, "find", no_walk)
    monkeypatch.setattr(index, "REBUILD_PATIENCE", 0.05)
    store, _ = open_store(tmp_path)
    go.set()
    await until(lambda: "cannot be used any more" in caplog.text)
    assert await read_through(store, "a") == b"1"
    await write(store, "a", b"2")
    assert await read_through(store, "a") == b"2"
    assert caplog.text.count("cannot be used any more") == 1


# ---------------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    "part",
    [
        *(".zcache", ".zcache/index", ".zcache/tmp", ".zcache/ranges", ".zcache/stamp.json"),
        *(f"{INDEX}/{name}" for name in (*INDEX_FILES, "lock", "owner", "s0")),
    ],
)
@pytest.mark.parametrize("in_use", [False, True])
async def test_part_of_the_folder_removed_reads_are_right_and_caching_comes_back(
    tmp_path: Path, part: str, in_use: bool
) -> None:
    """Any part of `.zcache` may vanish, whether or not a store is open."""
    store, source = open_store(tmp_path, max_size=100)
    await write(store, "a/c/0", bytes(10))
    await source.inner.set("b", buf(b"0123456789"))
    await read_through(store, "b", RangeByteRequest(0, 5))
    if not in_use:
        del store
        await closed(tmp_path)
    gone = tmp_path / "cache" / part
    if gone.is_dir():
        shutil.rmtree(gone)
    elif gone.exists():
        gone.unlink()
    else:
        names = sorted(path.name for path in gone.parent.iterdir())
        pytest.fail(f"{part} is none of {names}")
    if not in_use:
        store, source = open_store(tmp_path, max_size=100)
    for number in range(3):
        await store.set(f"a/c/{number}", buf(bytes([number]) * 10))
        assert await read_through(store, f"a/c/{number}") == bytes([number]) * 10
        assert await read_through(store, "b", RangeByteRequest(0, 5)) == b"01234"
    await complete(store)
    for _ in range(2):
        reads(source)
        for number in range(3):
            assert await read_through(store, f"a/c/{number}") == bytes([number]) * 10
    assert reads(source) == 0
    await check_quiet(store)


async def test_directory_not_writable_the_source_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where the directory should be stands for whatever cannot be used."""
    (tmp_path / "cache").write_bytes(b"not a directory")
    store, source = open_store(tmp_path)
    await source.inner.set("a", buf(b"1"))
    for _ in range(2):
        assert await read_through(store, "a") == b"1"
    await store.set("a", buf(b"2"))
    assert await read_through(store, "a") == b"2"
    await store.delete("a")
    assert await read(store, "a") is None
    assert reads(source) == 4
    assert [record.levelno for record in logged(caplog)] == [logging.WARNING]
    assert (tmp_path / "cache").read_bytes() == b"not a directory"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENODEV, errno.ENOSYS])
async def test_index_cannot_be_shared_is_kept_in_memory(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """On a file system that cannot lock or map; what it holds is found by a scan."""
    store, _ = open_store(tmp_path, max_size=100)
    await write(store, "a", b"1")
    del store
    await closed(tmp_path)

    with without_shared_index(OSError(number, os.strerror(number))):
        store, source = open_store(tmp_path, max_size=100)
    assert "cannot be shared" in caplog.text
    assert index_slot(store) is None
    assert await read(store, "a") == b"1"
    assert reads(source) == 0
    for key, size in (("b", 50), ("c", 60)):
        await write(store, key, bytes(size))
        assert await read_through(store, key) == bytes(size)
    # What is written is cached when it is read next.
    assert reads(source) == 2
    assert sizes_in(tmp_path / "cache") == {"c": 60}
    await check_quiet(store)


# ------------------------------------------------------------------------------------ forks


def test_fork_frames_hold_the_index_of_the_parent_its_lock_is_let_go(tmp_path: Path) -> None:
    """An index that the child cannot drop keeps no slot of its parent, and takes no step."""
    store, _ = open_store(tmp_path)
    asyncio.run(write(store, "a", b"1"))
    slot = index_slot(store)
    kept = store._cache.shared.handle.index  # As the frames of other threads do.
    told, tell = os.pipe()
    stay, leave = os.pipe()

    def work() -> None:
        os.close(leave)
        assert asyncio.run(read(store, "a")) == b"1"  # noqa: F821 - deleted later
        assert index_slot(store) != slot  # noqa: F821
        with pytest.raises(RuntimeError):
            len(kept)  # noqa: F821
        os.write(tell, b"!")
        os.read(stay, 1)

    worker = fork(work)
    try:
        assert os.read(told, 1) == b"!"
        del store, kept
        gc.collect()
        # The child lives, and the slot is free all the same.
        again, _ = open_store(tmp_path)
        assert index_slot(again) == slot
    finally:
        os.close(leave)
        assert wait([worker]) == [0]
        for file in (told, tell, stay):
            os.close(file)


async def test_child_that_is_forked_while_a_bound_is_enforced_waits_for_no_thread_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = open_store(tmp_path)
    monkeypatch.setattr("zcache._backends.directory.bound.BOUND_PATIENCE", 3600)
    # As while a thread of this process evicts.
    store._cache.shared.place._bound._kept = threading.Event()
    process = fork(lambda: open_store(tmp_path))
    assert await asyncio.to_thread(wait, [process]) == [0]
